"""What architecture a checkpoint has, by its config.json or by its shapes."""

import collections
from collections.abc import Mapping, Sequence
import math
import re
from typing import Any, NamedTuple

from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import files as weight_files

_MODEL_TYPES = {
    'siglip': 'siglip',
    'siglip_vision_model': 'siglip',
    'vit': 'dino',
    'dinov2': 'dinov2',
    'dinov2_with_registers': 'dinov2_with_registers',
    'dinov3_vit': 'dinov3',
    'vit_mae': 'mae',
}
_ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'silu': 'silu',
}
# What a vision_config leaves out, since it is the default of transformers.
_SIGLIP_DEFAULTS = {
    'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 12,
    'intermediate_size': 3072, 'patch_size': 16, 'image_size': 224,
    'hidden_act': 'gelu_pytorch_tanh',
}
_MAX_COUNT = 10**6
# Channels of all patches of an image; positions are made for so many.
_MAX_CHANNELS = 2**28


class Description(NamedTuple):
  """What is in a checkpoint.

  Attributes:
    family: a key of `architectures.FAMILIES`, or 'rae_decoder'.
    architecture: the rest of it.
    image_size: pixels a side that the weights are for.
    scanned: whether blocks are stacked along the first axis of one array.
    input_width: channels of a decoder's latents; None for encoders.
  """

  family: str
  architecture: architectures.Architecture
  image_size: int
  scanned: bool
  input_width: int | None = None


def describe_config(config: Mapping[str, Any], source: str) -> Description:
  """Describes a Hugging Face checkpoint.

  Args:
    config: the content of config.json.
    source: of it, for messages.

  Raises:
    ValueError: another kind of model, or fields of another kind.
  """
  family = _choose(config, 'model_type', _MODEL_TYPES, source)
  if family == 'siglip':
    vision = config.get('vision_config', config)
    if not isinstance(vision, Mapping):
      raise ValueError(
          f'vision_config of {source} is {vision!r}; it must be an object.'
      )
    config = {**_SIGLIP_DEFAULTS, **vision}

  def count(name: str) -> int:
    return _number(config, name, source, int)

  _check_channels(config, source)
  fields = {
      'width': count('hidden_size'),
      'depth': count('num_hidden_layers'),
      'num_heads': count('num_attention_heads'),
      'patch_size': count('patch_size'),
      'activation': _choose(config, 'hidden_act', _ACTIVATIONS, source),
      'biases': _biases(config, family, source),
  }
  fields.update(_norm_epsilon(config, source))
  if family in ('dinov2', 'dinov2_with_registers'):
    ratio = _number(config, 'mlp_ratio', source, float)
    fields['mlp_dim'] = int(fields['width'] * ratio)
    if not fields['mlp_dim']:
      raise ValueError(
          f'mlp_ratio of {source} is {ratio}, which leaves no channels of'
          f' hidden_size {fields["width"]}.'
      )
    if _flag(config, 'use_swiglu_ffn', source, default=False):
      # Two thirds in each half, rounded up to a multiple of 8.
      mlp_dim = (int(fields['mlp_dim'] * 2 / 3) + 7) // 8 * 8
      fields.update(mlp='gated', activation='silu', mlp_dim=mlp_dim)
  else:
    fields['mlp_dim'] = count('intermediate_size')
  if family == 'dinov3':
    fields['rope_theta'] = _number(config, 'rope_theta', source, float)
    if _flag(config, 'use_gated_mlp', source, default=False):
      fields['mlp'] = 'gated'
  if 'num_register_tokens' in config:
    fields['num_registers'] = _number(
        config, 'num_register_tokens', source, int, least=0
    )
    if fields['num_registers'] and family in (
        'siglip', 'dino', 'mae'
    ):
      raise ValueError(
          f'num_register_tokens of {source} is {fields["num_registers"]};'
          f' models of the family {family!r} have none.'
      )
  architecture = _build(family, fields, source)
  side = count('image_size')
  check_image_size((side, side), architecture, f'image_size of {source}')
  return Description(family, architecture, side, scanned=False)


