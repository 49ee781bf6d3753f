"""The discriminator that sees through DINO, against NumPy; its weights."""

import dataclasses
import functools
import json
import math

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fsq_jax import adversarial
from fsq_jax.adversarial import dino_discriminator
from fsq_jax.models.pretrained import architectures
from fsq_jax.runtime import parameter_paths

_SIDE, _PATCH, _WIDTH, _HEADS = 16, 4, 12, 3
_TOKENS = (_SIDE // _PATCH) ** 2
_ARCHITECTURE = architectures.build_architecture(
    'dino', width=_WIDTH, depth=3, num_heads=_HEADS, mlp_dim=20,
    patch_size=_PATCH, activation='gelu_tanh',
)


def _module(**fields):
  defaults = {
      'architecture': _ARCHITECTURE, 'image_size': (_SIDE, _SIDE),
      'blocks': (0, 2), 'kernel_size': 5,
  }
  return dino_discriminator.DinoDiscriminator(**{**defaults, **fields})


def _images(num_images=2, size=(_SIDE, _SIDE)):
  images = np.random.default_rng(0).uniform(-1, 1, (num_images, *size, 3))
  return jnp.asarray(images, jnp.float32)


@functools.cache
def _variables():
  """Variables none of which is at its initial value, without compiling."""
  rng = np.random.default_rng(1)

  def draw(path, x):
    x = rng.uniform(-0.4, 0.4, x.shape) + (path[-1].key == 'scale')
    return jnp.asarray(x, jnp.float32)

  shapes = jax.eval_shape(_module().init, jax.random.key(0), _images())
  variables = jax.tree_util.tree_map_with_path(draw, shapes)
  # Estimates of singular values are above 0 by one iteration.
  _, updated = jax.jit(
      lambda v: _module().apply(
          v, _images(), train=True, mutable=['spectral_norm']
      )
  )(variables)
  return {**variables, **updated}


def _apply(variables, images, module=None):
  return jax.jit((module or _module()).apply)(variables, images)


def _norm(x, p, axis, epsilon=1e-6):
  mean = x.mean(axis, keepdims=True)
  variance = ((x - mean) ** 2).mean(axis, keepdims=True)
  return (x - mean) / np.sqrt(variance + epsilon) * p['scale'] + p['bias']


def _dense(x, p):
  return x @ p['kernel'] + p['bias']


def _gelu_tanh(x):
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return 0.5 * x * (1 + np.tanh(inner))


def _resized(image):
  """Bilinear between the centres of pixels, without antialias."""
  for axis in (0, 1):
    old = image.shape[axis]
    rows = []
    for i in range(_SIDE):
      place = min(max((i + 0.5) * old / _SIDE - 0.5, 0), old - 1)
      low = min(int(place), old - 2)
      below, above = (image.take(k, axis) for k in (low, low + 1))
      rows.append(below + (above - below) * (place - low))
    image = np.stack(rows, axis)
  return image


def _latents(image, p):
  """Tokens of patches of one image after each block, in float64."""
  image = (_resized(image) + 1) / 2
  image = (image - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  x = [p['class_token'] + p['class_position']]
  for row in range(_SIDE // _PATCH):
    for column in range(_SIDE // _PATCH):
      patch = image[_PATCH * row:, _PATCH * column:][:_PATCH, :_PATCH]
      x.append(_dense(patch.reshape(-1), p['patches'])
               + p['positions'][row, column])
  x, outputs = np.stack(x), []
  for i in range(3):
    q = jax.tree.map(lambda leaf, i=i: leaf[i], p['blocks'])
    y, mixed = _norm(x, q['attention_norm'], -1), []
    parts = [
        np.split(_dense(y, q['attention'][n]), _HEADS, axis=-1)
        for n in ('query', 'key', 'value')
    ]
    for query, key, value in zip(*parts, strict=True):
      weights = np.exp(query @ key.T / math.sqrt(_WIDTH / _HEADS))
      mixed.append(weights / weights.sum(-1, keepdims=True) @ value)
    x = x + _dense(np.concatenate(mixed, -1), q['attention']['out'])
    hidden = _dense(_norm(x, q['mlp_norm'], -1), q['mlp']['in'])
    x = x + _dense(_gelu_tanh(hidden), q['mlp']['out'])
    outputs.append(x[1:])
  return outputs


def _conv(x, p, vectors):
  """A circular convolution of [N, C] tokens under spectral norm."""
  kernel = p['kernel']
  matrix = kernel.reshape(-1, kernel.shape[-1])
  y = np.zeros((len(x), kernel.shape[-1]))
  for n in range(len(x)):
    for tap, weights in enumerate(kernel):
      y[n] += x[(n + tap - len(kernel) // 2) % len(x)] @ weights
  return y / (vectors['v'] @ matrix @ vectors['u']) + p['bias']


def _head(x, p, vectors):
  def finish(x, name):
    x = _norm(x, p[name], 0)
    return np.where(x > 0, x, 0.2 * x)

  x = finish(_conv(x, p['in'], vectors['in']), 'in_norm')
  y = _conv(x, p['residual'], vectors['residual'])
  x = (x + finish(y, 'residual_norm')) / math.sqrt(2)
  return _conv(x, p['out'], vectors['out'])[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    'size', [pytest.param((_SIDE, _SIDE), marks=pytest.mark.slow), (40, 12)]
)
def test_logits_are_those_of_numpy(size):
  images = _images(size=size)
  logits = _apply(_variables(), images)
  assert logits.dtype == jnp.float32
  assert logits.shape == (2, 3 * _TOKENS)
  variables = jax.tree.map(np.float64, _variables())
  params, vectors = variables['params'], variables['spectral_norm']
  for ours, image in zip(logits, np.float64(images), strict=True):
    latents = _latents(image, params['backbone'])
    # The last block first, and again where it is one of the blocks.
    expected = [
        _head(latents[block], params[f'head_{i}'], vectors[f'head_{i}'])
        for i, block in enumerate((2, 0, 2))
    ]
    np.testing.assert_allclose(
        ours, np.concatenate(expected), rtol=1e-5, atol=1e-5
    )


def test_the_published_discriminator_has_five_heads_of_its_size():
  module = dino_discriminator.DinoDiscriminator(
      architecture=dino_discriminator.ARCHITECTURE, image_size=(224, 224),
      blocks=dino_discriminator.BLOCKS, kernel_size=9,
  )
  images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  logits, variables = jax.eval_shape(
      module.init_with_output, jax.random.key(0), images
  )
  assert logits.shape == (2, 5 * 784)
  sizes = {
      name: sum(leaf.size for leaf in jax.tree.leaves(tree))
      for name, tree in variables['params'].items()
  }
  # Without the last LayerNorm, which nothing is judged after.
  assert sizes.pop('backbone') == 21_670_272 - 2 * 384
  assert sizes == {f'head_{i}': 1_477_249 for i in range(5)}
  arch = dino_discriminator.ARCHITECTURE
  assert (arch.activation, arch.norm_epsilon) == ('gelu_tanh', 1e-6)


@pytest.mark.slow
def test_logits_of_an_image_do_not_depend_on_the_others():
  images = _images(num_images=3)
  logits = _apply(_variables(), images)
  for i in range(3):
    np.testing.assert_allclose(
        logits[i:i + 1], _apply(_variables(), images[i:i + 1]), atol=1e-5
    )


@pytest.mark.slow
def test_only_training_changes_the_vectors():
  @functools.partial(jax.jit, static_argnames='train')
  def call(train):
    return _module().apply(
        _variables(), _images(), train=train, mutable=['spectral_norm']
    )[1]['spectral_norm']

  before = _variables()['spectral_norm']
  jax.tree.map(np.testing.assert_array_equal, call(train=False), before)
  for old, new in zip(
      jax.tree.leaves(before), jax.tree.leaves(call(train=True)), strict=True
  ):
    if old.size > 1:  # The vector of one feature is 1 or -1 from the start.
      assert not np.array_equal(old, new)


@pytest.mark.slow
def test_gradients_reach_heads_and_images_but_not_the_backbone():
  def loss(params, images):
    variables = {**_variables(), 'params': params}
    return jnp.sum(jnp.tanh(_module().apply(variables, images)))

  gradients, by_images = jax.jit(jax.grad(loss, argnums=(0, 1)))(
      _variables()['params'], _images()
  )
  assert np.all(np.max(np.abs(by_images), axis=(1, 2, 3)) > 1e-4)
  heads, backbone = parameter_paths.split_frozen(
      gradients, _module().frozen_parameters
  )
  assert backbone.keys() == {'backbone'}
  for path, gradient in jax.tree_util.tree_leaves_with_path(heads):
    # The norm takes away what all positions have in common.
    if 'out' in str(path) or 'bias' not in str(path) or 'norm' in str(path):
      assert np.max(np.abs(gradient)) > 1e-5, path
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), backbone)


@pytest.mark.slow
def test_bfloat16_with_remat_stores_no_activations_in_float32():
  module = _module(dtype=jnp.bfloat16, remat='blocks')
  variables = jax.eval_shape(module.init, jax.random.key(0), _images())
  stored = jax.eval_shape(
      lambda *x: jax.vjp(module.apply, *x)[1], variables, _images()
  )
  activations = [
      x for x in jax.tree.leaves(stored) if x.shape[-2:] == (_TOKENS, _WIDTH)
  ]
  # The latents and two convolutions of each head.
  assert len(activations) >= 9
  assert {x.dtype for x in activations} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
def test_bfloat16_changes_logits_little_and_they_remain_float32():
  expected = _apply(_variables(), _images())
  module = _module(dtype=jnp.bfloat16)
  rounded = _apply(_variables(), _images(), module)
  assert rounded.dtype == jnp.float32
  assert np.any(rounded != expected)
  scale = np.std(expected)
  np.testing.assert_allclose(rounded, expected, atol=0.1 * scale)


@pytest.mark.slow
def test_remat_and_unrolling_change_no_logit():
  np.testing.assert_allclose(
      _apply(_variables(), _images()),
      _apply(_variables(), _images(), _module(remat='blocks', scan_unroll=3)),
      atol=1e-5,
  )


@pytest.mark.slow
def test_the_bias_of_the_keys_changes_no_logit():
  variables = jax.tree.map(lambda x: x, _variables())
  key = variables['params']['backbone']['blocks']['attention']['key']
  key['bias'] = jnp.zeros_like(key['bias'])
  np.testing.assert_allclose(
      _apply(variables, _images()), _apply(_variables(), _images()), atol=2e-5
  )


@pytest.mark.parametrize('blocks', [(3,), (0, -1)])
def test_blocks_that_are_not_there_are_refused(blocks):
  with pytest.raises(ValueError, match='has blocks 0 to 2'):
    jax.eval_shape(
        _module(blocks=blocks).init, jax.random.key(0), _images()
    )


# Loading.


def _write(directory, **config):
  """Writes the variables' backbone as a Hugging Face checkpoint."""
  content = {
      'model_type': 'vit', 'hidden_size': _WIDTH, 'num_hidden_layers': 3,
      'num_attention_heads': _HEADS, 'intermediate_size': 20,
      'patch_size': _PATCH, 'image_size': _SIDE, 'hidden_act': 'gelu',
      'layer_norm_eps': 1e-12, **config,
  }
  (directory / 'config.json').write_text(json.dumps(content))
  p = jax.tree.map(np.asarray, _variables()['params']['backbone'])
  positions = p['positions'].reshape(_TOKENS, _WIDTH)
  embeddings = 'embeddings.patch_embeddings.projection'
  kernel = p['patches']['kernel'].reshape(_PATCH, _PATCH, 3, _WIDTH)
  weights = {
      'embeddings.cls_token': p['class_token'][None, None],
      'embeddings.position_embeddings': np.concatenate(
          [p['class_position'][None], positions]
      )[None],
      f'{embeddings}.weight': kernel.transpose(3, 2, 0, 1),
      f'{embeddings}.bias': p['patches']['bias'],
      'layernorm.weight': np.ones(_WIDTH, np.float32),
      'layernorm.bias': np.zeros(_WIDTH, np.float32),
  }
  names = {
      'query': 'attention.attention.query', 'key': 'attention.attention.key',
      'value': 'attention.attention.value', 'out': 'attention.output.dense',
  }
  blocks = p['blocks']
  for i in range(3):
    layers = {name: blocks['attention'][n] for n, name in names.items()}
    layers['intermediate.dense'] = blocks['mlp']['in']
    layers['output.dense'] = blocks['mlp']['out']
    for name, layer in layers.items():
      weights[f'encoder.layer.{i}.{name}.weight'] = layer['kernel'][i].T
      weights[f'encoder.layer.{i}.{name}.bias'] = layer['bias'][i]
    for name in ('before', 'after'):
      norm = blocks['attention_norm' if name == 'before' else 'mlp_norm']
      key = f'encoder.layer.{i}.layernorm_{name}'
      weights[f'{key}.weight'] = norm['scale'][i]
      weights[f'{key}.bias'] = norm['bias'][i]
  safetensors_numpy.save_file(
      {name: np.ascontiguousarray(x) for name, x in weights.items()},
      directory / 'model.safetensors',
  )
  return directory


@pytest.mark.slow
def test_a_checkpoint_is_what_belongs_under_backbone(tmp_path):
  loaded = adversarial.load_discriminator_backbone(
      _write(tmp_path), _module()
  )
  expected = _variables()['params']['backbone']
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)


@pytest.mark.slow
def test_positions_are_resampled_for_another_image_size(tmp_path):
  module = _module(image_size=(24, 24))
  loaded = adversarial.load_discriminator_backbone(
      _write(tmp_path), module
  )
  shapes = jax.eval_shape(module.init, jax.random.key(0), _images())
  jax.tree.map(
      lambda x, y: np.testing.assert_equal(x.shape, y.shape), loaded,
      shapes['params']['backbone'],
  )


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'depth': 2}, 'depth is 3 instead of 2'),
        ({'num_heads': 2, 'mlp_dim': 8}, 'heads is 3 .* 2; mlp_dim is 20'),
        ({'position': 'sincos'}, "position is 'learned' instead of 'sincos'"),
    ],
)
def test_checkpoints_of_another_architecture_are_refused(
    tmp_path, fields, message
):
  architecture = dataclasses.replace(_ARCHITECTURE, **fields)
  module = _module(architecture=architecture)
  with pytest.raises(ValueError, match=f'does not fit .*{message}'):
    adversarial.load_discriminator_backbone(_write(tmp_path), module)
