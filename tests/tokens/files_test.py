"""Token files: what is written, what is refused, and batches of them."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import pickle
import random
import shutil
import struct
import time

from array_record.python import array_record_module
import numpy as np
import pytest

from fsq_jax import data
from fsq_jax import quantizers
from fsq_jax import tokens
from fsq_jax.quantizers import builder
from fsq_jax.quantizers import convert
from fsq_jax.tokens import manifest as manifests
from fsq_jax.tokens import shards
from fsq_jax.tokens import source as sources
from fsq_jax.tokens import writer as writers

_TESTDATA = pathlib.Path(__file__).parents[1] / 'testdata'
_STORAGES = pytest.mark.parametrize('storage', manifests.STORAGES)
_FSQ = quantizers.FSQ((8, 5, 5))
_QUANTIZERS = {
    'fsq': _FSQ,
    'grouped': quantizers.GroupedFSQ((8, 5), num_groups=2),
    'residual': quantizers.ResidualFSQ((5, 3), num_stages=3),
    'int32': quantizers.LFQ(20),
}
# The last one is no UTF-8, as names of files need not be.
_NAMES = ('a/1.png', 'ü/2 .png', 'x' * 300, '3', '4', 'b\udcff.png')


def _job(storage='array_record', quantizer=_FSQ, **fields):
  return tokens.Job(**{
      'storage': storage,
      'quantizer': quantizer.spec(),
      'codebook_size': quantizer.codebook_size,
      'index_shape': tuple(quantizer.index_shape),
      'model_hash': 'ab' * 32,
      'fit': 'crop',
      'image_size': (16, 12),
      'batch_size': 4,
      'images_per_shard': 3,
      'source': {'source': 'synthetic', 'num_examples': 7},
      'label_names': ('cat', 'dog'),
      **fields,
  })


def _view_job(storage='array_record', **fields):
  """Three views of each image."""
  augmentation = {'seed': 1, 'crop_scale': [1.0, 2.0], 'flip': True}
  return _job(storage, views=3, augmentation=augmentation, **fields)


def _examples(job, num, grids=((4, 3),), first=0):
  rng = np.random.default_rng(first)
  return [
      tokens.Example(
          rng.integers(
              0,
              job.codebook_size,
              (*grids[i % len(grids)], *job.index_shape),
              dtype=np.int32,
          ),
          _NAMES[(first + i) % len(_NAMES)],
          i % 3 - 1,
          (16 + i, 12),
          (32 + i, 24),
      )
      for i in range(num)
  ]


def _write(folder, job, grids=((4, 3),), order=(0, 1, 2)):
  """Writes seven images, of which the last but one is damaged."""
  everything = _examples(job, 6, grids)
  parts = [everything[:3], everything[3:5], everything[5:]]
  writer = writers.TokenWriter(folder, job)
  for shard in order:
    writer.write(
        shard,
        parts[shard],
        damaged=[writers.Damage(5, 'five', 'empty')] if shard == 1 else [],
        source_bytes=100,
    )
  writer.finish()
  return everything


def _refuse_to_read(folder):
  """Returns why a folder is refused, at the latest with its last image."""
  with pytest.raises(ValueError) as error:  # noqa: PT011
    list(tokens.TokenSource(folder))
  return str(error.value)


def _files(folder):
  return {
      path.relative_to(folder): path.read_bytes()
      for path in sorted(folder.rglob('*'))
      if path.is_file()
  }


def _change_manifest(folder, change):
  path = folder / 'manifest.json'
  values = json.loads(path.read_text())
  change(values)
  path.write_text(json.dumps(values))


def _replace_shard(folder, shard, write):
  """Puts another file in a shard's place, and its hash into the manifest."""
  path = folder / _file(folder, shard)
  write(path)
  content = path.read_bytes()

  def change(values):
    values['shards'][shard]['num_bytes'] = len(content)
    values['shards'][shard]['sha256'] = hashlib.sha256(content).hexdigest()

  _change_manifest(folder, change)


def _file(folder, shard):
  manifest = json.loads((folder / 'manifest.json').read_text())
  return manifest['shards'][shard]['file']


# What is written.


@_STORAGES
@pytest.mark.parametrize('quantizer', _QUANTIZERS)
def test_what_is_written_is_read(tmp_path, storage, quantizer):
  job = _job(storage, _QUANTIZERS[quantizer])
  written = _write(tmp_path / 'x', job)
  source = tokens.TokenSource(tmp_path / 'x')
  assert len(source) == 6
  for example, wanted in zip(source, written, strict=True):
    assert example.tokens.dtype == np.int32
    np.testing.assert_array_equal(example.tokens, wanted.tokens)
    assert example[1:] == wanted[1:]
  assert source[-1].name == written[5].name
  with pytest.raises(IndexError):
    source[6]
  manifest = source.manifest
  assert manifest.job == job
  assert manifest.grid == (4, 3)
  assert manifest.damaged == ({'name': 'five', 'reason': 'empty'},)
  assert [x.num_images for x in manifest.shards] == [3, 2, 1]
  values = json.loads((tmp_path / 'x' / 'manifest.json').read_text())
  assert values['dtype'] == ('int32' if quantizer == 'int32' else 'uint16')
  assert values['bits_per_token'] == math.log2(job.codebook_size)
  assert {path.name for path in (tmp_path / 'x').iterdir()} == {
      'manifest.json', *(_file(tmp_path / 'x', i) for i in range(3))
  }


