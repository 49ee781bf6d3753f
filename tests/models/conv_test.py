"""MaskGIT's convolutional autoencoder: NumPy, published sizes, any image."""

import pathlib

import chex
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.models import conv

_CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'default.py'
_CONV = {
    'model.encoder.name': 'conv',
    'model.decoder.name': 'conv',
    'model.projector_in.name': 'none',
    'model.projector_out.name': 'none',
    'model.encoder.conv.latent_width': 0,
}
_SMALL = {
    **_CONV,
    'data.image_size': (8, 12),
    'model.encoder.conv.filters': 32,
    'model.encoder.conv.channel_multipliers': (1, 1, 2),
    'model.encoder.conv.num_res_blocks': 1,
}
# One level more blocks and other channels than the other; two are unequal.
_FIELDS = {
    'filters': 32,
    'channel_multipliers': (1, 2),
    'num_res_blocks': 2,
    'latent_width': 5,
    'grid_size': (2, 3),
}
# Sizes of MaskGIT's VQGAN, its codebook apart, with codes of 256 channels and
# of FSQ's four: 23.78 and 30.48, 23.65 and 29.32 million.
_PUBLISHED = {256: (23_775_104, 30_478_339), 4: (23_645_828, 29_317_123)}


def _config(overrides):
  config = configuration.load_config(_CONFIG)
  config.update_from_flattened_dict(overrides)
  return config


def _build(overrides=None):
  config = _config({**_SMALL, **(overrides or {})})
  return models.build_autoencoder(config.model, config.data.image_size)


def _images(size=(8, 12)):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.uniform(-1, 1, (2, *size, 3)), jnp.float32)


def _init(module, *inputs):
  """Variables none of which is at its initial value, without compiling."""
  rng = np.random.default_rng(1)

  def draw(path, x):
    if path[-1].key == 'kernel':
      return np.asarray(
          rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape), x.dtype
      )
    around = 1.0 if path[-1].key == 'scale' else 0.0
    return np.asarray(around + rng.uniform(-0.4, 0.4, x.shape), x.dtype)

  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def _count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


# An independent implementation, in float64, image by image.


def _conv(x, p):
  kernel = p['kernel']
  reach = len(kernel) // 2
  padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)))
  y = np.zeros((*x.shape[:2], kernel.shape[-1]))
  for row in range(x.shape[0]):
    for column in range(x.shape[1]):
      window = padded[row:row + len(kernel), column:column + len(kernel)]
      y[row, column] = np.tensordot(window, kernel, 3)
  return y + p.get('bias', 0)


def _norm_swish(x, p):
  y = np.zeros_like(x)
  size = x.shape[-1] // 32
  for first in range(0, x.shape[-1], size):
    part = slice(first, first + size)
    group = x[..., part]
    y[..., part] = (group - group.mean()) / np.sqrt(group.var() + 1e-6)
  y = y * p['scale'] + p['bias']
  return y / (1 + np.exp(-y))


def _block(x, p):
  y = _conv(_norm_swish(x, p['norm_0']), p['conv_0'])
  y = _conv(_norm_swish(y, p['norm_1']), p['conv_1'])
  # Of the branch, not of x.
  return y + (_conv(y, p['shortcut']) if 'shortcut' in p else x)


def _encode(image, p):
  x = _conv(image, p['input'])
  for name in ('level_0_block_0', 'level_0_block_1'):
    x = _block(x, p[name])
  x = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4
  for name in (
      'level_1_block_0', 'level_1_block_1', 'final_block_0', 'final_block_1'
  ):
    x = _block(x, p[name])
  return _conv(_norm_swish(x, p['norm']), p['latents'])


def _decode(latents, p):
  x = _conv(latents, p['input'])
  for name in (
      'first_block_0', 'first_block_1', 'level_1_block_0', 'level_1_block_1'
  ):
    x = _block(x, p[name])
  x = _conv(x.repeat(2, axis=0).repeat(2, axis=1), p['level_1_upsample'])
  for name in ('level_0_block_0', 'level_0_block_1'):
    x = _block(x, p[name])
  return _conv(_norm_swish(x, p['norm']), p['pixels'])


@pytest.mark.slow
@pytest.mark.parametrize('part', ['encoder', 'decoder'])
def test_parts_are_those_of_numpy(part):
  if part == 'encoder':
    module, reference = conv.ConvEncoder(**_FIELDS), _encode
    # One image has so little contrast that the epsilon of GroupNorm counts.
    x = _images((4, 6)) * jnp.asarray([1e-3, 1])[:, None, None, None]
  else:
    module, reference = conv.ConvDecoder(**_FIELDS), _decode
    x = jax.random.normal(jax.random.key(0), (2, 2, 3, 5))
  variables = _init(module, x)
  p = jax.tree.map(np.float64, variables['params'])
  y = jax.jit(module.apply)(variables, x)
  assert y.dtype == jnp.float32
  expected = np.stack([reference(np.float64(image), p) for image in x])
  np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('part', ['encoder', 'decoder'])
