"""Image sizes that a model takes, and the few sizes it is compiled for."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fsq_jax.data import transforms
from fsq_jax.models import autoencoder
from fsq_jax.runtime import batching
from fsq_jax.runtime import compiled

# Executables to keep per function of whole arrays: images with sides of 200 to
# 2000 pixels fall into 49 buckets.
MAX_SHAPES = 64


class ImageSizes:
  """Applies a model to images, and tokens, of any size.

  A model with a stride takes whole images whose sides are multiples of the
  stride; other models take tiles of the size they were trained with.

  Attributes:
    whole: whether the model takes whole images.
    multiples: (height, width) in pixels that divide the sides of padded images:
      (stride, stride), or the size of a tile.
    grid: (rows, columns) of the latents of `multiples` pixels.
  """

  def __init__(
      self, model: autoencoder.Autoencoder, image_size: tuple[int, int]
  ):
    """Takes the sizes from a model.

    Args:
      model: an autoencoder.
      image_size: (height, width) in pixels that the model was built for.
    """
    stride = autoencoder.stride_of(model)
    self.whole = stride is not None
    if self.whole:
      self.multiples = (stride, stride)
      self.grid = (stride // model.encoder.stride,) * 2
    else:
      self.multiples = tuple(image_size)
      self.grid = tuple(model.encoder.grid_size)
    self._has_buckets = autoencoder.takes_size(model)
    self._trained = np.floor_divide(image_size, self.multiples).tolist()

  def pad(self, image: np.ndarray) -> np.ndarray:
    """Pads [H, W, 3] to sides of `multiples`, mirroring bottom and right."""
    return transforms.pad(image, self.multiples)

  def map(
      self,
      function: Callable[[jax.Array, np.ndarray | None], Any],
      x: np.ndarray,
      cell: tuple[int, int],
      batcher: batching.Batcher,
  ) -> Any:
    """Applies the model to padded images, or tokens, of any size.

    Args:
      function: from a batch [b, H', W', ...] and a size, as in `call`, to a
        tree of arrays [b, h, w, ...] or [b].
      x: [B, H, W, ...] padded images, or tokens.
      cell: `multiples` for images, `grid` for tokens.
      batcher: splits whole arrays, or their tiles, into batches.

    Returns:
      The tree of NumPy arrays [B, h, w, ...], or [number of tiles].
    """
    if not self.whole:
      return batcher.map_tiles(lambda batch: function(batch, None), x, cell)
    trained = np.maximum(self._trained, 1)
    usual_size = tuple(np.multiply(trained, cell).tolist())

    def map_batches(x: np.ndarray, size: np.ndarray | None) -> Any:
      return batcher.map(lambda batch: function(batch, size), x, usual_size)

    return self.call(map_batches, x, cell)

  def call(
      self,
      function: Callable[[np.ndarray, np.ndarray | None], Any],
      x: np.ndarray,
      cell: tuple[int, int],
  ) -> Any:
    """Calls a function of whole images or tokens with one of few shapes.

    Arrays are padded with zeros at the bottom and right to the next bucket. The
    model gets their true size and ignores the zeros; results differ only in the
    rounding of sums. (In bfloat16, where activations are rounded, about 1 % of
    the tokens change.) The size that the model was trained with is a bucket.
    Arrays are not padded if a bucket needs too much memory, or the model cannot
    ignore zeros.

    Args:
      function: of [B, H', W', ...] and of their true height and width, [2]
        int32, or None without zeros.
      x: [B, H, W, ...] padded images, or tokens.
      cell: `multiples` for images, `grid` for tokens.

    Returns:
      The result of the function, a tree of NumPy arrays, with the padding
      cropped from arrays that have a height and a width.
    """
    size = np.array(x.shape[1:3], np.int32)
    num_cells = (size // cell).tolist()
    if not self._has_buckets or num_cells == self._trained:
      return function(x, None)
    target = np.multiply([bucket(num) for num in num_cells], cell)
    if np.array_equal(target, size):
      return function(x, None)
    widths = [(0, 0), *((0, added) for added in target - size)]
    filled = np.pad(x, widths + [(0, 0)] * (x.ndim - 3))
    try:
      result = function(filled, size)
    except compiled.TooLargeError:
      return function(x, None)

    def crop(y):
      if y.ndim < 3:
        return y
      height, width = y.shape[1:3] * size // target
      return np.ascontiguousarray(y[:, :height, :width])

    return jax.tree.map(crop, result)


def bucket(num: int) -> int:
  """Rounds up to the next of 1, 2, 3, 4, 6, 8, 12, 16, ...: 2^k and 3 * 2^k.

  Areas grow by a factor below 2.25, 1.4 on average. Four steps per octave would
  reduce the average to 1.2, with twice as many shapes: 103 instead of 47 for
  200 random sizes of 32 to 400 pixels.
  """
  step = 2 ** max((num - 1).bit_length() - 2, 0)
  return -(-num // step) * step
