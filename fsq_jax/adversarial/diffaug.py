"""Differentiable augmentation of what a discriminator sees, with explicit keys.

DiffAugment (arxiv.org/abs/2006.10738) as StyleGAN-T, VAR and RAE have it.
"""

from typing import NamedTuple

from einops import rearrange
import jax
from jax import numpy as jnp

_TRANSLATION = 0.125


class Draws(NamedTuple):
  """What is left to chance, uniform in [0, 1).

  Attributes:
    groups: [3] float32: whether to translate, change colours, and cut out, for
      the whole batch; each is done where it is below the probability.
    images: [B, 7] float32: rows and columns to translate by, brightness,
      saturation, contrast, row and column to cut out.
  """

  groups: jax.Array
  images: jax.Array


def draw(key: jax.Array, num_images: int) -> Draws:
  """Draws for a batch.

  What an image gets depends on the key and its position in the global batch,
  and neither on the devices nor on how many images there are.

  Args:
    key: of this batch alone; split it for real and fake images.
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
  """Augments a batch at random, as `apply` does with what `draw` returns.

  Args:
    key: of this batch alone; split it for real and fake images.
    images: [B, H, W, 3] floats in [-1, 1].
    probability: of each group of changes.
    cutout: side of the square that is cut out, as a share of the image's; 0
      cuts nothing.

  Returns:
    float32 images of the same shape; colours may leave [-1, 1].
  """
  return apply(
      draw(key, len(images)), images, probability=probability, cutout=cutout
  )


def apply(
    draws: Draws, images: jax.Array, *, probability: float, cutout: float
) -> jax.Array:
  """Translates, changes colours, and cuts out, in this order.

  Translation is by up to an eighth of each side. Brightness adds at most a half
  of either sign; saturation scales what differs from a pixel's mean by 0 to 2,
  contrast what differs from the image's mean by 0.5 to 1.5. What is moved in or
  cut out is 0: mid-grey of images in [-1, 1], and it takes part in the changes
  of colour.

  Args:
    draws: what is left to chance.
    images: [B, H, W, 3] floats in [-1, 1].
    probability: of each group of changes.
    cutout: side of the square that is cut out, as a share of the image's.

  Returns:
    float32 images of the same shape.

  Raises:
    ValueError: draws for another number of images, or a cutout not in [0, 1].
  """
  if draws.images.shape != (len(images), 7):
    raise ValueError(
        f'Draws of the shape {draws.images.shape} do not fit {len(images)}'
        f' images; draw for ({len(images)}, 7).'
    )
  if not 0 <= cutout <= 1:
    raise ValueError(
        f'cutout is {cutout}; it is a share of the side, from 0 to 1.'
    )
  x = images.astype(jnp.float32)
  use = draws.groups < probability
  x = jnp.where(use[0], _translate(x, draws.images[:, :2]), x)
  x = jnp.where(use[1], _change_colours(x, draws.images[:, 2:5]), x)
  if cutout:
    x = jnp.where(use[2], _cut_out(x, draws.images[:, 5:], cutout), x)
  return x


def _translate(x: jax.Array, uniform: jax.Array) -> jax.Array:
  """Moves each image by whole pixels, down and to the right if positive."""
  for axis in (1, 2):
    side = x.shape[axis]
    reach = round(_TRANSLATION * side)
    offset = _integers(uniform[:, axis - 1], 2 * reach + 1) - reach
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


def _cut_out(x: jax.Array, uniform: jax.Array, share: float) -> jax.Array:
  """Blanks a rectangle of each image; its centre may be at the very edge."""
  outside = []
  for axis in (1, 2):
    side = x.shape[axis]
    size = round(share * side)
    # An even size has its centre between pixels, and so one place more.
    first = _integers(uniform[:, axis - 1], side + 1 - size % 2) - size // 2
    place = jnp.arange(side, dtype=jnp.int32) - first[:, None]
    outside.append((place < 0) | (place >= size))
  rows = rearrange(outside[0], 'b h -> b h 1 1')
  return jnp.where(rows | rearrange(outside[1], 'b w -> b 1 w 1'), x, 0)


def _integers(uniform: jax.Array, count: int) -> jax.Array:
  """Integers from 0 to count - 1, int32, each as likely as the others."""
  return jnp.floor(uniform * count).astype(jnp.int32)
