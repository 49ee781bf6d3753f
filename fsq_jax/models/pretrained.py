"""Pretrained vision transformers, loaded from published checkpoints."""

from collections.abc import Callable, Mapping
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from einops import rearrange
from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.models import pretrained_vit
from fsq_jax.models import resampling
from fsq_jax.models import weight_descriptions
from fsq_jax.models import weight_files
from fsq_jax.models import weight_layouts

# Parts of vision towers that make no tokens: what pools or classifies them,
# masks them, and numbers that follow from others.
_UNUSED = re.compile(
    r'(head|MAPHead_0|pooler|rope_embeddings)[./]'
    r'|embeddings\.(mask_token|position_ids)$'
)
_MAX_LISTED = 20
_POSITIONS = ('positions', 'class_position')

Shardings = Callable[[Any], Any]


class PretrainedEncoder(NamedTuple):
  """An encoder and its weights.

  Attributes:
    module: `module.apply(variables, images)` maps images in [-1, 1] to latents;
      with method='tokens', normalised images to all tokens.
    variables: float32 parameters, those of the blocks stacked.
  """

  module: pretrained_vit.PretrainedVit
  variables: Mapping[str, Any]


class _Source(NamedTuple):
  """One parameter, where it is, and the shape that it must have there."""

  parameter: str
  shape: tuple[int, ...]
  place: weight_layouts.Place
  keys: list[str]
  stored_shape: tuple[int, ...]


def load_encoder(
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int] | None = None,
    final_affine: bool = True,
    *,
    shardings: Shardings | None = None,
) -> PretrainedEncoder:
  """Loads SigLIP, SigLIP 2, DINOv2, DINOv2 with registers, DINOv3 or MAE.

  Args:
    path: a Hugging Face directory (config.json, and model.safetensors or
      model.safetensors.index.json) or a big_vision SigLIP .npz file.
    image_size: pixels a side, or (height, width), that the encoder is to take;
      position embeddings are resampled as the family does it. By default what
      the checkpoint was trained for.
    final_affine: whether the last LayerNorm keeps its scale and bias.
    shardings: from the variables as `jax.ShapeDtypeStruct` to a tree of
      shardings, such as `partitioning.state_shardings` with a mesh and rules.
      Devices then receive their shards, and no device the whole. The host
      holds one parameter at a time.

  Returns:
    The module and its variables.

  Raises:
    ValueError: files that are missing, damaged, or of another kind; the keys
      that are missing, unexpected, or of another shape are listed.
  """
  path = pathlib.Path(path)
  with weight_files.open_weights(path) as weights:
    description = _describe(path, weights)
    module = _build_encoder(description, image_size, final_affine)
    sources = _find_sources(description, weights)
    abstract = _abstract_variables(module)
    targets = jax.tree.map(lambda _: None, abstract)
    if shardings is not None:
      targets = shardings(abstract)
    targets = traverse_util.flatten_dict(targets['params'], sep='/')
    params = {}
    for source in sources:
      if source.parameter in targets:
        value = _read(source, description, module, weights)
        params[source.parameter] = _place(value, targets[source.parameter])
  params = traverse_util.unflatten_dict(params, sep='/')
  return PretrainedEncoder(module, {'params': params})


def build_encoder(
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int] | None = None,
    final_affine: bool = True,
) -> pretrained_vit.PretrainedVit:
  """Builds the module of `load_encoder` and reads no weights.

  Args:
    path: as there; only config.json or the headers of the .npz file are read.
    image_size: as there.
    final_affine: as there.

  Raises:
    ValueError: files that describe no known encoder.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return _build_encoder(_describe(path, None), image_size, final_affine)
  with weight_files.open_weights(path) as weights:
    description = _describe(path, weights)
  return _build_encoder(description, image_size, final_affine)


def _describe(path, weights) -> weight_descriptions.Description:
  if path.is_dir():
    config = path / 'config.json'
    return weight_descriptions.describe_config(
        weight_files.read_json(config), str(config)
    )
  return weight_descriptions.describe_big_vision(weights)


def _build_encoder(
    description, image_size, final_affine
) -> pretrained_vit.PretrainedVit:
  if image_size is None:
    image_size = description.image_size
  if isinstance(image_size, int):
    image_size = (image_size, image_size)
  patch = description.architecture.patch_size
  if len(image_size) != 2 or min(image_size) < patch:
    raise ValueError(
        f'image_size is {tuple(image_size)}; give one or two sides of at least'
        f' a patch, which has {patch} pixels.'
    )
  return pretrained_vit.PretrainedVit(
      architecture=description.architecture,
      image_size=tuple(image_size),
      final_affine=final_affine,
  )


def _abstract_variables(module) -> Any:
  images = jax.ShapeDtypeStruct((1, *module.image_size, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), images)


def _find_sources(description, weights) -> list[_Source]:
  """Finds all parameters in a checkpoint's headers, or says what is off."""
  architecture = description.architecture
  if architecture.depth > len(weights.headers):
    raise ValueError(
        f'{weights.source} has {len(weights.headers)} arrays, too few for'
        f' {architecture.depth} blocks; its config.json is another model\'s.'
    )
  # The final scale and bias are looked for even where they are not used.
  module = _build_encoder(description, None, final_affine=True)
  abstract = traverse_util.flatten_dict(
      _abstract_variables(module)['params'], sep='/'
  )
  sources = [
      _find_source(name, leaf.shape, description)
      for name, leaf in abstract.items()
  ]
  expected = [key for source in sources for key in source.keys]
  prefix = weight_descriptions.find_prefix(list(weights.headers), expected)
  sources = [
      source._replace(keys=[prefix + key for key in source.keys])
      for source in sources
  ]
  _check(sources, prefix, weights)
  return sources


