"""Published decoders of RAE: golden images, layouts, damage.

Golden checkpoints are in tests/testdata/decoders; FSQ_JAX_DECODERS names
another directory of such.
"""

import functools
import json
import math
import os
import pathlib
import re

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fsq_jax import models
from fsq_jax.models.pretrained import mae_decoder
from fsq_jax.runtime import partitioning

_TESTDATA = pathlib.Path(__file__).parents[2] / 'testdata' / 'decoders'
_DECODERS = pathlib.Path(os.environ.get('FSQ_JAX_DECODERS', _TESTDATA))
_RAE = _TESTDATA / 'rae_decoder'
_ENCODER = _TESTDATA.parent / 'encoders' / 'mae'
_TOLERANCE = 1e-4


def _golden():
  for expected in sorted(_DECODERS.glob('*/expected*.npz')):
    if 'latent_tokens' in np.load(expected).files:
      yield expected


def _latents(tokens):
  """[B, N, C] tokens of a square grid to latents."""
  side = math.isqrt(tokens.shape[1])
  return tokens.reshape(len(tokens), side, side, -1)


def _apply(decoder, latents, method='__call__'):
  apply = jax.jit(functools.partial(decoder.module.apply, method=method))
  return np.asarray(apply(decoder.variables, latents))


def _weights():
  return safetensors_numpy.load_file(_RAE / 'model.safetensors')


def _write(directory, weights, **config):
  """Writes the golden checkpoint with other weights and fields."""
  directory.mkdir(exist_ok=True)
  content = json.loads((_RAE / 'config.json').read_text())
  content.update(config)
  (directory / 'config.json').write_text(json.dumps(content))
  safetensors_numpy.save_file(weights, directory / 'model.safetensors')
  return directory


def _assert_same(decoder, other):
  assert decoder.module == other.module
  for leaf, expected in zip(
      jax.tree.leaves(decoder.variables),
      jax.tree.leaves(other.variables),
      strict=True,
  ):
    np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize(
    'expected', [pytest.param(x, id=x.parent.name) for x in _golden()]
)
def test_images_are_those_of_the_reference(expected):
  golden = np.load(expected)
  decoder = models.load_decoder(expected.parent)
  latents = _latents(golden['latent_tokens'])
  logits = _apply(decoder, latents, 'logits')
  images = _apply(decoder, latents)
  for ours, theirs in ((logits, 'logits'), (images, 'image_nhwc')):
    np.testing.assert_allclose(ours, golden[theirs], rtol=0, atol=_TOLERANCE)


def test_a_golden_decoder_is_there():
  assert list(_golden())


def test_variables_are_those_of_a_new_decoder():
  decoder = models.load_decoder(_RAE)
  latents = jnp.zeros((1, *decoder.module.grid_size, 48))
  expected = jax.eval_shape(decoder.module.init, jax.random.key(0), latents)
  assert jax.tree.map(jnp.shape, decoder.variables) == (
      jax.tree.map(jnp.shape, dict(expected))
  )
  # Positions are what the file says, not what the formula gives.
  positions = _weights()['decoder_pos_embed'][0]
  np.testing.assert_array_equal(
      decoder.variables['constants']['class_position'], positions[0]
  )
  np.testing.assert_array_equal(
      decoder.variables['constants']['positions'],
      positions[1:].reshape(4, 4, 40),
  )


@pytest.mark.parametrize(
    'normalization',
    [
        x if x == 'dinov2' else pytest.param(x, marks=pytest.mark.slow)
        for x in mae_decoder.NORMALIZATIONS
    ],
)
def test_images_are_denormalised_to_the_range_of_pixels(normalization):
  golden = np.load(_RAE / 'expected.npz')
  decoder = models.load_decoder(_RAE, normalization)
  arch = decoder.module.architecture
  pixels = golden['image_nhwc'] * arch.std + arch.mean
  np.testing.assert_allclose(
      _apply(decoder, _latents(golden['latent_tokens'])),
      2 * pixels - 1,
      atol=_TOLERANCE,
  )


