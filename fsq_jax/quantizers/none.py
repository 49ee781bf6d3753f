"""No quantizer: the continuous latents of an autoencoder without tokens."""

from typing import Any

import jax
from jax import numpy as jnp

from fsq_jax.quantizers import base
from fsq_jax.quantizers import checks


class NoQuantizer(base.Quantizer):
  """Identity, for continuous autoencoders (RAE, arXiv 2510.11690).

    z_q, loss, indices = NoQuantizer(code_dim=768).apply({}, z)

  z_q is z in its dtype, NaN included, and the gradient passes unchanged; the
  loss is 0. Codes have no indices: arrays of indices are [..., 0] and cannot be
  decoded.

  Attributes:
    code_dim: number of channels of a latent. Required.
  """

  # None, or dataclasses would take the property of Quantizer for the default.
  code_dim: int | None = None

  def __post_init__(self):
    checks.set_integers(self, 'code_dim', low=1)
    super().__post_init__()

  @property
  def codebook_size(self) -> int:
    return 0

  @property
  def index_shape(self) -> tuple[int, ...]:
    return (0,)

  def __call__(
      self, z: jax.Array, *, train: bool = False
  ) -> base.QuantizerOutput:
    del train
    z = jnp.asarray(z)
    return base.QuantizerOutput(
        z_q=z,
        loss=jnp.zeros((), jnp.float32),
        indices=self._no_indices(z, 'Latents'),
    )

  def codes_to_indices(self, codes: jax.Array) -> jax.Array:
    return self._no_indices(jnp.asarray(codes), 'Codes')

  def indices_to_codes(self, indices: jax.Array) -> jax.Array:
    del indices
    raise ValueError(
        "The quantizer 'none' has no tokens, only continuous latents; decode "
        'the latents (z_q of `encode`), or train with another quantizer, such '
        "as 'fsq'."
    )

  def spec(self) -> dict[str, Any]:
    return {'name': 'none', 'code_dim': int(self.code_dim), 'code': 'latent'}

  def _no_indices(self, x: jax.Array, name: str) -> jax.Array:
    """Checks latents or codes; returns [..., 0] int32 with their sharding."""
    return self._channels_last(x, name)[..., :0].astype(jnp.int32)
