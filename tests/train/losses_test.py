"""Losses against NumPy; shapes that would broadcast are refused."""

import re

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.train import losses

# What a loss is, in NumPy, for every name in the builder's table.
_EXPECTED = {
    'l1': lambda x, y: np.mean(np.abs(x - y)),
    'l2': lambda x, y: np.mean((x - y) ** 2),
}
# Derivative of one pixel's term by its difference.
_GRADIENTS = {'l1': np.sign, 'l2': lambda difference: 2 * difference}
_SHAPE = (2, 4, 6, 3)

every_loss = pytest.mark.parametrize('name', sorted(_EXPECTED))


@pytest.fixture(autouse=True)
def _no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield


def _images(seed, dtype=np.float32):
  images = np.random.default_rng(seed).uniform(-1, 1, _SHAPE)
  return jnp.asarray(images, dtype)


def test_every_loss_of_the_builder_is_tested():
  known = re.escape(f'known: {sorted(_EXPECTED)}.')
  with pytest.raises(ValueError, match=known):
    losses.build_reconstruction_loss('none')


@every_loss
def test_value_matches_numpy(name):
  x, y = _images(0), _images(1)
  loss = jax.jit(losses.build_reconstruction_loss(name))(x, y)
  expected = _EXPECTED[name](np.float64(x), np.float64(y))
  assert loss.shape == ()
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


@every_loss
def test_bfloat16_is_compared_in_float32(name):
  x, y = _images(0, jnp.bfloat16), _images(1)
  loss = jax.jit(losses.build_reconstruction_loss(name))(x, y)
  expected = _EXPECTED[name](np.float64(x), np.float64(y))
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


@every_loss
def test_gradient_matches_numpy(name):
  x, y = _images(0), _images(1)
  gradient = jax.jit(jax.grad(losses.build_reconstruction_loss(name)))(x, y)
  expected = _GRADIENTS[name](np.float64(x) - np.float64(y)) / x.size
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@every_loss
def test_loss_of_equal_images_is_zero(name):
  x = _images(0)
  assert jax.jit(losses.build_reconstruction_loss(name))(x, x) == 0


@every_loss
@pytest.mark.parametrize(
    'shape', [(), (3,), (1, 4, 6, 3), (2, 4, 6, 1), (2, 1, 4, 6, 3)]
)
def test_shapes_that_would_broadcast_are_refused(name, shape):
  loss_fn = losses.build_reconstruction_loss(name)
  images, other = jnp.zeros(_SHAPE), jnp.zeros(shape)
  for arguments in ((images, other), (other, images)):
    with pytest.raises(ValueError, match='have the same shape') as error:
      jax.eval_shape(loss_fn, *arguments)
    assert str(shape) in str(error.value)
    assert str(_SHAPE) in str(error.value)


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(ValueError, match=r"is 'huber'; known: \['l1', 'l2'\]"):
    losses.build_reconstruction_loss('huber')


class _Distance(nn.Module):
  """Stands for a perceptual network, scaled by its variables."""

  @nn.compact
  def __call__(self, reconstructions, images):
    scale = self.param('scale', nn.initializers.ones, ())
    return scale * jnp.mean(jnp.abs(reconstructions - images), axis=(1, 2, 3))


def _options(name):
  return {
      'reconstruction': 'l2',
      'reconstruction_weight': 2.0,
      'perceptual': {'name': name, 'weight': 0.5},
  }


def test_the_image_loss_is_the_weighted_sum_of_its_parts():
  reconstructions, images = jnp.full((2, 1, 1, 3), 3.0), jnp.ones((2, 1, 1, 3))
  loss = losses.build_image_loss(_options('none'), None)
  value, scalars = loss(reconstructions, images)
  assert (value, scalars) == (8, {'reconstruction_loss': 4})
  loss = losses.build_image_loss(_options('vit'), _Distance())
  variables = {'params': {'scale': jnp.float32(10)}}
  value, scalars = loss(reconstructions, images, variables)
  assert value == 2 * 4 + 0.5 * 20
  assert scalars == {'reconstruction_loss': 4, 'perceptual_loss': 20}


def test_the_perceptual_network_must_be_that_of_the_config():
  for name, network in (('none', _Distance()), ('vit', None)):
    with pytest.raises(ValueError, match=f"name is '{name}'; pass the network"):
      losses.build_image_loss(_options(name), network)
