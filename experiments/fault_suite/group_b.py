"""Faults of checkpoints: flipped bits, missing files, mismatched arrays."""

import json
import pathlib
import random
import shutil
import time

import jax
from jax import numpy as jnp
import numpy as np
import safetensors.numpy

from experiments.fault_suite import fault
from fsq_jax import checkpoints
from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import tokenizer
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import integrity
from fsq_jax.checkpoints import saved_model
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import files as tokenizer_files
from fsq_jax.train import step as train_step

RUN = {
    'train__num_steps': 8,
    'train__log_every_steps': 1,
    'train__checkpoint_every_steps': 4,
    'train__eval_every_steps': 8,
}
_PREVIOUS = fault.ROOT / 'tests' / 'testdata' / 'run'


class SavedRun:
  """A finished run with two checkpoints, and their contents."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder / 'run'
    config = fault.toy_config(**RUN)
    train.train_and_evaluate(config, self.folder)
    self.abstract = fault.build_training(config).builder.abstract
    checkpointer = checkpoints.Checkpointer(self.folder, read_only=True)
    self.steps = checkpointer.steps
    self.states = {
        x: checkpointer.restore(x, self.abstract) for x in self.steps
    }
    self.records = {x: checkpointer.restore_record(x) for x in self.steps}
    checkpointer.close()

  @property
  def newest(self) -> pathlib.Path:
    """Folder of the latest checkpoint."""
    return self.folder / workdirs.CHECKPOINTS / str(self.steps[-1])

  def restore(self, folder: pathlib.Path) -> tuple[int, bool]:
    """Restores a copy; returns its step and whether it equals the original."""
    checkpointer = checkpoints.Checkpointer(folder, keep=2)
    restored = checkpointer.restore_newest(lambda _: self.abstract)
    checkpointer.close()
    return restored.step, (
        fault.same(restored.state, self.states[restored.step])
        and restored.record == self.records[restored.step]
    )


def list_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns all files in a folder, recursively."""
  return sorted(x for x in folder.rglob('*') if x.is_file())


