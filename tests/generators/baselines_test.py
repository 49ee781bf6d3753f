"""Count-based baselines against direct counting and known entropies."""

import math

import numpy as np
import pytest

from fsq_jax.generators import baselines


def _entropy(p):
  p = np.asarray(p)
  return float(-(p * np.log2(p)).sum())


def test_baselines_find_the_structure_of_a_source():
  """A chain: the class chooses the first column, then 0.8 to repeat."""
  rng = np.random.default_rng(0)
  num, rows, columns, size = 4000, 2, 4, 4
  labels = rng.integers(0, 2, num)
  tokens = np.zeros((num, rows, columns), np.uint16)
  tokens[:, :, 0] = labels[:, None] * 2 + rng.integers(0, 2, (num, rows))
  for j in range(1, columns):
    repeat = rng.uniform(size=(num, rows)) < 0.8
    other = (tokens[:, :, j - 1] + rng.integers(1, 4, (num, rows))) % 4
    tokens[:, :, j] = np.where(repeat, tokens[:, :, j - 1], other)
  half = num // 2
  result = baselines.measure(
      tokens[:half], labels[:half], tokens[half:], labels[half:], size
  )
  assert result.uniform == 2
  assert abs(result.unigram - 2) < 0.01
  step = _entropy([0.8, 0.2 / 3, 0.2 / 3, 0.2 / 3])
  assert abs(result.left_neighbour - (2 + 3 * step) / 4) < 0.02
  # Given the class, column j is in the class's half with a known probability.
  inside, expected = 1.0, 0.0
  for _ in range(columns):
    expected += _entropy(
        [inside / 2, inside / 2, *([(1 - inside) / 2] * 2)]
        if inside < 1 else [0.5, 0.5]
    )
    stay = 0.8 + 0.2 / 3
    inside = inside * stay + (1 - inside) * (1 - stay)
  assert abs(result.class_position_unigram - expected / columns) < 0.02


def test_few_counts_are_not_trusted():
  """Independent tokens: contexts with a token or two must not matter."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 16, (200, 3, 4))
  labels = rng.integers(0, 10, 200)
  result = baselines.measure(
      tokens[:100], labels[:100], tokens[100:], labels[100:], 16
  )
  assert abs(result.unigram - 4) < 0.05
  assert result.class_position_unigram < result.unigram + 0.05
  assert result.left_neighbour < result.unigram + 0.05


def test_weights_are_probabilities_that_sum_to_one():
  """Every code, seen or not, as a test token: sum of 2^-bits is 1."""
  rng = np.random.default_rng(1)
  train = rng.integers(0, 3, (5, 1, 2))
  train_labels = rng.integers(-1, 2, 5)
  for field in ('unigram', 'class_position_unigram', 'left_neighbour'):
    total = 0.0
    for code in range(6):
      # Two equal columns have the context of one column and of its neighbour.
      test = np.asarray([[[1, code]]])
      with_code = 2 * getattr(
          baselines.measure(train, train_labels, test, np.asarray([0]), 6),
          field,
      )
      total += 2.0**-with_code
    alone = [
        2.0
        ** -getattr(
            baselines.measure(
                train[:, :, :1], train_labels, np.asarray([[[code]]]),
                np.asarray([0]), 6,
            ),
            field,
        )
        for code in range(6)
    ]
    np.testing.assert_allclose(sum(alone), 1, rtol=1e-9)
    assert 0 < total < 1


def test_large_tokens_of_16_bits_do_not_overflow():
  tokens = np.asarray([[[63999, 63998]], [[63999, 63998]]], np.uint16)
  labels = np.zeros(2, np.int64)
  result = baselines.measure(tokens, labels, tokens, labels, 64000)
  assert math.isclose(result.uniform, math.log2(64000))
  assert result.class_position_unigram < 1
  assert result.left_neighbour < 2


def test_wrong_arrays_are_rejected():
  tokens, labels = np.zeros((2, 1, 2), int), np.zeros(2, int)
  with pytest.raises(ValueError, match='use'):
    baselines.measure(tokens[:, 0], labels, tokens, labels, 4)
  with pytest.raises(ValueError, match='allowed are 0 to 3'):
    baselines.measure(tokens, labels, tokens + 4, labels, 4)
