"""Parameters in checkpoints: each one found, checked, and read."""

from collections.abc import Mapping
import math
import re
from typing import NamedTuple

from einops import rearrange
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.models import resampling
from fsq_jax.models.pretrained import descriptions
from fsq_jax.models.pretrained import files as weight_files
from fsq_jax.models.pretrained import layouts

_POSITIONS = ('positions', 'class_position')


class Source(NamedTuple):
  """One parameter, where it is, and the shape that it must have there.

  Attributes:
    parameter: its path, such as 'blocks/mlp/in/kernel'.
    shape: of the parameter.
    place: how the arrays of the checkpoint are arranged.
    keys: of these arrays, one or one for each block.
    stored_shape: that each of them must have.
  """

  parameter: str
  shape: tuple[int, ...]
  place: layouts.Place
  keys: list[str]
  stored_shape: tuple[int, ...]


def find_sources(
    shapes: Mapping[str, tuple[int, ...]],
    description: descriptions.Description,
    weights: weight_files.WeightFiles,
    *,
    part: str,
    unused: re.Pattern[str] | None,
) -> list[Source]:
  """Finds all parameters in a checkpoint's headers, or says what is off.

  Args:
    shapes: of the parameters, by path.
    description: of the checkpoint.
    weights: its files.
    part: what the parameters are, for messages.
    unused: keys, without their prefix, that may be there beside them. Without
      a prefix so may all that begin otherwise than theirs, such as a text
      tower. None lets nothing be there but what has another prefix.

  Raises:
    ValueError: keys that are missing, unexpected or of another shape, listed.
  """
  depth = description.architecture.depth
  if depth > len(weights.headers):
    raise ValueError(
        f'{weights.source} has {len(weights.headers)} arrays, too few for'
        f' {depth} blocks: it is damaged, or described by another model\'s'
        ' config.json.'
    )
  sources = [
      _find_source(name, shape, description) for name, shape in shapes.items()
  ]
  expected = [key for source in sources for key in source.keys]
  prefix = descriptions.find_prefix(
      list(weights.headers), expected, weights.source
  )
  sources = [
      source._replace(keys=[prefix + key for key in source.keys])
      for source in sources
  ]
  _check(sources, prefix, weights, part, unused)
  return sources


def _find_source(name: str, shape, description) -> Source:
  """Finds where a parameter is, without the prefix of the checkpoint."""
  architecture = description.architecture
  place = layouts.find_place(description.family, architecture, name)
  if name in _POSITIONS:
    grid = description.image_size // architecture.patch_size
    tokens = architecture.num_class_tokens + grid**2
    stored = layouts.stored_shape(
        place._replace(part=None), (tokens, architecture.width), architecture
    )
    return Source(name, shape, place, [place.key], stored)
  if not name.startswith('blocks/'):
    stored = layouts.stored_shape(place, shape, architecture)
    return Source(name, shape, place, [place.key], stored)
  stored = layouts.stored_shape(place, shape[1:], architecture)
  if description.scanned:
    key = place.key.replace('_{i}', '')
    return Source(name, shape, place, [key], (shape[0], *stored))
  keys = [place.key.format(i=i) for i in range(shape[0])]
  return Source(name, shape, place, keys, stored)


def _check(sources, prefix, weights, part, unused) -> None:
  """Raises one error that names all keys which are not as they should be."""
  headers = weights.headers
  shapes = {key: s.stored_shape for s in sources for key in s.keys}
  # Without a prefix, the text tower and others stand beside the vision tower.
  roots = {re.split('[./]', key)[0] for key in shapes}
  strict = bool(prefix) or unused is None

  def is_unexpected(key: str) -> bool:
    if key in shapes or not key.startswith(prefix):
      return False
    if not strict and re.split('[./]', key)[0] not in roots:
      return False
    return unused is None or not unused.match(key.removeprefix(prefix))

  misfits = weight_files.list_misfits(headers, shapes, is_unexpected)
  if misfits:
    raise ValueError(
        f'The {part} of {weights.source} does not fit its description:'
        f' {misfits}. The file is damaged, or of another model.'
    )


def read_source(
    source: Source,
    description: descriptions.Description,
    grid_size: tuple[int, int],
    weights: weight_files.WeightFiles,
) -> np.ndarray:
  """Reads one parameter.

  Args:
    source: from `find_sources`.
    description: of the checkpoint.
    grid_size: rows and columns that positions are resampled to.
    weights: files of the checkpoint.

  Returns:
    The parameter, float32; blocks are stacked along the first axis.

  Raises:
    ValueError: a damaged file.
  """
  architecture = description.architecture
  if source.parameter == 'positions':
    stored = layouts.arrange(
        source.place, weights.read(source.keys[0]), architecture
    )[architecture.num_class_tokens:]
    side = math.isqrt(len(stored))
    return resampling.resize_grid(
        rearrange(stored, '(h w) c -> h w c', h=side),
        grid_size,
        architecture.position_kernel,
    )
  if not source.parameter.startswith('blocks/'):
    array = weights.read(source.keys[0])
    return layouts.arrange(source.place, array, architecture)
  value = np.empty(source.shape, np.float32)
  for i in range(architecture.depth):
    # Scanned checkpoints have one array for all blocks.
    if i < len(source.keys):
      array = weights.read(source.keys[i])
    block = array[i] if description.scanned else array
    value[i] = layouts.arrange(source.place, block, architecture)
  return value


def place_value(
    value: np.ndarray, sharding: jax.sharding.Sharding | None
) -> jax.Array:
  """Puts a parameter on the default device, or each shard on its own."""
  if sharding is None:
    return jnp.asarray(value)
  return jax.make_array_from_callback(
      value.shape, sharding, lambda index: value[index]
  )
