"""Tar shards: the same batches as a folder, the index, malformed shards."""

import io
import json
import os
import pathlib
import tarfile

import ml_collections
import numpy as np
from PIL import Image
import pytest
import webdataset

from fsq_jax import data
from fsq_jax.data import parquet_files
from fsq_jax.data import tar_index
from fsq_jax.data import webdataset_source


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
  """The cache folder of these tests."""
  monkeypatch.setenv('HOME', str(tmp_path_factory.mktemp('home')))


def _png(value: int, size=(8, 8)) -> bytes:
  rng = np.random.default_rng(value)
  pixels = rng.integers(0, 256, (*size, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'PNG')
  return buffer.getvalue()


def _write(path, *members) -> str:
  """Writes a tar file of (name, content) with the standard library."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as tar:
    for name, content in members:
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return str(path)


def _write_both(root, num: int = 11, split: str = 'train') -> None:
  """Writes the same images as a folder and as shards of 4 images."""
  pattern = str(root / 'shards' / f'{split}-%03d.tar')
  (root / 'shards').mkdir(exist_ok=True)
  with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as shards:
    for i in range(num):
      label = 2 * i // num
      path = root / 'folder' / split / f'class_{label}' / f'{i:03}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(_png(i))
      shards.write({
          '__key__': f'class_{label}/{i:03}', 'png': _png(i),
          'cls': label, 'txt': 'an image', 'pyd': {'no': 'unpickling'},
      })  # fmt: skip


def _config(source, root, **overrides) -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict({
      'source': source, 'name': '', 'data_dir': str(root / source),
      'train_split': 'train', 'eval_split': 'train', 'image_size': (8, 8),
      'batch_size': 4, 'eval_batch_size': 4, 'resize_shorter': 0,
      'label_names': (), 'crop_scale': (0.5, 1.0), 'flip': True,
      'color_jitter': 0.0, 'max_damaged_share': 0.3, 'cache_mib': 1,
      'num_threads': 2, 'prefetch': 16,
  })  # fmt: skip
  if source == 'webdataset':
    config.data_dir = str(root / 'shards')
  config.update(overrides)
  return config


def _open(root, split: str = 'train', **options):
  return webdataset_source.WebDatasetSource(str(root), split, **options)


def _assert_equal(left, right):
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_images_labels_and_content_are_those_of_a_folder(tmp_path):
  _write_both(tmp_path)
  names = ('class_0', 'class_1')
  expected = data.open_source(_config('folder', tmp_path), 'eval')
  config = _config('webdataset', tmp_path, label_names=names)
  source = data.open_source(config, 'eval')
  assert source.label_names == expected.label_names == names
  assert len(source) == len(expected) == 11
  for i in range(11):
    np.testing.assert_array_equal(source.load(i), expected.load(i))
    assert source.metadata(i) == expected.metadata(i)
  assert data.content_hash(source.digests) == data.content_hash(
      expected.digests
  )
  assert source.skipped == {}
  shard = tmp_path / 'shards' / 'train-001.tar'
  assert source.describe(5) == f'{shard} member class_0/005.png'
  assert source.stamp(5)[0] == shard.stat().st_size
  assert data.open_source(
      _config('webdataset', tmp_path), 'eval'
  ).label_names == ()
  (batch, *_) = data.build_dataset(config, split='eval', seed=0)
  (same, *_) = data.build_dataset(
      _config('folder', tmp_path), split='eval', seed=0
  )
  _assert_equal([batch], [same])
  with pytest.raises(ValueError, match=r'label 1, but .* 1 names'):
    data.open_source(
        _config('webdataset', tmp_path, label_names=('one',)), 'eval'
    )


def test_the_fingerprint_follows_images_and_labels_not_shards(tmp_path):
  def content(*shards):
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    for number, members in enumerate(shards):
      _write(root / f'train-{number}.tar', *members)
    return _open(root).identity['content']

  a, b = ('a.png', _png(0)), ('bcd.png', _png(1))
  label = ('a.cls', b'3')
  assert content([a, b]) == content([a], [b]) == content([a], [], [b])
  others = {
      content([a, b]), content([b, a]), content([a, label, b]), content([a]),
      content([('a.png', _png(0) + b'\0'), b]), content([a, ('c.png', b[1])]),
  }  # fmt: skip
  assert len(others) == 6


def test_corrupted_members_are_named_counted_and_limited(tmp_path):
  members = [(f'{i:02}.png', _png(i)) for i in range(10)]
  for i in (3, 4, 7):
    members[i] = (members[i][0], b'no image')
  _write(tmp_path / 'shards' / 'train-0.tar', *members[:5])
  shard = _write(tmp_path / 'shards' / 'train-1.tar', *members[5:])
  config = _config('webdataset', tmp_path)
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
  assert f'{shard} member 07.png: ' in str(caught.value)


def test_decoded_images_are_cached(tmp_path):
  _write(tmp_path / 'train.tar', ('a.png', _png(0)))
  source = _open(tmp_path, cache_mib=1)
  assert source.load(0) is source.load(0)


# Labels.


@pytest.mark.parametrize(
    ('name', 'content', 'label'),
    [
        ('a.cls', b'7', 7), ('a.cls', b' 12\n', 12), ('a.cls', b'-1', -1),
        ('a.json', b'{"label": 5, "cls": 2}', 5), ('a.json', b'{"cls": 2}', 2),
        ('a.json', b'{"width": 2}', -1), ('a.json', b'[3]', -1),
        ('a.JSON', b'{"label": null}', -1), ('a.txt', b'3', -1),
        ('b.cls', b'3', -1), ('./a.cls', b'3', 3), ('a.cls', b'1.0', 1),
        ('a.cls', b'-1.', -1), ('a.json', b'{"label": 3.0}', 3),
    ],
)  # fmt: skip
def test_labels(tmp_path, caplog, name, content, label):
  _write(tmp_path / 'train.tar', (name, content), ('a.png', _png(0)))
  assert _open(tmp_path).metadata(0).label == label
  assert 'cannot be used' not in caplog.text


def test_the_label_of_cls_takes_precedence(tmp_path):
  _write(
      tmp_path / 'train.tar', ('a.json', b'{"label": 5}'), ('a.png', _png(0)),
      ('a.cls', b'6'),
  )  # fmt: skip
  assert _open(tmp_path).metadata(0).label == 6


@pytest.mark.parametrize(
    ('name', 'content', 'reason'),
    [
        ('a.cls', b'cat', "the label is 'cat'"), ('a.cls', b'', "label is ''"),
        ('a.cls', b'1.5', "label is '1.5'"), ('a.cls', b'1_0', "is '1_0'"),
        ('a.cls', b'\xff', "can't decode"), ('a.cls', b'9' * 5000, "'9999"),
        ('a.json', b'{"label": "cat"}', "label is 'cat'"),
        ('a.json', b'{"label": 1.5}', 'label is 1.5'),
        ('a.json', b'{"label": NaN}', 'label is nan'),
        ('a.json', b'{"label": true}', 'label is True'),
        ('a.json', b'{"label": [1]}', r'label is [1]'),
        ('a.json', b'{', 'it is not valid JSON (Expecting'),
        ('a.json', b'[' * 10**5, 'it is not valid JSON (maximum recursion'),
        ('a.json', b'{"label": 1, "text": "' + b'x' * 2**20 + b'"}',
         'its 1048600 bytes are more than the 1048576 allowed'),
    ],
)  # fmt: skip
def test_labels_that_are_no_integers_are_a_warning(
    tmp_path, caplog, name, content, reason
):
  _write(tmp_path / 'train-0.tar', ('b.png', _png(1)))
  shard = _write(tmp_path / 'train-1.tar', ('a.png', _png(0)), (name, content))
  for _ in range(2):  # The second reads the stored index.
    caplog.clear()
    source = _open(tmp_path)
    assert [source.metadata(i).label for i in (0, 1)] == [-1, -1]
    np.testing.assert_array_equal(
        source.load(1), np.asarray(Image.open(io.BytesIO(_png(0))))
    )
    (record,) = caplog.records
    assert '1 of 2 labels cannot be used and are -1' in record.getMessage()
    assert f'{shard} member {name!r}: ' in record.getMessage()
    assert reason in record.getMessage()


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('a.cls', b'-2'), ('a.cls', b'-2.0'), ('a.cls', b'9' * 30),
        ('a.json', b'{"label": -2}'), ('a.json', b'{"label": 1e300}'),
        ('a.json', b'{"label": 4611686018427387904}'),
    ],
)  # fmt: skip
def test_labels_out_of_range_are_an_error(tmp_path, name, content):
  shard = _write(tmp_path / 'train.tar', ('a.png', _png(0)), (name, content))
  with pytest.raises(ValueError, match='Labels are integers') as caught:
    _open(tmp_path)
  assert f'{shard} member {name!r}' in str(caught.value)


def test_images_without_a_label_are_a_warning(tmp_path, caplog):
  _write(
      tmp_path / 'train.tar', ('a.png', _png(0)), ('a.cls', b'1'),
      ('b.png', _png(1)),
  )  # fmt: skip
  source = _open(tmp_path)
  assert [source.metadata(i).label for i in (0, 1)] == [1, -1]
  assert '1 of 2 images have label -1, such as' in caplog.text
  assert 'train.tar member b.png' in caplog.text


# Names of shards and members.


@pytest.mark.parametrize(
    ('split', 'expected'),
    [
        ('train', ['train-00.tar', 'train-01.tar', 'train-02.tar']),
        ('train-{00..01}.tar', ['train-00.tar', 'train-01.tar']),
        ('*-02.tar', ['train-02.tar']),
        ('train-02.tar', ['train-02.tar']),
        ('val', ['val.tar']), ('test', ['test-00000-of-00001.tar']),
        ('sub', ['sub/a.tar', 'sub/b.tar']),
        ('sub/{0..1}.tar', None), ('{01..00}.tar', None), ('tra', None),
        ('*-03.tar', None), ('extra', None),
    ],
)  # fmt: skip
def test_shards_of_a_split(tmp_path, split, expected):
  for name in (
      'train-00.tar', 'train-01.tar', 'train-02.tar', 'train-more-00.tar',
      'val.tar', 'test-00000-of-00001.tar', 'sub/a.tar', 'sub/b.tar',
      'extra.tar.gz',
  ):  # fmt: skip
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  if expected:
    assert webdataset_source.find_shards(str(tmp_path), split) == expected
  else:
    with pytest.raises(ValueError, match='shards'):
      webdataset_source.find_shards(str(tmp_path), split)
  with pytest.raises(ValueError, match='which is not a folder'):
    webdataset_source.find_shards(str(tmp_path / 'none'), split)


def test_indexes_of_shards_are_not_shards(tmp_path):
  for number in range(2):
    _write(tmp_path / f'train-{number}.tar', (f'{number}.png', _png(number)))
  for _ in range(2):
    assert len(_open(tmp_path, 'train-*')) == 2
    assert len(_open(tmp_path, '*{0..1}*')) == 2
  assert len(list(tmp_path.glob(f'*{tar_index.SUFFIX}'))) == 2


def test_a_file_that_two_patterns_match_is_read_once(tmp_path):
  for number in range(1, 12):
    (tmp_path / f'train-{number}.tar').touch()
    (tmp_path / f'train-{number}.parquet').touch()
  pattern = 'train-{1..11}*'
  shards = webdataset_source.find_shards(str(tmp_path), pattern)
  _, files = parquet_files.find('', str(tmp_path), pattern)
  names = [f'train-{i}' for i in (1, 10, 11, *range(2, 10))]
  assert shards == [f'{name}.tar' for name in names]
  assert files == [f'{name}.parquet' for name in names]


@pytest.mark.parametrize(
    ('names', 'match'),
    [
        (['train-00000-of-00004', 'train-00002-of-00004'],
         r"2 of 4 files of the split 'train' are missing; .*00002-of-00004"),
        (['train/a-0-of-2', 'train/b-0-of-1'], '1 of 2 files .* are missing'),
        (['train', 'train-000'], r"'train-000.* and 'train\..* by different"),
        (['train-000', 'train_1'], 'different rules'),
        (['train-0-of-1', 'train-0-of-2', 'train-1-of-2'], 'different rules'),
        (['train-0-of-1', 'train-0'], 'different rules'),
        (['train-1', 'train-01', 'train-2'], 'different rules'),
        (['train/a-0-of-1', 'train/a-0-of-2', 'train/a-1-of-2'], 'different'),
        (['train-1-of-2', 'train-2-of-2'], None),
        (['train-9', 'train-10'], None),
        (['train/a', 'train/a-0', 'train/b', 'train/01', 'train/1'], None),
        (['train-0-of-1', 'train-more-0-of-2', 'val-0-of-3'], None),
    ],
)  # fmt: skip
def test_missing_and_ambiguous_files_of_a_split(tmp_path, names, match):
  for extension in ('tar', 'parquet'):
    for name in names:
      path = tmp_path / f'{name}.{extension}'
      path.parent.mkdir(exist_ok=True)
      path.touch()
  for find in (
      webdataset_source.find_shards,
      lambda root, split: parquet_files.find('', root, split)[1],
  ):
    if match is None:
      expected = [x for x in names if x[:7] not in ('train-m', 'val-0-o')]
      assert len(find(str(tmp_path), 'train')) == len(expected)
    else:
      with pytest.raises(ValueError, match=match) as caught:
        find(str(tmp_path), 'train')
      assert str(tmp_path) in str(caught.value)


def test_other_members_are_counted_as_in_a_folder(tmp_path):
  _write(
      tmp_path / 'train-0.tar', ('./a.jpg', _png(0)), ('a.mask.png', _png(1)),
      ('._a.jpg', b'\0'), ('.x/b.png', b''), ('a.npy', b'\x93'),
      ('a.pickle', b'\x80'), ('README', b'text'), ('b.WEBP', _png(2)),
  )  # fmt: skip
  source = _open(tmp_path, max_damaged_share=0)
  names = [source.metadata(i).name for i in range(len(source))]
  assert names == ['a.jpg', 'b.WEBP']
  assert source.skipped == {'.mask.png': 1, 'no extension': 1}


@pytest.mark.parametrize(
    'member',
    [
        ('x.heic', b'text'), ('x.unknown', b'\x9c\xff\0'), ('x', _png(0)),
        ('x.v2.png', _png(0)), ('x.svg', b'<svg/>'),
    ],
)  # fmt: skip
def test_too_many_unread_images_are_an_error(tmp_path, member):
  images = [(f'{i}.png', _png(i)) for i in range(9)]
  _write(tmp_path / 'train.tar', *images, member)
  assert len(_open(tmp_path, max_damaged_share=0.1)) == 9
  with pytest.raises(ValueError, match='1 of 10 files are images'):
    _open(tmp_path, max_damaged_share=0)
  _write(tmp_path / 'alone.tar', member)
  with pytest.raises(ValueError, match='alone holds no images'):
    _open(tmp_path, 'alone')


def test_links_in_a_shard_are_not_followed(tmp_path):
  _write(tmp_path / 'train.tar', ('a.png', _png(0)))
  with tarfile.open(tmp_path / 'train.tar', 'a') as tar:
    link = tarfile.TarInfo('b.png')
    link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
    tar.addfile(link)
  with pytest.raises(ValueError, match='1 link or special file'):
    _open(tmp_path, max_damaged_share=0)


@pytest.mark.parametrize(
    ('first', 'second'),
    [(['a.png', 'a.png'], []), (['a.png', 'b.png', 'a.jpg'], []),
     (['a.cls', 'a.cls'], ['b.png'])],
)  # fmt: skip
def test_keys_that_occur_twice_in_a_shard_are_an_error(tmp_path, first, second):
  for number, names in enumerate((first, second)):
    _write(tmp_path / f'train-{number}.tar', *((x, b'1') for x in names))
  with pytest.raises(ValueError, match='of its own') as caught:
    _open(tmp_path)
  assert str(tmp_path / 'train-0.tar') in str(caught.value)


def test_names_begin_with_the_shard_if_keys_repeat(tmp_path, caplog):
  for split, shards in (
      ('train', (['a.png', 'b.png'], ['a.jpg'])),
      ('other', (['a.png', 'b.png'], ['c.jpg'])),
  ):
    for number, names in enumerate(shards):
      members = [(x, _png(3 * number + i)) for i, x in enumerate(names)]
      _write(tmp_path / f'{split}-{number}.tar', *members)
  source = _open(tmp_path)
  assert [source.metadata(i).name for i in range(3)] == [
      'train-0.tar/a.png', 'train-0.tar/b.png', 'train-1.tar/a.jpg'
  ]  # fmt: skip
  for i, value in enumerate((0, 1, 3)):
    assert source.read(i) == _png(value)
  (record,) = caplog.records
  shard = tmp_path / 'train-1.tar'
  assert '1 images have the key of an image in ano' in record.getMessage()
  assert f'{shard} member a.jpg. Names of' in record.getMessage()
  assert source.describe(2) == f'{shard} member a.jpg'
  caplog.clear()
  source = _open(tmp_path, 'other')
  names = [source.metadata(i).name for i in range(3)]
  assert names == ['a.png', 'b.png', 'c.jpg']
  assert not caplog.records


# Malformed shards.


def _shard(tmp_path) -> pathlib.Path:
  members = [(f'{i}.png', _png(i)) for i in range(3)]
  return pathlib.Path(_write(tmp_path / 'train-0.tar', *members))


# The headers are at 0, 1024 and 2048; the end of the archive at 3072.
@pytest.mark.parametrize('size', [0, 100, 600, 1024, 1100, 1900, 2048, 3072])
def test_truncated_shards_are_an_error(tmp_path, size):
  shard = _shard(tmp_path)
  assert len(_open(tmp_path)) == 3
  os.truncate(shard, size)
  with pytest.raises(ValueError, match='is truncated') as caught:
    _open(tmp_path)
  assert str(shard) in str(caught.value)


def test_corrupted_and_compressed_shards_are_an_error(tmp_path):
  shard = _shard(tmp_path)
  content = shard.read_bytes()
  shard.write_bytes(content[:1030] + b'\xff' + content[1031:])
  with pytest.raises(ValueError, match='byte 1024, after 1 members'):
    _open(tmp_path)
  shard.write_bytes(content + content)  # joined by `cat`
  with pytest.raises(ValueError, match='byte 3072, after 3 members'):
    _open(tmp_path)
  with tarfile.open(shard, 'w:gz') as tar:
    tar.add(__file__, 'a.png')
  with pytest.raises(ValueError, match='compressed or no tar file'):
    _open(tmp_path)


def test_a_shard_truncated_after_the_start_is_an_error(tmp_path):
  shard = _shard(tmp_path)
  source = _open(tmp_path)
  os.truncate(shard, 2600)
  source.load(1)
  with pytest.raises(OSError, match=r'member 2\.png: 40 of \d+ bytes'):
    source.load(2)
  assert not source.damaged


# The stored index.


def _count_builds(monkeypatch) -> list:
  built = []
  open_tar = tarfile.open

  def count(*args, **kwargs):
    built.extend([1] if kwargs.get('mode') == 'r:' else [])
    return open_tar(*args, **kwargs)

  monkeypatch.setattr(tarfile, 'open', count)
  return built


def test_the_index_is_stored_used_and_invalidated(tmp_path, monkeypatch):
  shard = _shard(tmp_path)
  built = _count_builds(monkeypatch)
  identity = _open(tmp_path).identity
  stored = tmp_path / f'train-0.tar{tar_index.SUFFIX}'
  assert {x.name for x in tmp_path.iterdir()} == {shard.name, stored.name}
  source = _open(tmp_path)
  assert source.identity == identity
  assert len(built) == 1
  np.testing.assert_array_equal(
      source.load(2), np.asarray(Image.open(io.BytesIO(_png(2))))
  )
  status = shard.stat()
  os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
  assert _open(tmp_path).identity == identity
  assert len(built) == 2
  _write(shard, *((f'{i}.png', _png(i)) for i in range(12)))
  os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
  assert len(_open(tmp_path)) == 12  # another size, the same time
  assert len(built) == 3
  content = stored.read_bytes()
  method = content.index(b'PK\1\2') + 10  # of compression, unknown if 99
  for corrupted in (
      b'', b'PK\3\4', content[:700], content[:-5],
      content[:method] + b'\x63' + content[method + 1 :],
  ):  # fmt: skip
    stored.write_bytes(corrupted)
    assert len(_open(tmp_path)) == 12
  assert len(built) == 8
  np.savez(stored, stamp=np.array([{}], object))  # which is pickled
  assert len(_open(tmp_path)) == 12
  assert len(built) == 9


def test_an_index_of_earlier_versions_is_used(tmp_path, monkeypatch):
  _shard(tmp_path)
  source = _open(tmp_path)
  stored = tmp_path / f'train-0.tar{tar_index.SUFFIX}'
  arrays = dict(np.load(stored))
  assert json.loads(str(arrays['counts'])) == [{}, 0, 0, '']
  np.savez(stored, **{**arrays, 'counts': np.array('[{".a": 1}, 0]')})
  built = _count_builds(monkeypatch)
  assert _open(tmp_path).identity == source.identity
  assert _open(tmp_path).skipped == {'.a': 1}
  assert not built


def test_prepare_indexes_the_shards_of_both_splits(tmp_path, monkeypatch):
  _write_both(tmp_path)
  _write_both(tmp_path, num=3, split='val')
  config = _config('webdataset', tmp_path, eval_split='val')
  assert data.prepare(config) == [
      f'Images: {tmp_path}/shards', "Split 'train': 11 images",
      "Split 'val': 3 images",
  ]  # fmt: skip
  built = _count_builds(monkeypatch)
  for split in ('train', 'eval'):
    data.open_source(config, split)
  assert not built


def test_the_index_of_a_folder_that_is_not_writable_is_in_the_cache(
    tmp_path, monkeypatch, caplog
):
  shard = _shard(tmp_path)
  # Takes the place of a folder without permissions, which root may write.
  (tmp_path / f'train-0.tar{tar_index.SUFFIX}').mkdir()
  built = _count_builds(monkeypatch)
  for _ in range(2):
    assert len(_open(tmp_path)) == 3
  assert len(built) == 1
  cache = pathlib.Path(tar_index.CACHE_FOLDER).expanduser()
  (stored,) = cache.iterdir()
  assert stored.name.endswith(f'_{shard.name}{tar_index.SUFFIX}')
  assert sorted(x.name[:7] for x in tmp_path.iterdir()) == ['train-0'] * 2
  stored.unlink()
  stored.mkdir()
  assert len(_open(tmp_path)) == 3
  assert 'cannot be stored and is built again each time: ' in caplog.text


def test_names_that_are_not_utf8_are_read(tmp_path):
  name = b'caf\xe9.png'.decode(errors='surrogateescape')
  with tarfile.open(
      tmp_path / 'train.tar', 'w', format=tarfile.GNU_FORMAT
  ) as tar:
    member = tarfile.TarInfo(name)
    member.size = len(_png(0))
    tar.addfile(member, io.BytesIO(_png(0)))
  assert _open(tmp_path).metadata(0).name == name


def test_shards_of_an_empty_split_name_the_folder(tmp_path):
  with pytest.raises(ValueError, match='no tar shards of the split'):
    _open(tmp_path)
  _write(tmp_path / 'train-0.tar')
  with pytest.raises(ValueError, match='train holds no images'):
    _open(tmp_path)
