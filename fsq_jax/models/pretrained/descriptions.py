"""The architecture of a checkpoint, from its config.json or its shapes."""

import collections
from collections.abc import Iterator, Mapping
import contextlib
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
# Defaults of transformers, which a vision_config leaves out.
_SIGLIP_DEFAULTS = {
    'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 12,
    'intermediate_size': 3072, 'patch_size': 16, 'image_size': 224,
    'hidden_act': 'gelu_pytorch_tanh',
}
# Fields of the biases, by the dense layers of `architectures.BIASES`.
_BIASES = dict.fromkeys(('query', 'key', 'value'), 'qkv_bias')
_DINOV3_BIASES = {
    'query': 'query_bias', 'key': 'key_bias', 'value': 'value_bias',
    'out': 'proj_bias', 'mlp': 'mlp_bias',
}
# Sizes that no model has would fail in other ways than by a ValueError.
_MAX_NUMBER = 10**6
_KINDS = {
    int: ((int,), f'an integer from 0 to {_MAX_NUMBER}'),
    float: ((int, float), f'a number from 0 to {_MAX_NUMBER}'),
    bool: ((bool,), 'true or false'),
}
# Patches of an image times channels; position embeddings are made for them.
_MAX_CHANNELS = 2**28


class Description(NamedTuple):
  """The model that a checkpoint holds.

  Attributes:
    family: a key of `architectures.FAMILIES`, or 'rae_decoder'.
    architecture: its sizes and variants.
    image_size: side in pixels of the images that it was trained on.
    scanned: whether blocks are stacked along the first axis of one array.
    input_width: channels of a decoder's latents; None for encoders.
  """

  family: str
  architecture: architectures.Architecture
  image_size: int
  scanned: bool = False
  input_width: int | None = None

  @property
  def num_positions(self) -> int:
    """Rows of the position embedding: class token and patches."""
    grid = self.image_size // self.architecture.patch_size
    return self.architecture.num_class_tokens + grid**2


def describe_config(config: Mapping[str, Any], source: str) -> Description:
  """Describes a Hugging Face encoder.

  Args:
    config: the content of config.json.
    source: path of config.json, for messages.

  Raises:
    ValueError: an unknown model type, or fields with unusable values.
  """
  with _errors_name(source):
    family = _choose(config, 'model_type', _MODEL_TYPES)
    if family == 'siglip':
      vision = config.get('vision_config', config)
      if not isinstance(vision, Mapping):
        raise ValueError(f'vision_config is {vision!r}; it must be an object.')
      config = {**_SIGLIP_DEFAULTS, **vision}
    fields = _read_fields(config, family)
    if family in ('dinov2', 'dinov2_with_registers'):
      ratio = _read(config, 'mlp_ratio', float)
      fields['mlp_dim'] = int(fields['width'] * ratio)
      if _read(config, 'use_swiglu_ffn', bool, False):
        # Two thirds in each half, rounded up to a multiple of 8.
        mlp_dim = (int(fields['mlp_dim'] * 2 / 3) + 7) // 8 * 8
        fields.update(mlp='gated', activation='silu', mlp_dim=mlp_dim)
    else:
      fields['mlp_dim'] = _read(config, 'intermediate_size', int)
    if family == 'dinov3':
      fields['rope_theta'] = _read(config, 'rope_theta', float)
      if _read(config, 'use_gated_mlp', bool, False):
        fields['mlp'] = 'gated'
    num_registers = _read(
        config, 'num_register_tokens', int,
        architectures.FAMILIES[family]['num_registers'],
    )
    if num_registers and not family.startswith('dinov'):
      raise ValueError(
          f'num_register_tokens is {num_registers}; models of the family'
          f' {family!r} have none.'
      )
    fields['num_registers'] = num_registers
    return _describe(family, fields, _read(config, 'image_size', int))


def describe_decoder(config: Mapping[str, Any], source: str) -> Description:
  """Describes a decoder of RAE, whose config.json is ViT-MAE's.

  Args:
    config: the content of config.json.
    source: path of config.json, for messages.

  Raises:
    ValueError: another model type, or fields with unusable values.
  """
  with _errors_name(source):
    _choose(config, 'model_type', {'vit_mae': 'mae'})
    fields = _read_fields(config, 'mae', prefix='decoder_')
    fields['mlp_dim'] = _read(config, 'decoder_intermediate_size', int)
    return _describe(
        'mae', fields, _read(config, 'image_size', int)
    )._replace(
        family='rae_decoder', input_width=_read(config, 'hidden_size', int)
    )


