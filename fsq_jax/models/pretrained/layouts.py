"""Where the checkpoints of each family keep each of our parameters."""

from collections.abc import Mapping
import re
from typing import NamedTuple

from einops import rearrange
import jax
import numpy as np

from fsq_jax.models.pretrained import architectures


class Place(NamedTuple):
  """Where one parameter is, and how its axes are arranged there.

  Attributes:
    key: of the array, without the checkpoint's prefix; '{i}' is the block.
    pattern: for einops, from the array's axes to ours.
    part: which of the stacked arrays, of the first axis of what the pattern
      gives, is ours; None where all of it is.
  """

  key: str
  pattern: str
  part: int | None = None


_TOKEN = '1 1 d -> d'
_SIGLIP = {
    'patches': 'embeddings.patch_embedding',
    'positions': Place('embeddings.position_embedding.weight', 'n d -> n d'),
    'attention_norm': 'encoder.layers.{i}.layer_norm1',
    'attention/query': 'encoder.layers.{i}.self_attn.q_proj',
    'attention/key': 'encoder.layers.{i}.self_attn.k_proj',
    'attention/value': 'encoder.layers.{i}.self_attn.v_proj',
    'attention/out': 'encoder.layers.{i}.self_attn.out_proj',
    'mlp_norm': 'encoder.layers.{i}.layer_norm2',
    'mlp/in': 'encoder.layers.{i}.mlp.fc1',
    'mlp/out': 'encoder.layers.{i}.mlp.fc2',
    'norm': 'post_layernorm',
}
_MAE = {
    'patches': 'embeddings.patch_embeddings.projection',
    'class_token': Place('embeddings.cls_token', _TOKEN),
    'class_position': Place(
        'embeddings.position_embeddings', '1 n d -> n d', part=0
    ),
    'positions': Place('embeddings.position_embeddings', '1 n d -> n d'),
    'attention_norm': 'encoder.layer.{i}.layernorm_before',
    'attention/query': 'encoder.layer.{i}.attention.attention.query',
    'attention/key': 'encoder.layer.{i}.attention.attention.key',
    'attention/value': 'encoder.layer.{i}.attention.attention.value',
    'attention/out': 'encoder.layer.{i}.attention.output.dense',
    'mlp_norm': 'encoder.layer.{i}.layernorm_after',
    'mlp/in': 'encoder.layer.{i}.intermediate.dense',
    'mlp/out': 'encoder.layer.{i}.output.dense',
    'norm': 'layernorm',
}
_RAE_DECODER = {
    'embed': 'decoder_embed',
    'class_token': Place('trainable_cls_token', _TOKEN),
    'class_position': Place('decoder_pos_embed', '1 n d -> n d', part=0),
    'positions': Place('decoder_pos_embed', '1 n d -> n d'),
    'norm': 'decoder_norm',
    'pixels': 'decoder_pred',
    # The blocks are ViT-MAE's.
    **{
        name: place.replace('encoder.layer.', 'decoder_layers.')
        for name, place in _MAE.items()
        if name.startswith(('attention', 'mlp'))
    },
}
_DINOV2 = {
    **_MAE,
    'registers': Place('embeddings.register_tokens', '1 r d -> r d'),
    'attention_norm': 'encoder.layer.{i}.norm1',
    'attention_scale': Place(
        'encoder.layer.{i}.layer_scale1.lambda1', 'd -> d'
    ),
    'mlp_norm': 'encoder.layer.{i}.norm2',
    'mlp/in': 'encoder.layer.{i}.mlp.fc1',
    'mlp/out': 'encoder.layer.{i}.mlp.fc2',
    'mlp_scale': Place('encoder.layer.{i}.layer_scale2.lambda1', 'd -> d'),
}
_IN = 'encoder.layer.{i}.mlp.weights_in'
_DINOV2_GATED = {
    'mlp/gate/kernel': Place(f'{_IN}.weight', '(s m) d -> s d m', part=0),
    'mlp/gate/bias': Place(f'{_IN}.bias', '(s m) -> s m', part=0),
    'mlp/in/kernel': Place(f'{_IN}.weight', '(s m) d -> s d m', part=1),
    'mlp/in/bias': Place(f'{_IN}.bias', '(s m) -> s m', part=1),
    'mlp/out': 'encoder.layer.{i}.mlp.weights_out',
}
_DINOV3 = {
    'patches': 'embeddings.patch_embeddings',
    'class_token': Place('embeddings.cls_token', _TOKEN),
    'registers': Place('embeddings.register_tokens', '1 r d -> r d'),
    'attention_norm': 'layer.{i}.norm1',
    'attention/query': 'layer.{i}.attention.q_proj',
    'attention/key': 'layer.{i}.attention.k_proj',
    'attention/value': 'layer.{i}.attention.v_proj',
    'attention/out': 'layer.{i}.attention.o_proj',
    'attention_scale': Place('layer.{i}.layer_scale1.lambda1', 'd -> d'),
    'mlp_norm': 'layer.{i}.norm2',
    'mlp/gate': 'layer.{i}.mlp.gate_proj',
    'mlp/in': 'layer.{i}.mlp.up_proj',
    'mlp/out': 'layer.{i}.mlp.down_proj',
    'mlp_scale': Place('layer.{i}.layer_scale2.lambda1', 'd -> d'),
    'norm': 'norm',
}
_HUGGING_FACE = {
    'siglip': _SIGLIP,
    'dino': _MAE,
    'dinov2': _DINOV2,
    'dinov2_with_registers': _DINOV2,
    'dinov3': _DINOV3,
    'mae': _MAE,
    'rae_decoder': _RAE_DECODER,
}
_BIG_VISION = {
    'patches': 'embedding',
    'positions': Place('pos_embedding', '1 n d -> n d'),
    'attention_norm': 'LayerNorm_0',
    'attention': 'MultiHeadDotProductAttention_0',
    'mlp_norm': 'LayerNorm_1',
    'mlp/in': 'MlpBlock_0/Dense_0',
    'mlp/out': 'MlpBlock_0/Dense_1',
    'norm': 'Transformer/encoder_norm',
}


