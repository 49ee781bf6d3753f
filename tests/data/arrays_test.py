"""NumPy files as images: the same batches as a folder, and rejected arrays."""

import json
import os

import ml_collections
import numpy as np
from PIL import Image
import pytest

from fsq_jax import data
from fsq_jax.data import array_source

_NUM = 11


def _images(num: int = _NUM) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (num, 8, 10, 3), np.uint8)


def _labels() -> np.ndarray:
  return np.arange(_NUM) // 6


def _write(root) -> None:
  """Writes the same images as PNG files, train.npy and z.npz."""
  for i, (image, label) in enumerate(zip(_images(), _labels(), strict=True)):
    path = root / 'train' / f'class_{label}' / f'{i:03}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
  np.save(root / 'train.npy', _images())
  np.save(root / 'train_labels.npy', _labels())
  np.savez(root / 'z.npz', images=_images(), labels=_labels())


def _config(root, source, **overrides) -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict({
      'source': source, 'name': '', 'data_dir': str(root),
      'train_split': 'train', 'eval_split': 'train', 'image_size': (6, 6),
      'batch_size': 4, 'eval_batch_size': 4, 'resize_shorter': 7,
      'label_names': (), 'crop_scale': (0.5, 1.0), 'flip': True,
      'color_jitter': 0.0, 'max_damaged_share': 0.0, 'cache_mib': 0,
      'num_threads': 2, 'prefetch': 16,
  })  # fmt: skip
  config.update(overrides)
  return config


def _open(root, split: str = 'train', **options):
  return array_source.ArraySource(str(root), split, **options)


def test_batches_are_those_of_a_folder_also_after_a_resume(tmp_path):
  _write(tmp_path)

  def iterator(source, split='train'):
    config = _config(tmp_path, source, train_split=split)
    return data.build_dataset(config, split='train', seed=1).iterator()

  expected = iterator('folder')
  expected = [next(expected) for _ in range(5)]
  for split in ('train', 'z'):
    first, restored = iterator('arrays', split), iterator('arrays', split)
    batches = [next(first) for _ in range(2)]
    restored.set_state(json.loads(json.dumps(first.get_state())))
    batches += [next(restored) for _ in range(3)]
    for batch, same in zip(batches, expected, strict=True):
      np.testing.assert_array_equal(batch['image'], same['image'])
      np.testing.assert_array_equal(batch['index'], same['index'])


def test_images_and_labels_are_those_of_the_file(tmp_path):
  _write(tmp_path)
  names = ('class_0', 'class_1')
  config = _config(tmp_path, 'arrays', label_names=names, resize_shorter=0)
  mapped = data.open_source(config, 'eval')
  loaded = _open(tmp_path, 'z')
  assert mapped.label_names == names
  assert loaded.label_names == ()
  for source in (mapped, loaded):
    assert len(source) == _NUM
    for i in range(_NUM):
      np.testing.assert_array_equal(source.load(i), _images()[i])
      assert source.metadata(i) == (str(i), i // 6, None)
  assert mapped.identity['content'] == loaded.identity['content']
  assert data.content_hash(mapped.digests) == data.content_hash(loaded.digests)
  assert mapped.describe(3) == f'{tmp_path}/train.npy image 3'
  assert mapped.stamp(0)[0] == (tmp_path / 'train.npy').stat().st_size
  with pytest.raises(ValueError, match=r'image 6 has the label 1, but .* 1 na'):
    _open(tmp_path, label_names=('one',))


def test_npy_files_are_mapped_in_any_order_of_axes(tmp_path):
  np.save(tmp_path / 'train.npy', np.asfortranarray(_images()))
  source = _open(tmp_path)
  np.testing.assert_array_equal(source.load(4), _images()[4])
  assert source.metadata(4).label == -1
  # The file is mapped, not read: changing it shows.
  with open(tmp_path / 'train.npy', 'r+b') as file:
    file.seek(-1, os.SEEK_END)
    file.write(bytes([_images()[-1, -1, -1, -1] ^ 1]))
  assert source.load(10)[-1, -1, -1] == _images()[-1, -1, -1, -1] ^ 1


@pytest.mark.parametrize('change', ['pixel', 'label', 'shape', 'number'])
def test_the_fingerprint_changes_with_images_and_labels(tmp_path, change):
  images, labels = _images(), _labels()

  def content(name):
    np.savez(tmp_path / f'{name}.npz', images=images, labels=labels)
    return _open(tmp_path, name).identity['content']

  before = content('a')
  assert content('b') == before
  if change == 'pixel':
    images[5, 0, 0, 0] ^= 1
  elif change == 'label':
    labels[5] = 7
  elif change == 'shape':
    images = images.reshape(_NUM, 10, 8, 3)
  else:
    images, labels = images[:-1], labels[:-1]
  assert content('c') != before


@pytest.mark.parametrize(
    ('images', 'found'),
    [
        (_images() / np.float32(255), 'holds float32 of shape'),
        (_images().astype(np.int64), 'holds int64'),
        (_images()[..., 0], r'of shape \(11, 8, 10\)'),
        (_images()[..., :1], r'of shape \(11, 8, 10, 1\)'),
        (_images().transpose(0, 3, 1, 2), r'of shape \(11, 3, 8, 10\)'),
        (_images(0), r'of shape \(0, 8, 10, 3\)'),
        (np.array([{}], object), 'cannot be read'),
    ],
)
def test_arrays_that_are_no_images_are_an_error(tmp_path, images, found):
  np.save(tmp_path / 'train.npy', images)
  np.savez(tmp_path / 'z.npz', images=images)
  for name in ('train.npy', 'z.npz'):
    with pytest.raises(ValueError, match=found) as caught:
      _open(tmp_path, name[:-4])
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    'labels',
    [
        _labels() / 1.0, _labels()[1:], _labels()[:, None], _labels() - 2,
        _labels() > 0, _labels().astype(str),
    ],
)  # fmt: skip
def test_labels_that_are_no_integers_are_an_error(tmp_path, labels):
  np.save(tmp_path / 'train.npy', _images())
  np.save(tmp_path / 'train_labels.npy', labels)
  np.savez(tmp_path / 'z.npz', images=_images(), labels=labels)
  for split in ('train', 'z'):
    with pytest.raises(ValueError, match=r'labels are integers \[11\]'):
      _open(tmp_path, split)


