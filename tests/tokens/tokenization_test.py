"""Modes tokenize and detokenize: kills, sizes, damage, several processes."""

import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
from PIL import Image
import pytest

from experiments.fault_suite import group_processes
from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax import tokens
from fsq_jax.data import folder as folder_lib
from fsq_jax.data import transforms
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.tokenizer import files
from fsq_jax.tokenizer import tokenizer as tokenizers
from fsq_jax.tokens import batches
from fsq_jax.tokens import image_states
from fsq_jax.tokens import shards
from fsq_jax.tokens import writer

_ROOT = pathlib.Path(__file__).parents[2]
# A trained run; see trained_test.
_RUN = _ROOT / 'tests' / 'testdata' / 'run'


@pytest.fixture(autouse=True)
def once_loaded(monkeypatch):
  """Loads, and compiles, each tokenizer once."""
  monkeypatch.setattr(tokenizers, 'load_tokenizer', _load_tokenizer)


_load_tokenizer = functools.cache(tokenizers.load_tokenizer)


@pytest.fixture(scope='module', autouse=True)
def compiled():
  """Compiles the functions of the run's tokenizer before the first test."""
  tokenizer = _load_tokenizer(_RUN, 'newest', 8)
  tokenizer.reconstruct(np.zeros((8, 16, 16, 3), np.uint8))


