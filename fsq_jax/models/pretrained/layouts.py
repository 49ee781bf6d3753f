"""Keys and layouts of the parameters in the checkpoints of each family."""

import collections
from collections.abc import Iterable, Mapping
import re

from fsq_jax.models.pretrained import descriptions
from fsq_jax.models.pretrained import files as weight_files
from fsq_jax.models.pretrained.parameters import Place

_TOKEN = '1 1 d -> d'
_SIGLIP = {
    'patches': 'embeddings.patch_embedding',
    'positions': Place(
        'embeddings.position_embedding.weight', 'n d -> n d', slice(None)
    ),
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
    'positions': Place(
        'embeddings.position_embeddings', '1 n d -> n d', slice(1, None)
    ),
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
    'positions': Place('decoder_pos_embed', '1 n d -> n d', slice(1, None)),
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
    'attention_scale': Place('encoder.layer.{i}.layer_scale1.lambda1'),
    'mlp_norm': 'encoder.layer.{i}.norm2',
    'mlp/in': 'encoder.layer.{i}.mlp.fc1',
    'mlp/out': 'encoder.layer.{i}.mlp.fc2',
    'mlp_scale': Place('encoder.layer.{i}.layer_scale2.lambda1'),
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
    'attention_scale': Place('layer.{i}.layer_scale1.lambda1'),
    'mlp_norm': 'layer.{i}.norm2',
    'mlp/gate': 'layer.{i}.mlp.gate_proj',
    'mlp/in': 'layer.{i}.mlp.up_proj',
    'mlp/out': 'layer.{i}.mlp.down_proj',
    'mlp_scale': Place('layer.{i}.layer_scale2.lambda1'),
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
_BLOCK = 'Transformer/encoderblock_{i}'
_ATTENTION = f'{_BLOCK}/MultiHeadDotProductAttention_0'
_BIG_VISION = {
    'patches': 'embedding',
    'positions': Place('pos_embedding', '1 n d -> n d', slice(None)),
    'attention_norm': f'{_BLOCK}/LayerNorm_0',
    'attention/query': f'{_ATTENTION}/query',
    'attention/key': f'{_ATTENTION}/key',
    'attention/value': f'{_ATTENTION}/value',
    'attention/out': f'{_ATTENTION}/out',
    'mlp_norm': f'{_BLOCK}/LayerNorm_1',
    'mlp/in': f'{_BLOCK}/MlpBlock_0/Dense_0',
    'mlp/out': f'{_BLOCK}/MlpBlock_0/Dense_1',
    'norm': 'Transformer/encoder_norm',
}
_BIG_VISION_PATTERNS = {
    'patches/kernel': 'p q c d -> (p q c) d',
    'attention/out/kernel': 'h k d -> (h k) d',
}
for _name in ('query', 'key', 'value'):
  _BIG_VISION_PATTERNS[f'attention/{_name}/kernel'] = 'd h k -> d (h k)'
  _BIG_VISION_PATTERNS[f'attention/{_name}/bias'] = 'h k -> (h k)'


def find_places(
    description: descriptions.Description,
    names: Iterable[str],
    weights: weight_files.WeightFiles,
) -> tuple[dict[str, Place], str]:
  """Returns the places of parameters in a checkpoint.

  Args:
    description: of the checkpoint.
    names: paths of the parameters, such as 'blocks/attention/query/kernel'.
    weights: the checkpoint.

  Returns:
    The place of each parameter, and the common prefix of their keys.

  Raises:
    ValueError: the checkpoint has too few arrays, or holds the model several
      times.
  """
  depth = description.architecture.depth
  if depth > len(weights.headers):
    raise ValueError(
        f'{weights.source} has {len(weights.headers)} arrays, too few for'
        f' {depth} blocks: it is corrupted, or its config.json is of another'
        ' model.'
    )
  places = {name: _find_place(description, name) for name in names}
  keys = {
      place.key.replace('{i}', str(i))
      for place in places.values()
      for i in range(depth)
  }
  prefix = _find_prefix(weights, keys)
  return {
      name: place._replace(key=prefix + place.key)
      for name, place in places.items()
  }, prefix


def _find_place(description: descriptions.Description, name: str) -> Place:
  """Returns the place of a parameter, without the prefix of a checkpoint."""
  arch = description.architecture
  name = name.removeprefix('blocks/')
  if description.family == 'siglip_big_vision':
    place = _find_in_big_vision(name, description.scanned)
  else:
    names = _HUGGING_FACE[description.family]
    if names is _DINOV2 and arch.mlp == 'gated':
      names = {**names, **_DINOV2_GATED}
    place = _find_in_hugging_face(name, names)
  sizes = {
      'n': description.num_positions, 'h': arch.num_heads, 's': 2,
      'p': arch.patch_size, 'q': arch.patch_size,
  }
  axes = re.findall(r'\w+', place.pattern or '')
  return place._replace(
      sizes={axis: size for axis, size in sizes.items() if axis in axes}
  )


def _find_in_hugging_face(
    name: str, names: Mapping[str, Place | str]
) -> Place:
  if isinstance(place := names.get(name), Place):
    return place
  module, leaf = name.rsplit('/', 1)
  if leaf != 'kernel':
    suffix = {'scale': 'weight', 'bias': 'bias'}[leaf]
    return Place(f'{names[module]}.{suffix}')
  patches = module == 'patches'
  pattern = 'd c p q -> (p q c) d' if patches else 'o i -> i o'
  return Place(f'{names[module]}.weight', pattern)


def _find_in_big_vision(name: str, scanned: bool) -> Place:
  if isinstance(place := _BIG_VISION.get(name), Place):
    return place
  module, leaf = name.rsplit('/', 1)
  key = f'{_BIG_VISION[module]}/{leaf}'
  pattern = _BIG_VISION_PATTERNS.get(name)
  if scanned and '{i}' in key:
    key = key.replace('_{i}', '')
    if pattern is not None:
      pattern = ' -> '.join(f'l {axes}' for axes in pattern.split(' -> '))
  return Place(key, pattern)


def _find_prefix(weights: weight_files.WeightFiles, expected: set[str]) -> str:
  """Returns the prefix under which most of the expected keys are found.

  The shortest of several.

  Raises:
    ValueError: all keys are found under several prefixes.
  """
  counts = collections.Counter()
  for key in weights.headers:
    for match in re.finditer(r'^|[./]', key):
      if key[match.end():] in expected:
        counts[key[:match.end()]] += 1
  prefix = min(counts, key=lambda p: (-counts[p], len(p)), default='')
  # Copies in an optimizer state of big_vision have longer prefixes.
  rivals = [
      p
      for p in counts
      if counts[p] == len(expected)
      and (len(p) == len(prefix) or not p.endswith('/'))
  ]
  if len(rivals) > 1:
    raise ValueError(
        f'{weights.source} holds the whole model {len(rivals)} times, under'
        f' keys that begin with {sorted(rivals)}; keep one of them.'
    )
  return prefix