@_STORAGES
def test_other_programs_can_read_the_files_by_the_manifest(tmp_path, storage):
  written = _write(tmp_path / 'x', _job(storage))
  path = tmp_path / 'x' / _file(tmp_path / 'x', 0)
  if storage == 'npz':
    with np.load(path) as file:
      tokens_of_images = file['tokens'].reshape(3, 4, 3)
      assert file['tokens'].dtype == np.uint16
  else:
    reader = array_record_module.ArrayRecordReader(str(path))
    records = reader.read_all()
    lengths = [int.from_bytes(x[32:36], 'little') for x in records]
    assert records[0][36 : 36 + lengths[0]].decode() == 'a/1.png'
    tokens_of_images = [
        np.frombuffer(x, np.uint16, offset=36 + n).reshape(4, 3)
        for x, n in zip(records, lengths, strict=True)
    ]
  np.testing.assert_array_equal(
      tokens_of_images, [example.tokens for example in written[:3]]
  )


@pytest.mark.parametrize('levels', [
    '8x6x5',
    *(pytest.param(x, marks=pytest.mark.slow) for x in ('8x8x8', '8x5x5x5')),
])  # fmt: skip
def test_tokens_of_the_paper_mean_the_same_in_other_programs(tmp_path, levels):
  # Of the paper's notebook, and of vector-quantize-pytorch 1.32.0.
  paper = quantizers.FSQ(_levels(levels), 'paper')
  theirs = quantizers.FSQ(_levels(levels), 'preserve_symmetry')
  golden, other = (
      {
          key: values[f'{levels}/{key}'][:500]
          for values in [np.load(_TESTDATA / f'fsq_{name}.npz')]
          for key in ('indices', 'zhat')
      }
      for name in ('paper', 'preserve_symmetry')
  )
  converted = convert.convert_indices(
      other['indices'], theirs.spec(), paper.spec()
  )
  written = np.stack([golden['indices'].astype(np.int32), converted])
  source = {'source': 'golden', 'num_examples': 2}
  job = _job(quantizer=paper, source=source, images_per_shard=2)
  writer = writers.TokenWriter(tmp_path / 'tokens', job)
  examples = [
      tokens.Example(x.reshape(20, 25), str(i), -1, (16, 12), (16, 12))
      for i, x in enumerate(written)
  ]
  writer.write(0, examples, damaged=[], source_bytes=None)
  writer.finish()

  source = tokens.TokenSource(tmp_path / 'tokens')
  first, second = (source[i].tokens.ravel() for i in range(2))
  spec = source.manifest.job.quantizer
  quantizer = convert.quantizer_from_spec(spec)
  assert quantizer.convention == 'paper'
  np.testing.assert_array_equal(first, golden['indices'])
  np.testing.assert_allclose(
      quantizer.indices_to_codes(first), golden['zhat'], atol=1e-6
  )
  there = convert.convert_indices(second, spec, theirs.spec())
  np.testing.assert_array_equal(there, other['indices'])
  np.testing.assert_allclose(
      theirs.indices_to_codes(there), other['zhat'], atol=1e-6
  )


def _levels(text):
  return tuple(map(int, text.split('x')))


@_STORAGES
def test_grids_may_differ(tmp_path, storage):
  job = _job(storage, fit='pad')
  written = _write(tmp_path / 'x', job, grids=((4, 3), (1, 7), (2, 2)))
  source = tokens.TokenSource(tmp_path / 'x')
  assert source.manifest.grid is None
  for example, wanted in zip(source, written, strict=True):
    np.testing.assert_array_equal(example.tokens, wanted.tokens)
  with pytest.raises(ValueError, match='several sizes'):
    tokens.build_dataset(source, batch_size=2, seed=0)
  summary = source.manifest.summary
  pixels = sum((16 + i) * 12 for i in range(6))
  assert summary['compression_of_pixels'] == pytest.approx(
      24 * pixels / (2 * (12 + 7 + 4) * math.log2(200))
  )


@_STORAGES
def test_bytes_depend_on_neither_order_nor_time(tmp_path, storage, monkeypatch):
  _write(tmp_path / 'a', _job(storage))
  later = time.time() + 1e7
  monkeypatch.setattr(time, 'time', lambda: later)
  monkeypatch.setattr(time, 'localtime', lambda *x: time.gmtime(later))
  _write(tmp_path / 'b', _job(storage), order=(2, 0, 1))
  assert _files(tmp_path / 'a') == _files(tmp_path / 'b')


