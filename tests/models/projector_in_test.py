"""Projectors in: maps against NumPy, sizes, and how evenly digits start."""

import chex
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import quantizers
from fsq_jax.models import projectors
from fsq_jax.runtime import partitioning


def test_standardized_latents_have_mean_0_and_variance_1_in_training():
  module = projectors.StandardizedProjectorIn(code_dim=3)
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
  module = projectors.LinearProjectorIn(code_dim=3)
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


def _entropies(module, variables, quantizer):
  """Entropy of the digits of each channel, in shares of log2(L) bits."""
  latents = jax.random.normal(jax.random.key(1), (4, 32, 32, 64))

  @jax.jit
  def digits(variables):
    z = module.apply(variables, latents)
    return quantizer.codes_to_digits(quantizer.apply({}, z).z_q)

  shares = []
  for channel, level in enumerate(quantizer.levels):
    counts = np.bincount(
        np.ravel(digits(variables)[..., channel]), minlength=level
    )
    p = counts[counts > 0] / counts.sum()
    shares.append(-np.sum(p * np.log2(p)) / np.log2(level))
  return shares


@pytest.mark.slow
@pytest.mark.parametrize(
    'level', [8, *(pytest.param(x, marks=pytest.mark.slow) for x in (5, 17))]
)
@pytest.mark.parametrize(
    ('module', 'bound'),
    [
        (projectors.LinearProjectorIn(4), 'tanh'),
        (projectors.MlpProjectorIn(4, width=512, bound='none'), 'tanh'),
        (projectors.MlpProjectorIn(4, width=512, bound='tanh'), 'clip'),
        pytest.param(
            projectors.AttentionProjectorIn(
                4, width=256, depth=1, num_heads=4, mlp_dim=64, bound='none'
            ),
            'tanh',
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_digits_of_unit_normal_latents_start_evenly(module, bound, level):
  quantizer = quantizers.FSQ(levels=(level,) * 4, bound=bound)
  latents = jnp.zeros((1, 2, 2, 64))
  variables = jax.jit(module.init)(jax.random.key(0), latents)
  assert min(_entropies(module, variables, quantizer)) > 0.95


@pytest.mark.slow
def test_gains_of_the_original_waste_a_fifth_to_a_third_of_the_bits():
  module = projectors.MlpProjectorIn(4, width=512, bound='tanh')
  variables = jax.jit(module.init)(
      jax.random.key(0), jnp.zeros((1, 2, 2, 64))
  )
  params = variables['params']
  gain = params['output']['gain']
  np.testing.assert_array_equal(gain, np.ones(4))
  output = {**params['output'], 'gain': 3 * gain}
  variables = {'params': {**params, 'output': output}}
  for level, share in ((5, 0.794), (8, 0.716), (17, 0.625)):
    quantizer = quantizers.FSQ(levels=(level,) * 4, bound='clip')
    np.testing.assert_allclose(
        np.mean(_entropies(module, variables, quantizer)), share, atol=0.02
    )


@pytest.mark.parametrize(('channels', 'expected'), [(768, 660_490),
                                                    (1024, 792_074)])
def test_mlp_has_the_size_of_the_original(channels, expected):
  module = projectors.MlpProjectorIn(5, width=512, bound='none')
  shapes = jax.eval_shape(
      module.init, jax.random.key(0), jnp.zeros((1, 2, 2, channels))
  )
  assert sum(x.size for x in jax.tree.leaves(shapes)) == expected


@pytest.mark.slow
def test_attention_mixes_tokens_of_one_image():
  module = projectors.AttentionProjectorIn(
      3, width=8, depth=1, num_heads=2, mlp_dim=12, bound='none'
  )
  latents = jax.random.normal(jax.random.key(0), (2, 2, 3, 6))
  variables = jax.jit(module.init)(jax.random.key(1), latents)
  apply = jax.jit(module.apply)
  before = apply(variables, latents)
  assert before.shape == (2, 2, 3, 3)
  after = apply(variables, latents.at[0, 1, 2, 0].add(1.0))
  moved = np.abs(after - before).max(-1)
  assert np.all(moved[0] > 1e-6)
  assert moved[0].argmax() == 5  # The token itself, row-major.
  assert np.all(moved[1] == 0)


@pytest.mark.parametrize('bound', ['none', 'tanh'])
def test_bound_and_gain_act_on_each_channel(bound):
  module = projectors.MlpProjectorIn(3, width=8, bound=bound)
  latents = 5 * jax.random.normal(jax.random.key(0), (2, 4, 5, 6))
  variables = jax.jit(module.init)(jax.random.key(1), latents)
  params = variables['params']
  output = {**params['output'], 'gain': np.float32([0.5, 1, 2])}
  output['linear'] = {
      'kernel': 10 * params['output']['linear']['kernel'],
      'bias': np.zeros(3, np.float32),
  }
  z = jax.jit(module.apply)({'params': {**params, 'output': output}}, latents)
  largest = np.abs(z).max((0, 1, 2))
  if bound == 'tanh':
    np.testing.assert_allclose(largest, [0.5, 1, 2], rtol=0.01)
  else:
    assert np.all(largest > [0.6, 1.2, 2.4])


@pytest.mark.parametrize(
    'build',
    [
        lambda dtype: projectors.MlpProjectorIn(3, 16, 'none', dtype),
        lambda dtype: projectors.AttentionProjectorIn(
            3, 16, 1, 2, 12, 'none', dtype
        ),
    ],
)
@pytest.mark.slow
def test_bfloat16_is_inside_of_the_hidden_layers(build):
  latents = jax.random.normal(jax.random.key(0), (2, 4, 5, 6))
  exact, module = (build(jnp.dtype(x)) for x in ('float32', 'bfloat16'))
  variables = jax.jit(module.init)(jax.random.key(1), latents)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
  expected, z = (jax.jit(m.apply)(variables, latents) for m in (exact, module))
  assert z.dtype == jnp.float32
  error = np.abs(z - expected).max() / np.abs(expected).max()
  assert 1e-4 < error < 2e-2


def test_latents_that_are_no_codes_are_refused():
  module = projectors.NoProjectorIn(3)
  with pytest.raises(ValueError, match='Latents have 8 channels, codes 3'):
    module.apply({}, jnp.zeros((1, 2, 2, 8)))


def test_unknown_bound_is_refused():
  module = projectors.MlpProjectorIn(3, width=8, bound='clip')
  with pytest.raises(ValueError, match=r"'clip'; known: \['none', 'tanh'\]"):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 2, 8)))
