"""Crops, resizes and flips of one image, in NumPy.

All resizing is Pillow's bicubic kernel, which is antialiased when it shrinks;
KERNEL names it wherever a number depends on it. Colours of RGBA are multiplied
by alpha for it and divided afterwards, so that those of transparent pixels do
not bleed into others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fsq_jax.data import image_errors
from fsq_jax.data import pixel_formats

KERNEL = 'Pillow bicubic, antialiased'
# Projections of RGB to grey and to the plane perpendicular to the grey axis,
# and the cross product with the grey axis.
_GREY = np.full((3, 3), 1 / 3)
_PLANE = np.eye(3) - _GREY
_CROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Resizes an image; returns it unchanged if it has the size already.

  Args:
    image: [h, w, C] uint8.
    size: (height, width) in pixels.

  Returns:
    [height, width, C] uint8.
  """
  height, width = size
  if image.shape[:2] == (height, width):
    return image
  image_errors.check_num_pixels(width, height)
  resized = pixel_formats.to_pillow(image).resize(
      (width, height), Image.Resampling.BICUBIC
  )
  return pixel_formats.to_array(resized)


def resize_shorter(image: np.ndarray, length: int) -> np.ndarray:
  """Resizes an image so that its shorter side is `length` pixels.

  Args:
    image: [h, w, C] uint8.
    length: of the shorter side; the longer side keeps the aspect ratio, rounded
      to a pixel. 0 returns the image unchanged.

  Returns:
    [h', w', C] uint8 with min(h', w') == length.

  Raises:
    DamagedImageError: the result would have too many pixels.
  """
  if length in (0, min(image.shape[:2])):
    return image
  resized = resize_pillow(pixel_formats.to_pillow(image), length)
  return pixel_formats.to_array(resized)


def resize_pillow(image: Image.Image, length: int) -> Image.Image:
  """As `resize_shorter`, for an image that Pillow has decoded."""
  if length in (0, min(image.size)):
    return image
  width, height = image.size
  scale = length / min(height, width)
  size = round(height * scale), round(width * scale)
  if size[0] * size[1] > image_errors.MAX_PIXELS:
    raise image_errors.DamagedImageError(
        f'{height} x {width} pixels (height x width) become {size[0]} x '
        f'{size[1]} by data.resize_shorter = {length}; at most '
        f'{image_errors.MAX_PIXELS} pixels are allowed'
    )
  return image.resize(size[::-1], Image.Resampling.BICUBIC)


def augment(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    size: Sequence[int],
    **options: Any,
) -> np.ndarray:
  """Applies a random crop, a random horizontal flip and color jitter.

  Args:
    image: [h, w, C] uint8.
    rng: as in `draw_augmentation`.
    size: (height, width) of the result.
    **options: crop_scale, flip and color_jitter of `draw_augmentation`.

  Returns:
    [height, width, C] uint8, perhaps a view of `image`.
  """
  augmentation = draw_augmentation(image, rng, size=size, **options)
  return apply_augmentation(image, augmentation, size)


class Augmentation(NamedTuple):
  """The parameters of an augmentation.

  Attributes:
    crop: (top, left, height, width) in pixels of the image.
    is_flipped: whether the crop is flipped left to right.
    color: arguments of `change_color`; None changes no colours.
  """

  crop: tuple[int, int, int, int]
  is_flipped: bool
  color: Mapping[str, float] | None


def draw_augmentation(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    size: Sequence[int],
    crop_scale: Sequence[float],
    flip: bool,
    color_jitter: float,
) -> Augmentation:
  """Draws the parameters of a random crop, horizontal flip and color jitter.

  The crop has sides size * s, with s log-uniform in crop_scale, whose ends are
  limited to the largest s that fits the image; an image smaller than `size` is
  therefore scaled up. The place is uniform over all whole pixels.

  Args:
    image: [h, w, C] uint8.
    rng: seven numbers are drawn, whatever the other arguments are.
    size: (height, width) of the result.
    crop_scale: (min, max) s.
    flip: whether to flip left to right with probability 1/2.
    color_jitter: j in [0, 1]: hue is rotated by up to j * 180 degrees,
      saturation and brightness are multiplied by factors in 1 - j ... 1 + j and
      1 - j / 2 ... 1 + j / 2, all uniform.
  """
  # Python's numbers are faster than NumPy's scalars.
  draws = rng.random(7).tolist()
  scale_draw, top_draw, left_draw, flip_draw, *color_draws = draws
  largest = _largest_scale(image, size)
  low, high = (min(scale, largest) for scale in crop_scale)
  height, width = _crop_sides(image, size, low * (high / low) ** scale_draw)
  color = None
  if color_jitter:
    turn, stretch, gain = (color_jitter * (2 * x - 1) for x in color_draws)
    color = {
        'hue': np.pi * turn, 'saturation': 1 + stretch, 'gain': 1 + gain / 2
    }  # fmt: skip
  return Augmentation(
      crop=(
          int(top_draw * (image.shape[0] - height + 1)),
          int(left_draw * (image.shape[1] - width + 1)),
          height,
          width,
      ),
      is_flipped=bool(flip and flip_draw < 0.5),
      color=color,
  )


