"""Tiles that overlap by half, whose images are blended by a window.

Images of disjoint tiles differ at the tiles' borders, where they show as seams.
"""

from collections.abc import Callable
from typing import Any

from einops import rearrange
import numpy as np

from fsq_jax.runtime import batching

# 'disjoint': tiles side by side, each encoded and decoded by itself.
# 'overlapping': tiles of the image that overlap by half, each encoded and
# decoded by itself; images are blended. Up to four times as many tokens.
TILES = ('disjoint', 'overlapping')


def check_tiles(tiles: str) -> None:
  """Raises ValueError unless `tiles` is one of the kinds."""
  if tiles not in TILES:
    raise ValueError(f'tiles is {tiles!r}; allowed: {list(TILES)}.')


def num_overlapping(size: tuple[int, int], tile: tuple[int, int]) -> int:
  """Returns the number of overlapping tiles of an image; sides as `tile`."""
  rows, columns = map(_starts, size, tile)
  return len(rows) * len(columns)


def blend(
    function: Callable[[Any], Any],
    images: np.ndarray,
    tile: tuple[int, int],
    batcher: batching.Batcher,
) -> np.ndarray:
  """Applies a function to tiles that overlap by half and blends its images.

  Pixels are averages, weighted by a Hann window over each tile; the windows of
  tiles at half-tile steps add up to 1. The last tile of a row or column ends at
  the border of the image. One row of tiles is in memory at a time, and sums in
  float32.

  Args:
    function: from tiles [b, *tile, 3] uint8 to images of the same shape and
      dtype.
    images: [B, H, W, C] uint8, each side at least that of a tile.
    tile: (height, width).
    batcher: splits rows of tiles into batches.

  Returns:
    The same shape and dtype.
  """
  rows, columns = map(_starts, images.shape[1:3], tile)
  sums = np.zeros(images.shape, np.float32)
  weights = np.zeros((*images.shape[1:3], 1), np.float32)
  window = _hann(tile[0])[:, None, None] * _hann(tile[1])[:, None]
  for row in rows:
    places = [
        np.s_[row : row + tile[0], column : column + tile[1]]
        for column in columns
    ]
    outputs = batcher.map(
        function, np.concatenate([images[:, *place] for place in places])
    )
    outputs = rearrange(outputs, '(n b) ... -> n b ...', b=len(images))
    for place, output in zip(places, outputs, strict=True):
      sums[:, *place] += window * output
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
