"""Convolutional discriminators: images to logits, above 0 for real ones."""

import functools
import math

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.models import resampling


def _blur(x: jax.Array) -> jax.Array:
  """Halves [B, H, W, C] after a binomial blur of four pixels, 0 at the edges.

  Sums of strided slices: a convolution of each channel by itself is slow on
  most devices.
  """
  for axis in (1, 2):
    side = x.shape[axis]
    half = -(-side // 2)
    # As of padding 'SAME': one pixel before, one or two after.
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


# The two halve even sides alike; of an odd one they round the half up.
DOWNSAMPLINGS = {
    'average': functools.partial(resampling.average_pool, side=2, stride=2),
    'blur': _blur,
}


class PatchDiscriminator(nn.Module):
  """Judges each patch of an image by itself: the PatchGAN of TiTok.

  github.com/bytedance/1d-tokenizer, `NLayerDiscriminator`: 128 channels, 3
  stages, blur, a grid of 16 x 16. The last features are max-pooled to that grid
  where they are larger. Where they are smaller TiTok repeats them, which would
  only weigh some patches more than others: here they stay as they are, so that
  images of 32 x 32 pixels get 4 x 4 logits.

  Attributes:
    channels: of the first stage; each later one has twice as many. A multiple
      of 32, the groups of GroupNorm.
    num_stages: each halves the sides.
    downsampling: a key of `DOWNSAMPLINGS`.
    grid_size: rows and columns of logits at most.
  """

  channels: int
  num_stages: int
  downsampling: str
  grid_size: int

  @property
  def frozen_parameters(self) -> tuple[str, ...]:
    """Regular expressions of the parameters that never train: none."""
    return ()

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Judges images.

    Args:
      images: [B, H, W, 3] floats in [-1, 1].
      train: makes no difference here.

    Returns:
      [B, N] float32 logits of a grid of patches in row-major order; an image's
      do not depend on the others.

    Raises:
      ValueError: images too small for the stages, or an unknown downsampling.
    """
    del train
    downsample = _find_downsampling(self.downsampling)
    _check_sides(images, self.num_stages)
    # PyTorch's variance, since the scale of the first logits follows from it.
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
  """Judges an image as a whole: residual blocks as in StyleGAN 2, no norms.

  github.com/google-research/magvit, `stylegan_discriminator_2d.py`: 64 or 128
  filters and multipliers (2, 4, 4, 4, 4) for 128 x 128 pixels. Small images
  take fewer multipliers. The size of images is fixed by the parameters.

  Attributes:
    filters: channels of the first convolution.
    multipliers: of these, the channels of each residual block, which halves
      the sides.
    downsampling: a key of `DOWNSAMPLINGS`.
  """

  filters: int
  multipliers: tuple[int, ...]
  downsampling: str

  @property
  def frozen_parameters(self) -> tuple[str, ...]:
    """Regular expressions of the parameters that never train: none."""
    return ()

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Judges images.

    Args:
      images: [B, H, W, 3] floats in [-1, 1].
      train: makes no difference here.

    Returns:
      [B, 1] float32 logits; an image's does not depend on the others.

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
        f' {num_halvings} times; give the discriminator fewer stages.'
    )


def _max_pool_to(x: jax.Array, size: int, axis: int) -> jax.Array:
  """PyTorch's adaptive max-pooling of an axis that is longer than `size`."""
  length = x.shape[axis]
  if length <= size:
    return x
  places = np.arange(size)
  first = places * length // size
  last = -(-(places + 1) * length // size) - 1
  # Windows of unequal length, whose last place is repeated as often as needed.
  widest = np.max(last - first) + 1
  windows = np.minimum(first[:, None] + np.arange(widest), last[:, None])
  return jnp.max(jnp.take(x, windows, axis), axis=axis + 1)
