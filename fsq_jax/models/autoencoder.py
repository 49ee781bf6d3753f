"""The tokenizing autoencoder: five parts, one encode path, one decode path."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax import quantizers
from fsq_jax.quantizers import specs
from fsq_jax.runtime import partitioning

# As in RAE: a latent that never varies stays finite.
_VARIANCE_EPSILON = 1e-5


class AutoencoderOutput(NamedTuple):
  """What a forward pass returns.

  Attributes:
    reconstructions: [B, H, W, 3] float32, about in [-1, 1].
    quantizer_loss: float32 scalar, weighted by the quantizer; 0 where it has
      none.
    indices: [B, h, w, *index_shape] int32 in [0, codebook_size), -1 where
      latents were NaN; index_shape, of the quantizer, is () for most.
    latents: [B, h, w, C] float32, what the encoder returned, without noise.
  """

  reconstructions: jax.Array
  quantizer_loss: jax.Array
  indices: jax.Array
  latents: jax.Array


class LatentStatistics(nn.Module):
  """Mean and variance of each latent, by which it is brought to 0 and 1.

  They are measured once, over a data set (`latent_statistics.measure`), and are
  no parameters: they live in the collection `constants`. As in RAE
  (arXiv 2510.11690), each channel of each position has its own.

  Attributes:
    grid_size: rows and columns of the latents.
    width: channels of the latents.
  """

  grid_size: tuple[int, int]
  width: int

  def setup(self):
    shape = (*self.grid_size, self.width)
    self.mean = self.variable(
        'constants', 'mean', jnp.zeros, shape, jnp.float32
    )
    self.variance = self.variable(
        'constants', 'variance', jnp.ones, shape, jnp.float32
    )

  def normalize(self, latents: jax.Array) -> jax.Array:
    """Maps [B, h, w, C] latents to mean 0 and variance 1."""
    return (latents - self.mean.value) / self._deviation()

  def denormalize(self, latents: jax.Array) -> jax.Array:
    """Undoes `normalize`."""
    return latents * self._deviation() + self.mean.value

  def _deviation(self) -> jax.Array:
    return jnp.sqrt(self.variance.value + _VARIANCE_EPSILON)


class Autoencoder(nn.Module):
  """Encoder, projector, quantizer, projector, decoder.

  Channels are last from latents to codes, and quantizers take every token for
  itself, so that the original's `quantize_before_reshape` (hugoycj/RAE:
  quantize the encoder's [B, N, C] tokens, or the grid [B, C, h, w] made of
  them) has no counterpart here: it chooses between two layouts of the same
  numbers, and both give the codes that this gives.

  Attributes:
    encoder: images [B, H, W, 3] to latents [B, h, w, C].
    projector_in: latents to [B, h, w, quantizer.code_dim].
    quantizer: any `quantizers.Quantizer`, channels last.
    projector_out: codes to the decoder's latents.
    decoder: latents to images.
    latent_noise: tau >= 0. In training the latents become z + tau u eps, with
      u uniform in [0, 1) for each image and eps unit normal, drawn from the
      rng 'quantizer': the decoder learns to bear codes that are a little off.
    statistics: None, or what normalizes latents behind the encoder and the
      noise, and what projector_out makes back again.
  """

  encoder: nn.Module
  projector_in: nn.Module
  quantizer: quantizers.Quantizer
  projector_out: nn.Module
  decoder: nn.Module
  latent_noise: float = 0.0
  statistics: LatentStatistics | None = None

  def __call__(
      self,
      images: jax.Array,
      *,
      train: bool = False,
      size: jax.Array | None = None,
  ) -> AutoencoderOutput:
    """Reconstructs [B, H, W, 3] images in [-1, 1]; size: see `encode`."""
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
      images: [B, H, W, 3] in [-1, 1].
      train: whether parameters are trained.
      size: for models that take it (`takes_size`): [2] int32, the height and
        width of the images where H and W are larger, multiples of the stride.
        What is beyond is ignored, and what it becomes means nothing.
    """
    return self._quantize(self.encoder(images, **_sized(size)), train=train)

  def decode(
      self, codes: jax.Array, *, size: jax.Array | None = None
  ) -> jax.Array:
    """Decodes [B, h, w, code_dim] codes to [B, H, W, 3] images.

    Args:
      codes: from `encode`.
      size: as in `encode`, but the rows and columns of the codes.
    """
    latents = partitioning.constrain(self.projector_out(codes))
    if self.statistics is not None:
      latents = self.statistics.denormalize(latents)
    return partitioning.constrain(self.decoder(latents, **_sized(size)))

  def encode_to_indices(
      self, images: jax.Array, *, size: jax.Array | None = None
  ) -> jax.Array:
    """Encodes [B, H, W, 3] images in [-1, 1] to int32 indices.

    These are [B, h, w], or [B, h, w, *index_shape] where codes have several;
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
    """Decodes int32 indices to [B, H, W, 3] images.

    Args:
      indices: what `encode_to_indices` returned.
      spec: `quantizer.spec()` of the quantizer that made them, as kept beside
        the tokens; another than this quantizer's raises ValueError.
      size: see `decode`.
    """
    if spec is not None:
      specs.check_same_spec(spec, self.quantizer.spec())
    return self.decode(self.quantizer.indices_to_codes(indices), size=size)

  def _quantize(
      self, latents: jax.Array, *, train: bool
  ) -> quantizers.QuantizerOutput:
    if train and self.latent_noise:
      latents = self._add_noise(latents)
    if self.statistics is not None:
      latents = self.statistics.normalize(latents)
    z = self.projector_in(latents, train=train)
    return self.quantizer(z, train=train)

  def _add_noise(self, latents: jax.Array) -> jax.Array:
    """Returns latents [B, ...] with noise; the same on any number of devices.

    The `noise_tau` of github.com/hugoycj/RAE.
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
  """What the sides of images have to be multiples of, or None.

  None are models that are tied to one grid of latents: by their positions, or
  by statistics of latents. Parts that are not have a `stride`.
  """
  strides = [getattr(x, 'stride', None) for x in (model.encoder, model.decoder)]
  if None in strides or model.statistics is not None:
    return None
  return max(strides)


def takes_size(model: Autoencoder) -> bool:
  """Whether the model takes the `size` of `Autoencoder.encode`.

  Both the encoder and the decoder have to ignore what is beyond it, and nothing
  between them may mix positions.
  """
  return stride_of(model) is not None and all(
      getattr(part, 'takes_size', default)
      for part, default in (
          (model.encoder, False), (model.decoder, False),
          (model.projector_in, True),
      )
  )


def _sized(size: jax.Array | None) -> dict[str, jax.Array]:
  """Arguments of encoders and decoders, of which not all take a size."""
  return {} if size is None else {'size': size}
