"""ViT encoder and decoder."""

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.models import layers

POSITIONS = ('learned', 'sincos')


class Positions(nn.Module):
  """Adds a position embedding to a grid of tokens.

  'learned' has one vector a position, for grids of `grid_size` only; 'sincos'
  is fixed and takes any grid.
  """

  kind: str
  grid_size: tuple[int, int]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Adds positions to [B, h, w, C] tokens, float32."""
    height, width, channels = x.shape[1:]
    x = x.astype(jnp.float32)
    if self.kind == 'sincos':
      return x + layers.sincos_positions(height, width, channels)
    if (height, width) != tuple(self.grid_size):
      raise ValueError(
          f'Learned positions are for a grid of {tuple(self.grid_size)} tokens,'
          f' not {(height, width)}; use images of the trained size or'
          " position='sincos'."
      )
    init = nn.initializers.normal(stddev=0.02)
    return x + self.param('embedding', init, x.shape[1:], jnp.float32)


class VitEncoder(nn.Module):
  """Images to latents: linear patch embedding, positions, transformer."""

  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  position: str
  grid_size: tuple[int, int]
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  scan_unroll: int = 1

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes images.

    Args:
      images: [B, H, W, 3] floats in [-1, 1]; patch_size divides H and W.

    Returns:
      [B, h, w, width] float32 latents, h = H / patch_size, w = W / patch_size.

    Raises:
      ValueError: a side of the images is no multiple of the patch side.
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
    x = Positions(self.position, self.grid_size, name='positions')(x)
    grid = {'h': height // p, 'w': width // p}
    x = layers.Transformer(
        self.depth, self.num_heads, self.mlp_dim, self.dtype, self.remat,
        self.scan_unroll, name='transformer',
    )(rearrange(x, 'b h w c -> b (h w) c'))
    x = x.astype(jnp.float32)
    return rearrange(x, 'b (h w) c -> b h w c', **grid)


class VitDecoder(nn.Module):
  """Latents to images: positions, transformer, linear pixel head."""

  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  position: str
  grid_size: tuple[int, int]
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  scan_unroll: int = 1

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
      [B, h * patch_size, w * patch_size, 3] float32 images, about in [-1, 1].
    """
    grid = {'h': latents.shape[1], 'w': latents.shape[2]}
    x = Positions(self.position, self.grid_size, name='positions')(latents)
    x = layers.Transformer(
        self.depth, self.num_heads, self.mlp_dim, self.dtype, self.remat,
        self.scan_unroll, name='transformer',
    )(rearrange(x, 'b h w c -> b (h w) c'))
    p = self.patch_size
    # Starts near mid-grey: the first steps need not unlearn a random image.
    pixels = nn.Dense(
        p * p * 3, dtype=jnp.float32,
        kernel_init=nn.initializers.normal(0.02), name='pixels',
    )(x)
    return rearrange(
        pixels, 'b (h w) (p q c) -> b (h p) (w q) c', p=p, q=p, **grid
    )
