"""SimVQ: a frozen codebook and one learned linear map."""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.quantizers import base
from fsq_jax.quantizers import checks
from fsq_jax.quantizers import codebook
from fsq_jax.quantizers import lookup

_WEIGHTINGS = ('standard', 'legacy')
_INPUT_PROJECTIONS = ('none', 'linear')


class SimVQ(codebook.CodebookQuantizer):
  """Vector quantization with a frozen codebook and one linear map.

    quantizer = SimVQ(codebook_size=16384, code_dim=256)
    variables = quantizer.init(key, z)
    z_q, loss, indices = quantizer.apply(variables, z)

  After "Addressing representation collapse in vector quantized models with one
  linear layer" (arXiv 2411.02038, github.com/youngsheen/SimVQ) and the variants
  of hugoycj/RAE. Codes are E = C W + b. C is drawn once from N(0, 1/code_dim)
  and never changes; it is in the collection `codebook`. W and b are parameters;
  they move all codes together, so that no code stays unused. Indices decode to
  rows of E, not of C. Every call computes all of E: K * code_dim^2
  multiplications.

  Attributes:
    weighting: 'standard': commitment_weight on the commitment loss and 1 on the
      codebook loss; 'legacy': the reverse.
    input_projection: 'linear': another linear map for the latents, initialized
      to the identity; 'none'.
  """

  weighting: str = 'standard'
  input_projection: str = 'none'

  def __post_init__(self):
    checks.check_name('weighting', self.weighting, _WEIGHTINGS)
    checks.check_name(
        'input_projection', self.input_projection, _INPUT_PROJECTIONS
    )
    super().__post_init__()

  def setup(self):
    self.projected_codebook = _ProjectedCodebook(
        self.codebook_size, self.code_dim
    )
    if self.input_projection == 'linear':
      self.latent_projection = _dense(self.code_dim, _identity)

  def __call__(
      self, z: jax.Array, *, train: bool = False
  ) -> base.QuantizerOutput:
    del train
    z = jnp.asarray(z)
    x = self._channels_last(z, 'Latents').astype(jnp.float32)
    if self.input_projection == 'linear':
      x = self.latent_projection(x)
    x = lookup.METRICS[self.metric](x)
    table = self._codes()
    indices = lookup.nearest(x, table)
    codes = lookup.take(table, indices)
    commitment = codebook.commitment_loss(x, codes)
    codebook_loss = codebook.codebook_loss(x, codes)
    if self.weighting == 'legacy':
      loss = commitment + self.commitment_weight * codebook_loss
    else:
      loss = self.commitment_weight * commitment + codebook_loss
    return base.QuantizerOutput(
        z_q=self._pass_gradient(x, codes).astype(z.dtype),
        loss=loss,
        indices=indices,
    )

  def spec(self) -> dict[str, Any]:
    return {
        'name': 'simvq',
        **super().spec(),
        'input_projection': self.input_projection,
        'code': 'projected entry',
    }

  def _codes(self) -> jax.Array:
    return self._table(self.projected_codebook())


class _ProjectedCodebook(nn.Module):
  """Frozen entries C and the linear map to the codes, [K, d] float32."""

  codebook_size: int
  code_dim: int

  @nn.compact
  def __call__(self) -> jax.Array:
    shape = (self.codebook_size, self.code_dim)

    def draw() -> jax.Array:
      key = self.make_rng('params')
      entries = jax.random.normal(key, shape, jnp.float32)
      return entries * self.code_dim**-0.5

    entries = self.variable('codebook', 'entries', draw)
    codebook.check_shape('entries', entries.value, shape)
    kernel_init = nn.initializers.lecun_normal()
    project = _dense(self.code_dim, kernel_init, name='projection')
    return project(codebook.without_constant_folding(entries.value))


def _dense(
    code_dim: int, kernel_init: nn.initializers.Initializer, name=None
) -> nn.Dense:
  """Returns a float32 linear map with bias."""
  return nn.Dense(
      code_dim,
      dtype=jnp.float32,
      precision=jax.lax.Precision.HIGHEST,
      kernel_init=kernel_init,
      name=name,
  )


def _identity(key, shape, dtype=jnp.float32) -> jax.Array:
  del key
  return jnp.eye(*shape, dtype=dtype)
