"""Vision transformers against NumPy, and the positions that they add."""

import math

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.models import layers
from fsq_jax.models import vit

# No two sizes are equal, so that no two axes can be mixed up.
_SIZE = (8, 12)
_GRID = (2, 3)


def _fields(position):
  """Fields of an encoder or decoder of 4 x 4 patches and two blocks."""
  return {
      'patch_size': 4,
      'width': 8,
      'depth': 2,
      'num_heads': 2,
      'mlp_dim': 20,
      'position': position,
      'grid_size': _GRID,
  }


def _images():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.uniform(-1, 1, (2, *_SIZE, 3)), jnp.float32)


def _init(module, *inputs):
  """Variables none of which is at its initial value, without compiling."""
  rng = np.random.default_rng(1)

  def draw(path, x):
    around = 1.0 if path[-1].key in ('scale', 'var') else 0.0
    return np.asarray(around + rng.uniform(-0.4, 0.4, x.shape), x.dtype)

  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def _call(module, variables, *inputs):
  return jax.jit(module.apply)(variables, *inputs)


def _norm(x, p):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + 1e-6) * p['scale'] + p['bias']


def _dense(x, p):
  return x @ p['kernel'] + p['bias']


def _gelu(x):
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return 0.5 * x * (1 + np.tanh(inner))


def _block(x, p, num_heads=2):
  """A transformer block, image by image, head by head, in float64."""
  channels = x.shape[-1]
  d = channels // num_heads
  q, k, v = np.split(
      _dense(_norm(x, p['attention_norm']), p['attention']['qkv']), 3, axis=-1
  )
  mixed = np.zeros_like(x)
  for b in range(len(x)):
    for head in range(num_heads):
      part = slice(head * d, (head + 1) * d)
      logits = q[b][:, part] @ k[b][:, part].T / math.sqrt(d)
      weights = np.exp(logits - logits.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      mixed[b][:, part] = weights @ v[b][:, part]
  x = x + _dense(mixed, p['attention']['out'])
  hidden = _gelu(_dense(_norm(x, p['mlp_norm']), p['mlp']['in']))
  return x + _dense(hidden, p['mlp']['out'])


def _float64(variables):
  return jax.tree.map(np.float64, variables['params'])


def test_block_is_that_of_numpy():
  block = layers.Block(num_heads=2, mlp_dim=20, dtype=jnp.float32)
  # Some tokens are so small that the epsilon of LayerNorm counts.
  x = jax.random.normal(jax.random.key(0), (2, 6, 8))
  x *= jnp.logspace(-3, 1, 6)[:, None]
  variables = _init(block, x, None)
  y, _ = _call(block, variables, x, None)
  expected = _block(np.float64(x), _float64(variables))
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def _blocks(x, p):
  stacked = p['transformer']['blocks']
  for i in range(2):
    x = _block(x, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
  return x


@pytest.mark.parametrize('position', vit.POSITIONS)
def test_encoder_is_that_of_numpy(position):
  encoder = vit.VitEncoder(**_fields(position))
  images = _images()
  variables = _init(encoder, images)
  p = _float64(variables)
  # Patches in row-major order; inside of one, rows, columns, channels.
  x = np.zeros((2, 6, 8))
  for n in range(6):
    row, column = 4 * (n // 3), 4 * (n % 3)
    patch = np.float64(images[:, row:row + 4, column:column + 4])
    x[:, n] = _dense(patch.reshape(2, 48), p['patches'])
  if position == 'learned':
    x += p['positions']['embedding'].reshape(6, 8)
  else:
    x += layers.sincos_positions(2, 3, 8).reshape(6, 8)
  latents = _call(encoder, variables, images)
  assert latents.dtype == jnp.float32
  expected = _blocks(x, p).reshape(2, 2, 3, 8)
  np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-5)


def test_decoder_is_that_of_numpy():
  decoder = vit.VitDecoder(**_fields('learned'))
  latents = jax.random.normal(jax.random.key(0), (2, *_GRID, 8))
  variables = _init(decoder, latents)
  p = _float64(variables)
  x = np.float64(latents) + p['positions']['embedding']
  x = _dense(_blocks(x.reshape(2, 6, 8), p), p['pixels'])
  expected = np.zeros((2, *_SIZE, 3))
  for n in range(6):
    row, column = 4 * (n // 3), 4 * (n % 3)
    patch = x[:, n].reshape(2, 4, 4, 3)
    expected[:, row:row + 4, column:column + 4] = patch
  images = _call(decoder, variables, latents)
  np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_blocks_start_small_and_unlike_each_other():
  fields = {**_fields('sincos'), 'width': 32, 'mlp_dim': 64}
  encoder = vit.VitEncoder(**fields)
  variables = jax.jit(encoder.init)(jax.random.key(0), _images())
  blocks = variables['params']['transformer']['blocks']
  for branch, fan_in in (('attention', 32), ('mlp', 64)):
    kernel = np.asarray(blocks[branch]['out']['kernel'])
    scale = kernel.std((1, 2)) * math.sqrt(fan_in)
    np.testing.assert_allclose(scale, 0.1, rtol=0.1)
    assert np.all(kernel[0] != kernel[1])


def test_sincos_positions_are_those_of_mae():
  positions = layers.sincos_positions(2, 2, 8)
  assert positions.shape == (2, 2, 8)
  assert positions.dtype == np.float32
  at_0, at_1 = [0, 0, 1, 1], [0.841471, 0.01, 0.540302, 0.99995]
  # [row, column]; the column's half comes first.
  expected = [
      [at_0 + at_0, at_1 + at_0],
      [at_0 + at_1, at_1 + at_1],
  ]
  np.testing.assert_allclose(positions, expected, atol=1e-6)


def test_sincos_positions_tell_every_place_of_a_grid_apart():
  positions = layers.sincos_positions(5, 7, 16)
  assert positions.shape == (5, 7, 16)
  assert len(np.unique(positions.reshape(35, 16), axis=0)) == 35


def test_sincos_positions_need_a_multiple_of_four_channels():
  with pytest.raises(ValueError, match=r'width is 6; .* a multiple of 4'):
    layers.sincos_positions(2, 2, 6)


def _dots(jaxpr):
  """Yields the contracted axes of all products, those of inner jaxprs too."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      yield equation.params['dimension_numbers'][0]
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _dots(inner)


@pytest.mark.slow
def test_gradients_of_kernels_contract_one_axis():
  # With two, XLA's CPU backend transposes the activations in memory.
  mlp = layers.Mlp(mlp_dim=16, dtype=jnp.float32)
  x = jnp.ones((2, 4, 8))
  variables = mlp.init(jax.random.key(0), x)
  jaxpr = jax.make_jaxpr(
      jax.grad(lambda variables: jnp.sum(mlp.apply(variables, x)))
  )(variables)
  contracted = list(_dots(jaxpr.jaxpr))
  assert len(contracted) >= 5
  assert all(len(left) == len(right) == 1 for left, right in contracted)
