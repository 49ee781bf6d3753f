"""The vision transformer of pretrained weights against NumPy."""

import dataclasses
import math

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import models
from fsq_jax.models import resampling
from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import blocks as vit_blocks
from fsq_jax.models.pretrained import encoder as pretrained_vit
from fsq_jax.runtime import partitioning

# Pixels that no patch fills are at two of the sides.
_SIZE = (9, 13)
_GRID = (2, 3)
_GATED = {'mlp': 'gated', 'activation': 'silu'}
_VARIANTS = [
    *((family, {}) for family in architectures.FAMILIES),
    ('dinov2', _GATED),
    ('dinov3', _GATED),
    ('dinov3', {'biases': ('key',)}),
    ('mae', {'biases': ()}),
]


def _architecture(family, **overrides):
  return architectures.build_architecture(
      family, width=16, depth=2, num_heads=2, mlp_dim=20, patch_size=4,
      **overrides,
  )


def _module(family, **overrides):
  return pretrained_vit.PretrainedVit(
      _architecture(family, **overrides), image_size=_SIZE
  )


def _images(size=_SIZE):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.uniform(-1, 1, (2, *size, 3)), jnp.float32)


def _init(module):
  """Variables none of which is at its initial value, without compiling."""
  rng = np.random.default_rng(1)

  def draw(path, x):
    around = 1.0 if path[-1].key == 'scale' else 0.0
    return np.asarray(around + rng.uniform(-0.4, 0.4, x.shape), x.dtype)

  shapes = jax.eval_shape(module.init, jax.random.key(0), _images())
  return jax.tree_util.tree_map_with_path(draw, shapes)


def _apply(module, variables, images, method='__call__'):
  apply = jax.jit(module.apply, static_argnames='method')
  return apply(variables, images, method=method)


def _norm(x, p, epsilon):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  x = (x - mean) / np.sqrt(variance + epsilon)
  return x * p['scale'] + p['bias']


def _dense(x, p):
  return x @ p['kernel'] + p.get('bias', 0)


def _gelu_tanh(x):
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return 0.5 * x * (1 + np.tanh(inner))


_ACTIVATIONS = {
    'gelu': lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    'gelu_tanh': _gelu_tanh,
    'silu': lambda x: x / (1 + np.exp(-x)),
}


