"""Base class of quantizers with a codebook, and gradient estimators."""

from typing import Any

import jax
from jax import numpy as jnp

from fsq_jax.quantizers import base
from fsq_jax.quantizers import checks
from fsq_jax.quantizers import lookup

# Cosine of the angle below which vectors count as antiparallel.
_ANTIPARALLEL = -1 + 1e-6
_SHORTEST = 1e-12


def straight_through(x: jax.Array, codes: jax.Array) -> jax.Array:
  """Returns codes, exactly, with the gradient of x.

  Args:
    x: [..., d] float32 latents.
    codes: [..., d] float32; they get no gradient.
  """
  return jax.lax.stop_gradient(codes) + (x - jax.lax.stop_gradient(x))


def rotation(x: jax.Array, codes: jax.Array) -> jax.Array:
  """Rotation trick (arXiv 2410.06424): rotates and scales the gradient.

  The Jacobian with respect to x is |q| / |x| times the rotation that maps x to
  the code q in the plane of both. Straight-through where the rotation is
  undefined: antiparallel vectors and zero vectors.

  Args:
    x: [..., d] float32 latents.
    codes: [..., d] float32; they get no gradient.
  """
  source, target = jax.lax.stop_gradient((x, codes))
  u, v = lookup.normalize(source), lookup.normalize(target)
  # Lengths without squares, which overflow.
  source_length, target_length = _dot(source, u), _dot(target, v)
  defined = (
      (source_length > _SHORTEST)
      & (target_length > _SHORTEST)
      & (_dot(u, v) > _ANTIPARALLEL)
  )
  w = jnp.where(defined, u + v, 1)
  w /= jnp.linalg.norm(w, axis=-1, keepdims=True)
  # Two reflections: u to -v, then -v to v.
  rotated = x - 2 * _dot(x, w) * w + 2 * _dot(x, u) * v
  stretch = target_length / jnp.maximum(source_length, _SHORTEST)
  return straight_through(jnp.where(defined, stretch * rotated, x), codes)


ESTIMATORS = {'straight_through': straight_through, 'rotation': rotation}


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns inner products [..., 1]; a matmul might round to bfloat16."""
  return jnp.sum(x * y, axis=-1, keepdims=True)


class CodebookQuantizer(base.Quantizer):
  """Quantizer whose codes are the rows of a table.

  A token is the index of the nearest code, the lowest of ties. Codes that are
  equal, or too close for float32 distances, may have the index of each other in
  `codes_to_indices`.

  With the cosine metric latents and codes are first normalized to length 1;
  losses use the normalized latents, and the gradient passes through the
  normalization.

  Latents with a non-finite float32 distance, such as infinite latents, get
  index -1 and NaN codes.

  Attributes:
    codebook_size: number of codes, K. Required.
    code_dim: number of channels of a code. Required.
    metric: 'euclidean' or 'cosine'.
    gradient: gradient estimator, 'straight_through' or 'rotation' (arXiv
      2410.06424).
    commitment_weight: weight of the commitment loss.
  """

  # None, or dataclasses would take the properties of Quantizer for defaults.
  codebook_size: int | None = None
  code_dim: int | None = None
  metric: str = 'euclidean'
  gradient: str = 'straight_through'
  commitment_weight: float = 0.25

  def __post_init__(self):
    checks.set_integers(self, 'codebook_size', 'code_dim', low=1)
    if self.codebook_size > lookup.MAX_DISTANCES:
      raise ValueError(
          f'codebook_size is {self.codebook_size}; a table has at most '
          f'{lookup.MAX_DISTANCES} codes; use FSQ or LFQ, which have no table.'
      )
    checks.check_name('metric', self.metric, lookup.METRICS)
    checks.check_name('gradient', self.gradient, ESTIMATORS)
    checks.set_numbers(self, 'commitment_weight')
    super().__post_init__()

  def codes_to_indices(self, codes: jax.Array) -> jax.Array:
    codes = self._to_metric_space(codes, 'Codes')
    return lookup.nearest(codes, self._codes())

  def indices_to_codes(self, indices: jax.Array) -> jax.Array:
    indices = checks.as_integers(indices, 'Indices')
    return self._channels_back(lookup.take(self._codes(), indices))

  def spec(self) -> dict[str, Any]:
    return {
        'codebook_size': int(self.codebook_size),
        'code_dim': int(self.code_dim),
        'metric': self.metric,
        'ties': 'lowest index',
    }

  def _codes(self) -> jax.Array:
    """Returns the float32 codes [codebook_size, code_dim]."""
    raise NotImplementedError

  def _table(self, entries: jax.Array) -> jax.Array:
    """Returns the codes of entries [codebook_size, code_dim]."""
    return lookup.METRICS[self.metric](without_constant_folding(entries))

  def _to_metric_space(self, x: jax.Array, name: str) -> jax.Array:
    """Checks latents or codes; returns float32, channels last, normalized."""
    x = self._channels_last(jnp.asarray(x), name).astype(jnp.float32)
    return lookup.METRICS[self.metric](x)

  def _pass_gradient(self, x: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns codes with a gradient for x, channels on `channel_axis`."""
    return self._channels_back(ESTIMATORS[self.gradient](x, codes))


def without_constant_folding(entries: jax.Array) -> jax.Array:
  """Returns entries behind an optimization barrier.

  XLA folds constants with another rounding: in functions that have the weights
  as constants, codes would differ from z_q of other functions.
  """
  return jax.lax.optimization_barrier(entries)


def commitment_loss(x: jax.Array, codes: jax.Array) -> jax.Array:
  """Mean squared error of codes; only latents x [..., d] get a gradient."""
  return jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - x))


def codebook_loss(x: jax.Array, codes: jax.Array) -> jax.Array:
  """Mean squared error of codes [..., d]; only codes get a gradient."""
  return commitment_loss(codes, x)


def check_shape(name: str, value: jax.Array, shape: tuple[int, ...]) -> None:
  """Raises ValueError unless a variable has the expected shape."""
  if value.shape != shape:
    raise ValueError(
        f'The {name} of the collection codebook have shape {value.shape}, the '
        f'quantizer needs {shape}; set codebook_size and code_dim to the sizes '
        'that the variables were created with.'
    )
