"""The tokenizing autoencoder: five parts, one encode path, one decode path."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.models import normalization
from fsq_jax.quantizers import base as quantizers
from fsq_jax.quantizers import specs
from fsq_jax.runtime import partitioning


class AutoencoderOutput(NamedTuple):
  """Result of a forward pass.

  Attributes:
    reconstructions: [B, H, W, channels] float32, about in [-1, 1].
    quantizer_loss: float32 scalar, weighted by the quantizer; 0 if it has no
      loss.
    indices: [B, h, w, *index_shape] int32 in [0, codebook_size), -1 for NaN
      latents; index_shape is () for most quantizers.
    latents: [B, h, w, C] float32 output of the encoder, without noise.
  """

  reconstructions: jax.Array
  quantizer_loss: jax.Array
  indices: jax.Array
  latents: jax.Array


class Autoencoder(nn.Module):
  """Encoder, projector, quantizer, projector, decoder.

  All arrays are channels last, and quantizers treat each token independently.
  hugoycj/RAE's `quantize_before_reshape` chooses between two layouts of the
  same numbers; both give the codes of this model.

  Attributes:
    encoder: images [B, H, W, channels] to latents [B, h, w, C].
    projector_in: latents to [B, h, w, quantizer.code_dim].
    quantizer: any `quantizers.Quantizer`, channels last.
    projector_out: codes to the decoder's latents.
    decoder: latents to images.
    latent_noise: tau >= 0, `noise_tau` of github.com/hugoycj/RAE. In training
      the latents become z + tau u eps, with u uniform in [0, 1) for each image
      and eps unit normal, drawn from the rng 'quantizer': the decoder learns to
      tolerate small errors of codes.
    statistics: normalizes the latents after encoder and noise, and inverts that
      after projector_out; None leaves both out.
  """

  encoder: nn.Module
  projector_in: nn.Module
  quantizer: quantizers.Quantizer
  projector_out: nn.Module
  decoder: nn.Module
  latent_noise: float = 0.0
  statistics: normalization.LatentStatistics | None = None

  @property
  def channels(self) -> int:
    """Channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA)."""
    # Decoders without the field make RGB images.
    return getattr(self.decoder, 'channels', 3)

  def __call__(
      self,
      images: jax.Array,
      *,
      train: bool = False,
      size: jax.Array | None = None,
  ) -> AutoencoderOutput:
    """Reconstructs [B, H, W, channels] images in [-1, 1]; see `encode`."""
    latents = partitioning.constrain(self.encoder(images, **_sized(size)))
    quantized = self._quantize(latents, train=train)
    if size is not None:
      size = size // self.encoder.stride
    return AutoencoderOutput(
        reconstructions=self.decode(quantized.z_q, size=size),
        quantizer_loss=quantized.loss,
        indices=quantized.indices,
        latents=latents,
    )

  def encode(
      self,
      images: jax.Array,
      *,
      train: bool = False,
      size: jax.Array | None = None,
  ) -> quantizers.QuantizerOutput:
    """Encodes images to codes, loss and indices.

    Args:
      images: [B, H, W, channels] in [-1, 1].
      train: whether this is training.
      size: [2] int32 (height, width) of images padded to H and W, multiples of
        the stride, for models with `takes_size`. The padding is ignored, and
        its codes are meaningless.
    """
    return self._quantize(self.encoder(images, **_sized(size)), train=train)

  def decode(
      self, codes: jax.Array, *, size: jax.Array | None = None
  ) -> jax.Array:
    """Decodes [B, h, w, code_dim] codes to [B, H, W, channels] images.

    Args:
      codes: from `encode`.
      size: as in `encode`, but rows and columns of codes.
    """
    latents = partitioning.constrain(self.projector_out(codes))
    if self.statistics is not None:
      latents = self.statistics.denormalize(latents)
    return partitioning.constrain(self.decoder(latents, **_sized(size)))

  def encode_to_indices(
      self, images: jax.Array, *, size: jax.Array | None = None
  ) -> jax.Array:
    """Encodes [B, H, W, channels] images in [-1, 1] to int32 indices.

    Returns [B, h, w], or [B, h, w, *index_shape] if a code has several indices;
    size: see `encode`.
    """
    return self.encode(images, size=size).indices

  def decode_from_indices(
      self,
      indices: jax.Array,
      *,
      spec: Mapping[str, Any] | None = None,
      size: jax.Array | None = None,
  ) -> jax.Array:
    """Decodes int32 indices to [B, H, W, channels] images.

    Args:
      indices: from `encode_to_indices`.
      spec: `quantizer.spec()` stored with the indices; ValueError if it is not
        this quantizer's.
      size: see `decode`.
    """
    if spec is not None:
      specs.check_same_spec(spec, self.quantizer.spec())
    return self.decode(self.quantizer.indices_to_codes(indices), size=size)

  def _quantize(
      self, latents: jax.Array, *, train: bool
  ) -> quantizers.QuantizerOutput:
    if train and self.latent_noise:
      latents = self.add_noise(latents)
    if self.statistics is not None:
      latents = self.statistics.normalize(latents)
    z = self.projector_in(latents, train=train)
    return self.quantizer(z, train=train)

  def add_noise(self, latents: jax.Array) -> jax.Array:
    """Adds Gaussian noise to latents, of one random size per image.

    The size is uniform in [0, latent_noise]. The noise does not depend on the
    devices.

    Args:
      latents: [B, h, w, C] floats.

    Returns:
      Same shape and dtype.
    """
    if not self.has_rng('quantizer'):
      raise ValueError(
          'latent_noise draws random numbers in training: call apply with'
          " rngs={'quantizer': key}, or set latent_noise to 0."
      )
    size_key, noise_key = jax.random.split(self.make_rng('quantizer'))
    shape = (latents.shape[0], *(1 for _ in latents.shape[1:]))
    sizes = self.latent_noise * jax.random.uniform(
        size_key, shape, jnp.float32
    )
    noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
    return latents + (sizes * noise).astype(latents.dtype)


def stride_of(model: Autoencoder) -> int | None:
  """Returns the divisor that sides of images need, or None for a fixed size.

  The size is fixed by learned positions or statistics of latents; parts that
  accept any size have a `stride`.
  """
  strides = [getattr(x, 'stride', None) for x in (model.encoder, model.decoder)]
  if None in strides or model.statistics is not None:
    return None
  return max(strides)


def takes_size(model: Autoencoder) -> bool:
  """Whether `Autoencoder.encode` accepts `size`.

  Encoder and decoder have to ignore padding, and nothing between them may mix
  positions.
  """
  return (
      stride_of(model) is not None
      and getattr(model.encoder, 'takes_size', False)
      and getattr(model.decoder, 'takes_size', False)
      and getattr(model.projector_in, 'takes_size', True)
  )


def _sized(size: jax.Array | None) -> dict[str, jax.Array]:
  """Keyword arguments of encoders and decoders, not all of which take size."""
  return {} if size is None else {'size': size}
