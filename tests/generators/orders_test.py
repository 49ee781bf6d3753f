"""Orders of masked sampling: the Halton sequence, random permutations."""

import jax
import numpy as np
import pytest

from fsq_jax.generators import orders


def _first_visits(rows, columns, num_points):
  """The loop that the order stands for, in exact integers."""
  seen = []
  for i in range(num_points):
    cell = []
    for base, size in ((3, rows), (2, columns)):
      numerator, denominator, n = 0, 1, i
      while n:
        n, remainder = divmod(n, base)
        numerator = numerator * base + remainder
        denominator *= base
      cell.append(numerator * size // denominator)
    if cell not in seen:
      seen.append(cell)
  return [row * columns + column for row, column in seen]


@pytest.mark.parametrize('grid', [(4, 4), (3, 5), (1, 7), (1, 1)])
def test_halton_order_is_that_of_exact_arithmetic(grid):
  order = orders.halton_order(grid)
  assert order.tolist() == _first_visits(*grid, num_points=400)


@pytest.mark.parametrize('size', [16, 24, 56])
def test_halton_order_visits_every_cell_once(size):
  order = orders.halton_order((size, size))
  np.testing.assert_array_equal(np.sort(order), np.arange(size**2))


def test_fixed_ranks_are_permutations_that_differ_per_example():
  keys = jax.random.split(jax.random.key(0), 8)
  for order in ('random', 'halton'):
    ranks = np.asarray(orders.fixed_ranks(order, (3, 4), keys))
    np.testing.assert_array_equal(
        np.sort(ranks), np.broadcast_to(np.arange(12), (8, 12))
    )
    assert len(np.unique(ranks, axis=0)) > 3
  # Ranks of the Halton order are rolled, so neighbours in it stay neighbours.
  steps = np.diff(ranks[:, orders.halton_order((3, 4))]) % 12
  np.testing.assert_array_equal(steps, 1)
