"""Autoregressive sampling: cache, likelihoods, prefixes, guidance, devices."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.generators import architecture
from fsq_jax.generators import autoregressive_sampling
from fsq_jax.generators import draws
from fsq_jax.generators import guidance
from fsq_jax.generators import likelihood
from fsq_jax.generators import model as models
from fsq_jax.generators import vocabulary
from fsq_jax.runtime import partitioning

_B, _N = 8, 6
_MODEL = models.TokenModel(
    architecture.Architecture(
        causal=True, depth=2, width=8, num_heads=2, mlp_dim=12,
        positions='rope',
    ),
    vocabulary.from_levels((3, 2)), (2, 3), 3, 'levels',
    'levels_autoregressive',
)
_GUIDED = {'guidance': guidance.Guidance(scale=3.0, schedule='power_cosine')}


@pytest.fixture(scope='module')
def variables(draw_variables):
  return draw_variables(
      _MODEL, np.zeros((1, _N), np.int32), np.zeros(1, np.int32), None
  )


@functools.cache
def _jitted(options):
  return jax.jit(
      functools.partial(
          autoregressive_sampling.sample, _MODEL, options=options
      )
  )


def _sampler(**options):
  return _jitted(autoregressive_sampling.AutoregressiveSampling(**options))


def _request():
  rng = np.random.default_rng(0)
  return {
      'labels': jnp.asarray(rng.integers(-1, 3, _B)),
      'key': jax.random.key(3),
      'examples': jnp.arange(100, 100 + _B),
      'tokens': jnp.asarray(rng.integers(0, 6, (_B, _N)), jnp.uint16),
      'num_given': jnp.asarray([0, 6, 3, 1, 0, 2, 4, 5]),
  }


@functools.cache
def _bits():
  return jax.jit(functools.partial(likelihood.exact_bits, _MODEL))


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        pytest.param({}, id='plain'),
        pytest.param(_GUIDED, id='guided', marks=pytest.mark.slow),
    ],
)
def test_cache_changes_no_sample(options, variables):
  request = _request()
  samples = _sampler(**options)(variables, **request)
  other = _sampler(cache='none', **options)(variables, **request)
  np.testing.assert_array_equal(samples.tokens, other.tokens)
  np.testing.assert_allclose(samples.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.fast_limit(10)
def test_log_probabilities_are_teacher_forced_ones(variables):
  request = _request()
  samples = _sampler()(variables, **request)
  bits = _bits()(variables, samples.tokens, request['labels'])
  is_given = np.arange(_N) < np.asarray(request['num_given'])[:, None]
  expected = np.where(is_given, 0, -np.log(2) * np.asarray(bits))
  np.testing.assert_allclose(samples.log_probs, expected, atol=1e-5)


@pytest.mark.slow
def test_prefixes_are_completed(variables):
  request = _request()
  samples = _sampler()(variables, **request)
  is_given = np.arange(_N) < np.asarray(request['num_given'])[:, None]
  tokens = np.asarray(samples.tokens)
  np.testing.assert_array_equal(
      tokens[is_given], np.asarray(request['tokens'])[is_given]
  )
  np.testing.assert_array_equal(np.asarray(samples.steps) == -1, is_given)
  # Tokens after the prefix and the rest of the batch do not matter.
  turn = np.random.default_rng(1).permutation(_B)
  turned = {k: v if k == 'key' else v[turn] for k, v in request.items()}
  turned['tokens'] = jnp.where(
      is_given[turn], turned['tokens'], (turned['tokens'] + 3) % 6
  )
  other = _sampler()(variables, **turned)
  np.testing.assert_array_equal(other.tokens, tokens[turn])
  # Its own samples as a prefix give the same completion.
  num_given = np.maximum(np.asarray(request['num_given']), 4)
  again = _sampler()(
      variables, **(request | {
          'tokens': samples.tokens, 'num_given': jnp.asarray(num_given),
      })
  )
  np.testing.assert_array_equal(again.tokens, tokens)


@pytest.mark.slow
def test_frequencies_are_the_exact_probabilities(variables):
  """First two tokens of many examples, against the model's distribution."""
  num = 1600
  request = {
      'labels': jnp.full(_B, 1), 'key': jax.random.key(0),
      'tokens': jnp.zeros((_B, _N), jnp.int32),
      'num_given': jnp.zeros(_B, jnp.int32),
  }
  counts, num_equal = np.zeros(6), 0
  for start in range(0, num, _B):
    samples = _sampler()(
        variables, examples=jnp.arange(start, start + _B), **request
    )
    first, second = np.asarray(samples.tokens).T[:2]
    counts += np.bincount(first, minlength=6)
    num_equal += np.sum(first == second)
  tokens = np.arange(_B) % 6
  bits = _bits()(
      variables, np.broadcast_to(tokens[:, None], (_B, _N)), request['labels']
  )
  bits = np.asarray(bits)[:6]
  expected = 2.0 ** -bits[:, 0]
  np.testing.assert_allclose(expected.sum(), 1, atol=1e-5)
  np.testing.assert_allclose(counts / num, expected, atol=0.05)
  # The noise of two positions is independent.
  is_equal = (2.0 ** -bits[:, :2].sum(-1)).sum()
  assert abs(num_equal / num - is_equal) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ('scale', 'label'),
    [(0.0, None), pytest.param(4.0, -1, marks=pytest.mark.slow)],
)
def test_scale_0_is_the_null_class_and_equal_branches_need_no_guidance(
    scale, label, variables
):
  request = _request()
  null = request | {'labels': jnp.full(_B, -1)}
  plain = _sampler()(variables, **null)
  samples = _sampler(guidance=guidance.Guidance(scale=scale))(
      variables, **(request if label is None else null)
  )
  np.testing.assert_array_equal(samples.tokens, plain.tokens)
  np.testing.assert_allclose(samples.log_probs, plain.log_probs, atol=1e-4)