def test_missing_labels_are_a_warning(tmp_path, caplog):
  labels = _labels()
  labels[3] = -1
  np.savez(tmp_path / 'z.npz', images=_images(), labels=labels)
  assert _open(tmp_path, 'z').metadata(3).label == -1
  assert '1 of 11 images have label -1, such as' in caplog.text


@pytest.mark.parametrize(
    ('name', 'place', 'offset', 'value', 'reason'),
    [
        ('train.npy', b'(11, ', 1, b'(', 'multi-line statement'),
        ('z.npz', b'PK\1\2', 6, b'\x5d', 'zip file version 9.3'),
        ('z.npz', b'PK\5\6', 19, b'\x9f', 'Invalid argument'),
    ],
)
def test_corrupted_files_are_an_error(
    tmp_path, name, place, offset, value, reason
):
  _write(tmp_path)
  content = bytearray((tmp_path / name).read_bytes())
  start = content.index(place) + offset
  content[start : start + 1] = value
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match='complete NumPy file') as caught:
    _open(tmp_path, name[:-4])
  assert str(tmp_path / name) in str(caught.value)
  assert reason in str(caught.value)


def test_missing_ambiguous_and_truncated_files_are_an_error(tmp_path):
  _write(tmp_path)
  with pytest.raises(ValueError, match=r"0 files of test\.npy .*'train\.npy'"):
    _open(tmp_path, 'test')
  with pytest.raises(ValueError, match='which is not a folder'):
    _open(tmp_path / 'none')
  os.truncate(tmp_path / 'train.npy', 1000)
  with pytest.raises(ValueError, match='complete NumPy file'):
    _open(tmp_path)
  os.truncate(tmp_path / 'z.npz', 1000)
  with pytest.raises(ValueError, match='complete NumPy file'):
    _open(tmp_path, 'z')
  np.savez(tmp_path / 'z.npz', x_train=_images())
  with pytest.raises(ValueError, match=r"arrays are \['x_train'\]"):
    _open(tmp_path, 'z')
  (tmp_path / 'train.npy').rename(tmp_path / 'z.npy')
  with pytest.raises(ValueError, match='has 2 files'):
    _open(tmp_path, 'z')
  np.save(tmp_path / 'a.npy', _images())
  (tmp_path / 'a.npy').rename(tmp_path / 'a.npz')
  with pytest.raises(ValueError, match='format of its name'):
    _open(tmp_path, 'a')
