"""Eight CPU devices, the settings of every test, and files of random weights."""

import json
import os
import pathlib

# XLA reads these once, when the first device is asked for.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
)

from flax import traverse_util
import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fsq_jax.models import lpips

# Toy programs spend their time in the compiler, not in the arithmetic.
jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='module')
def compiled_programs(tmp_path_factory):
  """Keeps programs on disk, for modules that compile the same ones again."""
  names = {
      'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('programs')),
      'jax_persistent_cache_min_compile_time_secs': 0.0,
  }
  before = {name: getattr(jax.config, name) for name in names}
  for values in (names, before):
    compilation_cache.reset_cache()
    for name, value in values.items():
      jax.config.update(name, value)
    if values is names:
      yield names['jax_compilation_cache_dir']


@pytest.fixture(scope='session')
def random_weights(tmp_path_factory):
  """Finds weights by the name of a network; each is written once.

  For 'lpips_vgg16' and 'lpips_alexnet' files of the true size, 59 and 10 MB;
  'dino' is a tiny directory, described in `_DINO`.
  """
  folder = tmp_path_factory.mktemp('weights')

  def find(name: str) -> str:
    path = folder / name
    if not path.exists():
      (_write_dino if name == 'dino' else _write_lpips)(path)
    return str(path)

  return find


# As the config.json of Hugging Face says it, and as an architecture of ours.
_DINO = {
    'model_type': 'vit', 'hidden_size': 12, 'num_hidden_layers': 3,
    'num_attention_heads': 3, 'intermediate_size': 20, 'patch_size': 4,
    'image_size': 16, 'hidden_act': 'gelu', 'layer_norm_eps': 1e-12,
}
TINY_DINO = {
    'architecture': (
        'dino(width=12, depth=3, num_heads=3, mlp_dim=20, patch_size=4)'
    ),
    'image_size': (16, 16),
    'blocks': (0, 2),
    'kernel_size': 3,
}


def _write_lpips(path: pathlib.Path) -> None:
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  module = lpips.Lpips(path.name.removeprefix('lpips_'))
  params = jax.eval_shape(module.init, jax.random.key(0), images, images)
  rng = np.random.default_rng(0)
  arrays = {}
  for key, leaf in traverse_util.flatten_dict(
      params['params'], sep='/'
  ).items():
    # Activations keep their size; heads are positive, as the true ones.
    scale = np.float32((2 / np.prod((1, *leaf.shape[:-1]))) ** 0.5)
    draw = rng.standard_normal(leaf.shape, np.float32)
    arrays[key] = np.abs(draw) if 'head' in key else scale * draw
  safetensors_numpy.save_file(arrays, path)


def _write_dino(path: pathlib.Path) -> None:
  width, hidden = _DINO['hidden_size'], _DINO['intermediate_size']
  patch = _DINO['patch_size']
  num_tokens = (_DINO['image_size'] // patch) ** 2
  shapes = {
      'embeddings.cls_token': (1, 1, width),
      'embeddings.position_embeddings': (1, 1 + num_tokens, width),
      'embeddings.patch_embeddings.projection.weight': (width, 3, patch, patch),
      'embeddings.patch_embeddings.projection.bias': (width,),
      'layernorm.weight': (width,),
      'layernorm.bias': (width,),
  }
  layers = {
      'attention.attention.query': (width, width),
      'attention.attention.key': (width, width),
      'attention.attention.value': (width, width),
      'attention.output.dense': (width, width),
      'intermediate.dense': (hidden, width),
      'output.dense': (width, hidden),
      'layernorm_before': (width,),
      'layernorm_after': (width,),
  }
  for i in range(_DINO['num_hidden_layers']):
    for name, shape in layers.items():
      key = f'encoder.layer.{i}.{name}'
      shapes |= {f'{key}.weight': shape, f'{key}.bias': shape[:1]}
  rng = np.random.default_rng(0)
  arrays = {}
  for key, shape in shapes.items():
    draw = rng.uniform(-0.4, 0.4, shape)
    arrays[key] = np.float32(draw + ('norm' in key and 'weight' in key))
  path.mkdir()
  (path / 'config.json').write_text(json.dumps(_DINO))
  safetensors_numpy.save_file(arrays, path / 'model.safetensors')