def _flips(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  saved = SavedRun(folder)
  files = list_files(saved.newest)
  rng = random.Random(0)
  counts = {'found': 0, 'harmless': 0, 'silent': 0}
  by_file = {}
  number = 20 if quick else 400
  for i in range(number):
    copy = shutil.copytree(saved.folder, folder / 'copy')
    # Half of the flips uniform over files, half uniform over bytes.
    weights = [x.stat().st_size if i % 2 else 1 for x in files]
    path = rng.choices(files, weights)[0].relative_to(saved.folder)
    content = bytearray((copy / path).read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    (copy / path).write_bytes(content)
    step, equal = saved.restore(copy)
    kind = 'silent'
    if equal:
      kind = 'harmless' if step == saved.steps[-1] else 'found'
    counts[kind] += 1
    name = f'{path.parts[2]}/{path.name}' if len(path.parts) > 3 else path.name
    by_file.setdefault(name, []).append(kind)
    shutil.rmtree(copy)
  return fault.Outcome(
      counts['silent'] == 0,
      f'of {number}: {counts["found"]} found, the run going on from the step'
      f' before; {counts["harmless"]} without effect; {counts["silent"]} silent'
      ' wrong values',
      counts,
  )


def _lost_files(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  saved = SavedRun(folder)
  outcomes = []
  for path in list_files(saved.newest):
    for how in ('deleted', 'empty', 'half'):
      copy = shutil.copytree(saved.folder, folder / 'copy')
      target = copy / path.relative_to(saved.folder)
      content = target.read_bytes()
      target.unlink()
      if how != 'deleted':
        target.write_bytes(content[: len(content) // 2 * (how == 'half')])
      step, equal = saved.restore(copy)
      aside = (copy / workdirs.DAMAGED).is_dir()
      outcomes.append((step, equal and aside == (step != saved.steps[-1])))
      shutil.rmtree(copy)
  good = sum(equal for _, equal in outcomes)
  back = sum(step != saved.steps[-1] for step, _ in outcomes)
  return fault.Outcome(
      good == len(outcomes),
      f'{good} of {len(outcomes)}: {back} went on from the step before,'
      f' {len(outcomes) - back} (files that Orbax does without) from the step'
      ' itself, equal to the bit',
      {'losses': len(outcomes), 'good': good, 'passed over': back},
  )


def _foreign(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  saved = SavedRun(folder)
  kinds = {
      'empty': {},
      'a text': {'notes.txt': b'mine'},
      'an empty state': {'state/_METADATA': b'{}'},
      'a file of a checkpoint': {'_CHECKPOINT_METADATA': b'{}'},
      'random bytes': {
          'state/d/0': bytes(range(256)), 'manifest/metadata': b'x',
      },
  }
  good = {}
  for name, files in kinds.items():
    copy = shutil.copytree(saved.folder, folder / name)
    for path, content in files.items():
      target = copy / workdirs.CHECKPOINTS / '12' / path
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(content)
    (copy / workdirs.CHECKPOINTS / '12').mkdir(exist_ok=True)
    good[name] = saved.restore(copy) == (saved.steps[-1], True)
  copy = shutil.copytree(saved.folder, folder / 'another step')
  shutil.copytree(
      copy / workdirs.CHECKPOINTS / '4', copy / workdirs.CHECKPOINTS / '12'
  )
  good['another step'] = saved.restore(copy) == (saved.steps[-1], True)
  return fault.Outcome(
      all(good.values()),
      f'{sum(good.values())} of {len(good)} passed over'
      f' ({", ".join(good)})',
      good,
  )


def _mismatches(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  saved = SavedRun(folder)
  others = {}
  for name, fields in {
      'shape': {'model__encoder__width': 24},
      'name': {'model__projector_in__name': 'standardized'},
      'optimizer': {'optim__name': 'muon'},
      'depth': {'model__decoder__depth': 2},
  }.items():
    others[name] = fault.build_training(
        fault.toy_config(**RUN, **fields)
    ).builder.abstract
  for dtype in ('bfloat16', 'float16', 'int32'):
    others[dtype] = jax.tree.map(
        lambda x, t=dtype: jax.ShapeDtypeStruct(
            x.shape, t if x.dtype == jnp.float32 else x.dtype,
            sharding=x.sharding,
        ),
        saved.abstract,
    )
  good, lines = {}, []
  checkpointer = checkpoints.Checkpointer(saved.folder, read_only=True)
  for name, abstract in others.items():
    error = fault.refusal(checkpointer.restore, saved.steps[-1], abstract)
    good[name] = error is not None and '->' in str(error)
    lines.append(len(str(error).splitlines()))
  checkpointer.close()
  return fault.Outcome(
      all(good.values()) and max(lines) <= 12,
      f'{sum(good.values())} of {len(good)} refused ({", ".join(good)}) with a'
      f' list of {max(lines) - 1} lines at most; 0 casts',
      {'refused': good, 'lines': lines},
  )


def _previous(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  run = shutil.copytree(_PREVIOUS, folder / 'run')
  expected = np.load(run / 'expected.npz')
  found = saved_model.find_run(run)
  mesh = partitioning.create_mesh(
      found.config.partitioning.mesh, jax.devices()[:1]
  )
  model, variables = saved_model.restore(found, mesh)
  step = jax.jit(evaluators.build_eval_step(model))
  tokens = np.asarray(step(variables, expected['images']).indices)
  other = int(np.sum(tokens != expected['tokens']))
  versions = json.loads((run / workdirs.RUN).read_text('utf-8'))['versions']
  return fault.Outcome(
      other == 0,
      f'the run in tests/testdata, of fsq_jax {versions["fsq_jax"]} and JAX'
      f' {versions["jax"]}, loads with JAX {jax.__version__};'
      f' {other} of {tokens.size} tokens are others',
      {'tokens': tokens.size, 'others': other},
  )


def _partial(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  whole = tokenizer.Tokenizer.from_workdir(_PREVIOUS)
  tokens = whole.encode(np.load(_PREVIOUS / 'expected.npz')['images'])
  part = whole.save_pretrained(folder / 'decoder', decoder_only=True)
  path = part / tokenizer_files.WEIGHTS
  arrays = safetensors.numpy.load_file(path)
  changes = {
      'missing': lambda name, x: {},
      'renamed': lambda name, x: {f'{name}_': x},
      'of another shape': lambda name, x: {name: x[..., None]},
      'of another dtype': lambda name, x: {name: x.astype(np.float16)},
      'of another value': lambda name, x: {name: x + np.float32(1)},
  }
  decoder = tokenizer.Tokenizer.from_pretrained(part)
  same = np.array_equal(decoder.decode(tokens), whole.decode(tokens))
  encodes = fault.refusal(decoder.encode, np.zeros((1, 16, 16, 3), np.uint8))
  named = dict.fromkeys(changes, 0)
  for kind, change in changes.items():
    for name, x in arrays.items():
      others = {key: y for key, y in arrays.items() if key != name}
      safetensors.numpy.save_file({**others, **change(name, x)}, path)
      error = fault.refusal(tokenizer.Tokenizer.from_pretrained, part)
      named[kind] += error is not None and name in str(error)
  number = len(arrays) * len(changes)
  return fault.Outcome(
      same and encodes is not None and sum(named.values()) == number,
      f'the decoder alone, {len(arrays)} averaged arrays without the'
      f' optimizer, decodes to the same bytes: {same}, and refuses to encode:'
      f' {encodes is not None}; {sum(named.values())} of {number} changed files'
      f' refused by the name of the array ({", ".join(named)})',
      {'arrays': len(arrays), 'named': named},
  )


def _cost(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  config = configuration.load_config(fault.ROOT / 'configs' / 'fsq_888.py')
  training = fault.build_training(config)
  step = jax.jit(
      train_step.build_train_step(training.model, training.optimizer, config),
      donate_argnums=0,
  )
  state = training.builder.create()
  dataset = data.build_dataset(config.data, split='train', seed=0)
  images = next(dataset.iterator())['image']
  times = {'step': [], 'hash': []}
  for i in range(10 if quick else 40):
    started = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, images))
    times['step'].append(time.perf_counter() - started)
    if i % 4 == 0:
      started = time.perf_counter()
      integrity.hash_arrays(state)
      times['hash'].append(time.perf_counter() - started)
  step_ms, hash_ms = (1e3 * float(np.median(x)) for x in times.values())
  interval = config.train.checkpoint_every_steps
  share = hash_ms / (interval * step_ms)
  megabytes = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
  return fault.Outcome(
      share < 0.05,
      f'{hash_ms:.1f} ms to hash {megabytes:.1f} MB of the default config,'
      f' {share:.3%} of the {interval} steps of {step_ms:.0f} ms between'
      f' checkpoints ({hash_ms / step_ms:.1%} if every step were saved)',
      {'hash_ms': hash_ms, 'step_ms': step_ms, 'share': share},
  )


FAULTS = {
    'B1': fault.Fault(
        '400 flips of one bit, in any file of a step',
        'found or harmless; no silent wrong value',
        _flips, limit_seconds=1800,
    ),
    'B2': fault.Fault(
        'each file of the newest step deleted, emptied, cut in half',
        'the step before is taken, with the reason', _lost_files,
    ),
    'B3': fault.Fault(
        'foreign folders under the next number', 'passed over', _foreign
    ),
    'B8': fault.Fault(
        'arrays of other dtypes, shapes and names',
        'refused with the first 10 differences, nothing cast', _mismatches,
    ),
    'B9': fault.Fault(
        'a part of a model: averaged parameters, of the decoder alone',
        'on request only, what does not match is named', _partial,
    ),
    'B10': fault.Fault(
        'a checkpoint of an earlier version', 'loads, with the same tokens',
        _previous,
    ),
    'B12': fault.Fault(
        'nothing: the cost of the manifest', 'below 5 % of the training time',
        _cost,
    ),
}
