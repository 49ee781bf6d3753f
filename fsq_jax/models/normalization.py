"""Normalization of latents by statistics measured over a data set."""

from flax import linen as nn
import jax
from jax import numpy as jnp

# As in RAE: keeps latents of variance 0 finite.
_VARIANCE_EPSILON = 1e-5


class LatentStatistics(nn.Module):
  """Normalizes latents to mean 0 and variance 1, and back.

  Mean and variance are not parameters: they are in the collection `constants`,
  from a file that `train.latent_statistics` writes. As in RAE
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
    """Inverts `normalize`."""
    return latents * self._deviation() + self.mean.value

  def _deviation(self) -> jax.Array:
    return jnp.sqrt(self.variance.value + _VARIANCE_EPSILON)