@_STORAGES
def test_a_shard_may_hold_no_image(tmp_path, storage):
  job = _job(storage, images_per_shard=1, source={'num_examples': 2})
  writer = writers.TokenWriter(tmp_path / 'x', job)
  written = _examples(job, 1)
  writer.write(0, written, damaged=[], source_bytes=None)
  damaged = [writers.Damage(1, 'b', 'empty')]
  writer.write(1, [], damaged=damaged, source_bytes=None)
  assert writer.is_done(1)
  writer.finish()
  source = tokens.TokenSource(tmp_path / 'x')
  assert [x.name for x in source] == ['a/1.png']
  assert source.manifest.summary['compression_of_files'] is None
  writer = writers.TokenWriter(tmp_path / 'y', job)
  for shard in (0, 1):
    writer.write(shard, [], damaged=damaged, source_bytes=None)
  with pytest.raises(ValueError, match='any image of the split'):
    writer.finish()


def test_damage_that_several_processes_found_counts_together(tmp_path):
  job = _job(images_per_shard=2, source={'num_examples': 4})
  writer = writers.TokenWriter(tmp_path / 'x', job)
  for shard in (0, 1):
    damaged = [writers.Damage(2 * shard, f'name {shard}', 'empty')]
    examples = _examples(job, 1, first=shard)
    writer.write(shard, examples, damaged=damaged, source_bytes=None)
  listing = r'2 of 4 images .*\n  name 0: empty\n  name 1'
  with pytest.raises(ValueError, match=listing):
    writer.finish(max_damaged_share=0.25)
  assert not (tmp_path / 'x' / 'manifest.json').exists()
  writer.finish(max_damaged_share=0.5)
  assert len(tokens.TokenSource(tmp_path / 'x').manifest.damaged) == 2


def test_the_summary_is_that_of_all_tokens(tmp_path):
  written = _write(tmp_path / 'x', _job())
  summary = tokens.TokenSource(tmp_path / 'x').manifest.summary
  values = np.concatenate([x.tokens.reshape(-1) for x in written])
  shares = np.bincount(values) / values.size
  entropy = -sum(p * math.log2(p) for p in shares if p)
  assert summary['num_tokens'] == values.size == 72
  assert summary['usage'] == np.unique(values).size / 200
  assert summary['entropy_bits'] == pytest.approx(entropy)
  assert summary['bits_per_image'] == pytest.approx(12 * math.log2(200))
  assert summary['entropy_bits_per_image'] == pytest.approx(12 * entropy)
  assert summary['compression_of_pixels'] == pytest.approx(
      24 * 16 * 12 / (12 * math.log2(200))
  )
  assert summary['compression_of_files'] == pytest.approx(
      8 * 300 / (72 * math.log2(200))
  )
  assert summary['definitions'].keys() == summary.keys() - {'definitions'}


@_STORAGES
def test_few_files_are_open_at_a_time(tmp_path, storage, monkeypatch):
  job = _job(storage, images_per_shard=1, source={'num_examples': 40})
  writer = writers.TokenWriter(tmp_path / 'x', job)
  written = _examples(job, 40)
  for i, example in enumerate(written):
    writer.write(i, [example], damaged=[], source_bytes=None)
  writer.finish()
  opened = []
  open_shard = shards.open_shard

  def open_and_record(path, job):
    opened.append(path.name)
    return open_shard(path, job)

  monkeypatch.setattr(shards, 'open_shard', open_and_record)
  monkeypatch.setattr(sources, 'MAX_OPEN', 3)
  source = tokens.TokenSource(tmp_path / 'x')
  files = pathlib.Path('/proc/self/fd')
  before = len(list(files.iterdir()))
  for i in [*range(40), 39, 38, 37, 39]:
    np.testing.assert_array_equal(source[i].tokens, written[i].tokens)
  assert len(opened) == 40
  assert source[36].name == written[36].name
  assert source[38].name == written[38].name  # 37 and 39 were read later.
  assert len(opened) == 42
  assert len(list(files.iterdir())) <= before + 3


# Views.