def test_what_is_beyond_the_size_changes_nothing(part):
  if part == 'encoder':
    module, reference = conv.ConvEncoder(**_FIELDS), _encode
    x, size, result = _images((10, 14)), (4, 6), (2, 3)
  else:
    module, reference = conv.ConvDecoder(**_FIELDS), _decode
    x, size, result = jax.random.normal(jax.random.key(0), (2, 5, 7, 5)), (
        2, 3), (4, 6)
  variables = _init(module, x)
  p = jax.tree.map(np.float64, variables['params'])
  inside = x[:, : size[0], : size[1]]
  # Not as filling is, but as it would show.
  x = jnp.full_like(x, np.nan).at[:, : size[0], : size[1]].set(inside)
  y = jax.jit(module.apply)(variables, x, size=np.array(size, np.int32))
  expected = np.stack([reference(np.float64(image), p) for image in inside])
  rows, columns = result
  np.testing.assert_allclose(
      y[:, :rows, :columns], expected, rtol=2e-5, atol=2e-5
  )
  if part == 'decoder':
    assert not np.any(y[:, rows:])
    assert not np.any(y[:, :, columns:])


@pytest.mark.parametrize(
    ('quantizer', 'code_dim'),
    [({'name': 'vq', 'vq.code_dim': 256}, 256),
     ({'name': 'fsq', 'fsq.levels': (8, 5, 5, 5)}, 4)],
    ids=['vq', 'fsq'],
)
def test_numbers_of_parameters_are_those_published(quantizer, code_dim):
  config = _config({
      **_CONV,
      'data.image_size': (256, 256),
      **{f'model.quantizer.{name}': x for name, x in quantizer.items()},
  })
  model = models.build_autoencoder(config.model, config.data.image_size)
  images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
  output, variables = jax.eval_shape(
      lambda x: model.init_with_output(jax.random.key(0), x), images
  )
  assert output.indices.shape == (1, 16, 16)
  assert output.latents.shape == (1, 16, 16, code_dim)
  # Nothing trains but these two; VQ's codes, moved by averages, are apart.
  assert variables['params'].keys() == {'encoder', 'decoder'}
  sizes = tuple(
      _count(variables['params'][x]) for x in ('encoder', 'decoder')
  )
  assert sizes == _PUBLISHED[code_dim]


@pytest.mark.fast_variants('size1')
@pytest.mark.parametrize('size', [(4, 4), (8, 12), (20, 4)])
def test_images_have_any_size_that_the_stride_divides(size):
  model = _build()
  variables = _init(model, _images())
  output = jax.eval_shape(model.apply, variables, _images(size))
  assert model.encoder.stride == model.decoder.stride == 4
  assert output.reconstructions.shape == (2, *size, 3)
  assert output.indices.shape == (2, size[0] // 4, size[1] // 4)
  for odd in ((size[0] + 2, size[1]), (size[0], size[1] + 1)):
    with pytest.raises(ValueError, match=f'{odd[0]} x {odd[1]} pixels.* of 4'):
      jax.eval_shape(model.apply, variables, _images(odd))


def test_the_decoder_refuses_other_latents():
  decoder = conv.ConvDecoder(**_FIELDS)
  with pytest.raises(ValueError, match='have 4 channels, the decoder needs 5'):
    jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 2, 3, 4)))


@pytest.mark.slow
def test_decoding_the_indices_equals_the_forward_pass():
  model = _build()
  images = _images()
  variables = _init(model, images)
  output = jax.jit(model.apply)(variables, images)
  assert len(np.unique(output.indices)) > 3
  decode = jax.jit(lambda v, x: model.apply(v, x, method='decode_from_indices'))
  np.testing.assert_array_equal(
      decode(variables, output.indices), output.reconstructions
  )


def _gradients(model, variables, images):
  def loss(params):
    output = model.apply({'params': params}, images, train=True)
    return jnp.mean(jnp.square(output.reconstructions - images))

  return jax.jit(jax.value_and_grad(loss))(variables['params'])


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['blocks', 'dots'])
def test_every_parameter_has_a_gradient_and_remat_changes_none(remat):
  levels = {'model.encoder.conv.channel_multipliers': (1, 2)}
  model = _build(levels)
  images = _images()
  variables = _init(model, images)
  expected = _gradients(model, variables, images)
  flat, _ = jax.tree_util.tree_flatten_with_path(expected[1])
  for path, gradient in flat:
    assert np.any(gradient != 0), jax.tree_util.keystr(path)
  other = _build({**levels, 'model.remat': remat})
  assert (other.encoder.remat, other.decoder.remat) == (remat, remat)
  chex.assert_trees_all_close(
      _gradients(other, variables, images), expected, rtol=1e-5, atol=1e-6
  )


