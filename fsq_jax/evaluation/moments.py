"""Mean and squared deviations of values, accumulated by batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np


class Moments(NamedTuple):
  """Moments of values of one shape.

  Attributes:
    count: number of values.
    mean: their mean.
    squares: sum of the squared deviations from the mean, per element; or of
      outer products of the deviations.
  """

  count: Any
  mean: Any
  squares: Any


def masked_moments(values: jax.Array, mask: jax.Array) -> Moments:
  """Returns the float32 moments of a batch.

  Args:
    values: [B, ...] floats.
    mask: [B] bool, False for values that do not count.
  """
  weights = mask.astype(jnp.float32)
  count = jnp.sum(weights)
  mean = jnp.einsum('b,b...->...', weights, values) / jnp.maximum(count, 1)
  squares = jnp.einsum('b,b...->...', weights, jnp.square(values - mean))
  return Moments(count, mean, squares)


def merge(
    a: Moments,
    b: Moments,
    product: Callable[[np.ndarray], np.ndarray] = np.square,
) -> Moments:
  """Returns the moments of both sets of values (Chan, Golub, LeVeque 1979).

  Squares are summed around the mean, not around 0, so that large means cost no
  precision.

  Args:
    a: moments on the host.
    b: moments on the host.
    product: of a deviation with itself, as in `squares`.
  """
  count = a.count + b.count
  fraction = b.count / max(count, 1)
  difference = b.mean - a.mean
  return Moments(
      count,
      a.mean + fraction * difference,
      a.squares + b.squares + a.count * fraction * product(difference),
  )
