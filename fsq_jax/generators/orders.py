"""Orders in which masked sampling reveals tokens."""

import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.generators import keys as key_lib
from fsq_jax.generators import masking

# 'confidence' (MaskGIT) depends on the samples; the other orders are fixed per
# example before the first step.
ORDERS = ('confidence', 'random', 'halton')


def halton_order(grid: tuple[int, int]) -> np.ndarray:
  """Returns grid cells in the order of first visit by the Halton sequence.

  Point i is (radical inverse of i in base 2 times columns, in base 3 times
  rows), rounded down, as in Halton-MaskGIT (github.com/valeoai/Halton-MaskGIT);
  points are generated until every cell has been visited, where the original
  stops after 10,000 and misses cells of grids from 56 x 56.

  Args:
    grid: (rows, columns).

  Returns:
    [N] int32 raster positions, each once.
  """
  rows, columns = grid
  num_cells = rows * columns
  num_points = 4 * num_cells
  while True:
    points = np.arange(num_points)
    x = np.floor(radical_inverse(points, 2) * columns).astype(np.int64)
    y = np.floor(radical_inverse(points, 3) * rows).astype(np.int64)
    cells, first = np.unique(y * columns + x, return_index=True)
    if len(cells) == num_cells:
      return cells[np.argsort(first)].astype(np.int32)
    num_points *= 2


def radical_inverse(numbers: np.ndarray, base: int) -> np.ndarray:
  """Returns the radical inverses of integers, float64 in [0, 1).

  The representation of a number in the base is mirrored at the radix point.
  """
  remaining = np.array(numbers)
  result, weight = np.zeros(len(remaining)), 1.0
  while np.any(remaining > 0):
    weight /= base
    result += weight * (remaining % base)
    remaining //= base
  return result


def fixed_ranks(
    order: str, grid: tuple[int, int], keys: jax.Array
) -> jax.Array:
  """Returns the rank of each position in a fixed order.

  Args:
    order: 'random', a permutation per example; or 'halton', the Halton order
      rolled by a random offset per example.
    grid: (rows, columns).
    keys: [B] typed keys.

  Returns:
    int32 [B, N]; position n is revealed as number ranks[b, n].
  """
  num_tokens = grid[0] * grid[1]
  if order == 'random':
    positions = key_lib.fold(keys[:, None], jnp.arange(num_tokens))
    return masking.rank(key_lib.uniform(positions))
  ranks = np.argsort(halton_order(grid)).astype(np.int32)
  offsets = jnp.floor(key_lib.uniform(keys) * num_tokens).astype(jnp.int32)
  return (jnp.asarray(ranks) + offsets[:, None]) % num_tokens