def _config(**fields):
  """That of the run, with dotted fields (a__b) replaced."""
  text = (_RUN / 'config.json').read_text()
  config = configuration.config_from_json(text)
  config.data.eval_batch_size = 8
  config.tokenize.images_per_shard = 20
  for name, value in fields.items():
    section, _, key = name.rpartition('__')
    (config[section] if section else config)[key] = value
  return config


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder of 45 images in two classes, three sizes, two of them damaged."""
  root = tmp_path_factory.mktemp('images')
  rng = np.random.default_rng(0)
  for i in range(45):
    size = [(16, 16), (40, 20), (9, 33)][i % 3]
    # Smooth, so that no latent lies at the border of two codes.
    pixels = rng.integers(0, 256, (3, 3, 3), np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    path = root / 'validation' / 'ab'[i % 2] / f'{i:02}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
  for name in ('a/10.png', 'b/31.png'):
    (root / 'validation' / name).write_bytes(b'text')
  return root


def _folder_config(root, **fields):
  config = _config(
      data__source='folder', data__data_dir=str(root), **fields
  )
  config.data.max_damaged_share = 0.04  # Two of them.
  return config


def _files(folder):
  # But for what depends on where, and when, the images were copied to.
  return {
      str(path.relative_to(folder)): path.read_bytes()
      for path in sorted(folder.rglob('*'))
      if path.is_file() and path.name != image_states.TIMES_FILE
  }


def _pixels(folder):
  return {
      str(path.relative_to(folder).with_suffix('')): np.asarray(
          Image.open(path)
      )
      for path in sorted(folder.rglob('*.png'))
  }


@pytest.mark.fast_variants('crop-npz')
@pytest.mark.parametrize('storage', ['array_record', 'npz'])
@pytest.mark.parametrize('fit', ['crop', 'pad'])
def test_images_come_back_as_the_model_reconstructs_them(
    tmp_path, root, storage, fit
):
  config = _folder_config(
      root, tokenize__storage=storage, tokenize__fit=fit
  )
  manifest = tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'tokens')
  num = tokens.detokenize_workdir(_RUN, tmp_path / 'tokens', tmp_path / 'out')
  assert num == manifest.num_images == 43
  assert [x['name'] for x in manifest.damaged] == ['a/10.png', 'b/31.png']
  restored = _pixels(tmp_path / 'out')
  assert len(restored) == 43
  tokenizer = tokenizers.load_tokenizer(_RUN, 'newest', 8)
  for example in tokens.TokenSource(tmp_path / 'tokens'):
    image = np.asarray(Image.open(root / 'validation' / example.name))
    # Sums in batches of other sizes differ in the last bits: pixels may round
    # to the next grey level.
    expected = tokenizer.reconstruct(image[None], fit)[0].astype(int)
    difference = np.abs(restored[example.name] - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.01
    assert example.size == image.shape[:2]
    assert example.label == 'ab'.index(example.name[0])
  assert manifest.job.label_names == ('a', 'b')
  # Images of 9 x 33 pixels, to a crop of 16 x 16.
  assert manifest.summary['num_upscaled_images'] == 15 * (fit == 'crop')
  sizes = sum(
      path.stat().st_size
      for path in (root / 'validation').rglob('*.png')
      if path.stat().st_size > 4
  )
  num_tokens = manifest.summary['num_tokens']
  assert manifest.summary['compression_of_files'] == pytest.approx(
      8 * sizes / (num_tokens * manifest.job.to_json()['bits_per_token'])
  )


class _KilledError(BaseException):
  """Stands for a kill: nothing in the package catches it."""


def _kill_at(monkeypatch, moment):
  """Kills this process, so to speak, at a moment.

  Before and after everything that changes the disk, and each encoding, is a
  moment.
  """
  moments = itertools.count()

  def pass_moment():
    if next(moments) == moment:
      raise _KilledError

  def wrap(function):
    def wrapped(*args, **kwargs):
      pass_moment()
      result = function(*args, **kwargs)
      pass_moment()
      return result

    return wrapped

  for owner, name in (
      (shards, 'write'), (os, 'replace'), (pathlib.Path, 'mkdir'),
      (Tokenizer, 'encode'), (shutil, 'rmtree'),
  ):  # fmt: skip
    monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


@pytest.mark.parametrize(('storage', 'views', 'step'), [
    ('array_record', 1, 5),
    *(
        pytest.param(storage, views, 1, marks=pytest.mark.slow)
        for storage, views in (
            ('array_record', 1), ('npz', 1), ('array_record', 3)
        )
    ),
])  # fmt: skip
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(
    tmp_path, root, storage, views, step
):
  config = _folder_config(
      root, tokenize__storage=storage, tokenize__views=views
  )
  tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'straight')
  wanted = _files(tmp_path / 'straight')
  assert len(wanted) == 5
  for moment in itertools.count(step=step):
    folder = tmp_path / str(moment)
    killed = False
    with pytest.MonkeyPatch.context() as monkeypatch:
      _kill_at(monkeypatch, moment)
      try:
        tokens.tokenize_workdir(config, _RUN, folder=folder)
      except _KilledError:
        killed = True
    if not killed:
      break
    tokens.tokenize_workdir(config, _RUN, folder=folder)
    assert _files(folder) == wanted, moment
  # Of three shards alone there are two moments each for four effects.
  assert moment > 24
  # Nothing is done a second time.
  times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


# Views.


def test_views_are_random_crops_as_in_training(tmp_path, root):
  config = _folder_config(
      # Colours stay as they are.
      root, data__crop_scale=(0.5, 2.0), data__color_jitter=0.5,
      tokenize__views=5, seed=7,
  )  # fmt: skip
  manifest = tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'tokens')
  assert manifest.num_images == 5 * 43
  assert len(manifest.damaged) == 2
  assert manifest.summary['distinct_grids'] > 200
  assert manifest.summary['num_upscaled_images'] == 15  # Not of views.
  assert manifest.job.augmentation == {
      'seed': 7, 'crop_scale': [0.5, 2.0], 'flip': True
  }  # fmt: skip
  source = data.open_source(config.data, 'eval')
  readable = [i for i in range(45) if i not in (5, 38)]
  crops = []
  examples = list(tokens.TokenSource(tmp_path / 'tokens'))
  for number, example in enumerate(examples):
    index, view = readable[number // 5], number % 5
    facts = source.metadata(index)
    assert (example.name, example.label) == (facts.name, facts.label)
    assert example.view == view
    image = source.load(index)
    assert example.size == image.shape[:2]
    seed = np.random.SeedSequence(7, spawn_key=(index, view))
    crops.append(
        transforms.augment(
            image, np.random.default_rng(seed), size=(16, 16),
            crop_scale=(0.5, 2.0), flip=True, color_jitter=0.0,
        )
    )
    top, left, height, width = example.crop
    crop = transforms.resize(
        image[top : top + height, left : left + width], (16, 16)
    )
    np.testing.assert_array_equal(
        crops[-1], crop[:, ::-1] if example.is_flipped else crop
    )
  assert len({x.tobytes() for x in crops}) > 210
  assert {x.is_flipped for x in examples} == {False, True}
  tokenizer = tokenizers.load_tokenizer(_RUN, 'newest', 8)
  np.testing.assert_array_equal(
      [x.tokens for x in examples], tokenizer.encode(np.stack(crops))
  )


def test_views_depend_on_neither_shards_nor_threads(tmp_path, root):
  read = []
  for name, num_images, num_threads in (('a', 20, 1), ('b', 7, 3)):
    config = _folder_config(root, tokenize__views=3)
    config.tokenize.images_per_shard = num_images
    config.data.num_threads = num_threads
    tokens.tokenize_workdir(config, _RUN, folder=tmp_path / name)
    read.append(list(tokens.TokenSource(tmp_path / name)))
  for left, right in zip(*read, strict=True):
    np.testing.assert_array_equal(left.tokens, right.tokens)
    assert left[1:] == right[1:]
  config.seed = 1
  tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'c')
  other = tokens.TokenSource(tmp_path / 'c')
  assert [x[1:] for x in other] != [x[1:] for x in read[0]]


def test_images_of_several_views_get_names_of_their_own(tmp_path, root):
  config = _folder_config(root, tokenize__views=2)
  tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'tokens')
  num = tokens.detokenize_workdir(_RUN, tmp_path / 'tokens', tmp_path / 'out')
  assert num == 2 * 43
  restored = _pixels(tmp_path / 'out')
  assert len(restored) == num
  source = tokens.TokenSource(tmp_path / 'tokens')
  tokenizer = tokenizers.load_tokenizer(_RUN, 'newest', 8)
  decoded = tokenizer.decode(np.stack([x.tokens for x in source]))
  assert 'a/00.png.view1' in restored
  for example, image in zip(source, decoded, strict=True):
    np.testing.assert_array_equal(
        restored[f'{example.name}.view{example.view}'], image
    )


def test_a_change_of_views_needs_another_folder(tmp_path, root):
  folder = tmp_path / 'x'
  tokens.tokenize_workdir(_folder_config(root), _RUN, folder=folder)
  config = _folder_config(root, tokenize__views=2)
  with pytest.raises(ValueError, match=r'(?s)views: 1 -> 2.*--tokens'):
    tokens.tokenize_workdir(config, _RUN, folder=folder)
  assert tokens.default_folder(config, tmp_path).name == (
      'folder_validation_2_views'
  )
  config.tokenize.fit = 'pad'
  with pytest.raises(ValueError, match=r"views is 2, .*fit 'crop'"):
    tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'y')


def _first_images(config, num):
  """What the model gets of the first images of `photos`."""
  source = batches.open_source(config.data, config.tokenize)
  augmentation = {'seed': 0, 'crop_scale': (1.0, 4.0), 'flip': True}
  job = types.SimpleNamespace(
      fit='crop', image_size=config.data.image_size,
      views=config.tokenize.views, augmentation=augmentation,
  )
  reader = batches.ImageReader(config.data, source, job)
  return reader.load(0, range(num)).images


@pytest.mark.parametrize('views', [1, 2])
def test_training_photographs_are_different_images(views):
  # Seven photographs, whose centres were taken again and again.
  config = _config(
      data__source='photos', data__crop_scale=(1.0, 4.0),
      tokenize__split='train', tokenize__views=views,
  )  # fmt: skip
  images = _first_images(config, 1000)
  assert len({image.tobytes() for image in images}) > 990
  if views == 2:
    # By turns, as many of each photograph as it has shares.
    means = np.array([image.mean() for image in images]).reshape((25, 20, 2))
    assert means.std(axis=(0, 2)).min() > 0


# Images that change.


@pytest.fixture
def copy(tmp_path, root, monkeypatch):
  """A copy of the images, old enough for their times to be kept."""
  monkeypatch.setattr(image_states, 'RESOLUTION_NS', 0)
  return pathlib.Path(shutil.copytree(root, tmp_path / 'copy'))


def _replace(path, *, seconds=0):
  """Changes the last pixel of an image, and its time; not its size."""
  before = path.stat()
  with Image.open(path) as image:
    pixels = np.array(image)
  for value in range(256):
    pixels[-1, -1, 0] = value
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'PNG')
    content = buffer.getvalue()
    if len(content) == before.st_size and content != path.read_bytes():
      break
  else:
    raise AssertionError('No other image has this size.')
  path.write_bytes(content)
  time_ns = before.st_mtime_ns + int(seconds * 1e9)
  os.utime(path, ns=(time_ns, time_ns))
  assert path.stat().st_size == before.st_size


@pytest.mark.parametrize('seconds', [-3600, 0, 3600])
def test_an_image_of_the_same_name_and_size_is_noticed(
    tmp_path, copy, seconds
):
  config = _folder_config(copy)
  folder = tmp_path / 'x'
  manifest = tokens.tokenize_workdir(config, _RUN, folder=folder)
  source = data.open_source(config.data, 'eval')
  digests = {
      i: hashlib.sha256(pathlib.Path(source.describe(i)).read_bytes()).digest()
      for i in range(45)
  }
  assert manifest.content_sha256 == (
      hashlib.sha256(b''.join(digests[i] for i in range(45))).hexdigest()
  )
  np.testing.assert_array_equal(
      np.load(folder / 'image_hashes.npy'),
      [list(digests[i]) for i in range(45)],
  )
  before = _files(folder)
  path = copy / 'validation' / 'b' / '07.png'
  _replace(path, seconds=seconds)
  message = rf'(?s)1 of 45 images.*\n  {path}\n.*Delete that folder.*--tokens'
  with pytest.raises(ValueError, match=message):
    tokens.tokenize_workdir(config, _RUN, folder=folder)
  assert _files(folder) == before


def test_images_of_a_part_of_a_run_are_compared_too(tmp_path, copy):
  config = _folder_config(copy)
  folder = tmp_path / 'x'
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(writer.TokenWriter, 'finish', _raise_killed)
    with pytest.raises(_KilledError):
      tokens.tokenize_workdir(config, _RUN, folder=folder)
  path = copy / 'validation' / 'a' / '44.png'
  _replace(path)
  with pytest.raises(ValueError, match='1 of 45 images have changed'):
    tokens.tokenize_workdir(config, _RUN, folder=folder)
  # An image of a shard that is written again may have changed.
  (folder / 'tokens-00001-of-00003.array_record').unlink()
  manifest = tokens.tokenize_workdir(config, _RUN, folder=folder)
  assert manifest.num_images == 43
  tokens.tokenize_workdir(config, _RUN, folder=folder, verify_images=True)


def _count_reads(monkeypatch):
  reads = []
  read = folder_lib.FolderSource.read
  monkeypatch.setattr(
      folder_lib.FolderSource,
      'read',
      lambda self, index: (reads.append(index), read(self, index))[1],
  )
  return reads


def test_only_images_with_other_times_are_read_again(
    tmp_path, copy, monkeypatch
):
  config = _folder_config(copy)
  folder = tmp_path / 'x'
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  reads = _count_reads(monkeypatch)
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  assert reads == []
  tokens.tokenize_workdir(config, _RUN, folder=folder, verify_images=True)
  assert sorted(reads) == list(range(45))
  reads.clear()
  (copy / 'validation' / 'a' / '02.png').touch()
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  assert reads == [1]
  reads.clear()
  # As in a copy of the images, or of the token files.
  (folder / image_states.TIMES_FILE).unlink()
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  assert sorted(reads) == list(range(45))


def test_hashes_are_compared_where_times_tell_nothing(
    tmp_path, copy, monkeypatch
):
  # As on a file system that keeps no times.
  monkeypatch.setattr(
      folder_lib.FolderSource, 'stamp', lambda self, index: (1, 2, 3)
  )
  config = _folder_config(copy)
  folder = tmp_path / 'x'
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  _replace(copy / 'validation' / 'b' / '07.png')
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  with pytest.raises(ValueError, match='1 of 45 images have changed'):
    tokens.tokenize_workdir(config, _RUN, folder=folder, verify_images=True)


def test_times_of_new_files_are_not_trusted(tmp_path, copy, monkeypatch):
  monkeypatch.setattr(image_states, 'RESOLUTION_NS', 10**18)
  folder = tmp_path / 'x'
  tokens.tokenize_workdir(_folder_config(copy), _RUN, folder=folder)
  assert not np.load(folder / image_states.TIMES_FILE).any()
  monkeypatch.setattr(image_states, 'RESOLUTION_NS', 0)
  shutil.rmtree(folder)
  tokens.tokenize_workdir(_folder_config(copy), _RUN, folder=folder)
  source = data.open_source(_folder_config(copy).data, 'eval')
  status = os.stat(source.describe(3))
  np.testing.assert_array_equal(
      np.load(folder / image_states.TIMES_FILE)[3],
      [status.st_size, status.st_mtime_ns, status.st_ctime_ns],
  )


def test_hashes_that_are_missing_or_damaged_are_refused(tmp_path, root):
  config = _folder_config(root)
  folder = tmp_path / 'x'
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  path = folder / image_states.HASHES_FILE
  content = path.read_bytes()
  other = content[:-1] + bytes([content[-1] ^ 1])
  for harmed in (None, b'', content[:-1], other, content[:50]):
    path.unlink(missing_ok=True)
    if harmed is not None:
      path.write_bytes(harmed)
    with pytest.raises(ValueError, match=r'hashes\.npy, .*delete the folder'):
      tokens.tokenize_workdir(config, _RUN, folder=folder)
    # They are not needed for reading.
    assert len(tokens.TokenSource(folder)) == 43


def test_folders_without_hashes_are_left_with_a_warning(
    tmp_path, root, caplog
):
  config = _folder_config(root)
  folder = tmp_path / 'x'
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  # As earlier programs wrote it.
  path = folder / 'manifest.json'
  values = json.loads(path.read_text())
  for key in ('views', 'augmentation', 'content_sha256'):
    del values[key]
  values['layout'] = 'A record is an image ...'
  path.write_text(json.dumps(values))
  caplog.clear()
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  assert 'since then cannot be detected' in caplog.text


def test_names_that_are_no_text_go_through_files(tmp_path):
  folder = tmp_path / 'images' / 'validation'
  folder.mkdir(parents=True)
  names = [b'\xff.png', 'ü.png'.encode(), b'damaged \xfe.png']
  for name in names[:2]:
    path = pathlib.Path(os.fsdecode(os.fsencode(folder) + b'/' + name))
    Image.fromarray(np.full((16, 16, 3), len(name), np.uint8)).save(path)
  with open(os.fsencode(folder) + b'/' + names[2], 'wb') as file:
    file.write(b'text')
  config = _folder_config(tmp_path / 'images')
  config.data.max_damaged_share = 0.5
  for storage in ('array_record', 'npz'):
    config.tokenize.storage = storage
    manifest = tokens.tokenize_workdir(config, _RUN, folder=tmp_path / storage)
    '\n'.join(tokens.describe(manifest)).encode()
    out = tmp_path / f'{storage} out'
    assert tokens.detokenize_workdir(_RUN, tmp_path / storage, out) == 2
    assert sorted(os.listdir(os.fsencode(out))) == sorted(
        name + b'.png' for name in names[:2]
    )


@pytest.mark.parametrize('harm', ['truncate', 'delete', 'flip'])
def test_a_shard_damaged_meanwhile_is_written_again(tmp_path, root, harm):
  config = _folder_config(root)
  tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'straight')
  folder = tmp_path / 'x'
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(writer.TokenWriter, 'finish', _raise_killed)
    with pytest.raises(_KilledError):
      tokens.tokenize_workdir(config, _RUN, folder=folder)
  path = folder / 'tokens-00001-of-00003.array_record'
  content = path.read_bytes()
  path.unlink()
  if harm == 'truncate':
    path.write_bytes(content[:1000])
  elif harm == 'flip':
    path.write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  assert _files(folder) == _files(tmp_path / 'straight')


def _raise_killed(*_, **__):
  raise _KilledError


def test_damage_of_earlier_runs_counts_towards_the_limit(tmp_path, root):
  config = _folder_config(root)
  config.data.max_damaged_share = 0.01  # One of them.
  with pytest.raises(ValueError, match='2 of 45 images cannot be read'):
    tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'x')
  # The first of them is in the first shard, the second in the second.
  config.data.num_threads = config.data.prefetch = 1
  folder = tmp_path / 'y'
  with pytest.MonkeyPatch.context() as monkeypatch:
    write = shards.write
    monkeypatch.setattr(
        shards, 'write', lambda *x: (write(*x), monkeypatch.undo())
    )
    for _ in range(2):
      with pytest.raises(ValueError, match='2 of 45 images cannot be read'):
        tokens.tokenize_workdir(config, _RUN, folder=folder)


def test_images_that_wait_are_no_larger_than_their_crop(root):
  config = _folder_config(root).data
  source = data.open_source(config, 'eval')
  job = types.SimpleNamespace(fit='crop', image_size=(8, 8), views=1)
  chunk = batches.ImageReader(config, source, job).load(0, range(10))
  assert len(chunk.images) == 9  # One is damaged.
  assert all(image.base is None for image in chunk.images)


def test_few_whole_images_wait_at_a_time(root):
  config = _folder_config(root).data
  source = data.open_source(config, 'eval')
  job = types.SimpleNamespace(
      fit='pad', batch_size=32, views=1, indices=lambda shard: range(45)
  )
  chunks = batches.ImageReader(config, source, job).read([0])
  sizes = [len(x.images) + len(x.damaged) for x in chunks]
  assert sizes == [8, 8, 8, 8, 8, 5]


def test_batches_do_not_depend_on_what_is_left_of_a_shard(
    tmp_path, root, monkeypatch
):
  lengths = []

  def recording(method):
    def record(self, x, *args):
      lengths.append(len(x))
      return method(self, x, *args)

    return record

  for name in ('encode', 'decode'):
    method = recording(getattr(Tokenizer, name))
    monkeypatch.setattr(Tokenizer, name, method)
  folder = tmp_path / 'tokens'
  tokens.tokenize_workdir(_folder_config(root), _RUN, folder=folder)
  tokens.detokenize_workdir(_RUN, folder, tmp_path / 'out')
  # Shards of 20, 20 and 5, of which two cannot be read, are 3 + 3 + 1 batches.
  assert lengths == [8] * (7 + 6)


def test_original_sizes_are_those_before_resizing(tmp_path, root):
  config = _folder_config(root, data__resize_shorter=18)
  manifest = tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'tokens')
  # Images of 16 x 16 and of 9 x 33 pixels.
  assert manifest.summary['num_upscaled_images'] == 30
  assert any(
      line.startswith('scaled up: 30 images')
      for line in tokens.describe(manifest)
  )
  for example in tokens.TokenSource(tmp_path / 'tokens'):
    with Image.open(root / 'validation' / example.name) as image:
      assert example.original_size == image.size[::-1]
    assert min(example.size) == 18


def test_a_folder_of_other_tokens_is_left_alone(tmp_path, root):
  folder = tmp_path / 'x'
  tokens.tokenize_workdir(_folder_config(root), _RUN, folder=folder)
  before = _files(folder)
  others = (
      (_config(), 'source: '),
      (_folder_config(root, tokenize__fit='pad'), 'fit: '),
      (_folder_config(root, tokenize__storage='npz'), 'storage: '),
      (_folder_config(root, data__resize_shorter=16), 'resize_shorter'),
  )
  for config, message in others:
    with pytest.raises(ValueError, match=message):
      tokens.tokenize_workdir(config, _RUN, folder=folder)
  config = _folder_config(root)
  config.model.encoder.width = 32
  with pytest.raises(ValueError, match='another model than the checkpoint'):
    tokens.tokenize_workdir(config, _RUN, folder=folder)
  assert _files(folder) == before


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Makes folders of tokenizers with random weights, by their quantizers."""
  made = {}

  def make(name):
    if name not in made:
      config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
      config.model.quantizer.name = name
      config.data.eval_batch_size = 8
      config.tokenize.images_per_shard = 100
      model = models.build_autoencoder(config.model, config.data.image_size)
      mesh = partitioning.create_mesh(
          {'data': -1, 'fsdp': 1}, jax.devices()[:1]
      )
      images = np.zeros((1, *config.data.image_size, 3), np.float32)
      variables = jax.jit(model.init)(jax.random.key(0), images)
      variables = jax.device_put(variables, partitioning.replicated(mesh))
      folder = tmp_path_factory.mktemp(name) / 'saved'
      model = files.SavedModel(config, model, variables)
      Tokenizer(model, mesh).save_pretrained(folder)
      made[name] = config, folder
    return made[name]

  return make


