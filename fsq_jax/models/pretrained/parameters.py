"""Reads parameters from the arrays of a checkpoint, whatever their layout."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from einops import rearrange
import jax
import numpy as np

from fsq_jax.models.pretrained import files as weight_files


class Place(NamedTuple):
  """The array that holds a parameter, and the layout of its axes.

  Attributes:
    key: of the array. With '{i}' it stands for as many arrays as the parameter
      has along its first axis, which i counts.
    pattern: einops pattern from the axes of an array to the axes of the
      parameter (of its part i); None if they are the same.
    part: index into the first axis of the rearranged array; None for all.
    sizes: of axes of the pattern that the parameter's shape does not determine.
  """

  key: str
  pattern: str | None = None
  part: int | slice | None = None
  sizes: Mapping[str, int] = {}


def check_arrays(
    weights: weight_files.WeightFiles,
    places: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    part: str,
    is_unexpected: Callable[[str], bool],
    advice: str,
) -> None:
  """Checks that a checkpoint holds all parameters and nothing unexpected.

  Args:
    weights: the checkpoint.
    places: of the parameters, by their paths.
    shapes: of the parameters, by their paths.
    part: the model or its part, for messages.
    is_unexpected: whether a key that holds no parameter should not be there.
    advice: one sentence for the message.

  Raises:
    ValueError: the keys that are missing, unexpected, or of another shape or
      dtype, listed.
  """
  stored = {
      key: _stored_shape(place, shapes[name])
      for name, place in places.items()
      for key in _keys(place, shapes[name])
  }
  misfits = weight_files.list_misfits(
      weights.headers,
      stored,
      lambda key: key not in stored and is_unexpected(key),
  )
  if misfits:
    raise ValueError(
        f'The arrays of {weights.source} are not those of the {part}:'
        f' {misfits}. {advice}'
    )


def read_parameter(
    weights: weight_files.WeightFiles, place: Place, shape: tuple[int, ...]
) -> np.ndarray:
  """Reads one parameter of a checkpoint that `check_arrays` has accepted.

  Args:
    weights: the checkpoint.
    place: of the parameter.
    shape: of the parameter.

  Returns:
    The parameter, float32.

  Raises:
    ValueError: the array is corrupted, or holds NaN or infinity.
  """

  def read(key: str) -> np.ndarray:
    array = weights.read(key)
    if place.pattern is not None:
      array = rearrange(array, place.pattern, **place.sizes)
    return array if place.part is None else array[place.part]

  if '{i}' not in place.key:
    return read(place.key).reshape(shape)
  value = np.empty(shape, np.float32)
  for i, key in enumerate(_keys(place, shape)):
    value[i] = read(key)
  return value


def _keys(place: Place, shape: tuple[int, ...]) -> list[str]:
  """Returns the keys of all arrays that hold the parameter."""
  if '{i}' not in place.key:
    return [place.key]
  return [place.key.replace('{i}', str(i)) for i in range(shape[0])]


def _stored_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of the array, or arrays, that hold the parameter."""
  if '{i}' in place.key:
    shape = shape[1:]
  if place.pattern is None:
    return shape
  stored, ours = place.pattern.split(' -> ')
  if place.part is not None:
    # The first axis counts the parts.
    first, *rest = ours.split()
    shape = (place.sizes[first], *shape[len(shape) - len(rest):])
  return jax.eval_shape(
      lambda x: rearrange(x, f'{ours} -> {stored}', **place.sizes),
      jax.ShapeDtypeStruct(shape, np.float32),
  ).shape
