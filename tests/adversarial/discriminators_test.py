"""Convolutional discriminators against NumPy, pixel by pixel."""

import itertools
import math

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.adversarial import discriminators

_DOWNSAMPLINGS = ['average', 'blur']


def _patch(**fields):
  defaults = {
      'channels': 32, 'num_stages': 2, 'downsampling': 'blur', 'grid_size': 3,
  }
  return discriminators.PatchDiscriminator(**{**defaults, **fields})


def _stylegan(**fields):
  defaults = {'filters': 4, 'multipliers': (2, 3), 'downsampling': 'blur'}
  return discriminators.StyleGanDiscriminator(**{**defaults, **fields})


_MODULES = {'patch': _patch, 'stylegan': _stylegan}


def _images(size, num_images=2):
  images = np.random.default_rng(0).uniform(-1, 1, (num_images, *size, 3))
  return jnp.asarray(images, jnp.float32)


def _init(module, images):
  """Variables none of which is at its initial value, without compiling."""
  rng = np.random.default_rng(1)

  def draw(path, x):
    name = path[-1].key
    if name == 'kernel':
      x = rng.standard_normal(x.shape) / math.sqrt(np.prod(x.shape[:-1]))
    else:
      x = (name == 'scale') + rng.uniform(-0.4, 0.4, x.shape)
    return jnp.asarray(x, jnp.float32)

  shapes = jax.eval_shape(module.init, jax.random.key(0), images)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def _conv(x, p):
  """A convolution of one image with zeros around it, in float64."""
  kernel = p['kernel']
  reach = kernel.shape[0] // 2
  padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)))
  y = np.zeros((*x.shape[:2], kernel.shape[-1]))
  for row in range(x.shape[0]):
    for column in range(x.shape[1]):
      window = padded[
          row:row + kernel.shape[0], column:column + kernel.shape[1]
      ]
      y[row, column] = np.tensordot(window, kernel, 3)
  return y + p.get('bias', 0)


def _leaky(x, slope):
  return np.where(x > 0, x, slope * x)


def _down(x, kind):
  """Halves one image: each output pixel from the input pixels around it."""
  height, width = (-(-side // 2) for side in x.shape[:2])
  y = np.zeros((height, width, x.shape[2]))
  for row in range(height):
    for column in range(width):
      total = 0
      for dy, dx in np.ndindex(4, 4):
        place = 2 * row + dy - 1, 2 * column + dx - 1
        inside = all(0 <= p < n for p, n in zip(place, x.shape, strict=False))
        if kind == 'blur':
          weight = [1, 3, 3, 1][dy] * [1, 3, 3, 1][dx] / 64
        else:
          weight = float(dy in (1, 2) and dx in (1, 2) and inside)
          total += weight
        if inside:
          y[row, column] += weight * x[place]
      if kind == 'average':
        y[row, column] /= total
  return y


def _group_norm(x, p):
  groups = x.reshape(*x.shape[:2], 32, -1)
  mean = groups.mean((0, 1, 3), keepdims=True)
  variance = groups.var((0, 1, 3), keepdims=True)
  x = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
  return x * p['scale'] + p['bias']


def _pool(x, size):
  """Adaptive max-pooling by its definition, of what is larger than size."""
  height, width = (min(side, size) for side in x.shape[:2])
  y = np.zeros((height, width, x.shape[2]))
  for i, j in np.ndindex(height, width):
    rows, columns = (
        slice(math.floor(k * n / m), math.ceil((k + 1) * n / m))
        for k, n, m in ((i, x.shape[0], height), (j, x.shape[1], width))
    )
    y[i, j] = x[rows, columns].max((0, 1))
  return y


def _patch_logits(image, p, module):
  x = _leaky(_conv(image, p['in']), 0.1)
  for i in range(module.num_stages):
    x = _down(_conv(x, p[f'stage_{i}']), module.downsampling)
    x = _leaky(_group_norm(x, p[f'norm_{i}']), 0.1)
  x = _leaky(_conv(_pool(x, module.grid_size), p['hidden']), 0.1)
  return _conv(x, p['out']).reshape(-1)


def _stylegan_logits(image, p, module):
  x = _leaky(_conv(image, p['in']), 0.2)
  for i in range(len(module.multipliers)):
    y = _leaky(_conv(x, p[f'block_{i}_first']), 0.2)
    y = _conv(_down(y, module.downsampling), p[f'block_{i}_second'])
    skip = _conv(_down(x, module.downsampling), p[f'block_{i}_skip'])
    x = (skip + _leaky(y, 0.2)) / math.sqrt(2)
  x = _leaky(_conv(x, p['last']), 0.2).reshape(-1)
  x = _leaky(x @ p['hidden']['kernel'] + p['hidden']['bias'], 0.2)
  return x @ p['out']['kernel'] + p['out']['bias']


_EXPECTED = {'patch': _patch_logits, 'stylegan': _stylegan_logits}


@pytest.mark.fast_variants(
    'stylegan-size0-blur',
    'patch-size0-blur',
    'patch-size1-average',
)
@pytest.mark.parametrize('downsampling', _DOWNSAMPLINGS)
@pytest.mark.parametrize('size', [(8, 12), (13, 21)])
@pytest.mark.parametrize('name', sorted(_MODULES))
def test_logits_are_those_of_numpy(name, size, downsampling):
  module = _MODULES[name](downsampling=downsampling)
  images = _images(size)
  variables = _init(module, images)
  logits = jax.jit(module.apply)(variables, images)
  assert logits.dtype == jnp.float32
  params = jax.tree.map(np.float64, variables['params'])
  expected = [
      _EXPECTED[name](np.float64(x), params, module) for x in images
  ]
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('side', 'num_logits'), [(32, 16), (64, 64), (128, 256), (256, 256)]
)
def test_small_images_have_fewer_patches(side, num_logits):
  module = _patch(channels=128, num_stages=3, grid_size=16)
  images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  logits, _ = jax.eval_shape(
      module.init_with_output, jax.random.key(0), images
  )
  assert logits.shape == (2, num_logits)


def _count(module, side):
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), images)
  assert variables.keys() == {'params'}
  return sum(x.size for x in jax.tree.leaves(variables))