@pytest.mark.slow
def test_remat_keeps_less_for_the_backward_pass():
  def num_kept(remat):
    model = _build({'model.remat': remat})
    variables = jax.eval_shape(model.init, jax.random.key(0), _images())
    kept = jax.eval_shape(
        lambda v, x: jax.vjp(lambda v: model.apply(v, x), v)[1],
        variables, _images(),
    )
    return sum(x.size for x in jax.tree.leaves(kept))

  assert num_kept('blocks') < 0.7 * num_kept('none')


@pytest.mark.parametrize('part', ['encoder', 'decoder'])
@pytest.mark.slow
def test_bfloat16_is_inside(part):
  exact, module = (
      getattr(_build({'model.dtype': x}), part) for x in ('float32', 'bfloat16')
  )
  x = _images()
  if part == 'decoder':
    x = jax.random.normal(jax.random.key(0), (2, 2, 3, 3))
  variables = _init(module, x)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype('float32')}
  expected, y = (jax.jit(m.apply)(variables, x) for m in (exact, module))
  assert y.dtype == expected.dtype == jnp.float32
  error = np.sqrt(np.mean(np.square(y - expected)) / np.mean(expected**2))
  assert 1e-4 < error < 0.03
  # What comes last is not rounded to eight bits of mantissa.
  assert np.any(y != y.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'data.image_size': (8, 10)}, r'\(8, 10\), which does not halve 2 ti'),
        ({'model.encoder.conv.filters': 48}, r'levels of \[48, 48, 96\] chann'),
        (
            {'model.decoder.conv.channel_multipliers': (1, 2)},
            r"\(2, 3\) latents and model.decoder 'conv' takes \(4, 6\), one for"
            ' 2 x 2 pixels .* model.decoder.conv.channel_multipliers',
        ),
        (
            {'model.decoder.name': 'vit', 'model.decoder.patch_size': 2},
            r"'vit' takes \(4, 6\), one for 2 x 2 .* model.decoder.patch_size",
        ),
        (
            {'model.encoder.conv.latent_width': 7},
            'projector_in.name is .none. with 7 channels .*latent_width=0',
        ),
        (
            {'model.decoder.conv.latent_width': 7},
            'projector_out.name is .none. with 3 channels .*latent_width=0',
        ),
    ],
    ids=lambda x: '-'.join(x) if isinstance(x, dict) else '',
)
def test_parts_that_do_not_fit_are_named(overrides, message):
  with pytest.raises(ValueError, match=message):
    _build(overrides)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'data.image_size': (16, 18)}, 'which does not halve 2 times'),
        ({'model.encoder.conv.filters': 48}, 'use multiples of 32'),
        (
            {'model.projector_in.name': 'linear'},
            "latent_width >= 1, unless projector_in is 'none'",
        ),
        (
            {'model.projector_out.name': 'mlp'},
            "latent_width >= 1, unless projector_out is 'none'",
        ),
        (
            {'model.encoder.conv.channel_multipliers': ()},
            'a tuple of at least one integer',
        ),
    ],
    ids=lambda x: '-'.join(x) if isinstance(x, dict) else '',
)
def test_configs_are_checked_before_anything_is_built(overrides, message):
  good = _config({**_SMALL, 'data.image_size': (16, 12)})
  configuration.check_config(good)
  good.update_from_flattened_dict(overrides)
  with pytest.raises(ValueError, match=message):
    configuration.check_config(good)


@pytest.mark.parametrize(
    'overrides',
    [
        {'model.decoder.name': 'vit'},
        {'model.encoder.name': 'vit', 'model.projector_in.name': 'linear'},
        {
            'model.decoder.name': 'mae',
            'model.decoder.mae.grid_size': (4, 6),
            'model.decoder.patch_size': 2,
        },
        {
            'model.encoder.conv.latent_width': 16,
            'model.projector_in.name': 'standardized',
            'model.projector_out.name': 'levels',
        },
    ],
    ids=['to_vit', 'from_vit', 'to_mae', 'projectors'],
)
def test_conv_goes_with_all_the_others(overrides):
  if overrides.get('model.decoder.name') in ('vit', 'mae'):
    overrides = {**overrides, 'model.projector_out.name': 'linear'}
  model = _build(overrides)
  output, _ = jax.eval_shape(
      lambda x: model.init_with_output(jax.random.key(0), x), _images()
  )
  assert output.reconstructions.shape == (2, 8, 12, 3)
  assert output.indices.shape == (2, 2, 3)
