"""Tests of token files in an object store."""

import contextlib
import functools
import itertools
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from fsq_jax import configuration
from fsq_jax import quantizers
from fsq_jax import tokens
from fsq_jax.data import synthetic
from fsq_jax.generators import training
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.tokenizer import tokenizer as tokenizers
from fsq_jax.tokens import image_states
from fsq_jax.tokens import manifest as manifests
from fsq_jax.tokens import source as sources
from fsq_jax.tokens import writer as writers
from fsq_jax.workdir import files
from fsq_jax.workdir import object_lock
from fsq_jax.workdir import object_store

_ROOT = pathlib.Path(__file__).parents[2]
_RUN = _ROOT / 'tests' / 'testdata' / 'run'
_SHARD = 'tokens-0000{}-of-00003.npz'
# launch.py with a lock that is renewed more often, and images of any age.
_LAUNCH = """
import runpy, sys
from fsq_jax.tokens import image_states
from fsq_jax.workdir import object_lock
image_states.RESOLUTION_NS = 0
object_lock.RENEWAL = 0.5
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """Returns the folder of copies, which is missing."""
  folder = tmp_path / 'home' / 'cache'
  monkeypatch.setattr(sources, 'CACHE_FOLDER', str(folder))
  return folder


_load_tokenizer = functools.cache(tokenizers.load_tokenizer)


@pytest.fixture(autouse=True)
def once_loaded(monkeypatch):
  """Loads, and compiles, each tokenizer once."""
  monkeypatch.setattr(tokenizers, 'load_tokenizer', _load_tokenizer)


@pytest.fixture
def images(tmp_path, monkeypatch):
  """Returns a folder of nine images, one of them corrupted."""
  monkeypatch.setattr(image_states, 'RESOLUTION_NS', 0)
  folder = tmp_path / 'images' / 'validation'
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(9):
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{i}.png')
  (folder / '4.png').write_bytes(b'text')
  return folder.parent


def _config(images):
  config = configuration.config_from_json((_RUN / 'config.json').read_text())
  config.data.source, config.data.data_dir = 'folder', str(images)
  config.data.max_damaged_share = 0.2
  config.tokenize.storage = 'npz'
  config.tokenize.images_per_shard = 3
  return config


def _job(storage='npz'):
  return tokens.Job(
      storage=storage,
      quantizer=quantizers.FSQ((8, 5, 5)).spec(),
      codebook_size=200, index_shape=(), model_hash='ab' * 32, fit='crop',
      image_size=(16, 12), batch_size=4, images_per_shard=2,
      source={'source': 'synthetic', 'num_examples': 6}, label_names=(),
  )


def _write(folder, storage='npz', lock=True):
  """Writes six images of random tokens in three shards."""
  job = _job(storage)
  rng = np.random.default_rng(0)
  examples = [
      tokens.Example(
          rng.integers(0, 200, (4, 3), np.int32), str(i), -1, (16, 12), (16, 12)
      )
      for i in range(6)
  ]
  writer = writers.TokenWriter(folder, job)
  with writer.locked() if lock else contextlib.nullcontext():
    for i in range(3):
      part = examples[2 * i : 2 * i + 2]
      writer.write(i, part, damaged=[], source_bytes=None)
    writer.finish()
  return examples


def _objects(store, folder):
  """Returns name and content of all objects in a folder."""
  prefix = f'{_name(folder)}/'
  return {
      name.removeprefix(prefix): data
      for name, (_, data) in list(store.objects.items())
      if name.startswith(prefix)
  }


def _local_files(folder):
  return {
      str(path.relative_to(folder)): path.read_bytes()
      for path in folder.rglob('*')
      if path.is_file()
  }


def _name(path):
  return str(path).removeprefix('gs://bucket/')


def _corrupt(store, path):
  """Changes the last byte of an object."""
  name = _name(path)
  generation, data = store.objects[name]
  store.objects[name] = generation, data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize('storage', manifests.STORAGES)
def test_files_are_the_same_as_in_a_local_folder(
    folder, store, tmp_path, storage
):
  written = _write(folder, storage)
  _write(tmp_path / 'local', storage)
  assert _objects(store, folder) == _local_files(tmp_path / 'local')
  source = tokens.TokenSource(str(folder))
  assert str(source.folder) == str(folder)
  for copy in (source, pickle.loads(pickle.dumps(source))):
    for example, wanted in zip(copy, written, strict=True):
      np.testing.assert_array_equal(example.tokens, wanted.tokens)
      assert example[1:] == wanted[1:]
  assert writers.TokenWriter(folder, _job(storage)).is_finished


def test_copies_are_reused(folder, store, cache, monkeypatch):
  _write(folder)
  wanted = tokens.TokenSource(folder)
  copies = cache / wanted.manifest.shards_sha256
  assert {x.name for x in copies.iterdir()} == {
      _SHARD.format(i) for i in range(3)
  }
  with monkeypatch.context() as patch:
    patch.setattr(store, 'denied', '.npz')
    again = tokens.TokenSource(folder)
    np.testing.assert_array_equal(again[5].tokens, wanted[5].tokens)
    # A corrupted copy is not used, and one that is missing is needed.
    path = copies / _SHARD.format(1)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(object_store.StoreError, match=_SHARD.format(1)):
      tokens.TokenSource(folder)
  tokens.TokenSource(folder)
  assert path.read_bytes() == content
  assert len(list(copies.iterdir())) == 3


def test_corrupted_and_missing_objects_are_named(folder, store, cache):
  _write(folder)
  _corrupt(store, folder / _SHARD.format(0))
  object_store.delete(folder / _SHARD.format(2))
  with pytest.raises(ValueError, match='cannot be used') as error:
    tokens.TokenSource(folder)
  message = str(error.value)
  assert message.startswith(str(folder))
  assert f'{_SHARD.format(0)} has sha256' in message
  assert f'{_SHARD.format(2)} is missing' in message
  assert [x.name for x in cache.rglob('*.*')] == [_SHARD.format(1)]


def test_a_copy_that_is_corrupted_later_names_both_files(folder, cache):
  _write(folder, 'array_record')
  source = tokens.TokenSource(folder)
  (path,) = cache.rglob('tokens-00001*')
  path.write_bytes(b'')
  with pytest.raises(ValueError, match=f'{path} .*copy of {folder}/tokens-'):
    list(source)


def test_folders_without_token_files_are_named(folder, store):
  with pytest.raises(ValueError, match=f'{folder} holds no token files'):
    tokens.TokenSource(folder)
  writers.TokenWriter(folder, _job())
  with pytest.raises(ValueError, match=f'{folder} is unfinished'):
    tokens.TokenSource(folder)
  files.write_bytes(folder / 'other' / 'x', b'')
  with pytest.raises(ValueError, match="holds 'x' but no token files"):
    writers.TokenWriter(folder / 'other', _job())


def test_a_cache_that_cannot_be_written_is_named(folder, cache):
  _write(folder)
  cache.parent.mkdir(exist_ok=True)
  cache.write_bytes(b'')
  with pytest.raises(ValueError, match=f'{cache}.* cannot be written'):
    tokens.TokenSource(folder)


def test_a_folder_is_locked(folder, monkeypatch):
  monkeypatch.setattr(object_lock, 'RENEWAL', 0.1)
  first, second = (writers.TokenWriter(folder, _job()) for _ in range(2))
  with first.locked():
    with (
        pytest.raises(ValueError, match='is being written by process'),
        second.locked(),
    ):
      pass
    monkeypatch.setattr(writers, 'STOP_INTERVAL', 0.0)
    assert not second.is_stopped
    first.stop()
    assert first.is_stopped
    assert second.is_stopped
  with second.locked():
    assert not second.is_stopped


def test_a_folder_that_another_run_has_finished_is_left_alone(folder, store):
  late, later = (writers.TokenWriter(folder, _job()) for _ in range(2))
  with late.locked():
    _write(folder, lock=False)
    objects = _objects(store, folder)
    with pytest.raises(ValueError, match='just been finished by another run'):
      late.finish()
  with (
      pytest.raises(ValueError, match='just been finished by another run'),
      later.locked(),
  ):
    pass
  assert _objects(store, folder) == objects


# Images are tokenized.


def _tokenize(images, folder):
  return tokens.tokenize_workdir(_config(images), _RUN, folder=folder)


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_bytes(
    folder, store, images, tmp_path, monkeypatch
):
  monkeypatch.setattr(object_lock, 'PATIENCE', 5.0)
  monkeypatch.setattr(object_lock, 'RENEWAL', 0.5)
  _tokenize(images, tmp_path / 'local')
  process = subprocess.Popen(
      [
          sys.executable, '-c', _LAUNCH, str(_ROOT / 'launch.py'),
          f'--workdir={_RUN}', '--mode=tokenize', f'--tokens={folder}',
          '--config.data.source=folder', f'--config.data.data_dir={images}',
          '--config.data.max_damaged_share=0.2',
          '--config.tokenize.storage=npz',
          '--config.tokenize.images_per_shard=3',
      ],
      env={**os.environ, 'PYTHONPATH': str(_ROOT)},
  )
  with store.blocked_at('/tokens-00001'):
    while f'.unfinished/{_SHARD.format(0)}.json' not in _objects(store, folder):
      assert process.poll() is None
      time.sleep(0.1)
    with pytest.raises(ValueError, match='is being written by process'):
      _tokenize(images, folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert '.unfinished/.lock' in _objects(store, folder)
  generation, _ = store.objects[_name(folder / _SHARD.format(0))]
  manifest = _tokenize(images, str(folder))
  assert _objects(store, folder) == _local_files(tmp_path / 'local')
  assert store.objects[_name(folder / _SHARD.format(0))][0] == generation
  assert tokens.TokenSource(folder).manifest == manifest


class _KilledError(BaseException):
  """Stands for a kill: nothing in the package catches it."""


def _kill_at(monkeypatch, moment):
  """Raises before or after the change of the store with this number."""
  moments = itertools.count()

  def wrap(function):
    def wrapped(*args, **kwargs):
      if next(moments) == moment:
        raise _KilledError
      result = function(*args, **kwargs)
      if next(moments) == moment:
        raise _KilledError
      return result

    return wrapped

  for name in ('write', 'write_file', 'delete', 'delete_folder'):
    monkeypatch.setattr(object_store, name, wrap(getattr(object_store, name)))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(
    folder, store, images, tmp_path, monkeypatch
):
  monkeypatch.setattr(object_lock, 'PATIENCE', 1.0)  # A lock may stay.
  _tokenize(images, tmp_path / 'local')
  wanted = _local_files(tmp_path / 'local')
  for moment in itertools.count():
    target = folder / str(moment)
    killed = False
    with pytest.MonkeyPatch.context() as patch:
      _kill_at(patch, moment)
      try:
        _tokenize(images, target)
      except _KilledError:
        killed = True
    if not killed:
      break
    _tokenize(images, target)
    assert _objects(store, target) == wanted, moment
  # At least two moments for each object of the result, and for each record.
  assert moment > 2 * (len(wanted) + 4)


def test_changes_of_images_are_detected(folder, store, images, monkeypatch):
  manifest = _tokenize(images, folder)
  objects = dict(store.objects)
  assert _tokenize(images, folder) == manifest
  assert store.objects == objects
  with monkeypatch.context() as patch:
    patch.setattr(store, 'denied', image_states.HASHES_FILE)
    with pytest.raises(object_store.StoreError, match='403'):
      _tokenize(images, folder)
  path = images / 'validation' / '7.png'
  content = path.read_bytes()
  path.write_bytes(content[:-1] + b'x')  # Of the same size.
  with pytest.raises(ValueError, match=f'1 of 9 images .* in {folder}'):
    _tokenize(images, folder)
  _corrupt(store, folder / image_states.HASHES_FILE)
  with pytest.raises(ValueError, match=f'{folder}/image_hashes.npy, .*corrupt'):
    _tokenize(images, folder)


def test_a_corrupted_shard_is_written_again(folder, store, images, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(writers.TokenWriter, 'finish', _raise_killed)
    with pytest.raises(_KilledError):
      _tokenize(images, folder)
  path = folder / _SHARD.format(1)
  content = files.read_bytes(path)
  _corrupt(store, path)
  _tokenize(images, folder)
  assert files.read_bytes(path) == content


def _raise_killed(*_, **__):
  raise _KilledError


def test_the_default_folder_is_in_the_store(folder, images):
  path = tokens.default_folder(_config(images), str(folder))
  assert str(path) == f'{folder}/tokens/folder_validation'


def test_images_are_decoded_to_local_folders(folder, images, tmp_path, cache):
  _tokenize(images, folder)
  with pytest.raises(ValueError, match=r'--images is gs://.* local path'):
    tokens.detokenize_workdir(_RUN, folder, f'{folder}_images')
  assert not cache.exists()
  assert tokens.detokenize_workdir(_RUN, folder, tmp_path / 'out') == 8
  assert len(list((tmp_path / 'out').iterdir())) == 8


@pytest.mark.slow
def test_a_generator_is_trained_on_tokens_in_a_store(
    folder, store, cache, monkeypatch
):
  monkeypatch.setattr(synthetic, 'NUM_TRAIN', 24)
  monkeypatch.setattr(synthetic, 'NUM_VALIDATION', 16)
  tokenizer = Tokenizer.from_workdir(_RUN).save_pretrained(folder)
  config = configuration.load_config(_ROOT / 'configs/default_generator.py')
  config.update_from_flattened_dict({
      'tokens.tokenizer': str(tokenizer), 'tokens.batch_size': 8,
      'tokens.eval_batch_size': 8, 'tokens.train_views': 2,
      'model.depth': 1, 'model.width': 8, 'model.num_heads': 2,
      'model.mlp_dim': 12, 'model.class_conditional': False,
      'losses.class_dropout': 0.0, 'train.num_steps': 1,
      'optim.warmup_steps': 0, 'eval.num_samples': 0,
  })
  workdir = f'{folder}_generator'
  training.train_and_evaluate(config, workdir)
  for split, num in (('train_2_views', 48), ('eval', 16)):
    source = tokens.TokenSource(f'{folder}/tokens/synthetic_{split}')
    assert len(source) == num
  assert len([x for x in cache.rglob('tokens*') if x.is_file()]) == 2
  # The same files by their paths: they are not written again.
  objects = _objects(store, folder)
  config.tokens.tokenizer = ''
  config.tokens.train = f'{folder}/tokens/synthetic_train_2_views'
  config.tokens.eval = f'{folder}/tokens/synthetic_eval'
  config.train.num_steps = 2
  training.train_and_evaluate(config, workdir, allow_config_change=True)
  assert _objects(store, folder) == objects
  record = files.read_json(f'{workdir}/{files.EVALUATION}')
  assert record['protocol']['num_images'] == 16
