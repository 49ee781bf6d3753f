"""Where images come from: folders, prepared data, photographs, synthetic."""

import hashlib
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys

import ml_collections
import numpy as np
from PIL import Image
import pytest
import skimage.data
import tensorflow_datasets as tfds

from configs import default
from fsq_jax import data
from fsq_jax.data import builder
from fsq_jax.data import decoding
from fsq_jax.data import folder
from fsq_jax.data import listing
from fsq_jax.data import photos
from fsq_jax.data import synthetic
from fsq_jax.data import tfds_source


def _encode(image, format: str = 'PNG', **options) -> bytes:
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, format, **options)
  return buffer.getvalue()


# Folders.


def _write(path, value: int = 0, size=(4, 6)):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(_encode(np.full((*size, 3), value, np.uint8)))


def _content_hash(source):
  return data.content_hash(source.digests)


def test_the_content_hash_changes_with_an_image_of_the_same_size(tmp_path):
  paths = [tmp_path / 'train' / f'{i}.bmp' for i in range(3)]
  paths[0].parent.mkdir()
  for i, path in enumerate(paths):
    path.write_bytes(_encode(np.full((4, 6, 3), i, np.uint8), 'BMP'))

  def read():
    source = folder.FolderSource(str(tmp_path), 'train')
    for i in range(3):
      source.load(i)
    return source

  before = read()
  digests = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
  assert _content_hash(before) == (
      hashlib.sha256(b''.join(digests)).hexdigest()
  )
  paths[1].write_bytes(_encode(np.full((4, 6, 3), 9, np.uint8), 'BMP'))
  after = read()
  assert after.identity == before.identity
  assert _content_hash(after) != _content_hash(before)


def test_folder_lists_images_sorted_at_any_depth(tmp_path):
  names = ['b/2.PNG', 'a/x y/ü.png', 'top.png', 'b/10.png', f'{"n" * 251}.png']
  for value, name in enumerate(names):
    _write(tmp_path / 'train' / name, value)
  _write(tmp_path / 'train' / '._hidden.png')
  _write(tmp_path / 'validation' / 'other.png')
  (tmp_path / 'train' / 'empty class').mkdir()
  (tmp_path / 'train' / 'labels.txt').write_text('a')
  source = folder.FolderSource(str(tmp_path), 'train')
  order = [1, 3, 0, 4, 2]
  assert len(source) == 5
  for index, value in enumerate(order):
    assert source.describe(index) == str(tmp_path / 'train' / names[value])
    image = source.load(index)
    assert image.shape == (4, 6, 3)
    assert (image == value).all()
  resized = folder.FolderSource(str(tmp_path), 'train', resize_shorter=8)
  assert resized.load(0).shape == (8, 12, 3)


def test_sub_folders_are_classes(tmp_path, caplog):
  for name in ('b/2.png', 'a/deep/1.png', 'b/1.png'):
    _write(tmp_path / 'train' / name)
  source = folder.FolderSource(str(tmp_path), 'train')
  size = (tmp_path / 'train' / 'b' / '1.png').stat().st_size
  assert source.label_names == ('a', 'b')
  assert [source.metadata(i) for i in range(3)] == [
      ('a/deep/1.png', 0, size), ('b/1.png', 1, size), ('b/2.png', 1, size)
  ]
  _write(tmp_path / 'train' / 'top.png')
  source = folder.FolderSource(str(tmp_path), 'train')
  assert source.label_names == ('a', 'b')
  assert _labels(source) == {
      'a/deep/1.png': 0, 'b/1.png': 1, 'b/2.png': 1, 'top.png': -1
  }
  assert "1 of 4 images are outside of the class folders of" in caplog.text
  assert 'train/top.png' in caplog.text


def _labels(source) -> dict[str, int]:
  found = map(source.metadata, range(len(source)))
  return {metadata.name: metadata.label for metadata in found}


def _class_source(root, split, **kwargs):
  return folder.FolderSource(str(root), split, class_split='train', **kwargs)


