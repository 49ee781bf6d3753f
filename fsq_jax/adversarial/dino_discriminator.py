"""A discriminator with a frozen DINO backbone."""

import dataclasses
import math

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.adversarial import spectral_norm
from fsq_jax.models import remat
from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import encoder as pretrained_vit

# The backbone of VAR and RAE: DINO ViT-S/8 with the approximate GELU.
ARCHITECTURE = dataclasses.replace(
    architectures.ARCHITECTURES['dino_S/8'], activation='gelu_tanh'
)
# Blocks with a head, in addition to the last one.
BLOCKS = (2, 5, 8, 11)


class DinoDiscriminator(nn.Module):
  """Classifies each patch by the latents of a frozen vision transformer.

  The projected discriminator of StyleGAN-T (arxiv.org/abs/2301.09515) as in VAR
  and github.com/bytetriper/RAE: images are resampled to 224 x 224 pixels, and
  five heads with spectral normalization classify the patches after the last
  block and after blocks 2, 5, 8 and 11 of DINO ViT-S/8. As there, block 11,
  which is the last, has two heads.

  The transformer's parameters are under 'backbone', from
  `load_discriminator_backbone`. They have no gradient; the images have one. VAR
  and RAE set the bias of the keys to 0. It is kept here, since it adds the same
  number to all logits of a query, which the softmax cancels.

  Attributes:
    architecture: of the transformer, such as `ARCHITECTURE`.
    image_size: (height, width) in pixels to which images are resampled.
    blocks: blocks with a head in addition to the last one, such as `BLOCKS`.
    kernel_size: of a head's residual convolution, in tokens; 9 in VAR and RAE.
    dtype: of the matmuls and convolutions; norms and logits are float32.
    remat: of blocks, see `models.remat.apply_remat`. Unless it is 'none', the
      backward pass also recomputes the norms and activations of the heads.
    scan_unroll: blocks per iteration of the loop over blocks.
  """

  architecture: architectures.Architecture
  image_size: tuple[int, int]
  blocks: tuple[int, ...]
  kernel_size: int
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1

  @property
  def frozen_parameters(self) -> tuple[str, ...]:
    """Regular expressions of frozen parameters."""
    return ('backbone/.*',)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Classifies images.

    Args:
      images: [B, H, W, 3] floats in [-1, 1], of any size.
      train: whether to update the spectral norms, in the collection
        `spectral_norm`.

    Returns:
      [B, N] float32 logits, head by head, patches in row-major order: 5 * 784
      for ViT-S/8. Images of a batch do not affect each other.

    Raises:
      ValueError: a block that does not exist, or an even kernel_size.
    """
    depth = self.architecture.depth
    if not all(0 <= block < depth for block in self.blocks):
      raise ValueError(
          f'blocks is {self.blocks}; the architecture has blocks 0 to'
          f' {depth - 1}.'
      )
    # Not a submodule, so that its parameters can be under stop_gradient.
    backbone = pretrained_vit.PretrainedVit(
        architecture=self.architecture, image_size=self.image_size,
        final_affine=False, resize='bilinear', dtype=self.dtype,
        remat=self.remat, scan_unroll=self.scan_unroll, parent=None,
    )
    images = images.astype(jnp.float32)
    method = 'latents_of_blocks'
    params = self.param(
        'backbone',
        lambda key: backbone.init(key, images, method=method)['params'],
    )
    latents = backbone.apply(
        {'params': jax.lax.stop_gradient(params)}, images, method=method
    ).astype(self.dtype)
    head = remat.apply_remat(
        DinoHead, 'none' if self.remat == 'none' else 'dots',
        static_argnums=(2,),
    )
    return jnp.concatenate(
        [
            head(self.kernel_size, self.dtype, name=f'head_{i}')(
                latents[block], train
            )
            for i, block in enumerate((depth - 1, *self.blocks))
        ],
        axis=1,
    )


class DinoHead(nn.Module):
  """Classifies [B, N, C] latents of patches: three convolutions.

  As in VAR under autocast, where the norms are in float32 too.

  Attributes:
    kernel_size: of the second convolution, in tokens, an odd number.
    dtype: of the first two convolutions; the last one, whose outputs are the
      logits, and the norms are float32.
  """

  kernel_size: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, latents: jax.Array, train: bool) -> jax.Array:
    """Returns [B, N] float32 logits; train as in `DinoDiscriminator`."""
    channels = latents.shape[-1]

    def conv(x, features, kernel_size, name, dtype=self.dtype):
      return spectral_norm.SpectralConv(
          features, kernel_size, dtype, name=name
      )(x, train=train)

    def finish(x, name):
      # The batch norm of VAR and RAE with virtual batches of one image.
      norm = nn.InstanceNorm(epsilon=1e-6, use_fast_variance=False, name=name)
      return nn.leaky_relu(norm(x), negative_slope=0.2)

    x = finish(conv(latents, channels, 1, 'in'), 'in_norm')
    y = conv(x, channels, self.kernel_size, 'residual')
    x = (x + finish(y, 'residual_norm')) / math.sqrt(2)
    return rearrange(conv(x, 1, 1, 'out', jnp.float32), 'b n 1 -> b n')
