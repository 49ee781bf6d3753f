"""Faults of checkpoints: flipped bits, lost files, full disks, two writers."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
from jax import numpy as jnp
import numpy as np

from experiments.fault_suite import fault
from fsq_jax import checkpoint
from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import integrity
from fsq_jax import partitioning
from fsq_jax import train
from fsq_jax import train_step
from fsq_jax import trained
from fsq_jax import workdir as workdirs

_RUN = {
    'train__num_steps': 8,
    'train__log_every_steps': 1,
    'train__checkpoint_every_steps': 4,
    'train__eval_every_steps': 8,
}
_PREVIOUS = fault.ROOT / 'tests' / 'testdata' / 'run'


class _Saved:
  """A finished run with two steps, and what is in them."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder / 'run'
    config = fault.toy_config(**_RUN)
    train.train_and_evaluate(config, self.folder)
    self.abstract = fault.build_training(config).builder.abstract
    checkpointer = checkpoint.Checkpointer(self.folder, read_only=True)
    self.steps = checkpointer.steps
    self.states = {
        x: checkpointer.restore(x, self.abstract) for x in self.steps
    }
    self.records = {x: checkpointer.restore_record(x) for x in self.steps}
    checkpointer.close()

  @property
  def newest(self) -> pathlib.Path:
    return self.folder / workdirs.CHECKPOINTS / str(self.steps[-1])

  def restore(self, folder: pathlib.Path) -> tuple[int, bool]:
    """Returns the step that a copy goes on from, and whether it is as saved."""
    checkpointer = checkpoint.Checkpointer(folder, keep=2)
    restored = checkpointer.restore_newest(lambda _: self.abstract)
    checkpointer.close()
    return restored.step, (
        fault.same(restored.state, self.states[restored.step])
        and restored.record == self.records[restored.step]
    )


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(x for x in folder.rglob('*') if x.is_file())