def test_all_splits_number_the_classes_of_the_training_split(tmp_path, caplog):
  for name in ('cat/1', 'dog/1', 'eel/deep/1'):
    _write(tmp_path / 'train' / f'{name}.png')
  # These are no classes: nothing, a file that is no image, a hidden folder.
  (tmp_path / 'train' / 'a').mkdir()
  (tmp_path / 'train' / 'b').mkdir()
  (tmp_path / 'train' / 'b' / 'labels.txt').touch()
  _write(tmp_path / 'train' / '.c' / '1.png')
  for name in ('dog/1', 'eel/2'):
    _write(tmp_path / 'validation' / f'{name}.png')
  for split in ('train', 'validation'):
    source = _class_source(tmp_path, split)
    assert source.label_names == ('cat', 'dog', 'eel')
  assert _labels(source) == {'dog/1.png': 1, 'eel/2.png': 2}
  assert all('skipped 1 .txt' in message for message in caplog.messages)


def test_a_file_has_no_label_of_a_folder_of_its_name(tmp_path):
  _write(tmp_path / 'train' / 'x.png' / '1.png')
  _write(tmp_path / 'validation' / 'x.png')
  assert _labels(_class_source(tmp_path, 'validation')) == {'x.png': -1}


def test_a_class_that_training_has_not_is_named_where_labels_are_used(tmp_path):
  _write(tmp_path / 'train' / 'cat' / '1.png')
  for name in ('cat', 'dog', 'eel'):
    _write(tmp_path / 'validation' / name / '1.png')
  source = _class_source(tmp_path, 'validation')
  assert source.load(0).shape == (4, 6, 3)  # Evaluation needs no labels.
  with pytest.raises(ValueError, match=r"'dog', 'eel', which the .* 'train'"):
    _ = source.label_names
  with pytest.raises(ValueError, match=r'data\.label_names'):
    source.metadata(0)


def test_names_of_classes_may_be_given(tmp_path, caplog):
  for split in ('train', 'validation'):
    for name in ('cat', 'dog'):
      _write(tmp_path / split / name / '1.png')
  _write(tmp_path / 'validation' / 'top.png')
  names = ('eel', 'dog', 'cat')
  source = _class_source(tmp_path, 'validation', label_names=names)
  assert source.label_names == names
  assert _labels(source) == {'cat/1.png': 2, 'dog/1.png': 1, 'top.png': -1}
  source = _class_source(tmp_path, 'train', label_names=('dog',))
  with pytest.raises(ValueError, match=r"'cat', which data\.label_names"):
    _ = source.label_names


@pytest.mark.parametrize('has_empty_training', [True, False])
def test_without_training_images_a_split_has_its_own_classes(
    tmp_path, caplog, has_empty_training
):
  for name in ('dog', 'cat'):
    _write(tmp_path / 'validation' / name / '1.png')
  if has_empty_training:
    (tmp_path / 'train').mkdir()
  source = _class_source(tmp_path, 'validation')
  assert source.label_names == ('cat', 'dog')
  assert _labels(source) == {'cat/1.png': 0, 'dog/1.png': 1}
  (message,) = caplog.messages
  assert "no training images in 'train'" in message


def test_without_class_folders_there_are_no_labels(tmp_path, caplog):
  _write(tmp_path / 'train' / '1.png')
  _write(tmp_path / 'validation' / '1.png')
  source = _class_source(tmp_path, 'validation')
  assert source.label_names == ()
  assert _labels(source) == {'1.png': -1}
  assert not caplog.messages
  # Neither has a split whose folders training does not have.
  _write(tmp_path / 'validation' / 'cat' / '1.png')
  source = _class_source(tmp_path, 'validation')
  assert _labels(source) == {'1.png': -1, 'cat/1.png': -1}
  (message,) = caplog.messages
  assert "'train' has no sub-folders: all labels are -1" in message


def test_classes_are_found_without_listing_the_training_split(
    tmp_path, monkeypatch
):
  for name in ('cat', 'dog'):
    for i in range(50):
      _write(tmp_path / 'train' / name / f'{i}.png')
  _write(tmp_path / 'validation' / 'dog' / '1.png')
  source = _class_source(tmp_path, 'validation')
  looked_at = []
  splitext = os.path.splitext
  monkeypatch.setattr(
      os.path, 'splitext', lambda x: looked_at.append(x) or splitext(x)
  )
  assert source.label_names == ('cat', 'dog')
  assert len(looked_at) <= 4


