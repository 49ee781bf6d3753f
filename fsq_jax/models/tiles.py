"""Tiles that overlap by half, whose images are blended by a window.

Images of disjoint tiles differ at the tiles' borders, where they show as seams.
"""

from collections.abc import Callable
from typing import Any

from einops import rearrange
import numpy as np

from fsq_jax.runtime import batching

# 'disjoint': tiles side by side, each encoded and decoded by itself.
# 'blended': the tokens of disjoint tiles, decoded in tiles of the token grid
# that overlap by half; images are blended. A decoded tile may hold tokens of up
# to four encoded tiles.
# 'overlapping': tiles of the image that overlap by half, each encoded and
# decoded by itself; images are blended. Up to four times as many tokens.
TILES = ('disjoint', 'blended', 'overlapping')


def check_tiles(tiles: str, allowed: tuple[str, ...] = TILES) -> None:
  """Raises ValueError unless `tiles` is one of the allowed kinds."""
  if tiles not in allowed:
    raise ValueError(f'tiles is {tiles!r}; allowed: {list(allowed)}.')


def num_overlapping(size: tuple[int, int], tile: tuple[int, int]) -> int:
  """Returns the number of overlapping tiles of an image; sides as `tile`."""
  rows, columns = map(_starts, size, tile)
  return len(rows) * len(columns)


def blend(
    function: Callable[[Any], Any],
    x: np.ndarray,
    tile: tuple[int, int],
    tile_size: tuple[int, int],
    batcher: batching.Batcher,
) -> np.ndarray:
  """Applies a function to tiles that overlap by half and blends the images.

  Pixels are averages, weighted by a Hann window over each tile; the windows of
  tiles at half-tile steps add up to 1. The last tile of a row or column ends at
  the border of the array. One row of tiles is in memory at a time, and sums in
  float32.

  Args:
    function: from tiles [b, *tile, ...] to images [b, *tile_size, 3] uint8.
    x: [B, H, W, ...] images or tokens, each side at least that of a tile.
    tile: (height, width).
    tile_size: (height, width) in pixels of the image of a tile, multiples of
      `tile`.
    batcher: splits rows of tiles into batches.

  Returns:
    [B, H * tile_size[0] / tile[0], W * tile_size[1] / tile[1], 3] uint8.
  """
  rows, columns = map(_starts, x.shape[1:3], tile)
  scale = np.floor_divide(tile_size, tile)
  height, width = np.multiply(x.shape[1:3], scale)
  sums = np.zeros((len(x), height, width, 3), np.float32)
  weights = np.zeros((height, width, 1), np.float32)
  window = _hann(tile_size[0])[:, None, None] * _hann(tile_size[1])[:, None]
  for row in rows:
    cut = [
        x[:, row : row + tile[0], column : column + tile[1]]
        for column in columns
    ]
    images = batcher.map(function, np.concatenate(cut))
    images = rearrange(images, '(n b) ... -> n b ...', b=len(x))
    for column, image in zip(columns, images, strict=True):
      top, left = np.multiply((row, column), scale)
      place = np.s_[top : top + tile_size[0], left : left + tile_size[1]]
      sums[:, *place] += window * image
      weights[place] += window
  np.rint(np.divide(sums, weights, out=sums), out=sums)
  return sums.astype(np.uint8)


def _starts(side: int, tile: int) -> list[int]:
  """Returns the first row, or column, of each tile."""
  return [*range(0, side - tile, max(tile // 2, 1)), side - tile]


def _hann(length: int) -> np.ndarray:
  """Returns [length] float32 > 0: sin^2 at the centres of the pixels."""
  phase = np.pi * (np.arange(length) + 0.5) / length
  return np.sin(phase, dtype=np.float32) ** 2