@pytest.mark.slow
@pytest.mark.parametrize('quantizer', ['grouped_fsq', 'residual_fsq'])
def test_every_quantizer_with_tokens_goes_through_files(
    tmp_path, saved, quantizer
):
  config, folder = saved(quantizer)
  config.tokenize.storage = {'grouped_fsq': 'npz'}.get(
      quantizer, 'array_record'
  )
  manifest = tokens.tokenize_workdir(config, folder, folder=tmp_path / 'x')
  source = tokens.TokenSource(tmp_path / 'x')
  tokenizer = tokenizers.load_tokenizer(folder, 'newest', 8)
  index_shape = tokenizer.model.quantizer.index_shape
  assert manifest.job.index_shape == index_shape
  assert source[0].tokens.shape == (4, 4, *index_shape)
  assert tokens.detokenize_workdir(
      folder, tmp_path / 'x', tmp_path / 'out'
  ) == len(source)
  images = _pixels(tmp_path / 'out')
  decoded = tokenizer.decode(np.stack([x.tokens for x in source]))
  for example, image in zip(source, decoded, strict=True):
    np.testing.assert_array_equal(images[example.name], image)
  # Its weights are others, its dialect too.
  with pytest.raises(ValueError, match='another convention'):
    tokens.detokenize_workdir(_RUN, tmp_path / 'x', tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


def test_tokens_of_another_model_are_not_decoded(tmp_path, root):
  tokens.tokenize_workdir(_folder_config(root), _RUN, folder=tmp_path / 'x')
  tokenizer = tokenizers.load_tokenizer(_RUN, 'newest', 8)
  variables = jax.tree.map(
      lambda x: jax.device_put(np.asarray(x) + 1, x.sharding),
      tokenizer.variables,
  )
  model = files.SavedModel(tokenizer.config, tokenizer.model, variables)
  other = Tokenizer(model, tokenizer.mesh).save_pretrained(tmp_path / 'other')
  with pytest.raises(ValueError, match='by the model with hash'):
    tokens.detokenize_workdir(other, tmp_path / 'x', tmp_path / 'out')


def test_latents_without_a_token_are_named(tmp_path, monkeypatch):
  encode = Tokenizer.encode

  def with_nan(self, images, fit):
    indices = np.array(encode(self, images, fit))
    indices[3, 0, 0] = -1
    return indices

  monkeypatch.setattr(Tokenizer, 'encode', with_nan)
  with pytest.raises(ValueError, match="image '3' are NaN"):
    tokens.tokenize_workdir(_config(), _RUN, folder=tmp_path / 'x')


@pytest.mark.parametrize(
    ('name', 'message'),
    [('../a', 'outside of'), ('/a', 'outside of'), ('link/a', 'outside of'),
     ('', 'not a file name'), ('a\0b', 'not a file name'),
     ('b/../1', 'of another image'), ('1.png/b', 'a folder in the name of'),
     ('x' * 252, 'more than 255 bytes')],
)  # fmt: skip
def test_names_do_not_lead_out_of_the_folder(
    tmp_path, monkeypatch, name, message
):
  config = _config()
  config.tokenize.images_per_shard = 1000
  write = shards.write

  def write_foreign(path, examples, job):
    write(path, [examples[0]._replace(name=name), *examples[1:]], job)

  monkeypatch.setattr(shards, 'write', write_foreign)
  tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'tokens')
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'link').symlink_to(tmp_path)
  with pytest.raises(ValueError, match=message):
    tokens.detokenize_workdir(_RUN, tmp_path / 'tokens', out)
  assert list(tmp_path.rglob('*.png')) == []


