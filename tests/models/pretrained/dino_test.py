"""DINO in Hugging Face's ViT layout, against NumPy by the names in the file."""

import functools
import json
import math

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fsq_jax import models
from fsq_jax.models.pretrained import architectures

_WIDTH, _DEPTH, _HEADS, _MLP, _PATCH, _SIDE = 12, 2, 3, 20, 4, 12
_CONFIG = {
    'model_type': 'vit', 'hidden_size': _WIDTH, 'num_hidden_layers': _DEPTH,
    'num_attention_heads': _HEADS, 'intermediate_size': _MLP,
    'patch_size': _PATCH, 'image_size': _SIDE, 'hidden_act': 'gelu',
    'layer_norm_eps': 1e-12, 'num_channels': 3, 'qkv_bias': True,
    'architectures': ['ViTModel'], 'attention_probs_dropout_prob': 0.0,
}
_IMAGENET = {
    'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225],
}
_TOKENS = (_SIDE // _PATCH) ** 2


def _weights():
  shapes = {
      'embeddings.cls_token': (1, 1, _WIDTH),
      'embeddings.position_embeddings': (1, 1 + _TOKENS, _WIDTH),
      'embeddings.patch_embeddings.projection.weight': (
          _WIDTH, 3, _PATCH, _PATCH
      ),
      'embeddings.patch_embeddings.projection.bias': (_WIDTH,),
      'layernorm.weight': (_WIDTH,),
      'layernorm.bias': (_WIDTH,),
      # Of transformers, and not of DINO.
      'pooler.dense.weight': (_WIDTH, _WIDTH),
      'pooler.dense.bias': (_WIDTH,),
  }
  for i in range(_DEPTH):
    block = f'encoder.layer.{i}.'
    for name, rows, columns in (
        ('attention.attention.query', _WIDTH, _WIDTH),
        ('attention.attention.key', _WIDTH, _WIDTH),
        ('attention.attention.value', _WIDTH, _WIDTH),
        ('attention.output.dense', _WIDTH, _WIDTH),
        ('intermediate.dense', _MLP, _WIDTH),
        ('output.dense', _WIDTH, _MLP),
    ):
      shapes[f'{block}{name}.weight'] = rows, columns
      shapes[f'{block}{name}.bias'] = (rows,)
    for name in ('layernorm_before', 'layernorm_after'):
      shapes[f'{block}{name}.weight'] = (_WIDTH,)
      shapes[f'{block}{name}.bias'] = (_WIDTH,)
  rng = np.random.default_rng(0)
  return {
      name: rng.uniform(-0.5, 0.5, shape).astype(np.float32)
      + np.float32('norm' in name and 'weight' in name)
      for name, shape in shapes.items()
  }


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """A directory as of facebook/dino-vits8, tiny and random."""
  directory = tmp_path_factory.mktemp('dino')
  (directory / 'config.json').write_text(json.dumps(_CONFIG))
  (directory / 'preprocessor_config.json').write_text(json.dumps(_IMAGENET))
  safetensors_numpy.save_file(_weights(), directory / 'model.safetensors')
  return directory


def _linear(x, weights, name):
  return x @ weights[f'{name}.weight'].T + weights[f'{name}.bias']


def _norm(x, weights, name):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
  return x * weights[f'{name}.weight'] + weights[f'{name}.bias']


def _gelu(x):
  return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def _block(x, weights, block):
  y = _norm(x, weights, f'{block}.layernorm_before')
  heads = {}
  for name in ('query', 'key', 'value'):
    y_name = _linear(y, weights, f'{block}.attention.attention.{name}')
    heads[name] = np.split(y_name, _HEADS, axis=-1)
  mixed = []
  for q, k, v in zip(*heads.values(), strict=True):
    scores = np.exp(q @ k.T / math.sqrt(_WIDTH / _HEADS))
    mixed.append(scores / scores.sum(-1, keepdims=True) @ v)
  mixed = np.concatenate(mixed, axis=-1)
  x = x + _linear(mixed, weights, f'{block}.attention.output.dense')
  y = _norm(x, weights, f'{block}.layernorm_after')
  y = _gelu(_linear(y, weights, f'{block}.intermediate.dense'))
  return x + _linear(y, weights, f'{block}.output.dense')


def _expected(image):
  """Tokens of one normalised [H, W, 3] image, in float64."""
  weights = {name: np.float64(x) for name, x in _weights().items()}
  projection = 'embeddings.patch_embeddings.projection'
  tokens = [weights['embeddings.cls_token'][0, 0]]
  for row in range(0, _SIDE, _PATCH):
    for column in range(0, _SIDE, _PATCH):
      patch = image[row:row + _PATCH, column:column + _PATCH]
      tokens.append(
          np.einsum('dcpq,pqc->d', weights[f'{projection}.weight'], patch)
          + weights[f'{projection}.bias']
      )
  x = np.stack(tokens) + weights['embeddings.position_embeddings'][0]
  for i in range(_DEPTH):
    x = _block(x, weights, f'encoder.layer.{i}')
  return _norm(x, weights, 'layernorm')


def test_tokens_are_those_of_numpy(checkpoint):
  encoder = models.load_encoder(checkpoint)
  images = np.random.default_rng(1).standard_normal((2, _SIDE, _SIDE, 3))
  images = images.astype(np.float32)
  apply = jax.jit(functools.partial(encoder.module.apply, method='tokens'))
  tokens = apply(encoder.variables, images)
  assert tokens.dtype == jnp.float32
  for ours, image in zip(tokens, images, strict=True):
    np.testing.assert_allclose(ours, _expected(image), atol=2e-5)


def test_the_architecture_is_dinos(checkpoint):
  architecture = models.build_encoder(checkpoint).architecture
  assert architecture == architectures.build_architecture(
      'dino', width=_WIDTH, depth=_DEPTH, num_heads=_HEADS, mlp_dim=_MLP,
      patch_size=_PATCH, norm_epsilon=1e-12,
  )


def _copy(checkpoint, directory, name, **changed):
  for path in checkpoint.iterdir():
    (directory / path.name).write_bytes(path.read_bytes())
  content = json.loads((checkpoint / name).read_text())
  (directory / name).write_text(json.dumps({**content, **changed}))
  return directory


def test_a_published_config_is_a_published_architecture(checkpoint, tmp_path):
  # facebook/dino-vits8, whose epsilon is that of transformers' ViT.
  path = _copy(
      checkpoint, tmp_path, 'config.json', hidden_size=384,
      num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536,
      patch_size=8, image_size=224, layer_norm_eps=1e-6,
  )
  module = models.build_encoder(path)
  assert module.architecture == models.ARCHITECTURES['dino_S/8']
  assert module.grid_size == (28, 28)


@pytest.mark.parametrize('field', ['image_mean', 'image_std'])
def test_other_models_of_that_type_are_refused(checkpoint, tmp_path, field):
  # google/vit-base-patch16-224 is of model_type 'vit' too.
  path = _copy(
      checkpoint, tmp_path, 'preprocessor_config.json', **{field: [0.5] * 3}
  )
  with pytest.raises(ValueError, match=rf'{field} of .* is \[0.5, .*another'):
    models.load_encoder(path)


def test_normalization_need_not_be_written_down(checkpoint, tmp_path):
  _copy(checkpoint, tmp_path, 'config.json')
  (tmp_path / 'preprocessor_config.json').unlink()
  assert models.build_encoder(tmp_path) == models.build_encoder(
      checkpoint
  )


def test_registers_are_refused(checkpoint, tmp_path):
  path = _copy(checkpoint, tmp_path, 'config.json', num_register_tokens=4)
  with pytest.raises(ValueError, match="family 'dino' have none"):
    models.load_encoder(path)