def describe_decoder(config: Mapping[str, Any], source: str) -> Description:
  """Describes a decoder of RAE, whose config is that of a ViT-MAE.

  Args:
    config: the content of config.json.
    source: of it, for messages.

  Raises:
    ValueError: another kind of model, or fields of another kind.
  """

  def count(name: str) -> int:
    return _number(config, name, source, int)

  _choose(config, 'model_type', {'vit_mae': 'mae'}, source)
  _check_channels(config, source)
  fields = {
      'width': count('decoder_hidden_size'),
      'depth': count('decoder_num_hidden_layers'),
      'num_heads': count('decoder_num_attention_heads'),
      'mlp_dim': count('decoder_intermediate_size'),
      'patch_size': count('patch_size'),
      'activation': _choose(config, 'hidden_act', _ACTIVATIONS, source),
      'biases': _biases(config, 'mae', source),
      **_norm_epsilon(config, source),
  }
  architecture = _build('mae', fields, source)
  side = count('image_size')
  check_image_size((side, side), architecture, f'image_size of {source}')
  return Description(
      'rae_decoder', architecture, side, scanned=False,
      input_width=count('hidden_size'),
  )


def describe_big_vision(weights: weight_files.WeightFiles) -> Description:
  """Describes the image tower of a big_vision SigLIP checkpoint by its shapes.

  Raises:
    ValueError: arrays that tell the shape are missing or of another rank.
  """
  keys = list(weights.headers)
  found = [re.match(r'(|.*/)Transformer/encoderblock(_\d+)?/', k) for k in keys]
  counts = collections.Counter(match[1] for match in found if match)
  if not counts:
    raise ValueError(
        f'{weights.source} has no keys like img/Transformer/encoderblock_0/...'
        f' of a big_vision image tower, but {keys[:5]} ...'
    )
  # The copies in an optimizer's state have the longer prefixes.
  prefix = min(counts, key=lambda p: (-counts[p], len(p)))
  indices = {match[2] for match in found if match and match[1] == prefix}
  scanned = None in indices
  block = f'{prefix}Transformer/encoderblock' + ('' if scanned else '_0')
  patches = _shape(weights, f'{prefix}embedding/kernel', 4)
  positions = _shape(weights, f'{prefix}pos_embedding', 3)
  query = f'{block}/MultiHeadDotProductAttention_0/query/kernel'
  attention = _shape(weights, query, 3 + scanned)
  mlp = _shape(weights, f'{block}/MlpBlock_0/Dense_0/kernel', 2 + scanned)
  grid = math.isqrt(positions[1])
  if grid**2 != positions[1]:
    raise ValueError(
        f'{prefix}pos_embedding of {weights.source} has {positions[1]}'
        ' positions, which are no square grid without class token.'
    )
  try:
    architecture = architectures.build_architecture(
        'siglip_big_vision',
        width=patches[-1],
        depth=(
            attention[0]
            if scanned
            else 1 + max(int(index[1:]) for index in indices)
        ),
        num_heads=attention[-2],
        mlp_dim=mlp[-1],
        patch_size=patches[0],
    )
  except ValueError as error:
    raise ValueError(f'{weights.source} holds no model. {error}') from error
  side = grid * patches[0]
  check_image_size(
      (side, side), architecture, f'image_size of {weights.source}'
  )
  return Description('siglip_big_vision', architecture, side, scanned)


