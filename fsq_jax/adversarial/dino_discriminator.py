"""A discriminator that sees images through a frozen DINO."""

from collections.abc import Mapping
import dataclasses
import math
import os
from typing import Any

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax import models
from fsq_jax.adversarial import spectral_norm
from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import encoder as pretrained_vit
from fsq_jax.models.pretrained import loading as pretrained

# What VAR and RAE judge with: DINO ViT-S/8, but for the approximate GELU.
ARCHITECTURE = dataclasses.replace(
    models.ARCHITECTURES['dino_S/8'], activation='gelu_tanh'
)
# Whose outputs are judged, next to those of the last one.
BLOCKS = (2, 5, 8, 11)
# Of an architecture, what the parameters of a checkpoint fit anyway.
_FREE = ('activation', 'norm_epsilon')


class DinoDiscriminator(nn.Module):
  """Judges each patch by what a frozen vision transformer makes of it.

  The projected discriminator of StyleGAN-T (arxiv.org/abs/2301.09515) in the
  form of VAR and github.com/bytetriper/RAE: images are resampled to 224 x 224
  pixels, and five heads with spectral norm judge the patches after the last
  block and after blocks 2, 5, 8 and 11 of DINO ViT-S/8. Block 11 is the last
  and is judged twice, as there.

  The transformer's parameters are under 'backbone', of
  `load_discriminator_backbone`. They get no gradient; the images do. Those
  ports set the bias of the keys to 0. It adds one number to all that a query
  is compared with, which softmax does not see: nothing is done about it here.

  Attributes:
    architecture: of the transformer, such as `ARCHITECTURE`.
    image_size: (height, width) in pixels that images are resampled to.
    blocks: those judged next to the last one, such as `BLOCKS`.
    kernel_size: tokens that a head's residual convolution sees, 9 there.
    dtype: of the products in the transformer; the heads are in float32.
    remat: whether the backward pass computes each block again.
    scan_unroll: blocks laid out in one iteration; changes speed, not results.
  """

  architecture: architectures.Architecture
  image_size: tuple[int, int]
  blocks: tuple[int, ...]
  kernel_size: int
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  scan_unroll: int = 1

  @property
  def frozen_parameters(self) -> tuple[str, ...]:
    """Regular expressions of the parameters that never train."""
    return ('backbone/.*',)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Judges images.

    Args:
      images: [B, H, W, 3] floats in [-1, 1], of any size.
      train: whether the estimates of the spectral norm get better, in the
        collection `spectral_norm`.

    Returns:
      [B, N] float32 logits, those of one head after those of another and each
      of the patches in row-major order: 5 * 784 of ViT-S/8. An image's do not
      depend on the others.

    Raises:
      ValueError: a block that is not there, or an even kernel_size.
    """
    depth = self.architecture.depth
    if not all(0 <= block < depth for block in self.blocks):
      raise ValueError(
          f'blocks are {self.blocks}; the architecture has those from 0 to'
          f' {depth - 1}.'
      )
    # Not a submodule, so that its parameters can be cut off from gradients.
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
    )
    return jnp.concatenate(
        [
            DinoHead(self.kernel_size, name=f'head_{i}')(
                latents[block], train=train
            )
            for i, block in enumerate((depth - 1, *self.blocks))
        ],
        axis=1,
    )


class DinoHead(nn.Module):
  """Judges [B, N, C] latents of patches: two convolutions and a product.

  Attributes:
    kernel_size: tokens that the second convolution sees, an odd number.
  """

  kernel_size: int

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns [B, N] float32 logits; train as in `DinoDiscriminator`."""
    channels = latents.shape[-1]

    def conv(x, features, kernel_size, name):
      return spectral_norm.SpectralConv(features, kernel_size, name=name)(
          x, train=train
      )

    def finish(x, name):
      # The ports' batch norm has virtual batches of one image.
      norm = nn.InstanceNorm(epsilon=1e-6, use_fast_variance=False, name=name)
      return nn.leaky_relu(norm(x), negative_slope=0.2)

    x = finish(conv(latents, channels, 1, 'in'), 'in_norm')
    y = conv(x, channels, self.kernel_size, 'residual')
    x = (x + finish(y, 'residual_norm')) / math.sqrt(2)
    return rearrange(conv(x, 1, 1, 'out'), 'b n 1 -> b n')


def load_discriminator_backbone(
    path: str | os.PathLike[str],
    discriminator: DinoDiscriminator,
    *,
    shardings: pretrained.Shardings | None = None,
) -> Mapping[str, Any]:
  """Loads the frozen parameters of a discriminator.

  Args:
    path: as in `models.load_encoder`: a Hugging Face directory of DINO,
      such as facebook/dino-vits8 with a model.safetensors.
    discriminator: whose architecture the checkpoint must have, but for the
      activation and LayerNorm's epsilon, which remain the discriminator's.
      (Hugging Face's epsilon of DINO is 1e-12; it was trained with 1e-6.)
    shardings: as in `models.load_encoder`.

  Returns:
    What belongs under 'backbone' in the parameters, float32.

  Raises:
    ValueError: files that are missing or damaged, or another architecture.
  """
  found = models.build_encoder(path).architecture
  differences = [
      f'{field.name} is {getattr(found, field.name)!r} instead of {expected!r}'
      for field in dataclasses.fields(found)
      if field.name not in _FREE
      and getattr(found, field.name)
      != (expected := getattr(discriminator.architecture, field.name))
  ]
  if differences:
    raise ValueError(
        f'{path} does not fit the discriminator: {"; ".join(differences)}.'
    )
  encoder = models.load_encoder(
      path, discriminator.image_size, final_affine=False, shardings=shardings
  )
  return encoder.variables['params']
