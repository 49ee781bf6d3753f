"""Autoencoders: one encode and one decode path, sizes, errors, precision."""

import functools
import json
import math
import pathlib
import re

import chex
import jax
from jax import numpy as jnp
import ml_collections
import numpy as np
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.models import builder
from fsq_jax.models import vit

_CONFIG = configuration.load_config(
    pathlib.Path(__file__).parents[2] / 'configs' / 'default.py'
).model.to_dict()
# No two sizes are equal, so that no two axes can be mixed up.
_SIZE = (8, 12)
_GRID = (2, 3)
_SMALL = {
    'encoder.width': 8,
    'encoder.mlp_dim': 20,
    'decoder.width': 12,
    'decoder.mlp_dim': 28,
    'decoder.num_heads': 3,
    'decoder.depth': 1,
    'quantizer.fsq.levels': (8, 5, 4),
    'projector_in.mlp.width': 24,
    'projector_in.attention.width': 16,
    'projector_in.attention.depth': 2,
    'projector_in.attention.num_heads': 4,
    'projector_in.attention.mlp_dim': 18,
    'projector_out.fourier.num_frequencies': 10,
}
# Codes, latents and the decoder have 8 channels, as 'none' wants.
_EQUAL = {'decoder.width': 8, 'decoder.num_heads': 2}
_EIGHT_LEVELS = (4, 3, 3, 3, 2, 3, 3, 2)

_DTYPES = ('float32', 'bfloat16')
_VARIANTS = [
    *[
        (name, 'learned')
        for name in sorted(builder.PROJECTORS_IN)
        if name != 'none'
    ],
    *[('linear', name) for name in vit.POSITIONS if name != 'learned'],
]

every_variant = pytest.mark.parametrize(
    ('projector_in', 'position'), _VARIANTS
)
# The default, which a wrong edit breaks first; the rest are slow.
fast_variants = pytest.mark.parametrize(
    ('projector_in', 'position'),
    [
        pytest.param(
            *variant, marks=() if variant == _VARIANTS[1] else pytest.mark.slow
        )
        for variant in _VARIANTS
    ],
)


def _build(overrides=None, size=_SIZE):
  """A small model, with dotted names of fields that differ from it."""
  config = ml_collections.ConfigDict(_CONFIG)
  config.update_from_flattened_dict({**_SMALL, **(overrides or {})})
  return models.build_autoencoder(config, size)


def _build_variant(projector_in, position, **overrides):
  return _build({
      'projector_in.name': projector_in,
      'encoder.position': position,
      'decoder.position': position,
      **overrides,
  })


def _images(size=_SIZE, batch_size=2):
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (batch_size, *size, 3))
  return jnp.asarray(images, jnp.float32)


def _init(module, *inputs):
  """Variables none of which is at its initial value, without compiling."""
  rng = np.random.default_rng(1)

  def draw(path, x):
    around = 1.0 if path[-1].key in ('scale', 'var', 'gain') else 0.0
    return np.asarray(around + rng.uniform(-0.4, 0.4, x.shape), x.dtype)

  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def _compiled(module, method):
  """One program for all tests that call equal modules."""
  return jax.jit(lambda v, *x: module.apply(v, *x, method=method))


def _call(module, variables, *inputs, method='__call__'):
  return _compiled(module, method)(variables, *inputs)


def _flat(tree):
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
      for path, x in leaves
  }


@fast_variants
def test_decoding_the_indices_equals_the_forward_pass(projector_in, position):
  model = _build_variant(projector_in, position)
  images = _images()
  variables = _init(model, images)
  output = _call(model, variables, images)
  chex.assert_shape(output.reconstructions, images.shape)
  chex.assert_shape(output.indices, (2, *_GRID))
  chex.assert_shape(output.quantizer_loss, ())
  assert output.reconstructions.dtype == jnp.float32
  assert output.indices.dtype == jnp.int32
  assert len(np.unique(output.indices)) > 3

  indices = _call(model, variables, images, method='encode_to_indices')
  np.testing.assert_array_equal(indices, output.indices)
  np.testing.assert_array_equal(
      _call(model, variables, indices, method='decode_from_indices'),
      output.reconstructions,
  )


