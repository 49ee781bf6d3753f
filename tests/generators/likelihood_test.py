"""Likelihoods against enumeration over all token grids."""

import functools
import itertools
import math

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.generators import architecture
from fsq_jax.generators import likelihood
from fsq_jax.generators import model as models
from fsq_jax.generators import orders
from fsq_jax.generators import schedules
from fsq_jax.generators import vocabulary

_GRID, _N = (1, 3), 3
# All grids of three tokens with four codes.
_TOKENS = np.asarray(list(itertools.product(range(4), repeat=_N)))
_LABELS = np.zeros(len(_TOKENS), np.int32)


def _model(causal):
  return models.TokenModel(
      architecture.Architecture(
          causal=causal, depth=1, width=8, num_heads=2, mlp_dim=12
      ),
      vocabulary.from_levels((2, 2)), _GRID, 2, 'levels',
      'levels_autoregressive',
  )


_CAUSAL, _MASKED = _model(True), _model(False)


def _variables(model, draw_variables):
  known = None if model.architecture.causal else np.zeros((1, _N), bool)
  return draw_variables(model, _TOKENS[:1], _LABELS[:1], known)


@functools.cache
def _losses():
  return jax.jit(functools.partial(_MASKED.apply, method='cross_entropy'))


def _masked_bits(variables, known):
  """Bits [M, N] of every grid, with the same positions known."""
  known = np.broadcast_to(known, _TOKENS.shape)
  nll = _losses()(variables, _TOKENS, _LABELS, known).nll
  return np.float64(nll) / math.log(2)


def test_exact_likelihoods_of_all_grids_sum_to_1(draw_variables):
  variables = _variables(_CAUSAL, draw_variables)
  bits = jax.jit(functools.partial(likelihood.exact_bits, _CAUSAL))(
      variables, _TOKENS, _LABELS
  )
  total = np.float64(bits).sum(-1)
  np.testing.assert_allclose((2.0**-total).sum(), 1, atol=1e-5)
  assert (2.0**-total).std() > 1e-4
  # Equal prefixes have equal bits.
  first = np.float64(bits)[:, 0].reshape(4, 16)
  np.testing.assert_allclose(first, first[:, :1].repeat(16, 1), atol=1e-5)
  np.testing.assert_allclose((2.0 ** -first[:, 0]).sum(), 1, atol=1e-5)


@pytest.mark.slow
def test_any_order_bound_is_the_mean_over_all_orders(draw_variables):
  variables = _variables(_MASKED, draw_variables)
  order_bits = []
  for order in itertools.permutations(range(_N)):
    total = 0.0
    for step, n in enumerate(order):
      known = np.isin(np.arange(_N), order[:step])
      total += _masked_bits(variables, known)[:, n]
    order_bits.append(total)
  exact = np.mean(order_bits, axis=0)
  estimate = jax.jit(
      functools.partial(likelihood.any_order_bits, _MASKED, num_draws=12)
  )
  several = [
      estimate(variables, _TOKENS, _LABELS, jax.random.key(seed))
      for seed in range(10)
  ]
  assert np.std(several, axis=0).min() > 0
  error = np.mean(several, axis=0) - exact
  deviation = np.std(several, axis=0).mean() / math.sqrt(len(several))
  assert np.abs(error).max() < 5 * deviation
  assert abs(error.mean()) < 0.01 * exact.mean()
  # An example's masks depend on its number and not on its batch.
  turn = np.random.default_rng(0).permutation(len(_TOKENS))
  turned = estimate(
      variables, _TOKENS[turn], _LABELS, jax.random.key(0), examples=turn
  )
  np.testing.assert_allclose(turned, several[0][turn], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('num_steps', [2, 3])
def test_compression_cost_is_a_code_length(num_steps, draw_variables):
  variables = _variables(_MASKED, draw_variables)
  bits = np.float64(
      jax.jit(
          functools.partial(
              likelihood.compression_bits, _MASKED, num_steps=num_steps
          )
      )(variables, _TOKENS, _LABELS)
  )
  # Decodable: Kraft's sum over all grids is 1.
  np.testing.assert_allclose((2.0**-bits).sum(), 1, atol=1e-5)
  order = orders.halton_order(_GRID)
  ends = np.cumsum([0, *schedules.power_group_sizes(_N, num_steps, 2.2)])
  expected = 0.0
  for start, end in itertools.pairwise(ends):
    known = np.isin(np.arange(_N), order[:start])
    expected += _masked_bits(variables, known)[:, order[start:end]].sum(-1)
  np.testing.assert_allclose(bits, expected, atol=1e-5)


def test_compression_takes_an_order(draw_variables):
  variables = _variables(_MASKED, draw_variables)
  order = np.asarray([2, 0, 1])
  bits = jax.jit(
      functools.partial(
          likelihood.compression_bits, _MASKED, num_steps=3, order=order
      )
  )(variables, _TOKENS, jnp.asarray(_LABELS))
  expected = sum(
      _masked_bits(variables, np.isin(np.arange(_N), order[:i]))[:, order[i]]
      for i in range(_N)
  )
  np.testing.assert_allclose(bits, expected, atol=1e-5)