def _find_source(name: str, shape, description) -> _Source:
  """Finds where a parameter is, without the prefix of the checkpoint."""
  architecture = description.architecture
  place = weight_layouts.find_place(description.family, architecture, name)
  if name in _POSITIONS:
    grid = description.image_size // architecture.patch_size
    tokens = architecture.num_class_tokens + grid**2
    stored = weight_layouts.stored_shape(
        place._replace(part=None), (tokens, architecture.width), architecture
    )
    return _Source(name, shape, place, [place.key], stored)
  if not name.startswith('blocks/'):
    stored = weight_layouts.stored_shape(place, shape, architecture)
    return _Source(name, shape, place, [place.key], stored)
  stored = weight_layouts.stored_shape(place, shape[1:], architecture)
  if description.scanned:
    key = place.key.replace('_{i}', '')
    return _Source(name, shape, place, [key], (shape[0], *stored))
  keys = [place.key.format(i=i) for i in range(shape[0])]
  return _Source(name, shape, place, keys, stored)


def _check(sources, prefix, weights) -> None:
  """Raises one error that names all keys which are not as they should be."""
  headers = weights.headers
  shapes = {key: s.stored_shape for s in sources for key in s.keys}
  # Without a prefix, the text tower and others stand beside the vision tower.
  roots = {re.split('[./]', key)[0] for key in shapes} if not prefix else set()
  problems = {
      'missing': [key for key in shapes if key not in headers],
      'unexpected': [
          key
          for key in headers
          if key not in shapes
          and key.startswith(prefix)
          and (prefix or re.split('[./]', key)[0] in roots)
          and not _UNUSED.match(key.removeprefix(prefix))
      ],
      'of another shape': [
          f'{key} is {headers[key].shape} instead of {shape}'
          for key, shape in shapes.items()
          if key in headers and headers[key].shape != tuple(shape)
      ],
      'of another dtype': [
          f'{key} is {headers[key].dtype} instead of one of'
          f' {sorted(weight_files.FLOATS)}'
          for key in shapes
          if key in headers and headers[key].dtype not in weight_files.FLOATS
      ],
  }
  listed = []
  for problem, keys in problems.items():
    if keys:
      more = f' and {len(keys) - _MAX_LISTED} more'
      listed.append(
          f'{len(keys)} {problem}: {", ".join(sorted(keys)[:_MAX_LISTED])}'
          + (more if len(keys) > _MAX_LISTED else '')
      )
  if listed:
    raise ValueError(
        f'The vision tower of {weights.source} does not fit its description:'
        f' {"; ".join(listed)}. The file is damaged, or of another model.'
    )


def _read(source, description, module, weights) -> np.ndarray:
  """Reads one parameter."""
  architecture = description.architecture
  if source.parameter == 'positions':
    stored = weight_layouts.arrange(
        source.place, weights.read(source.keys[0]), architecture
    )[architecture.num_class_tokens:]
    side = math.isqrt(len(stored))
    return resampling.resize_grid(
        rearrange(stored, '(h w) c -> h w c', h=side),
        module.grid_size,
        architecture.position_kernel,
    )
  if not source.parameter.startswith('blocks/'):
    array = weights.read(source.keys[0])
    return weight_layouts.arrange(source.place, array, architecture)
  value = np.empty(source.shape, np.float32)
  for i in range(architecture.depth):
    # Scanned checkpoints have one array for all blocks.
    if i < len(source.keys):
      array = weights.read(source.keys[i])
    block = array[i] if description.scanned else array
    value[i] = weight_layouts.arrange(source.place, block, architecture)
  return value


def _place(value: np.ndarray, sharding: jax.sharding.Sharding | None):
  if sharding is None:
    return jnp.asarray(value)
  return jax.make_array_from_callback(
      value.shape, sharding, lambda index: value[index]
  )
