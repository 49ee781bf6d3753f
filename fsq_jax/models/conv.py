"""The convolutional encoder and decoder of MaskGIT's VQGAN.

Both are those of github.com/google-research/maskgit (and, for images, of
MAGVIT), which the FSQ paper (arXiv 2309.15505) trains with: VQGAN's without
attention. They take images of any size that their stride divides, whatever
size they were initialized or trained with; GroupNorm's statistics, over the
whole image, are all that knows of its size.
"""

from collections.abc import Sequence

from einops import reduce
from einops import repeat
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.runtime import partitioning

# Channels of every layer are a multiple.
NUM_GROUPS = 32


def stride_of(channel_multipliers: Sequence[int]) -> int:
  """Pixels a side of a latent: resolutions halve from level to level."""
  return 2 ** (len(channel_multipliers) - 1)


class ResidualBlock(nn.Module):
  """GroupNorm, swish and a 3 x 3 convolution, twice, beside a shortcut.

  Where the number of channels changes, the shortcut of MaskGIT is a 1 x 1
  convolution of what the convolutions made, not of what the block was given:
  such a block hands nothing on as it is. It is kept, since weights trained so
  mean nothing in another block.

  Attributes:
    filters: channels of the result.
    dtype: of the convolutions; GroupNorm and swish are in float32.
  """

  filters: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Transforms [B, h, w, C] to [B, h, w, filters]."""
    y = x = partitioning.constrain(x)
    for i in range(2):
      y = _normalize(f'norm_{i}', y)
      y = _conv(self.filters, 3, f'conv_{i}', self.dtype, use_bias=False)(y)
      y = partitioning.constrain(y)
    if x.shape[-1] == self.filters:
      return x + y
    return y + _conv(self.filters, 1, 'shortcut', self.dtype, use_bias=False)(y)


class ConvEncoder(nn.Module):
  """Images to latents: levels of residual blocks, halved between them.

  Its last layer, a 1 x 1 convolution, makes the channels of a code: 256 of the
  VQ in MaskGIT, one for each of the levels of FSQ. projector_in then is 'none'.

  Attributes:
    filters: channels of the first level, before multipliers.
    channel_multipliers: of filters, for each level; those after the first one
      halve both sides first, by averages of 2 x 2.
    num_res_blocks: of each level, and as many again at the end.
    latent_width: channels of the latents.
    grid_size: rows and columns of the latents of training images.
    dtype: of the convolutions but the last one, which is in float32.
    remat: whether the backward pass computes each residual block again.
  """

  filters: int
  channel_multipliers: Sequence[int]
  num_res_blocks: int
  latent_width: int
  grid_size: tuple[int, int]
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @property
  def stride(self) -> int:
    """Pixels a side of a latent; it divides both sides of images."""
    return stride_of(self.channel_multipliers)

  @property
  def width(self) -> int:
    """Channels of the latents."""
    return self.latent_width

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes images.

    Args:
      images: [B, H, W, 3] floats in [-1, 1]; stride divides H and W.

    Returns:
      [B, h, w, latent_width] float32 latents, h = H / stride, w = W / stride.

    Raises:
      ValueError: a side of the images is no multiple of the stride.
    """
    height, width = images.shape[1:3]
    if height % self.stride or width % self.stride:
      raise ValueError(
          f'Images of {height} x {width} pixels do not halve'
          f' {len(self.channel_multipliers) - 1} times; crop or pad both sides'
          f' to multiples of {self.stride}.'
      )
    x = _conv(self.filters, 3, 'input', self.dtype, use_bias=False)(images)
    for level, multiplier in enumerate(self.channel_multipliers):
      filters = self.filters * multiplier
      if level:
        x = reduce(x, 'b (h p) (w q) c -> b h w c', 'mean', p=2, q=2)
      for i in range(self.num_res_blocks):
        x = _block(self, filters, f'level_{level}_block_{i}')(x)
    for i in range(self.num_res_blocks):
      x = _block(self, filters, f'final_block_{i}')(x)
    return _conv(self.latent_width, 1, 'latents', jnp.float32)(
        _normalize('norm', x)
    )


class ConvDecoder(nn.Module):
  """Latents to images: levels of residual blocks, doubled between them.

  Its first layer, a 3 x 3 convolution, takes the channels of a code in MaskGIT;
  projector_out then is 'none'.

  Attributes:
    filters: channels of the last level, before multipliers.
    channel_multipliers: of filters, for each level, in the order of the
      encoder, from pixels to latents; sides double, by nearest neighbours and
      a 3 x 3 convolution, before all levels but the last.
    num_res_blocks: of each level, and as many in front of them.
    latent_width: channels of the latents.
    grid_size: rows and columns of the latents of training images.
    dtype: of the convolutions but the last one, which is in float32.
    remat: whether the backward pass computes each residual block again.
  """

  filters: int
  channel_multipliers: Sequence[int]
  num_res_blocks: int
  latent_width: int
  grid_size: tuple[int, int]
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @property
  def stride(self) -> int:
    """Pixels a side of a latent."""
    return stride_of(self.channel_multipliers)

  @property
  def input_width(self) -> int:
    """Channels of the latents."""
    return self.latent_width

  @nn.compact
  def __call__(self, latents: jax.Array) -> jax.Array:
    """Decodes latents.

    Args:
      latents: [B, h, w, latent_width].

    Returns:
      [B, h * stride, w * stride, 3] float32 images, about in [-1, 1].

    Raises:
      ValueError: latents have another number of channels.
    """
    if latents.shape[-1] != self.latent_width:
      raise ValueError(
          f'The decoder takes latents of {self.latent_width} channels, not'
          f' {latents.shape[-1]}; give it the latent_width of what'
          ' projector_out makes.'
      )
    filters = self.filters * self.channel_multipliers[-1]
    x = _conv(filters, 3, 'input', self.dtype)(latents)
    for i in range(self.num_res_blocks):
      x = _block(self, filters, f'first_block_{i}')(x)
    for level, multiplier in reversed(
        list(enumerate(self.channel_multipliers))
    ):
      filters = self.filters * multiplier
      for i in range(self.num_res_blocks):
        x = _block(self, filters, f'level_{level}_block_{i}')(x)
      if level:
        x = repeat(x, 'b h w c -> b (h p) (w q) c', p=2, q=2)
        x = _conv(filters, 3, f'level_{level}_upsample', self.dtype)(x)
    x = _normalize('norm', x)
    return _conv(3, 3, 'pixels', jnp.float32)(x)


def _block(module: nn.Module, filters: int, name: str) -> nn.Module:
  """A residual block of the module."""
  block = nn.remat(ResidualBlock) if module.remat else ResidualBlock
  return block(filters, module.dtype, name=name)


def _conv(
    filters: int, side: int, name: str, dtype: jnp.dtype, use_bias: bool = True
) -> nn.Conv:
  return nn.Conv(
      filters, (side, side), use_bias=use_bias, dtype=dtype, name=name
  )


def _normalize(name: str, x: jax.Array) -> jax.Array:
  """GroupNorm and swish, float32."""
  norm = nn.GroupNorm(
      num_groups=NUM_GROUPS, epsilon=1e-6, dtype=jnp.float32, name=name
  )
  return nn.swish(norm(x.astype(jnp.float32)))
