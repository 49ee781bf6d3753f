"""Differentiable augmentation of the discriminator's images.

DiffAugment (arxiv.org/abs/2006.10738) as in StyleGAN-T, VAR and RAE.
"""

from typing import NamedTuple

from einops import rearrange
import jax
from jax import numpy as jnp

_TRANSLATION = 0.125


class Draws(NamedTuple):
  """Random numbers of a batch, uniform in [0, 1).

  Attributes:
    groups: [3] float32, for the whole batch: translation, colours and cutout
      are applied if their number is below the probability.
    images: [B, 7] float32: rows and columns of the translation, brightness,
      saturation, contrast, row and column of the cutout.
  """

  groups: jax.Array
  images: jax.Array


def draw(key: jax.Array, num_images: int) -> Draws:
  """Draws the random numbers of a batch.

  The numbers of an image depend on the key and on its position in the global
  batch, not on the devices or the number of images.

  Args:
    key: used for this batch only; split it for real and fake images.
    num_images: in the global batch.
  """
  group_key, image_key = jax.random.split(key)

  def draw_image(position: jax.Array) -> jax.Array:
    key = jax.random.fold_in(image_key, position)
    return jax.random.uniform(key, (7,), jnp.float32)

  return Draws(
      groups=jax.random.uniform(group_key, (3,), jnp.float32),
      images=jax.vmap(draw_image)(jnp.arange(num_images, dtype=jnp.int32)),
  )


def augment(
    key: jax.Array,
    images: jax.Array,
    *,
    probability: float = 1.0,
    cutout: float = 0.0,
) -> jax.Array:
  """Augments a batch: `apply` with the numbers of `draw`.

  Args:
    key: used for this batch only; split it for real and fake images.
    images: [B, H, W, C] floats in [-1, 1].
    probability: of each group of augmentations.
    cutout: side of the cutout, as a fraction of the image's; 0 for none.

  Returns:
    float32 images of the same shape; colours may leave [-1, 1].
  """
  return apply(
      draw(key, len(images)), images, probability=probability, cutout=cutout
  )


def apply(
    draws: Draws, images: jax.Array, *, probability: float, cutout: float
) -> jax.Array:
  """Applies translation, colours and cutout, in this order.

  The translation is at most an eighth of each side. Brightness adds a number in
  [-0.5, 0.5); saturation scales differences from the pixel's mean by 0 to 2,
  contrast differences from the image's mean by 0.5 to 1.5. Translation and
  cutout fill with 0, mid-grey; colours apply to translated-in pixels too.

  Args:
    draws: random numbers.
    images: [B, H, W, C] floats in [-1, 1].
    probability: of each group of augmentations.
    cutout: side of the cutout, as a fraction of the image's.

  Returns:
    float32 images of the same shape.

  Raises:
    ValueError: draws for another number of images, or a cutout not in [0, 1].
  """
  if draws.images.shape != (len(images), 7):
    raise ValueError(
        f'Draws have shape {draws.images.shape}; {len(images)} images need'
        f' ({len(images)}, 7).'
    )
  if not 0 <= cutout <= 1:
    raise ValueError(
        f'cutout is {cutout}; allowed: a fraction of the side, 0 to 1.'
    )
  x = images.astype(jnp.float32)
  use = draws.groups < probability
  x = jnp.where(use[0], _translate(x, draws.images[:, :2]), x)
  x = jnp.where(use[1], _change_colours(x, draws.images[:, 2:5]), x)
  if cutout:
    x = jnp.where(use[2], _cut_out(x, draws.images[:, 5:], cutout), x)
  return x


def _translate(x: jax.Array, uniform: jax.Array) -> jax.Array:
  """Translates each image by whole pixels; positive is down and right."""
  for axis in (1, 2):
    side = x.shape[axis]
    limit = round(_TRANSLATION * side)
    offset = _as_int32(uniform[:, axis - 1], 2 * limit + 1) - limit
    source = jnp.arange(side, dtype=jnp.int32) - offset[:, None]
    inside = (source >= 0) & (source < side)
    pattern = 'b n -> b n 1 1' if axis == 1 else 'b n -> b 1 n 1'
    source, inside = (rearrange(a, pattern) for a in (source, inside))
    moved = jnp.take_along_axis(
        x, jnp.clip(source, 0, side - 1), axis, mode='promise_in_bounds'
    )
    x = jnp.where(inside, moved, 0)
  return x


def _change_colours(x: jax.Array, uniform: jax.Array) -> jax.Array:
  """Changes brightness, saturation and contrast of each image."""
  brightness, saturation, contrast = rearrange(uniform, 'b k -> k b 1 1 1')
  x = x + brightness - 0.5
  grey = jnp.mean(x, axis=3, keepdims=True)
  x = grey + (x - grey) * 2 * saturation
  mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
  return mean + (x - mean) * (contrast + 0.5)


def _cut_out(x: jax.Array, uniform: jax.Array, fraction: float) -> jax.Array:
  """Sets a rectangle of each image to 0; its centre may be at the edge."""
  outside = []
  for axis in (1, 2):
    side = x.shape[axis]
    size = round(fraction * side)
    # The centre of an even size is between pixels: one more position.
    first = _as_int32(uniform[:, axis - 1], side + 1 - size % 2) - size // 2
    place = jnp.arange(side, dtype=jnp.int32) - first[:, None]
    outside.append((place < 0) | (place >= size))
  rows = rearrange(outside[0], 'b h -> b h 1 1')
  return jnp.where(rows | rearrange(outside[1], 'b w -> b 1 w 1'), x, 0)


def _as_int32(uniform: jax.Array, count: int) -> jax.Array:
  """Maps uniform numbers in [0, 1) to int32 uniform in 0 ... count - 1."""
  return jnp.floor(uniform * count).astype(jnp.int32)
