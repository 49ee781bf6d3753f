"""Batches of few shapes: their sizes, what fills them, tiles put together."""

import jax
import numpy as np
import pytest

from fsq_jax.runtime import batching
from fsq_jax.runtime import partitioning


def _batcher(batch_size, num_devices=1, **kwargs):
  mesh = partitioning.create_mesh(
      {'data': -1, 'fsdp': 1}, jax.devices()[:num_devices]
  )
  return batching.Batcher(mesh, batch_size, **kwargs)


def test_batches_have_few_sizes():
  # (devices, batch_size, fill, split, elements, their side) to sizes.
  cases = {
      (1, 16, 'power', True, 1, 16): [1],
      (1, 16, 'power', True, 3, 16): [4],
      (1, 16, 'power', True, 16, 16): [16],
      (1, 16, 'power', True, 17, 16): [16, 16],
      (1, 16, 'power', True, 45, 8): [16] * 3,
      # Elements with four times the pixels: a quarter of the batch size.
      (1, 16, 'power', True, 9, 32): [4] * 3,
      (1, 16, 'power', True, 3, 1024): [1] * 3,
      (4, 13, 'power', True, 1, 16): [4],
      (4, 13, 'power', True, 9, 16): [16],
      (4, 13, 'power', True, 9, 32): [4] * 3,
      (4, 13, 'power', True, 9, 1024): [4] * 3,
      (4, 13, 'batch', True, 1, 16): [16],
      (4, 13, 'batch', False, 14, 16): [13, 13],
      (4, 8, 'none', False, 21, 16): [8, 8, 4, 1],
      (1, 1, 'none', False, 2, 16): [1, 1],
  }
  given = {}
  for case in cases:
    num_devices, batch_size, fill, split, num, side = case
    x = np.zeros((num, side, side), np.uint8)
    x[:, 0, 0] = np.arange(num)
    seen = []

    def function(batch, seen=seen):
      seen.append(len(batch))
      batch = np.asarray(batch)
      return batch[:, 0, 0], {'twice': 2 * batch[:, 0]}

    batcher = _batcher(batch_size, num_devices, fill=fill, split=split)
    first, rest = batcher.map(function, x, (16, 16))
    np.testing.assert_array_equal(first, np.arange(num))
    np.testing.assert_array_equal(rest['twice'], 2 * x[:, 0])
    given[case] = seen
  assert given == cases


def test_batches_are_split_over_the_devices_or_replicated():
  x = np.zeros((8, 3), np.float32)
  for split, shape in ((True, (2, 3)), (False, (8, 3))):
    placed = _batcher(8, 4, split=split).put(x)
    assert {s.data.shape for s in placed.addressable_shards} == {shape}
    assert len(placed.addressable_shards) == 4


def test_tiles_stay_where_they_are():
  x = np.arange(2 * 6 * 12 * 3, dtype=np.int32).reshape(2, 6, 12, 3)

  def function(tiles):
    assert tiles.shape[1:] == (3, 4, 3)
    tiles = np.asarray(tiles)
    return -tiles, tiles[:, :1, ::2], tiles.max(axis=(1, 2, 3))

  for fill, split in (('power', True), ('none', False)):
    negative, halves, largest = _batcher(5, fill=fill, split=split).map_tiles(
        function, x, (3, 4)
    )
    np.testing.assert_array_equal(negative, -x)
    np.testing.assert_array_equal(halves, x[:, ::3, ::2])
    ends = x[:, 2::3, 3::4, 2]
    np.testing.assert_array_equal(largest, ends.ravel())


def test_wrong_arguments_are_refused(monkeypatch):
  for batch_size in (0, -1, True, 1.5, '8', None):
    with pytest.raises(ValueError, match=r'^batch_size is .*; use an integer'):
      _batcher(batch_size)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with pytest.raises(ValueError, match='local_devices'):
    _batcher(8)
  _batcher(8, split=False)