def describe_big_vision(weights: weight_files.WeightFiles) -> Description:
  """Describes the image tower of a big_vision SigLIP checkpoint by its shapes.

  Raises:
    ValueError: arrays with the sizes of the model are missing or have fewer
      axes.
  """
  keys = list(weights.headers)
  found = [re.match(r'(|.*/)Transformer/encoderblock(_\d+)?/', k) for k in keys]
  counts = collections.Counter(match[1] for match in found if match)
  if not counts:
    raise ValueError(
        f'{weights.source} has no keys like img/Transformer/encoderblock_0/...'
        f' of a big_vision image tower, but {keys[:5]} ...'
    )
  # Copies in an optimizer state have longer prefixes.
  prefix = min(counts, key=lambda p: (-counts[p], len(p)))
  indices = {match[2] for match in found if match and match[1] == prefix}
  scanned = None in indices
  block = 'Transformer/encoderblock' + ('' if scanned else '_0')

  def size(key: str, axis: int) -> int:
    header = weights.headers.get(prefix + key)
    if header is None or len(header.shape) < -axis:
      raise ValueError(
          f'It needs an array {prefix + key} of {-axis} axes or more; the file'
          ' is corrupted or no big_vision SigLIP.'
      )
    return header.shape[axis]

  with _errors_name(weights.source):
    query = f'{block}/MultiHeadDotProductAttention_0/query/kernel'
    fields = {
        'width': size('embedding/kernel', -1),
        'depth': (
            size(query, -4)
            if scanned
            else 1 + max(int(index[1:]) for index in indices)
        ),
        'num_heads': size(query, -2),
        'mlp_dim': size(f'{block}/MlpBlock_0/Dense_0/kernel', -1),
        'patch_size': size('embedding/kernel', -4),
    }
    side = math.isqrt(size('pos_embedding', -2)) * fields['patch_size']
    return _describe('siglip_big_vision', fields, side)._replace(
        scanned=scanned
    )


def check_image_size(
    image_size: tuple[int, int], architecture: architectures.Architecture
) -> None:
  """Checks that images have patches, and that memory can hold their positions.

  Args:
    image_size: (height, width) in pixels.
    architecture: of the model that takes or makes the images.

  Raises:
    ValueError: sides below a patch, or too many patches.
  """
  patch, width = architecture.patch_size, architecture.width
  if min(image_size) < patch:
    raise ValueError(
        f'image_size is {image_size}; both sides must be at least those of a'
        f' patch, which has {patch} pixels a side.'
    )
  num_patches = math.prod(side // patch for side in image_size)
  if num_patches * width > _MAX_CHANNELS:
    raise ValueError(
        f'image_size is {image_size}, that is, {num_patches} patches of'
        f' {width} channels; at most {_MAX_CHANNELS // width} can be held.'
    )


@contextlib.contextmanager
def _errors_name(source: str) -> Iterator[None]:
  """Adds the source of a description to the messages of its errors."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{source} describes no known model. {error}') from error


def _describe(
    family: str, fields: Mapping[str, Any], image_size: int
) -> Description:
  architecture = architectures.build_architecture(family, **fields)
  check_image_size((image_size, image_size), architecture)
  return Description(family, architecture, image_size)


def _read_fields(
    config: Mapping[str, Any], family: str, prefix: str = ''
) -> dict[str, Any]:
  """Reads the fields of `Architecture` that all config.json have."""
  if config.get('num_channels', 3) != 3:
    raise ValueError(
        f'num_channels is {config["num_channels"]!r}; it must be 3.'
    )
  fields = {
      'width': _read(config, f'{prefix}hidden_size', int),
      'depth': _read(config, f'{prefix}num_hidden_layers', int),
      'num_heads': _read(config, f'{prefix}num_attention_heads', int),
      'patch_size': _read(config, 'patch_size', int),
      'activation': _choose(config, 'hidden_act', _ACTIVATIONS),
  }
  if 'layer_norm_eps' in config:
    fields['norm_epsilon'] = _read(config, 'layer_norm_eps', float)
  names = _DINOV3_BIASES if family == 'dinov3' else _BIASES
  defaults = architectures.FAMILIES[family]['biases']
  fields['biases'] = tuple(
      layer
      for layer in architectures.BIASES
      if _read(config, names.get(layer), bool, layer in defaults)
  )
  return fields


def _choose(
    config: Mapping[str, Any], name: str, table: Mapping[str, str]
) -> str:
  value = config.get(name)
  if not isinstance(value, str) or value not in table:
    raise ValueError(f'{name} is {value!r}; known: {sorted(table)}.')
  return table[value]


def _read(
    config: Mapping[str, Any],
    name: str | None,
    kind: type,
    default: Any = None,
) -> Any:
  """Returns a number or a flag; ranges are checked where it is used."""
  value = config.get(name, default)
  types, allowed = _KINDS[kind]
  # By type itself: a bool is an int, and the string 'false' is true.
  if type(value) not in types or not 0 <= value <= _MAX_NUMBER:
    raise ValueError(f'{name} is {value!r}; it must be {allowed}.')
  return kind(value)