def _flips(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  saved = _Saved(folder)
  files = _files(saved.newest)
  rng = random.Random(0)
  counts = {'found': 0, 'harmless': 0, 'silent': 0}
  by_file = {}
  number = 20 if quick else 400
  for i in range(number):
    copy = shutil.copytree(saved.folder, folder / 'copy')
    # Half of them in any file alike, half where the bytes are.
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
  saved = _Saved(folder)
  outcomes = []
  for path in _files(saved.newest):
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
  saved = _Saved(folder)
  kinds = {
      'empty': {},
      'a text': {'notes.txt': b'mine'},
      'an empty state': {'state/_METADATA': b'{}'},
      'a file of a checkpoint': {'_CHECKPOINT_METADATA': b'{}'},
      'random bytes': {'state/d/0': bytes(range(256)), 'manifest/metadata': b'x'},
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


def _all_damaged(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  saved = _Saved(folder)
  for step in saved.steps:
    for path in _files(saved.newest.with_name(str(step)) / 'state'):
      path.write_bytes(path.read_bytes()[:-1])
  def contents():
    return {
        x: x.read_bytes()
        for x in _files(saved.folder) if x.name != workdirs.LOCK
    }
  before = contents()
  result = fault.launch(
      '--config=configs/debug.py', f'--workdir={saved.folder}', *_overrides()
  )
  lines = result.stderr.splitlines()
  named = all(f'Step {x}:' in result.stderr for x in saved.steps)
  same = contents() == before
  return fault.Outcome(
      result.returncode == 2 and named and same
      and 'Traceback' not in result.stderr,
      f'exit code {result.returncode}, each step named with its reason:'
      f' {named}, {len(before)} files as they were: {same}',
      {'code': result.returncode, 'lines': lines[-3:], 'same': same},
  )


def _overrides(**fields) -> list[str]:
  fields = {**_RUN, **fields}
  return [
      f'--config.{name.replace("__", ".")}={value}'
      for name, value in fields.items()
  ]


def _start(folder: pathlib.Path, **fields) -> subprocess.Popen:
  # Compiled once for all starts.
  fields['train__compilation_cache'] = folder.with_suffix('.programs')
  with open(folder.with_suffix('.log'), 'ab') as log:
    return subprocess.Popen(
        [
            sys.executable, 'launch.py', '--config=configs/debug.py',
            f'--workdir={folder}', *_overrides(**fields),
        ],
        cwd=fault.ROOT,
        stdout=log,
        stderr=log,
    )


def _last_step(folder: pathlib.Path) -> int:
  rows = workdirs.read_metrics(folder) if folder.exists() else []
  return max((row['step'] for row in rows), default=0)


def _kills(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  run = folder / 'run'
  rng = random.Random(0)
  number = 5 if quick else 100
  resumed, lost, temporary = 0, [], 0
  reached = 0
  for _ in range(number):
    process = _start(
        run, train__num_steps=10**6, train__checkpoint_every_steps=1,
        train__eval_every_steps=0,
    )
    deadline = time.monotonic() + 120
    while _last_step(run) <= reached and process.poll() is None:
      if time.monotonic() > deadline:
        raise RuntimeError('no step within two minutes')
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5))
    process.kill()
    process.wait()
    log = run.with_suffix('.log').read_text().splitlines()
    starts = [line for line in log if line.startswith('Continuing')]
    start = int(starts[-1].rpartition(' ')[2].rstrip('.')) if starts else 0
    resumed += _last_step(run) > start
    if reached:
      lost.append(reached - start)
    reached = _last_step(run)
    names = [x.name for x in (run / workdirs.CHECKPOINTS).iterdir()]
    temporary += any('tmp' in name for name in names)
  damaged = (run / workdirs.DAMAGED).exists()
  return fault.Outcome(
      resumed == number and max(lost) <= 2 and not damaged,
      f'{resumed} of {number} runs went on, {temporary} of the kills in the'
      f' middle of a save; at most {max(lost)} steps lost (the one being'
      f' written and the one before it), {np.mean(lost):.2f} on average;'
      f' steps found damaged: {int(damaged)}',
      {'resumed': resumed, 'lost': lost, 'in_a_save': temporary},
  )


def _full_disk(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  disk = folder / 'disk'
  disk.mkdir()
  subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', disk], check=True
  )
  try:
    run, ballast = disk / 'run', disk / 'ballast'
    fields = {'train__num_steps': 40, 'train__checkpoint_every_steps': 2,
              'train__eval_every_steps': 0}
    # Leaves room for some steps and not for the next.
    ballast.write_bytes(bytes(3_200_000))
    process = _start(run, **fields)
    code = process.wait(timeout=300)
    log = run.with_suffix('.log')
    said = log.read_text()
    names = {x.name for x in (run / workdirs.CHECKPOINTS).iterdir()}
    steps = sorted(int(x) for x in names if x.isdigit())
    ballast.unlink()
    again = _start(run, **fields)
    continued = again.wait(timeout=300)
    after = log.read_text()[len(said):]
    left = {x.name for x in (run / workdirs.CHECKPOINTS).iterdir()}
    straight = folder / 'straight'
    train.train_and_evaluate(fault.toy_config(**{**_RUN, **fields}), straight)
    equal = _hash_newest(run) == _hash_newest(straight)
  finally:
    subprocess.run(['umount', disk], check=True)
  last = said.strip().splitlines()[-1]
  clear = last.startswith('launch.py: Step ') and 'No space left' in last
  resumed = bool(steps) and f'from step {steps[-1]}.' in after
  clean = not any('tmp' in x for x in left)
  return fault.Outcome(
      code == 1 and clear and resumed and continued == 0 and clean and equal,
      f'exit code {code} and a last line that says so: {clear};'
      f' {len(steps)} steps intact; with room again it went on from the last of'
      f' them: {resumed}, to the state of a straight run: {equal}; temporary'
      f' folders removed: {clean}',
      {'code': code, 'steps': steps, 'clear': clear, 'equal': equal},
  )


def _hash_newest(folder: pathlib.Path) -> str:
  checkpointer = checkpoint.Checkpointer(folder, read_only=True)
  arrays = checkpointer._read_manifest(checkpointer.latest_step)['arrays']
  checkpointer.close()
  return integrity.hash_json(arrays)


def _bad_folders(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  taken = folder / 'file'
  taken.write_text('mine')
  seconds, good = [], {}
  for name, path, code in (
      ('a file', taken, 2),
      ('below a file', taken / 'run', 2),
      ('nothing can be written', pathlib.Path('/proc/run'), 2),
      ('missing parents', folder / 'a' / 'b' / 'run', 0),
  ):
    started = time.monotonic()
    result = fault.launch(
        '--config=configs/debug.py', f'--workdir={path}',
        *_overrides(train__num_steps=4, train__eval_every_steps=0),
    )
    if code:
      seconds.append(time.monotonic() - started)
      good[name] = result.returncode == code and str(path) in result.stderr
      good[name] &= 'Traceback' not in result.stderr
    else:
      good[name] = result.returncode == 0 and path.is_dir()
  return fault.Outcome(
      all(good.values()) and max(seconds) < 5,
      f'{sum(good.values())} of {len(good)} ({", ".join(good)}), refused after'
      f' {max(seconds):.1f} s at most, start of the process included',
      {'good': good, 'seconds': seconds},
  )


def _mismatches(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  saved = _Saved(folder)
  others = {}
  for name, fields in {
      'shape': {'model__encoder__width': 24},
      'name': {'model__projector_in__name': 'standardized'},
      'optimizer': {'optim__name': 'muon'},
      'depth': {'model__decoder__depth': 2},
  }.items():
    others[name] = fault.build_training(
        fault.toy_config(**_RUN, **fields)
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
  checkpointer = checkpoint.Checkpointer(saved.folder, read_only=True)
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
  found = trained.find(run)
  mesh = partitioning.create_mesh(
      found.config.partitioning.mesh, jax.devices()[:1]
  )
  model, variables = trained.restore(found, mesh)
  step = jax.jit(train_step.build_eval_step(model))
  tokens = np.asarray(step(variables, expected['images']).indices)
  other = int(np.sum(tokens != expected['tokens']))
  facts = json.loads((run / workdirs.RUN).read_text('utf-8'))
  return fault.Outcome(
      other == 0,
      f'the run in tests/testdata, of fsq_jax {facts["versions"]["fsq_jax"]} and'
      f' JAX {facts["versions"]["jax"]}, loads with JAX {jax.__version__};'
      f' {other} of {tokens.size} tokens are others',
      {'tokens': tokens.size, 'others': other},
  )


def _two_writers(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  run = folder / 'run'
  first = _start(run, train__num_steps=10**6, train__eval_every_steps=0)
  try:
    while _last_step(run) < 1 and first.poll() is None:
      time.sleep(0.05)
    started = time.monotonic()
    second = fault.launch(
        '--config=configs/debug.py', f'--workdir={run}', *_overrides()
    )
    seconds = time.monotonic() - started
    named = f'process {first.pid} on' in second.stderr
    alive = first.poll() is None
  finally:
    first.send_signal(signal.SIGKILL)
    first.wait()
  # A lock does not outlive its process.
  third = _start(run, train__num_steps=10**6, train__eval_every_steps=0)
  before = _last_step(run)
  while _last_step(run) <= before and third.poll() is None:
    time.sleep(0.05)
  free = third.poll() is None
  third.kill()
  third.wait()
  return fault.Outcome(
      second.returncode == 2 and named and alive and free,
      f'the second was refused (exit code {second.returncode}) after'
      f' {seconds:.1f} s, naming host and process: {named}; the first went on:'
      f' {alive}; after a kill -9 the folder is free: {free}',
      {'code': second.returncode, 'seconds': seconds},
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
    'B4': fault.Fault(
        'all steps damaged', 'a clear error, nothing deleted', _all_damaged
    ),
    'B5': fault.Fault(
        '`kill -9` at 100 random moments, every step being saved',
        'every run goes on; no more lost than one step and what is being'
        ' written', _kills, limit_seconds=3600,
    ),
    'B6': fault.Fault(
        'a full disk (4 MB tmpfs)',
        'stops with a message, earlier steps intact, goes on later',
        _full_disk,
    ),
    'B7': fault.Fault(
        'workdirs that are files, cannot be written, or have no parents',
        'refused by name within 5 s; parents are made', _bad_folders,
    ),
    'B8': fault.Fault(
        'arrays of other dtypes, shapes and names',
        'refused with the first 10 differences, nothing cast', _mismatches,
    ),
    'B10': fault.Fault(
        'a checkpoint of an earlier version', 'loads, with the same tokens',
        _previous,
    ),
    'B11': fault.Fault(
        'two processes in one workdir', 'the second is refused', _two_writers
    ),
    'B12': fault.Fault(
        'nothing: the cost of the manifest', 'below 5 % of the training time',
        _cost,
    ),
}
