"""Random masks, class dropout, means over masked positions."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.generators import masking
from fsq_jax.generators import schedules


def test_mask_has_exact_counts_in_spite_of_ties():
  scores = jnp.asarray([[0.0] * 6, [1, 1, 1, 0, 0, 0], [3, 1, 2, 5, 4, 0]])
  counts = jnp.asarray([4, 2, 6])
  known = np.asarray(masking.choose_known(scores, counts))
  assert (~known).sum(-1).tolist() == [4, 2, 6]
  # The lowest scores are masked.
  assert known[1].tolist() == [True, True, True, False, False, True]


def test_masks_of_a_batch_differ_per_example_and_hide_the_expected_share():
  thresholds = schedules.training_thresholds('cosine', 64)
  draw = jax.jit(lambda key: masking.draw_known(key, 4096, thresholds))
  masked = ~np.asarray(draw(jax.random.key(0)))
  counts = masked.sum(-1)
  assert counts.min() >= 1
  assert len(np.unique(counts)) == 64
  assert abs(masked.mean() - 0.637 - 0.5 / 64) < 0.02
  # Positions are equally likely.
  assert np.abs(masked.mean(0) - masked.mean()).max() < 0.04


def test_class_dropout_makes_a_copy_with_the_null_label():
  labels = np.arange(1000)
  before = labels.copy()
  dropped = np.asarray(
      masking.drop_labels(jax.random.key(0), jnp.asarray(labels), 0.1)
  )
  np.testing.assert_array_equal(labels, before)
  is_null = dropped == -1
  assert 0.07 < is_null.mean() < 0.13
  np.testing.assert_array_equal(dropped[~is_null], labels[~is_null])
  for rate, share in ((0.0, 0), (1.0, 1)):
    dropped = masking.drop_labels(
        jax.random.key(0), jnp.asarray(labels), rate
    )
    assert np.mean(np.asarray(dropped) == -1) == share


@pytest.mark.parametrize('normalization', masking.NORMALIZATIONS)
def test_means_are_over_masked_positions(normalization):
  rng = np.random.default_rng(0)
  losses = rng.uniform(size=(3, 4)).astype(np.float32)
  weights = np.asarray([[1, 1, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]], bool)
  expected = (
      losses[weights].mean()
      if normalization == 'token'
      else np.mean([x[w].mean() for x, w in zip(losses, weights, strict=True)])
  )
  hidden = np.where(weights, losses, np.nan)
  mean = masking.mean_loss(hidden, jnp.asarray(weights), normalization)
  np.testing.assert_allclose(mean, expected, rtol=1e-6)
  nothing = masking.mean_loss(hidden, jnp.zeros((3, 4)), normalization)
  assert nothing == 0