def test_the_patch_discriminator_has_the_parameters_of_titok():
  convs = [(5, 3, 128), (3, 128, 128), (3, 128, 256), (3, 256, 512)]
  convs += [(1, 512, 512), (5, 512, 1)]
  expected = sum(k * k * i * o + o for k, i, o in convs)
  expected += 2 * (128 + 256 + 512)
  module = _patch(channels=128, num_stages=3, grid_size=16)
  assert _count(module, 256) == expected == 1_909_889


def test_the_stylegan_discriminator_has_the_parameters_of_magvit():
  channels = [64, 128, 256, 256, 256, 256]
  expected = 9 * 3 * 64 + 64
  for i, o in itertools.pairwise(channels):
    expected += 9 * i * i + i + 9 * i * o + o + i * o
  expected += 9 * 256**2 + 256 + 4 * 4 * 256 * 256 + 256 + 256 + 1
  module = _stylegan(filters=64, multipliers=(2, 4, 4, 4, 4))
  assert _count(module, 128) == expected


@pytest.mark.parametrize('name', sorted(_MODULES))
def test_logits_of_an_image_do_not_depend_on_the_others(name):
  module = _MODULES[name]()
  images = _images((8, 8), num_images=3)
  variables = _init(module, images)
  apply = jax.jit(module.apply)
  for i in range(3):
    np.testing.assert_allclose(
        apply(variables, images)[i:i + 1],
        apply(variables, images[i:i + 1]),
        atol=1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(_MODULES))
def test_every_parameter_trains_and_images_have_a_gradient(name):
  module = _MODULES[name]()
  images = _images((8, 8))
  variables = _init(module, images)

  def loss(variables, images):
    return jnp.sum(jnp.tanh(module.apply(variables, images, train=True)))

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, images)
  assert module.frozen_parameters == ()
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.max(np.abs(gradient)) > 1e-5, path


@pytest.mark.parametrize('name', sorted(_MODULES))
@pytest.mark.slow
def test_initial_logits_are_small(name):
  module = _MODULES[name]()
  logits, _ = jax.jit(module.init_with_output)(
      jax.random.key(0), _images((8, 8))
  )
  assert 0 < np.max(np.abs(logits)) < 3


@pytest.mark.parametrize('name', sorted(_MODULES))
def test_images_too_small_for_the_stages_are_refused(name):
  module = _MODULES[name]()
  jax.eval_shape(module.init, jax.random.key(0), _images((4, 4)))
  with pytest.raises(ValueError, match=r'3 x 8 pixels cannot be halved 2'):
    jax.eval_shape(module.init, jax.random.key(0), _images((3, 8)))


@pytest.mark.parametrize('name', sorted(_MODULES))
def test_unknown_downsamplings_are_refused(name):
  module = _MODULES[name](downsampling='max')
  with pytest.raises(ValueError, match=r"'max'; known: \['average', 'blur'\]"):
    jax.eval_shape(module.init, jax.random.key(0), _images((8, 8)))
