"""Faults of the environment: device counts, reader threads, clocks."""

import hashlib
import os
import pathlib
import re
import subprocess
import time

import jax
import numpy as np

from experiments.fault_suite import fault
from experiments.fault_suite import group_c
from fsq_jax import checkpoints
from fsq_jax import data
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.runtime import partitioning
from fsq_jax.train import loop
from fsq_jax.train import step as train_step
from fsq_jax.workdir import progress


def _hash(tree) -> str:
  """Returns a hash of all bytes of a tree of arrays."""
  digest = hashlib.sha256()
  for x in jax.tree.leaves(jax.device_get(tree)):
    digest.update(np.asarray(x).tobytes())
  return digest.hexdigest()


class _Steps:
  """The compiled training step of a config on the first devices."""

  def __init__(self, config, num_devices: int):
    self._training = fault.build_training(config, num_devices)
    shardings = self._training.builder.shardings
    replicated = partitioning.replicated(self._training.mesh)
    self._step = jax.jit(
        train_step.build_train_step(
            self._training.model, self._training.optimizer, config
        ),
        in_shardings=(
            shardings, partitioning.batch_sharding(self._training.mesh)
        ),
        out_shardings=(shardings, replicated),
    )
    self._evaluate = jax.jit(
        evaluators.build_eval_step(self._training.model),
        out_shardings=replicated,
    )

  def run(self, batches, states=None) -> list[tuple]:
    """Returns (state before, loss, state after, tokens) of each step.

    Args:
      batches: images on the host.
      states: initial state of each step, on the host; None: the state after the
        previous step.
    """
    state, rows = self._training.builder.create(), []
    for i, images in enumerate(batches):
      if states is not None:
        state = jax.device_put(states[i], self._training.builder.shardings)
      before = jax.device_get(state)
      images = partitioning.shard_batch(images, self._training.mesh)
      tokens = self._evaluate(state.eval_variables, images).indices
      state, scalars = self._step(state, images)
      rows.append((
          before, float(scalars['loss']), jax.device_get(state),
          np.asarray(tokens),
      ))
    return rows


def _compare(one: list[tuple], other: list[tuple]) -> dict[str, float]:
  """Returns the largest differences between the steps of two runs."""
  losses = np.array([[row[1] for row in rows] for rows in (one, other)])
  relative = np.abs(losses[1] / losses[0] - 1)
  parameters = max(
      np.abs(a - b).max()
      for rows in zip(one, other, strict=True)
      for a, b in zip(
          *(jax.tree.leaves(row[2].params) for row in rows), strict=True
      )
  )
  tokens = np.concatenate([
      (a[3] == b[3]).ravel() for a, b in zip(one, other, strict=True)
  ])
  return {
      'first_loss': float(relative[0]),
      'loss': float(relative.max()),
      'parameters': float(parameters),
      'other_tokens': float(1 - tokens.mean()) if tokens.size else 0.0,
  }


