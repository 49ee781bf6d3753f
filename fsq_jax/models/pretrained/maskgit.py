"""Loads the weights of MaskGIT's VQGAN from its published checkpoints.

Keys and shapes are taken from the public code: of the Flax checkpoints from
github.com/google-research/maskgit (`maskgit/nets/vqgan_tokenizer.py`), and of
the PyTorch port `MaskGitVQGAN` from github.com/huggingface/open-muse
(`muse/modeling_maskgit_vqgan.py`). No published file was tried.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import os
import pathlib
import re
from typing import Any, NamedTuple

from flax import traverse_util
import jax

from fsq_jax.models import autoencoder
from fsq_jax.models.pretrained import files as weight_files
from fsq_jax.models.pretrained import parameters

# Of images in the published models.
PIXEL_RANGE = (0.0, 1.0)
_KERNEL = 'o i h w -> h w i o'
# First bytes of a zip archive and of a pickle, the formats of torch.save.
_PICKLES = re.compile(rb'PK\x03\x04|\x80[\x02-\x05]')
# The header of a safetensors file is JSON after its length, 8 bytes.
_SAFETENSORS = re.compile(rb'.{8}\{', re.DOTALL)
# Keys of VQGANs of another architecture, and their names.
_OTHERS = {
    'encoder.conv_blocks.0.res.0.conv1.weight': "LlamaGen's VQ",
    'encoder.down_blocks.0.resnets.0.conv1.weight': "diffusers' VQModel",
    'quant_conv.weight': "a VQGAN of taming-transformers' architecture",
}


class _Part(NamedTuple):
  """Sizes of an encoder or decoder that determine the names of its layers."""

  num_levels: int
  num_res_blocks: int


def load_variables(
    path: str | os.PathLike[str],
    model: autoencoder.Autoencoder,
    abstract: Mapping[str, Any],
) -> dict[str, Any]:
  """Loads all variables of a model of MaskGIT's architecture.

  Args:
    path: a Flax checkpoint (msgpack) of google-research/maskgit, or weights of
      the PyTorch port: a safetensors file, or a directory with
      model.safetensors.
    model: `ConvEncoder`, `VectorQuantizer` with codebook_update 'gradient', and
      `ConvDecoder`, without projectors.
    abstract: shapes and shardings of its variables, which are parameters.

  Returns:
    The variables, float32.

  Raises:
    ValueError: a file that is missing, corrupted, a pickle, or of another
      model; keys that are missing, unexpected, or of another shape are listed.
  """
  flat = traverse_util.flatten_dict(dict(abstract), sep='/')
  shapes = {name: x.shape for name, x in flat.items()}
  sizes = {
      part: _Part(len(x.channel_multipliers), x.num_res_blocks)
      for part, x in (('encoder', model.encoder), ('decoder', model.decoder))
  }
  with _open(pathlib.Path(path).expanduser()) as weights:
    find = _layout_of(weights)
    places = {name: find(name.split('/'), sizes) for name in shapes}
    parameters.check_arrays(
        weights, places, shapes, part='config',
        is_unexpected=lambda _: True,
        advice=(
            'The file is corrupted, or of other sizes than the model section of'
            ' the config.'
        ),
    )
    variables = {}
    for name, x in flat.items():
      value = parameters.read_parameter(weights, places[name], x.shape)
      variables[name] = jax.make_array_from_callback(
          x.shape, x.sharding, lambda index, value=value: value[index]
      )
  return traverse_util.unflatten_dict(variables, sep='/')


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[weight_files.WeightFiles]:
  """Opens a file of either format, recognized by its first bytes."""
  if os.path.isdir(path):
    opened = weight_files.open_weights(path)
  else:
    if not os.path.isfile(path):
      raise ValueError(
          f'There is no {path}; give a Flax checkpoint of'
          ' google-research/maskgit, or a safetensors file.'
      )
    with open(path, 'rb') as file:
      start = file.read(9)
    if _PICKLES.match(start):
      raise ValueError(
          f'{path} is a pickle of PyTorch, which can run any code and is never'
          ' read; save its tensors as safetensors.'
      )
    if _SAFETENSORS.match(start):
      opened = weight_files.open_file(path)
    else:
      opened = weight_files.open_flax(path)
  with opened as weights:
    yield weights


_Find = Callable[[list[str], Mapping[str, _Part]], parameters.Place]


def _layout_of(weights: weight_files.WeightFiles) -> _Find:
  """Returns the function from our names of parameters to their places."""
  keys = weights.headers
  for key, name in _OTHERS.items():
    if key in keys:
      raise ValueError(
          f'{weights.source} has the key {key!r} of {name}, which the conv'
          ' encoder and decoder cannot express (fsq_jax/tokenizer/README.md);'
          " allowed: MaskGIT's VQGAN."
      )
  if 'params/encoder/Conv_0/kernel' in keys:
    return _flax_place
  if 'encoder.conv_in.weight' in keys:
    return _torch_place
  raise ValueError(
      f"{weights.source} holds neither 'params/encoder/Conv_0/kernel' nor"
      " 'encoder.conv_in.weight', so it is no checkpoint of MaskGIT's VQGAN;"
      f' its first keys are {sorted(keys)[:5]}.'
  )


def _flax_place(
    name: list[str], sizes: Mapping[str, _Part]
) -> parameters.Place:
  """Returns the place of a parameter in google-research/maskgit's layout.

  Modules are numbered in the order of their calls, blocks through all levels.
  """
  _, part, *layers, leaf = name
  if part == 'quantizer':
    return parameters.Place('params/quantizer/codebook')
  keys = ['params', part]
  for layer in layers:
    kind, *numbers = _parse(layer)
    levels, blocks = sizes[part]
    match kind, *numbers:
      case ('input',):
        key = 'Conv_0'
      case ('latents',):
        key = 'Conv_1'
      case ('pixels',):
        key = f'Conv_{levels}'
      case 'upsample', level:
        key = f'Conv_{levels - level}'
      case 'level', level, i:
        if part == 'decoder':
          level = levels - level  # After the first blocks.
        key = f'ResBlock_{level * blocks + i}'
      case 'first', i:
        key = f'ResBlock_{i}'
      case 'final', i:
        key = f'ResBlock_{levels * blocks + i}'
      case 'norm', *i:
        key = f'GroupNorm_{i[0] if i else 0}'
      case 'conv', i:
        key = f'Conv_{i}'
      case ('shortcut',):
        key = 'Conv_2'
    keys.append(key)
  return parameters.Place('/'.join([*keys, leaf]))


def _torch_place(
    name: list[str], sizes: Mapping[str, _Part]
) -> parameters.Place:
  """Returns the place of a parameter in the layout of the PyTorch port."""
  del sizes
  _, part, *layers, leaf = name
  if part == 'quantizer':
    return parameters.Place('quantize.embedding.weight')
  keys = [part]
  for layer in layers:
    match _parse(layer):
      case ('input',):
        key = 'conv_in'
      case ('latents',) | ('pixels',):
        key = 'conv_out'
      case 'upsample', level:
        key = f'up.{level}.upsample_conv'
      case 'level', level, i:
        side = {'encoder': 'down', 'decoder': 'up'}[part]
        key = f'{side}.{level}.block.{i}'
      case ('first' | 'final'), i:
        key = f'mid.{i}'
      case ('norm',):
        key = 'norm_out'
      case ('norm' | 'conv') as kind, i:
        key = f'{kind}{i + 1}'
      case ('shortcut',):
        key = 'nin_shortcut'
    keys.append(key)
  keys.append('bias' if leaf == 'bias' else 'weight')
  return parameters.Place('.'.join(keys), _KERNEL if leaf == 'kernel' else None)


def _parse(layer: str) -> tuple[str | int, ...]:
  """Splits 'level_2_block_1' into ('level', 2, 1), 'norm' into ('norm',)."""
  kind = re.match('[a-z]+', layer)[0]
  if layer.endswith('_upsample'):
    kind = 'upsample'
  return kind, *map(int, re.findall('[0-9]+', layer))
