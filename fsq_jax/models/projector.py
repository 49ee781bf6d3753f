"""Maps between the encoder's latents, the quantizer's codes and the decoder."""

from flax import linen as nn
import jax
from jax import numpy as jnp


class LinearProjectorIn(nn.Module):
  """Latents to the quantizer's dimensions: LayerNorm and a linear map, float32.

  Normalised latents and a kernel of variance 1 / C start every dimension at
  unit variance; nothing keeps it there.
  """

  code_dim: int

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [B, h, w, C] latents to [B, h, w, code_dim], float32."""
    del train  # The same in training and evaluation.
    x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name='norm')(latents)
    return nn.Dense(self.code_dim, dtype=jnp.float32, name='linear')(x)


class StandardizedProjectorIn(nn.Module):
  """A linear map whose outputs have mean 0 and variance 1, float32.

  Each dimension is standardised over all tokens of the global batch in
  training and by running averages in evaluation (BatchNorm without scale and
  bias, statistics in the collection `batch_stats`). At unit variance a
  tanh-bounded FSQ uses its levels about evenly, 98.9 to 99.3 % of log2(L) bits
  each for normal latents and L = 5 and 8, whatever the encoder does: no
  dimension shrinks to its middle levels or saturates at the outer ones.
  """

  code_dim: int

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [B, h, w, C] latents to [B, h, w, code_dim], float32."""
    z = nn.Dense(
        self.code_dim, use_bias=False, dtype=jnp.float32, name='linear'
    )(latents)
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.99,
        use_bias=False,
        use_scale=False,
        dtype=jnp.float32,
        name='standardize',
    )(z)


class LinearProjectorOut(nn.Module):
  """Codes to the decoder's width: one linear map."""

  width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, codes: jax.Array) -> jax.Array:
    """Maps [B, h, w, code_dim] codes to [B, h, w, width]."""
    return nn.Dense(self.width, dtype=self.dtype, name='linear')(codes)
