"""Tests of runs by several processes, joined on the loopback interface."""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image
import pytest

from experiments.fault_suite import group_processes
from fsq_jax import configuration
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import saved_model
from fsq_jax.runtime import partitioning
from fsq_jax.runtime import processes as processes_lib

_ROOT = pathlib.Path(__file__).parents[2]
_NUM_STEPS = 24
_OVERRIDES = {
    'train.num_steps': _NUM_STEPS,
    'train.log_every_steps': 1,
    'train.checkpoint_every_steps': 10,
    'train.eval_every_steps': 24,
    # A latent that lies between two levels may fall otherwise where sums differ
    # in their last bits, and later steps with it.
    'model.quantizer.name': 'none',
    'data.source': 'folder',
    'data.max_damaged_share': 0.1,
    # More of a kernel on each device than is hashed at a time.
    'model.encoder.mlp_dim': 9216,
    'partitioning.fsdp_min_size': 0,
}
_NUM_IMAGES = 30
# Of each split. Images are 16 x 16 pixels.
_DAMAGED = (3, 14)
_SMALL = (2, 7, 11, 29)


# The first port that JAX takes for jobs of SLURM.
_SLURM_PORTS = 2**16 - 2**12


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  """A folder of images, of which some are damaged, and some are scaled up."""
  root = tmp_path_factory.mktemp('images')
  rng = np.random.default_rng(0)
  for split in ('train', 'validation'):
    (root / split).mkdir()
    for i in range(_NUM_IMAGES):
      size = (9, 14) if i in _SMALL else (20, 24)
      path = root / split / f'{i:02}.png'
      Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
      if i in _DAMAGED:
        path.write_bytes(path.read_bytes()[:-20])
  return root


def _config(images):
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.update_from_flattened_dict(
      {**_OVERRIDES, 'data.data_dir': str(images)}
  )
  return config


def _flags(num_devices):
  """Flags of this process, with another number of devices."""
  count = f'--xla_force_host_platform_device_count={num_devices}'
  return f'{os.environ["XLA_FLAGS"]} {count}'


def _launch(folder, images, num_processes, num_devices=2, **overrides):
  """Starts launch.py several times, with some devices each."""
  overrides = {**_OVERRIDES, 'data.data_dir': images, **overrides}
  return group_processes.launch(
      folder,
      num_processes,
      *(f'--config.{name}={value}' for name, value in overrides.items()),
      env=dict(
          os.environ,
          XLA_FLAGS=_flags(num_devices),
      ),
  )


def _wait(processes, folder):
  """Returns the exit codes."""
  try:
    return [process.wait(timeout=300) for process in processes]
  except subprocess.TimeoutExpired:
    for i, process in enumerate(processes):
      process.kill()
      sys.stderr.write(folder.with_suffix(f'.log{i}').read_text())
    raise


def _steps(folder):
  names = (path.name for path in (folder / workdirs.CHECKPOINTS).iterdir())
  return {int(name) for name in names if name.isdigit()}


