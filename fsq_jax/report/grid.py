"""Grids of originals over reconstructions as PNG files."""

import io
import math
import os

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from fsq_jax.workdir import files as workdirs

# Pixels: approximate width of a grid, largest enlargement of images, margin of
# labels, gaps between images and between pairs of rows.
_GRID_WIDTH = 1200
_MAX_ENLARGEMENT = 8
_MARGIN = 22
_GAP = 3
_PAIR_GAP = 14
# Three times as fast as PNG's usual 6, for files 7 % larger.
_COMPRESS_LEVEL = 3


def reconstruction_grid(
    originals: np.ndarray,
    reconstructions: np.ndarray,
    *,
    columns: int | None = None,
    width: int = _GRID_WIDTH,
) -> np.ndarray:
  """Arranges rows of originals above rows of their reconstructions.

  Args:
    originals: [B, H, W, 3] uint8.
    reconstructions: same shape and dtype.
    columns: images per row; None for as many as the width allows.
    width: approximate width of the result in pixels.

  Returns:
    [height, width, 3] uint8; small images are enlarged by an integer factor.
  """
  pair = np.asarray(originals), np.asarray(reconstructions)
  if pair[0].shape != pair[1].shape or pair[0].ndim != 4 or not pair[0].size:
    raise ValueError(
        f'reconstruction_grid got shapes {pair[0].shape} and {pair[1].shape};'
        ' give two equal shapes [B, H, W, 3] of at least one image.'
    )
  if pair[0].dtype != np.uint8 or pair[1].dtype != np.uint8:
    raise ValueError(
        f'reconstruction_grid got {pair[0].dtype} and {pair[1].dtype}; give'
        ' uint8 (metrics.to_uint8 converts).'
    )
  num, height, image_width, _ = pair[0].shape
  columns = columns or max(1, min(8, num, width // image_width))
  scale = width // (columns * image_width)
  scale = max(1, min(_MAX_ENLARGEMENT, scale))
  height, image_width = scale * height, scale * image_width
  num_pairs = math.ceil(num / columns)
  pair_height = 2 * height + _GAP + _PAIR_GAP
  shape = (
      num_pairs * pair_height - _PAIR_GAP,
      _MARGIN + columns * (image_width + _GAP) - _GAP,
      3,
  )
  grid = np.full(shape, 255, np.uint8)
  for side, (label, images) in enumerate(
      zip(('original', 'reconstruction'), pair, strict=True)
  ):
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    label = _vertical_label(label, height)
    for i in range(num):
      top = i // columns * pair_height + side * (height + _GAP)
      left = _MARGIN + i % columns * (image_width + _GAP)
      grid[top : top + height, left : left + image_width] = images[i]
      grid[top : top + height, :_MARGIN] = label
  return grid


def save_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
  """Writes [H, W, 3] uint8 as a PNG, atomically."""
  file = io.BytesIO()
  PIL.Image.fromarray(np.asarray(image)).save(
      file, 'png', compress_level=_COMPRESS_LEVEL
  )
  os.makedirs(os.path.dirname(os.fspath(path)) or '.', exist_ok=True)
  workdirs.write_bytes(path, file.getvalue())


def _vertical_label(text: str, height: int) -> np.ndarray:
  """Returns [height, _MARGIN, 1] uint8 with centered text, read upwards."""
  label = PIL.Image.new('L', (height, _MARGIN), 255)
  font = PIL.ImageFont.load_default(13)
  middle = height / 2, _MARGIN / 2
  PIL.ImageDraw.Draw(label).text(middle, text, 100, font, anchor='mm')
  return np.asarray(label.transpose(PIL.Image.Transpose.ROTATE_90))[..., None]
