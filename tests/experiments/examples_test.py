"""Examples of FSQ inside Flax modules: they train, and indices decode."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.examples import linen_autoencoder
from experiments.examples import nnx_autoencoder

_LEVELS = (8, 5, 5)
_FEATURES = 6


def _linen():
  """Returns the methods as functions of parameters, and the parameters."""
  module = linen_autoencoder.Autoencoder(_LEVELS, width=16, features=_FEATURES)
  params = jax.jit(module.init)(jax.random.key(0), _vectors())

  def method(name):
    return lambda params, x: module.apply(params, x, method=name)

  return method, params


def _nnx():
  module = nnx_autoencoder.Autoencoder(
      _LEVELS, width=16, features=_FEATURES, rngs=nnx.Rngs(0)
  )
  graph, params, rest = nnx.split(module, nnx.Param, ...)

  def method(name):
    def call(params, x):
      return getattr(nnx.merge(graph, params, rest), name)(x)

    return call

  return method, params


def _vectors():
  """Returns [256, 6] points on a curve."""
  time = jnp.linspace(0, 1, 256)[:, None]
  return jnp.sin(2 * jnp.pi * time * jnp.arange(1, _FEATURES + 1))


@pytest.fixture(scope='module', params=[_linen, _nnx], ids=['linen', 'nnx'])
def example(request):
  return request.param()


@pytest.mark.slow
def test_gradients_arrive_at_the_encoder(example):
  method, params = example
  x = _vectors()

  @jax.jit
  @jax.grad
  def gradients(params):
    return jnp.mean(jnp.square(method('__call__')(params, x) - x))

  for path, gradient in jax.tree.leaves_with_path(gradients(params)):
    assert np.any(gradient != 0), jax.tree_util.keystr(path)


def test_indices_round_trip(example):
  method, params = example
  x = _vectors()
  indices = jax.jit(method('encode_to_indices'))(params, x)
  assert indices.dtype == jnp.int32
  assert indices.shape == (256,)
  assert len(np.unique(indices)) > 1
  np.testing.assert_allclose(
      jax.jit(method('decode_from_indices'))(params, indices),
      jax.jit(method('__call__'))(params, x),
      rtol=1e-5,
      atol=1e-6,
  )


@pytest.mark.slow
@pytest.mark.parametrize('module', [linen_autoencoder, nnx_autoencoder])
def test_the_printed_loss_falls(module, capsys):
  module.main()
  output = capsys.readouterr().out
  *losses, decoded = map(float, re.findall(r'loss ([\d.]+)', output))
  assert len(losses) == 6
  assert losses[-1] < 0.1 * losses[0]
  # Of the whole photograph, decoded from its tokens.
  assert decoded < 1.2 * losses[-1]
  assert int(re.search(r'(\d+) of 1000 codes', output)[1]) > 50
