"""Grids of images as PNG files: reconstructions, samples, completions.

A grid has the channels C of its images: 1 (grey), 3 (RGB) or 4 (RGBA).
"""

from collections.abc import Sequence
import io
import math
import os

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from fsq_jax.data import pixel_formats
from fsq_jax.workdir import files as workdirs

# Pixels: approximate widths of a grid, a contact sheet and a pair, margin of
# labels, gaps between images and between blocks of rows, height of a caption,
# widest name of a class.
_GRID_WIDTH = 1200
_SHEET_WIDTH = 800
_PAIR_WIDTH = 1000
_MARGIN = 22
_GAP = 3
_BLOCK_GAP = 14
_CAPTION = 17
_MAX_NAME = 160
_MAX_ENLARGEMENT = 8
_MAX_COLUMNS = 8
_FONT_SIZE = 13
_WHITE, _TEXT, _UNKNOWN = 255, 100, 128
# Text is opaque: alpha stays as in the background.
_COLOURS = slice(3)
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
    originals: [B, H, W, C] uint8.
    reconstructions: same shape and dtype.
    columns: images per row; None for as many as the width allows.
    width: approximate width of the result in pixels.

  Returns:
    [height, width, C] uint8; small images are enlarged by an integer factor.

  Raises:
    ValueError: unequal shapes, no images, or another dtype.
  """
  rows = [('original', originals), ('reconstruction', reconstructions)]
  return _stack('reconstruction_grid', rows, columns=columns, width=width)


def contact_sheet(
    images: np.ndarray,
    labels: np.ndarray,
    label_names: Sequence[str],
    *,
    max_columns: int = _MAX_COLUMNS,
    width: int = _SHEET_WIDTH,
) -> np.ndarray:
  """Arranges images in one row per class, with its name at the left.

  Args:
    images: [B, H, W, C] uint8.
    labels: [B] integers; -1 for no class: these images fill rows of their own,
      after those of the classes.
    label_names: name of each class; classes beyond have their number.
    max_columns: images per row; further images of a class are left out.
    width: approximate width of the result in pixels.

  Returns:
    [height, width, C] uint8; small images are enlarged by an integer factor.

  Raises:
    ValueError: labels of another shape, no images, or another dtype.
  """
  (images,) = _checked('contact_sheet', images)
  labels = np.asarray(labels)
  if labels.shape != images.shape[:1]:
    raise ValueError(
        f'contact_sheet got labels of shape {labels.shape} for'
        f' {len(images)} images; give one label per image, -1 for no class.'
    )
  rows = [
      (
          label_names[label] if label < len(label_names) else str(label),
          images[labels == label][:max_columns],
      )
      for label in np.unique(labels[labels >= 0])
  ]
  rest = images[labels < 0]
  rows += [
      ('', rest[start : start + max_columns])
      for start in range(0, len(rest), max_columns)
  ]
  columns = max(len(row) for _, row in rows)
  margin = max(_text_width(_shorten(name)) for name, _ in rows)
  margin += 2 * _GAP if margin else 0
  scale, height, image_width = _cell(images, (width - margin) // columns)
  sheet = np.full(
      (
          len(rows) * (height + _GAP) - _GAP,
          margin + columns * (image_width + _GAP) - _GAP,
          images.shape[3],
      ),
      _WHITE,
      np.uint8,
  )
  for i, (name, row) in enumerate(rows):
    top = i * (height + _GAP)
    if name:
      sheet[top : top + height, :margin, _COLOURS] = draw_text(
          _shorten(name), height, margin
      )
    for column, image in enumerate(_enlarge(row, scale)):
      left = margin + column * (image_width + _GAP)
      sheet[top : top + height, left : left + image_width] = image
  return sheet


def inpainting_sheet(
    originals: np.ndarray, masked: np.ndarray, completions: np.ndarray
) -> np.ndarray:
  """Arranges columns of an original, its given part and its completions.

  Args:
    originals: [B, H, W, C] uint8.
    masked: [B, h, w] bool, the unknown tokens (or pixels), grey in the given
      part; h and w divide H and W.
    completions: [B, k, H, W, C] uint8.

  Returns:
    [height, width, C] uint8; small images are enlarged by an integer factor.

  Raises:
    ValueError: shapes that do not match, no images, or another dtype.
  """
  originals = np.asarray(originals)
  masked, completions = np.asarray(masked, bool), np.asarray(completions)
  size, grid = originals.shape[1:3], masked.shape[1:]
  if (
      masked.ndim != 3
      or completions.ndim != 5
      or len(masked) != len(originals)
      or any(side % cells for side, cells in zip(size, grid, strict=True))
  ):
    raise ValueError(
        f'inpainting_sheet got shapes {originals.shape}, {masked.shape} and'
        f' {completions.shape}; give originals [B, H, W, C], masked [B, h, w]'
        ' whose h and w divide H and W, and completions [B, k, H, W, C].'
    )
  for axis in (1, 2):
    masked = masked.repeat(size[axis - 1] // grid[axis - 1], axis=axis)
  given = np.where(masked[..., None], np.uint8(_UNKNOWN), originals)
  rows = [('original', originals), ('given', given)]
  rows += [
      ('completion', completions[:, i]) for i in range(completions.shape[1])
  ]
  return _stack('inpainting_sheet', rows)


def nearest_sheet(
    samples: np.ndarray, neighbours: np.ndarray, distances: np.ndarray
) -> np.ndarray:
  """Arranges samples above their nearest training images.

  Args:
    samples: [B, H, W, C] uint8.
    neighbours: same shape and dtype, the nearest training image of each.
    distances: [B] between the two, printed below.

  Returns:
    [height, width, C] uint8; small images are enlarged by an integer factor.

  Raises:
    ValueError: unequal shapes, no images, or another dtype.
  """
  captions = [f'{distance:.2f}' for distance in distances]
  if len(captions) != len(samples):
    raise ValueError(
        f'nearest_sheet got {len(captions)} distances for {len(samples)}'
        ' samples; give one each.'
    )
  rows = [('sample', samples), ('nearest', neighbours)]
  return _stack('nearest_sheet', rows, captions=captions)


def side_by_side(
    left: np.ndarray, right: np.ndarray, *, captions: tuple[str, str]
) -> np.ndarray:
  """Puts two images next to each other, each under its caption.

  Args:
    left: [H, W, C] uint8.
    right: same shape and dtype.
    captions: of the left and the right image; cut where an image is narrower.

  Returns:
    [height, width, C] uint8; small images are enlarged by an integer factor.

  Raises:
    ValueError: unequal shapes, no pixels, or another dtype.
  """
  images = np.stack(_checked('side_by_side', left[None], right[None]))[:, 0]
  scale, height, width = _cell(images, _PAIR_WIDTH // 2)
  shape = _CAPTION + height, 2 * width + _BLOCK_GAP, images.shape[3]
  pair = np.full(shape, _WHITE, np.uint8)
  enlarged = _enlarge(images, scale)
  for start, image, text in zip(
      (0, width + _BLOCK_GAP), enlarged, captions, strict=True
  ):
    pair[:_CAPTION, start : start + width, _COLOURS] = draw_text(
        text, _CAPTION, width
    )
    pair[_CAPTION:, start : start + width] = image
  return pair


def save_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
  """Writes [H, W, C] uint8 as a PNG, atomically."""
  file = io.BytesIO()
  pixel_formats.to_pillow(np.asarray(image)).save(
      file, 'png', compress_level=_COMPRESS_LEVEL
  )
  if not workdirs.is_remote(path):
    os.makedirs(os.path.dirname(os.fspath(path)) or '.', exist_ok=True)
  workdirs.write_bytes(path, file.getvalue())


def _stack(
    function: str,
    rows: Sequence[tuple[str, np.ndarray]],
    *,
    captions: Sequence[str] = (),
    columns: int | None = None,
    width: int = _GRID_WIDTH,
) -> np.ndarray:
  """Stacks image i of each row in column i; wraps into blocks of such rows.

  Args:
    function: name of the caller, for messages.
    rows: label at the left and [B, H, W, C] uint8 images of each row.
    captions: text below the stack of each i, none or [B].
    columns: stacks per block; None for as many as the width allows.
    width: approximate width of the result in pixels.
  """
  stacks = _checked(function, *(images for _, images in rows))
  num, _, image_width, channels = stacks[0].shape
  columns = columns or max(1, min(_MAX_COLUMNS, num, width // image_width))
  scale, height, image_width = _cell(stacks[0], width // columns)
  block_height = len(rows) * (height + _GAP) - _GAP + _BLOCK_GAP
  if captions:
    block_height += _CAPTION
  grid = np.full(
      (
          math.ceil(num / columns) * block_height - _BLOCK_GAP,
          _MARGIN + columns * (image_width + _GAP) - _GAP,
          channels,
      ),
      _WHITE,
      np.uint8,
  )
  for side, ((label, _), images) in enumerate(zip(rows, stacks, strict=True)):
    label = np.rot90(draw_text(label, _MARGIN, height))
    for i, image in enumerate(_enlarge(images, scale)):
      top = i // columns * block_height + side * (height + _GAP)
      left = _MARGIN + i % columns * (image_width + _GAP)
      grid[top : top + height, left : left + image_width] = image
      grid[top : top + height, :_MARGIN, _COLOURS] = label
  for i, caption in enumerate(captions):
    bottom = (i // columns + 1) * block_height - _BLOCK_GAP
    left = _MARGIN + i % columns * (image_width + _GAP)
    grid[
        bottom - _CAPTION : bottom, left : left + image_width, _COLOURS
    ] = draw_text(caption, _CAPTION, image_width)
  return grid


def _checked(function: str, *stacks: np.ndarray) -> list[np.ndarray]:
  """Returns arrays of one shape [B, H, W, C], uint8; raises for others."""
  stacks = [np.asarray(images) for images in stacks]
  shapes = [images.shape for images in stacks]
  if len(set(shapes)) > 1 or len(shapes[0]) != 4 or 0 in shapes[0]:
    raise ValueError(
        f'{function} got images of shapes {", ".join(map(str, shapes))}; give'
        ' equal shapes [B, H, W, C] of at least one image.'
    )
  if any(images.dtype != np.uint8 for images in stacks):
    dtypes = ', '.join(str(images.dtype) for images in stacks)
    raise ValueError(
        f'{function} got {dtypes} images; give uint8 (metrics.to_uint8'
        ' converts).'
    )
  return stacks


def _cell(images: np.ndarray, width: int) -> tuple[int, int, int]:
  """Returns enlargement, height and width of images in cells of a width."""
  scale = max(1, min(_MAX_ENLARGEMENT, width // images.shape[2]))
  return scale, scale * images.shape[1], scale * images.shape[2]


def _enlarge(images: np.ndarray, scale: int) -> np.ndarray:
  return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _shorten(text: str) -> str:
  """Returns a text that is at most _MAX_NAME pixels wide."""
  if _text_width(text) <= _MAX_NAME:
    return text
  while _text_width(f'{text}...') > _MAX_NAME:
    text = text[:-1]
  return f'{text}...'


def _text_width(text: str) -> int:
  return math.ceil(PIL.ImageFont.load_default(_FONT_SIZE).getlength(text))


def draw_text(text: str, height: int, width: int) -> np.ndarray:
  """Returns [height, width, 1] uint8 with centered text."""
  image = PIL.Image.new('L', (width, height), _WHITE)
  font = PIL.ImageFont.load_default(_FONT_SIZE)
  middle = width / 2, height / 2
  PIL.ImageDraw.Draw(image).text(middle, text, _TEXT, font, anchor='mm')
  return np.asarray(image)[..., None]
