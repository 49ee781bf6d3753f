"""Classifiers against torchvision, whose arrays all have a place.

Golden logits are in tests/testdata/frozen; experiments/weights/
golden_networks.py has made them, with weights that follow from a seed.
"""

import functools
import json
import pathlib

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from experiments.weights import golden_networks
from fsq_jax.perceptual import classifiers

_GOLDEN = pathlib.Path(__file__).parents[1] / 'testdata/frozen'
# As small as those that the golden logits are of.
_SMALL = {
    'convnext_small': {
        'widths': (8, 16, 24, 32), 'depths': (1, 1, 2, 1), 'num_classes': 10,
    },
    'resnet50': {'depths': (1, 2, 1, 1), 'num_classes': 10},
}  # fmt: skip
# As torchvision's documentation has it, and what batch norms count beside.
_NUM_PARAMETERS = {'convnext_small': 50_223_688, 'resnet50': 25_557_032}
_NUM_STATISTICS = {'convnext_small': 0, 'resnet50': 2 * 26_560}

each_classifier = pytest.mark.parametrize('name', sorted(_SMALL))


def _golden(name):
  return np.load(_GOLDEN / f'{name}.npz')


def _shapes(name, key):
  shapes = json.loads(str(_golden(name)[key]))
  return {key: tuple(shape) for key, shape in shapes.items()}


def _load_small(name, directory):
  path = directory / f'{name}.safetensors'
  arrays = golden_networks.make_arrays(_shapes(name, 'shapes'))
  safetensors_numpy.save_file(arrays, path)
  small = functools.partial(classifiers.CLASSIFIERS[name], **_SMALL[name])
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(classifiers.CLASSIFIERS, name, small)
    return classifiers.load_classifier(path, name)


def _trace(module):
  images = jax.ShapeDtypeStruct((1, 16, 24, 3), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), images)
  return variables, str(jax.make_jaxpr(module.apply)(variables, images))


def test_every_classifier_is_tested():
  assert sorted(classifiers.CLASSIFIERS) == sorted(_SMALL)


@pytest.mark.slow
@pytest.mark.parametrize('name', _SMALL)
def test_logits_are_those_of_torchvision(tmp_path, name):
  module, variables, _ = _load_small(name, tmp_path)
  images = np.float32(golden_networks.make_images()) / 127.5 - 1
  logits = jax.jit(module.apply)(variables, images)
  expected = _golden(name)['logits']
  assert logits.dtype == jnp.float32
  # A ten-thousandth of what tells the images apart.
  atol = 1e-4 * np.abs(expected[0] - expected[1]).mean()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)


@pytest.mark.slow
@each_classifier
def test_every_array_of_the_full_size_has_its_place(name):
  module = classifiers.CLASSIFIERS[name](precision='highest')
  variables, _ = _trace(module)
  stored = _shapes(name, 'full_shapes')
  sizes = {}
  for path, leaf in traverse_util.flatten_dict(
      variables['params'], sep='/'
  ).items():
    place = module.find_place(path, leaf.shape)
    assert np.prod(stored[place.key]) == leaf.size
    sizes[place.key] = leaf.size
  counts = {key for key in stored if key.endswith('num_batches_tracked')}
  assert stored.keys() - counts == sizes.keys()
  expected = _NUM_PARAMETERS[name] + _NUM_STATISTICS[name]
  assert sum(sizes.values()) == expected


@pytest.mark.fast_variants('highest-convnext_small')
@each_classifier
@pytest.mark.parametrize('precision', ['highest', 'default'])
def test_layers_have_the_precision_that_is_asked_for(name, precision):
  build = classifiers.CLASSIFIERS[name]
  _, program = _trace(build(precision=precision, **_SMALL[name]))
  products = program.count('conv_general_dilated[') + program.count(
      'dot_general['
  )
  # The two of the resampling are always in float32.
  highest = {'highest': products, 'default': 2}[precision]
  assert program.count('HIGHEST, Precision.HIGHEST') + program.count(
      'precision=Precision.HIGHEST'
  ) == highest


@each_classifier
def test_a_missing_file_is_an_error_that_says_how_to_make_one(tmp_path, name):
  with pytest.raises(ValueError, match=f'save torchvision\'s {name}'):
    classifiers.load_classifier(tmp_path / 'none.safetensors', name)


def test_other_names_files_and_images_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"known: \['convnext_small', 'resn"):
    classifiers.load_classifier(tmp_path, 'vgg16')
  module, variables, _ = _load_small('resnet50', tmp_path)
  with pytest.raises(ValueError, match=r'missing: layer1\.1\.bn1\.bias'):
    classifiers.load_classifier(tmp_path / 'resnet50.safetensors', 'resnet50')
  with pytest.raises(ValueError, match='B, H, W, 3'):
    jax.eval_shape(module.apply, variables, jnp.zeros((1, 8, 8, 1)))
