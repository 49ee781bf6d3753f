"""The convolutional encoder and decoder of MaskGIT's VQGAN.

Both are those of github.com/google-research/maskgit (and, for images, of
MAGVIT), which the FSQ paper (arXiv 2309.15505) trains with: VQGAN's without
attention. They take images of any size that their stride divides, whatever
size they were initialized or trained with; GroupNorm's statistics, over the
whole image, are all that knows of its size. Given the size of images within
larger arrays, they compute what they would without the rest.
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
  def __call__(
      self, x: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """Transforms [B, h, w, C] to [B, h, w, filters]; mask: see `_mask`."""
    y = x = partitioning.constrain(x)
    for i in range(2):
      y = _normalize(f'norm_{i}', y, mask)
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
  takes_size = True

  @property
  def stride(self) -> int:
    """Pixels a side of a latent; it divides both sides of images."""
    return stride_of(self.channel_multipliers)

  @property
  def width(self) -> int:
    """Channels of the latents."""
    return self.latent_width

  @nn.compact
  def __call__(
      self, images: jax.Array, *, size: jax.Array | None = None
  ) -> jax.Array:
    """Encodes images.

    Args:
      images: [B, H, W, 3] floats in [-1, 1]; stride divides H and W.
      size: (height, width) of the images where H and W are larger, multiples of
        stride. What is beyond is ignored.

    Returns:
      [B, h, w, latent_width] float32 latents, h = H / stride, w = W / stride;
      those beyond size mean nothing.

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
    mask = _mask(images, size)
    images = _keep(images, mask)
    x = _conv(self.filters, 3, 'input', self.dtype, use_bias=False)(images)
    for level, multiplier in enumerate(self.channel_multipliers):
      filters = self.filters * multiplier
      if level:
        x = reduce(x, 'b (h p) (w q) c -> b h w c', 'mean', p=2, q=2)
        if mask is not None:
          mask = mask[:, ::2, ::2]
      for i in range(self.num_res_blocks):
        x = _block(self, filters, f'level_{level}_block_{i}')(x, mask)
    for i in range(self.num_res_blocks):
      x = _block(self, filters, f'final_block_{i}')(x, mask)
    return _conv(self.latent_width, 1, 'latents', jnp.float32)(
        _normalize('norm', x, mask)
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
  takes_size = True

  @property
  def stride(self) -> int:
    """Pixels a side of a latent."""
    return stride_of(self.channel_multipliers)

  @property
  def input_width(self) -> int:
    """Channels of the latents."""
    return self.latent_width

  @nn.compact
  def __call__(
      self, latents: jax.Array, *, size: jax.Array | None = None
  ) -> jax.Array:
    """Decodes latents.

    Args:
      latents: [B, h, w, latent_width].
      size: (rows, columns) of the latents where h and w are larger. What is
        beyond is ignored.

    Returns:
      [B, h * stride, w * stride, 3] float32 images, about in [-1, 1]; 0 beyond
      size.

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
    mask = _mask(latents, size)
    x = _conv(filters, 3, 'input', self.dtype)(_keep(latents, mask))
    for i in range(self.num_res_blocks):
      x = _block(self, filters, f'first_block_{i}')(x, mask)
    for level, multiplier in reversed(
        list(enumerate(self.channel_multipliers))
    ):
      filters = self.filters * multiplier
      for i in range(self.num_res_blocks):
        x = _block(self, filters, f'level_{level}_block_{i}')(x, mask)
      if level:
        x = repeat(x, 'b h w c -> b (h p) (w q) c', p=2, q=2)
        if mask is not None:
          mask = repeat(mask, 'b h w c -> b (h p) (w q) c', p=2, q=2)
        x = _conv(filters, 3, f'level_{level}_upsample', self.dtype)(
            _keep(x, mask)
        )
    x = _normalize('norm', x, mask)
    return _keep(_conv(3, 3, 'pixels', jnp.float32)(x), mask)


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


def _normalize(name: str, x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """GroupNorm, with the statistics of what the mask keeps, and swish."""
  norm = nn.GroupNorm(
      num_groups=NUM_GROUPS, epsilon=1e-6, dtype=jnp.float32, name=name
  )
  kept = None if mask is None else jnp.repeat(mask, x.shape[-1], axis=-1)
  return _keep(nn.swish(norm(x.astype(jnp.float32), mask=kept)), mask)


def _mask(x: jax.Array, size: jax.Array | None) -> jax.Array | None:
  """Returns [1, h, w, 1] bool, whether [B, h, w, C] is within size.

  A 3 x 3 convolution of what the mask keeps, zeros elsewhere, is within size
  what it would be if x ended there.
  """
  if size is None:
    return None
  rows, columns = (
      jnp.arange(num, dtype=jnp.int32) < side
      for num, side in zip(x.shape[1:3], size, strict=True)
  )
  return (rows[:, None] & columns)[None, :, :, None]


def _keep(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Returns x with zeros where the mask is False."""
  return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))
