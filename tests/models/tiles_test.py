"""Blended tiles: the identity stays one, weights against NumPy, tile counts."""

import jax
import numpy as np
import pytest

from fsq_jax.models import tiles
from fsq_jax.runtime import batching
from fsq_jax.runtime import partitioning


@pytest.fixture(scope='module')
def batcher():
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  return batching.Batcher(mesh, 4)


def _images(num, height, width):
  rng = np.random.default_rng(height + 100 * width)
  return rng.integers(0, 256, (num, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ('size', 'tile'),
    [
        ((8, 6), (8, 6)), ((16, 24), (8, 6)), ((17, 8), (8, 6)),
        ((9, 11), (5, 3)), ((4, 5), (1, 1)),
    ],
)
def test_the_identity_stays_the_identity(batcher, size, tile):
  images, seen = _images(2, *size), []

  def function(batch):
    seen.append(batch.shape)
    return batch

  blended = tiles.blend(function, images, tile, batcher)
  np.testing.assert_array_equal(blended, images)
  assert {shape[1:3] for shape in seen} == {tile}
  # One batch, filled up to a power of 2, or several per row of tiles.
  rows = len({*range(0, size[0] - tile[0], max(tile[0] // 2, 1))}) + 1
  num = tiles.num_overlapping(size, tile)
  assert sum(shape[0] for shape in seen) >= 2 * num
  assert num % rows == 0


def test_pixels_are_averages_by_a_window(batcher):
  """Against a weighted mean in float64, of tiles of one colour each."""
  images = _images(1, 12, 18)

  def function(batch):
    batch = np.asarray(batch)
    return np.broadcast_to(batch[:, :1, :1], batch.shape)

  blended = tiles.blend(function, images, (8, 6), batcher)
  windows = [
      np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in (8, 6)
  ]
  window = np.outer(*windows)[..., None]
  sums, weights = np.zeros((12, 18, 3)), np.zeros((12, 18, 1))
  # Half-tile steps of 4 and 3 pixels.
  for top in (0, 4):
    for left in (0, 3, 6, 9, 12):
      sums[top : top + 8, left : left + 6] += window * images[0, top, left]
      weights[top : top + 8, left : left + 6] += window
  assert tiles.num_overlapping((12, 18), (8, 6)) == 10
  # Away from the border the windows add up to 1.
  np.testing.assert_allclose(weights[4:8, 3:-3], 1)
  assert np.max(np.abs(blended[0] - sums / weights)) <= 0.501


def test_unknown_tiles_are_named():
  with pytest.raises(ValueError, match=r"'none'; allowed: .*'overlapping'"):
    tiles.check_tiles('none')
