"""Tests of runs whose workdir is in an object store."""

import contextlib
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsq_jax import configuration
from fsq_jax import train
from fsq_jax.checkpoints import checkpointer as checkpointers
from fsq_jax.configuration import command_line
from fsq_jax.evaluation import saved_run
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.tokenizer import export
from fsq_jax.tokenizer import tokenizer as tokenizers
from fsq_jax.tokens import tokenization
from fsq_jax.train import initialization
from fsq_jax.workdir import files
from fsq_jax.workdir import metric_log
from fsq_jax.workdir import object_lock
from fsq_jax.workdir import trackers

_ROOT = pathlib.Path(__file__).parents[2]
_RUN = _ROOT / 'tests' / 'testdata' / 'run'
# launch.py with a lock that is renewed more often.
_LAUNCH = """
import runpy, sys
from fsq_jax.workdir import object_lock
object_lock.RENEWAL = 0.5
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def _state(step):
  return {'x': jnp.arange(4.0) + step}


def _abstract(_=None):
  return jax.eval_shape(lambda: _state(0))


@contextlib.contextmanager
def _open(folder):
  with contextlib.closing(
      checkpointers.Checkpointer(folder, keep=2)
  ) as checkpointer:
    yield checkpointer


@pytest.fixture
def saved(folder):
  with _open(folder) as checkpointer:
    for step in (1, 2):
      checkpointer.save(step, _state(step), {'step': step})
  return folder


def _names(store, part):
  return [name for name in list(store.objects) if part in name]


@pytest.mark.fast_limit(20)  # Orbax takes seconds for two steps.
def test_steps_are_saved_and_restored(saved, store):
  # A step without this file is an interrupted save.
  part = f'{saved.parent.name}/run/checkpoints/2/commit_success.txt'
  (name,) = _names(store, part)
  with _open(saved) as checkpointer:
    assert checkpointer.steps == [1, 2]
    chex.assert_trees_all_equal(
        checkpointer.restore(2, _abstract()), _state(2)
    )
  del store.objects[name]
  with _open(saved) as checkpointer:
    assert checkpointer.steps == [1]
    assert checkpointer.restore_newest(_abstract).step == 1
  assert not _names(store, f'{saved.parent.name}/run/checkpoints/2/')


@pytest.mark.slow
@pytest.mark.parametrize('part', ['record/metadata', 'state/manifest.ocdbt'])
def test_a_corrupted_step_is_moved(saved, store, part):
  for name in _names(store, f'{saved.parent.name}/run/checkpoints/2/{part}'):
    del store.objects[name]
  with _open(saved) as checkpointer:
    assert checkpointer.restore_newest(_abstract).step == 1
    assert checkpointer.steps == [1]
  assert files.is_folder(saved / files.DAMAGED / '2')
  assert not files.is_folder(saved / files.CHECKPOINTS / '2')


@pytest.mark.slow
@pytest.mark.parametrize('part', ['record/metadata', 'state/manifest.ocdbt'])
def test_a_step_that_cannot_be_read_now_stays(saved, store, part, monkeypatch):
  with _open(saved) as checkpointer:
    monkeypatch.setattr(store, 'denied', f'checkpoints/2/{part}')
    with pytest.raises(checkpointers.ReadError, match='may be intact'):
      checkpointer.restore_newest(_abstract)
  assert files.is_folder(saved / files.CHECKPOINTS / '2')


def _config():
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.train.num_steps = 16
  return config


@pytest.mark.slow
def test_a_killed_run_resumes_and_is_used(
    folder, store, tmp_path, monkeypatch
):
  """Train, kill, resume, evaluate, tokenize, initialize from it."""
  monkeypatch.setattr(object_lock, 'PATIENCE', 15.0)
  monkeypatch.setattr(object_lock, 'RENEWAL', 0.5)
  # A checkpoint that is slow to write holds the run up after step 8.
  steps = f'{folder.parent.name}/run/checkpoints'
  process = subprocess.Popen(
      [
          sys.executable, '-c', _LAUNCH, str(_ROOT / 'launch.py'),
          f'--config={_ROOT}/configs/debug.py', f'--workdir={folder}',
          '--config.train.num_steps=16',
      ],
      env={**os.environ, 'PYTHONPATH': str(_ROOT)},
  )
  with store.blocked_at('checkpoints/12/'):
    while f'{steps}/8/commit_success.txt' not in store.objects:
      assert process.poll() is None
      time.sleep(0.1)
    with pytest.raises(ValueError, match='is being written by process'):
      train.train_and_evaluate(_config(), folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
  # Uploads that the process had sent are stored after its end.
  assert f'{steps}/12/commit_success.txt' not in store.objects
  state = train.train_and_evaluate(_config(), str(folder))
  assert files.read_json(folder / files.RUN)['first_step'] == 8

  local = tmp_path / 'local'
  uninterrupted = train.train_and_evaluate(_config(), local)
  chex.assert_trees_all_equal(state, uninterrupted)
  assert _rows(folder) == _rows(local)
  assert files.read_json(folder / files.EVALUATION) == files.read_json(
      local / files.EVALUATION
  )
  assert _local_names(local) - _remote_names(store, folder) == {'.lock'}

  config = command_line.load(None, str(folder), _ROOT)
  output = tmp_path / 'output'
  saved_run.evaluate_workdir(config, folder, output=output, show=lambda _: None)
  assert files.read_json(output / files.EVALUATION) == files.read_json(
      local / files.EVALUATION
  )
  tokens = [
      tokenization.tokenize_workdir(
          config, run, folder=tmp_path / f'tokens_{i}'
      )
      for i, run in enumerate([folder, local])
  ]
  assert tokens[0].shards == tokens[1].shards
  source = initialization.find_source(str(folder))
  assert source.step == 16


@pytest.mark.slow
def test_a_tokenizer_is_saved_and_exported(folder):
  tokenizer = Tokenizer.from_workdir(_RUN)
  images = np.arange(2 * 16 * 16 * 3, dtype=np.uint8).reshape(2, 16, 16, 3)
  path = tokenizer.save_pretrained(folder / 'saved')
  assert str(path) == f'{folder}/saved'
  with pytest.raises(ValueError, match='is not empty'):
    tokenizer.save_pretrained(path)
  loaded = tokenizers.load_tokenizer(str(path), 'newest')
  np.testing.assert_array_equal(loaded.encode(images), tokenizer.encode(images))
  assert initialization.find_source(str(path)).step == loaded.step
  export.write(tokenizer, str(folder / 'export'))
  manifest = files.read_json(folder / 'export' / export.MANIFEST)
  assert len(manifest['sha256']) == 5
  for name, digest in manifest['sha256'].items():
    data = files.read_bytes(folder / 'export' / name)
    assert hashlib.sha256(data).hexdigest() == digest
  with pytest.raises(ValueError, match='is not empty'):
    export.write(tokenizer, folder / 'export')


def _rows(folder):
  rows = metric_log.read_metrics(folder)
  return [
      {name: x for name, x in row.items() if name != 'images_per_second'}
      for row in rows
  ]


def _local_names(folder):
  """Names of files, without those of the checkpoints' own formats."""
  paths = [x for x in folder.rglob('*') if x.is_file()]
  names = {str(x.relative_to(folder)) for x in paths}
  return {x for x in names if not x.startswith(('checkpoints', 'tensorboard'))}


def _remote_names(store, folder):
  prefix = str(folder).removeprefix('gs://bucket/') + '/'
  return {x.removeprefix(prefix) for x in store.objects if x.startswith(prefix)}


@pytest.mark.parametrize(
    ('field', 'value'),
    [('train.trackers', ('wandb',)), ('train.profile_steps', (2, 3))],
)
def test_local_outputs_are_rejected(folder, store, field, value, monkeypatch):
  monkeypatch.setattr(trackers, 'is_installed', lambda _: True)
  config = _config()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=f'{field} is .*need a local folder'):
    train.train_and_evaluate(config, folder)
  assert not _remote_names(store, folder)
