"""MAE's decoder for latents: a vision transformer with a class token."""

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.models import layers
from fsq_jax.models import resampling
from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import blocks as vit_blocks

# The sizes of RAE (arXiv 2510.11690): 86.2, 303.9 and 415.1 million parameters
# for patches of 16 x 16 pixels and latents of 768 channels.
PRESETS: Mapping[str, Mapping[str, int]] = {
    'B': {'width': 768, 'depth': 12, 'num_heads': 12, 'mlp_dim': 3072},
    'L': {'width': 1024, 'depth': 24, 'num_heads': 16, 'mlp_dim': 4096},
    'XL': {'width': 1152, 'depth': 28, 'num_heads': 16, 'mlp_dim': 4096},
}
# Mean and standard deviation of pixels in [0, 1] by which the decoder's outputs
# are denormalized, by encoder family; with 'none' outputs are in [-1, 1].
NORMALIZATIONS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    'none': {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)},
    **{
        family: {'mean': fields['mean'], 'std': fields['std']}
        for family, fields in architectures.FAMILIES.items()
    },
}


class MaeDecoder(nn.Module):
  """Decodes latents to images: linear embedding, transformer, pixel head.

  The `GeneralDecoder` of RAE (github.com/bytetriper/RAE): MAE's decoder with
  its own class token. Positions are fixed; they are in the collection
  `constants` and not parameters. Latents of another grid are resized
  bilinearly.

  Attributes:
    architecture: of the blocks and the patches; `mean` and `std` denormalize
      the pixels.
    input_width: channels of the latents.
    grid_size: rows and columns of tokens, and of patches of the images.
    dtype: of the matmuls in embedding and blocks; LayerNorm, softmax and the
      pixel head are in float32.
    remat: of blocks, see `remat.apply_remat`.
    scan_unroll: blocks unrolled per iteration; changes speed, not results.
  """

  architecture: architectures.Architecture
  input_width: int
  grid_size: tuple[int, int]
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1

  @property
  def image_size(self) -> tuple[int, int]:
    """Height and width of the images in pixels."""
    patch = self.architecture.patch_size
    return self.grid_size[0] * patch, self.grid_size[1] * patch

  def __call__(self, latents: jax.Array) -> jax.Array:
    """Decodes latents.

    Args:
      latents: [B, h, w, input_width], of any grid.

    Returns:
      [B, *image_size, 3] float32 images, approximately in [-1, 1].

    Raises:
      ValueError: latents with another number of channels.
    """
    arch = self.architecture
    pixels = rearrange(
        self.logits(latents), 'b (h w) (p q c) -> b (h p) (w q) c',
        h=self.grid_size[0], p=arch.patch_size, q=arch.patch_size,
    )
    # Denormalizes to [0, 1], and maps to [-1, 1].
    scale = 2 * np.asarray(arch.std, np.float32)
    shift = 2 * np.asarray(arch.mean, np.float32) - 1
    return pixels * scale + shift

  @nn.compact
  def logits(self, latents: jax.Array) -> jax.Array:
    """Decodes latents to normalized pixels, patch by patch.

    Args:
      latents: [B, h, w, input_width], of any grid.

    Returns:
      [B, N, P * P * 3] float32, patches in row-major order, each with axes
      row, column, channel.
    """
    arch = self.architecture
    if latents.shape[-1] != self.input_width:
      raise ValueError(
          f'The decoder takes latents of {self.input_width} channels, not'
          f' {latents.shape[-1]}; set input_width to the width of'
          ' projector_out.'
      )
    x = nn.Dense(arch.width, dtype=self.dtype, name='embed')(latents)
    # After the embedding, as in RAE; linear map and resizing commute.
    x = resampling.resize_images(x, self.grid_size, 'bilinear')
    positions = self._constant(
        'positions',
        lambda: layers.sincos_positions(*self.grid_size, arch.width),
    )
    tokens = rearrange(x + positions, 'b h w c -> b (h w) c')
    # Zeros in RAE. The first LayerNorm has a slope of 1 / sqrt(1e-12) at zero,
    # so the token's gradient would dominate the gradient norm.
    token = self.param(
        'class_token', nn.initializers.normal(0.02), (arch.width,), jnp.float32
    )
    # Zeros by default; checkpoints may have other values. Not in place: outside
    # of jit, parameters may be NumPy arrays.
    token = token + self._constant(
        'class_position', lambda: np.zeros(arch.width, np.float32)
    )
    token = jnp.broadcast_to(token, (x.shape[0], 1, arch.width))
    x = vit_blocks.apply_blocks(self, jnp.concatenate([token, tokens], axis=1))
    x = vit_blocks.layer_norm(arch, 'norm')(x[:, 1:].astype(jnp.float32))
    # Initial images are near mid-grey.
    return nn.Dense(
        arch.patch_size**2 * 3, dtype=jnp.float32,
        kernel_init=nn.initializers.normal(0.02), name='pixels',
    )(x)

  def _constant(self, name, make) -> jax.Array:
    def init():
      return jnp.asarray(make(), jnp.float32)

    return self.variable('constants', name, init).value


def build_mae_decoder(
    config: Mapping[str, Any],
    *,
    latent_grid: tuple[int, int],
    image_size: tuple[int, int],
    compute: Mapping[str, Any],
) -> MaeDecoder:
  """Builds the decoder 'mae' of the section `model.decoder`.

  Args:
    config: the `model.decoder` section; see configs/default.py.
    latent_grid: rows and columns of the latents; the decoder's grid unless the
      config sets another.
    image_size: required (height, width) of the images in pixels.
    compute: dtype, remat and scan_unroll.

  Raises:
    ValueError: unknown names, inconsistent sizes, or images of another size
      than image_size.
  """
  options = config['mae']
  for field, known in (('preset', ['none', *PRESETS]),
                       ('normalization', NORMALIZATIONS)):
    if options[field] not in known:
      raise ValueError(
          f'model.decoder.mae.{field} is {options[field]!r}; known:'
          f' {sorted(known)}.'
      )
  sizes = PRESETS.get(
      options['preset'],
      {n: config[n] for n in ('width', 'depth', 'num_heads', 'mlp_dim')},
  )
  try:
    architecture = architectures.build_architecture(
        'mae', patch_size=config['patch_size'], **sizes,
        **NORMALIZATIONS[options['normalization']],
    )
  except ValueError as error:
    raise ValueError(f'model.decoder is invalid. {error}') from error
  decoder = MaeDecoder(
      architecture=architecture,
      input_width=options['input_width'],
      grid_size=tuple(options['grid_size']) or tuple(latent_grid),
      **compute,
  )
  if decoder.image_size != tuple(image_size):
    raise ValueError(
        f'data.image_size is {tuple(image_size)}, but model.decoder makes'
        f' images of {decoder.image_size} pixels: {decoder.grid_size} patches'
        f' with a side of {config["patch_size"]}. Change'
        ' model.decoder.patch_size or model.decoder.mae.grid_size, to which'
        ' latents are resized.'
    )
  return decoder