def check_image_size(
    image_size: Sequence[int],
    architecture: architectures.Architecture,
    what: str,
) -> None:
  """Checks that images have patches, and no more than memory has room for.

  Args:
    image_size: (height, width) in pixels.
    architecture: of the model that takes or makes them.
    what: their name, for messages.

  Raises:
    ValueError: sides below a patch, or too many patches.
  """
  patch, width = architecture.patch_size, architecture.width
  if min(image_size) < patch:
    raise ValueError(
        f'{what} is {tuple(image_size)}; both sides must be at least those of a'
        f' patch, which has {patch} pixels a side.'
    )
  num_patches = math.prod(side // patch for side in image_size)
  if num_patches * width > _MAX_CHANNELS:
    raise ValueError(
        f'{what} is {tuple(image_size)}, which are {num_patches} patches of'
        f' {width} channels; at most {_MAX_CHANNELS // width} can be held.'
    )


def find_prefix(
    keys: Sequence[str], expected: Sequence[str], source: str
) -> str:
  """Finds what stands before the keys of the vision tower in a checkpoint.

  Args:
    keys: of the checkpoint.
    expected: keys of the vision tower without a prefix.
    source: of the keys, for messages.

  Returns:
    The prefix under which the most of them are found; the shortest of several.

  Raises:
    ValueError: all are there several times, and nothing tells which to take.
  """
  wanted = set(expected)
  counts = collections.Counter()
  for key in keys:
    for match in re.finditer(r'^|[./]', key):
      if key[match.end():] in wanted:
        counts[key[:match.end()]] += 1
  prefix = min(counts, key=lambda p: (-counts[p], len(p)), default='')
  # The copies in an optimizer's state, of big_vision, have the longer prefixes.
  rivals = [
      p
      for p in counts
      if counts[p] == len(wanted)
      and (len(p) == len(prefix) or not p.endswith('/'))
  ]
  if len(rivals) > 1:
    raise ValueError(
        f'{source} holds the whole model {len(rivals)} times, under keys that'
        f' begin with {sorted(rivals)}; keep one of them.'
    )
  return prefix


def _build(
    family: str, fields: Mapping[str, Any], source: str
) -> architectures.Architecture:
  try:
    return architectures.build_architecture(family, **fields)
  except ValueError as error:
    raise ValueError(f'{source} describes no model. {error}') from error


def _check_channels(config: Mapping[str, Any], source: str) -> None:
  channels = config.get('num_channels', 3)
  if channels != 3:
    raise ValueError(
        f'num_channels of {source} is {channels!r}; only models of 3 channels'
        ' are known.'
    )


def _norm_epsilon(config: Mapping[str, Any], source: str) -> dict[str, float]:
  """The epsilon of LayerNorm, if it is not left to the family."""
  if 'layer_norm_eps' not in config:
    return {}
  return {'norm_epsilon': _number(config, 'layer_norm_eps', source, float)}


def _biases(
    config: Mapping[str, Any], family: str, source: str
) -> tuple[str, ...]:
  """Which dense layers have a bias."""
  if family == 'dinov3':
    fields = {
        'query': 'query_bias', 'key': 'key_bias', 'value': 'value_bias',
        'out': 'proj_bias', 'mlp': 'mlp_bias',
    }
  else:
    fields = dict.fromkeys(('query', 'key', 'value'), 'qkv_bias')
  usual = architectures.FAMILIES[family]['biases']
  return tuple(
      name
      for name in architectures.BIASES
      if _flag(config, fields.get(name), source, default=name in usual)
  )


def _shape(
    weights: weight_files.WeightFiles, key: str, rank: int
) -> tuple[int, ...]:
  """Shape of an array that tells what the model is like."""
  if key not in weights.headers:
    raise ValueError(
        f'{weights.source} lacks {key!r}, which tells the shape of the model;'
        ' the file is damaged or no big_vision SigLIP.'
    )
  shape = weights.headers[key].shape
  if len(shape) != rank or not all(0 < n <= _MAX_COUNT for n in shape):
    raise ValueError(
        f'{key!r} of {weights.source} has the shape {shape}; it must have'
        f' {rank} axes, none of which is empty.'
    )
  return shape


def _choose(
    config: Mapping[str, Any], name: str, table: Mapping[str, str], source: str
) -> str:
  value = config.get(name)
  if not isinstance(value, str) or value not in table:
    raise ValueError(
        f'{name} of {source} is {value!r}; known: {sorted(table)}.'
    )
  return table[value]


def _flag(
    config: Mapping[str, Any], name: str | None, source: str, *, default: bool
) -> bool:
  value = config.get(name, default)
  # The string 'false' would count as true.
  if not isinstance(value, bool):
    raise ValueError(
        f'{name} of {source} is {value!r}; it must be true or false.'
    )
  return value


def _number(
    config: Mapping[str, Any],
    name: str,
    source: str,
    kind: type,
    least: int | None = None,
) -> Any:
  value = config.get(name)
  kinds = (int,) if kind is int else (int, float)
  if (
      isinstance(value, bool)
      or not isinstance(value, kinds)
      or not (0 < value <= _MAX_COUNT or value == least)
  ):
    above = 'above 0' if least is None else f'from {least}'
    raise ValueError(
        f'{name} of {source} is {value!r}; it must be a number of type'
        f' {kind.__name__} {above} and up to {_MAX_COUNT}.'
    )
  return kind(value)
