"""The MAE decoder against NumPy, its sizes, and how configs build it."""

import math
import pathlib

import chex
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.configuration import schema
from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import mae_decoder
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step

_DEBUG = pathlib.Path(__file__).parents[3] / 'configs' / 'debug.py'
# No two sizes are equal, so that no two axes can be mixed up.
_GRID = (2, 3)
_PATCH = 4
_INPUT = 5
_WIDTH = 16


def _decoder(normalization='none', grid=_GRID, **fields):
  architecture = architectures.build_architecture(
      'mae', width=_WIDTH, depth=2, num_heads=2, mlp_dim=20, patch_size=_PATCH,
      **mae_decoder.NORMALIZATIONS[normalization],
  )
  return mae_decoder.MaeDecoder(architecture, _INPUT, grid, **fields)


def _latents(grid=_GRID):
  rng = np.random.default_rng(0)
  return rng.standard_normal((2, *grid, _INPUT)).astype(np.float32)


def _init(module, inputs):
  """Variables none of which is at its initial value, without compiling."""
  rng = np.random.default_rng(1)

  def draw(path, x):
    around = 1.0 if path[-1].key == 'scale' else 0.0
    return np.asarray(around + rng.uniform(-0.4, 0.4, x.shape), x.dtype)

  shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def _apply(module, variables, latents, method='__call__'):
  apply = jax.jit(module.apply, static_argnames='method')
  return np.asarray(apply(variables, latents, method=method))


def _norm(x, p):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + 1e-12) * p['scale'] + p['bias']


def _dense(x, p):
  return x @ p['kernel'] + p['bias']


def _block(x, p, num_heads=2):
  """A block on the [N, C] tokens of one image, in float64."""
  d = x.shape[-1] // num_heads
  y = _norm(x, p['attention_norm'])
  q, k, v = (_dense(y, p['attention'][n]) for n in ('query', 'key', 'value'))
  mixed = np.zeros_like(x)
  for head in range(num_heads):
    part = slice(head * d, (head + 1) * d)
    weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(d))
    weights /= weights.sum(-1, keepdims=True)
    mixed[:, part] = weights @ v[:, part]
  x = x + _dense(mixed, p['attention']['out'])
  hidden = _dense(_norm(x, p['mlp_norm']), p['mlp']['in'])
  hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
  return x + _dense(hidden, p['mlp']['out'])


def _resize(grid, size):
  """PyTorch's bilinear interpolation, align_corners=False, value by value."""
  height, width, channels = grid.shape
  resized = np.zeros((*size, channels))
  for i in range(size[0]):
    for j in range(size[1]):
      y = max((i + 0.5) * height / size[0] - 0.5, 0)
      x = max((j + 0.5) * width / size[1] - 0.5, 0)
      top, left = math.floor(y), math.floor(x)
      bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
      dy, dx = y - top, x - left
      resized[i, j] = (
          (1 - dy) * (1 - dx) * grid[top, left]
          + (1 - dy) * dx * grid[top, right]
          + dy * (1 - dx) * grid[bottom, left]
          + dy * dx * grid[bottom, right]
      )
  return resized


def _images(latents, variables, mean, std):
  """The decoder, image by image, in float64."""
  params, constants = (
      jax.tree.map(np.float64, variables[c]) for c in ('params', 'constants')
  )
  images = np.zeros((len(latents), _GRID[0] * _PATCH, _GRID[1] * _PATCH, 3))
  for image, grid in zip(images, np.float64(latents), strict=True):
    x = _resize(_dense(grid, params['embed']), _GRID) + constants['positions']
    token = params['class_token'] + constants['class_position']
    x = np.concatenate([token[None], x.reshape(-1, _WIDTH)])
    for i in range(2):
      x = _block(x, jax.tree.map(lambda p, i=i: p[i], params['blocks']))
    pixels = _dense(_norm(x, params['norm']), params['pixels'])
    for row in range(_GRID[0] * _PATCH):
      for column in range(_GRID[1] * _PATCH):
        patch = row // _PATCH * _GRID[1] + column // _PATCH
        first = 3 * (row % _PATCH * _PATCH + column % _PATCH)
        # Pixels in [0, 1], and from there to [-1, 1].
        pixel = pixels[1 + patch, first:first + 3] * std + mean
        image[row, column] = 2 * pixel - 1
  return images


