"""Random keys per example, step and position.

All random numbers of a sample come from keys that are folded by the number of
the example, never from a key of the batch. So an example is the same in any
batch, on any number of devices.
"""

import jax
from jax import numpy as jnp


def fold(keys: jax.Array, data: jax.typing.ArrayLike) -> jax.Array:
  """Returns keys folded with integers.

  Args:
    keys: [...] typed keys.
    data: an integer, or integers that broadcast with the keys.

  Returns:
    Typed keys in the broadcast shape.
  """
  keys, data = jnp.broadcast_arrays(keys, jnp.asarray(data, jnp.uint32))
  function = jax.random.fold_in
  for _ in range(keys.ndim):
    function = jax.vmap(function)
  return function(keys, data)


def gumbel(keys: jax.Array, size: int) -> jax.Array:
  """Returns Gumbel noise [..., size] float32, drawn per key of [...]."""

  def draw(key: jax.Array) -> jax.Array:
    return jax.random.gumbel(key, (size,), jnp.float32)

  for _ in range(keys.ndim):
    draw = jax.vmap(draw)
  return draw(keys)


def uniform(keys: jax.Array) -> jax.Array:
  """Returns numbers [...] float32 from [0, 1), one per key of [...]."""
  draw = jax.random.uniform
  for _ in range(keys.ndim):
    draw = jax.vmap(draw)
  return draw(keys)