def _turn(x, arch):
  """Rotates the pairs of channels of one head, [N, d], token by token."""
  turned = x.copy()
  d = x.shape[-1]
  for n in range(_GRID[0] * _GRID[1]):
    row = 2 * (n // _GRID[1] + 0.5) / _GRID[0] - 1
    column = 2 * (n % _GRID[1] + 0.5) / _GRID[1] - 1
    for j in range(d // 2):
      place = row if j < d // 4 else column
      angle = 2 * math.pi * place * arch.rope_theta ** -(j % (d // 4) * 4 / d)
      token = arch.num_class_tokens + arch.num_registers + n
      pair = complex(x[token, j], x[token, j + d // 2])
      pair *= complex(math.cos(angle), math.sin(angle))
      turned[token, [j, j + d // 2]] = pair.real, pair.imag
  return turned


def _block(x, p, arch):
  """A transformer block, image by image, head by head, in float64."""
  d = arch.width // arch.num_heads
  y = _norm(x, p['attention_norm'], arch.norm_epsilon)
  q, k, v = (_dense(y, p['attention'][n]) for n in ('query', 'key', 'value'))
  mixed = np.zeros_like(x)
  for b in range(len(x)):
    for head in range(arch.num_heads):
      part = slice(head * d, (head + 1) * d)
      queries, keys = q[b][:, part], k[b][:, part]
      if arch.position == 'rope':
        queries, keys = _turn(queries, arch), _turn(keys, arch)
      logits = queries @ keys.T / math.sqrt(d)
      weights = np.exp(logits - logits.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      mixed[b][:, part] = weights @ v[b][:, part]
  mixed = _dense(mixed, p['attention']['out'])
  x = x + mixed * p.get('attention_scale', 1)
  y = _norm(x, p['mlp_norm'], arch.norm_epsilon)
  activate = _ACTIVATIONS[arch.activation]
  hidden = _dense(y, p['mlp']['in'])
  if arch.mlp == 'gated':
    hidden = activate(_dense(y, p['mlp']['gate'])) * hidden
  else:
    hidden = activate(hidden)
  return x + _dense(hidden, p['mlp']['out']) * p.get('mlp_scale', 1)


def _outputs(images, p, arch):
  """All tokens of normalised images after each block, in float64."""
  x = np.zeros((2, 6, 16))
  for n in range(6):
    row, column = 4 * (n // 3), 4 * (n % 3)
    patch = np.float64(images[:, row:row + 4, column:column + 4])
    x[:, n] = _dense(patch.reshape(2, 48), p['patches'])
  if arch.position != 'rope':
    x += p['positions'].reshape(6, 16)
  prefix = []
  if arch.num_class_tokens:
    prefix.append(p['class_token'][None] + p.get('class_position', 0))
  if arch.num_registers:
    prefix.append(p['registers'])
  x = np.concatenate([*(np.stack([t, t]) for t in prefix), x], axis=1)
  outputs = []
  for i in range(arch.depth):
    x = _block(x, jax.tree.map(lambda leaf, i=i: leaf[i], p['blocks']), arch)
    outputs.append(x)
  return outputs


def _tokens(images, p, arch):
  """All tokens of normalised images, in float64."""
  x = _outputs(images, p, arch)[-1]
  return _norm(x, p['norm'], arch.norm_epsilon)


@pytest.mark.parametrize(
    ('family', 'overrides'),
    [
        case
        if case[1] or case[0] in ('siglip', 'dinov2_with_registers')
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in _VARIANTS
    ],
)
def test_tokens_are_those_of_numpy(family, overrides):
  module = _module(family, **overrides)
  variables = _init(module)
  images = _images()
  tokens = _apply(module, variables, images, 'tokens')
  assert tokens.dtype == jnp.float32
  params = jax.tree.map(np.float64, variables['params'])
  expected = _tokens(images, params, module.architecture)
  np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['dino', 'dinov3'])
@pytest.mark.parametrize('remat', ['none', 'dots'])
def test_latents_of_blocks_are_those_of_numpy(family, remat):
  module = _module(family).clone(final_affine=False, remat=remat)
  variables = _init(module)
  images = _images()
  latents = _apply(module, variables, images, 'latents_of_blocks')
  assert latents.dtype == jnp.float32
  arch = module.architecture
  assert latents.shape == (2, 2, 6, 16)
  params = jax.tree.map(np.float64, variables['params'])
  normalized = ((np.float64(images) + 1) / 2 - arch.mean) / arch.std
  expected = np.stack(_outputs(normalized, params, arch))
  np.testing.assert_allclose(
      latents, expected[:, :, arch.num_prefix_tokens:], rtol=1e-5, atol=1e-5
  )


def test_matmuls_for_gpus_have_equal_results(monkeypatch):
  module = _module('dinov3', **_GATED)
  variables = _init(module)
  images = _images((8, 10))
  expected = jax.jit(lambda x: module.apply(variables, x))(images)
  monkeypatch.setattr(partitioning, 'is_on_gpu', lambda x: True)
  found = jax.jit(lambda x: module.apply(variables, x))(images)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_latents_of_blocks_take_the_parameters_of_an_encoder():
  module = _module('dino').clone(final_affine=False)
  shapes = jax.eval_shape(
      lambda key: module.init(key, _images(), method='latents_of_blocks'),
      jax.random.key(0),
  )
  expected = jax.eval_shape(module.init, jax.random.key(0), _images())
  assert jax.tree.structure(shapes) == jax.tree.structure(expected)
  jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), shapes,
               expected)


def test_layer_norm_keeps_the_variance_of_far_tokens():
  # A token of mean 1000 and deviation 1 has no variance left as the difference
  # of two squares in float32.
  arch = _architecture('mae')
  x = 1000 + np.random.default_rng(0).standard_normal((2, 3, 16))
  norm = vit_blocks.layer_norm(arch, None, affine=False)
  y = jax.jit(norm.apply)({}, jnp.asarray(x, jnp.float32))
  expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
  np.testing.assert_allclose(y, expected, atol=1e-3)


def test_applying_changes_no_variable():
  module = _module('mae')
  variables = _init(module)
  before = jax.tree.map(np.copy, variables)
  # Outside of jit the module gets the NumPy arrays themselves.
  jax.eval_shape(lambda x: module.apply(variables, x), _images())
  jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.parametrize(
    'family',
    [
        x if x == 'dinov2' else pytest.param(x, marks=pytest.mark.slow)
        for x in architectures.FAMILIES
    ],
)
def test_latents_are_the_tokens_of_the_patches_of_normalised_images(family):
  module = _module(family)
  variables = _init(module)
  arch = module.architecture
  images = _images()
  latents = _apply(module, variables, images)
  assert latents.shape == (2, *_GRID, module.width)
  pixels = (np.asarray(images) + 1) / 2
  if family.startswith('siglip'):
    assert arch.mean == arch.std == (0.5, 0.5, 0.5)
  else:
    assert arch.mean == (0.485, 0.456, 0.406)
    assert arch.std == (0.229, 0.224, 0.225)
  normalised = jnp.asarray((pixels - arch.mean) / arch.std, jnp.float32)
  tokens = _apply(module, variables, normalised, 'tokens')
  expected = tokens[:, arch.num_prefix_tokens:].reshape(2, *_GRID, 16)
  np.testing.assert_allclose(latents, expected, atol=1e-5)


@pytest.mark.parametrize(
    'resize',
    [
        x if x == 'bicubic' else pytest.param(x, marks=pytest.mark.slow)
        for x in resampling.KERNELS
    ],
)
def test_images_of_other_sizes_are_resampled_first(resize):
  module = _module('siglip').clone(resize=resize)
  variables = _init(module)
  images = _images((20, 17))
  expected = resampling.resize_images(images, _SIZE, resize)
  np.testing.assert_allclose(
      _apply(module, variables, images),
      _apply(module, variables, expected),
      atol=1e-5,
  )


def test_added_positions_refuse_another_grid():
  module = _module('siglip')
  variables = _init(module)
  with pytest.raises(ValueError, match=r'a grid of \(2, 3\) tokens, not'):
    _apply(module, variables, _images((12, 13)), 'tokens')


def test_rotation_takes_any_grid():
  module = _module('dinov3')
  tokens = jax.eval_shape(
      lambda v, x: module.apply(v, x, method='tokens'),
      _init(module),
      _images((12, 13)),
  )
  assert tokens.shape == (2, 5 + 9, 16)


def test_without_affine_tokens_have_mean_0_and_variance_1():
  module = _module('dinov2').clone(final_affine=False)
  variables = _init(module)
  assert 'norm' not in variables['params']
  tokens = _apply(module, variables, _images(), 'tokens')
  np.testing.assert_allclose(np.mean(tokens, -1), 0, atol=1e-5)
  np.testing.assert_allclose(np.std(tokens, -1), 1, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['siglip', 'dinov3'])
def test_remat_and_unrolling_change_no_result(family):
  module = _module(family)
  variables = _init(module)
  other = module.clone(remat='blocks', scan_unroll=2)
  np.testing.assert_allclose(
      _apply(module, variables, _images()),
      _apply(other, variables, _images()),
      atol=1e-6,
  )


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize('family', ['siglip', 'dinov3'])
def test_products_in_bfloat16_change_little(family):
  module = _module(family)
  variables = _init(module)
  latents = _apply(module, variables, _images())
  rounded = _apply(module.clone(dtype=jnp.bfloat16), variables, _images())
  assert rounded.dtype == jnp.float32
  assert 0 < np.max(np.abs(latents - rounded)) < 0.2


@pytest.mark.slow
def test_every_parameter_has_a_gradient():
  module = _module('dinov2_with_registers')
  variables = _init(module)

  def loss(variables):
    return jnp.sum(module.apply(variables, _images()) ** 3)

  grads = jax.jit(jax.grad(loss))(variables)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    # The softmax does not see what all keys have in common.
    if 'key' not in str(path) or 'bias' not in str(path):
      assert np.all(np.abs(grad).reshape(len(grad), -1).max(-1) > 1e-6), path


@pytest.mark.parametrize(
    ('family', 'activation', 'epsilon', 'prefix', 'position', 'layer_scale'),
    [
        ('siglip', 'gelu_tanh', 1e-6, (0, 0), 'learned', False),
        ('siglip_big_vision', 'gelu_tanh', 1e-6, (0, 0), 'learned', False),
        ('dino', 'gelu', 1e-6, (1, 0), 'learned', False),
        ('dinov2', 'gelu', 1e-6, (1, 0), 'learned', True),
        ('dinov2_with_registers', 'gelu', 1e-6, (1, 4), 'learned', True),
        ('dinov3', 'gelu', 1e-5, (1, 4), 'rope', True),
        ('mae', 'gelu', 1e-12, (1, 0), 'sincos', False),
    ],
)
def test_families_are_as_published(
    family, activation, epsilon, prefix, position, layer_scale
):
  arch = _architecture(family)
  assert arch.activation == activation
  assert arch.norm_epsilon == epsilon
  assert (arch.num_class_tokens, arch.num_registers) == prefix
  assert arch.position == position
  assert arch.layer_scale == layer_scale
  assert ('key' in arch.biases) == (family != 'dinov3')


def _count(name, image_size):
  module = pretrained_vit.PretrainedVit(
      models.ARCHITECTURES[name], (image_size, image_size)
  )
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), images)
  return sum(x.size for x in jax.tree.leaves(variables)) / 1e6


@pytest.mark.fast_variants('siglip_L/16-256-303.4', 'dino_B/16-224-85.798656')
@pytest.mark.parametrize(
    ('name', 'image_size', 'millions'),
    [
        ('dino_S/8', 224, 21.670272),
        ('dino_S/16', 224, 21.665664),
        ('dino_B/8', 224, 85.807872),
        ('dino_B/16', 224, 85.798656),
        ('siglip_B/16', 224, 85.8),
        ('siglip_L/16', 256, 303.4),
        ('siglip_So400m/14', 384, 413.0),
        ('siglip_So400m/16', 256, 412.65),
        ('siglip_g-opt/16', 256, 1134.8),
    ],
)
def test_published_sizes_have_as_many_parameters(name, image_size, millions):
  assert _count(name, image_size) == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize('name', models.ARCHITECTURES)
def test_published_sizes_have_heads_of_a_whole_number_of_channels(name):
  arch = models.ARCHITECTURES[name]
  assert arch.width // arch.num_heads in (64, 72, 96)
  assert arch.patch_size == int(name.split('/')[1])


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('position', 'alibi', r"position is 'alibi'; known: \['learned'"),
        ('mlp', 'moe', r"mlp is 'moe'; known: \['gated', 'plain'\]"),
        ('activation', 'relu', r"activation is 'relu'; known: \['gelu'"),
        ('num_heads', 3, 'width 16 must be a multiple of 3'),
    ],
)
def test_architectures_of_unknown_kinds_are_refused(field, value, message):
  arch = _architecture('siglip')
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(arch, **{field: value})


def test_unknown_families_are_refused():
  with pytest.raises(ValueError, match=r"'clip'; known: \['dino', 'dinov2'"):
    _architecture('clip')