# Encoding knows one projector and decoding the other: each once is enough.
@pytest.mark.slow
@pytest.mark.parametrize(
    ('projector_in', 'projector_out'),
    zip(
        sorted(builder.PROJECTORS_IN), sorted(builder.PROJECTORS_OUT),
        strict=True,
    ),
)
def test_every_projector_decodes_its_indices(projector_in, projector_out):
  model = _build({
      **_EQUAL,
      'encoder.depth': 1,
      'projector_in.name': projector_in,
      'projector_out.name': projector_out,
      'quantizer.fsq.levels': _EIGHT_LEVELS,
  })
  images = _images()
  variables = _init(model, images)
  output = _call(model, variables, images)
  assert output.reconstructions.shape == images.shape
  assert len(np.unique(output.indices)) > 3
  there_and_back = jax.jit(
      lambda variables, images: model.apply(
          variables,
          model.apply(variables, images, method='encode_to_indices'),
          method='decode_from_indices',
      )
  )
  np.testing.assert_array_equal(
      there_and_back(variables, images), output.reconstructions
  )


@pytest.mark.slow
@pytest.mark.parametrize(
    ('quantizer', 'projector_out'),
    [
        ('residual_fsq', 'levels'),  # Several indices for a latent.
        ('vq', 'fourier'),
    ],
)
def test_projectors_decode_the_indices_of_other_quantizers(
    quantizer, projector_out
):
  model = _build({
      'encoder.depth': 1,
      'quantizer.name': quantizer,
      'quantizer.residual_fsq.levels': (5, 4),
      'quantizer.grouped_fsq.levels': (5, 4),
      'projector_out.name': projector_out,
  })
  images = _images()
  variables = jax.jit(model.init)(jax.random.key(0), images)
  output = _call(model, variables, images)
  assert len(np.unique(output.indices)) > 3
  np.testing.assert_array_equal(
      _call(model, variables, output.indices, method='decode_from_indices'),
      output.reconstructions,
  )


@pytest.mark.slow
def test_without_quantizer_latents_and_gradients_pass_as_they_are():
  model = _build({'quantizer.name': 'none'})
  images = _images()
  variables = _init(model, images)
  parts = {name: {'params': x} for name, x in variables['params'].items()}

  def by_hand(params):
    latents = model.encoder.apply({'params': params['encoder']}, images)
    z = model.projector_in.apply({'params': params['projector_in']}, latents)
    return z, model.apply(
        {'params': params},
        model.projector_out.apply({'params': params['projector_out']}, z),
        method=lambda module, x: module.decoder(x),
    )

  assert parts.keys() == {'encoder', 'projector_in', 'projector_out', 'decoder'}
  z, reconstructions = jax.jit(by_hand)(variables['params'])
  encoded = _call(model, variables, images, method='encode')
  np.testing.assert_array_equal(encoded.z_q, z)
  output = _call(model, variables, images)
  np.testing.assert_allclose(
      output.reconstructions, reconstructions, rtol=1e-5, atol=1e-6
  )
  assert output.quantizer_loss == 0

  def loss(forward):
    return lambda params: jnp.mean(jnp.square(forward(params) - images))

  gradients, expected = (
      jax.jit(jax.grad(loss(forward)))(variables['params'])
      for forward in (
          lambda params: model.apply({'params': params}, images)[0],
          lambda params: by_hand(params)[1],
      )
  )
  chex.assert_trees_all_close(gradients, expected, rtol=1e-5, atol=1e-7)
  assert np.abs(gradients['encoder']['patches']['kernel']).max() > 1e-4


def test_without_quantizer_there_are_no_tokens_to_decode():
  model = _build({'quantizer.name': 'none'})
  images = _images()
  variables = _init(model, images)
  indices = _call(model, variables, images, method='encode_to_indices')
  assert indices.dtype == jnp.int32
  assert indices.shape == (2, *_GRID, 0)
  with pytest.raises(ValueError, match=r"no tokens, .* such as 'fsq'"):
    _call(model, variables, indices, method='decode_from_indices')


