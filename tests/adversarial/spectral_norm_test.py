"""Spectral normalisation: singular values, vectors, gradients, the circle."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.adversarial import spectral_norm

_FEATURES, _INPUTS = 5, 4


def _conv(kernel_size=3, features=_FEATURES):
  return spectral_norm.SpectralConv(features, kernel_size)


def _tokens(num_tokens=6):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.standard_normal((2, num_tokens, _INPUTS)), jnp.float32)


def _init(module, x):
  """Variables with vectors of some kernel and a bias that is not 0."""
  variables = jax.jit(module.init)(jax.random.key(0), x)
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32),
      variables['params'],
  ), variables['spectral_norm']


@functools.partial(jax.jit, static_argnames=('module', 'train'))
def _call(module, params, vectors, x, train):
  y, updated = module.apply(
      {'params': params, 'spectral_norm': vectors}, x, train=train,
      mutable=['spectral_norm'],
  )
  return y, updated['spectral_norm']


def _matrix(params):
  kernel = np.float64(params['kernel'])
  return kernel.reshape(-1, kernel.shape[-1])


def _expected(params, vectors, x):
  """The convolution by its definition, in float64."""
  kernel, x = np.float64(params['kernel']), np.float64(x)
  u, v = np.float64(vectors['u']), np.float64(vectors['v'])
  kernel = kernel / (v @ _matrix(params) @ u)
  size, count = len(kernel), x.shape[1]
  y = np.zeros((*x.shape[:2], kernel.shape[-1])) + np.float64(params['bias'])
  for n in range(count):
    for tap in range(size):
      y[:, n] += x[:, (n + tap - size // 2) % count] @ kernel[tap]
  return y


@pytest.mark.parametrize(
    ('kernel_size', 'num_tokens'),
    [
        (1, 2), (3, 1), (9, 6),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in ((1, 1), (1, 6), (3, 2), (3, 6), (9, 1), (9, 2))
        ),
    ],
)  # fmt: skip
def test_the_convolution_is_that_of_numpy(kernel_size, num_tokens):
  x = _tokens(num_tokens)
  module = _conv(kernel_size)
  params, vectors = _init(module, x)
  y, after = _call(module, params, vectors, x, train=False)
  assert y.dtype == jnp.float32
  expected = _expected(params, vectors, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  jax.tree.map(np.testing.assert_array_equal, after, vectors)


def test_training_makes_one_power_iteration_and_uses_it():
  x, module = _tokens(), _conv()
  params, before = _init(module, x)
  y, after = _call(module, params, before, x, train=True)
  v = _matrix(params) @ np.float64(before['u'])
  v /= np.linalg.norm(v)
  u = _matrix(params).T @ v
  u /= np.linalg.norm(u)
  np.testing.assert_allclose(after['u'], u, atol=1e-6)
  np.testing.assert_allclose(after['v'], v, atol=1e-6)
  np.testing.assert_allclose(y, _expected(params, after, x), atol=1e-5)
  # Outside of training, the kernel is that of the step before.
  again, unchanged = _call(module, params, after, x, train=False)
  np.testing.assert_allclose(again, y, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, unchanged, after)


@pytest.mark.slow
@pytest.mark.parametrize(('kernel_size', 'features'), [(1, 5), (3, 5), (1, 1)])
def test_after_many_steps_the_largest_singular_value_is_1(
    kernel_size, features
):
  x, module = _tokens(), _conv(kernel_size, features)
  params, vectors = _init(module, x)
  for _ in range(100):
    _, vectors = _call(module, params, vectors, x, train=True)
  # Impulses show the kernel by which the layer really convolves.
  impulses = jnp.eye(_INPUTS)[:, None] * jnp.eye(7)[3][:, None]
  y, _ = _call(module, params, vectors, impulses, train=False)
  reach = kernel_size // 2
  seen = np.asarray(y - params['bias'])[:, 3 - reach:4 + reach]
  values = np.linalg.svd(seen.reshape(-1, features), compute_uv=False)
  np.testing.assert_allclose(values[0], 1, rtol=1e-5)
  full = np.linalg.svd(_matrix(params), compute_uv=False)
  np.testing.assert_allclose(values, full / full[0], atol=1e-5)


def test_the_first_estimate_is_one():
  x = _tokens()
  variables = jax.jit(_conv().init)(jax.random.key(0), x)
  for vector in jax.tree.leaves(variables['spectral_norm']):
    np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-5)
  largest = np.linalg.norm(_matrix(variables['params']), 2)
  vectors = variables['spectral_norm']
  estimate = vectors['v'] @ _matrix(variables['params']) @ vectors['u']
  assert 0.3 * largest < estimate <= largest * (1 + 1e-6)


def test_vectors_get_no_gradient_and_the_estimate_does():
  x, module = _tokens(), _conv()
  params, before = _init(module, x)
  _, vectors = _call(module, params, before, x, train=True)
  weights = np.random.default_rng(2).standard_normal((2, 6, _FEATURES))

  def loss(params, vectors):
    y, _ = module.apply(
        {'params': params, 'spectral_norm': vectors}, x, train=True,
        mutable=['spectral_norm'],
    )
    return jnp.sum(y * weights)

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, before)
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradients[1])
  # Of W / (v W u) with v and u fixed, numerically in float64.
  for index in [(0, 0, 0), (1, 2, 3), (2, 3, 4)]:
    values = []
    for step in (1e-5, -1e-5):
      kernel = np.float64(params['kernel'])
      kernel[index] += step
      y = _expected({**params, 'kernel': kernel}, vectors, x)
      values.append((y * weights).sum())
    numerical = (values[0] - values[1]) / 2e-5
    np.testing.assert_allclose(
        gradients[0]['kernel'][index], numerical, rtol=1e-3, atol=1e-4
    )


def test_tokens_are_a_circle():
  x, module = _tokens(), _conv()
  params, vectors = _init(module, x)
  y, _ = _call(module, params, vectors, x, train=False)
  turned, _ = _call(module, params, vectors, jnp.roll(x, 2, 1), train=False)
  np.testing.assert_allclose(turned, np.roll(y, 2, 1), atol=1e-6)


def test_a_kernel_of_zeros_makes_no_nan_of_the_vectors():
  x, module = _tokens(), _conv()
  params, vectors = _init(module, x)
  params = {**params, 'kernel': jnp.zeros_like(params['kernel'])}
  _, vectors = _call(module, params, vectors, x, train=True)
  assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(vectors))


def test_even_kernels_are_refused():
  with pytest.raises(ValueError, match='kernel_size is 4; it must be an odd'):
    jax.eval_shape(_conv(4).init, jax.random.key(0), _tokens())
