"""Masked sampling: known tokens, counts, orders, likelihoods, devices."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.generators import architecture
from fsq_jax.generators import draws
from fsq_jax.generators import guidance
from fsq_jax.generators import masked_sampling
from fsq_jax.generators import model as models
from fsq_jax.generators import orders
from fsq_jax.generators import schedules
from fsq_jax.generators import vocabulary
from fsq_jax.runtime import partitioning

_B, _N, _T = 8, 12, 4
_MODEL = models.TokenModel(
    architecture.Architecture(
        causal=False, depth=2, width=8, num_heads=2, mlp_dim=12
    ),
    vocabulary.from_levels((3, 2)), (3, 4), 3, 'levels',
    'levels_autoregressive',
)
_OPTIONS = {
    'halton': {},
    'random': {'schedule': 'arccos'},
    'confidence': {
        'schedule': 'linear',
        'guidance': guidance.Guidance(scale=2.5, schedule='linear'),
    },
}


def _options(order):
  return masked_sampling.MaskedSampling(
      num_steps=_T, order=order, **_OPTIONS[order]
  )
# The order 'random' differs from 'halton' by its ranks only.
_ORDERS = (
    'halton', 'confidence', pytest.param('random', marks=pytest.mark.slow)
)


@pytest.fixture(scope='module')
def variables(draw_variables):
  return draw_variables(
      _MODEL, np.zeros((1, _N), np.int32), np.zeros(1, np.int32),
      np.zeros((1, _N), bool),
  )


@functools.cache
def _sampler(options, model=_MODEL):
  return jax.jit(
      functools.partial(masked_sampling.sample, model, options=options)
  )


def _request():
  """A mixed batch: nothing, everything and all in between is known."""
  rng = np.random.default_rng(0)
  known = rng.uniform(size=(_B, _N)) < 0.5
  known[0], known[1] = False, True
  # The left half (inpainting), the top (outpainting), all but two.
  known[2] = np.arange(_N) % 4 < 2
  known[3] = np.arange(_N) < 4
  known[4] = np.arange(_N) >= 2
  return {
      'labels': jnp.asarray(rng.integers(-1, 3, _B)),
      'key': jax.random.key(3),
      'examples': jnp.arange(100, 100 + _B),
      'tokens': jnp.asarray(rng.integers(0, 6, (_B, _N)), jnp.uint16),
      'known': jnp.asarray(known),
  }


@pytest.mark.fast_limit(10)
@pytest.mark.parametrize('order', _ORDERS)
def test_known_tokens_stay_and_counts_are_those_of_the_schedule(
    order, variables
):
  options, request = _options(order), _request()
  before = jax.tree.map(np.array, {k: request[k] for k in ('tokens', 'known')})
  samples = _sampler(options)(variables, **request)
  tokens, known = np.asarray(samples.tokens), before['known']
  assert tokens.dtype == np.int32
  np.testing.assert_array_equal(tokens[known], before['tokens'][known])
  np.testing.assert_array_equal(request['tokens'], before['tokens'])
  assert ((tokens >= 0) & (tokens < 6)).all()
  np.testing.assert_array_equal(np.asarray(samples.steps) == -1, known)
  np.testing.assert_array_equal(np.asarray(samples.log_probs)[known], 0)
  table = schedules.remaining_counts(options.schedule, _N, _T)
  for steps, unknown in zip(
      np.asarray(samples.steps), (~known).sum(-1), strict=True
  ):
    left = [int((steps > t).sum()) for t in range(_T)]
    assert left == table[unknown].tolist()


@pytest.mark.parametrize('order', _ORDERS)
def test_an_example_depends_on_neither_batch_nor_hidden_tokens(
    order, variables
):
  sampler, request = _sampler(_options(order)), _request()
  samples = sampler(variables, **request)
  turn = np.random.default_rng(1).permutation(_B)
  turned = {k: v if k == 'key' else v[turn] for k, v in request.items()}
  turned['tokens'] = jnp.where(
      turned['known'], turned['tokens'], (turned['tokens'] + 3) % 6
  )
  other = sampler(variables, **turned)
  np.testing.assert_array_equal(other.tokens, np.asarray(samples.tokens)[turn])
  np.testing.assert_array_equal(other.steps, np.asarray(samples.steps)[turn])
  # Another key or another number is another sample.
  for change in (
      {'key': jax.random.key(4)}, {'examples': request['examples'] + 1},
  ):
    other = sampler(variables, **(request | change))
    assert (np.asarray(other.tokens) != np.asarray(samples.tokens)).any()


@functools.cache
def _losses():
  return jax.jit(functools.partial(_MODEL.apply, method='cross_entropy'))


@pytest.mark.parametrize('order', [_ORDERS[0], _ORDERS[2]])
def test_log_probabilities_are_teacher_forced_ones(order, variables):
  request = _request()
  samples = _sampler(_options(order))(variables, **request)
  total = np.zeros((_B, _N))
  for t in range(_T):
    known = np.asarray(samples.steps) < t
    losses = _losses()(variables, samples.tokens, request['labels'], known)
    total -= np.where(np.asarray(samples.steps) == t, losses.nll, 0)
  np.testing.assert_allclose(samples.log_probs, total, atol=1e-5)
  assert (total[~np.asarray(request['known'])] < 0).all()


def test_fixed_order_reveals_in_halton_order(variables):
  samples = _sampler(_options('halton'))(variables, **_request())
  steps = np.asarray(samples.steps)
  order = orders.halton_order((3, 4))
  # The order is rolled: from some start on, steps do not decrease.
  rolls = [np.roll(steps[0][order], -i) for i in range(_N)]
  assert any((np.diff(x) >= 0).all() for x in rolls)
  assert not all((np.diff(x) >= 0).all() for x in steps[:, order])


@pytest.mark.slow
def test_confidence_without_noise_reveals_the_surest_first(variables):
  """One step before the last, at temperature 0, against the model itself."""
  options = masked_sampling.MaskedSampling(
      num_steps=2, order='confidence', choice_temperature=0.0,
      schedule='linear', draw=draws.Draw(temperature=0.0),
  )
  request = _request() | {'known': jnp.zeros((_B, _N), bool)}
  samples = _sampler(options)(variables, **request)
  is_first = np.asarray(samples.steps) == 0
  assert (is_first.sum(-1) == _N // 2).all()
  log_probs = jax.jit(
      functools.partial(_MODEL.apply, method='log_probabilities')
  )(variables, samples.tokens, request['labels'], request['known'])
  # Greedy tokens: the largest first level index, then the second given it.
  table = np.float64(log_probs).reshape(_B, _N, 3, 2)
  first = np.exp(table).sum(-1).argmax(-1)
  rows = np.take_along_axis(table, first[..., None, None], 2)[:, :, 0]
  greedy = first * 2 + rows.argmax(-1)
  np.testing.assert_array_equal(
      np.asarray(samples.tokens)[is_first], greedy[is_first]
  )
  score = rows.max(-1)
  for s, chosen in zip(score, is_first, strict=True):
    assert s[chosen].min() >= s[~chosen].max()


# The identities of the logits are in heads_test.
@pytest.mark.slow
def test_scale_0_is_the_null_class_and_equal_branches_need_no_guidance(
    variables
):
  def options(scale):
    return masked_sampling.MaskedSampling(
        num_steps=_T, guidance=guidance.Guidance(scale=scale)
    )

  request = _request()
  null = request | {'labels': jnp.full(_B, -1)}
  plain = _sampler(_options('halton'))(variables, **null)
  for scale, arguments in ((0.0, request), (4.0, null)):
    samples = _sampler(options(scale))(variables, **arguments)
    np.testing.assert_array_equal(samples.tokens, plain.tokens)
    np.testing.assert_allclose(
        samples.log_probs, plain.log_probs, atol=1e-4
    )


# Autoregressive sampling has this test in the fast tier.
@pytest.mark.slow
@pytest.mark.parametrize('order', ['halton', 'confidence'])
def test_8_devices_give_the_samples_of_1(order, variables):
  sampler, request = _sampler(_options(order)), _request()
  mesh = partitioning.create_mesh({'data': 4, 'fsdp': 2})
  sharded = jax.device_put(
      {k: v for k, v in request.items() if k != 'key'},
      partitioning.batch_sharding(mesh),
  )
  samples = sampler(
      jax.device_put(variables, partitioning.replicated(mesh)),
      key=request['key'], **sharded,
  )
  assert len(samples.tokens.sharding.device_set) == 8
  expected = sampler(variables, **request)
  np.testing.assert_array_equal(samples.tokens, expected.tokens)
  np.testing.assert_array_equal(samples.steps, expected.steps)
  np.testing.assert_allclose(
      samples.log_probs, expected.log_probs, atol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize('order', orders.ORDERS)
def test_jit_changes_no_sample(order, variables):
  request = _request()
  eager = masked_sampling.sample(
      _MODEL, variables, options=_options(order), **request
  )
  compiled = _sampler(_options(order))(variables, **request)
  np.testing.assert_array_equal(eager.tokens, compiled.tokens)
  np.testing.assert_array_equal(eager.steps, compiled.steps)


def test_wrong_requests_are_rejected(variables):
  sample = functools.partial(
      masked_sampling.sample, _MODEL, variables, jnp.zeros(1, jnp.int32),
      jax.random.key(0),
  )
  with pytest.raises(ValueError, match='num_steps is 13 for 12 tokens'):
    sample(options=masked_sampling.MaskedSampling(num_steps=13))
  with pytest.raises(ValueError, match='both tokens and known'):
    sample(
        options=_options('halton'), tokens=jnp.zeros((1, _N), jnp.int32)
    )
  for options in (
      {'order': 'raster'}, {'schedule': 'sine'}, {'choice_temperature': -1.0},
  ):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
      masked_sampling.MaskedSampling(**options)