def test_class_names_reach_the_sources(tmp_path, prepared_root):
  _write(tmp_path / 'train' / 'cat' / '1.png')
  _write(tmp_path / 'train' / 'eel' / '1.png')
  _write(tmp_path / 'val' / 'eel' / '1.png')

  def names(source, data_dir='', **fields):
    config = ml_collections.ConfigDict({
        'source': source, 'name': 'tiny', 'data_dir': str(data_dir),
        'train_split': 'train', 'eval_split': 'val', 'image_size': (8, 8),
        'resize_shorter': 0, 'max_damaged_share': 0.0, 'cache_mib': 0,
        'label_names': (), **fields,
    })  # fmt: skip
    return builder.open_source(config, 'eval').label_names

  assert names('folder', tmp_path) == ('cat', 'eel')
  given = ('eel', 'cat')
  assert names('folder', tmp_path, label_names=given) == given
  with pytest.raises(ValueError, match=r"'eel', which data\.label_names"):
    names('folder', tmp_path, label_names=('cat',))
  for source in ('synthetic', 'photos', 'digits', 'tfds'):
    with pytest.raises(ValueError, match=r"label_names is \('eel', 'cat'\)"):
      names(source, prepared_root, eval_split='test', label_names=given)


def test_images_by_name_and_by_content(tmp_path):
  """Names decide where they have a known extension, else the first bytes."""
  root = tmp_path / 'train'
  root.mkdir()
  rgb = Image.fromarray(np.full((4, 6, 3), 7, np.uint8))
  for name, format in (
      ('a.jfif', 'JPEG'), ('b.jpe', 'JPEG'), ('c.PGM', 'PPM'), ('d.pbm', 'PPM'),
      ('e.pnm', 'PPM'), ('f.apng', 'PNG'), ('g.mpo', 'MPO'), ('h', 'PNG'),
      ('i.image', 'WEBP'), ('j.0001', 'TIFF'), ('k.png', 'GIF'),
      ('l.jp2', 'JPEG2000'), ('m.ico', 'ICO'),
  ):  # fmt: skip
    (root / name).write_bytes(_encode(rgb, format))
  source = folder.FolderSource(str(tmp_path), 'train')
  names = [source.metadata(i).name for i in range(len(source))]
  assert names == sorted(path.name for path in root.iterdir())
  assert source.skipped == {}
  for index in range(len(source)):
    assert abs(source.load(index).astype(int) - 7).max() <= 2
  assert not source.damaged


def test_names_with_a_known_extension_are_not_opened(tmp_path, monkeypatch):
  (tmp_path / 'train').mkdir()
  known = (*listing.EXTENSIONS, '.json', '.heic')
  for extension in known:  # all empty: nothing about them is in the content
    (tmp_path / 'train' / f'a{extension}').touch()
  monkeypatch.setattr(decoding, 'identify', None)
  files = listing.list_images(str(tmp_path), 'train')
  assert len(files.sizes) == len(listing.EXTENSIONS)
  assert {'.avif', '.jfif', '.jpe', '.jp2', '.ico', '.apng', '.mpo'} < set(
      listing.EXTENSIONS
  )
  assert files.skipped == {'.heic': 1, '.json': 1}
  assert files.num_unread == 1


def _sidecars(root):
  root.mkdir()
  for name, content in (
      ('labels.json', b'\0'), ('more.json', b'{}'), ('README', b'text'),
      ('NOTES.xyz', b'x' + 'ü'.encode() * 300),
      ('LISEZMOI', 'ü'.encode('utf-16')), ('_SUCCESS', b''),
      ('images.zip', b'PK\3\4'), ('script.run', b'#!/x'),
  ):  # fmt: skip
    (root / name).write_bytes(content)
  os.mkfifo(root / 'pipe')
  (root / '.DS_Store').write_bytes(b'\0')


def test_skipped_files_are_counted_by_kind(tmp_path, caplog):
  _sidecars(tmp_path / 'train')
  _write(tmp_path / 'train' / 'a.png')
  before = folder.FolderSource(str(tmp_path), 'train', max_damaged_share=0)
  kinds = {
      'no extension': 3, '.json': 2, '.run': 1, '.xyz': 1, '.zip': 1
  }  # fmt: skip
  assert before.skipped == kinds
  assert list(before.skipped)[:2] == ['no extension', '.json']
  assert 'skipped 3 no extension, 2 .json, 1 .run' in caplog.text
  (tmp_path / 'alone').mkdir()
  (tmp_path / 'alone' / 'a.heic').write_bytes(b'')
  with pytest.raises(ValueError, match=r'holds no .*Skipped: 1 \.heic\.'):
    folder.FolderSource(str(tmp_path), 'alone')


