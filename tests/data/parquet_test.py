"""Parquet files: the same batches as a folder, columns, corruption."""

import concurrent.futures
import errno
import fcntl
import io
import json
import os
import pathlib
import shutil
import sys
import threading
import time
import types

import ml_collections
import numpy as np
from PIL import Image
import pyarrow
from pyarrow import parquet
import pytest

from fsq_jax import data
from fsq_jax.data import derived_files
from fsq_jax.data import parquet_files
from fsq_jax.data import parquet_images
from fsq_jax.data import parquet_source

_IMAGE = pyarrow.struct(
    [('bytes', pyarrow.binary()), ('path', pyarrow.string())]
)
_NAMES = ('class_0', 'class_1')


def _png(value: int, size=(8, 8)) -> bytes:
  rng = np.random.default_rng(value)
  pixels = rng.integers(0, 256, (*size, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'PNG')
  return buffer.getvalue()


def _table(images, labels=None, *, column='image', names=_NAMES, paths=None):
  """Returns a table with the schema metadata that `datasets` writes."""
  features = {
      column: {'_type': 'Image'},
      'label': {'names': list(names), '_type': 'ClassLabel'},
  }
  labels = [0] * len(images) if labels is None else labels
  paths = [None] * len(images) if paths is None else paths
  structs = [
      None if x is None else {'bytes': x, 'path': path}
      for x, path in zip(images, paths, strict=True)
  ]
  schema = pyarrow.schema(
      [(column, _IMAGE), ('label', pyarrow.int64())],
      {'huggingface': json.dumps({'info': {'features': features}})},
  )
  return pyarrow.table(
      [pyarrow.array(structs, _IMAGE), pyarrow.array(labels, pyarrow.int64())],
      schema=schema,
  )


def _write(path, images, labels=None, *, options=None, **columns) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  table = _table(images, labels, **columns)
  parquet.write_table(table, path, **(options or {}))
  return str(path)


def _write_both(root, num: int = 11) -> None:
  """Writes the same images as a folder and as files of 4 rows."""
  paths = [f'{i:03}.png' for i in range(num)]
  labels = [2 * i // num for i in range(num)]
  images = [_png(i) for i in range(num)]
  for path, label, image in zip(paths, labels, images, strict=True):
    place = root / 'folder' / 'train' / f'class_{label}' / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(image)
  for k in range(3):
    rows = slice(4 * k, 4 * k + 4)
    _write(
        root / 'parquet' / 'data' / f'train-{k:05}-of-00003.parquet',
        images[rows], labels[rows], paths=paths[rows],
        options={'row_group_size': 3},
    )  # fmt: skip


def _config(source, root, **overrides) -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict({
      'source': source, 'name': '', 'data_dir': str(root / source),
      'train_split': 'train', 'eval_split': 'train', 'image_size': (8, 8),
      'batch_size': 4, 'eval_batch_size': 4, 'resize_shorter': 0,
      'label_names': (), 'crop_scale': (0.5, 1.0), 'flip': True,
      'color_jitter': 0.0, 'max_damaged_share': 0.3, 'cache_mib': 1,
      'num_threads': 2, 'prefetch': 16,
  })  # fmt: skip
  config.update(overrides)
  return config


def _open(root, split: str = 'train', **options):
  return parquet_source.ParquetSource('', str(root), split, **options)


def _assert_equal(left, right):
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_images_labels_and_content_are_those_of_a_folder(tmp_path):
  _write_both(tmp_path)
  expected = data.open_source(_config('folder', tmp_path), 'eval')
  source = data.open_source(_config('parquet', tmp_path), 'eval')
  assert source.label_names == expected.label_names == _NAMES
  assert len(source) == len(expected) == 11
  for i in range(11):
    np.testing.assert_array_equal(source.load(i), expected.load(i))
    other = expected.metadata(i)
    name = os.path.basename(other.name)
    assert source.metadata(i) == other._replace(name=name)
  assert data.content_hash(source.digests) == data.content_hash(
      expected.digests
  )
  file = tmp_path / 'parquet' / 'data' / 'train-00001-of-00003.parquet'
  assert source.describe(5) == f'{file} row 1'
  assert source.stamp(5)[0] == file.stat().st_size
  (batch, *_) = data.build_dataset(
      _config('parquet', tmp_path), split='eval', seed=0
  )
  (same, *_) = data.build_dataset(
      _config('folder', tmp_path), split='eval', seed=0
  )
  _assert_equal([batch], [same])
  config = _config('parquet', tmp_path, label_names=('one', 'two'))
  with pytest.raises(ValueError, match=r'data\.label_names is'):
    data.open_source(config, 'eval')


def _grid(seed: int, size) -> np.ndarray:
  small = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
  image = Image.fromarray(small).resize(size, Image.Resampling.NEAREST)
  return np.asarray(image)


# Written by `datasets` 5.2.0 with PyArrow 26.0.1, images of `_grid` as PNG and
# JPEG: Dataset.from_dict({'img': images, 'label': labels}, Features({'img':
# Image(), 'label': ClassLabel(names=names)})), map(embed_table_storage),
# to_parquet.
_WRITTEN = pathlib.Path(__file__).parents[1] / 'testdata' / 'parquet'


@pytest.fixture
def written(tmp_path):
  """A copy of these files, whose images are copied beside them."""
  return pathlib.Path(shutil.copytree(_WRITTEN, tmp_path / 'parquet'))


def test_cifar10_of_the_datasets_package_is_read(written):
  config = _config('parquet', written, train_split='test')
  config.data_dir = str(written / 'cifar10')
  source = data.open_source(config, 'train')
  assert source.label_names[:2] == ('airplane', 'automobile')
  assert [source.metadata(i).label for i in range(len(source))] == [3, 8, 0]
  for i in range(3):
    assert source.metadata(i).name == str(i)
    np.testing.assert_array_equal(source.load(i), _grid(i, (32, 32)))


def test_imagenet_of_the_datasets_package_is_read(written):
  source = _open(written / 'imagenet-1k')
  assert source.label_names == (
      'tench, Tinca tinca', 'goldfish, Carassius auratus'
  )  # fmt: skip
  assert len(source) == 4
  for i in range(4):
    image, metadata = source.load(i).astype(int), source.metadata(i)
    assert metadata.name == f'n0144{i % 2}764_{i}.JPEG'
    assert metadata.label == i % 2
    assert metadata.num_bytes == len(source.read(i))
    # JPEG blurs the edges of colours.
    assert np.abs(image - _grid(10 + i, (20, 16))).mean() < 16
  file = 'imagenet-1k/data/train-00001-of-00002.parquet'
  assert source.describe(3) == f'{written}/{file} row 1'


# Images, however files are written.

_WRITING = {
    'as datasets 5': {
        'use_content_defined_chunking': {
            'min_chunk_size': 1000, 'max_chunk_size': 4000
        },
        'write_page_index': True, 'compression': 'none',
        'use_dictionary': ['image.path'], 'row_group_size': 50,
    },
    'one row group': {},
    'version 2': {
        'data_page_version': '2.0', 'compression': 'zstd',
        'row_group_size': 9,
    },
}  # fmt: skip


@pytest.mark.parametrize('options', _WRITING.values(), ids=_WRITING)
def test_values_are_those_of_pyarrow(tmp_path, options):
  rng = np.random.default_rng(0)
  values = [rng.bytes(rng.integers(0, 200)) for _ in range(90)]
  for i in (3, 4, 50, 89):
    values[i] = values[0]
  # As datasets writes it, a row without an image; and one without its bytes.
  images = [None if i % 20 == 7 else x for i, x in enumerate(values)]
  table = _table(images, paths=[f'{i}' for i in range(90)])
  path = tmp_path / 'train.parquet'
  parquet.write_table(table, path, **options)
  read = parquet.read_table(path)['image'].to_pylist()
  source = _open(tmp_path, max_damaged_share=1.0)
  assert len(source) == 90
  for i in rng.permutation(90):
    if read[i] is None:
      with pytest.raises(data.DamagedImageError, match='is null'):
        source.read(i)
      assert source.metadata(i).num_bytes is None
    else:
      assert source.read(i) == read[i]['bytes']
      assert source.metadata(i).num_bytes == len(read[i]['bytes'])


def test_columns_that_are_required_are_read(tmp_path):
  schema = pyarrow.schema(
      [pyarrow.field('image', pyarrow.binary(), nullable=False)]
  )
  table = pyarrow.table([[b'a', b'bc', b'']], schema=schema)
  for version in ('1.0', '2.0'):
    parquet.write_table(
        table, tmp_path / 'train.parquet', data_page_version=version,
        use_dictionary=False,
    )  # fmt: skip
    source = _open(tmp_path)
    assert [source.read(i) for i in range(3)] == [b'a', b'bc', b'']
    assert source.metadata(1) == ('1', -1, 2)


def test_images_are_copied_once_and_again_after_a_change(tmp_path):
  path = _write(tmp_path / 'train.parquet', [_png(0), _png(1)])
  _open(tmp_path)
  place = pathlib.Path(path + parquet_images.SUFFIX)
  written = place.stat().st_mtime_ns
  assert _open(tmp_path).read(1) == _png(1)
  assert place.stat().st_mtime_ns == written
  place.write_bytes(place.read_bytes()[:-20])  # Corrupted.
  assert _open(tmp_path).read(1) == _png(1)
  _write(tmp_path / 'train.parquet', [_png(2), _png(3)])
  assert _open(tmp_path).read(1) == _png(3)
  assert {x.name for x in tmp_path.iterdir()} == {'train.parquet', place.name}


def test_images_are_copied_to_the_cache_folder_if_need_be(
    tmp_path, monkeypatch
):
  path = _write(tmp_path / 'files' / 'train.parquet', [_png(0)])
  cache = tmp_path / 'cache'
  monkeypatch.setattr(parquet_images, 'CACHE_FOLDER', str(cache))
  # A folder in its place: root may write everywhere.
  pathlib.Path(path + parquet_images.SUFFIX).mkdir()
  for _ in range(2):
    assert _open(tmp_path / 'files').read(0) == _png(0)
  (copy,) = cache.iterdir()
  copy.unlink()
  copy.mkdir()
  with pytest.raises(ValueError, match='cannot be copied to an Arrow file'):
    _open(tmp_path / 'files')


def _run_at_once(function, num: int) -> list:
  """Returns the results of several threads that start at once."""
  barrier = threading.Barrier(num)

  def run(_):
    barrier.wait()
    return function()

  with concurrent.futures.ThreadPoolExecutor(num) as pool:
    return list(pool.map(run, range(num)))


@pytest.mark.parametrize('is_refused', [False, True])
def test_images_are_copied_by_one_of_several_processes(
    tmp_path, monkeypatch, caplog, is_refused
):
  path = _write(tmp_path / 'train.parquet', [_png(i) for i in range(3)])
  copies = []
  write = derived_files.write

  def write_slowly(*args):
    copies.append(1)
    time.sleep(0.2)
    return write(*args)

  def refuse(file, operation):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(derived_files, 'write', write_slowly)
  if is_refused:
    monkeypatch.setattr(fcntl, 'flock', refuse)
  for source in _run_at_once(lambda: _open(tmp_path), 4):
    assert source.read(2) == _png(2)
  assert len(copies) == (4 if is_refused else 1)
  assert ('cannot be locked (No locks' in caplog.text) == is_refused
  names = {'train.parquet', os.path.basename(path) + parquet_images.SUFFIX}
  assert {x.name for x in tmp_path.iterdir()} == names


def test_another_process_copies_the_images_if_the_first_one_fails(
    tmp_path, monkeypatch
):
  _write(tmp_path / 'train.parquet', [_png(0)])
  copies = []
  write = derived_files.write

  def fail_first(*args):
    copies.append(1)
    time.sleep(0.1)
    if len(copies) == 1:
      raise OSError(errno.ENOSPC, 'No space left on device')
    return write(*args)

  def read():
    try:
      return _open(tmp_path).read(0)
    except ValueError as error:
      return str(error)

  monkeypatch.setattr(derived_files, 'write', fail_first)
  images = _run_at_once(read, 5)
  assert images.count(_png(0)) == 4
  (error,) = (x for x in images if x != _png(0))
  assert 'No space left on device' in error
  assert len(copies) == 2
  assert not list(tmp_path.rglob('.*'))


def test_a_derived_file_is_locked_by_one_at_a_time(tmp_path):
  places = [tmp_path / 'none' / 'a', tmp_path / 'b']
  (tmp_path / 'none').touch()  # Not a folder, so the second place is locked.
  locked = threading.Lock()

  def lock_often():
    for _ in range(30):
      with derived_files.lock(places):
        assert locked.acquire(blocking=False)
        assert (tmp_path / '.b.lock').exists()
        locked.release()

  _run_at_once(lock_often, 4)
  with derived_files.lock(places[:1]):  # Nothing can be locked.
    assert [x.name for x in tmp_path.iterdir()] == ['none']


def test_a_derived_file_is_on_disk_before_it_gets_its_name(
    tmp_path, monkeypatch
):
  calls = []
  for name in ('fsync', 'replace'):
    function = getattr(os, name)

    def record(*args, name=name, function=function):
      calls.append(name)
      function(*args)

    monkeypatch.setattr(os, name, record)
  _write(tmp_path / 'train.parquet', [_png(0)])
  _open(tmp_path)
  assert calls == ['fsync', 'replace']


# Corrupted images and files.


@pytest.mark.parametrize('compression', ['none', 'snappy'])
def test_corrupted_images_are_named_counted_and_limited(tmp_path, compression):
  images = [_png(i) for i in range(10)]
  images[3], images[4], images[7] = b'no image', None, b''
  for k in range(2):
    file = _write(
        tmp_path / 'parquet' / f'train-{k}.parquet',
        images[5 * k : 5 * k + 5], options={'compression': compression},
    )
  config = _config('parquet', tmp_path)
  dataset = data.build_dataset(config, split='eval', seed=0)
  masks = np.concatenate([batch['mask'] for batch in dataset])
  assert np.flatnonzero(~masks).tolist() == [3, 4, 7, 10, 11]
  assert dataset.damaged == 3
  config.max_damaged_share = 0.1
  with pytest.raises(ValueError, match='max_damaged_share') as caught:
    list(data.build_dataset(config, split='eval', seed=0))
  config.update(max_damaged_share=0.0, num_threads=1)
  source = data.open_source(config, 'eval')
  with pytest.raises(ValueError, match='1 of 10 images') as caught:
    source.load(7)
  assert f'{file} row 2: ' in str(caught.value)


def test_images_of_a_corrupted_row_group_are_counted(tmp_path):
  images = [_png(i) for i in range(12)]
  path = _write(
      tmp_path / 'train.parquet', images,
      options={'row_group_size': 4, 'use_dictionary': False},
  )
  column = parquet.read_metadata(path).row_group(1).column(0)
  assert column.path_in_schema == 'image.bytes'
  identity = _open(tmp_path).identity
  with open(path, 'r+b') as file:
    file.seek(column.data_page_offset)
    file.write(b'\xff' * 40)
  source = _open(tmp_path, max_damaged_share=0.5)
  assert source.identity != identity
  for i in range(12):
    if i // 4 == 1:
      with pytest.raises(data.DamagedImageError, match='row group cannot be'):
        source.load(i)
      assert source.metadata(i) == (str(i), 0, None)
    else:
      pixels = np.asarray(Image.open(io.BytesIO(images[i])))
      np.testing.assert_array_equal(source.load(i), pixels)
  assert sorted(source.damaged) == [4, 5, 6, 7]


def test_truncated_files_are_an_error(tmp_path):
  path = _write(
      tmp_path / 'train.parquet', [_png(i) for i in range(3)],
      options={'compression': 'none', 'use_dictionary': False},
  )
  size = os.path.getsize(path)
  for length in (size - 1, size // 2, 10, 0):
    os.truncate(path, length)
    with pytest.raises(ValueError, match='is truncated, corr') as caught:
      _open(tmp_path)
    assert path in str(caught.value)


def test_the_fingerprint_follows_images_and_labels_not_files(tmp_path):
  def content(*files, **columns):
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    for number, rows in enumerate(files):
      images, labels = zip(*rows, strict=True)
      _write(root / f'train-{number}.parquet', images, labels, **columns)
    return _open(root, max_damaged_share=1.0).identity['content']

  a, b = (b'a', 0), (b'b', 1)
  same = content([a, b], options={'row_group_size': 1, 'compression': 'none'})
  assert content([a, b]) == content([a], [b]) == same
  others = {
      same, content([b, a]), content([a]), content([a, (b'b', 0)]),
      content([a, (b'c', 1)]), content([a, b], paths=['a.png', 'b.png']),
      content([a, b], paths=['a.png', 'c.png']),
  }  # fmt: skip
  assert len(others) == 7


# Columns.


def test_cifar10_has_its_columns(tmp_path):
  _write(tmp_path / 'test.parquet', [_png(0), _png(1)], [1, None], column='img')
  source = _open(tmp_path, 'test')
  assert source.label_names == _NAMES
  assert source.metadata(0).label == 1
  assert source.metadata(1).label == -1


def test_paths_that_repeat_or_are_missing_are_no_names(tmp_path):
  def names(*paths):
    _write(tmp_path / 'train.parquet', [_png(0)] * 3, paths=paths)
    return [_open(tmp_path).metadata(i).name for i in range(3)]

  assert names('a.png', 'é.png', 'c') == ['a.png', 'é.png', 'c']
  assert names('a.png', 'b.png', 'a.png') == ['0', '1', '2']
  assert names('a.png', None, 'c.png') == ['0', '1', '2']
  file = tmp_path / 'train.parquet'
  assert names('name', 'b.png', 'c.png') == ['name', 'b.png', 'c.png']
  file.write_bytes(file.read_bytes().replace(b'name', b'caf\xe9'))
  assert _open(tmp_path).metadata(0).name == 'caf\udce9'


@pytest.mark.parametrize(
    ('columns', 'match'),
    [
        ({'text': ['a']}, r'0 image columns \[\]'),
        ({'a': [b'a'], 'b': [b'b']}, r"2 image columns \['a', 'b'\]"),
        ({'image': [b'a'], 'label': [-2]}, 'row 0: the label is -2'),
        ({'image': [b'a'], 'label': [-2.0]}, 'row 0: the label is -2'),
        ({'image': [b'a'], 'label': [1e300]}, r'row 0: the label is 1e\+300'),
        ({'image': [], 'label': []}, 'have no rows|0 image columns'),
    ],
)
def test_other_columns_are_an_error(tmp_path, columns, match):
  parquet.write_table(pyarrow.table(columns), tmp_path / 'train.parquet')
  with pytest.raises(ValueError, match=match) as caught:
    _open(tmp_path)
  assert str(tmp_path) in str(caught.value)


def test_labels_that_are_no_integers_are_a_warning(tmp_path, caplog):
  columns = {'image': [b'a'], 'mask': [b'b'], 'label': ['cat']}
  parquet.write_table(pyarrow.table(columns), tmp_path / 'train.parquet')
  assert _open(tmp_path).metadata(0).label == -1
  assert 'holds string, no integers' in caplog.text
  labels = [3.0, 1.5, float('nan'), None, float('inf'), -1.0]
  columns = {'image': [b'a'] * 6, 'label': labels}
  parquet.write_table(pyarrow.table(columns), tmp_path / 'train.parquet')
  source = _open(tmp_path)
  assert [source.metadata(i).label for i in range(6)] == [3, *[-1] * 5]
  assert '3 of 6 labels are not integers and are -1, such as 1.5 in row 1' in (
      caplog.text
  )
  feature = {'names': ['a'], '_type': 'ClassLabel'}
  features = {'fine_label': feature, 'coarse_label': feature}
  columns = {'image': [b'a'], 'fine_label': [0], 'coarse_label': [0]}
  metadata = {'huggingface': json.dumps({'info': {'features': features}})}
  parquet.write_table(
      pyarrow.table(columns, metadata=metadata), tmp_path / 'train.parquet'
  )
  assert _open(tmp_path).metadata(0).label == -1
  assert "'fine_label', 'coarse_label' are classes" in caplog.text


def test_metadata_of_other_programs_are_ignored(tmp_path):
  features = '{"info": {"features": {"image": 1}}}'
  for text in ('{', '[]', '{"info": 3}', features):
    schema = pyarrow.schema(
        [('image', pyarrow.binary())], {'huggingface': text}
    )
    table = pyarrow.table([[b'a']], schema=schema)
    parquet.write_table(table, tmp_path / 'train.parquet')
    assert _open(tmp_path).label_names == ()


def test_files_with_other_columns_or_classes_are_an_error(tmp_path):
  _write(tmp_path / 'train-0.parquet', [_png(0)])
  _write(tmp_path / 'train-1.parquet', [_png(1)], names=('a', 'b'))
  with pytest.raises(ValueError, match='need the same columns'):
    _open(tmp_path)


# Names of files.

_FILES = [
    'data/train-00000-of-00002.parquet', 'data/train-00001-of-00002.parquet',
    'data/test-00000-of-00002.parquet', 'README.md', 'val.parquet',
    'data/part-00000-of-00001-0123456789abcdef.parquet',
    'default/valid/0000.parquet', 'default/valid/0001.parquet',
    '.cache/huggingface/val.parquet', 'a/two.parquet', 'b/two.parquet',
]  # fmt: skip


@pytest.mark.parametrize(
    ('split', 'expected'),
    [
        ('train', _FILES[:2]), ('val', ['val.parquet']), ('part', [_FILES[5]]),
        ('valid', _FILES[6:8]), ('data/train-{00000..00001}-*', _FILES[:2]),
        ('b/*', ['b/two.parquet']), ('val.parquet', ['val.parquet']),
        ('*', ['val.parquet']),
        ('tra', r"no Parquet files of the split 'tra'"),
        ('test', "1 of 2 files of the split 'test' are missing"),
        ('two', r"'a/', 'b/' all have files.* 'b/two\*\.parquet'"),
        ('data/train-{00001..00002}*', r"named 'data/train-00002\*'"),
    ],
)  # fmt: skip
def test_files_of_a_split(tmp_path, split, expected):
  for name in _FILES:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  if isinstance(expected, list):
    assert parquet_files.select(_FILES, split) == expected
    assert parquet_files.find('', str(tmp_path), split) == (
        str(tmp_path), expected
    )
  else:
    with pytest.raises(ValueError, match=expected):
      parquet_files.find('', str(tmp_path), split)


# The Hugging Face Hub, by a stand-in: there is no network.


def _stand_in(monkeypatch, root, calls):
  def snapshot_download(repository, **options):
    calls.append((repository, options))
    if options.get('local_files_only') and len(calls) == 1:
      raise FileNotFoundError('no snapshot')
    return str(root)

  def list_repo_files(self, repository, **options):
    calls.append((repository, options))
    return ['README.md', 'data/train-00000-of-00001.parquet', 'test.parquet']

  hub = types.ModuleType('huggingface_hub')
  hub.snapshot_download = snapshot_download
  hub.HfApi = type('HfApi', (), {'list_repo_files': list_repo_files})
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)


def test_a_repository_is_downloaded_by_prepare_alone(tmp_path, monkeypatch):
  calls = []
  _stand_in(monkeypatch, tmp_path, calls)
  _write(tmp_path / 'data' / 'train-00000-of-00001.parquet', [_png(0)])
  config = _config('parquet', tmp_path, name='owner/name@v1', data_dir='')
  with pytest.raises(ValueError, match='--mode=prepare'):
    data.open_source(config, 'train')
  config.eval_split = 'test'
  _write(tmp_path / 'test.parquet', [_png(1)] * 2)
  assert data.prepare(config) == [
      f'Images: {tmp_path}', "Split 'train': 1 images",
      "Split 'test': 2 images",
  ]  # fmt: skip
  repository = {'repo_type': 'dataset', 'revision': 'v1'}
  assert calls[1:3] == [
      ('owner/name', repository),
      ('owner/name', {
          **repository, 'local_dir': None,
          'allow_patterns': [
              'data/train-00000-of-00001.parquet', 'test.parquet'
          ],
      }),
  ]  # fmt: skip
  assert len(data.open_source(config, 'train')) == 1
  assert calls[-1][1]['local_files_only']
  config.eval_split = 'validation'
  with pytest.raises(ValueError, match='owner/name@refs/convert/parquet'):
    data.prepare(config)
  config.data_dir = str(tmp_path / 'none')
  with pytest.raises(ValueError, match=r'not a folder.*--mode=prepare'):
    data.open_source(config, 'train')


def test_a_repository_needs_huggingface_hub(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  config = _config('parquet', tmp_path, name='owner/name', data_dir='')
  with pytest.raises(ValueError, match='pip install huggingface_hub'):
    data.open_source(config, 'train')
  with pytest.raises(RuntimeError, match='pip install huggingface_hub'):
    data.prepare(config)
  config.name = 'cifar10'
  with pytest.raises(ValueError, match="write 'owner/name'"):
    data.prepare(config)