def test_normalizations_are_those_of_the_encoders():
  encoder = models.load_encoder(_ENCODER).module.architecture
  decoder = models.load_decoder(_RAE, 'mae').module.architecture
  assert (decoder.mean, decoder.std) == (encoder.mean, encoder.std)
  with pytest.raises(ValueError, match=r"'vgg'; known: \['dino', 'dinov2'"):
    models.load_decoder(_RAE, 'vgg')


def test_a_decoder_within_a_whole_model_is_loaded_too(tmp_path):
  weights = {f'decoder.{key}': x for key, x in _weights().items()}
  weights['encoder.embeddings.cls_token'] = np.zeros(7)
  _assert_same(
      models.load_decoder(_write(tmp_path, weights)),
      models.load_decoder(_RAE),
  )


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_halves_are_widened(dtype, tmp_path):
  weights = {key: x.astype(dtype) for key, x in _weights().items()}
  decoder = models.load_decoder(_write(tmp_path, weights))
  expected = weights['decoder_embed.weight'].astype(np.float32).T
  kernel = decoder.variables['params']['embed']['kernel']
  assert kernel.dtype == jnp.float32
  np.testing.assert_array_equal(kernel, expected)


def test_config_tells_epsilon_activation_and_biases(tmp_path):
  weights = {
      key: x
      for key, x in _weights().items()
      if not key.endswith(('query.bias', 'key.bias', 'value.bias'))
  }
  decoder = models.load_decoder(_write(
      tmp_path, weights, qkv_bias=False, layer_norm_eps=1e-3,
      hidden_act='gelu_new',
  ))
  arch = decoder.module.architecture
  assert arch.biases == ('out', 'mlp')
  assert arch.norm_epsilon == 1e-3
  assert arch.activation == 'gelu_tanh'


def test_weights_are_loaded_into_their_shardings():
  mesh = partitioning.create_mesh({'data': 2, 'fsdp': 4})

  def shardings(variables):
    return partitioning.state_shardings(variables, mesh, [('.*', 'fsdp')], 64)

  expected = models.load_decoder(_RAE)
  decoder = models.load_decoder(_RAE, shardings=shardings)
  _assert_same(decoder, expected)
  leaves = traverse_util.flatten_dict(decoder.variables['params'], sep='/')
  kernel = leaves['blocks/mlp/in/kernel']
  assert {x.data.shape for x in kernel.addressable_shards} == {(2, 40, 24)}


