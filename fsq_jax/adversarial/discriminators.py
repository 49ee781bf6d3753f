"""Convolutional discriminators: images to logits, positive for real ones."""

import functools
import math

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.models import resampling


def _blur(x: jax.Array) -> jax.Array:
  """Downsamples [B, H, W, C] by 2 with a binomial kernel of four pixels.

  The kernel is a sum of strided slices, since depthwise convolutions are slow
  on most devices.
  """
  for axis in (1, 2):
    side = x.shape[axis]
    half = -(-side // 2)
    # Padding 'SAME': one pixel before, one or two after.
    widths = [(0, 0)] * 4
    widths[axis] = (1, 2 * half + 1 - side)
    padded = jnp.pad(x, widths)
    x = sum(
        weight / 8 * jax.lax.slice_in_dim(
            padded, tap, tap + 2 * half - 1, stride=2, axis=axis
        )
        for tap, weight in enumerate((1, 3, 3, 1))
    )
  return x


# Both halve the sides, rounding up.
DOWNSAMPLINGS = {
    'average': functools.partial(resampling.average_pool, side=2, stride=2),
    'blur': _blur,
}


class PatchDiscriminator(nn.Module):
  """PatchGAN: classifies each patch of an image.

  `NLayerDiscriminator` of TiTok (github.com/bytedance/1d-tokenizer) with 128
  channels, 3 stages, blur, and a grid of 16 x 16. Larger feature maps are
  max-pooled to the grid. TiTok repeats smaller ones, which only gives some
  patches a larger weight; here they remain as they are, so that images of
  32 x 32 pixels have 4 x 4 logits.

  Attributes:
    channels: of the first stage, doubled in each later one; a multiple of 32,
      the number of groups of GroupNorm.
    num_stages: number of stages, each of which halves the sides.
    downsampling: a key of `DOWNSAMPLINGS`.
    grid_size: upper bound of rows and columns of logits.
  """

  channels: int
  num_stages: int
  downsampling: str
  grid_size: int

  @property
  def frozen_parameters(self) -> tuple[str, ...]:
    """Regular expressions of frozen parameters; all parameters train."""
    return ()

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Classifies images.

    Args:
      images: [B, H, W, C] floats in [-1, 1].
      train: ignored.

    Returns:
      [B, N] float32 logits of a grid of patches in row-major order. Images of a
      batch do not affect each other.

    Raises:
      ValueError: images too small for the stages, or an unknown downsampling.
    """
    del train
    downsample = _find_downsampling(self.downsampling)
    _check_sides(images, self.num_stages)
    # PyTorch's variance, which determines the scale of the first logits.
    conv = functools.partial(
        nn.Conv,
        kernel_init=nn.initializers.variance_scaling(
            1 / 3, 'fan_in', 'uniform'
        ),
    )
    activate = functools.partial(nn.leaky_relu, negative_slope=0.1)
    x = images.astype(jnp.float32)
    x = activate(conv(self.channels, (5, 5), name='in')(x))
    for i in range(self.num_stages):
      x = conv(self.channels * 2**i, (3, 3), name=f'stage_{i}')(x)
      x = nn.GroupNorm(
          num_groups=32, epsilon=1e-5, use_fast_variance=False,
          name=f'norm_{i}',
      )(downsample(x))
      x = activate(x)
    for axis in (1, 2):
      x = _max_pool_to(x, self.grid_size, axis)
    x = activate(conv(x.shape[-1], (1, 1), name='hidden')(x))
    return rearrange(conv(1, (5, 5), name='out')(x), 'b h w 1 -> b (h w)')


class StyleGanDiscriminator(nn.Module):
  """Classifies whole images with the residual blocks of StyleGAN 2.

  `stylegan_discriminator_2d.py` of github.com/google-research/magvit, with 64
  or 128 filters and multipliers (2, 4, 4, 4, 4) for 128 x 128 pixels; small
  images need fewer multipliers. There are no norms. The parameters fix the size
  of images.

  Attributes:
    filters: channels of the first convolution.
    multipliers: channels of each residual block as a multiple of filters; each
      block halves the sides.
    downsampling: a key of `DOWNSAMPLINGS`.
  """

  filters: int
  multipliers: tuple[int, ...]
  downsampling: str

  @property
  def frozen_parameters(self) -> tuple[str, ...]:
    """Regular expressions of frozen parameters; all parameters train."""
    return ()

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Classifies images.

    Args:
      images: [B, H, W, C] floats in [-1, 1].
      train: ignored.

    Returns:
      [B, 1] float32 logits. Images of a batch do not affect each other.

    Raises:
      ValueError: images too small for the blocks, or an unknown downsampling.
    """
    del train
    downsample = _find_downsampling(self.downsampling)
    _check_sides(images, len(self.multipliers))
    init = nn.initializers.xavier_uniform()
    conv = functools.partial(nn.Conv, kernel_size=(3, 3), kernel_init=init)
    activate = functools.partial(nn.leaky_relu, negative_slope=0.2)
    x = images.astype(jnp.float32)
    x = activate(conv(self.filters, name='in')(x))
    for i, multiplier in enumerate(self.multipliers):
      y = activate(conv(x.shape[-1], name=f'block_{i}_first')(x))
      channels = self.filters * multiplier
      y = activate(conv(channels, name=f'block_{i}_second')(downsample(y)))
      skip = conv(
          channels, kernel_size=(1, 1), use_bias=False, name=f'block_{i}_skip'
      )(downsample(x))
      x = (skip + y) / math.sqrt(2)
    x = activate(conv(x.shape[-1], name='last')(x))
    dense = functools.partial(nn.Dense, kernel_init=init)
    hidden = dense(x.shape[-1], name='hidden')(
        rearrange(x, 'b h w c -> b (h w c)')
    )
    return dense(1, name='out')(activate(hidden))


def _find_downsampling(name: str):
  if name not in DOWNSAMPLINGS:
    raise ValueError(
        f'downsampling is {name!r}; known: {sorted(DOWNSAMPLINGS)}.'
    )
  return DOWNSAMPLINGS[name]


def _check_sides(images: jax.Array, num_halvings: int) -> None:
  sides = images.shape[1:3]
  if min(sides) < 2**num_halvings:
    raise ValueError(
        f'Images of {sides[0]} x {sides[1]} pixels cannot be halved'
        f' {num_halvings} times; use a discriminator with fewer stages.'
    )


def _max_pool_to(x: jax.Array, size: int, axis: int) -> jax.Array:
  """PyTorch's adaptive max-pooling of one axis; shorter axes are unchanged."""
  length = x.shape[axis]
  if length <= size:
    return x
  places = np.arange(size)
  first = places * length // size
  last = -(-(places + 1) * length // size) - 1
  # Windows of unequal length, padded by repeating their last position.
  widest = np.max(last - first) + 1
  windows = np.minimum(first[:, None] + np.arange(widest), last[:, None])
  return jnp.max(jnp.take(x, windows, axis), axis=axis + 1)