@pytest.mark.parametrize(
    ('name', 'content'),
    [('x.heic', b'text'), ('x.svg', b'<svg/>'), ('x.NEF', b'II*\0'),
     ('x', b'\0\0\0\x18ftypheic\0\0\0\0mif1heic'), ('x.raw16', b'\x9c\xff\0'),
     ('x', b'%!PS-Adobe'), ('x.pix', b'\xe4' * 600)],
)  # fmt: skip
def test_too_many_unread_images_are_an_error(tmp_path, name, content):
  for number in range(8):
    _write(tmp_path / 'train' / f'{number}.png')
  options = {'max_damaged_share': 0.1}
  for number in range(2):  # 0.1 of 9 and of 10 images is one
    _write(tmp_path / 'train' / str(number) / name)
    (tmp_path / 'train' / str(number) / name).write_bytes(content)
    if not number:
      source = folder.FolderSource(str(tmp_path), 'train', **options)
      assert sum(source.skipped.values()) == 1
      assert len(source) == 8
  with pytest.raises(ValueError, match='2 of 10 files are images'):
    folder.FolderSource(str(tmp_path), 'train', **options)


def test_images_of_a_missing_reader_are_unread(tmp_path, monkeypatch):
  _write(tmp_path / 'train' / 'a.png')
  (tmp_path / 'train' / 'b.avif').write_bytes(b'')
  formats = decoding.readable_formats() - {'AVIF'}
  monkeypatch.setattr(decoding, 'readable_formats', lambda: formats)
  source = folder.FolderSource(str(tmp_path), 'train')
  assert source.skipped == {'.avif': 1}


def test_the_content_hash_is_that_of_names_and_sizes(tmp_path):
  """Stored with checkpoints and tokens: it may not change."""
  for value, name in enumerate(('b.png', 'a/c.jpg', 'd.TIF')):
    (tmp_path / 'train' / 'a').mkdir(parents=True, exist_ok=True)
    (tmp_path / 'train' / name).write_bytes(b'x' * (value + 1))
  source = folder.FolderSource(str(tmp_path), 'train')
  files = 'train/a/c.jpg\0002\0train/b.png\0001\0train/d.TIF\0003'
  digest = hashlib.sha256(files.encode()).hexdigest()[:16]
  assert source.identity['content'] == digest


def test_an_image_too_long_for_resizing_is_left_out_by_name(tmp_path, caplog):
  _write(tmp_path / 'train' / 'long.png', size=(1, 30_000))
  source = folder.FolderSource(str(tmp_path), 'train', resize_shorter=64)
  with pytest.raises(data.DamagedImageError, match='resize_shorter = 64'):
    source.load(0)
  assert 'long.png is skipped: 1 x 30000 pixels' in caplog.text
  assert list(source.damaged) == [0]


def test_links_may_not_leave_the_root(tmp_path):
  root = tmp_path / 'root'
  _write(root / 'train' / 'a.png')
  _write(root / 'shared' / 'b.png')
  _write(tmp_path / 'outside' / 'c.png')
  link = root / 'train' / 'link'
  link.symlink_to(root / 'shared')
  (root / 'train' / 'link.png').symlink_to(root / 'shared' / 'b.png')
  assert len(folder.FolderSource(str(root), 'train')) == 3
  link.unlink()
  link.symlink_to(tmp_path / 'outside')
  with pytest.raises(ValueError, match='outside of'):
    folder.FolderSource(str(root), 'train')
  link.unlink()
  link.symlink_to(root / 'train')
  with pytest.raises(ValueError, match='link to a parent folder'):
    folder.FolderSource(str(root), 'train')
  link.unlink()
  shutil.copy(tmp_path / 'outside' / 'c.png', tmp_path / 'outside' / 'c')
  for target, name in (
      (tmp_path / 'outside' / 'c.png', 'd.png'),
      (tmp_path / 'outside' / 'c', 'd'),
      (root / 'missing.png', 'd.png'),
  ):
    file_link = root / 'train' / name
    file_link.symlink_to(target)
    with pytest.raises(ValueError, match='link to'):
      folder.FolderSource(str(root), 'train')
    file_link.unlink()


def test_a_root_that_is_a_link_is_fine(tmp_path):
  _write(tmp_path / 'real' / 'train' / 'a.png')
  (tmp_path / 'alias').symlink_to(tmp_path / 'real')
  assert len(folder.FolderSource(str(tmp_path / 'alias'), 'train')) == 1


