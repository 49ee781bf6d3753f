"""A vision transformer for pretrained weights of several families."""

from collections.abc import Callable

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.models import layers
from fsq_jax.models import resampling
from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import blocks as vit_blocks

_INIT = nn.initializers.normal(stddev=0.02)


def rope_angles(
    height: int, width: int, head_dim: int, theta: float
) -> np.ndarray:
  """Returns the angles of DINOv3's rotary position embedding.

  Patch centres lie in [-1, 1] along both axes. A quarter of the channels
  rotates with the row and a quarter with the column, by a full turn at the
  edges down to 1 / theta of it; the second half, the other channels of the
  pairs, has the same angles. Equal to Hugging Face's
  `DINOv3ViTRopePositionEmbedding`.

  Args:
    height: rows of the grid.
    width: columns of the grid.
    head_dim: channels of a head, a multiple of 4.
    theta: base of the wavelengths.

  Returns:
    [height * width, head_dim] float64 radians, tokens in row-major order.
  """
  frequencies = theta ** -(np.arange(head_dim // 4) * 4 / head_dim)
  rows = 2 * (np.arange(height) + 0.5) / height - 1
  columns = 2 * (np.arange(width) + 0.5) / width - 1
  grid = np.stack(np.meshgrid(rows, columns, indexing='ij'), axis=-1)
  angles = 2 * np.pi * np.einsum('hwa,f->hwaf', grid, frequencies)
  return np.tile(rearrange(angles, 'h w a f -> (h w) (a f)'), 2)


class PretrainedVit(nn.Module):
  """Encodes images to latents, with weights from `models.load_encoder`.

  Attributes:
    architecture: sizes and variants.
    image_size: (height, width) in pixels to which images are resampled; fixes
      the grid of added positions.
    final_affine: whether the last LayerNorm has a scale and a bias; without
      them every token has mean 0 and variance 1.
    resize: kernel for images of another size, of `resampling.KERNELS`.
      'bicubic' as in github.com/hugoycj/RAE for every family;
      'bicubic_antialias' is closer to how Pillow shrinks photographs.
    dtype: of the matmuls; LayerNorm and softmax are in float32.
    remat: of blocks, see `remat.apply_remat`.
    scan_unroll: blocks unrolled per iteration; changes speed, not results.
  """

  architecture: architectures.Architecture
  image_size: tuple[int, int]
  final_affine: bool = True
  resize: str = 'bicubic'
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1

  @property
  def width(self) -> int:
    """Channels of the latents."""
    return self.architecture.width

  @property
  def grid_size(self) -> tuple[int, int]:
    """Rows and columns of the latents."""
    patch = self.architecture.patch_size
    return self.image_size[0] // patch, self.image_size[1] // patch

  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes images.

    Args:
      images: [B, H, W, 3] floats in [-1, 1], of any size.

    Returns:
      [B, h, w, width] float32 latents of the patches of images resampled to
      image_size, without class token and registers.
    """
    arch = self.architecture
    latents = self.tokens(self._normalize(images))[:, arch.num_prefix_tokens:]
    return rearrange(
        latents, 'b (h w) c -> b h w c', h=self.grid_size[0]
    )

  def latents_of_blocks(self, images: jax.Array) -> jax.Array:
    """Encodes images and returns the output of every block.

    The module has no parameters of the last LayerNorm.

    Args:
      images: [B, H, W, 3] floats in [-1, 1], of any size.

    Returns:
      [depth, B, N, width] float32 latents of patches in row-major order, before
      any last LayerNorm.
    """

    def keep(x: jax.Array, rotation: vit_blocks.Rotation) -> jax.Array:
      outputs = vit_blocks.apply_blocks(self, x, rotation, keep_all=True)
      return outputs[:, :, self.architecture.num_prefix_tokens:]

    return self._transform(self._normalize(images), keep).astype(jnp.float32)

  def tokens(self, images: jax.Array) -> jax.Array:
    """Encodes images that are already normalized by mean and std.

    Args:
      images: [B, H, W, 3] floats, of image_size unless positions are 'rope'.

    Returns:
      [B, N, width] float32 tokens after the last LayerNorm: class token,
      registers, patches in row-major order.

    Raises:
      ValueError: images of another grid than the added positions.
    """

    def finish(x: jax.Array, rotation: vit_blocks.Rotation) -> jax.Array:
      x = vit_blocks.apply_blocks(self, x, rotation)
      return vit_blocks.layer_norm(
          self.architecture, 'norm', self.final_affine
      )(x.astype(jnp.float32))

    return self._transform(images, finish)

  def _normalize(self, images: jax.Array) -> jax.Array:
    """Resamples images in [-1, 1] and normalizes them by mean and std."""
    arch = self.architecture
    images = resampling.resize_images(images, self.image_size, self.resize)
    return ((images + 1) / 2 - np.float32(arch.mean)) / np.float32(arch.std)

  @nn.compact
  def _transform(
      self,
      images: jax.Array,
      blocks: Callable[[jax.Array, vit_blocks.Rotation], jax.Array],
  ) -> jax.Array:
    """Returns `blocks` of the tokens of normalized images."""
    arch = self.architecture
    p = arch.patch_size
    height, width = images.shape[1] // p, images.shape[2] // p
    patches = rearrange(
        images[:, :height * p, :width * p],
        'b (h p) (w q) c -> b h w (p q c)', p=p, q=p,
    )
    x = nn.Dense(arch.width, dtype=self.dtype, name='patches')(patches)
    x = self._prepend(rearrange(self._add_positions(x), 'b h w c -> b (h w) c'))
    return blocks(x, _rotation(arch, height, width))

  def _add_positions(self, x: jax.Array) -> jax.Array:
    """Adds positions to [B, h, w, C] tokens of patches."""
    arch = self.architecture
    if arch.position == 'rope':
      return x
    if x.shape[1:3] != self.grid_size:
      raise ValueError(
          f'The position embedding is for a grid of {self.grid_size} tokens,'
          f' not {x.shape[1:3]}; use images of {self.image_size} pixels, or'
          ' load the encoder with another image_size.'
      )
    init = _sincos if arch.position == 'sincos' else _INIT
    positions = self.param('positions', init, x.shape[1:], jnp.float32)
    return x.astype(jnp.float32) + positions

  def _prepend(self, x: jax.Array) -> jax.Array:
    """Prepends class token and registers to [B, N, C] tokens of patches."""
    arch = self.architecture
    prefix = []
    if arch.num_class_tokens:
      token = self.param('class_token', _INIT, (arch.width,), jnp.float32)
      if arch.position != 'rope':
        # Separate parameters, as in the checkpoints.
        zeros = nn.initializers.zeros
        # Not in place: parameters may be NumPy arrays.
        token = token + self.param(
            'class_position', zeros, (arch.width,), jnp.float32
        )
      prefix.append(token[None])
    if arch.num_registers:
      shape = (arch.num_registers, arch.width)
      prefix.append(self.param('registers', _INIT, shape, jnp.float32))
    tokens = [jnp.broadcast_to(t, (x.shape[0], *t.shape)) for t in prefix]
    return jnp.concatenate([*(t.astype(x.dtype) for t in tokens), x], axis=1)


def _sincos(
    key: jax.Array, shape: tuple[int, int, int], dtype: jnp.dtype
) -> jax.Array:
  del key  # Not random.
  return jnp.asarray(layers.sincos_positions(*shape), dtype)


def _rotation(
    arch: architectures.Architecture, height: int, width: int
) -> vit_blocks.Rotation:
  if arch.position != 'rope':
    return None
  head_dim = arch.width // arch.num_heads
  angles = rope_angles(height, width, head_dim, arch.rope_theta)
  # Class token and registers are not rotated.
  angles = np.pad(angles, ((arch.num_prefix_tokens, 0), (0, 0)))
  return (
      jnp.asarray(np.sin(angles), jnp.float32),
      jnp.asarray(np.cos(angles), jnp.float32),
  )