def test_no_device_holds_the_whole_of_what_is_sharded():
  mesh = partitioning.create_mesh({'data': 2, 'fsdp': 4})

  def shardings(variables):
    return partitioning.state_shardings(variables, mesh, [('.*', 'fsdp')], 0)

  decoder = models.load_decoder(_RAE, shardings=shardings)
  _assert_same(decoder, models.load_decoder(_RAE))
  leaves = jax.tree.leaves(decoder.variables)
  # The constant positions too: 4 devices divide an axis of every array.
  assert not any(leaf.sharding.is_fully_replicated for leaf in leaves)
  held = dict.fromkeys(jax.devices(), 0)
  for leaf in leaves:
    for shard in leaf.addressable_shards:
      held[shard.device] += shard.data.nbytes
  assert set(held.values()) == {sum(leaf.nbytes for leaf in leaves) // 4}


@pytest.mark.slow
# What is refused.


def test_every_key_is_needed(tmp_path):
  weights = _weights()
  for key in weights:
    rest = {k: array for k, array in weights.items() if k != key}
    with pytest.raises(ValueError, match=f'1 missing: {key}'):
      models.load_decoder(_write(tmp_path, rest))


def test_one_error_names_all_that_is_wrong_with_the_keys(tmp_path):
  weights = _weights()
  weights['decoder_layers.2.output.dense.bias'] = np.zeros(40, np.float32)
  weights['mask_token'] = np.zeros((1, 1, 40), np.float32)
  weights['decoder_norm.bias'] = np.zeros(39, np.float32)
  weights['decoder_norm.weight'] = np.zeros(40, np.int64)
  del weights['trainable_cls_token']
  with pytest.raises(ValueError, match='are not those of the dec') as error:
    models.load_decoder(_write(tmp_path, weights))
  message = str(error.value)
  assert '1 missing: trainable_cls_token;' in message
  unexpected = 'decoder_layers.2.output.dense.bias, mask_token'
  assert f'2 unexpected: {unexpected};' in message
  assert 'decoder_norm.bias is (39,) instead of (40,)' in message
  assert 'decoder_norm.weight is I64 instead of one of' in message


def test_encoders_and_masked_autoencoders_are_no_decoders(tmp_path):
  config = json.loads((_ENCODER / 'config.json').read_text())
  weights = safetensors_numpy.load_file(_ENCODER / 'model.safetensors')
  with pytest.raises(ValueError, match=r'missing: .*trainable_cls_token'):
    models.load_decoder(_write(tmp_path, weights, **config))
  # MAE's own decoder has a mask token in place of the class token.
  weights = {f'decoder.{key}': x for key, x in _weights().items()}
  token = weights.pop('decoder.trainable_cls_token')
  weights['decoder.mask_token'] = token
  with pytest.raises(ValueError, match=r'unexpected: decoder\.mask_token'):
    models.load_decoder(_write(tmp_path, weights))
  with pytest.raises(ValueError, match=r"model_type .* known: \['vit_mae'\]"):
    models.load_decoder(_write(tmp_path, weights, model_type='dinov2'))


_REFUSED_CONFIGS = (
    ({'decoder_hidden_size': 0}, 'width is 0; it must be an integer'),
    ({'decoder_hidden_size': None}, 'decoder_hidden_size'),
    ({'decoder_num_attention_heads': 3}, 'width 40 must be a multiple of'),
    ({'decoder_num_hidden_layers': 10**6}, 'too few for 1000000 blocks'),
    ({'decoder_intermediate_size': 97}, r'\(96, 40\) instead of \(97, 40'),
    ({'hidden_size': 47}, r'embed.weight is \(40, 48\) instead of \(40'),
    ({'patch_size': 8}, r'pred.bias is \(768,\) instead of \(192,\)'),
    ({'image_size': 80}, r'pos_embed is \(1, 17, 40\) instead of \(1, 26,'),
    ({'image_size': 8}, r'image_size is \(8, 8\); both sides .* 16'),
    ({'image_size': 10**6}, r'image_size is \(1000000, .* can be held'),
    ({'qkv_bias': 'false'}, r"qkv_bias .* 'false'; it must be true"),
    ({'num_channels': 1}, 'num_channels is 1; it must be 3'),
    ({'hidden_act': 'relu'}, r"hidden_act .* 'relu'; known: \['gelu'"),
)


def test_configs_that_do_not_fit_are_refused(tmp_path):
  unlike = []
  for fields, message in _REFUSED_CONFIGS:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
      models.load_decoder(_write(tmp_path, _weights(), **fields))
    if not re.search(message, str(error.value)):
      unlike.append((fields, str(error.value)))
  assert not unlike


def test_two_decoders_in_one_checkpoint_are_refused(tmp_path):
  weights = {
      prefix + key: x
      for prefix in ('a.', 'b.')
      for key, x in _weights().items()
  }
  with pytest.raises(ValueError, match=r"2 times, .* \['a\.', 'b\.'\]"):
    models.load_decoder(_write(tmp_path, weights))


def test_a_normalization_that_is_no_name_is_refused():
  with pytest.raises(ValueError, match=r"normalization is \['mae'\]; known"):
    models.load_decoder(_RAE, ['mae'])


def test_damaged_files_are_refused(tmp_path):
  weights = _weights()
  weights['decoder_norm.bias'][3] = np.nan
  with pytest.raises(ValueError, match=r'decoder_norm\.bias.* holds NaN'):
    models.load_decoder(_write(tmp_path, weights))
  path = _write(tmp_path, _weights()) / 'model.safetensors'
  content = path.read_bytes()
  path.write_bytes(content[:len(content) // 2])
  with pytest.raises(ValueError, match='corrupted, or not safetensors'):
    models.load_decoder(tmp_path)
  with pytest.raises(ValueError, match='give its directory'):
    models.load_decoder(path)
  with pytest.raises(ValueError, match='There is no'):
    models.load_decoder(tmp_path / 'absent')
  (tmp_path / 'config.json').unlink()
  with pytest.raises(ValueError, match=r'config\.json|corrupted'):
    models.load_decoder(tmp_path)
