"""Faults of whole runs: kills, a full disk, a workdir that is in use."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np

from experiments.fault_suite import fault
from experiments.fault_suite import group_b
from fsq_jax import checkpoints
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import integrity


def _overrides(**fields) -> list[str]:
  fields = {**group_b.RUN, **fields}
  return [
      f'--config.{name.replace("__", ".")}={value}'
      for name, value in fields.items()
  ]


def _start(
    folder: pathlib.Path, beside: pathlib.Path | None = None, **fields
) -> subprocess.Popen:
  """Starts a toy run; log and compilation cache are next to it or `beside`."""
  beside = beside or folder
  # All starts compile once.
  fields['train__compilation_cache'] = beside.with_suffix('.programs')
  with open(beside.with_suffix('.log'), 'ab') as log:
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
    # Leaves room for some checkpoints, but not for all.
    ballast.write_bytes(bytes(3_200_000))
    process = _start(run, folder / 'run', **fields)
    code = process.wait(timeout=300)
    log = (folder / 'run').with_suffix('.log')
    said = log.read_text()
    names = {x.name for x in (run / workdirs.CHECKPOINTS).iterdir()}
    steps = sorted(int(x) for x in names if x.isdigit())
    ballast.unlink()
    again = _start(run, folder / 'run', **fields)
    continued = again.wait(timeout=300)
    after = log.read_text()[len(said):]
    left = {x.name for x in (run / workdirs.CHECKPOINTS).iterdir()}
    straight = folder / 'straight'
    config = fault.toy_config(**{**group_b.RUN, **fields})
    train.train_and_evaluate(config, straight)
    equal = _hash_newest(run) == _hash_newest(straight)
  finally:
    subprocess.run(['umount', disk], check=True)
  # Threads of Orbax and TensorStore may log after the message.
  last = ''.join(x for x in said.splitlines()[-12:] if x.startswith('launch'))
  clear = last.startswith('launch.py: ') and str(run) in last
  clear &= 'No space left' in last
  resumed = bool(steps) and f'from step {steps[-1]}.' in after
  clean = not any('tmp' in x for x in left)
  return fault.Outcome(
      code == 1 and clear and resumed and continued == 0 and clean and equal,
      f'exit code {code} and a message at the end that says so: {clear};'
      f' {len(steps)} steps intact; with room again it went on from the last of'
      f' them: {resumed}, to the state of a straight run: {equal}; temporary'
      f' folders removed: {clean}',
      {'code': code, 'steps': steps, 'clear': clear, 'equal': equal},
  )


def _hash_newest(folder: pathlib.Path) -> str:
  checkpointer = checkpoints.Checkpointer(folder, read_only=True)
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


def _all_damaged(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  saved = group_b.SavedRun(folder)
  for step in saved.steps:
    for path in group_b.list_files(saved.newest.with_name(str(step)) / 'state'):
      path.write_bytes(path.read_bytes()[:-1])
  def contents():
    return {
        x: x.read_bytes()
        for x in group_b.list_files(saved.folder) if x.name != workdirs.LOCK
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
  # The lock is released when its process ends.
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


FAULTS = {
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
    'B11': fault.Fault(
        'two processes in one workdir', 'the second is refused', _two_writers
    ),
}