def _devices(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  worst: dict[str, dict[str, float]] = {}
  layouts = ((2, 1), (4, 1), (8, 1), (1, 4), (2, 4))
  for quantizer in ('none', 'fsq'):
    config = fault.toy_config(
        data__batch_size=64, train__num_steps=20,
        partitioning__fsdp_min_size=0, model__quantizer__name=quantizer,
    )
    dataset = data.build_dataset(config.data, split='train', seed=config.seed)
    batches = [b['image'] for b, _ in zip(dataset, range(20), strict=False)]
    one = _Steps(config, 1).run(batches)
    for sizes in layouts[:1] if quick else layouts:
      mesh = config.partitioning.mesh
      mesh.data, mesh.fsdp = sizes
      other = _Steps(config, int(np.prod(sizes)))
      ways = {quantizer: _compare(one, other.run(batches))}
      if quantizer == 'fsq':
        starts = [row[0] for row in one]
        ways['fsq, step by step'] = _compare(one, other.run(batches, starts))
      for way, found in ways.items():
        largest = worst.setdefault(way, dict.fromkeys(found, 0.0))
        worst[way] = {k: max(x, found[k]) for k, x in largest.items()}
  whole, step = worst['none'], worst['fsq, step by step']
  return fault.Outcome(
      all(x['first_loss'] <= 2**-22 for x in worst.values())
      and all(x['loss'] <= 1e-6 for x in (whole, step))
      and whole['parameters'] <= 1e-5
      and step['other_tokens'] <= 1e-4,
      f'without a quantizer losses within {whole["loss"]:.0e} and parameters'
      f' within {whole["parameters"]:.0e} after 20 steps; FSQ from equal states'
      f' losses within {step["loss"]:.0e}, parameters within'
      f' {step["parameters"]:.0e}, {step["other_tokens"]:.3%} other tokens; FSQ'
      f' left alone for 20 steps losses within {worst["fsq"]["loss"]:.0e}',
      worst,
  )


def _moved_checkpoint(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  config = fault.toy_config(
      data__batch_size=64, partitioning__fsdp_min_size=0
  )
  config.partitioning.mesh.data, config.partitioning.mesh.fsdp = 1, 4
  state = fault.build_training(config, 4).builder.create()
  expected, equal = _hash(state), []
  for number, (count, sizes) in enumerate(
      ((1, (1, 1)), (8, (2, 4)), (8, (1, 8)), (2, (2, 1)))
  ):
    run = workdirs.create(folder / str(number))
    checkpointer = checkpoints.Checkpointer(run)
    checkpointer.save(1, state, {})
    checkpointer.wait()
    config.partitioning.mesh.data, config.partitioning.mesh.fsdp = sizes
    builder = fault.build_training(config, count).builder
    # Each restore is saved again: 4, 1, 8, 8, 2 devices.
    state = checkpointer.restore(1, builder.abstract)
    checkpointer.close()
    equal.append(_hash(state) == expected)
  return fault.Outcome(
      all(equal),
      f'{sum(equal)} of {len(equal)} moves along 4, 1, 8, 8 and 2 devices equal'
      ' to the bit',
      {'equal': equal},
  )


def _twice(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  equal = {}
  variants = {'FSQ': group_c.RUN, 'VQ, GAN': group_c.EVERYTHING}
  for name, fields in variants.items():
    config = fault.toy_config(**fields)
    hashes = {
        _hash(train.train_and_evaluate(config, folder / f'{name} {i}'))
        for i in range(2)
    }
    equal[name] = len(hashes) == 1
  return fault.Outcome(
      all(equal.values()),
      f'final states equal to the bit in {sum(equal.values())} of {len(equal)}'
      ' pairs of runs',
      equal,
  )


def _dying_readers(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  kinds = (
      'OSError("gone")', 'MemoryError()', 'SystemExit(3)',
      'KeyboardInterrupt()', 'RuntimeError("lost")', 'BaseException("dead")',
  )
  code = """if True:
    import sys, time
    from experiments.fault_suite import fault
    from fsq_jax import train
    from fsq_jax.data import synthetic
    load = synthetic.SyntheticSource.load
    count = [0]
    def dying(source, index):
      count[0] += 1
      if count[0] > 60:
        if count[0] == 61:
          print('dies at', time.monotonic(), file=sys.stderr, flush=True)
        raise {kind}
      return load(source, index)
    synthetic.SyntheticSource.load = dying
    config = fault.toy_config(train__num_steps=100, data__num_threads=2,
                              train__eval_every_steps=0)
    train.train_and_evaluate(config, sys.argv[1])
  """
  seconds = {}
  for i, kind in enumerate(kinds[:2] if quick else kinds):
    try:
      done = fault.run_python(
          code.format(kind=kind), folder / str(i), timeout=150
      )
    except subprocess.TimeoutExpired:
      seconds[kind] = None
      continue
    ended = time.monotonic()
    died = re.search(r'dies at ([\d.]+)', done.stderr)
    steps = re.findall(r'step (\d+)/100', done.stderr)
    # SystemExit exits silently with its code.
    named = kind.split('(')[0] in done.stderr or (
        kind, done.returncode
    ) == ('SystemExit(3)', 3)
    if died and steps and done.returncode and named:
      seconds[kind] = round(ended - float(died[1]), 1)
    else:
      seconds[kind] = None
  good = [x for x in seconds.values() if x is not None and x <= 60]
  return fault.Outcome(
      len(good) == len(seconds),
      f'{len(good)} of {len(seconds)} kinds of errors in a reading thread end'
      f' the run with that error, after {max(good, default=0):.1f} s at most'
      + ('' if len(good) == len(seconds) else f'; {seconds}'),
      {'seconds': seconds},
  )


def _clocks(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  fields = {
      **group_c.RUN,
      'train__keep_checkpoints': 2,
      'train__eval_every_steps': 0,
  }
  lines, kept, offset, stops = {}, {}, [0.0], {}
  clock, saving = time.time, []
  time.time = lambda: clock() + offset[0]
  group_c.record(stops)
  run = loop.run

  def run_and_note(*args, hooks, **kwargs):
    saving[:] = hooks[-1:]
    return run(*args, hooks=hooks, **kwargs)

  loop.run = run_and_note

  def jump(seconds):
    # Not while Orbax writes: its timeout uses the wall clock.
    saving[0].finish(0, None)
    offset[0] = seconds
    os.environ['TZ'] = 'Asia/Tokyo' if seconds < 0 else 'America/Denver'
    time.tzset()

  for name, seconds in {'still': 0.0, 'back': -1e6, 'forth': 1e6}.items():
    said = lines.setdefault(name, [])
    progress.tqdm.tqdm.write = lambda text, said=said, **_: (
        said.append(text)
    )
    stops[10] = lambda seconds=seconds: jump(seconds)
    offset[0] = 0.0
    train.train_and_evaluate(fault.toy_config(**fields), folder / name)
    kept[name] = sorted(group_c.steps(folder / name))
  lefts = [
      re.fullmatch(r'.* 00:\d\d left', line) is not None
      for said in lines.values() for line in said if line.startswith('step ')
  ]
  speeds = [
      row['images_per_second'] for name in kept
      for row in workdirs.read_metrics(folder / name) if row['split'] == 'train'
  ]
  return fault.Outcome(
      all(lefts) and len(lefts) == 72 and min(speeds) > 0
      and set(map(tuple, kept.values())) == {(20, 24)},
      f'jumps of 12 days back and forth, other time zones: {sum(lefts)} of'
      f' {len(lefts)} times left below a minute, all speeds above 0, the newest'
      f' two steps kept',
      {'kept': kept, 'lowest_speed': min(speeds)},
  )


FAULTS = {
    'C5': fault.Fault(
        '1, 2, 4 and 8 devices, data and parameters sharded',
        'without rounding to codes: first losses within 2^-22, losses within'
        ' 1e-6 and parameters within 1e-5 after 20 steps; FSQ from equal'
        ' states: losses within 1e-6, tokens 99.99 %',
        _devices, num_devices=8,
    ),
    'C6': fault.Fault(
        'a checkpoint of 4 devices on 1, 8 and 2', 'bitwise',
        _moved_checkpoint, num_devices=8,
    ),
    'C7': fault.Fault('the same run twice', 'bitwise on CPU', _twice),
    'C9': fault.Fault(
        'a reading thread that dies', 'an error within 60 s, no hang',
        _dying_readers,
    ),
    'C10': fault.Fault(
        'jumps of the clock, another time zone',
        'time left and kept checkpoints as without', _clocks,
    ),
}
