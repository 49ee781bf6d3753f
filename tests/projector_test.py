"""Projectors: standardised and linear maps against NumPy."""

import chex
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax import partitioning
from fsq_jax.models import projector


def test_standardized_latents_have_mean_0_and_variance_1_in_training():
  module = projector.StandardizedProjectorIn(code_dim=3)
  key_0, key_1 = jax.random.split(jax.random.key(0))
  latents = 5 * jax.random.normal(key_0, (8, 4, 5, 6)) + 2
  variables = jax.jit(module.init)(key_1, latents)

  @jax.jit
  def train(latents):
    return module.apply(variables, latents, train=True, mutable='batch_stats')

  z, updated = train(latents)
  assert z.dtype == jnp.float32
  np.testing.assert_allclose(np.mean(z, (0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(np.var(z, (0, 1, 2)), 1, rtol=1e-4)

  # Running averages start at mean 0 and variance 1 and move by 1 %.
  projected = np.float64(latents) @ np.float64(
      variables['params']['linear']['kernel']
  )
  mean = 0.01 * projected.mean((0, 1, 2))
  variance = 0.99 + 0.01 * projected.var((0, 1, 2))
  statistics = updated['batch_stats']['standardize']
  np.testing.assert_allclose(statistics['mean'], mean, rtol=1e-4)
  np.testing.assert_allclose(statistics['var'], variance, rtol=1e-4)

  # They, and not the batch's, are what evaluation uses.
  evaluated = jax.jit(module.apply)({**variables, **updated}, latents[:1])
  np.testing.assert_allclose(
      evaluated, (projected[:1] - mean) / np.sqrt(variance + 1e-5), rtol=1e-4
  )

  # The batch is the global one, whatever the number of devices.
  mesh = partitioning.create_mesh({'data': -1, 'fsdp': 1})
  sharded = train(partitioning.shard_batch(np.asarray(latents), mesh))
  chex.assert_trees_all_close(sharded, (z, updated), rtol=1e-4, atol=1e-5)


def test_linear_projector_is_the_same_in_training():
  module = projector.LinearProjectorIn(code_dim=3)
  # Some tokens are so small that the epsilon of LayerNorm counts.
  key_0, key_1 = jax.random.split(jax.random.key(0))
  latents = jax.random.normal(key_0, (2, 4, 5, 6))
  latents *= jnp.logspace(-3, 1, 5)[:, None]
  variables = jax.jit(module.init)(key_1, latents)
  p = jax.tree.map(lambda x: np.float64(x) + 0.1, variables['params'])
  variables = {'params': jax.tree.map(np.float32, p)}
  x = np.float64(latents)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + 1e-6
  )
  x = x * p['norm']['scale'] + p['norm']['bias']
  expected = x @ p['linear']['kernel'] + p['linear']['bias']
  for train in (False, True):
    z = jax.jit(module.apply, static_argnames='train')(
        variables, latents, train=train
    )
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-5)
