"""FSQ inside a Flax NNX module: vectors to one token each, and back."""

from flax import nnx
import jax

from fsq_jax.quantizers import FSQ


class Autoencoder(nnx.Module):
  """An MLP autoencoder with FSQ between its halves."""

  def __init__(
      self,
      levels: tuple[int, ...],
      *,
      width: int,
      features: int,
      rngs: nnx.Rngs,
  ):
    """Initializes the weights.

    Args:
      levels: levels of FSQ, one per output channel of the encoder.
      width: number of channels of the hidden layers.
      features: number of channels of the vectors.
      rngs: random number generators of the parameters.
    """
    self.encoder = nnx.Sequential(
        nnx.Linear(features, width, rngs=rngs),
        nnx.gelu,
        nnx.Linear(width, len(levels), rngs=rngs),
    )
    # FSQ has no variables, so that the bridge needs no lazy_init. The bridge
    # offers all methods of FSQ.
    self.quantizer = nnx.bridge.ToNNX(FSQ(levels, commitment_weight=0))
    self.decoder = nnx.Sequential(
        nnx.Linear(len(levels), width, rngs=rngs),
        nnx.gelu,
        nnx.Linear(width, features, rngs=rngs),
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
