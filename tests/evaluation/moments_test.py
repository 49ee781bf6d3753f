"""Moments of batches against NumPy's of all values."""

import numpy as np
import pytest

from fsq_jax.evaluation import moments


def _float64(part):
  return moments.Moments(*(np.asarray(x, np.float64) for x in part))


def test_means_far_from_zero_keep_the_precision():
  # The mean square minus the square of the mean would lose it.
  rng = np.random.default_rng(0)
  values = rng.normal(1000, 0.1, (24, 1, 2, 3)).astype(np.float32)
  total = moments.Moments(0.0, 0.0, 0.0)
  masks = np.ones((3, 8), bool)
  masks[2, 5:] = False
  for batch, mask in zip(values.reshape(3, 8, 1, 2, 3), masks, strict=True):
    part = moments.masked_moments(batch, mask)
    total = moments.merge(total, _float64(part))
  assert total.count == 21
  expected = np.float64(values[:21])
  np.testing.assert_allclose(total.mean, expected.mean(axis=0), rtol=1e-6)
  np.testing.assert_allclose(
      total.squares / total.count, expected.var(axis=0), rtol=1e-2
  )


@pytest.mark.parametrize('first', [0, 1, 17])
def test_outer_products_merge_to_the_scatter_matrix(first):
  values = np.random.default_rng(0).normal(3, 1, (20, 4))

  def scatter(deviations):
    return np.einsum('bi,bj->ij', deviations, deviations)

  total = moments.Moments(0, np.zeros(4), np.zeros((4, 4)))
  for part in (values[:first], values[first:]):
    mean = part.mean(axis=0) if len(part) else np.zeros(4)
    part = moments.Moments(len(part), mean, scatter(part - mean))
    total = moments.merge(total, part, product=lambda x: np.outer(x, x))
  assert total.count == 20
  np.testing.assert_allclose(total.mean, values.mean(axis=0))
  np.testing.assert_allclose(
      total.squares, scatter(values - values.mean(axis=0))
  )