def test_missing_and_empty_splits_are_named(tmp_path):
  with pytest.raises(ValueError, match='not a folder'):
    folder.FolderSource(str(tmp_path / 'nowhere'), 'train')
  _write(tmp_path / 'val' / 'a.png')
  (tmp_path / 'train' / 'class').mkdir(parents=True)
  with pytest.raises(ValueError, match=r"\['train', 'val'\]"):
    folder.FolderSource(str(tmp_path), 'validation')
  with pytest.raises(ValueError, match=r"no folder '\.\./x'"):
    folder.FolderSource(str(tmp_path), '../x')
  with pytest.raises(ValueError, match='holds no images'):
    folder.FolderSource(str(tmp_path), 'train')


def test_damage_is_counted_once_and_unreadable_storage_is_fatal(tmp_path):
  for number in range(3):
    _write(tmp_path / 'train' / f'{number}.png')
  source = folder.FolderSource(str(tmp_path), 'train', max_damaged_share=0.5)
  (tmp_path / 'train' / '1.png').write_bytes(b'text')
  with pytest.raises(data.DamagedImageError):
    source.load(1)
  (tmp_path / 'train' / '1.png').unlink()
  with pytest.raises(data.DamagedImageError):  # not read a second time
    source.load(1)
  assert list(source.damaged) == [1]
  (tmp_path / 'train' / '2.png').unlink()
  with pytest.raises(FileNotFoundError):
    source.load(2)


def test_pipes_are_skipped_and_endless_files_are_corrupted(tmp_path):
  _write(tmp_path / 'train' / '0.png')
  os.mkfifo(tmp_path / 'train' / '1.png')  # Reading would wait for a writer.
  with open(tmp_path / 'train' / '2.png', 'wb') as file:
    file.truncate(2**40)  # A hole, which takes no place.
  source = folder.FolderSource(str(tmp_path), 'train')
  assert len(source) == 2
  with pytest.raises(data.DamagedImageError, match='1099511627776 bytes'):
    source.load(1)
  assert list(source.damaged) == [1]


def test_decoded_images_are_kept_up_to_a_limit(tmp_path):
  for number in range(3):
    _write(tmp_path / 'train' / f'{number}.png', size=(400, 400))
  source = folder.FolderSource(str(tmp_path), 'train', cache_mib=1)
  images = [source.load(i) for i in range(3)]  # 0.46 MiB each: two fit
  assert source.load(0) is images[0]
  assert source.load(1) is images[1]
  assert source.load(2) is not images[2]
  with pytest.raises(ValueError, match='read-only'):
    images[0][:] = 0
  uncached = folder.FolderSource(str(tmp_path), 'train')
  np.testing.assert_array_equal(uncached.load(1), images[1])
  assert uncached.load(1) is not uncached.load(1)


# Prepared data sets.


@pytest.fixture(scope='module')
def prepared_root(tmp_path_factory) -> str:
  """A folder of TFDS data sets with one, `tiny`: 12 + 5 images of 8x8."""

  def examples(start, num):
    for i in range(start, start + num):
      image = io.BytesIO(_encode(np.full((8, 8, 3), i, np.uint8)))
      yield i, {'picture': image, 'label': i}

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    __module__ = 'fsq_jax.tiny'  # TFDS looks for metadata in the package
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict({
              'label': np.int64,
              'picture': tfds.features.Image(shape=(None, None, 3)),
          }),
      )

    def _split_generators(self, download_manager):
      del download_manager
      return {'train': examples(0, 12), 'test': examples(12, 5)}

    def _generate_examples(self):
      raise NotImplementedError

  root = str(tmp_path_factory.mktemp('tfds'))
  Tiny(data_dir=root, file_format='array_record').download_and_prepare()
  return root


@pytest.mark.parametrize('name', ['tiny', 'tiny:1.0.0'])
def test_prepared_data_are_read_by_name(prepared_root, name):
  source = tfds_source.PreparedSource(name, prepared_root, 'train')
  assert source.identity['name'] == 'tiny/1.0.0'
  values = [int(source.load(i)[0, 0, 0]) for i in range(len(source))]
  assert sorted(values) == list(range(12))
  half = tfds_source.PreparedSource(name, prepared_root, 'train[50%:]')
  assert [int(half.load(i)[0, 0, 0]) for i in range(6)] == values[6:]
  assert half.describe(1).endswith('tiny-train.array_record-00000-of-00001 '
                                   'record 7')
  both = tfds_source.PreparedSource(name, prepared_root, 'train+test[:2]')
  assert len(both) == 14
  assert both.describe(13).endswith('tiny-test.array_record-00000-of-00001 '
                                    'record 1')


