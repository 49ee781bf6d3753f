"""Checks of the fields and integer arguments of quantizers."""

from collections.abc import Iterable, Sequence
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Mesh axes over which replicas hold parts of the batch, as collectives take
# them.
AxisName = str | tuple[str, ...] | None


def validated_integer(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf
) -> int:
  """Returns an integer from `low` to `high` as an int, or raises ValueError."""
  if (
      isinstance(value, bool)
      or not isinstance(value, numbers.Integral)
      or not low <= value <= high
  ):
    bound = f' to {high}' if math.isfinite(high) else ' or more'
    bound = f', {low}{bound}' if math.isfinite(low) else ''
    raise ValueError(f'{name} is {value!r}; use an integer{bound}.')
  return int(value)


def set_integers(
    quantizer: Any, *names: str, low: float, high: float = math.inf
) -> None:
  """Checks fields that hold integers; NumPy integers become ints."""
  for name in names:
    value = validated_integer(name, getattr(quantizer, name), low, high)
    setattr(quantizer, name, value)


def set_numbers(quantizer: Any, *names: str, low: float = 0) -> None:
  """Checks fields that hold finite numbers >= `low`; they become floats.

  A NumPy scalar would set the dtype of its products with arrays.
  """
  for name in names:
    value = getattr(quantizer, name)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
      number = float(value) if is_number else math.nan
    except OverflowError:  # The integer is too large.
      number = math.nan
    if not math.isfinite(number) or number < low:
      bound = f', {low:g} or more' if math.isfinite(low) else ''
      raise ValueError(f'{name} is {value!r}; use a finite number{bound}.')
    setattr(quantizer, name, number)


def check_name(name: str, value: Any, known: Iterable[str]) -> None:
  """Raises ValueError unless `value` is one of the known names."""
  # A list, since a set raises TypeError for values that cannot be hashed.
  if value not in list(known):
    raise ValueError(f'{name} is {value!r}; known: {sorted(known)}.')


def validated_axis_name(axis_name: str | Sequence[str] | None) -> AxisName:
  """Returns a field `axis_name`, a list as a tuple, or raises ValueError."""
  names = (axis_name,) if isinstance(axis_name, str) else axis_name
  if names is None:
    return None
  if (
      not isinstance(names, (list, tuple))
      or not names
      or not all(isinstance(name, str) and name for name in names)
  ):
    raise ValueError(
        f'axis_name is {axis_name!r}; use None, the name of an axis, or a tuple'
        ' of names.'
    )
  return axis_name if isinstance(axis_name, str) else tuple(names)


def as_integers(x: jax.Array, name: str) -> jax.Array:
  """Returns indices with at least 32 bits; sums of them do not overflow.

  Args:
    x: integers of any shape and width, on the device or the host; other dtypes
      raise ValueError. Integers beyond int32 become -2, which is no valid
      index.
    name: name of x in the error.
  """
  if not isinstance(x, jax.Array):
    x = np.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f'{name} are {x.dtype}; use an integer dtype.')
  if isinstance(x, np.ndarray) and x.dtype.itemsize > 4:
    # JAX would keep the low 32 bits, which may look like a valid index.
    x = np.where((x >= -1) & (x < 2**31), x.astype(np.int64), -2)
  x = jnp.asarray(x)
  return x.astype(jnp.int32) if x.dtype.itemsize < 4 else x
