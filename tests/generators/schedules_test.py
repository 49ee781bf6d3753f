"""Mask schedules: published tables, laws of the counts, traps of rounding."""

import numpy as np
import pytest

from fsq_jax.generators import masking
from fsq_jax.generators import schedules

# Masked tokens after each step but the last, computed in float64.
_TABLES = {
    (256, 'cosine', 8): '251 236 212 181 142 97 49',
    (256, 'cosine', 12): '253 247 236 221 203 181 155 128 97 66 33',
    (256, 'arccos', 8): '235 214 193 170 145 117 82',
    (256, 'arccos', 12): '242 228 214 200 185 170 154 137 117 95 67',
    (64, 'cosine', 8): '62 59 53 45 35 24 12',
    (64, 'cosine', 12): '63 61 59 55 50 45 38 32 24 16 8',
    (64, 'arccos', 8): '58 53 48 42 36 29 20',
    (16, 'cosine', 8): '15 14 13 11 8 6 3',
}


def test_remaining_counts_are_the_published_tables():
  for (num_tokens, name, num_steps), row in _TABLES.items():
    table = schedules.remaining_counts(name, num_tokens, num_steps)
    expected = [int(x) for x in row.split()] + [0]
    assert table[-1].tolist() == expected, (num_tokens, name, num_steps)


@pytest.mark.parametrize('name', schedules.SCHEDULES)
def test_every_step_makes_a_token_known(name):
  for num_tokens, num_steps in ((16, 16), (16, 5), (9, 1), (30, 12)):
    table = schedules.remaining_counts(name, num_tokens, num_steps)
    for unknown in range(num_tokens + 1):
      left = [unknown, *table[unknown]]
      assert left[-1] == 0
      steps = np.diff(left[: min(unknown, num_steps) + 1])
      assert (steps < 0).all(), (num_tokens, num_steps, unknown)


def test_more_steps_than_tokens_are_rejected():
  with pytest.raises(ValueError, match='num_steps is 17 for 16 tokens'):
    schedules.remaining_counts('cosine', 16, 17)
  with pytest.raises(ValueError, match="'sine'; known"):
    schedules.remaining_counts('sine', 16, 4)


def _counts(name, num_tokens, floor=0.0, size=2**16):
  """Counts of masked tokens at equally spaced uniform numbers."""
  uniform = (np.arange(size) + 0.5) / size
  thresholds = schedules.training_thresholds(name, num_tokens, floor)
  return np.asarray(masking.masked_counts(np.float32(uniform), thresholds))


@pytest.mark.parametrize(
    ('name', 'mean'), [('cosine', 2 / np.pi), ('arccos', 2 / np.pi),
                       ('linear', 0.5)],
)
def test_training_counts_are_rounded_up_ratios(name, mean):
  counts = _counts(name, 256)
  uniform = (np.arange(len(counts)) + 0.5) / len(counts)
  ratio = {
      'cosine': np.cos(np.pi / 2 * uniform),
      'arccos': 2 / np.pi * np.arccos(uniform),
      'linear': 1 - uniform,
  }[name]
  expected = np.maximum(np.ceil(ratio * 256), 1)
  # Only where a uniform number is at a threshold may rounding matter.
  assert np.mean(counts != expected) < 1e-3
  assert abs(np.mean(counts) / 256 - mean - 0.5 / 256) < 1e-3


def test_law_of_the_cosine():
  counts = _counts('cosine', 256)
  assert abs(np.mean(counts == 1) - 0.0025) < 2e-4
  assert abs(np.mean(counts < 0.45 * 256) - 0.297) < 3e-3


def test_floor_of_the_fsq_paper():
  counts = _counts('cosine', 256, floor=0.45)
  assert counts.min() == 116
  assert counts.max() == 256
  assert abs(np.mean(counts) / 256 - 0.809) < 3e-3
  with pytest.raises(ValueError, match=r'use a ratio in \[0, 1\)'):
    schedules.training_thresholds('cosine', 256, 1.0)


def test_group_sizes_grow_by_the_power():
  sizes = schedules.power_group_sizes(256, 12, 2.2)
  assert sizes.sum() == 256
  weights = np.arange(1, 13) ** 2.2
  exact = np.cumsum(weights / weights.sum() * 256)
  assert np.abs(np.cumsum(sizes) - exact).max() <= 0.5 + 1  # the first group
  np.testing.assert_array_equal(sizes, np.sort(sizes))
  for num_tokens, num_steps in ((16, 12), (12, 12), (5, 1)):
    sizes = schedules.power_group_sizes(num_tokens, num_steps, 2.2)
    assert len(sizes) == num_steps
    assert sizes.sum() == num_tokens
    assert sizes.min() >= 1


def test_tables_are_not_of_float32():
  # Two thirds of the steps: the cosine is 1/2, in float32 slightly less.
  for num_tokens in (16, 256, 576):
    row = schedules.remaining_counts('cosine', num_tokens, 12)[-1]
    assert row[7] == num_tokens // 2
