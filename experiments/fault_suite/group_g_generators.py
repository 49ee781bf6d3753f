"""Faults during the training and sampling of generators."""

import contextlib
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from typing import Any

import ml_collections
import numpy as np

from experiments.fault_suite import fault
from fsq_jax import checkpoints
from fsq_jax import configuration
from fsq_jax import report
from fsq_jax import tokens
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.data import synthetic
from fsq_jax.generators import builder
from fsq_jax.generators import sampler as samplers
from fsq_jax.generators import token_files
from fsq_jax.generators import training
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.workdir import files as workdir_files

_TOKENIZER = fault.ROOT / 'tests' / 'testdata' / 'run'
_CONFIG = fault.ROOT / 'configs' / 'default_generator.py'
_NUM_STEPS = 40
_NUM_IMAGES = 2000


def _write_tokens(folder: pathlib.Path) -> dict[str, str]:
  """Writes token files of both splits; returns their folders."""
  synthetic.NUM_TRAIN, synthetic.NUM_VALIDATION = 64, 16
  config = configuration.config_from_json(
      (_TOKENIZER / workdirs.CONFIG).read_text()
  )
  folders = {}
  for split in ('train', 'eval'):
    config.tokenize.split = split
    config.tokenize.images_per_shard = 16
    path = folder / f'tokens_{split}'
    tokens.tokenize_workdir(config, _TOKENIZER, folder=path)
    folders[split] = str(path)
  return folders


def _fields(folders: dict[str, str]) -> dict[str, Any]:
  """Returns the fields of a small generator by dotted name."""
  return {
      'tokens.tokenizer': str(_TOKENIZER),
      'tokens.train': folders['train'],
      'tokens.eval': folders['eval'],
      'tokens.batch_size': 8,
      'model.class_conditional': False,
      'model.depth': 1, 'model.width': 16, 'model.num_heads': 2,
      'model.mlp_dim': 24,
      'losses.class_dropout': 0.0,
      'optim.accumulation_steps': 2,
      'optim.warmup_steps': 2,
      'train.num_steps': _NUM_STEPS,
      'train.log_every_steps': 1,
      'train.checkpoint_every_steps': 2,
      'train.eval_every_steps': 10,
      'eval.num_draws': 2,
      'eval.num_samples': 16,
      'sample.num_steps': 4,
  }


def _config(fields: dict[str, Any]) -> ml_collections.ConfigDict:
  config = configuration.load_config(_CONFIG)
  config.update_from_flattened_dict(fields)
  return config


def _overrides(fields: dict[str, Any]) -> list[str]:
  return [f'--config.{name}={value}' for name, value in fields.items()]


def _read_state(fields: dict[str, Any], folder: pathlib.Path) -> Any:
  """Returns the newest state on disk."""
  config = _config(fields)
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = builder.build_model(config, token_files.open_files(config).format)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  states = training.build_state_builder(config, model, optimizer, mesh)
  saver = checkpoints.Checkpointer(folder, read_only=True)
  with contextlib.closing(saver):
    return saver.restore(saver.latest_step, states.abstract)


def _is_same(
    fields: dict[str, Any], folder: pathlib.Path, other: pathlib.Path
) -> bool:
  """Whether state, metrics, evaluation and pictures are bitwise equal."""

  def contents(folder: pathlib.Path) -> tuple[Any, ...]:
    rows = [
        {k: v for k, v in row.items() if k != 'images_per_second'}
        for row in workdirs.read_metrics(folder)
    ]
    text = (folder / workdirs.EVALUATION).read_text()
    pictures = (folder / workdir_files.SAMPLES).iterdir()
    return (
        rows,
        re.sub('"command": .*', '', text),
        {path.name: path.read_bytes() for path in pictures},
    )

  states = (_read_state(fields, x) for x in (folder, other))
  return fault.same(*states) and contents(folder) == contents(other)


def _last_step(folder: pathlib.Path) -> int:
  if not (folder / workdirs.METRICS).exists():
    return 0
  rows = workdirs.read_metrics(folder)
  return max((row['step'] for row in rows), default=0)


def _start(
    folder: pathlib.Path, fields: dict[str, Any], *arguments: str
) -> subprocess.Popen:
  with open(folder.with_suffix('.log'), 'ab') as log:
    return subprocess.Popen(
        [
            sys.executable, 'launch.py', f'--config={_CONFIG}',
            f'--workdir={folder}', *_overrides(fields), *arguments,
        ],
        cwd=fault.ROOT,
        stdout=log,
        stderr=log,
    )