@pytest.mark.slow
@pytest.mark.parametrize(
    'projector_out',
    ['fourier', 'levels', 'mlp'],
)
def test_the_unit_of_codes_does_not_matter(projector_out):
  # Codes -2 ... 2 and -1 ... 1, with other units in each channel.
  symmetric, paper = (
      _build({
          'projector_out.name': projector_out,
          'quantizer.fsq.levels': (7, 5, 3),
          'quantizer.fsq.convention': convention,
      })
      for convention in ('symmetric', 'preserve_symmetry')
  )
  variables = _init(symmetric, _images())
  digits = np.random.default_rng(3).integers(0, (7, 5, 3), (2, *_GRID, 3))
  expected, images = (
      _call(model, variables, model.quantizer.digits_to_codes(digits),
            method='decode')
      for model in (symmetric, paper)
  )
  np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_noise_on_latents_is_of_the_stated_size_and_in_training_only():
  plain, noisy = (_build({'latent_noise': tau}) for tau in (0.0, 0.8))
  images = _images(batch_size=200)
  variables = _init(plain, images)

  @functools.partial(jax.jit, static_argnames='train')
  def difference(key, train):
    # Of the latents that projector_in gets.
    def latents(model):
      return model.apply(
          variables,
          images,
          train=train,
          rngs={'quantizer': key},
          method='encode',
          capture_intermediates=True,
          mutable='intermediates',
      )[1]['intermediates']['projector_in']['norm']['__call__'][0]

    return latents(noisy) - latents(plain)

  assert np.all(difference(jax.random.key(0), train=False) == 0)
  first, again, other = (
      difference(jax.random.key(seed), train=True) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert np.all(first != other)
  latents = jnp.zeros((4000, 2, 3, 8))
  noise = jax.jit(
      lambda x: noisy.apply(
          variables, x, rngs={'quantizer': jax.random.key(0)},
          method='add_noise',
      )
  )(latents)
  # One size u for each image, uniform: E u^2 = 1/3.
  np.testing.assert_allclose(np.mean(noise), 0, atol=0.01)
  np.testing.assert_allclose(np.var(noise), 0.8**2 / 3, rtol=0.03)
  sizes = np.std(noise, axis=(1, 2, 3))
  np.testing.assert_allclose(sizes.mean(), 0.8 / 2, rtol=0.03)
  np.testing.assert_allclose(
      np.quantile(sizes, [0.25, 0.75]), [0.2, 0.6], rtol=0.06
  )


@pytest.mark.slow
def test_noise_on_latents_without_a_key_is_refused():
  model = _build({'latent_noise': 0.5})
  variables = _init(model, _images())
  with pytest.raises(ValueError, match=r"rngs=\{'quantizer': key\}"):
    model.apply(variables, _images(), train=True)


def test_tokens_of_another_dialect_are_not_decoded():
  model = _build()
  images = _images()
  variables = _init(model, images)
  indices = jnp.zeros((2, *_GRID), jnp.int32)

  def decode(spec):
    return jax.jit(
        lambda variables: model.apply(
            variables, indices, spec=spec, method='decode_from_indices'
        )
    )(variables)

  spec = model.quantizer.spec()
  np.testing.assert_array_equal(
      decode(json.loads(json.dumps(spec))), decode(None)
  )
  with pytest.raises(ValueError, match=r'levels: \[8, 4, 5\] -> \[8, 5, 4\]'):
    decode({**spec, 'levels': (8, 4, 5)})


@pytest.mark.slow
def test_encoding_and_decoding_codes_is_the_forward_pass():
  model = _build()
  images = _images()
  variables = _init(model, images)
  output = _call(model, variables, images)
  encoded = _call(model, variables, images, method='encode')
  np.testing.assert_array_equal(encoded.indices, output.indices)
  np.testing.assert_array_equal(
      encoded.z_q, model.quantizer.indices_to_codes(encoded.indices)
  )
  np.testing.assert_allclose(encoded.loss, output.quantizer_loss, rtol=1e-6)
  assert encoded.loss > 0
  np.testing.assert_array_equal(
      _call(model, variables, encoded.z_q, method='decode'),
      output.reconstructions,
  )


def test_decoder_sees_nothing_but_the_tokens():
  model = _build()
  images = _images()
  variables = _init(model, images)
  noise = np.random.default_rng(2).normal(0, 1e-3, images.shape)
  others = images + noise.astype(np.float32)
  encoder_variables = {'params': variables['params']['encoder']}
  latents, other_latents = (
      _call(model.encoder, encoder_variables, x) for x in (images, others)
  )
  assert np.all(latents != other_latents)
  output = _call(model, variables, images)
  other = _call(model, variables, others)
  np.testing.assert_array_equal(output.indices, other.indices)
  np.testing.assert_array_equal(output.reconstructions, other.reconstructions)


def test_every_token_reaches_every_patch_of_its_own_image():
  model = _build()
  variables = _init(model, _images())
  indices = jnp.zeros((2, *_GRID), jnp.int32)
  changed = indices.at[0, 1, 2].set(159)
  before, after = (
      _call(model, variables, x, method='decode_from_indices')
      for x in (indices, changed)
  )
  moved = np.abs(after - before).reshape(2, 2, 4, 3, 4, 3).max((2, 4, 5))
  assert np.all(moved[0] > 1e-4)
  assert np.all(moved[1] == 0)


@pytest.mark.slow
@fast_variants
def test_every_parameter_gets_a_gradient_through_the_codes(
    projector_in, position
):
  model = _build_variant(projector_in, position)
  images = _images()
  variables = _init(model, images)

  @jax.jit
  def gradients(params):
    def loss(params):
      output, _ = model.apply(
          {**variables, 'params': params},
          images,
          train=True,
          mutable=['batch_stats'],
      )
      return jnp.mean(jnp.square(output.reconstructions - images))

    return jax.grad(loss)(params)

  without = set()
  for path, gradient in _flat(gradients(variables['params'])).items():
    # Of parameters stacked over blocks, those of every block.
    stacked = gradient if '/blocks/' in path else gradient[None]
    without |= {
        f'{path}[{i}]' for i, x in enumerate(stacked) if np.abs(x).max() < 1e-6
    }
  # Standardised latents do not feel a constant that is added to all of them.
  assert without == {
      'standardized': {'encoder/transformer/blocks/mlp/out/bias[1]'},
  }.get(projector_in, set())


@pytest.mark.parametrize(
    'overrides',
    [{'remat': 'blocks'}, {'remat': 'dots'}, {'scan_unroll': 2}],
    ids=lambda overrides: '-'.join(map(str, *overrides.items())),
)
@pytest.mark.slow
def test_remat_and_unrolling_change_no_result(plain_results, overrides):
  model, images, variables, expected = plain_results
  other = _build({'encoder.depth': 3, **overrides})
  assert other.encoder != model.encoder
  chex.assert_trees_all_close(
      _loss_and_gradients(other, variables, images), expected,
      rtol=1e-5, atol=1e-6,
  )


@pytest.fixture(scope='module')
def plain_results():
  model = _build({'encoder.depth': 3})
  images = _images()
  variables = _init(model, images)
  return (
      model, images, variables, _loss_and_gradients(model, variables, images)
  )


def _loss_and_gradients(model, variables, images):
  def loss(params):
    output = model.apply({'params': params}, images)
    error = jnp.mean(jnp.square(output.reconstructions - images))
    return error + output.quantizer_loss, output

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])