def _assert_same_numbers(folder, expected):
  rows, wanted = (workdirs.read_metrics(x) for x in (folder, expected))
  assert len(rows) == len(wanted) == _NUM_STEPS + 1
  for row, want in zip(rows, wanted, strict=True):
    for values in (row, want):
      values.pop('images_per_second', None)
    # Other matrices on each device: float32 sums of other parts.
    norms = [values.pop('gradient_norm', 0) for values in (row, want)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert row.pop('split') == want.pop('split')
    assert row == pytest.approx(want, rel=1e-4)
  protocol, wanted = (
      json.loads((x / workdirs.EVALUATION).read_text())['protocol']
      for x in (folder, expected)
  )
  assert protocol.pop('command')
  assert protocol == {k: v for k, v in wanted.items() if k != 'command'}


@pytest.mark.slow
def test_two_processes_are_stopped_by_one_and_four_go_on(tmp_path, images):
  folder = tmp_path / 'run'
  processes = _launch(folder, images, 2)
  deadline = time.monotonic() + 300
  while not (folder.exists() and len(workdirs.read_metrics(folder)) >= 3):
    assert all(process.poll() is None for process in processes), (
        folder.with_suffix('.log0').read_text()
    )
    assert time.monotonic() < deadline
    time.sleep(0.01)
  processes[1].send_signal(signal.SIGTERM)  # Not the one that writes.
  assert _wait(processes, folder) == [75, 75]
  logs = [folder.with_suffix(f'.log{i}').read_text() for i in range(2)]
  saved = max(_steps(folder))
  assert 3 <= saved < _NUM_STEPS
  for log in logs:
    assert f'Interrupted; step {saved} is saved.' in log
  # Only one of them writes and speaks.
  assert 'step 2/24' in logs[0]
  assert 'step 2/24' not in logs[1]

  # Two of the four read the same images; no device has a whole kernel.
  sizes = {'data': 1, 'fsdp': 2, 'tensor': 2}
  processes = _launch(
      folder,
      images,
      num_processes=4,
      num_devices=1,
      **{f'partitioning.mesh.{axis}': size for axis, size in sizes.items()},
  )
  assert _wait(processes, folder) == [0] * 4
  log = folder.with_suffix('.log0').read_text()
  assert f'from step {saved}' in log
  assert f'4 x cpu, mesh {sizes}' in log
  # Parts of arrays are saved and hashed undamaged.
  assert not (folder / workdirs.DAMAGED).exists()
  found = saved_model.find_run(folder)
  assert found.step == _NUM_STEPS
  saved_model.restore(found, partitioning.create_mesh({'data': -1, 'fsdp': 1}))

  # By this process alone, and without a break.
  straight = tmp_path / 'straight'
  train.train_and_evaluate(_config(images), straight)
  _assert_same_numbers(folder, straight)
  protocol = json.loads((folder / workdirs.EVALUATION).read_text())['protocol']
  digests = [
      hashlib.sha256(path.read_bytes()).digest()
      for path in sorted((images / 'validation').iterdir())
  ]
  assert protocol['content'] == hashlib.sha256(b''.join(digests)).hexdigest()
  assert protocol['num_images'] == _NUM_IMAGES - len(_DAMAGED)
  assert protocol['num_damaged_images'] == len(_DAMAGED)
  assert protocol['num_upscaled_images'] == len(_SMALL)


@pytest.mark.slow
def test_a_process_that_cannot_start_ends_the_others(tmp_path, images):
  folder = tmp_path / 'run'
  folder.mkdir()
  with workdirs.lock(folder):
    assert _wait(_launch(folder, images, 2), folder) == [2, 1]
  logs = [folder.with_suffix(f'.log{i}').read_text() for i in range(2)]
  assert 'is being written by' in logs[0]
  assert 'launch.py: Stopped because process 0 has failed' in logs[1]
  for log in logs:
    assert 'Traceback' not in log
  assert not (folder / workdirs.METRICS).exists()


# In place of launch.py: joins the other processes, and ends like a run that a
# signal has stopped.
_JOIN = """
import sys
from fsq_jax.runtime import processes
processes.join_processes()
import jax
processes.is_any(False)  # Both have to be there.
devices = jax.process_count(), jax.device_count()
print(jax.process_index(), *devices, sys.argv[1:], flush=True)
sys.exit(75)
"""
# Two tasks of one node; the exit code is the highest of all tasks.
_SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" > "out$i" 2>&1 & tasks[i]=$!
done
for i in 0 1; do wait "${tasks[$i]}" || code=$?; done
exit "${code:-0}"
"""
_SCONTROL = """#!/usr/bin/env bash
echo "$@" > requeued
"""


@pytest.mark.slow
def test_a_slurm_job_joins_its_processes_and_is_queued_again(tmp_path):
  with socket.socket() as listener:
    port = 0
    while port < _SLURM_PORTS:  # JAX takes one that the job's number says.
      port = random.randrange(_SLURM_PORTS, 2**16)
      with contextlib.suppress(OSError):
        listener.bind(('127.0.0.1', port))
  job = str(port - _SLURM_PORTS)
  (tmp_path / 'bin').mkdir()
  for name, text in (
      ('launch.py', _JOIN), ('bin/srun', _SRUN), ('bin/scontrol', _SCONTROL),
      ('bin/python', f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
      ('bin/activate', f'PATH={tmp_path}/bin:$PATH\n'),
  ):  # fmt: skip
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  slurm = {
      'SLURM_JOB_ID': job,
      'SLURM_SUBMIT_DIR': str(tmp_path),
      'VENV': str(tmp_path),
      'PYTHONPATH': str(_ROOT),
      'XLA_FLAGS': _flags(3),
  }
  arguments = ['--config=a b.py', '--config.seed=3']
  done = subprocess.run(
      ['bash', _ROOT / 'experiments/launching/slurm.sh', *arguments],
      env=os.environ | slurm, timeout=300, check=False,
  )
  for i in range(2):
    output = (tmp_path / f'out{i}').read_text()
    assert f"{i} 2 6 {['--distributed', *arguments]}\n" in output, output
  assert done.returncode == 75
  assert (tmp_path / 'requeued').read_text() == f'requeue {job}\n'


def _join(monkeypatch, *others):
  """Makes this process 0; others tell it how severely they have failed."""
  told = []

  def gather(severity):
    told.append(int(severity))
    assert len(waited) == len(told)
    return np.array([severity, *others])

  def wait(*, key, timeout_ms):
    assert key not in waited
    assert timeout_ms > 24 * 3600 * 1000
    waited.append(key)

  waited = []
  monkeypatch.setattr(ocp.multihost, 'get_barrier_sync_fn', lambda: wait)
  monkeypatch.setattr(jax, 'process_count', lambda: 1 + len(others))
  monkeypatch.setattr(multihost_utils, 'process_allgather', gather)
  return told


@pytest.mark.parametrize('others', [(), (0, 0), (0, 1)])
def test_a_process_that_fails_tells_the_others(monkeypatch, others):
  told = _join(monkeypatch, *others)
  with pytest.raises(OSError, match='full'), processes_lib.fail_together():
    raise OSError('full')
  assert told == ([1] if others else [])


def test_a_process_fails_with_another_and_not_without(monkeypatch):
  told = _join(monkeypatch, 0, 0)
  with processes_lib.fail_together():
    pass
  _join(monkeypatch, 0, 1)
  with (
      pytest.raises(processes_lib.PeerError, match='process 2 has failed'),
      processes_lib.fail_together(),
  ):
    pass
  assert told == [0]


@pytest.mark.parametrize(
    ('own', 'others', 'raised'),
    [
        (ValueError('mine'), (0, 1), (ValueError, 'mine')),
        (ValueError('mine'), (1, 2), (RuntimeError, 'process 2 is worse')),
        (KeyError('mine'), (1, 0), (KeyError, 'mine')),
        (None, (0, 1), (ValueError, 'process 2 is bad')),
        (None, (2, 1), (RuntimeError, 'process 1 is worse')),
    ],
)
def test_the_most_severe_error_of_all_processes_is_raised(
    monkeypatch, own, others, raised
):
  _join(monkeypatch, *others)
  kinds = (
      (ValueError, lambda process: ValueError(f'process {process} is bad')),
      (Exception, lambda process: RuntimeError(f'process {process} is worse')),
  )

  @processes_lib.fail_together(kinds)
  def body():
    if own is not None:
      raise own

  with pytest.raises(raised[0], match=raised[1]):
    body()


def test_flags_of_processes_belong_together():
  with pytest.raises(ValueError, match='give all of them, or none'):
    processes_lib.join_processes('127.0.0.1:1', 2)


@pytest.mark.slow
def test_an_environment_that_says_nothing_is_refused():
  result = subprocess.run(
      [
          sys.executable, 'launch.py', '--config=configs/debug.py',
          '--distributed',
      ],
      cwd=_ROOT, capture_output=True, text=True, timeout=120, check=False,
  )
  assert result.returncode == 2
  assert 'cannot be joined' in result.stderr
  assert '--coordinator_address=HOST:PORT' in result.stderr
