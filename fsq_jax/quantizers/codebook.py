"""Base class of quantizers with a codebook, and gradient estimators."""

from typing import Any

import jax
from jax import numpy as jnp

from fsq_jax.quantizers import base
from fsq_jax.quantizers import lookup

# Cosine of the angle below which vectors count as antiparallel.
_ANTIPARALLEL = -1 + 1e-6
_SHORTEST = 1e-12


def straight_through(x: jax.Array, codes: jax.Array) -> jax.Array:
  """Returns codes whose gradient goes to x as it is.

  Args:
    x: [..., d] float32 latents.
    codes: [..., d] float32, the same shape; they get no gradient.
  """
  return _replace_value(x, codes)


def rotation(x: jax.Array, codes: jax.Array) -> jax.Array:
  """Returns codes whose gradient goes to x as if x were turned and stretched.

  The rotation trick (arXiv 2410.06424): the Jacobian is |q| / |x| times the
  rotation, in the plane of both, that takes x to q. Straight-through where it
  is not defined: antiparallel vectors, and zero vectors.

  Args:
    x: [..., d] float32 latents.
    codes: [..., d] float32, the same shape; they get no gradient.
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
  # A reflection that takes u to -v, and one that takes -v to v.
  turned = x - 2 * _dot(x, w) * w + 2 * _dot(x, u) * v
  stretch = target_length / jnp.maximum(source_length, _SHORTEST)
  return _replace_value(jnp.where(defined, stretch * turned, x), codes)


ESTIMATORS = {'straight_through': straight_through, 'rotation': rotation}


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns inner products [..., 1]; a matmul might round to bfloat16."""
  return jnp.sum(x * y, axis=-1, keepdims=True)


def _replace_value(x: jax.Array, value: jax.Array) -> jax.Array:
  """Returns `value`, exactly, with the gradient of x."""
  return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))


class CodebookQuantizer(base.Quantizer):
  """A quantizer whose codes are the rows of a table.

  A token is the nearest code, the one with the lowest index among equals. The
  index of a code that equals another, or differs by less than float32 distances
  tell apart, need not come back from `codes_to_indices`.

  With the cosine metric latents and codes are divided by their lengths first:
  codes have length 1, the losses compare them with the divided latents, and the
  gradient passes through the division.

  Latents whose distance is not a finite float32, such as infinite ones, are no
  tokens either: index -1 and NaN codes.

  Attributes:
    codebook_size: number of codes, K. Required.
    code_dim: number of channels of a code. Required.
    metric: 'euclidean' or 'cosine'.
    gradient: how it gets from codes to latents: 'straight_through' or
      'rotation' (arXiv 2410.06424).
    commitment_weight: factor of the loss that draws latents to their codes.
  """

  # A default of their own, or the contract's properties would be taken for it.
  codebook_size: int | None = None
  code_dim: int | None = None
  metric: str = 'euclidean'
  gradient: str = 'straight_through'
  commitment_weight: float = 0.25

  def __post_init__(self):
    self._set_integers('codebook_size', 'code_dim', low=1)
    if self.codebook_size > lookup.MAX_DISTANCES:
      raise ValueError(
          f'codebook_size is {self.codebook_size}; a table takes at most '
          f'{lookup.MAX_DISTANCES} codes; use FSQ or LFQ, which need none.'
      )
    base.check_name('metric', self.metric, lookup.METRICS)
    base.check_name('gradient', self.gradient, ESTIMATORS)
    self._set_numbers('commitment_weight')
    super().__post_init__()

  def codes_to_indices(self, codes: jax.Array) -> jax.Array:
    codes = self._to_metric_space(codes, 'Codes')
    return lookup.nearest(codes, self._codes())

  def indices_to_codes(self, indices: jax.Array) -> jax.Array:
    indices = base.integers(indices, 'Indices')
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
    """Returns the codes that entries [codebook_size, code_dim] stand for."""
    return lookup.METRICS[self.metric](same_in_every_program(entries))

  def _to_metric_space(self, x: jax.Array, name: str) -> jax.Array:
    """Checks latents or codes; returns float32, channels last, normalised."""
    x = self._channels_last(jnp.asarray(x), name).astype(jnp.float32)
    return lookup.METRICS[self.metric](x)

  def _pass_gradient(self, x: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns codes with a gradient for x, channels on `channel_axis`."""
    return self._channels_back(ESTIMATORS[self.gradient](x, codes))


def same_in_every_program(entries: jax.Array) -> jax.Array:
  """Returns entries from which any program computes the same codes.

  XLA evaluates what depends on constants alone while it compiles, and rounds
  differently: with the weights baked in, codes would not equal the z_q of other
  programs.
  """
  return jax.lax.optimization_barrier(entries)


def commitment_loss(x: jax.Array, codes: jax.Array) -> jax.Array:
  """Mean square that draws latents x to codes, both [..., d] float32."""
  return jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - x))


def codebook_loss(x: jax.Array, codes: jax.Array) -> jax.Array:
  """Mean square that draws codes to latents x, both [..., d] float32."""
  return commitment_loss(codes, x)


def check_shape(name: str, value: jax.Array, shape: tuple[int, ...]) -> None:
  """Raises ValueError unless a variable has the shape of the quantizer's."""
  if value.shape != shape:
    raise ValueError(
        f'The {name} of the collection codebook have shape {value.shape}, the '
        f'quantizer needs {shape}; set codebook_size and code_dim to what the '
        'variables were made with.'
    )
