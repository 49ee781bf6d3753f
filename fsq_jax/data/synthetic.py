"""Synthetic images, generated from their index, for debugging and tests."""

from collections.abc import Sequence

import numpy as np

from fsq_jax.data import image_source
from fsq_jax.data import pixel_formats

NUM_TRAIN = 8192
NUM_VALIDATION = 256
_NUM_DISCS = 3


class SyntheticSource(image_source.ImageSource):
  """Colour gradients under stripes and discs, drawn from the index.

  Indices of validation images follow the indices of training images.
  """

  def __init__(
      self, split: str, *, size: Sequence[int], channels: int = 3
  ):
    self._offset, self._length = {
        'train': (0, NUM_TRAIN),
        'validation': (NUM_TRAIN, NUM_VALIDATION),
    }[split]
    super().__init__(
        '', split, f'{self._offset}+{self._length}', channels=channels
    )
    # Pixel centres over the image's width, so that discs are round.
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    self._y, self._x = y / width, x / width
    self._aspect = height / width
    self._pixel = 1 / width

  def __len__(self) -> int:
    return self._length

  def describe(self, index: int) -> str:
    return f'synthetic image {self._offset + index}'

  def load(self, index: int) -> np.ndarray:
    rng = np.random.default_rng(self._offset + index)
    colours = rng.random((3 + _NUM_DISCS, 3), np.float32)
    angles = rng.random(2, np.float32) * (2 * np.pi)
    frequency = rng.uniform(10, 60)
    centres = rng.random((_NUM_DISCS, 2), np.float32)
    radii = 0.05 + 0.25 * rng.random(_NUM_DISCS, np.float32)

    ramp = self._project(angles[0])
    image = _blend(colours[0], colours[1], (ramp - ramp.min()) / np.ptp(ramp))
    stripes = 0.5 * (1 + np.sin(frequency * self._project(angles[1])))
    image = _blend(image, colours[2], 0.5 * stripes)
    for colour, (y, x), radius in zip(
        colours[3:], centres, radii, strict=True
    ):
      distance = np.hypot(self._y - y * self._aspect, self._x - x)
      inside = np.clip((radius - distance) / self._pixel + 0.5, 0, 1)
      image = _blend(image, colour, inside)
    rgb = pixel_formats.to_pillow(np.rint(image * 255).astype(np.uint8))
    return pixel_formats.to_array(pixel_formats.convert(rgb, self.channels))

  def _project(self, angle: float) -> np.ndarray:
    return self._y * np.sin(angle) + self._x * np.cos(angle)


def _blend(
    below: np.ndarray, above: np.ndarray, alpha: np.ndarray
) -> np.ndarray:
  """Lays [3] or [h, w, 3] `above` over `below` with [h, w] alpha in [0, 1]."""
  return below + (above - below) * alpha[..., None]
