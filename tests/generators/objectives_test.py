"""Training losses: first value, masked positions, learning a known source."""

import functools
import math

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from fsq_jax.generators import architecture
from fsq_jax.generators import likelihood
from fsq_jax.generators import masking
from fsq_jax.generators import model as models
from fsq_jax.generators import objectives
from fsq_jax.generators import schedules
from fsq_jax.generators import vocabulary


def _model(causal, levels=(3, 2), grid=(2, 3), dropout=0.0, **options):
  return models.TokenModel(
      architecture.Architecture(
          causal=causal, depth=1, width=16, num_heads=2, mlp_dim=24,
          dropout=dropout, **options,
      ),
      vocabulary.from_levels(levels), grid, 2, 'levels',
      'levels_autoregressive',
  )


def _batch(model, size=8):
  rng = np.random.default_rng(0)
  k, n = model.vocabulary.codebook_size, model.num_tokens
  tokens = rng.integers(0, k, (size, n)).astype(np.uint16)
  return jnp.asarray(tokens), jnp.asarray(rng.integers(-1, 2, size))


def _init(model, key):
  tokens, labels = _batch(model, 1)
  known = None if model.architecture.causal else jnp.zeros(tokens.shape, bool)
  return model.init(key, tokens, labels, known)


# Of the heads alone in heads_test, in the fast tier.
@pytest.mark.slow
@pytest.mark.parametrize('causal', [False, True])
def test_first_loss_is_the_sum_of_log_levels(causal):
  model = _model(causal, levels=(8, 8, 5), dropout=0.1)
  objective = objectives.Objective(label_smoothing=0.1)

  @jax.jit
  def compute(key):
    variables = _init(model, key)
    return objectives.loss(model, variables, *_batch(model), key, objective)

  value, scalars = compute(jax.random.key(0))
  expected = math.log(8) + math.log(8) + math.log(5)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(scalars['nll'], expected, rtol=1e-6)
  assert (scalars['masked_fraction'] == 1) == causal


@pytest.mark.slow
def test_loss_is_the_mean_over_masked_positions(draw_variables):
  model = _model(False)
  tokens, labels = _batch(model)
  before = np.array(tokens), np.array(labels)
  variables = draw_variables(
      model, tokens, labels, jnp.zeros(tokens.shape, bool)
  )
  objective = objectives.Objective(
      class_dropout=0.5, label_smoothing=0.1, mask_schedule='arccos'
  )
  key = jax.random.key(1)

  @jax.jit
  def compute(variables, tokens, labels):
    # The same draws, in the steps that the loss is made of.
    mask_key, label_key, _ = jax.random.split(key, 3)
    known = masking.draw_known(
        mask_key, len(tokens), schedules.training_thresholds('arccos', 6)
    )
    dropped = masking.drop_labels(label_key, labels, 0.5)
    losses = model.apply(
        variables, tokens, dropped, known, smoothing=0.1,
        method='cross_entropy',
    )
    return (
        objectives.loss(model, variables, tokens, labels, key, objective),
        losses, known, dropped,
    )

  (value, scalars), losses, known, dropped = compute(variables, tokens, labels)
  masked = ~np.asarray(known)
  assert 0 < masked.mean() < 1
  assert (np.asarray(dropped) != np.asarray(labels)).any()
  smoothed, nll = map(np.asarray, losses[::-1])
  np.testing.assert_allclose(value, smoothed[masked].mean(), rtol=1e-5)
  np.testing.assert_allclose(scalars['nll'], nll[masked].mean(), rtol=1e-5)
  np.testing.assert_allclose(scalars['masked_fraction'], masked.mean())
  np.testing.assert_array_equal(tokens, before[0])
  np.testing.assert_array_equal(labels, before[1])


def _train(model, draw, num_steps, learning_rate, smoothing=0.0):
  """Trains on endless draws of a source; returns the variables."""
  objective = objectives.Objective(
      class_dropout=0.1, label_smoothing=smoothing
  )
  optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

  @jax.jit
  def run(key):
    variables = _init(model, key)

    def step(carry, number):
      variables, state = carry
      data_key, loss_key = jax.random.split(jax.random.fold_in(key, number))

      def loss(variables):
        return objectives.loss(
            model, variables, *draw(data_key), loss_key, objective
        )[0]

      gradients = jax.grad(loss)(variables)
      updates, state = optimizer.update(gradients, state)
      return (optax.apply_updates(variables, updates), state), None

    (variables, _), _ = jax.lax.scan(
        step, (variables, optimizer.init(variables)), jnp.arange(num_steps)
    )
    return variables

  return run(jax.random.key(0))


