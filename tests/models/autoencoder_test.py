"""Statistics of latents, and pretrained encoders in whole models."""

import pathlib

from flax import linen as nn
import jax
from jax import numpy as jnp
import ml_collections
import numpy as np
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import quantizers

_CONFIG = configuration.load_config(
    pathlib.Path(__file__).parents[2] / 'configs' / 'default.py'
).model.to_dict()
_SIZE = (8, 12)
_SMALL = {
    'encoder.width': 8,
    'encoder.depth': 1,
    'encoder.mlp_dim': 12,
    'encoder.architecture': (
        'dinov2(width=8, depth=1, num_heads=2, mlp_dim=12, patch_size=4)'
    ),
    'decoder.width': 8,
    'decoder.depth': 1,
    'decoder.mlp_dim': 12,
    'decoder.mae.input_width': 8,
    'quantizer.fsq.levels': (8, 5, 4),
}
_PRETRAINED = {'encoder.name': 'pretrained'}
_MAE = {'decoder.name': 'mae'}
# Latents are quantized as they are.
_NONE = {
    'projector_in.name': 'none',
    'projector_out.name': 'none',
    'quantizer.fsq.levels': (5,) * 8,
}
_STATISTICS = {'latent_statistics': 'a file that only a new run reads'}


def _build(*overrides, size=_SIZE):
  config = ml_collections.ConfigDict(_CONFIG)
  for fields in (_SMALL, *overrides):
    config.update_from_flattened_dict(fields)
  return models.build_autoencoder(config, size)


def _images():
  images = np.random.default_rng(0).uniform(-1, 1, (2, *_SIZE, 3))
  return jnp.asarray(images, jnp.float32)


def _init(model):
  """Variables, with statistics that are far from 0 and 1."""
  variables = jax.jit(model.init)(jax.random.key(0), _images())
  rng = np.random.default_rng(1)
  statistics = variables.get('constants', {}).get('statistics', {})
  for name, (low, high) in {'mean': (-3, 3), 'variance': (0, 4)}.items():
    if statistics:
      draw = rng.uniform(low, high, statistics[name].shape)
      statistics[name] = jnp.asarray(draw, jnp.float32)
  return variables


def _encode(model, variables):
  """What projector_in returns in training, and what the encoder does."""
  def run(variables):
    return model.apply(
        variables,
        _images(),
        train=True,
        rngs={'quantizer': jax.random.key(3)},
        capture_intermediates=True,
        mutable='intermediates',
    )

  output, captured = jax.jit(run)(variables)
  z = captured['intermediates']['projector_in']['__call__'][0]
  return np.float64(z), np.float64(output.latents)


def _statistics(variables):
  """Mean and deviation in float64."""
  values = variables['constants']['statistics']
  mean, variance = (np.float64(values[x]) for x in ('mean', 'variance'))
  return mean, np.sqrt(variance + 1e-5)


@pytest.mark.slow
def test_latents_are_normalized_by_statistics_of_their_own():
  model = _build(_NONE, _STATISTICS)
  variables = _init(model)
  mean, deviation = _statistics(variables)
  assert mean.shape == (2, 3, 8)
  z, latents = _encode(model, variables)
  np.testing.assert_allclose(z, (latents - mean) / deviation, rtol=1e-4)
  # And back: a latent that is 0 is the mean, for the decoder.
  codes = np.random.default_rng(2).uniform(-2, 2, (2, 2, 3, 8))
  codes = jnp.asarray(codes, jnp.float32)
  decoder = {'params': variables['params']['decoder']}
  images, expected = jax.jit(lambda codes, latents: (
      model.apply(variables, codes, method='decode'),
      model.decoder.apply(decoder, latents),
  ))(codes, jnp.asarray(codes * deviation + mean, jnp.float32))
  np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_noise_comes_before_normalization():
  variables = _init(_build(_NONE, _STATISTICS))
  mean, deviation = _statistics(variables)
  noise = {'latent_noise': 0.7}
  noisy, latents = _encode(_build(_NONE, noise), variables)
  assert np.abs(noisy - latents).max() > 0.3
  barely, _ = _encode(_build(_NONE, {'latent_noise': 1e-5}), variables)
  np.testing.assert_allclose(barely, latents, atol=1e-4)
  z, same_latents = _encode(_build(_NONE, noise, _STATISTICS), variables)
  np.testing.assert_allclose(z, (noisy - mean) / deviation, rtol=1e-4)
  # What the loss compares with the teacher's is without.
  np.testing.assert_array_equal(same_latents, latents)


