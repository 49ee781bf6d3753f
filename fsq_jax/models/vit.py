"""ViT encoder and decoder."""

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.models import layers

POSITIONS = ('learned', 'sincos')


class Positions(nn.Module):
  """Adds a position embedding to a grid of tokens.

  'learned' has one vector per position of `grid_size` and accepts no other
  grid; 'sincos' is fixed and accepts any grid.
  """

  kind: str
  grid_size: tuple[int, int]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Adds positions to [B, h, w, C] tokens; returns float32."""
    height, width, channels = x.shape[1:]
    x = x.astype(jnp.float32)
    if self.kind == 'sincos':
      return x + layers.sincos_positions(height, width, channels)
    if (height, width) != tuple(self.grid_size):
      raise ValueError(
          f'Learned positions have a grid of {tuple(self.grid_size)} tokens,'
          f' not {(height, width)}; use images of the training size or'
          " position='sincos'."
      )
    init = nn.initializers.normal(stddev=0.02)
    return x + self.param('embedding', init, x.shape[1:], jnp.float32)


class _Vit(nn.Module):
  """Fields of encoder and decoder, and their transformer over a grid."""

  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  position: str
  grid_size: tuple[int, int]
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1

  def _transform(self, x: jax.Array) -> jax.Array:
    """Maps [B, h, w, width] to [B, h * w, width]: positions, transformer."""
    x = Positions(self.position, self.grid_size, name='positions')(x)
    return layers.Transformer(
        self.depth, self.num_heads, self.mlp_dim, self.dtype, self.remat,
        self.scan_unroll, name='transformer',
    )(rearrange(x, 'b h w c -> b (h w) c'))


class VitEncoder(_Vit):
  """Images to latents: linear patch embedding, positions, transformer."""

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes images.

    Args:
      images: [B, H, W, channels] floats in [-1, 1]; patch_size divides H and W.

    Returns:
      [B, H / patch_size, W / patch_size, width] float32 latents.

    Raises:
      ValueError: patch_size does not divide a side of the images.
    """
    p = self.patch_size
    height, width = images.shape[1:3]
    if height % p or width % p:
      raise ValueError(
          f'Images of {height} x {width} pixels cannot be cut into patches of'
          f' {p} x {p}; crop or pad both sides to multiples of {p}.'
      )
    patches = rearrange(
        images, 'b (h p) (w q) c -> b h w (p q c)', p=p, q=p
    )
    x = nn.Dense(self.width, dtype=self.dtype, name='patches')(patches)
    x = self._transform(x).astype(jnp.float32)
    return rearrange(x, 'b (h w) c -> b h w c', h=height // p)


class VitDecoder(_Vit):
  """Latents to images: positions, transformer, linear pixel head."""

  channels: int = 3

  @property
  def input_width(self) -> int:
    """Channels of the latents."""
    return self.width

  @nn.compact
  def __call__(self, latents: jax.Array) -> jax.Array:
    """Decodes latents.

    Args:
      latents: [B, h, w, width].

    Returns:
      [B, h * patch_size, w * patch_size, channels] float32 images, about in
      [-1, 1].
    """
    x = self._transform(latents)
    p = self.patch_size
    # Small kernels: the first reconstructions are near mid-grey.
    pixels = nn.Dense(
        p * p * self.channels, dtype=jnp.float32,
        kernel_init=nn.initializers.normal(0.02), name='pixels',
    )(x)
    return rearrange(
        pixels, 'b (h w) (p q c) -> b (h p) (w q) c',
        p=p, q=p, h=latents.shape[1],
    )
