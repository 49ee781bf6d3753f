"""Classifier-free guidance: identities and schedules."""

import jax.numpy as jnp
import numpy as np
import pytest

from fsq_jax.generators import guidance


def test_guidance_identities():
  rng = np.random.default_rng(0)
  c, u = jnp.asarray(rng.normal(size=(2, 5, 7)), jnp.float32)
  np.testing.assert_allclose(guidance.combine(c, u, 1.0), c, atol=1e-6)
  np.testing.assert_array_equal(guidance.combine(c, u, 0.0), u)
  np.testing.assert_array_equal(guidance.combine(c, c, 7.5), c)
  np.testing.assert_array_equal(guidance.combine(c, None, 7.5), c)
  # The form of the FSQ paper, c + alpha (c - u), at alpha = s - 1.
  np.testing.assert_allclose(
      guidance.combine(c, u, 1.2), c + 0.2 * (c - u), atol=1e-6
  )


def test_schedules_of_the_scale():
  known = np.asarray([0.0, 0.1, 0.3, 0.8])
  constant = guidance.Guidance(scale=3.0).scales(known)
  np.testing.assert_allclose(constant, [3, 3, 3, 3])
  linear = guidance.Guidance(scale=3.0, schedule='linear').scales(known)
  np.testing.assert_allclose(linear, [1, 1.2, 1.6, 2.6], rtol=1e-6)
  cosine = guidance.Guidance(
      scale=3.0, schedule='power_cosine', power=2.0
  ).scales(known)
  progress = np.asarray([0, 1 / 4, 1 / 2, 3 / 4])
  np.testing.assert_allclose(
      cosine, 1 + 2 * (1 - np.cos(np.pi * progress**2)) / 2, rtol=1e-6
  )


def test_wrong_options_are_rejected():
  for options in (
      {'schedule': 'square'}, {'scale': -1.0}, {'power': 0.0},
      {'scale': float('nan')},
  ):
    with pytest.raises(ValueError, match='guidance'):
      guidance.Guidance(**options)


def test_doubled_batch_keeps_examples_together():
  x = jnp.arange(3)
  assert guidance.double(x, x + 10).tolist() == [0, 10, 1, 11, 2, 12]
