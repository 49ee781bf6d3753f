"""Crops, resizes and flips of one image, in NumPy.

All resizing is Pillow's bicubic kernel, which is antialiased when it shrinks;
KERNEL names it wherever a number depends on it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from einops import rearrange
import numpy as np
from PIL import Image

from fsq_jax.data import image_errors

KERNEL = 'Pillow bicubic, antialiased'


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Resizes an image; returned as it is where the size is right already.

  Args:
    image: [h, w, 3] uint8.
    size: (height, width) in pixels.

  Returns:
    [height, width, 3] uint8.
  """
  height, width = size
  if image.shape[:2] == (height, width):
    return image
  image_errors.check_num_pixels(width, height)
  resized = Image.fromarray(image).resize(
      (width, height), Image.Resampling.BICUBIC
  )
  return np.asarray(resized)


def resize_shorter(image: np.ndarray, length: int) -> np.ndarray:
  """Resizes an image so that its shorter side is `length` pixels.

  Args:
    image: [h, w, 3] uint8.
    length: of the shorter side; the longer one follows, rounded to the nearest
      pixel. 0 returns the image as it is.

  Returns:
    [h', w', 3] uint8 with min(h', w') == length.

  Raises:
    DamagedImageError: the result would have too many pixels.
  """
  if not length:
    return image
  height, width = image.shape[:2]
  scale = length / min(height, width)
  size = round(height * scale), round(width * scale)
  if size[0] * size[1] > image_errors.MAX_PIXELS:
    raise image_errors.DamagedImageError(
        f'{height} x {width} pixels (height x width) are too long for '
        f'data.resize_shorter = {length}, which would make {size[0]} x '
        f'{size[1]} of them; {image_errors.MAX_PIXELS} pixels are allowed'
    )
  return resize(image, size)


def augment(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    size: Sequence[int],
    crop_scale: Sequence[float],
    flip: bool,
    color_jitter: float,
) -> np.ndarray:
  """Cuts a random crop at a random scale, mirrors it, changes its colours.

  The crop has sides size * s. s is log-uniform in crop_scale, whose ends are
  first lowered to the largest s that fits the image; an image smaller than
  `size` is therefore scaled up. The place is uniform over all whole pixels.

  Args:
    image: [h, w, 3] uint8.
    rng: gives seven numbers, whatever the other arguments are.
    size: (height, width) of the result.
    crop_scale: (lowest, highest) s.
    flip: whether to mirror left to right with probability 1/2.
    color_jitter: j in [0, 1]: hue turned by up to j * 180 degrees, saturation
      and brightness multiplied by 1 - j to 1 + j and 1 - j / 2 to 1 + j / 2,
      all uniform.

  Returns:
    [height, width, 3] uint8, perhaps a view of `image`.
  """
  augmentation = draw_augmentation(
      image,
      rng,
      size=size,
      crop_scale=crop_scale,
      flip=flip,
      color_jitter=color_jitter,
  )
  return apply_augmentation(image, augmentation, size)


class Augmentation(NamedTuple):
  """What `augment` does to an image.

  Attributes:
    crop: (top, left, height, width) in whole pixels of the image.
    is_flipped: whether the crop is mirrored left to right.
    color: arguments of `change_color`; None leaves colours alone.
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
  """Draws what `augment` does to an image; see there."""
  scale_draw, top_draw, left_draw, flip_draw, *color_draws = rng.random(7)
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
  """Does what was drawn for an image of this size; see `augment`."""
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
  """Turns, stretches and scales the colours of an image.

  Args:
    image: [h, w, 3] uint8.
    hue: radians by which colours turn about the grey axis; a third of a full
      turn makes red green and green blue.
    saturation: factor of their distance from that axis, the mean of R, G, B.
    gain: factor of all values, last.

  Returns:
    [h, w, 3] uint8, clipped and rounded.
  """
  grey = np.full((3, 3), 1 / 3)
  cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
  turn = np.cos(hue) * (np.eye(3) - grey) + np.sin(hue) * cross
  matrix = (gain * (grey + saturation * turn)).astype(np.float32)
  # One product of all pixels: NumPy makes one of every row otherwise.
  values = rearrange(image, 'h w c -> (h w) c').astype(np.float32) @ matrix.T
  np.clip(np.rint(values, out=values), 0, 255, out=values)
  return values.astype(np.uint8).reshape(image.shape)


def centre_crop(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Cuts the centre; an odd margin leaves the larger part below and right.

  Args:
    image: [h, w, 3] uint8. Where it is smaller than `size`, the largest centred
      crop of the same aspect is scaled up.
    size: (height, width) of the result.

  Returns:
    [height, width, 3] uint8, perhaps a view of `image`.
  """
  scale = min(1.0, _largest_scale(image, size))
  height, width = _crop_sides(image, size, scale)
  top = (image.shape[0] - height) // 2
  left = (image.shape[1] - width) // 2
  return resize(image[top : top + height, left : left + width], size)


def is_smaller(image: np.ndarray, size: Sequence[int]) -> bool:
  """Returns whether an image has too few pixels for a crop at scale 1.

  Args:
    image: [h, w, 3]; its crops are scaled up then.
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
  """Pads an image to sides that are multiples.

  It is mirrored at its bottom and right, over and over where it is small. A
  mirror image has the colours and the texture that GroupNorm's statistics, over
  the whole image, had without it, where repeated edges would be stripes; and
  it is defined for a single pixel.

  Args:
    image: [H, W, 3], both sides at least 1.
    multiples: of the height and of the width, pixels.

  Returns:
    [H', W', 3] of the same dtype, with the image at its top left.
  """
  added = [
      (0, -side % multiple)
      for side, multiple in zip(image.shape[:2], multiples, strict=True)
  ]
  return np.pad(image, (*added, (0, 0)), mode='symmetric')
