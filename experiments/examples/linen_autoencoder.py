"""FSQ inside a Flax linen module: vectors to one token each, and back."""

from flax import linen as nn
import jax

from fsq_jax.quantizers import FSQ


class Autoencoder(nn.Module):
  """An MLP autoencoder with FSQ between its halves.

  Attributes:
    levels: levels of FSQ, one per output channel of the encoder.
    width: number of channels of the hidden layers.
    features: number of channels of the vectors.
  """

  levels: tuple[int, ...]
  width: int
  features: int

  def setup(self):
    self.encoder = nn.Sequential(
        [nn.Dense(self.width), nn.gelu, nn.Dense(len(self.levels))]
    )
    # FSQ bounds the latents, so that it needs no commitment loss.
    self.quantizer = FSQ(self.levels, commitment_weight=0)
    self.decoder = nn.Sequential(
        [nn.Dense(self.width), nn.gelu, nn.Dense(self.features)]
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns reconstructions of vectors, both [..., features]."""
    z_q, _, _ = self.quantizer(self.encoder(x))
    return self.decoder(z_q)

  def encode_to_indices(self, x: jax.Array) -> jax.Array:
    """Returns int32 indices [...] of vectors [..., features]."""
    return self.quantizer(self.encoder(x)).indices

  def decode_from_indices(self, indices: jax.Array) -> jax.Array:
    """Returns vectors [..., features] of indices [...]."""
    return self.decoder(self.quantizer.indices_to_codes(indices))
