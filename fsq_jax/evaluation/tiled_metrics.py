"""Image metrics of one image of any size, computed tile by tile."""

from collections.abc import Iterator
import math

import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.evaluation import image_metrics as image_metrics_lib

# Smallest and largest side of tiles in pixels, powers of 2.
_MIN_TILE = 16
MAX_TILE = 256
# Rows and columns that a tile shares with the next one: windows of SSIM that
# begin in a tile extend so far beyond it.
_OVERLAP = 10
_WINDOWS = {
    'ssim': image_metrics_lib.ssim_map,
    'ssim_uniform': image_metrics_lib.ssim_uniform_map,
}


def image_metrics(
    original: np.ndarray, reconstruction: np.ndarray
) -> dict[str, float]:
  """Returns the metrics of `image_metrics.image_metrics` for one image.

  Sums over tiles are added in float64. Tiles have few shapes, so that images of
  many sizes need few compiled functions.

  Args:
    original: [H, W, C] uint8 on the host.
    reconstruction: like `original`.

  Returns:
    name -> value, for the names of `image_metrics.IMAGE_METRICS` that are
    defined for images of this size.
  """
  size = original.shape[:2]
  sums = {'squared': 0.0, 'absolute': 0.0, 'different': 0.0}
  sums |= {name: 0.0 for name in _WINDOWS}
  for rows, columns in _tiles(size):
    pair = [_cut(x, rows, columns) for x in (original, reconstruction)]
    own = rows.stop - rows.start, columns.stop - columns.start
    left = size[0] - rows.start, size[1] - columns.start
    values = _sum_tile(*pair, np.int32(own), np.int32(left))
    for name, value in jax.device_get(values).items():
      sums[name] += float(np.sum(value, dtype=np.float64))
  num = math.prod(original.shape)
  mse = sums['squared'] / num / 255**2
  values = {
      'psnr': -10
      * math.log10(max(mse, 10 ** (-image_metrics_lib.PSNR_CAP / 10))),
      'l1': sums['absolute'] / num / 255,
      'mse': mse,
      'identical': float(not sums['different']),
  }
  for name in _WINDOWS:
    min_side = image_metrics_lib.IMAGE_METRICS[name][1]
    if min(size) >= min_side:
      num_windows = math.prod(side - min_side + 1 for side in size)
      values[name] = sums[name] / (num_windows * original.shape[2])
  return values


def _tiles(size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
  """Yields the rows and the columns of each tile, without shared ones."""
  step = MAX_TILE - _OVERLAP
  for row in range(0, size[0], step):
    for column in range(0, size[1], step):
      yield (
          slice(row, min(row + step, size[0])),
          slice(column, min(column + step, size[1])),
      )


def _cut(image: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
  """Returns a tile with shared pixels, padded to powers of 2: [1, h, w, C]."""
  tile = image[
      rows.start : rows.stop + _OVERLAP, columns.start : columns.stop + _OVERLAP
  ]
  padding = [
      (0, max(_MIN_TILE, 2 ** (side - 1).bit_length()) - side)
      for side in tile.shape[:2]
  ]
  return np.pad(tile, (*padding, (0, 0)))[None]


@jax.jit
def _sum_tile(originals, reconstructions, own, left) -> dict[str, jax.Array]:
  """Sums over each row of a tile: [h] int32, for windows float32.

  Args:
    originals: [1, h, w, C] uint8.
    reconstructions: like `originals`.
    own: [2] int32, rows and columns of the tile without shared ones.
    left: [2] int32, rows and columns from the tile's start to the image's end.
  """
  error = originals.astype(jnp.int32) - reconstructions.astype(jnp.int32)
  error = jnp.where(_mask(error, own), error, 0)
  sums = {
      'squared': error**2, 'absolute': jnp.abs(error), 'different': error != 0
  }
  for name, function in _WINDOWS.items():
    values = function(originals, reconstructions)
    num = jnp.minimum(own, left - image_metrics_lib.IMAGE_METRICS[name][1] + 1)
    sums[name] = jnp.where(_mask(values, num), values, 0)
  return {name: jnp.sum(x, axis=(0, 2, 3)) for name, x in sums.items()}


def _mask(values: jax.Array, num: jax.Array) -> jax.Array:
  """Whether values [1, h, w, C] are within the first [rows, columns] = num."""
  _, height, width, _ = values.shape
  rows = jnp.arange(height) < num[0]
  columns = jnp.arange(width) < num[1]
  return rows[None, :, None, None] & columns[None, None, :, None]