@pytest.mark.slow
def test_unsigned_labels_do_not_overflow(variables):
  """Guidance adds the label -1 to them."""
  request = _request() | {'labels': jnp.arange(_B) % 3}
  samples = _sampler(**_GUIDED)(variables, **request)
  request['labels'] = request['labels'].astype(jnp.uint8)
  other = _sampler(**_GUIDED)(variables, **request)
  assert np.isfinite(np.asarray(samples.log_probs)).all()
  np.testing.assert_array_equal(other.tokens, samples.tokens)


@pytest.mark.slow
def test_temperature_0_is_the_argmax_at_every_position(variables):
  request = _request() | {'num_given': jnp.zeros(_B, jnp.int32)}
  samples = _sampler(draw=draws.Draw(temperature=0.0))(variables, **request)
  log_probs = jax.jit(
      functools.partial(_MODEL.apply, method='log_probabilities')
  )(variables, samples.tokens, request['labels'], None)
  table = np.float64(log_probs).reshape(_B, _N, 3, 2)
  first = np.exp(table).sum(-1).argmax(-1)
  rows = np.take_along_axis(table, first[..., None, None], 2)[:, :, 0]
  np.testing.assert_array_equal(samples.tokens, first * 2 + rows.argmax(-1))


@pytest.mark.parametrize(
    'options',
    [
        pytest.param({}, id='plain'),
        pytest.param(_GUIDED, id='guided', marks=pytest.mark.slow),
    ],
)
def test_8_devices_give_the_samples_of_1(options, variables):
  request = _request()
  mesh = partitioning.create_mesh({'data': 4, 'fsdp': 2})
  sharded = jax.device_put(
      {k: v for k, v in request.items() if k != 'key'},
      partitioning.batch_sharding(mesh),
  )
  samples = _sampler(**options)(
      jax.device_put(variables, partitioning.replicated(mesh)),
      key=request['key'], **sharded,
  )
  assert len(samples.tokens.sharding.device_set) == 8
  expected = _sampler(**options)(variables, **request)
  np.testing.assert_array_equal(samples.tokens, expected.tokens)
  np.testing.assert_allclose(
      samples.log_probs, expected.log_probs, atol=1e-5
  )


def test_the_cache_is_sharded_over_the_batch(variables):
  request = _request()
  mesh = partitioning.create_mesh({'data': 4, 'fsdp': 2})
  sharding = partitioning.batch_sharding(mesh)
  key = request.pop('key')
  text = _sampler().lower(
      jax.device_put(variables, partitioning.replicated(mesh)), key=key,
      **jax.device_put(request, sharding),
  ).as_text()
  cache = _MODEL.empty_cache(8)
  shape = 'x'.join(map(str, jax.tree.leaves(cache)[0].shape))
  constrained = [
      line
      for line in text.splitlines()
      if 'sharding_constraint' in line and f'tensor<{shape}xf32>' in line
  ]
  assert len(constrained) == len(jax.tree.leaves(cache)), shape


@pytest.mark.slow
def test_jit_changes_no_sample(variables):
  request = _request()
  eager = autoregressive_sampling.sample(
      _MODEL, variables,
      options=autoregressive_sampling.AutoregressiveSampling(**_GUIDED),
      **request,
  )
  compiled = _sampler(**_GUIDED)(variables, **request)
  np.testing.assert_array_equal(eager.tokens, compiled.tokens)


def test_wrong_requests_are_rejected(variables):
  with pytest.raises(ValueError, match='both tokens and num_given'):
    autoregressive_sampling.sample(
        _MODEL, variables, jnp.zeros(1, jnp.int32), jax.random.key(0),
        options=autoregressive_sampling.AutoregressiveSampling(),
        tokens=jnp.zeros((1, _N), jnp.int32),
    )
  with pytest.raises(ValueError, match="'ring'; known"):
    autoregressive_sampling.AutoregressiveSampling(cache='ring')
