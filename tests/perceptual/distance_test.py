"""Perceptual losses: one contract for all, and what each compares."""

import functools
import json
import pathlib
import re

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from experiments.weights import golden_networks
from fsq_jax import models
from fsq_jax import perceptual
from fsq_jax.perceptual import classifiers
from fsq_jax.perceptual import distance
from fsq_jax.perceptual import lpips

_TESTDATA = pathlib.Path(__file__).parents[1] / 'testdata'
_ENCODER = _TESTDATA / 'encoders' / 'dinov2'
_NAMES = ('convnext', 'lpips_alexnet', 'lpips_vgg16', 'resnet50', 'vit')
# Small enough to be read and run, and with values in tests/testdata/frozen.
_CLASSIFIERS = {
    'convnext_small': functools.partial(
        classifiers.ConvNext, widths=(8, 16, 24, 32), depths=(1, 1, 2, 1),
        num_classes=10,
    ),
    'resnet50': functools.partial(
        classifiers.ResNet, depths=(1, 2, 1, 1), num_classes=10
    ),
}  # fmt: skip

each_loss = pytest.mark.parametrize('name', _NAMES)
each_loss_runs = pytest.mark.parametrize(
    'name',
    [
        x
        if x in ('lpips_alexnet', 'vit')
        else pytest.param(x, marks=pytest.mark.slow)
        for x in _NAMES
    ],
)


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
  """Weights of every network, random but for the ViT's."""
  directory = tmp_path_factory.mktemp('weights')
  rng = np.random.default_rng(0)
  made = {'vit': _ENCODER}
  for network in lpips.NETWORKS:
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(
        lpips.Lpips(network).init, jax.random.key(0), images, images
    )['params']
    arrays = {}
    for key, leaf in traverse_util.flatten_dict(params, sep='/').items():
      deviation = np.float32((2 / np.prod((1, *leaf.shape[:-1]))) ** 0.5)
      draw = rng.standard_normal(leaf.shape, np.float32)
      arrays[key] = np.abs(draw) if 'head' in key else deviation * draw
    made[f'lpips_{network}'] = directory / f'{network}.safetensors'
    safetensors_numpy.save_file(arrays, made[f'lpips_{network}'])
  for name, key in (('convnext', 'convnext_small'), ('resnet50', 'resnet50')):
    golden = np.load(_TESTDATA / 'frozen' / f'{key}.npz')
    arrays = golden_networks.make_arrays(json.loads(str(golden['shapes'])))
    made[name] = directory / f'{name}.safetensors'
    safetensors_numpy.save_file(arrays, made[name])
  return made


@pytest.fixture(autouse=True)
def _small_classifiers(monkeypatch):
  for name, build in _CLASSIFIERS.items():
    monkeypatch.setitem(classifiers.CLASSIFIERS, name, build)


def _images():
  images = np.float32(golden_networks.make_images()) / 127.5 - 1
  images = images[:, :31, :34]
  return images, images[::-1] * 0.5


def test_every_loss_of_the_builder_is_tested():
  with pytest.raises(ValueError, match=re.escape(str(sorted(_NAMES)))):
    distance.build_perceptual_loss('none', 'none')


@pytest.mark.slow
@each_loss_runs
def test_every_loss_keeps_the_contract(paths, name):
  module, variables, sha256 = distance.build_perceptual_loss(
      name, paths[name]
  )
  assert sha256 == models.hash_weights(paths[name])
  assert set(variables) == {'params'}
  images, others = _images()
  compare = jax.jit(module.apply)
  per_image = compare(variables, images, others)
  assert per_image.shape == (2,)
  assert per_image.dtype == jnp.float32
  assert (per_image > 0).all()
  # Both images go through the network in one program, which may round the two
  # differently.
  assert np.max(compare(variables, images, images)) < 1e-9
  swapped = compare(variables, others, images)
  np.testing.assert_allclose(swapped, per_image, rtol=1e-5)
  # The weights are an argument, not part of the program.
  without = jax.tree.map(np.zeros_like, variables)
  np.testing.assert_array_equal(compare(without, images, others), 0)


