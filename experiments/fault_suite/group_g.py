"""Faults during the writing of token files."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from experiments.fault_suite import fault
from fsq_jax import tokens
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.tokens import image_states
from fsq_jax.tokens import manifest

_NUM_IMAGES = 2000


def _write_images(folder: pathlib.Path, num: int) -> None:
  """Writes smooth images with the size of the debug config."""
  rng = np.random.default_rng(0)
  folder.mkdir(parents=True)
  for i in range(num):
    image = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
    image = image.resize((16, 16), Image.Resampling.BICUBIC)
    image.save(folder / f'{i:04}.png')


def _files(folder: pathlib.Path) -> dict[str, bytes]:
  # Except the modification times of the images, which are not stored if recent.
  return {
      path.name: path.read_bytes()
      for path in folder.iterdir()
      if path.name != image_states.TIMES_FILE
  }


def _kill_again_and_again(
    command: list[str], folder: pathlib.Path, num: int, rng: random.Random
) -> int:
  """Restarts a command until it ends; kills the first `num` starts.

  Args:
    command: command that writes token files.
    folder: its output folder.
    num: maximum number of kills.
    rng: chooses the times of the kills, after the first image.

  Returns:
    Number of kills before the command ended.
  """
  kills = 0
  while True:
    before = len(list(folder.glob('tokens-*')))
    process = subprocess.Popen(
        command, cwd=fault.ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if kills < num:
      while process.poll() is None:
        if len(list(folder.glob('tokens-*'))) > before:
          time.sleep(rng.uniform(0, 0.3))
          process.send_signal(signal.SIGKILL)
          break
        time.sleep(0.002)
    if process.wait(timeout=600) != -signal.SIGKILL:
      if process.returncode:
        raise RuntimeError(f'{command} left with {process.returncode}')
      return kills
    kills += 1


def _is_reconstructed(
    run: pathlib.Path, images: pathlib.Path, folder: pathlib.Path
) -> bool:
  """Whether token files decode to the reconstructions of the model."""
  out = folder.with_name(f'{folder.name}_images')
  tokens.detokenize_workdir(run, folder, out)
  paths = sorted(images.iterdir())
  originals = np.stack([np.asarray(Image.open(path)) for path in paths])
  restored = [np.asarray(Image.open(out / f'{x.name}.png')) for x in paths]
  batch_size = manifest.read(folder).job.batch_size
  tokenizer = Tokenizer.from_workdir(run, batch_size=batch_size)
  return np.array_equal(tokenizer.reconstruct(originals), np.stack(restored))


def _killed(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  run = fault.ROOT / 'tests' / 'testdata' / 'run'
  images = folder / 'images'
  _write_images(images / 'validation', 200 if quick else _NUM_IMAGES)
  rng = random.Random(0)
  wanted_kills, kills, same, restored = 2 if quick else 20, 0, 0, 0
  num_runs = 0
  while kills < wanted_kills:
    storage = manifest.STORAGES[num_runs % 2]
    command = [
        sys.executable, 'launch.py', '--mode=tokenize', f'--workdir={run}',
        '--config.data.source=folder', f'--config.data.data_dir={images}',
        f'--config.tokenize.storage={storage}',
        '--config.tokenize.images_per_shard=20',
    ]
    straight = folder / f'straight_{storage}'
    if not straight.exists():
      _kill_again_and_again(
          [*command, f'--tokens={straight}'], straight, 0, rng
      )
      restored += _is_reconstructed(run, images / 'validation', straight)
    killed = folder / f'killed_{num_runs}'
    kills += _kill_again_and_again(
        [*command, f'--tokens={killed}'], killed,
        min(10, wanted_kills - kills), rng,
    )
    same += _files(killed) == _files(straight)
    num_runs += 1
  num_storages = min(num_runs, 2)
  return fault.Outcome(
      same == num_runs and restored == num_storages,
      f'{kills} kills of launch.py in {num_runs} runs: {same} of {num_runs}'
      f' ended with the bytes of an undisturbed run; of {restored} of'
      f' {num_storages} kinds of files the images decoded are those that the'
      f' model reconstructs, {_NUM_IMAGES:,} each, byte for byte',
      {'kills': kills, 'runs': num_runs, 'same': same, 'restored': restored},
  )


FAULTS = {
    'G7': fault.Fault(
        '20 times kill -9 while images become token files',
        'byte for byte the files of an undisturbed run', _killed,
        limit_seconds=3600,
    ),
}
