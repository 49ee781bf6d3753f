"""Tests of what neighbours say about each other, against plain counting."""

import collections
import itertools
import math

import numpy as np
import pytest

from fsq_jax.analysis import token_statistics

_LEVELS = (3, 2, 4)


def _tokens(shape, num, seed=0):
  """Tokens of which each depends on the one to its left; some invalid."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, num, shape)
  for column in range(1, shape[2]):
    keep = rng.random(tokens[:, :, column].shape) < 0.6
    tokens[:, :, column][keep] = tokens[:, :, column - 1][keep]
  tokens[rng.random(shape) < 0.05] = -1
  return tokens


def _neighbours(grid, name):
  """Yields (token, its neighbour) one by one."""
  num, height, width = grid.shape[:3]
  for b, i, j in itertools.product(range(num), range(height), range(width)):
    if name == 'token':
      yield grid[b, i, j], grid[b, i, j]
    elif name == 'right' and j + 1 < width:
      yield grid[b, i, j], grid[b, i, j + 1]
    elif name == 'below' and i + 1 < height:
      yield grid[b, i, j], grid[b, i + 1, j]


def _entropies(pairs):
  """Entropies of the first, of the second and of both, and their supports."""
  results = []
  for values in ([x for x, _ in pairs], [y for _, y in pairs], pairs):
    counts = collections.Counter(values).values()
    results.append((
        -sum(c / len(pairs) * math.log2(c / len(pairs)) for c in counts),
        len(counts),
    ))
  return results


def _digits(tokens):
  digits = np.stack(np.unravel_index(np.maximum(tokens, 0), _LEVELS), axis=-1)
  return np.where(tokens[..., None] < 0, -1, digits)


@pytest.mark.parametrize('name', ['token', 'right', 'below'])
def test_pairs_of_digits_are_those_of_a_loop(name):
  digits = _digits(_tokens((6, 4, 5), math.prod(_LEVELS)))
  pairs = token_statistics.DigitPairs(_LEVELS)
  pairs.update(digits[:2])
  pairs.update(digits[2:])
  bits = pairs.mutual_information(name)
  for i, j in itertools.product(range(3), repeat=2):
    counts = collections.Counter(
        (int(x[i]), int(y[j]))
        for x, y in _neighbours(digits, name)
        if x[i] >= 0 and y[j] >= 0
    )
    expected = np.zeros((_LEVELS[i], _LEVELS[j]), int)
    for cell, count in counts.items():
      expected[cell] = count
    np.testing.assert_array_equal(pairs.block(name, i, j), expected)
    (x, _), (y, _), (xy, _) = _entropies(list(counts.elements()))
    assert bits[i][j] == pytest.approx(x + y - xy, abs=1e-12)
  # The digits are those of tokens that take after their left neighbour.
  if name == 'right':
    assert bits[2][2] > 5 * bits[2][0]


def test_histograms_count_each_level():
  digits = _digits(_tokens((3, 4, 5), math.prod(_LEVELS)))
  pairs = token_statistics.DigitPairs(_LEVELS)
  pairs.update(digits)
  for i, level in enumerate(_LEVELS):
    expected = [int(np.sum(digits[..., i] == x)) for x in range(level)]
    assert pairs.histogram(i).tolist() == expected


@pytest.mark.parametrize('slots', [(), (2,)])
@pytest.mark.parametrize('name', ['right', 'below'])
def test_pairs_of_codes_are_those_of_a_loop(name, slots):
  tokens = _tokens((6, 4, 5, *slots), 7)
  pairs = token_statistics.CodePairs(7)
  pairs.update(tokens[:1])
  pairs.update(tokens[1:])
  found = [
      (int(a), int(b))
      for x, y in _neighbours(tokens, name)
      for a, b in zip(np.ravel(x), np.ravel(y), strict=True)
      if a >= 0 and b >= 0
  ]
  expected = np.zeros((7, 7), int)
  for cell, count in collections.Counter(found).items():
    expected[cell] = count
  np.testing.assert_array_equal(pairs.counts[name], expected)
  information = token_statistics.mutual_information(expected)
  (x, num_x), (y, num_y), (xy, num_xy) = _entropies(found)
  assert information.num_pairs == len(found)
  assert information.num_cells == num_xy
  assert information.bits == pytest.approx(x + y - xy, abs=1e-12)
  # Miller and Madow: each entropy is low by (support - 1) / (2 n ln 2).
  bias = 1 / (2 * len(found) * math.log(2))
  assert information.bits_miller_madow == pytest.approx(
      x + y - xy + bias * (num_x - 1 + num_y - 1 - (num_xy - 1)), abs=1e-12
  )


def test_one_row_has_nothing_below():
  pairs = token_statistics.CodePairs(3)
  pairs.update(np.array([[[0, 1, 2]]]))
  assert pairs.counts['right'].sum() == 2
  information = token_statistics.mutual_information(pairs.counts['below'])
  assert information.num_pairs == 0
  assert math.isnan(information.bits)


def test_independence_has_no_information():
  counts = np.outer([1, 2, 3], [4, 5])
  information = token_statistics.mutual_information(counts)
  assert information.bits == pytest.approx(0, abs=1e-12)
  assert information.bits >= 0
