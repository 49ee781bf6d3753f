"""Inception-v3 against pytorch-fid and torch-fidelity; its loader.

Golden features are in tests/testdata/frozen; experiments/weights/
golden_networks.py has made them, with weights that follow from a seed.
"""

import json
import pathlib

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from experiments.weights import golden_networks
from fsq_jax import perceptual
from fsq_jax.perceptual import inception

_GOLDEN = pathlib.Path(__file__).parents[1] / 'testdata/frozen/inception.npz'


@pytest.fixture(scope='module')
def arrays():
  shapes = json.loads(str(np.load(_GOLDEN)['shapes']))
  return golden_networks.make_arrays(shapes)


@pytest.fixture(scope='module')
def path(arrays, tmp_path_factory):
  path = tmp_path_factory.mktemp('weights') / 'inception.safetensors'
  safetensors_numpy.save_file(arrays, path)
  return path


def _changed(arrays, path, **changes):
  changed = {**arrays, **changes}
  changed = {key: x for key, x in changed.items() if x is not None}
  safetensors_numpy.save_file(changed, path)
  return path


@pytest.mark.parametrize('protocol', sorted(inception.PROTOCOLS))
def test_features_are_those_of_the_originals(path, protocol):
  module, variables, _ = perceptual.load_inception(path, protocol)
  images = np.float32(golden_networks.make_images()) / 127.5 - 1
  features = jax.jit(module.apply)(variables, images)
  expected = np.load(_GOLDEN)[protocol]
  assert features.shape == (2, 2048)
  assert features.dtype == jnp.float32
  # A thousandth of what tells the images apart, a third of that the protocols.
  atol = 1e-3 * np.abs(expected[0] - expected[1]).mean()
  np.testing.assert_allclose(features, expected, rtol=0, atol=atol)


def test_the_number_of_parameters_is_that_of_the_original(arrays):
  module = inception.InceptionV3()
  images = jnp.zeros((1, 8, 8, 3))
  params = jax.eval_shape(module.init, jax.random.key(0), images)['params']
  leaves = traverse_util.flatten_dict(params)
  sizes = {name: leaf.size for name, leaf in leaves.items()}
  statistics = {n: k for n, k in sizes.items() if n[-1] in ('mean', 'variance')}
  # Those of torchvision's inception_v3 without classifiers: 23,834,568 less a
  # dense layer of 2048 x 1000 + 1000.
  assert sum(sizes.values()) - sum(statistics.values()) == 21_785_568
  stored = [k for k in arrays if not k.startswith('fc.') and arrays[k].ndim]
  assert len(sizes) == len(stored)
  assert sum(sizes.values()) == sum(arrays[k].size for k in stored)


def test_all_products_are_in_float32():
  module = inception.InceptionV3()
  variables = jax.eval_shape(
      module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  program = str(jax.make_jaxpr(module.apply)(variables, images))
  assert program.count('conv_general_dilated[') == 94
  # Those two of the resampling too.
  assert program.count('Precision.HIGHEST, Precision.HIGHEST') == 96


def test_weights_that_do_not_define_fid_are_refused(arrays, tmp_path):
  path = tmp_path / 'other.safetensors'
  # torchvision's network has the same names and shapes, but for its classes.
  _changed(
      arrays, path, **{'fc.weight': np.zeros((1000, 2048), np.float32)}
  )
  with pytest.raises(ValueError, match="may be torchvision's") as error:
    perceptual.load_inception(path)
  assert '(1000, 2048) fc.weight' in str(error.value)
  _changed(arrays, path, **{'fc.weight': None})
  with pytest.raises(ValueError, match=r'has no fc\.weight'):
    perceptual.load_inception(path)
  auxiliary = {'AuxLogits.conv0.conv.weight': np.zeros(1, np.float32)}
  with pytest.raises(ValueError, match=r'1 unexpected: AuxLogits\.conv0'):
    perceptual.load_inception(_changed(arrays, path, **auxiliary))


def test_files_that_lack_something_are_refused(arrays, tmp_path):
  path = tmp_path / 'inception.safetensors'
  with pytest.raises(ValueError, match=r'There is no file .*2015-12-05'):
    perceptual.load_inception(path)
  _changed(arrays, path, **{'Mixed_7c.branch_pool.bn.running_mean': None})
  with pytest.raises(ValueError, match=r'missing: Mixed_7c\.branch_pool\.bn'):
    perceptual.load_inception(path)


def test_unknown_protocols_and_other_shapes_are_refused(path):
  with pytest.raises(ValueError, match=r"known: \['pytorch_fid', 'tf1'\]"):
    perceptual.load_inception(path, 'clean')
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