def test_variance_of_zero_keeps_latents_finite():
  statistics = models.LatentStatistics(grid_size=(1, 2), width=3)
  variables = {'constants': {
      'mean': jnp.full((1, 2, 3), 2.0), 'variance': jnp.zeros((1, 2, 3)),
  }}
  latents = jnp.full((1, 1, 2, 3), 2.1)
  z = statistics.apply(variables, latents, method='normalize')
  # The epsilon of RAE.
  np.testing.assert_allclose(z, 0.1 / np.sqrt(1e-5), rtol=1e-5)
  back = statistics.apply(variables, z, method='denormalize')
  np.testing.assert_allclose(back, latents, rtol=1e-6)


class _Identity(nn.Module):
  """A quantizer that changes nothing."""

  @nn.compact
  def __call__(self, z, *, train=False):
    indices = jnp.zeros(z.shape[:-1], jnp.int32)
    return quantizers.QuantizerOutput(z, jnp.zeros(()), indices)


@pytest.mark.slow
def test_normalization_is_undone_where_nothing_is_quantized():
  plain, normalizing = (
      _build(_NONE, fields).clone(quantizer=_Identity())
      for fields in ({}, _STATISTICS)
  )
  variables = _init(normalizing)
  expected, images = jax.jit(lambda variables: tuple(
      model.apply(variables, _images()).reconstructions
      for model in (plain, normalizing)
  ))(variables)
  assert np.std(expected) > 0.01
  np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-6)


def test_statistics_are_no_parameters():
  plain, normalizing = (
      jax.eval_shape(_build(fields).init, jax.random.key(0), _images())
      for fields in ({}, _STATISTICS)
  )
  assert plain['params'] == normalizing['params']
  assert normalizing['constants'].keys() == {'statistics'}


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({**_STATISTICS, 'decoder.width': 12}, 'of 8 channels.* of 12; make'),
        (
            {**_STATISTICS, **_MAE, 'decoder.mae.input_width': 9},
            r'of 9; make them equal .*decoder\.mae\.input_width',
        ),
        (
            {'decoder.patch_size': 2},
            r"encoder makes \(2, 3\) latents and model.decoder 'vit' takes"
            r' \(4, 6\), one for 2 x 2 pixels .*decoder .mae., which resizes',
        ),
        (
            {**_PRETRAINED, 'encoder.image_size': (16, 24)},
            r'makes \(4, 6\) latents .* takes \(2, 3\)',
        ),
        (
            {**_PRETRAINED, **_MAE, 'encoder.image_size': (16, 24)},
            r'image_size is \(8, 12\), .* images of \(16, 24\) pixels: \(4, 6',
        ),
        (
            {**_PRETRAINED, 'encoder.image_size': (3, 12)},
            r'image_size is \(3, 12\) .* one patch, which has 4 pixels',
        ),
        (
            {**_PRETRAINED, 'encoder.architecture': 'dinov2_B/15'},
            r"^model.encoder: .*'dinov2_B/15' is invalid .*'dinov2_B/14'",
        ),
        ({**_PRETRAINED, 'projector_in.name': 'none'}, '8 channels .* 3 of'),
    ],
)
def test_parts_that_do_not_fit_are_refused(overrides, message):
  with pytest.raises(ValueError, match=message):
    _build(overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('fields', 'grid'),
    [
        pytest.param(
            {**_MAE, 'decoder.mae.grid_size': (2, 3)}, (3, 5),
            marks=pytest.mark.slow,
        ),
        ({'decoder.patch_size': 2}, (4, 6)),
    ],
    ids=['mae', 'vit'],
)
def test_an_encoder_may_see_images_of_another_size(fields, grid):
  # Of a grid of its own; a patch that is not full is cut off.
  size = (4 * grid[0] + 1, 4 * grid[1] + 3)
  model = _build(_PRETRAINED, {'encoder.image_size': size}, fields)
  assert model.encoder.image_size == size
  variables = _init(model)
  output = jax.jit(model.apply)(variables, _images())
  assert output.latents.shape == (2, *grid, 8)
  assert output.indices.shape == (2, *grid)
  assert output.reconstructions.shape == (2, *_SIZE, 3)


def test_an_encoder_takes_the_size_of_the_data_by_default():
  model = _build(_PRETRAINED)
  assert model.encoder.image_size == _SIZE
  assert not model.encoder.final_affine
  variables = jax.eval_shape(model.init, jax.random.key(0), _images())
  assert variables['params']['encoder']['positions'].shape == (2, 3, 8)
