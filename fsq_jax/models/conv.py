"""The convolutional encoder and decoder of MaskGIT's VQGAN.

VQGAN without attention, from github.com/google-research/maskgit (and, for
images, MAGVIT); the FSQ paper (arXiv 2309.15505) trains with it. The stride
must divide the sides of images, which may differ from the training size. For
images padded to larger arrays, results do not depend on the padding.
"""

from collections.abc import Sequence

from einops import reduce
from einops import repeat
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.models import remat
from fsq_jax.runtime import partitioning

# Of GroupNorm; the channels of every layer are a multiple.
NUM_GROUPS = 32
# Of images in this package.
PIXEL_RANGE = (-1.0, 1.0)


def stride_of(channel_multipliers: Sequence[int]) -> int:
  """Returns pixels per latent along a side; sides halve between levels."""
  return 2 ** (len(channel_multipliers) - 1)


class ResidualBlock(nn.Module):
  """GroupNorm, swish and a 3 x 3 convolution, twice, with a shortcut.

  If the number of channels changes, the shortcut is, as in MaskGIT, a 1 x 1
  convolution of the block's convolved values and not of its input.

  Attributes:
    filters: channels of the output.
    dtype: of the convolutions; GroupNorm and swish are in float32.
  """

  filters: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
      self, x: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, h, w, C] to [B, h, w, filters]; mask: see `_mask`."""
    y = x = partitioning.constrain(x)
    for i in range(2):
      y = _normalize(f'norm_{i}', y, mask)
      y = _conv(self.filters, 3, f'conv_{i}', self.dtype, use_bias=False)(y)
      y = partitioning.constrain(y)
    if x.shape[-1] == self.filters:
      return x + y
    return y + _conv(self.filters, 1, 'shortcut', self.dtype, use_bias=False)(y)


class ConvEncoder(nn.Module):
  """Images to latents: levels of residual blocks, with halving between them.

  The last layer, a 1 x 1 convolution, has the channels of a code (256 for
  MaskGIT's VQ, one per level count for FSQ), so that projector_in is 'none'.

  Attributes:
    filters: channels of the first level, before multipliers.
    channel_multipliers: multiple of filters for each level; all levels but the
      first start with 2 x 2 average pooling.
    num_res_blocks: residual blocks per level, and after the last level.
    latent_width: channels of the latents.
    grid_size: rows and columns of the latents of training images.
    dtype: of all convolutions but the last, which is float32.
    remat: of residual blocks, see `remat.apply_remat`.
    pixel_range: (low, high) to which pixels in [-1, 1] are mapped before the
      first convolution, whose padding is 0 in this range; (0, 1) for MaskGIT.
  """

  filters: int
  channel_multipliers: Sequence[int]
  num_res_blocks: int
  latent_width: int
  grid_size: tuple[int, int]
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  pixel_range: tuple[float, float] = PIXEL_RANGE
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
      images: [B, H, W, channels] floats in [-1, 1]; stride divides H and W.
      size: (height, width) of images padded to H and W, multiples of stride.
        The padding is ignored.

    Returns:
      [B, H / stride, W / stride, latent_width] float32 latents; latents of the
      padding are meaningless.

    Raises:
      ValueError: stride does not divide a side of the images.
    """
    height, width = images.shape[1:3]
    if height % self.stride or width % self.stride:
      raise ValueError(
          f'Images of {height} x {width} pixels cannot be halved'
          f' {len(self.channel_multipliers) - 1} times; crop or pad both sides'
          f' to multiples of {self.stride}.'
      )
    mask = _mask(images, size)
    images = _keep(_rescale(images, PIXEL_RANGE, self.pixel_range), mask)
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
  """Latents to images: levels of residual blocks, with doubling between them.

  The first layer, a 3 x 3 convolution, accepts the channels of a code, so that
  projector_out is 'none', as in MaskGIT.

  Attributes:
    filters: channels of the last level, before multipliers.
    channel_multipliers: multiple of filters for each level, in the order of the
      encoder, from pixels to latents; sides are doubled by nearest-neighbour
      upsampling and a 3 x 3 convolution after all levels but the last.
    num_res_blocks: residual blocks per level, and before the first level.
    latent_width: channels of the latents.
    grid_size: rows and columns of the latents of training images.
    dtype: of all convolutions but the last, which is float32.
    remat: of residual blocks, see `remat.apply_remat`.
    pixel_range: (low, high) of the last convolution's pixels, which are mapped
      to [-1, 1].
    channels: of the images.
  """

  filters: int
  channel_multipliers: Sequence[int]
  num_res_blocks: int
  latent_width: int
  grid_size: tuple[int, int]
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  pixel_range: tuple[float, float] = PIXEL_RANGE
  channels: int = 3
  takes_size = True

  @property
  def stride(self) -> int:
    """Pixels per latent along a side."""
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
      size: (rows, columns) of latents padded to h and w. The padding is
        ignored.

    Returns:
      [B, h * stride, w * stride, channels] float32 images, about in [-1, 1];
      0 in the padding.

    Raises:
      ValueError: latents have another number of channels.
    """
    if latents.shape[-1] != self.latent_width:
      raise ValueError(
          f'Latents have {latents.shape[-1]} channels, the decoder needs'
          f' {self.latent_width}; set its latent_width to the channels of'
          ' projector_out.'
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
    x = _conv(self.channels, 3, 'pixels', jnp.float32)(x)
    return _keep(_rescale(x, self.pixel_range, PIXEL_RANGE), mask)


def _block(module: nn.Module, filters: int, name: str) -> nn.Module:
  """Builds a residual block of an encoder or decoder."""
  block = remat.apply_remat(ResidualBlock, module.remat)
  return block(filters, module.dtype, name=name)


def _conv(
    filters: int, side: int, name: str, dtype: jnp.dtype, use_bias: bool = True
) -> nn.Conv:
  return nn.Conv(
      filters, (side, side), use_bias=use_bias, dtype=dtype, name=name
  )


def _normalize(name: str, x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """GroupNorm with statistics of unmasked values, and swish."""
  norm = nn.GroupNorm(
      num_groups=NUM_GROUPS, epsilon=1e-6, dtype=jnp.float32, name=name
  )
  kept = None if mask is None else jnp.repeat(mask, x.shape[-1], axis=-1)
  return _keep(nn.swish(norm(x.astype(jnp.float32), mask=kept)), mask)


def _rescale(
    x: jax.Array, source: tuple[float, float], target: tuple[float, float]
) -> jax.Array:
  """Maps values affinely from one (low, high) to another."""
  if tuple(source) == tuple(target):
    return x
  scale = (target[1] - target[0]) / (source[1] - source[0])
  return x * scale + (target[0] - source[0] * scale)


def _mask(x: jax.Array, size: jax.Array | None) -> jax.Array | None:
  """Returns [1, h, w, 1] bool, True within size; None without a size.

  With zeros outside of the mask, a 3 x 3 convolution gives the same values
  within size as for x cropped to size.
  """
  if size is None:
    return None
  rows, columns = (
      jnp.arange(num, dtype=jnp.int32) < side
      for num, side in zip(x.shape[1:3], size, strict=True)
  )
  return (rows[:, None] & columns)[None, :, :, None]


def _keep(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Returns x with zeros outside of the mask."""
  return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))