def apply_augmentation(
    image: np.ndarray, augmentation: Augmentation, size: Sequence[int]
) -> np.ndarray:
  """Applies an augmentation drawn for an image of this size; see `augment`."""
  top, left, height, width = augmentation.crop
  crop = resize(image[top : top + height, left : left + width], size)
  if augmentation.is_flipped:
    crop = crop[:, ::-1]
  if augmentation.color is not None:
    crop = change_color(crop, **augmentation.color)
  return crop


def change_color(
    image: np.ndarray, *, hue: float, saturation: float, gain: float
) -> np.ndarray:
  """Changes hue, saturation and brightness of an image.

  Args:
    image: [h, w, 3] uint8 RGB.
    hue: rotation of colours about the grey axis, radians; a third of a full
      turn makes red green and green blue.
    saturation: factor of the distance from the grey axis.
    gain: factor of all values, applied last.

  Returns:
    [h, w, 3] uint8, clipped and rounded.
  """
  turn = np.cos(hue) * _PLANE + np.sin(hue) * _CROSS
  matrix = (gain * (_GREY + saturation * turn)).astype(np.float32)
  # One matmul over all pixels: NumPy would make one per row.
  values = image.reshape(-1, 3).astype(np.float32) @ matrix.T
  np.rint(values, out=values).clip(0, 255, out=values)
  return values.astype(np.uint8).reshape(image.shape)


def centre_crop(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Returns the centre crop; odd margins are larger at the bottom and right.

  Args:
    image: [h, w, C] uint8. If it is smaller than `size`, the largest centred
      crop of the same aspect ratio is scaled up.
    size: (height, width) of the result.

  Returns:
    [height, width, C] uint8, perhaps a view of `image`.
  """
  scale = min(1.0, _largest_scale(image, size))
  height, width = _crop_sides(image, size, scale)
  top = (image.shape[0] - height) // 2
  left = (image.shape[1] - width) // 2
  return resize(image[top : top + height, left : left + width], size)


def is_smaller(image: np.ndarray, size: Sequence[int]) -> bool:
  """Whether an image has too few pixels for a crop at scale 1.

  Args:
    image: [h, w, C]; crops of a smaller image are scaled up.
    size: (height, width) of the crop.
  """
  return _largest_scale(image, size) < 1


def _largest_scale(image: np.ndarray, size: Sequence[int]) -> float:
  return min(image.shape[0] / size[0], image.shape[1] / size[1])


def _crop_sides(
    image: np.ndarray, size: Sequence[int], scale: float
) -> tuple[int, int]:
  height, width = (
      min(max(round(side * scale), 1), available)
      for side, available in zip(size, image.shape[:2], strict=True)
  )
  return height, width


def pad(image: np.ndarray, multiples: tuple[int, int]) -> np.ndarray:
  """Pads the sides of an image to multiples, by reflection.

  The image is reflected at its bottom and right edge, repeatedly if it is
  small. A reflection keeps colours and texture, and so the statistics of
  GroupNorm over the whole image; repeated edges would be stripes. It is defined
  for a single pixel too.

  Args:
    image: [H, W, C], both sides at least 1.
    multiples: of the height and of the width, pixels.

  Returns:
    [H', W', C] of the same dtype, with the image at its top left.
  """
  added = [
      (0, -side % multiple)
      for side, multiple in zip(image.shape[:2], multiples, strict=True)
  ]
  return np.pad(image, (*added, (0, 0)), mode='symmetric')