def test_prepared_data_have_labels_and_encoded_sizes(prepared_root):
  source = tfds_source.PreparedSource('tiny', prepared_root, 'train')
  for i in range(len(source)):
    value = int(source.load(i)[0, 0, 0])
    size = len(_encode(np.full((8, 8, 3), value, np.uint8)))
    assert source.metadata(i) == (str(i), value, size)
  assert source.label_names == ()


def test_prepared_data_are_read_by_folder(prepared_root):
  version = f'{prepared_root}/tiny/1.0.0'
  for name in ('', 'tiny'):
    source = tfds_source.PreparedSource(name, version, 'test', resize_shorter=4)
    assert source.load(0).shape == (4, 4, 3)
  with pytest.raises(ValueError, match=r"holds 'tiny', but .* 'big'"):
    tfds_source.PreparedSource('big', version, 'test')


def test_missing_split_error_lists_the_splits(prepared_root):
  for split in ('validation', 'train[:x]'):
    with pytest.raises(ValueError, match=r"it has \['test', 'train'\]"):
      tfds_source.PreparedSource('tiny', prepared_root, split)


def test_unprepared_data_raise_with_folder_and_command(
    monkeypatch, prepared_root
):
  monkeypatch.setattr(tfds, 'builder', None)  # whatever downloads goes here
  for name in ('cifar10', 'tiny:2.0.0', 'tiny/config'):
    with pytest.raises(
        tfds_source.NotPreparedError, match='--mode=prepare'
    ) as e:
      tfds_source.PreparedSource(name, prepared_root, 'train')
    assert f'{prepared_root}/{name.split(":")[0]}' in str(e.value)
  with pytest.raises(ValueError, match='is empty'):
    tfds_source.PreparedSource('', prepared_root, 'train')
  with pytest.raises(ValueError, match="write 'name'"):
    tfds_source.PreparedSource('../tiny', prepared_root, 'train')
  with pytest.raises(ValueError, match="write 'name'"):
    tfds_source.PreparedSource('tiny/..', f'{prepared_root}/tiny', 'train')


def test_the_default_folder_is_that_of_tfds(monkeypatch, prepared_root):
  monkeypatch.setenv('TFDS_DATA_DIR', prepared_root)
  assert tfds_source.find_prepared('tiny', '').endswith('/tiny/1.0.0')


def test_the_newest_version_is_taken(tmp_path):
  for version in ('2.0.0', '10.0.0', '9.0.0', 'incomplete.x_11.0.0'):
    path = tmp_path / 'some' / version
    path.mkdir(parents=True)
    (path / 'dataset_info.json').write_text('{}')
  (tmp_path / 'some' / '12.0.0').mkdir()
  found = tfds_source.find_prepared('some', str(tmp_path))
  assert found == str(tmp_path / 'some' / '10.0.0')


def test_damaged_records_name_file_and_record(tmp_path, prepared_root):
  version = tmp_path / '1.0.0'
  shutil.copytree(f'{prepared_root}/tiny/1.0.0', version)
  shard = version / 'tiny-test.array_record-00000-of-00001'
  content = bytearray(shard.read_bytes())
  content[content.index(b'IHDR')] ^= 1  # in the first record
  shard.write_bytes(content)
  source = tfds_source.PreparedSource('', str(version), 'test')
  with pytest.raises(ValueError, match='cannot be read: ') as caught:
    source.load(0)
  assert f'{shard} record 0 ' in str(caught.value)
  shard.unlink()
  with pytest.raises(ValueError, match='is missing') as caught:
    tfds_source.PreparedSource('', str(version), 'test')
  assert str(shard) in str(caught.value)


@pytest.mark.parametrize(
    ('features', 'expected'),
    [
        ({'a': tfds.features.Image()}, 'a'),
        ({'a': tfds.features.Image(), 'image': tfds.features.Image()}, 'image'),
        ({'a': tfds.features.Image(), 'b': tfds.features.Image()}, None),
        ({'image': np.int64}, None),
        (
            {
                'image': tfds.features.Image(
                    shape=(None, None, 1), dtype=np.float32
                )
            },
            None,
        ),
    ],
)
def test_the_image_feature_is_found_by_its_type(features, expected):
  features = tfds.features.FeaturesDict({**features, 'label': np.int64})
  if expected:
    assert tfds_source.find_image_feature(features, '') == expected
  else:
    with pytest.raises(ValueError, match='image'):
      tfds_source.find_image_feature(features, '')