def _write_views(folder, job):
  """Writes three views of each of two images; the third is damaged."""
  examples = [
      example._replace(
          name=_NAMES[i // 3],
          view=i % 3,
          crop=(i, 2 * i, 3 + i, 2),
          is_flipped=i % 2 == 1,
      )
      for i, example in enumerate(_examples(job, 6))
  ]
  writer = writers.TokenWriter(folder, job)
  damaged = [writers.Damage(2, 'two', 'empty')]
  writer.write(0, examples, damaged=damaged, source_bytes=100)
  writer.finish()
  return examples


@_STORAGES
def test_views_are_read_as_they_were_written(tmp_path, storage):
  job = _view_job(storage, source={'num_examples': 3})
  written = _write_views(tmp_path / 'x', job)
  source = tokens.TokenSource(tmp_path / 'x')
  assert source.manifest.job == job
  assert len(source) == 6
  for example, wanted in zip(source, written, strict=True):
    np.testing.assert_array_equal(example.tokens, wanted.tokens)
    assert example[1:] == wanted[1:]
  assert (source[5].view, source[5].crop) == (2, (5, 10, 8, 2))
  assert source[5].is_flipped
  values = json.loads((tmp_path / 'x' / 'manifest.json').read_text())
  assert values['version'] == 3
  assert values['views'] == 3
  assert values['augmentation']['crop_scale'] == [1.0, 2.0]
  lines = list(tokens.describe(source.manifest))
  assert lines[0] == '6 images in 1 files, 1 damaged'
  assert 'views: 3 random crops of each image' in lines[1]


@_STORAGES
def test_other_programs_can_read_views_by_the_manifest(tmp_path, storage):
  job = _view_job(storage, source={'num_examples': 3})
  written = _write_views(tmp_path / 'x', job)
  layout = json.loads((tmp_path / 'x' / 'manifest.json').read_text())['layout']
  assert 'top, left, height' in layout
  path = tmp_path / 'x' / _file(tmp_path / 'x', 0)
  if storage == 'npz':
    with np.load(path) as file:
      read = [
          (int(view), tuple(map(int, crop)), bool(flipped))
          for view, crop, flipped in zip(
              file['view'], file['crop'], file['flipped'], strict=True
          )
      ]
  else:
    records = array_record_module.ArrayRecordReader(str(path)).read_all()
    read = []
    for record, example in zip(records, written, strict=True):
      # After label, h, w, H, W, and H and W of the original.
      view, *crop, flipped, num_name = struct.unpack_from('<7I', record, 32)
      read.append((view, tuple(crop), bool(flipped)))
      assert record[60 : 60 + num_name] == os.fsencode(example.name)
      np.testing.assert_array_equal(
          np.frombuffer(record, '<u2', offset=60 + num_name).reshape(4, 3),
          example.tokens,
      )
  assert read == [(x.view, x.crop, x.is_flipped) for x in written]


@_STORAGES
def test_views_that_cannot_be_are_refused(tmp_path, storage):
  job = _view_job(storage, source={'num_examples': 3})
  examples = _write_views(tmp_path / 'x', job)
  wrong = []
  for fields, message in (
      ({'view': 3}, 'view 3 of 3'),
      ({'crop': (0, 0, 0, 2)}, 'crop of 0 x 2'),
      ({'crop': (15, 0, 2, 2)}, 'at row 15, column 0 of an image of (16, 12'),
      ({'crop': (0, 2**32 - 1, 1, 1)}, 'column 4294967295'),
  ):
    changed = [examples[0]._replace(**fields), *examples[1:]]
    _replace_shard(
        tmp_path / 'x', 0, lambda path, x=changed: shards.write(path, x, job)
    )
    answer = _refuse_to_read(tmp_path / 'x')
    if message not in answer:
      wrong.append((message, answer))
  assert not wrong


def _check_manifests(folder, cases):
  """Changes the manifest in several ways; each has to be refused."""
  path = folder / 'manifest.json'
  content = path.read_bytes()
  wrong = []
  for change, message in cases:
    _change_manifest(folder, change)
    answer = _refuse_to_read(folder)
    if message not in answer:
      wrong.append((message, answer))
    path.write_bytes(content)
  assert not wrong
  tokens.TokenSource(folder)


def test_manifests_of_views_that_cannot_be_are_refused(tmp_path):
  _write_views(tmp_path / 'x', _view_job(source={'num_examples': 3}))
  _check_manifests(tmp_path / 'x', [
      (lambda x: x.update(version=2), 'version is 2; needed: 3'),
      (lambda x: x.update(views=2), 'needed: 6'),
      (lambda x: x.update(views=1), 'version is 3; needed: 2'),
      (lambda x: x.update(views=0), 'views is 0'),
      (lambda x: x.update(augmentation=None), "None; needed: 'an object'"),
      (lambda x: x.update(content_sha256='x'), 'content_sha256'),
  ])  # fmt: skip


# What earlier programs have written.


def _old_job(storage):
  return _job(storage, images_per_shard=5,
              source={'source': 'synthetic', 'num_examples': 5})  # fmt: skip


@_STORAGES
def test_folders_of_earlier_programs_are_read_and_written_alike(
    tmp_path, storage
):
  old = _TESTDATA / 'tokens_version_2' / storage
  source = tokens.TokenSource(old)
  assert source.manifest.job == _old_job(storage)
  assert source.manifest.content_sha256 is None
  grids = np.random.default_rng(0).integers(
      0, 200, (4, 4, 3), dtype=np.int32
  )
  names = ['a/1.png', 'ü.png', 'b\udcff.png', 'last']
  assert [x[1:] for x in source] == [
      (name, i % 3 - 1, (16 + i, 12), (32 + i, 24), 0, None, False)
      for i, name in enumerate(names)
  ]
  np.testing.assert_array_equal([x.tokens for x in source], grids)
  lines = list(tokens.describe(source.manifest))
  assert lines[0] == '4 images in 1 files, 1 damaged'
  # It is complete for the same job still.
  copy = tmp_path / 'copy'
  shutil.copytree(old, copy)
  assert writers.TokenWriter(copy, _old_job(storage)).is_finished
  # One view is laid out as it was.
  writer = writers.TokenWriter(tmp_path / 'new', _old_job(storage))
  damaged = [writers.Damage(4, 'five', 'empty')]
  writer.write(0, list(source), damaged=damaged, source_bytes=100)
  writer.finish()
  file = _file(old, 0)
  assert (tmp_path / 'new' / file).read_bytes() == (old / file).read_bytes()
  values = json.loads((old / 'manifest.json').read_text())
  new = json.loads((tmp_path / 'new' / 'manifest.json').read_text())
  assert {
      key for key, value in new.items() if values.get(key, ()) != value
  } == {'layout', 'summary', 'views', 'augmentation', 'content_sha256'}


# What the summary says.


def _write_grids(folder, grids, labels=None, **fields):
  """Writes one shard of given grids; returns the lines that describe it."""
  job = _job(images_per_shard=len(grids), source={'num_examples': len(grids)},
             **fields)  # fmt: skip
  labels = [0] * len(grids) if labels is None else labels
  writer = writers.TokenWriter(folder, job)
  examples = [
      tokens.Example(grid, str(i), label, (16, 12), (16, 12))
      for i, (grid, label) in enumerate(zip(grids, labels, strict=True))
  ]
  writer.write(0, examples, damaged=[], source_bytes=None)
  writer.finish()
  manifest = tokens.TokenSource(folder).manifest
  assert manifest.summary['distinct_grids'] == len(
      {(grid.shape, grid.tobytes()) for grid in grids}
  )
  return '\n'.join(tokens.describe(manifest))


def test_token_grids_that_repeat_are_warned_of(tmp_path):
  for num_repeated, is_warned_of in ((0, False), (2, False), (3, True)):
    grids = [
        np.full((2, 2), 199 - max(i, num_repeated), np.int32)
        for i in range(200)
    ]
    text = _write_grids(tmp_path / str(num_repeated), grids)
    assert f'distinct token grids: {200 - num_repeated}' in text
    assert ('warning: 1.5% of the token grids repeat' in text) == is_warned_of
    assert ('--config.tokenize.views=N' in text) == is_warned_of


def test_grids_of_other_shapes_are_other_grids(tmp_path):
  shapes = (1, 6), (2, 3), (3, 2), (2, 3)
  grids = [np.zeros(shape, np.int32) for shape in shapes]
  assert 'distinct token grids: 3' in _write_grids(tmp_path / 'x', grids)


def test_repeated_grids_are_found_in_different_shards(tmp_path):
  job = _job(images_per_shard=1, source={'num_examples': 3})
  writer = writers.TokenWriter(tmp_path / 'x', job)
  one, other = _examples(job, 2)
  for shard, example in enumerate((one, other, one)):
    writer.write(shard, [example], damaged=[], source_bytes=None)
  writer.finish()
  manifest = tokens.TokenSource(tmp_path / 'x').manifest
  assert manifest.summary['distinct_grids'] == 2


def test_labels_of_no_class_are_explained(tmp_path):
  grids = [np.full((2, 2), i, np.int32) for i in range(3)]
  for num_without in (0, 2, 3):
    labels = [-1] * num_without + [1] * (3 - num_without)
    text = _write_grids(tmp_path / str(num_without), grids, labels)
    wanted = f'no class label (-1): {num_without} images; classes are the sub-f'
    assert (wanted in text) == (num_without > 0)


@_STORAGES
def test_names_that_are_no_text_are_described_and_can_be_shown(
    tmp_path, storage
):
  job = _job(storage, images_per_shard=7)
  writer = writers.TokenWriter(tmp_path / 'x', job)
  damaged = [writers.Damage(6, 'b\udcff.png', 'empty')]
  writer.write(0, _examples(job, 6), damaged=damaged, source_bytes=1)
  writer.finish()
  text = (tmp_path / 'x' / 'manifest.json').read_bytes().decode('ascii')
  assert 'not valid UTF-8' in json.loads(text)['layout']
  source = tokens.TokenSource(tmp_path / 'x')
  assert os.fsencode(source[5].name) == b'b\xff.png'
  lines = '\n'.join(tokens.describe(source.manifest))
  assert 'damaged: b\\udcff.png: empty' in lines
  lines.encode()  # A terminal takes it.


# What is refused.


@_STORAGES
def test_damaged_files_are_named(tmp_path, storage):
  rng = random.Random(0)
  folder = tmp_path / 'x'
  _write(folder, _job(storage))
  for _ in range(40):
    path = folder / _file(folder, rng.randrange(3))
    content = path.read_bytes()
    kind = rng.randrange(4)
    if kind == 0:
      path.write_bytes(content[: rng.randrange(len(content))])
      reason = 'bytes, not'
    elif kind == 1:
      path.write_bytes(content + b'\0')
      reason = 'bytes, not'
    elif kind == 2:
      path.unlink()
      reason = 'is missing'
    else:
      at = rng.randrange(len(content))
      flipped = content[at] ^ 1 << rng.randrange(8)
      path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
      reason = 'sha256'
    message = _refuse_to_read(folder)
    assert f'{path.name} ' in message
    assert reason in message
    path.write_bytes(content)
  assert len(list(tokens.TokenSource(folder))) == 6


def test_specs_of_other_quantizers_need_no_codebook_size(tmp_path, monkeypatch):
  monkeypatch.setitem(builder.QUANTIZERS, 'signs', None)
  job = dataclasses.replace(
      _job(), quantizer={'name': 'signs'}, codebook_size=64, index_shape=(2,)
  )
  expected = _write(tmp_path / 'x', job)
  source = tokens.TokenSource(tmp_path / 'x')
  for i, example in enumerate(expected):
    np.testing.assert_array_equal(source[i].tokens, example.tokens)


def test_manifests_that_cannot_be_are_refused(tmp_path):
  _write(tmp_path / 'x', _job())
  _check_manifests(tmp_path / 'x', [
      (lambda x: x.update(format='webdataset'), "needed: 'fsq_jax tokens'"),
      (lambda x: x.update(version=1), 'version is 1'),
      (lambda x: x.update(storage='pickle'), "storage is 'pickle'"),
      (lambda x: x.update(storage=[]), 'storage is []'),
      (lambda x: x.pop('model_hash'), 'model_hash is missing'),
      (lambda x: x.update(model_hash='0x1'), 'hexadecimal'),
      (lambda x: x.update(codebook_size=199), 'of its quantizer'),
      (lambda x: x.update(index_shape=[2]), 'of its quantizer'),
      (lambda x: x.update(dtype='int32'), 'dtype is'),
      (lambda x: x.update(quantizer={'name': 'rvq'}), "'rvq'; known"),
      (lambda x: x['quantizer'].update(levels='8'), 'cannot be used'),
      (lambda x: x['quantizer'].update(rounding='up'), 'rounding'),
      (lambda x: x.update(num_images=7), 'num_images is 7; needed: 6'),
      (lambda x: x.update(num_damaged=0), 'num_damaged is 0; needed: 1'),
      (lambda x: x.update(damaged=['five']), 'name and reason'),
      (lambda x: x.update(summary={}), 'summary is {}; needed: an object'),
      (lambda x: x['summary'].update(usage='all'), 'with the numbers'),
      (lambda x: x['source'].update(num_examples=8), 'needed: 8'),
      (lambda x: x['source'].update(num_examples=10**15), 'shards; needed'),
      (lambda x: x['shards'].pop(), '2 shards; needed: 3'),
      (lambda x: x['shards'].reverse(), 'files is'),
      (lambda x: x['shards'][0].update(file='../x'), 'files is'),
      (lambda x: x['shards'][0].update(num_bytes=-1), 'shards[0].num_bytes'),
      (lambda x: x['shards'][0].update(num_images=2.0), 'num_images is 2.0'),
      (lambda x: x['shards'].insert(0, 3), 'shards[0] is 3'),
      (lambda x: x.update(grid=[4, 3, 1]), 'grid is'),
      (lambda x: x.update(grid=[3, 4]), 'its manifest says (3, 4)'),
      (lambda x: x.update(batch_size=True), 'batch_size is True'),
      (lambda x: x.update(num_damaged=True), 'num_damaged is True'),
      (lambda x: x.update(label_names=[1]), 'label_names is [1]'),
  ])  # fmt: skip


def test_folders_without_a_whole_manifest_are_refused(tmp_path):
  assert 'manifest.json is missing' in _refuse_to_read(tmp_path)
  writers.TokenWriter(tmp_path / 'x', _job())
  assert 'unfinished; run the same' in _refuse_to_read(tmp_path / 'x')
  for text in ('', '{"format": ', '[' * 10**5, '3', '[]', '\xff'):
    (tmp_path / 'manifest.json').write_text(text, encoding='latin-1')
    assert 'manifest.json' in _refuse_to_read(tmp_path)


def _foreign_examples(case, job):
  """Examples of another kind than the job's, and the job they are of."""
  examples = _examples(job, 3)
  if case == 'above the range':
    examples[1].tokens[2, 1] = 200
  elif case == 'fewer images':
    examples.pop()
  elif case == 'another grid':
    examples[1] = examples[1]._replace(tokens=examples[1].tokens.T)
  elif case == 'no tokens':
    examples[1] = examples[1]._replace(tokens=examples[1].tokens[:0])
  elif case == 'another dtype':
    job = _job(job.storage, _QUANTIZERS['int32'])
  elif case == 'another index shape':
    job = _job(job.storage, _QUANTIZERS['grouped'])
    examples = _examples(job, 3)
  elif case == 'another storage':
    job = _job({'npz': 'array_record', 'array_record': 'npz'}[job.storage])
  return examples, job


@_STORAGES
@pytest.mark.parametrize(
    ('case', 'message'),
    [
        ('above the range', '200; allowed: 0 ... 199'),
        ('fewer images', 'has 2 images; its manifest says 3'),
        ('another grid', 'has a grid of (3, 4)'),
        ('no tokens', 'grid is (0, 3)'),
        ('another dtype', ''),
        ('another index shape', ''),
        ('another storage', ''),
    ],
)
def test_files_with_the_right_hash_are_held_to_the_manifest(
    tmp_path, storage, case, message
):
  folder = tmp_path / 'x'
  _write(folder, _job(storage))
  examples, job = _foreign_examples(case, _job(storage))
  temporary = tmp_path / f'file.{job.storage}'
  shards.write(temporary, examples, job)
  _replace_shard(
      folder, 0, lambda path: path.write_bytes(temporary.read_bytes())
  )
  answer = _refuse_to_read(folder)
  assert message in answer
  assert str(folder) in answer


def test_tokens_below_zero_are_refused(tmp_path):
  folder = tmp_path / 'x'
  job = _job(quantizer=_QUANTIZERS['int32'])
  _write(folder, job)
  examples = _examples(job, 3)
  examples[2].tokens[0, 0] = -1
  _replace_shard(folder, 0, lambda path: shards.write(path, examples, job))
  assert 'are -1 ...' in _refuse_to_read(folder)


def _write_records(*records):
  def write(path):
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for record in records:
      writer.write(record)
    writer.close()

  return write


def test_records_of_other_programs_are_refused(tmp_path):
  _write(tmp_path / 'x', _job())
  # Empty, no header, a huge header, huge and more, no grid.
  for record in (b'', b'x' * 27, b'\xff' * 28, b'\xff' * 40, b'\0' * 28):
    _replace_shard(tmp_path / 'x', 0, _write_records(record, record, record))
    assert 'record 0: ' in _refuse_to_read(tmp_path / 'x'), record


def test_arrays_of_other_programs_are_refused(tmp_path):
  folder = tmp_path / 'x'
  _write(folder, _job('npz'))
  path = folder / _file(folder, 0)
  content = path.read_bytes()
  for i, change in enumerate((
      lambda x: x.pop('name'),
      lambda x: x.update(extra=np.zeros(3)),
      lambda x: x.update(tokens=x['tokens'].astype(np.float32)),
      lambda x: x.update(tokens=x['tokens'].astype('>u2')),
      lambda x: x.update(tokens=x['tokens'][:-1]),
      lambda x: x.update(tokens=np.zeros((), np.uint16)),
      lambda x: x.update(tokens=x['tokens'][:, None]),
      lambda x: x.update(grid=x['grid'][:2]),
      lambda x: x.update(grid=x['grid'][0]),
      lambda x: x.update(grid=np.uint32(3)),
      lambda x: x.update(grid=np.full((3, 2), 2**32 - 1, np.uint32)),
      lambda x: x.update(label=x['label'].astype(np.float64)),
      lambda x: x.update(name=np.array([['a'], [{}], [1]], object)),
  )):  # fmt: skip
    path.write_bytes(content)
    with np.load(path) as file:
      arrays = {name: file[name] for name in file.files}
    change(arrays)
    _replace_shard(folder, 0, lambda path, x=arrays: np.savez(path, **x))
    assert path.name in _refuse_to_read(folder), i


@_STORAGES
def test_files_of_any_bytes_are_refused(tmp_path, storage):
  folder = tmp_path / 'x'
  _write(folder, _job(storage))
  rng = random.Random(0)
  content = (folder / _file(folder, 0)).read_bytes()
  for _ in range(60):
    changed = bytearray(content)
    # Where array_record has something, and not what fills up its blocks.
    for _ in range(rng.randrange(1, 9)):
      changed[rng.randrange(min(len(content), 1500))] = rng.randrange(256)
    del changed[rng.choice([len(changed), rng.randrange(len(changed))]) :]
    _replace_shard(folder, 0, lambda path, x=changed: path.write_bytes(x))
    # Bytes without meaning may have changed, but nothing else is let through.
    try:
      read = list(tokens.TokenSource(folder))
    except ValueError:
      continue
    _replace_shard(folder, 0, lambda path: path.write_bytes(content))
    for example, wanted in zip(
        read, tokens.TokenSource(folder), strict=True
    ):
      np.testing.assert_array_equal(example.tokens, wanted.tokens)


def test_another_dialect_or_model_is_refused(tmp_path):
  _write(tmp_path / 'x', _job())
  source = tokens.TokenSource(tmp_path / 'x')
  source.check_decodable(_FSQ.spec(), 'ab' * 32)
  paper = quantizers.FSQ((8, 5, 5), convention='paper')
  with pytest.raises(ValueError, match='convention'):
    source.check_decodable(paper.spec(), 'ab' * 32)
  with pytest.raises(ValueError, match='cdcd; decode them with'):
    source.check_decodable(_FSQ.spec(), 'cd' * 32)


def test_a_folder_of_something_else_is_not_written_into(tmp_path):
  job = _job()
  (tmp_path / 'file').write_text('x')
  with pytest.raises(ValueError, match=r"holds 'file'.*--tokens"):
    writers.TokenWriter(tmp_path, job)
  with pytest.raises(ValueError, match=r'cannot be written.*--tokens'):
    writers.TokenWriter(tmp_path / 'file', job)
  unfinished = tmp_path / 'unfinished'
  writers.TokenWriter(unfinished, job)
  finished = tmp_path / 'finished'
  _write(finished, job)
  before = _files(tmp_path)
  for folder in (unfinished, finished):
    for fields in (
        {'model_hash': 'cd' * 32}, {'images_per_shard': 4}, {'fit': 'pad'},
        {'source': {'source': 'folder', 'num_examples': 7}},
    ):  # fmt: skip
      (name,) = fields
      with pytest.raises(ValueError, match=f'(?s){name}: .* -> .*--tokens'):
        writers.TokenWriter(folder, dataclasses.replace(job, **fields))
  assert _files(tmp_path) == before
  assert writers.TokenWriter(finished, job).is_finished


# Batches.


def _source(folder, num=11, **fields):
  job = _job(
      images_per_shard=4, source={'num_examples': num}, **fields
  )
  writer = writers.TokenWriter(folder, job)
  for shard in range(job.num_shards):
    examples = _examples(job, min(4, num - 4 * shard), first=4 * shard)
    writer.write(shard, examples, damaged=[], source_bytes=None)
  writer.finish()
  return tokens.TokenSource(folder)


def _take(batches, num):
  iterator = iter(batches)
  return [next(iterator) for _ in range(num)]


def _assert_equal(left, right):
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


@_STORAGES
def test_every_epoch_has_every_image_in_another_order(tmp_path, storage):
  source = _source(tmp_path / 'x', storage=storage)
  dataset = tokens.build_dataset(source, batch_size=4, seed=0)
  batches = _take(dataset, 11)
  assert batches[0]['tokens'].shape == (4, 4, 3)
  assert batches[0]['tokens'].dtype == np.int32
  assert batches[0]['label'].dtype == batches[0]['index'].dtype == np.int64
  for batch in batches:
    columns = (batch[key] for key in ('tokens', 'label', 'index'))
    for x, label, index in zip(*columns, strict=True):
      np.testing.assert_array_equal(x, source[index].tokens)
      assert label == source[index].label
  order = np.concatenate([batch['index'] for batch in batches]).reshape(4, 11)
  assert {tuple(sorted(epoch)) for epoch in order} == {tuple(range(11))}
  assert len({tuple(epoch) for epoch in order}) == 4
  again = tokens.build_dataset(source, batch_size=4, seed=0, num_threads=5)
  _assert_equal(batches, _take(again, 11))
  other = _take(tokens.build_dataset(source, batch_size=4, seed=1), 11)
  assert any(
      np.any(a['index'] != b['index'])
      for a, b in zip(batches, other, strict=True)
  )


def test_a_restored_iterator_goes_on_within_an_epoch(tmp_path):
  dataset = tokens.build_dataset(
      _source(tmp_path / 'x'), batch_size=4, seed=0
  )
  straight = _take(dataset, 9)
  iterator = dataset.iterator()
  for _ in range(4):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  restored = dataset.iterator()
  next(restored)
  restored.set_state(state)
  _assert_equal(straight[4:], [next(restored) for _ in range(5)])


def test_batches_of_one_and_of_more_than_there_are(tmp_path, caplog):
  source = _source(tmp_path / 'x', num=3)

  def order(batch_size, num):
    batches = _take(
        tokens.build_dataset(source, batch_size=batch_size, seed=0), num
    )
    return np.concatenate([batch['index'] for batch in batches]).tolist()

  expected = order(3, 4)
  assert order(1, 12) == expected
  assert not caplog.messages
  assert order(4, 3) == expected
  assert 'batch_size is 4, but there are 3 images' in caplog.text


def test_processes_share_each_batch(tmp_path):
  source = _source(tmp_path / 'x')
  whole = _take(tokens.build_dataset(source, batch_size=4, seed=0), 6)
  parts = [
      _take(
          tokens.build_dataset(
              source, batch_size=4, seed=0, process_index=i, process_count=2
          ),
          6,
      )
      for i in range(2)
  ]
  for batch, *shares in zip(whole, *parts, strict=True):
    for i, share in enumerate(shares):
      np.testing.assert_array_equal(share['tokens'], batch['tokens'][i::2])


@_STORAGES
def test_a_source_goes_to_other_processes(tmp_path, storage):
  job = _job(storage)
  _write(tmp_path / 'x', job)
  source = tokens.TokenSource(tmp_path / 'x')
  first = source[0]  # Its file is open.
  copy = pickle.loads(pickle.dumps(source))
  assert len(copy) == len(source)
  for left, right in ((copy[0], first), (copy[-1], source[-1])):
    np.testing.assert_array_equal(left.tokens, right.tokens)
    assert left[1:] == right[1:]


def test_fingerprints_tell_other_tokens(tmp_path):
  source = _source(tmp_path / 'x')
  dataset = tokens.build_dataset(source, batch_size=4, seed=0)
  saved = json.loads(json.dumps(dataset.fingerprint))
  same = tokens.build_dataset(
      source, batch_size=4, seed=0, process_index=1, process_count=2
  )
  data.check_fingerprint(saved, same.fingerprint)
  for other in (
      tokens.build_dataset(source, batch_size=4, seed=1),
      tokens.build_dataset(source, batch_size=2, seed=0),
      tokens.build_dataset(
          _source(tmp_path / 'y', num=10), batch_size=4, seed=0
      ),
  ):
    with pytest.raises(ValueError, match='saved -> current'):
      data.check_fingerprint(saved, other.fingerprint)


def test_batches_that_cannot_be_are_refused(tmp_path):
  source = _source(tmp_path / 'x')
  for fields, message in (
      ({'batch_size': 0}, 'batch_size is 0'),
      ({'batch_size': 3, 'process_count': 2}, 'multiple of the 2'),
      ({'batch_size': 2, 'process_index': 1}, 'counts from 0'),
  ):
    with pytest.raises(ValueError, match=message):
      tokens.build_dataset(source, seed=0, **fields)