def _num_operations(overrides, *, gradient=False):
  """Operations of the program that is given to the compiler."""
  model = _build(overrides)
  images = jax.ShapeDtypeStruct((2, *_SIZE, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)

  def loss(variables, images):
    return jnp.mean(model.apply(variables, images).reconstructions)

  function = jax.grad(loss) if gradient else loss
  return jax.jit(function).lower(variables, images).as_text().count(' = ')


@pytest.mark.slow
@pytest.mark.parametrize('gradient', [False, True])
def test_size_of_the_program_does_not_grow_with_depth(gradient):
  shallow, deep, unrolled = (
      _num_operations(
          {'encoder.depth': depth, 'decoder.depth': depth, 'scan_unroll': n},
          gradient=gradient,
      )
      for depth, n in ((2, 1), (12, 1), (12, 12))
  )
  assert shallow == deep
  assert unrolled > deep


@pytest.mark.slow
def test_remat_keeps_less_for_the_backward_pass():
  def num_kept(remat):
    model = _build({'remat': remat, 'encoder.depth': 4})
    variables = jax.eval_shape(model.init, jax.random.key(0), _images())

    def backward(variables, images):
      return jax.vjp(lambda v: model.apply(v, images), variables)[1]

    kept = jax.eval_shape(backward, variables, _images())
    return sum(x.size for x in jax.tree.leaves(kept))

  assert num_kept('blocks') < 0.7 * num_kept('dots')
  assert num_kept('dots') < 0.9 * num_kept('none')


@pytest.mark.parametrize(
    'part', ['encoder', pytest.param('decoder', marks=pytest.mark.slow)]
)
def test_bfloat16_is_inside_of_the_transformers(part):
  exact, model = (getattr(_build({'dtype': x}), part) for x in _DTYPES)
  x = _images()
  if part == 'decoder':
    x = jax.random.normal(jax.random.key(0), (2, *_GRID, 12))
  variables = _init(model, x)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype('float32')}
  expected, y = (_call(module, variables, x) for module in (exact, model))
  assert y.dtype == jnp.float32
  error = np.abs(y - expected).max() / np.abs(expected).max()
  assert 1e-3 < error < 2e-2


