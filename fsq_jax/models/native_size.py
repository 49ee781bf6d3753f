"""Reconstructs images at their native size.

A model takes images of one size, or sides that are multiples of its stride.
Other images are padded at the bottom and right, reconstructed, and cropped.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.models import autoencoder
from fsq_jax.models import image_sizes
from fsq_jax.models import pixels
from fsq_jax.runtime import batching
from fsq_jax.runtime import compiled
from fsq_jax.runtime import partitioning

# Tiles in one call of the model, a power of 2.
_MAX_TILES = 32


class Reconstruction(NamedTuple):
  """Result of reconstructing one image.

  Attributes:
    image: [H, W, C] uint8.
    indices: [h, w, *index_shape] int32 tokens of the padded image, one grid for
      all tiles.
    num_seen: (rows, columns) of indices that cover pixels of the image; the
      other indices cover padding only.
    finite: whether the decoder's output, including padding, has no NaN and no
      infinity, which uint8 cannot represent.
  """

  image: np.ndarray
  indices: np.ndarray
  num_seen: tuple[int, int]
  finite: bool


def reconstruct(
    model: autoencoder.Autoencoder,
    variables: Mapping[str, Any],
    images: jax.Array,
    size: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Encodes and decodes images of a size that the model takes.

  Args:
    model: the autoencoder.
    variables: params and the model's other collections.
    images: [B, H, W, C] uint8.
    size: see `Autoencoder.encode`.

  Returns:
    Reconstructions, the same shape, uint8; indices, int32; and [B] bool,
    whether each reconstruction is finite.
  """
  output = model.apply(variables, pixels.to_float(images), size=size)
  return (
      pixels.to_uint8(output.reconstructions),
      output.indices,
      jnp.all(jnp.isfinite(output.reconstructions), axis=(1, 2, 3)),
  )


class Reconstructor:
  """Reconstructs images of any size with one model.

  A convolutional model, which has a stride, takes the whole padded image, and
  is compiled for few sizes (`image_sizes`). Its GroupNorm also averages over
  the mirrored padding, which changes every pixel slightly. Other models take
  independent tiles of the size they were trained with; tile edges may be
  visible.
  """

  def __init__(
      self,
      model: autoencoder.Autoencoder,
      image_size: tuple[int, int],
      mesh: jax.sharding.Mesh,
  ):
    """The model is compiled on first call.

    Args:
      model: an autoencoder.
      image_size: (height, width) in pixels that it was built for.
      mesh: from `partitioning.create_mesh`; tiles are sharded over it if it
        divides their number.
    """
    self._channels = model.channels
    self._sizes = image_sizes.ImageSizes(model, image_size)
    # Powers of 2: few executables, and no padding tiles.
    self._batcher = batching.Batcher(
        mesh, _MAX_TILES, fill='none', split=False
    )
    self._reconstruct = compiled.Compiled(
        lambda *arguments: reconstruct(model, *arguments),
        max_shapes=image_sizes.MAX_SHAPES,
        out_shardings=partitioning.replicated(mesh),
    )

  @property
  def protocol(self) -> str:
    """The treatment of images in words, for evaluation.json."""
    height, width = self._sizes.multiples
    text = (
        f'sides padded to multiples of {height} x {width} pixels by mirroring'
        ' at the bottom and the right, cropped back'
    )
    if not self._sizes.whole:
      text += f'; in tiles of {height} x {width}, each by itself'
    return text

  def __call__(
      self, variables: Mapping[str, Any], image: np.ndarray
  ) -> Reconstruction:
    """Reconstructs one image.

    Args:
      variables: params and the model's other collections.
      image: [H, W, C] uint8, both sides at least 1.

    Returns:
      The reconstruction, of the same size.

    Raises:
      ValueError: an array of another shape or dtype.
      compiled.TooLargeError: not enough device memory for the image.
    """
    image = np.asarray(image)
    channels = self._channels
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels:
      raise ValueError(
          f'An image is [H, W, {channels}] uint8, not {list(image.shape)}'
          f' {image.dtype}.'
      )
    if not image.size:
      raise ValueError(f'An image of {list(image.shape)} has no pixels.')
    padded = self._sizes.pad(image)
    images, indices, finite = self._sizes.map(
        functools.partial(self._reconstruct, variables), padded[None],
        self._sizes.multiples, self._batcher,
    )
    indices = indices[0]
    height, width = image.shape[:2]
    rows, columns = (
        math.ceil(side * num / padded_side)
        for side, num, padded_side in zip(
            (height, width), indices.shape[:2], padded.shape[:2], strict=True
        )
    )
    return Reconstruction(
        images[0, :height, :width], indices, (rows, columns),
        bool(finite.all()),
    )