@pytest.mark.parametrize(
    'grid',
    [
        (5, 7),
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in (_GRID, (3, 2), (1, 1))
        ),
    ],
)
@pytest.mark.parametrize(
    ('normalization', 'mean', 'std'),
    [
        ('none', (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ('dinov2', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_images_are_those_of_numpy(grid, normalization, mean, std):
  decoder = _decoder(normalization)
  latents = _latents(grid)
  variables = _init(decoder, latents)
  images = _apply(decoder, variables, latents)
  assert images.dtype == np.float32
  np.testing.assert_allclose(
      images, _images(latents, variables, mean, std), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
    ('preset', 'size', 'num_parameters'),
    [
        ('B', (768, 12, 12, 3072), 86_237_952),
        ('L', (1024, 24, 16, 4096), 303_887_104),
        ('XL', (1152, 28, 16, 4096), 415_056_640),
    ],
)
def test_presets_have_as_many_parameters_as_published(
    preset, size, num_parameters
):
  fields = mae_decoder.PRESETS[preset]
  names = ('width', 'depth', 'num_heads', 'mlp_dim')
  assert tuple(fields[name] for name in names) == size
  decoder = mae_decoder.MaeDecoder(
      architectures.build_architecture('mae', patch_size=16, **fields),
      input_width=768, grid_size=(14, 14),
  )
  latents = jax.ShapeDtypeStruct((1, 14, 14, 768), jnp.float32)
  variables = jax.eval_shape(decoder.init, jax.random.key(0), latents)
  sizes = [x.size for x in jax.tree.leaves(variables['params'])]
  assert sum(sizes) == num_parameters
  assert mae_decoder.PRESETS.keys() == {'B', 'L', 'XL'}


@pytest.mark.slow
def test_it_starts_with_fixed_positions_and_a_small_class_token():
  architecture = architectures.build_architecture(
      'mae', width=8, depth=1, num_heads=2, mlp_dim=8, patch_size=_PATCH
  )
  decoder = mae_decoder.MaeDecoder(architecture, _INPUT, (2, 2))
  variables = jax.jit(decoder.init)(jax.random.key(0), _latents((2, 2)))
  at_0, at_1 = [0, 0, 1, 1], [0.841471, 0.01, 0.540302, 0.99995]
  # [row, column]; the column's half comes first.
  expected = [[at_0 + at_0, at_1 + at_0], [at_0 + at_1, at_1 + at_1]]
  positions = variables['constants']['positions']
  np.testing.assert_allclose(positions, expected, atol=1e-6)
  assert not np.any(variables['constants']['class_position'])
  # At zeros the first LayerNorm's slope would be 1e6.
  assert 0.003 < np.std(variables['params']['class_token']) < 0.06
  # The images start near mid-grey.
  images = _apply(decoder, variables, _latents((2, 2)))
  assert 0 < np.std(images) < 0.2


@pytest.mark.slow
@pytest.mark.slow
def test_every_parameter_has_a_gradient():
  decoder = _decoder()
  latents = _latents((4, 5))
  variables = _init(decoder, latents)

  @jax.jit
  def gradients(params):
    return jax.grad(
        lambda params: jnp.mean(
            decoder.apply({**variables, 'params': params}, latents) ** 2
        )
    )(params)

  grads = gradients(variables['params'])
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    # The softmax does not see what all keys have in common.
    if name != 'blocks/attention/key/bias':
      # Of parameters stacked over blocks, those of every block.
      stacked = grad if name.startswith('blocks/') else grad[None]
      assert all(np.abs(x).max() > 1e-6 for x in stacked), name


@pytest.mark.slow
def test_compiling_remat_and_unrolling_change_no_result():
  decoder = _decoder()
  latents = _latents()
  variables = _init(decoder, latents)
  expected = decoder.apply(variables, latents)
  for fields in ({}, {'remat': 'dots'}, {'scan_unroll': 2}):
    images = _apply(decoder.clone(**fields), variables, latents)
    np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_is_inside():
  decoder = _decoder()
  latents = _latents((4, 5))
  variables = _init(decoder, latents)
  expected = _apply(decoder, variables, latents)
  rounded = decoder.clone(dtype=jnp.bfloat16)
  shapes = jax.eval_shape(rounded.init, jax.random.key(0), latents)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {np.dtype('float32')}
  images = _apply(rounded, variables, latents)
  assert images.dtype == np.float32
  error = np.abs(images - expected).max() / np.abs(expected).max()
  assert 1e-4 < error < 3e-2


def test_latents_of_another_width_are_refused():
  decoder = _decoder()
  variables = _init(decoder, _latents())
  with pytest.raises(ValueError, match='latents of 5 channels, not 4'):
    decoder.apply(variables, _latents()[..., :4])


# What configs make of it.


def _config(**fields):
  """The debug config with an MAE decoder of 2 x 2 tokens for 4 x 4 latents."""
  config = configuration.load_config(_DEBUG)
  config.model.decoder.name = 'mae'
  config.update_from_flattened_dict({
      'model.decoder.patch_size': 8,
      'model.decoder.depth': 2,
      'model.decoder.mae.grid_size': (2, 2),
      'model.decoder.mae.input_width': 12,
      **{name.replace('__', '.'): value for name, value in fields.items()},
  })
  return config


def _build(config):
  return models.build_autoencoder(config.model, config.data.image_size)


def test_every_field_is_read():
  decoder = _build(_config(
      model__decoder__width=24, model__decoder__num_heads=3,
      model__decoder__mlp_dim=20, model__decoder__mae__normalization='dinov2',
      model__dtype='bfloat16', model__remat='blocks', model__scan_unroll=3,
  )).decoder
  assert decoder == mae_decoder.MaeDecoder(
      architecture=architectures.build_architecture(
          'mae', width=24, depth=2, num_heads=3, mlp_dim=20, patch_size=8
      ),
      input_width=12, grid_size=(2, 2), dtype=jnp.dtype('bfloat16'),
      remat='blocks', scan_unroll=3,
  )
  assert decoder.architecture.mean == (0.485, 0.456, 0.406)
  for name, fields in mae_decoder.PRESETS.items():
    config = _config(model__decoder__mae__preset=name)
    arch = _build(config).decoder.architecture
    assert {field: getattr(arch, field) for field in fields} == fields
    assert arch.patch_size == 8


def test_by_default_the_grid_is_the_encoders():
  config = configuration.load_config(_DEBUG)
  config.model.decoder.name = 'mae'
  config.data.image_size = (16, 24)
  configuration.check_config(config)
  decoder = _build(config).decoder
  assert decoder.grid_size == (4, 6)
  assert decoder.input_width == config.model.encoder.width
  assert decoder.architecture.mean == decoder.architecture.std == (0.5,) * 3


def test_names_are_those_of_the_rules():
  for field, names in (
      ('preset', {'none', *mae_decoder.PRESETS}),
      ('normalization', set(mae_decoder.NORMALIZATIONS)),
  ):
    rule = schema.FIELDS[f'model.decoder.mae.{field}'].rule
    assert rule.allowed == f'one of {sorted(names)}'


@pytest.mark.slow
@pytest.mark.slow
def test_decoding_the_indices_equals_the_forward_pass():
  config = _config(
      data__image_size=(16, 24), model__decoder__mae__grid_size=(2, 3)
  )
  configuration.check_config(config)
  model = _build(config)
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
  variables = _init(model, images)
  output = jax.jit(model.apply)(variables, images)
  chex.assert_shape(output.reconstructions, images.shape)
  chex.assert_shape(output.indices, (2, 4, 6))
  assert len(np.unique(output.indices)) > 3
  indices = _apply(model, variables, images, 'encode_to_indices')
  np.testing.assert_array_equal(indices, output.indices)
  np.testing.assert_array_equal(
      _apply(model, variables, indices, 'decode_from_indices'),
      output.reconstructions,
  )


@pytest.mark.slow
def test_training_moves_every_parameter_and_no_constant():
  config = _config(model__decoder__mae__normalization='dinov3')
  model = _build(config)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  before = builder.create()
  step = jax.jit(train_step.build_train_step(model, optimizer, config))
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
  state, scalars = step(before, images)
  assert np.isfinite(scalars['loss'])
  state, _ = step(state, images)

  def moved(x, y):
    return bool(np.any(np.asarray(x) != np.asarray(y)))

  params = jax.tree.map(moved, before.params, state.params)
  assert all(jax.tree.leaves(params)), params
  constants = jax.tree.map(moved, before.model_state, state.model_state)
  assert constants == {
      'constants': {
          'decoder': {'class_position': False, 'positions': False}
      }
  }


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (
            {'model__decoder__mae__grid_size': ()},
            r'image_size is \(16, 16\), .* images of \(32, 32\) pixels',
        ),
        (
            {'model__decoder__mae__grid_size': (2, 3)},
            r'image_size is \(16, 16\), .* images of \(16, 24\) pixels',
        ),
        (
            {'model__decoder__patch_size': 4},
            r'image_size is \(16, 16\), .* images of \(8, 8\) pixels',
        ),
        ({'model__decoder__mae__preset': 'S'}, r"'S'; .*'B', 'L', 'XL', 'no"),
        ({'model__decoder__mae__normalization': 'vgg'}, "'vgg'; .*'dinov2'"),
        ({'model__decoder__width': 18}, 'width .*18.* multiple of 4'),
        ({'model__decoder__num_heads': 3}, 'multiple of'),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
  config = _config(**fields)
  with pytest.raises(ValueError, match=message):
    _build(config)
  with pytest.raises(ValueError, match=message):
    configuration.check_config(config)
