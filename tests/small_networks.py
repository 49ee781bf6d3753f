"""Files of small frozen networks with random weights, for tests of training."""

import functools
import json
import pathlib

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from experiments.weights import golden_networks
from fsq_jax.models import classifiers
from fsq_jax.models import lpips

_GOLDEN = pathlib.Path(__file__).parent / 'testdata' / 'frozen'
_CHANNELS = 8
_CLASSIFIERS = {
    'convnext_small': functools.partial(
        classifiers.ConvNext, widths=(8, 16, 24, 32), depths=(1, 1, 2, 1),
        num_classes=10,
    ),
    'resnet50': functools.partial(
        classifiers.ResNet, depths=(1, 2, 1, 1), num_classes=10
    ),
}  # fmt: skip
_DINO = {'width': 24, 'depth': 2, 'num_heads': 2, 'mlp_dim': 48}
_PATCH, _SIDE = 8, 16


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
  """Makes the networks of perceptual losses as small as `write`'s files."""
  for name, build in _CLASSIFIERS.items():
    monkeypatch.setitem(classifiers.CLASSIFIERS, name, build)
  for name, network in lpips.NETWORKS.items():
    stages = tuple(
        stage._replace(channels=(_CHANNELS,) * len(stage.channels))
        for stage in network.stages
    )
    monkeypatch.setitem(lpips.NETWORKS, name, network._replace(stages=stages))


def write(folder: pathlib.Path, name: str, seed: int = 0) -> str:
  """Writes the weights of a perceptual loss, after `shrink`.

  Args:
    folder: where to.
    name: as in losses.perceptual.name, not 'vit'.
    seed: of the weights of LPIPS.

  Returns:
    The path of the file.
  """
  path = folder / f'{name}_{seed}.safetensors'
  if name.startswith('lpips_'):
    arrays = _draw_lpips(name.removeprefix('lpips_'), seed)
  else:
    name = {'convnext': 'convnext_small'}.get(name, name)
    shapes = json.loads(str(np.load(_GOLDEN / f'{name}.npz')['shapes']))
    arrays = golden_networks.make_arrays(shapes)
  safetensors_numpy.save_file(arrays, path)
  return str(path)


def write_dino(folder: pathlib.Path, seed: int = 0) -> dict[str, object]:
  """Writes a DINO for the discriminator, as Hugging Face has it.

  Args:
    folder: where to; it is created.
    seed: of the weights.

  Returns:
    Fields of a config that build a discriminator on it.
  """
  folder.mkdir(parents=True, exist_ok=True)
  width, mlp_dim = _DINO['width'], _DINO['mlp_dim']
  content = {
      'model_type': 'vit', 'hidden_size': width,
      'num_hidden_layers': _DINO['depth'],
      'num_attention_heads': _DINO['num_heads'],
      'intermediate_size': mlp_dim, 'patch_size': _PATCH, 'image_size': _SIDE,
      'hidden_act': 'gelu', 'layer_norm_eps': 1e-12,
  }
  (folder / 'config.json').write_text(json.dumps(content))
  shapes = {
      'embeddings.cls_token': (1, 1, width),
      'embeddings.position_embeddings': (
          1, (_SIDE // _PATCH) ** 2 + 1, width
      ),
      'embeddings.patch_embeddings.projection.weight': (
          width, 3, _PATCH, _PATCH
      ),
      'embeddings.patch_embeddings.projection.bias': (width,),
      'layernorm.weight': (width,),
      'layernorm.bias': (width,),
  }
  layers = {
      'attention.attention.query': (width, width),
      'attention.attention.key': (width, width),
      'attention.attention.value': (width, width),
      'attention.output.dense': (width, width),
      'intermediate.dense': (mlp_dim, width),
      'output.dense': (width, mlp_dim),
      'layernorm_before': (width,),
      'layernorm_after': (width,),
  }
  for i in range(_DINO['depth']):
    for name, shape in layers.items():
      shapes[f'encoder.layer.{i}.{name}.weight'] = shape
      shapes[f'encoder.layer.{i}.{name}.bias'] = shape[:1]
  rng = np.random.default_rng(seed)
  arrays = {
      name: np.float32(rng.normal(0, 0.3, shape))
      for name, shape in shapes.items()
  }
  safetensors_numpy.save_file(arrays, folder / 'model.safetensors')
  sizes = ', '.join(f'{name}={size}' for name, size in _DINO.items())
  return {
      'discriminator.name': 'dino',
      'discriminator.dino.checkpoint': str(folder),
      'discriminator.dino.architecture': (
          f'dino({sizes}, patch_size={_PATCH})'
      ),
      'discriminator.dino.image_size': (_SIDE, _SIDE),
      'discriminator.dino.blocks': (0, 1),
      'discriminator.dino.kernel_size': 3,
  }


def _draw_lpips(network: str, seed: int) -> dict[str, np.ndarray]:
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(
      lpips.Lpips(network).init, jax.random.key(0), images, images
  )['params']
  rng = np.random.default_rng(seed)
  arrays = {}
  for key, leaf in traverse_util.flatten_dict(params, sep='/').items():
    deviation = np.float32((2 / np.prod((1, *leaf.shape[:-1]))) ** 0.5)
    draw = rng.standard_normal(leaf.shape, np.float32)
    arrays[key] = np.abs(draw) if 'head' in key else deviation * draw
  return arrays