@pytest.mark.slow
def test_bfloat16_stays_outside_of_the_quantizer():
  model = _build({'dtype': 'bfloat16'})
  images = _images()
  variables = _init(model, images)
  encoded = _call(model, variables, images, method='encode')
  assert encoded.loss.dtype == jnp.float32
  assert np.all(encoded.indices >= 0)
  assert np.all(encoded.indices < 160)
  # Codes reach the decoder in float32 and give back their indices.
  assert encoded.z_q.dtype == jnp.float32
  np.testing.assert_array_equal(
      model.quantizer.codes_to_indices(encoded.z_q), encoded.indices
  )


@pytest.mark.fast_variants('linear-learned', 'attention-learned')
@every_variant
def test_number_of_parameters_has_a_closed_form(projector_in, position):
  model = _build_variant(projector_in, position)
  variables = jax.eval_shape(model.init, jax.random.key(0), _images())

  def transformer(c, depth, mlp_dim):
    attention = 3 * c * c + 3 * c + c * c + c
    mlp = 2 * c * mlp_dim + mlp_dim + c
    return depth * (attention + mlp + 4 * c)

  grid = math.prod(_GRID) if position == 'learned' else 0
  pixels, code_dim = 4 * 4 * 3, 3
  expected = {
      'encoder': (pixels + 1) * 8 + grid * 8 + transformer(8, 2, 20),
      'projector_in': {
          'linear': 2 * 8 + (8 + 1) * code_dim,
          'standardized': 8 * code_dim,
          'mlp': (
              2 * 8 + (8 + 1) * 24 + (24 + 1) * 24 + (24 + 1) * code_dim
              + code_dim
          ),
          'attention': (
              2 * 8 + (8 + 1) * 16 + transformer(16, 2, 18) + 2 * 16
              + (16 + 1) * code_dim + code_dim
          ),
      }[projector_in],
      'projector_out': (code_dim + 1) * 12,
      'decoder': grid * 12 + transformer(12, 1, 28) + (12 + 1) * pixels,
  }
  assert expected == {
      name: sum(x.size for x in jax.tree.leaves(part))
      for name, part in variables['params'].items()
  }