@pytest.mark.slow
@each_loss
def test_activations_may_be_bfloat16_and_distances_remain_float32(
    paths, name
):
  images, others = _images()

  def compare(dtype):
    module, variables, _ = distance.build_perceptual_loss(
        name, paths[name], dtype=dtype
    )
    program = jax.jit(module.apply).lower(variables, images, others).as_text()
    return jax.jit(module.apply)(variables, images, others), program

  expected, program = compare(jnp.float32)
  assert 'bf16' not in program
  rounded, program = compare(jnp.bfloat16)
  assert 'bf16' in program
  assert rounded.dtype == jnp.float32
  # 8 bits, through all layers.
  np.testing.assert_allclose(rounded, expected, rtol=0.1)


@pytest.mark.slow
@each_loss
def test_the_gradient_of_the_mean_reaches_every_image(paths, name):
  module, variables, _ = distance.build_perceptual_loss(name, paths[name])
  images, others = _images()

  @jax.jit
  def compare(variables, images, others):
    def loss(others):
      return jnp.mean(module.apply(variables, images, others))

    return *jax.value_and_grad(loss)(others), module.apply(
        variables, images, others
    )

  mean, gradient, per_image = compare(variables, images, others)
  assert mean.shape == ()
  assert mean.dtype == jnp.float32
  np.testing.assert_allclose(mean, np.mean(per_image), rtol=1e-6)
  assert np.isfinite(gradient).all()
  # All channels of each.
  assert (np.abs(gradient).max(axis=(1, 2)) > 0).all()


@pytest.mark.fast_variants('alexnet')
@pytest.mark.parametrize('network', sorted(lpips.NETWORKS))
def test_lpips_is_that_of_the_metric(paths, network):
  path = paths[f'lpips_{network}']
  loss = distance.build_perceptual_loss(f'lpips_{network}', path)
  metric = perceptual.load_lpips(path, network)
  assert loss.module == lpips.Lpips(network, precision='default')
  jax.tree.map(
      np.testing.assert_array_equal, loss.variables, metric.variables
  )


@pytest.mark.slow
def test_vit_compares_latents_without_the_final_affine(paths):
  module, variables, _ = distance.build_perceptual_loss('vit', _ENCODER)
  encoder = models.load_encoder(_ENCODER, final_affine=False)
  images, others = _images()
  encode = jax.jit(encoder.module.apply)
  a, b = (np.float64(encode(encoder.variables, x)) for x in (images, others))
  np.testing.assert_allclose(
      jax.jit(module.apply)(variables, images, others),
      ((a - b) ** 2).mean(axis=(1, 2, 3)),
      rtol=1e-5,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'key'),
    [
        ('convnext', 'convnext_small'),
        pytest.param('resnet50', 'resnet50', marks=pytest.mark.slow),
    ],
)
def test_classifiers_compare_logits(paths, name, key):
  module, variables, _ = distance.build_perceptual_loss(name, paths[name])
  images = np.float32(golden_networks.make_images()) / 127.5 - 1
  logits = np.load(_TESTDATA / 'frozen' / f'{key}.npz')['logits']
  expected = ((np.float64(logits[0]) - logits[1]) ** 2).mean()
  np.testing.assert_allclose(
      jax.jit(module.apply)(variables, images[:1], images[1:]),
      [expected],
      rtol=1e-3,
  )


@pytest.mark.slow
def test_shapes_that_would_broadcast_are_refused(paths):
  images, others = _images()
  for name in _NAMES:
    module, variables, _ = distance.build_perceptual_loss(name, paths[name])
    with pytest.raises(ValueError, match='of one shape'):
      jax.eval_shape(module.apply, variables, images, others[:1])


def test_missing_weights_are_an_error(tmp_path):
  for name in _NAMES:
    with pytest.raises(ValueError, match='There is no'):
      distance.build_perceptual_loss(name, tmp_path / 'none')


def test_unknown_names_list_the_known_ones(tmp_path):
  with pytest.raises(ValueError, match=r"'lpips'; known: \['convnext', 'lp"):
    distance.build_perceptual_loss('lpips', tmp_path)
