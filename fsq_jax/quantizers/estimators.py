"""Gradients past a lookup: the straight-through estimator and the rotation."""

import jax
from jax import numpy as jnp

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