def test_image_with_nan_gives_no_token_and_leaves_the_others_alone():
  model = _build()
  images = _images()
  variables = _init(model, images)
  expected = _call(model, variables, images)
  output = _call(model, variables, images.at[0, 5, 7, 1].set(jnp.nan))
  assert np.all(output.indices[0] == -1)
  assert np.all(np.isnan(output.reconstructions[0]))
  np.testing.assert_array_equal(output.indices[1], expected.indices[1])
  np.testing.assert_array_equal(
      output.reconstructions[1], expected.reconstructions[1]
  )


@pytest.mark.slow
def test_sincos_takes_images_of_another_size():
  model = _build_variant('linear', 'sincos')
  variables = _init(model, _images())
  images = _images((16, 4))
  output = _call(model, variables, images)
  assert output.reconstructions.shape == images.shape
  assert output.indices.shape == (2, 4, 1)


@pytest.mark.parametrize('size', [(12, 8), (8, 8)])
def test_learned_positions_refuse_another_grid(size):
  model = _build_variant('linear', 'learned')
  variables = jax.eval_shape(model.init, jax.random.key(0), _images())
  with pytest.raises(ValueError, match=r'grid of \(2, 3\) tokens') as error:
    jax.eval_shape(model.apply, variables, _images(size))
  assert str((size[0] // 4, size[1] // 4)) in str(error.value)
  assert 'sincos' in str(error.value)


@pytest.mark.parametrize('size', [(8, 11), (9, 12), (3, 4)])
def test_images_that_cannot_be_cut_into_patches_are_refused(size):
  model = _build_variant('linear', 'sincos')
  with pytest.raises(ValueError, match='patches of 4 x 4') as error:
    jax.eval_shape(model.init, jax.random.key(0), _images(size))
  assert f'{size[0]} x {size[1]} pixels' in str(error.value)


def test_parts_that_cannot_be_built_are_named():
  failures = []
  for overrides, message in (
      ({'encoder.patch_size': 5}, r'\(8, 12\), which model.encoder.patch_s'),
      ({'decoder.patch_size': 8}, r'\(8, 12\), which model.decoder.patch_s'),
      ({'encoder.num_heads': 3}, 'encoder.width 8 is no multiple of num_he'),
      ({'decoder.num_heads': 5}, 'decoder.width 12 is no multiple of num_h'),
      (
          {'decoder.width': 6, 'decoder.position': 'sincos'},
          "position is 'sincos' with model.decoder.width 6; use a multiple",
      ),
      (
          {
              'projector_in.name': 'attention',
              'projector_in.attention.num_heads': 3,
          },
          'projector_in.attention.width 16 is no multiple of num_heads 3',
      ),
      ({'encoder.name': 'mlp'}, r"'mlp'; known: \['conv', 'pretrained', 'v"),
      ({'decoder.name': 'mlp'}, r"decoder.name is 'mlp'; known: .*'mae', 'v"),
      ({'projector_in.name': 'rope'}, r"known: \['attention', 'linear', 'm"),
      ({'projector_out.name': 'rope'}, r"'rope'; known: \['fourier', 'lev"),
      ({'projector_in.name': 'none'}, '8 channels of the encoder .* and 3'),
      ({'projector_out.name': 'none'}, '3 channels of a code .* and 12 of'),
      (
          {'projector_out.name': 'levels', 'quantizer.name': 'vq'},
          'codes of VectorQuantizer have no levels',
      ),
      (
          {'projector_out.name': 'levels', 'quantizer.name': 'simvq'},
          'codes of SimVQ have no levels',
      ),
      (
          {'projector_out.name': 'levels', 'quantizer.name': 'none'},
          'codes of NoQuantizer have no levels',
      ),
      ({'quantizer.name': 'mlp'}, r"quantizer.name is 'mlp'; known: .*'fsq"),
  ):
    try:
      _build(overrides)
      failures.append((overrides, 'no error'))
    except ValueError as error:
      if not re.search(message, str(error)):
        failures.append((overrides, str(error)))
  assert not failures
