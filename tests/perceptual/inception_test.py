"""Inception-v3 against pytorch-fid and torch-fidelity; its loader.

Golden features are in tests/testdata/frozen; experiments/weights/
golden_networks.py has made them, with weights that follow from a seed.
"""

import json
import math
import pathlib

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from experiments.weights import golden_networks
from fsq_jax import perceptual
from fsq_jax.evaluation import network_metrics
from fsq_jax.perceptual import inception
from fsq_jax.runtime import partitioning

_GOLDEN = pathlib.Path(__file__).parents[1] / 'testdata/frozen/inception.npz'


_SHAPES = json.loads(str(np.load(_GOLDEN)['shapes']))


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  """A file with the weights of the golden features."""
  path = tmp_path_factory.mktemp('weights') / 'inception.safetensors'
  arrays = golden_networks.make_arrays(_SHAPES)
  safetensors_numpy.save_file(arrays, path)
  return path


@pytest.fixture(scope='module')
def program():
  """Shapes of the parameters, and the program in JAX's own language."""
  module = inception.InceptionV3()
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), images)
  return variables['params'], str(
      jax.make_jaxpr(module.apply)(variables, images)
  )


def _write(path, **changes):
  """Writes zeros in place of all weights, but for the changes."""
  arrays = {key: np.zeros(shape, np.float16) for key, shape in _SHAPES.items()}
  arrays |= changes
  arrays = {key: x for key, x in arrays.items() if x is not None}
  safetensors_numpy.save_file(arrays, path)
  return path


@pytest.mark.slow
@pytest.mark.parametrize('protocol', sorted(inception.PROTOCOLS))
def test_features_are_those_of_the_originals(path, protocol):
  metric = {'pytorch_fid': 'rfid', 'tf1': 'rfid_tf1'}[protocol]
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  network = network_metrics.load_network(metric, path, mesh)
  features = network(golden_networks.make_images())
  expected = np.load(_GOLDEN)[protocol]
  assert features.shape == (2, 2048)
  assert features.dtype == jnp.float32
  # A thousandth of what tells the images apart, a third of that the protocols.
  atol = 1e-3 * np.abs(expected[0] - expected[1]).mean()
  np.testing.assert_allclose(features, expected, rtol=0, atol=atol)


@pytest.mark.slow
def test_the_number_of_parameters_is_that_of_the_original(program):
  leaves = traverse_util.flatten_dict(program[0])
  sizes = {name: leaf.size for name, leaf in leaves.items()}
  statistics = {n: k for n, k in sizes.items() if n[-1] in ('mean', 'variance')}
  # Those of torchvision's inception_v3 without classifiers: 23,834,568 less a
  # dense layer of 2048 x 1000 + 1000.
  assert sum(sizes.values()) - sum(statistics.values()) == 21_785_568
  stored = [k for k, x in _SHAPES.items() if not k.startswith('fc.') and x]
  assert len(sizes) == len(stored)
  assert sum(sizes.values()) == sum(math.prod(_SHAPES[k]) for k in stored)


@pytest.mark.slow
def test_layers_are_those_of_the_original(program):
  text = program[1]
  assert text.count('conv_general_dilated[') == 94
  # Those two of the resampling are in float32 too.
  assert text.count('Precision.HIGHEST, Precision.HIGHEST') == 96
  # The stem, two blocks that halve the grid, and the last one.
  assert text.count('reduce_window_max[') == 5
  # Eight averages leave padding out: a sum of pixels over a sum of ones.
  assert text.count('reduce_window_sum[') == 16
  assert 'f32[1,8,8,2048]' in text


@pytest.mark.slow
def test_weights_that_do_not_define_fid_are_refused(tmp_path):
  path = tmp_path / 'other.safetensors'
  # torchvision's network has the same names and shapes, but for its classes.
  _write(path, **{'fc.weight': np.zeros((1000, 2048), np.float32)})
  with pytest.raises(ValueError, match="1008 classes, torchvision's") as error:
    perceptual.load_inception(path)
  assert 'fc.weight is (1000, 2048) instead of (1008, 2048)' in str(error.value)
  _write(path, **{'fc.weight': None})
  with pytest.raises(ValueError, match=r'1 missing: fc\.weight'):
    perceptual.load_inception(path)
  auxiliary = {'AuxLogits.conv0.conv.weight': np.zeros(1, np.float32)}
  with pytest.raises(ValueError, match=r'1 unexpected: AuxLogits\.conv0'):
    perceptual.load_inception(_write(path, **auxiliary))


def test_class_weights_are_read(tmp_path):
  weights = np.arange(1008 * 2048).reshape(1008, 2048) % 512 / np.float16(512)
  path = _write(tmp_path / 'x.safetensors', **{'fc.weight': weights})
  actual = inception.read_classifier(path)
  assert actual.dtype == np.float32
  np.testing.assert_array_equal(actual, weights)


def test_files_that_lack_something_are_refused(tmp_path):
  path = tmp_path / 'inception.safetensors'
  with pytest.raises(ValueError, match=r'There is no file .*2015-12-05'):
    perceptual.load_inception(path)
  _write(path, **{'Mixed_7c.branch_pool.bn.running_mean': None})
  with pytest.raises(ValueError, match=r'missing: Mixed_7c\.branch_pool\.bn'):
    perceptual.load_inception(path)


@pytest.mark.fast_limit(10)
def test_unknown_protocols_and_other_shapes_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"known: \['pytorch_fid', 'tf1'\]"):
    perceptual.load_inception(tmp_path, 'clean')
  module = inception.InceptionV3()
  for shape, message in (((8, 8, 3), 'B, H, W, 3'), ((1, 8, 8, 1), 'B, H')):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))

  def features(side):
    images = jnp.zeros((1, side, 80, 3))
    return jax.eval_shape(
        lambda key: module.init_with_output(key, images, method='features')[0],
        jax.random.key(0),
    )

  assert features(75).shape == (1, 2048)
  with pytest.raises(ValueError, match='74 x 80 pixels; Inception-v3 needs 75'):
    features(74)
