"""Faults of stopping and resuming: crashes, signals, changed configs."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

from experiments.fault_suite import fault
from fsq_jax import report
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.data import synthetic
from fsq_jax.train import loop

RUN = {
    'train__num_steps': 24,
    'train__log_every_steps': 1,
    'train__checkpoint_every_steps': 4,
    'train__eval_every_steps': 12,
}
# Everything with its own state, and a discriminator that starts at step 9.
EVERYTHING = {
    **RUN,
    'data__batch_size': 16,
    'optim__accumulation_steps': 2,
    'optim__ema_decay': 0.9,
    'model__quantizer__name': 'vq',
    'model__quantizer__vq__restart': 'batch',
    'model__quantizer__vq__decay': 0.5,
    'discriminator__name': 'patch',
    'discriminator__patch__channels': 32,
    'discriminator__patch__num_stages': 1,
    'discriminator__augment_probability': 0.7,
    'discriminator__lecam_weight': 0.1,
    'discriminator__start_step': 9,
    'losses__adversarial__start_step': 9,
    'losses__adversarial__ramp_steps': 4,
    'losses__adversarial__weighting': 'adaptive',
}


class _Crash(Exception):  # noqa: N818
  """Simulates a crash between two steps."""


def record(stops: dict) -> dict[int, tuple]:
  """Records the image indices of each step and calls `stops` at its steps."""
  taken = {}

  class Record(loop.Hook):
    """Records the image indices and calls the stops."""

    def after_step(self, step, state, scalars, batch):
      indices = tuple(batch['index'].tolist())
      if taken.setdefault(step, indices) != indices:
        raise AssertionError(f'the images of step {step} have changed')
      if step in stops:
        stops.pop(step)()

  fault.add_hook(Record())
  # Takes longer than the steps.
  report.write_report = lambda *_: None
  return taken


def _crash():
  raise _Crash


def _rows(folder: pathlib.Path) -> list[dict]:
  """Returns the rows of metrics.jsonl without the throughput."""
  return [
      {k: v for k, v in row.items() if k != 'images_per_second'}
      for row in workdirs.read_metrics(folder)
  ]


def _resume(folder: pathlib.Path, variants: dict) -> fault.Outcome:
  """Interrupts runs and compares them with uninterrupted ones."""
  stops = {}
  taken = record(stops)
  # 20 images: batches cross epoch boundaries.
  synthetic.NUM_TRAIN = 20
  same = {}
  for name, fields in variants.items():
    config = fault.toy_config(**fields)
    straight = train.train_and_evaluate(config, folder / f'{name} straight')
    run = folder / name
    ends = {
        2: _crash,
        7: lambda: os.kill(os.getpid(), signal.SIGTERM),
        10: _crash,
        12: lambda: os.kill(os.getpid(), signal.SIGINT),
        21: lambda: os.kill(os.getpid(), signal.SIGTERM),
    }
    for step, end in ends.items():
      stops[step] = end
      with contextlib.suppress(_Crash, train.Preempted):
        train.train_and_evaluate(config, run)
    state = train.train_and_evaluate(config, run)
    same[name] = (
        not stops
        and fault.same(state, straight)
        and _rows(run) == _rows(folder / f'{name} straight')
        and sorted(taken) == list(range(1, 25))
    )
    taken.clear()
  return fault.Outcome(
      all(same.values()),
      f'stopped at steps 2, 7, 10, 12 and 21 of 24, all within epochs: state,'
      f' metrics and images equal to the bit in {sum(same.values())} of'
      f' {len(same)} variants ({", ".join(same)})',
      same,
  )


def _resume_plain(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  noise = {
      'model__quantizer__fsq__noise': 0.5, 'data__color_jitter': 0.3,
      'data__crop_scale': (1.0, 2.0),
  }
  variants = {'FSQ': RUN, 'FSQ with noise': {**RUN, **noise}}
  return _resume(folder, variants)


def _resume_everything(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  return _resume(folder, {'VQ, GAN, EMA, accumulation': EVERYTHING})


def _start(folder: pathlib.Path, num_steps: int) -> subprocess.Popen:
  """Starts launch.py on a toy run; returns after the first steps."""
  with open(folder.with_suffix('.log'), 'ab') as log:
    process = subprocess.Popen(
        [
            sys.executable, 'launch.py', '--config=configs/debug.py',
            f'--workdir={folder}', f'--config.train.num_steps={num_steps}',
            '--config.train.log_every_steps=1',
            '--config.train.eval_every_steps=0',
            '--config.train.checkpoint_every_steps=100000',
        ],
        cwd=fault.ROOT,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
  deadline = time.monotonic() + 300
  while not (folder / 'metrics.jsonl').exists() or len(
      workdirs.read_metrics(folder)
  ) < 5:
    if process.poll() is not None or time.monotonic() > deadline:
      raise RuntimeError(folder.with_suffix('.log').read_text())
    time.sleep(0.05)
  return process


def steps(folder: pathlib.Path) -> list[int]:
  """Returns the steps of the saved checkpoints."""
  paths = (folder / workdirs.CHECKPOINTS).glob('*')
  return [int(path.name) for path in paths if path.name.isdigit()]


def _signals(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  good, lost, seconds = 0, [], []
  numbers = [signal.SIGTERM, signal.SIGINT] * (1 if quick else 5)
  for i, number in enumerate(numbers):
    run = folder / str(i)
    process = _start(run, 10**6)
    before = max(row['step'] for row in workdirs.read_metrics(run))
    started = time.monotonic()
    process.send_signal(number)
    code = process.wait(timeout=120)
    seconds.append(time.monotonic() - started)
    after = max(row['step'] for row in workdirs.read_metrics(run))
    (saved,) = steps(run)
    lost.append(after - saved)
    good += code == 75 and saved >= before
  # A second signal during the handling of the first.
  process = _start(folder / 'twice', 10**6)
  os.kill(process.pid, signal.SIGSTOP)
  process.send_signal(signal.SIGTERM)
  os.kill(process.pid, signal.SIGCONT)
  log = folder / 'twice.log'
  while 'Send the signal again' not in log.read_text() and (
      process.poll() is None
  ):
    time.sleep(0.001)
  started = time.monotonic()
  process.send_signal(signal.SIGINT)
  code = process.wait(timeout=120)
  second = time.monotonic() - started
  # The first may have been handled by then.
  at_once = code in (-signal.SIGINT, 75) and second < 5
  return fault.Outcome(
      good == len(numbers) and not any(lost) and at_once,
      f'{good} of {len(numbers)} left with 75, steps lost: {sum(lost)}, after'
      f' {max(seconds):.1f} s at most; with a second one after {second:.2f} s'
      f' (code {code})',
      {'good': good, 'lost': lost, 'seconds': seconds, 'second': second},
  )


def _changed(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  root = folder / 'images'
  for split in ('train', 'validation'):
    (root / split).mkdir(parents=True)
    source = synthetic.SyntheticSource('train', size=(16, 16))
    for i in range(32):
      report.save_png(root / split / f'{i}.png', source.load(i))
  base = {
      **RUN, 'train__num_steps': 4, 'train__eval_every_steps': 0,
      'data__source': 'folder', 'data__data_dir': str(root),
  }
  run = folder / 'run'
  train.train_and_evaluate(fault.toy_config(**base), run)
  refused = {}
  for name, value in {
      'data__batch_size': 16, 'seed': 1, 'data__flip': False,
      'data__crop_scale': (1.0, 3.0), 'data__source': 'synthetic',
      'data__train_split': 'validation', 'data__color_jitter': 0.1,
      'optim__b1': 0.8,
  }.items():
    error = fault.refusal(
        train.train_and_evaluate, fault.toy_config(**{**base, name: value}), run
    )
    refused[name] = name.replace('__', '.') in str(error) and '->' in str(error)
  (root / 'train' / '0.png').unlink()
  error = fault.refusal(train.train_and_evaluate, fault.toy_config(**base), run)
  refused['images'] = 'content' in str(error) and '->' in str(error)
  return fault.Outcome(
      all(refused.values()),
      f'{sum(refused.values())} of {len(refused)} refused with a diff',
      refused,
  )


FAULTS = {
    'C1': fault.Fault(
        'five stops, by signals and crashes, within epochs',
        'state, metrics and images bitwise', _resume_plain,
    ),
    'C2': fault.Fault(
        'the same with a GAN that starts on the way, EMA, accumulation, VQ',
        'bitwise', _resume_everything,
    ),
    'C3': fault.Fault(
        'SIGTERM and SIGINT to launch.py, one and two',
        'saved at the end of the step, code 75; a second one exits at once',
        _signals,
    ),
    'C8': fault.Fault(
        'other batch size, seed, images, augmentation or optimizer at resume',
        'refused with a diff', _changed,
    ),
}