def _finish(process: subprocess.Popen, folder: pathlib.Path) -> None:
  if process.wait(timeout=600):
    raise RuntimeError(folder.with_suffix('.log').read_text())


def _killed(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  fields = _fields(_write_tokens(folder))
  straight = folder / 'straight'
  _finish(_start(straight, fields), straight)
  rng = random.Random(0)
  wanted, kills, same, runs, in_a_save = 2 if quick else 8, 0, 0, 0, 0
  while kills < wanted:
    run = folder / f'run_{runs}'
    number = min(4, wanted - kills)
    for end in sorted(rng.sample(range(_NUM_STEPS - 1), number)):
      process = _start(run, fields)
      while process.poll() is None and _last_step(run) <= end:
        time.sleep(0.002)
      time.sleep(rng.uniform(0, 0.2))
      process.kill()
      kills += process.wait() == -signal.SIGKILL
      if (run / workdirs.CHECKPOINTS).exists():
        names = [x.name for x in (run / workdirs.CHECKPOINTS).iterdir()]
        in_a_save += any('tmp' in name for name in names)
    _finish(_start(run, fields), run)
    same += _is_same(fields, run, straight)
    runs += 1
  return fault.Outcome(
      same == runs,
      f'{kills} kills of launch.py in {runs} runs of {_NUM_STEPS} steps,'
      f' {in_a_save} of them in the middle of a save: {same} of {runs} ended'
      ' with the state, metrics, evaluation and pictures of an undisturbed run,'
      ' bit for bit',
      {'kills': kills, 'runs': runs, 'same': same, 'in_a_save': in_a_save},
  )


def _stopped(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  fields = _fields(_write_tokens(folder)) | {
      'train.num_steps': 8, 'train.eval_every_steps': 4,
  }
  report.write_report = lambda *_: None
  training.train_and_evaluate(_config(fields), folder / 'straight')
  sample = samplers.Sampler.__call__
  same, stops = {}, 0
  # Before the samples of the first and the completions of the second one.
  for number in (1,) if quick else (1, 4):
    run, calls = folder / f'stop_{number}', []

    def stop(self, *args, calls=calls, number=number, **kwargs):
      calls.append(1)
      if len(calls) == number:
        os.kill(os.getpid(), signal.SIGTERM)
      return sample(self, *args, **kwargs)

    samplers.Sampler.__call__ = stop
    try:
      training.train_and_evaluate(_config(fields), run)
    except train.Preempted:
      stops += 1
    samplers.Sampler.__call__ = sample
    training.train_and_evaluate(_config(fields), run)
    same[number] = _is_same(fields, run, folder / 'straight')
  commands = _stop_generation(folder, fields, quick)
  return fault.Outcome(
      all(same.values()) and stops == len(same) and commands['same'],
      f'{stops} of {len(same)} stops during samples of an evaluation saved the'
      f' step, {sum(same.values())} resumed to the bytes of an undisturbed run;'
      f' --mode=generate --npz after {commands["stops"]} stops and kills, the'
      f' last one after {commands["num_done"]} of {_NUM_IMAGES} images, wrote'
      f' the bytes of an undisturbed command: {commands["same"]}',
      {'stops': stops, 'same': same, 'commands': commands},
  )


def _stop_generation(
    folder: pathlib.Path, fields: dict[str, Any], quick: bool
) -> dict[str, Any]:
  """Stops --mode=generate at random moments until it is left to finish."""
  run = folder / 'straight'

  def start(output: pathlib.Path) -> subprocess.Popen:
    return _start(
        run, fields, '--mode=generate', f'--npz={output}/x.npz',
        f'--config.sample.num_images={_NUM_IMAGES}',
        '--config.sample.batch_size=16',
    )

  whole, stopped = folder / 'whole', folder / 'stopped'
  _finish(start(whole), run)
  progress = stopped / 'x.unfinished' / 'progress.json'
  rng, stops, num_done = random.Random(0), 0, 0
  for number in range(2 if quick else 6):
    signum, code = (signal.SIGTERM, 75) if number % 2 else (
        signal.SIGKILL, -signal.SIGKILL
    )
    wanted = num_done + rng.randrange(1, 200)
    process = start(stopped)
    while process.poll() is None and num_done < wanted:
      time.sleep(0.01)
      saved = workdirs.read_json(progress) or {}
      num_done = saved.get('num_done', 0)
    process.send_signal(signum)
    if process.wait(timeout=60) != code:
      raise RuntimeError(run.with_suffix('.log').read_text())
    stops += 1
  _finish(start(stopped), run)
  files = [
      {x.name: x.read_bytes() for x in output.iterdir() if x.suffix != '.json'}
      for output in (whole, stopped)
  ]
  return {
      'stops': stops, 'num_done': num_done, 'same': files[0] == files[1],
  }


def _corrupted(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  fields = _fields(_write_tokens(folder)) | {
      'train.num_steps': 8, 'train.eval_every_steps': 4,
      'train.keep_checkpoints': 3, 'tokens.tokenizer': '',
      'eval.num_samples': 0,
  }
  report.write_report = lambda *_: None
  run = folder / 'straight'
  state = training.train_and_evaluate(_config(fields), run)
  rng = random.Random(0)
  same, found, kinds = 0, 0, ['flip', 'cut', 'empty'] * (1 if quick else 2)
  for number, kind in enumerate(kinds):
    copy = folder / f'copy_{number}'
    subprocess.run(['cp', '-r', run, copy], check=True)
    newest = copy / workdirs.CHECKPOINTS / '8' / 'state'
    files = [x for x in newest.rglob('*') if x.is_file()]
    path = max(files, key=lambda x: x.stat().st_size)
    content = bytearray(path.read_bytes())
    if kind == 'flip':
      content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    length = {'flip': len(content), 'cut': len(content) // 2, 'empty': 0}
    path.write_bytes(content[: length[kind]])
    resumed = training.train_and_evaluate(_config(fields), copy)
    found += (copy / workdirs.DAMAGED / '8').is_dir()
    same += fault.same(resumed, state)
  return fault.Outcome(
      same == len(kinds),
      f'{found} of {len(kinds)} (flipped bit, half a file, empty file) found'
      f' and resumed from step 6, {len(kinds) - found} without effect; {same}'
      ' ended with the state of an undisturbed run, bit for bit',
      {'same': same, 'found': found, 'files': len(kinds)},
  )


def _other_tokens(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  folders = _write_tokens(folder)
  # The files are checked without the tokenizer, which takes long to load.
  fields = _fields(folders) | {
      'train.num_steps': 3, 'tokens.tokenizer': '', 'eval.num_samples': 0,
  }
  report.write_report = lambda *_: None
  run = folder / 'run'
  state = training.train_and_evaluate(_config(fields), run)
  rng = np.random.default_rng(0)
  number = 20 if quick else 200
  refused, before = 0, {x: x.read_bytes() for x in _files(run)}
  paths = [
      path
      for name in folders.values()
      for path in pathlib.Path(name).glob('tokens-*')
  ]
  for _ in range(number):
    path = paths[rng.integers(len(paths))]
    content = path.read_bytes()
    changed = bytearray(content)
    kind = rng.integers(3)
    if kind == 0:
      changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
      del changed[rng.integers(len(content)) :]
    else:
      changed = bytearray(paths[0 if path != paths[0] else 1].read_bytes())
    path.write_bytes(changed)
    error = fault.refusal(training.train_and_evaluate, _config(fields), run)
    refused += path.name in str(error)
    path.write_bytes(content)
  # Intact files, but not those of the run.
  error = fault.refusal(
      training.train_and_evaluate,
      _config(fields | {'tokens.train': folders['eval']}), run,
  )
  other = 'training data differ' in str(error)
  unchanged = {x: x.read_bytes() for x in _files(run)} == before
  resumed = training.train_and_evaluate(_config(fields), run)
  return fault.Outcome(
      refused == number and other and unchanged and fault.same(resumed, state),
      f'{refused} of {number} (flipped bits, cut and exchanged files) refused'
      f' by the name of the file; intact files of other images refused:'
      f' {other}; the run unchanged: {unchanged}',
      {'refused': refused, 'files': number, 'other': other,
       'unchanged': unchanged},
  )


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(
      x for x in folder.rglob('*') if x.is_file() and x.name != workdirs.LOCK
  )


FAULTS = {
    'G8': fault.Fault(
        'kill -9 of the training of a generator at 8 random moments',
        'every run resumes to the bytes of an undisturbed run', _killed,
        limit_seconds=3600,
    ),
    'G9': fault.Fault(
        'SIGTERM while a generator samples in evaluations; SIGTERM and kill -9'
        ' in --mode=generate',
        'both go on, to the bytes of an undisturbed run',
        _stopped, limit_seconds=3600,
    ),
    'G10': fault.Fault(
        'corrupted newest checkpoint of a generator',
        'found or harmless; the same state after all steps', _corrupted,
    ),
    'G11': fault.Fault(
        'token files corrupted or exchanged between stop and resume of a'
        ' generator', '100 % refused, the run unchanged', _other_tokens,
    ),
}