def test_a_signal_stops_and_the_next_run_goes_on(tmp_path, monkeypatch):
  config = _config()
  config.data.num_threads = config.data.prefetch = 1
  folder = tmp_path / 'x'
  write = shards.write

  def write_and_signal(*args):
    write(*args)
    os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(shards, 'write', write_and_signal)
    with pytest.raises(tokens.Interrupted):
      tokens.tokenize_workdir(config, _RUN, folder=folder)
  assert len(list(folder.glob('tokens-*'))) == 1
  tokens.tokenize_workdir(config, _RUN, folder=folder)
  tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'straight')
  assert _files(folder) == _files(tmp_path / 'straight')


def test_default_folders_are_named_for_the_images(tmp_path):
  config = _config()
  assert tokens.default_folder(config, tmp_path) == (
      tmp_path / 'tokens' / 'synthetic_eval'
  )
  config.tokenize.split = 'train'
  config.data.source = 'digits'
  assert tokens.default_folder(config, tmp_path).name == 'digits_train'
  config.data.update(source='tfds', name='a/b:1.0', train_split='train[:9%]')
  assert tokens.default_folder(config, tmp_path).name == 'tfds_a_b_1_0_train_9'


def _launch(*args):
  return subprocess.Popen(
      [sys.executable, 'launch.py', *args],
      cwd=_ROOT,
      text=True,
      stderr=subprocess.PIPE,
      stdout=subprocess.PIPE,
  )


