"""Quantizers with level indices: no codebook in memory, index orders."""

import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsq_jax.quantizers import BSQ
from fsq_jax.quantizers import FSQ
from fsq_jax.quantizers import LFQ
from fsq_jax.quantizers import GroupedFSQ
from fsq_jax.quantizers import ResidualFSQ
from fsq_jax.quantizers import digits

_LARGE = {
    'fsq': lambda: FSQ((4,) * 15),
    'preserve_symmetry': lambda: FSQ((4,) * 15, 'preserve_symmetry'),
    'grouped': lambda: GroupedFSQ((4,) * 8, num_groups=2),
    'residual': lambda: ResidualFSQ((4,) * 4, num_stages=4),
    'lfq': lambda: LFQ(30),
    'bsq': lambda: BSQ(30),
}
every_large_one = pytest.mark.parametrize('name', _LARGE)


def _largest_array(jaxpr):
  """Returns the elements of the largest array of a trace, at any depth."""
  sizes = [np.size(constant) for constant in jaxpr.consts]
  jaxprs = [jaxpr.jaxpr]
  while jaxprs:
    for equation in jaxprs.pop().eqns:
      sizes += [variable.aval.size for variable in equation.outvars]
      for parameter in jax.tree.leaves(
          equation.params, is_leaf=lambda x: hasattr(x, 'eqns')
      ):
        if hasattr(parameter, 'consts'):
          sizes += [np.size(constant) for constant in parameter.consts]
        if hasattr(parameter, 'eqns'):
          jaxprs.append(getattr(parameter, 'jaxpr', parameter))
  return max(sizes)


@every_large_one
def test_large_codebooks_cost_nothing_to_construct(name):
  _LARGE[name]()  # imports and caches
  tracemalloc.start()
  start = time.process_time()
  quantizer = _LARGE[name]()
  assert quantizer.codebook_size ** max(1, *quantizer.index_shape, 1) >= 2**30
  seconds = time.process_time() - start
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert seconds < 0.1
  assert peak < 2**20


@pytest.mark.slow
@every_large_one
def test_no_trace_holds_a_codebook(name):
  quantizer = _LARGE[name]()
  z = jnp.zeros((16, quantizer.code_dim))
  # LFQ: 16 vectors times the 2^4 codes of half a group, or the 2^8 of one.
  limit = 2 * 16 * max(quantizer.code_dim, 2**4)

  def loss(z):
    out = quantizer.apply({}, z)
    return jnp.sum(out.z_q) + out.loss, out

  trace = jax.make_jaxpr(jax.grad(loss, has_aux=True))(z)
  assert _largest_array(trace) <= limit
  indices = jnp.zeros((16, *quantizer.index_shape), jnp.int32)
  trace = jax.make_jaxpr(quantizer.indices_to_codes)(indices)
  assert _largest_array(trace) <= limit
  trace = jax.make_jaxpr(quantizer.codes_to_indices)(z)
  assert _largest_array(trace) <= limit
  assert jax.eval_shape(quantizer.init, jax.random.key(0), z) == {}


@pytest.mark.parametrize(
    'quantizer',
    [
        FSQ((4,) * 15, noise=0.5),
        GroupedFSQ((4,) * 8, num_groups=2, noise=0.5),
        ResidualFSQ((4,) * 4, num_stages=4, stage_dropout=0.5),
    ],
    ids=lambda quantizer: quantizer.spec()['name'],
)
def test_no_trace_of_training_holds_a_codebook(quantizer):
  def loss(z, key):
    out = quantizer.apply({}, z, train=True, rngs={'quantizer': key})
    return jnp.sum(out.z_q) + out.loss, out

  z = jnp.zeros((16, quantizer.code_dim))
  trace = jax.make_jaxpr(jax.grad(loss, has_aux=True))(z, jax.random.key(0))
  # Level indices of residual FSQ are [16, 4, 4].
  assert _largest_array(trace) <= 2 * 16 * 16


def test_largest_array_is_found_at_any_depth():
  def nested(x):
    return jax.jit(lambda x: jnp.sum(jnp.ones((1000, 7)) * x))(x)

  assert _largest_array(jax.make_jaxpr(nested)(1.0)) == 7000
  table = np.ones((50, 20))
  trace = jax.make_jaxpr(lambda i: jnp.asarray(table)[i])(0)
  assert _largest_array(trace) == 1000


def test_order_of_digits():
  for quantizer, bases in (
      (FSQ((8, 6, 5)), (30, 5, 1)),
      (FSQ((8, 6, 5), 'vqp'), (1, 8, 48)),
      (LFQ(3), (4, 2, 1)),
      (LFQ(3, bit_order='lsb_first'), (1, 2, 4)),
  ):
    np.testing.assert_array_equal(
        quantizer.digits_to_indices(jnp.eye(3, dtype=jnp.int32)), bases
    )


def test_one_number_for_each_example():
  assert digits.per_example((8, 4, 3), rank=3) == (8, 1, 1)
  assert digits.per_example((3,), rank=1) == (1,)
  assert digits.per_example((2, 3), rank=1) == (1, 1)  # a vector of two groups
