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
    """Draws the weights.

    Args:
      levels: of FSQ; the encoder's last layer has a channel for each.
      width: channels of the hidden layers.
      features: channels of the vectors.
      rngs: with a stream for parameters.
    """
    self.encoder = nnx.Sequential(
        nnx.Linear(features, width, rngs=rngs),
        nnx.gelu,
        nnx.Linear(width, len(levels), rngs=rngs),
    )
    # FSQ has no variables, so there is nothing to initialize. Its methods are
    # those of the bridge too.
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