@pytest.mark.slow
def test_sigkill_and_the_same_command_again(tmp_path):
  arguments = [
      '--mode=tokenize', f'--workdir={_RUN}',
      '--config.tokenize.images_per_shard=8', '--config.data.prefetch=1',
      '--config.tokenize.split=train',
  ]  # fmt: skip
  folder = tmp_path / 'x'
  process = _launch(*arguments, f'--tokens={folder}')
  deadline = time.monotonic() + 300
  try:
    while len(list(folder.glob('tokens-*'))) < 3:
      assert process.poll() is None
      assert time.monotonic() < deadline
      time.sleep(0.01)
  finally:
    process.kill()
    process.wait()
  assert not (folder / 'manifest.json').exists()
  for other in (folder, tmp_path / 'straight'):
    process = _launch(*arguments, f'--tokens={other}')
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert '8192/8192 images' in error
    assert 'codebook usage: ' in out
    assert 'compression of pixels: ' in out
  assert _files(folder) == _files(tmp_path / 'straight')


@pytest.mark.slow
def test_processes_share_the_files_and_stop_together(tmp_path, monkeypatch):
  images = tmp_path / 'images' / 'train'
  images.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(820):
    # Smooth, so that no latent lies at the border of two codes.
    pixels = rng.integers(0, 256, (3, 3, 3), np.uint8)
    size = (9, 33) if i % 10 == 0 else (24, 20)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    image.save(images / f'{i:03}.png')
  for i in (1, 17, 815):
    (images / f'{i:03}.png').write_bytes(b'text')
  folder = tmp_path / 'x'
  run = tmp_path / 'run'
  run.symlink_to(_RUN)

  def launch():
    return group_processes.launch(
        run, 2, '--mode=tokenize', f'--tokens={folder}',
        '--config.data.source=folder',
        f'--config.data.data_dir={images.parent}',
        '--config.tokenize.images_per_shard=2',
        '--config.tokenize.split=train',
        '--config.tokenize.views=2',
        env=dict(
            os.environ,
            XLA_FLAGS=os.environ['XLA_FLAGS']
            + ' --xla_force_host_platform_device_count=2',
        ),
    )  # fmt: skip

  processes = launch()
  deadline = time.monotonic() + 300
  while len(list(folder.glob('tokens-*'))) < 20:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  processes[1].terminate()
  codes = [process.wait(timeout=600) for process in processes]
  logs = [run.with_suffix(f'.log{i}').read_text() for i in range(2)]
  assert codes == [75, 75], logs
  num_done = len(list(folder.glob('tokens-*')))
  assert num_done < 400
  codes = [process.wait(timeout=600) for process in launch()]
  logs = [run.with_suffix(f'.log{i}').read_text() for i in range(2)]
  assert codes == [0, 0], logs
  # Batches of as many devices: with others, sums differ in their last bits.
  mesh = partitioning.create_mesh({'data': 2, 'fsdp': 1}, jax.devices()[:2])
  tokenizer = Tokenizer.from_workdir(_RUN, mesh=mesh, batch_size=8)
  monkeypatch.setattr(tokenizers, 'load_tokenizer', lambda *_: tokenizer)
  config = _config(
      data__source='folder', data__data_dir=str(images.parent),
      tokenize__split='train', tokenize__views=2,
      tokenize__images_per_shard=2,
  )  # fmt: skip
  manifest = tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'one')
  assert _files(folder) == _files(tmp_path / 'one')
  times = [
      np.load(path / image_states.TIMES_FILE)
      for path in (folder, tmp_path / 'one')
  ]
  np.testing.assert_array_equal(*times)
  assert times[0].all()
  assert [x['name'] for x in manifest.damaged] == [
      '001.png', '017.png', '815.png'
  ]
  assert manifest.summary['num_upscaled_images'] == 82
  # Process 0 has shown its own 205 of 410 files, and both the summary.
  assert '820/820 images' in logs[0]
  assert 'images/s' not in logs[1]
  assert all('1634 images in 410 files' in log for log in logs)


def test_the_order_of_batches_does_not_depend_on_where_a_run_goes_on(root):
  """The plan of a shard is the same whichever shards are done."""
  keys = [(1, 1), (2, 2), (1, 1), (3, 3), (2, 2)]
  assert batches.group_equal(keys) == [[0, 2], [1, 4], [3]]


def test_the_manifest_has_no_time_and_no_place(tmp_path, root):
  config = _folder_config(root)
  tokens.tokenize_workdir(config, _RUN, folder=tmp_path / 'x')
  text = (tmp_path / 'x' / 'manifest.json').read_text()
  assert str(tmp_path) not in text
  assert str(root) not in text
  assert json.loads(text)['source']['source'] == 'folder'