def _draw_pairs(key, size=128):
  """Two symbols: the second repeats the first with p = 0.9.

  The first is 1 with p = 0.5 in class 0 and 0.8 in class 1.
  """
  keys = jax.random.split(key, 3)
  labels = jax.random.bernoulli(keys[0], shape=(size,)).astype(jnp.int32)
  first = jax.random.bernoulli(keys[1], 0.5 + 0.3 * labels).astype(jnp.int32)
  differs = jax.random.bernoulli(keys[2], 0.1, (size,)).astype(jnp.int32)
  return jnp.stack([first, first ^ differs], axis=-1), labels


def _all_pairs():
  """Returns every pair and class [8, ...], and their probabilities [8]."""
  labels, first, second = np.indices((2, 2, 2)).reshape(3, 8)
  ones = 0.5 + 0.3 * labels
  first_part = np.where(first, ones, 1 - ones)
  second_part = np.where(first == second, 0.9, 0.1)
  tokens = np.stack([first, second], -1)
  return tokens, labels, 0.5 * first_part * second_part


def _entropy(p):
  return -(p * math.log2(p) + (1 - p) * math.log2(1 - p))


@pytest.mark.slow
@pytest.mark.parametrize('causal', [False, True])
def test_a_source_of_two_symbols_is_learned(causal):
  """To within 0.02 bits per token of its entropy."""
  model = _model(causal, levels=(2,), grid=(1, 2))
  variables = _train(model, _draw_pairs, 400, 0.02)
  tokens, labels, weights = _all_pairs()
  entropy = np.asarray([(1 + _entropy(0.8)) / 2, _entropy(0.9)])
  if causal:
    measure = jax.jit(functools.partial(likelihood.exact_bits, model))
    bits = measure(variables, tokens, labels)
    assert np.abs(weights @ np.asarray(bits) - entropy).max() < 0.02
    null = measure(variables, tokens, np.full(8, -1))
    entropy = np.asarray([_entropy(0.65), _entropy(0.9)])
    assert np.abs(weights @ np.asarray(null) - entropy).max() < 0.02
    return
  cost = jax.jit(
      functools.partial(likelihood.compression_bits, model, num_steps=2)
  )(variables, tokens, labels)
  assert abs(weights @ np.asarray(cost) / 2 - entropy.mean()) < 0.02
  # The masks of the bound are random: many copies of each pair.
  bound = jax.jit(
      functools.partial(likelihood.any_order_bits, model, num_draws=8)
  )(variables, tokens.repeat(64, 0), labels.repeat(64), jax.random.key(0))
  bound = weights @ np.asarray(bound).reshape(8, 64).mean(1)
  assert abs(bound / 2 - entropy.mean()) < 0.02


def _draw_codes(key, size=64):
  """Codes (0, 0) and (1, 1) with equal probability: two modes."""
  levels = jax.random.bernoulli(key, shape=(size, 1)).astype(jnp.int32)
  return 3 * levels, jnp.zeros(size, jnp.int32)


@pytest.mark.slow
def test_only_autoregressive_levels_learn_two_modes():
  """H = 1 bit; independent levels pay 2."""
  tokens, labels = _draw_codes(jax.random.key(7), 256)
  bits = {}
  for head in ('levels_autoregressive', 'levels_independent'):
    model = _model(True, levels=(2, 2), grid=(1, 1)).clone(head=head)
    variables = _train(model, _draw_codes, 300, 0.02)
    measure = jax.jit(functools.partial(likelihood.exact_bits, model))
    bits[head] = float(np.mean(measure(variables, tokens, labels)))
  assert abs(bits['levels_autoregressive'] - 1) < 0.02
  assert abs(bits['levels_independent'] - 2) < 0.02


@pytest.mark.slow
def test_dropout_is_applied_in_training_only(draw_variables):
  model = _model(True, dropout=0.5)
  tokens, labels = _batch(model)
  variables = draw_variables(model, tokens, labels, None)

  @functools.partial(jax.jit, static_argnames='train')
  def features(variables, key, train):
    return model.apply(
        variables, tokens, labels, None, train=train, method='features',
        rngs={'dropout': key},
    )

  keys = jax.random.key(0), jax.random.key(1)
  a, b = (features(variables, key, train=True) for key in keys)
  assert np.abs(np.asarray(a - b)).max() > 1e-2
  a, b = (features(variables, key, train=False) for key in keys)
  np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'mask_schedule': 'sine'}, "mask_schedule is 'sine'; known"),
        ({'normalization': 'batch'}, "'batch'; known"),
        ({'class_dropout': 1.5}, r'use a number in \[0, 1\]'),
        ({'label_smoothing': -0.1}, 'label_smoothing is -0.1'),
    ],
)
def test_wrong_options_are_rejected(options, message):
  with pytest.raises(ValueError, match=message):
    objectives.Objective(**options)
