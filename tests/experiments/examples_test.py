"""FSQ in modules of others: gradients pass through it, indices come back."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.examples import linen_autoencoder
from experiments.examples import nnx_autoencoder

_LEVELS = (8, 5, 5)
_FEATURES = 6


def _linen():
  """Functions of parameters, and the parameters."""
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
  """[256, 6]: on a curve, so that few codes can say much about them."""
  time = jnp.linspace(0, 1, 256)[:, None]
  return jnp.sin(2 * jnp.pi * time * jnp.arange(1, _FEATURES + 1))


_MAKERS = {'linen': _linen, 'nnx': _nnx}


@pytest.mark.parametrize(
    'name', ['linen', pytest.param('nnx', marks=pytest.mark.slow)]
)
def test_gradients_arrive_at_the_encoder(name):
  method, params = _MAKERS[name]()
  x = _vectors()

  def loss(params):
    return jnp.mean(jnp.square(method('__call__')(params, x) - x))

  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(params, state):
    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, value, gradients

  state = optimizer.init(params)
  losses = []
  for _ in range(100):
    params, state, value, gradients = step(params, state)
    losses.append(float(value))
    if len(losses) == 1:
      for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.any(gradient != 0), jax.tree_util.keystr(path)
  assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize('name', _MAKERS)
def test_indices_round_trip(name):
  method, params = _MAKERS[name]()
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
