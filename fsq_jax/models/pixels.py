"""Conversions between uint8 pixels and float32 images in [-1, 1]."""

import jax
from jax import numpy as jnp


def to_uint8(images: jax.Array) -> jax.Array:
  """Converts floats in [-1, 1] to uint8 by clipping and rounding.

  Args:
    images: [...], any float dtype; NaN becomes 0 (`image_metrics` reports it).

  Returns:
    The same shape, uint8.

  Raises:
    ValueError: images of another dtype.
  """
  images = jnp.asarray(images)
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
        f'to_uint8 got {images.dtype} images; allowed: floats in [-1, 1].'
    )
  levels = (images.astype(jnp.float32) + 1) * 127.5
  levels = jnp.where(jnp.isnan(levels), 0, levels)
  return jnp.round(jnp.clip(levels, 0, 255)).astype(jnp.uint8)


def to_float(images: jax.Array) -> jax.Array:
  """Converts uint8 images to float32 in [-1, 1]; ValueError for others."""
  if images.dtype != jnp.uint8:
    raise ValueError(f'Batches must hold uint8 images, not {images.dtype}.')
  return images.astype(jnp.float32) / 127.5 - 1