def find_place(
    family: str, architecture: architectures.Architecture, parameter: str
) -> Place:
  """Finds a parameter in the checkpoints of a family.

  Args:
    family: a key of `architectures.FAMILIES`, or 'rae_decoder'.
    architecture: of the checkpoint.
    parameter: its path, such as 'blocks/attention/query/kernel'.
  """
  name = parameter.removeprefix('blocks/')
  if family == 'siglip_big_vision':
    return _find_in_big_vision(name, in_block=name != parameter)
  names = _HUGGING_FACE[family]
  if family.startswith('dinov2') and architecture.mlp == 'gated':
    names = {**names, **_DINOV2_GATED}
  place = names.get(name)
  if isinstance(place, Place):
    return place
  module, leaf = name.rsplit('/', 1)
  if leaf == 'kernel':
    patches = module == 'patches'
    pattern = 'd c p q -> (p q c) d' if patches else 'o i -> i o'
    return Place(f'{names[module]}.weight', pattern)
  suffix = {'scale': 'weight', 'bias': 'bias'}[leaf]
  return Place(f'{names[module]}.{suffix}', 'd -> d')


def _find_in_big_vision(name: str, in_block: bool) -> Place:
  if name == 'positions':
    return _BIG_VISION[name]
  module, leaf = name.rsplit('/', 1)
  pattern = 'i o -> i o' if leaf == 'kernel' else 'd -> d'
  if module == 'patches':
    if leaf == 'kernel':
      pattern = 'p q c d -> (p q c) d'
  elif module.startswith('attention/'):
    module, role = module.split('/')
    if role == 'out':
      pattern = {'kernel': 'h k d -> (h k) d', 'bias': 'd -> d'}[leaf]
    else:
      pattern = {'kernel': 'd h k -> d (h k)', 'bias': 'h k -> (h k)'}[leaf]
    leaf = f'{role}/{leaf}'
  block = 'Transformer/encoderblock_{i}/' if in_block else ''
  return Place(f'{block}{_BIG_VISION[module]}/{leaf}', pattern)


def stored_shape(
    place: Place,
    shape: tuple[int, ...],
    architecture: architectures.Architecture,
) -> tuple[int, ...]:
  """Shape of the array that holds a parameter of the given shape.

  Args:
    place: from `find_place`.
    shape: of the parameter, or of what the pattern gives where `part` is None.
    architecture: of the checkpoint.
  """
  ours = place.pattern.split(' -> ')[1]
  if place.part is not None:
    # Class token and patches share one array; gate and input share another.
    shape = (2, *shape)
  theirs = place.pattern.split(' -> ')[0]
  sizes = _sizes(place.pattern, architecture)
  return jax.eval_shape(
      lambda x: rearrange(x, f'{ours} -> {theirs}', **sizes),
      jax.ShapeDtypeStruct(shape, np.float32),
  ).shape


def arrange(
    place: Place,
    array: np.ndarray,
    architecture: architectures.Architecture,
) -> np.ndarray:
  """Arranges an array of a checkpoint as the parameter that it holds."""
  sizes = _sizes(place.pattern, architecture)
  array = rearrange(array, place.pattern, **sizes)
  return array if place.part is None else array[place.part]


def _sizes(
    pattern: str, architecture: architectures.Architecture
) -> Mapping[str, int]:
  """Sizes of the axes that a pattern merges or splits."""
  p = architecture.patch_size
  sizes = {'p': p, 'q': p, 's': 2, 'h': architecture.num_heads}
  merged = set(''.join(re.findall(r'\((.*?)\)', pattern)).split())
  return {axis: n for axis, n in sizes.items() if axis in merged}