def _prepare_config(**values) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict({'source': 'tfds', 'name': '', **values})


def test_prepare_needs_tensorflow_and_says_so(monkeypatch, tmp_path):
  config = _prepare_config(name='mnist', data_dir=str(tmp_path))
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(RuntimeError, match='pip install tensorflow-cpu'):
    data.prepare(config)


def test_prepare_reports_what_tfds_reports(monkeypatch, tmp_path):
  def fail(name, *, data_dir, file_format):
    assert (name, data_dir) == ('mnist', str(tmp_path))
    assert file_format == 'array_record'
    raise ConnectionError('no route to host')

  config = _prepare_config(name='mnist', data_dir=str(tmp_path))
  monkeypatch.setattr('importlib.util.find_spec', lambda name: name)
  monkeypatch.setattr(tfds, 'builder', fail)
  with pytest.raises(RuntimeError, match='ConnectionError: no route to host'):
    data.prepare(config)


def test_prepare_keeps_existing_data(prepared_root):
  config = _prepare_config(name='tiny', data_dir=prepared_root)
  assert data.prepare(config) == [f'Images: {prepared_root}/tiny/1.0.0']
  assert data.prepare(_prepare_config(source='photos')) == [
      "data.source 'photos' needs no preparation."
  ]


def test_the_stamp_of_an_image_is_that_of_its_file(prepared_root, tmp_path):
  _write(tmp_path / 'train' / 'a.png')
  for source in (
      folder.FolderSource(str(tmp_path), 'train'),
      tfds_source.PreparedSource('tiny', prepared_root, 'train'),
  ):
    path = pathlib.Path(source.describe(0).partition(' record')[0])
    status = path.stat()
    assert source.stamp(0) == (
        status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip
    path.touch()
    assert source.stamp(0) != (
        status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip


# Photographs and synthetic images.


def test_validation_tiles_are_the_photographs_in_rows():
  source = photos.ValidationTiles(size=(32, 32))
  assert len(source) == 12 * 18 + 9 * 14
  expected = [
      photo[top : top + 32, left : left + 32]
      for photo in (skimage.data.coffee(), skimage.data.chelsea())
      for top in range(0, photo.shape[0] - 31, 32)
      for left in range(0, photo.shape[1] - 31, 32)
  ]
  tiles = [source.load(index) for index in range(len(source))]
  np.testing.assert_array_equal(tiles, expected)
  assert source.describe(19) == 'coffee.png at row 32, column 32'


def test_photographs_appear_as_often_as_their_share():
  source = photos.TrainPhotos()
  names = [source.describe(index) for index in range(len(source))]
  for name, share in photos.TRAIN_PHOTOS.items():
    assert names.count(name) == photos.CROPS_PER_EPOCH * share / 20
  assert not set(photos.VALIDATION_PHOTOS) & set(photos.TRAIN_PHOTOS)
  np.testing.assert_array_equal(
      source.load(names.index('rocket.jpg')), skimage.data.rocket()
  )


def test_public_domain_photographs_are_a_source():
  config = default.get_config().data
  config.source = 'public_domain_photos'
  sources = {
      split: data.open_source(config, split)
      for split in ('train', 'train_once', 'eval')
  }
  names = {
      split: {
          source.describe(i).partition(' at ')[0] for i in range(len(source))
      }
      for split, source in sources.items()
  }
  expected = {
      'astronaut.png', 'rocket.jpg', 'ihc.png', 'retina.jpg',
      'hubble_deep_field.jpg',
  }  # fmt: skip
  assert names['train'] == names['train_once'] == expected
  assert names['eval'] == set(photos.VALIDATION_PHOTOS)
  everything = photos.TrainPhotos()
  assert sources['train'].identity != everything.identity


@pytest.mark.parametrize(
    ('size', 'resize_shorter'),
    [
        ((32, 32), 0), ((16, 48), 0), ((32, 32), 64),
        pytest.param((500, 500), 0, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_pass_over_the_photographs_has_distinct_crops(size, resize_shorter):
  source = photos.TrainGrid(size=size, resize_shorter=resize_shorter)
  names, places, pixels = [], set(), set()
  for index in range(len(source)):
    name, top, left = re.fullmatch(
        r'(.*) at row (\d+), column (\d+)', source.describe(index)
    ).groups()
    crop = source.load(index)
    names.append(name)
    places.add((name, top, left))
    pixels.add(crop.tobytes())
    assert all(
        have <= wanted for have, wanted in zip(crop.shape, size, strict=False)
    )
  assert len(places) == len(pixels) == len(source)
  assert set(names) == set(photos.TRAIN_PHOTOS)
  if size == (32, 32) and not resize_shorter:
    assert source.load(0).shape == (32, 32, 3)
    for name, share in photos.TRAIN_PHOTOS.items():
      # Rows and columns are whole, and black margins alike.
      expected = photos.CROPS_PER_EPOCH * share / 20
      assert 0.85 * expected < names.count(name) <= expected


def test_the_grid_of_a_photograph_is_evenly_spread():
  source = photos.TrainGrid(size=(32, 32))
  crops = [
      index for index in range(len(source))
      if source.describe(index).startswith('ihc.png')
  ]  # fmt: skip
  # 1,000 of 481 x 481 places are 32 rows of 31 columns, with both edges.
  assert len(crops) == 32 * 31
  photograph = skimage.data.immunohistochemistry()
  for index, row, column in ((0, 0, 0), (30, 0, 480), (991, 480, 480)):
    np.testing.assert_array_equal(
        source.load(crops[index]),
        photograph[row : row + 32, column : column + 32],
    )
  assert source.describe(crops[1]) == 'ihc.png at row 0, column 16'
  assert source.describe(crops[31]) == 'ihc.png at row 15, column 0'


def test_photographs_smaller_than_a_tile_are_refused():
  with pytest.raises(ValueError, match=r'image_size is \(512, 512\)'):
    photos.ValidationTiles(size=(512, 512))
  enlarged = photos.ValidationTiles(size=(512, 512), resize_shorter=600)
  assert len(enlarged) == 2


@pytest.mark.slow
def test_photographs_that_are_scaled_up_are_counted():
  # Coffee is 400 x 600 pixels, Chelsea 300 x 451.
  tiles = photos.ValidationTiles(size=(200, 200), resize_shorter=400)
  assert not tiles.upscaled
  for index in range(len(tiles)):
    tiles.load(index)
  assert {tiles.describe(i).split()[0] for i in tiles.upscaled} == {
      'chelsea.png'
  }
  assert len(tiles.upscaled) == 2 * 3
  # Of the photographs for training, the rocket has 427 rows, the stereo pair
  # 500 and all others more than 510.
  training = photos.TrainPhotos(resize_shorter=428)
  grid = photos.TrainGrid(size=(200, 200), resize_shorter=428)
  assert not grid.upscaled  # Though all crops have been looked at.
  for source in (training, grid):
    for index in range(0, len(source), 5):
      source.load(index)
    assert {source.describe(i).split()[0] for i in source.upscaled} == {
        'rocket.jpg'
    }


def test_synthetic_images_are_fixed_and_disjoint():
  size = (12, 20)
  train = synthetic.SyntheticSource('train', size=size)
  validation = synthetic.SyntheticSource('validation', size=size)
  image = train.load(5)
  assert image.shape == (12, 20, 3)
  assert image.dtype == np.uint8
  assert image.std() > 10
  np.testing.assert_array_equal(image, train.load(5))
  images = {
      source.load(index).tobytes()
      for source in (train, validation)
      for index in range(len(validation))
  }
  assert len(images) == 2 * len(validation)
  assert train.describe(len(train) - 1) != validation.describe(0)


@pytest.mark.slow
def test_reading_does_not_import_large_packages(prepared_root):
  code = f"""
import sys
from configs import default
from fsq_jax import data
from fsq_jax.data import digits, photos, tfds_source
photos.TrainPhotos().load(0)
digits.DigitsSource('train', size=32).load(0)
for module in ('tensorflow_datasets', 'skimage', 'sklearn'):
  assert module not in sys.modules, module
tfds_source.PreparedSource('tiny', {prepared_root!r}, 'train').load(0)
assert 'tensorflow' not in sys.modules
"""
  result = subprocess.run(
      [sys.executable, '-c', code],
      cwd=pathlib.Path(__file__).parents[2],
      capture_output=True,
      text=True,
      check=False,
  )
  assert result.returncode == 0, result.stderr
