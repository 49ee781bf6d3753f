"""Compiled functions of many shapes, with a cache of bounded size."""

import collections
from collections.abc import Callable
import pathlib
from typing import Any

import jax
import numpy as np

# Executables kept per function; the batches of tiles of a ViT need fewer.
_MAX_SHAPES = 32


class TooLargeError(ValueError):
  """A call needs more memory than is free; nothing was computed."""


class Compiled:
  """A function of variables and arrays, compiled once per shape of the arrays.

  Executables of the most recently used shapes are kept. `jax.jit` would keep
  all of them and fill the memory if images have many sizes.
  """

  def __init__(
      self,
      function: Callable[..., Any],
      *,
      max_shapes: int = _MAX_SHAPES,
      **jit_options: Any,
  ):
    """Functions are compiled on first call.

    Args:
      function: function of variables (a tree of arrays) and of arrays or None.
      max_shapes: number of executables to keep.
      **jit_options: options of `jax.jit`.
    """
    self._function = function
    self._max_shapes = max_shapes
    self._jit_options = jit_options
    self._executables = collections.OrderedDict()

  def __call__(self, variables: Any, *arrays: Any) -> Any:
    """Calls the function, compiled for the shapes of these arrays.

    Raises:
      TooLargeError: the device has too little free memory.
    """
    key = tuple(
        None if x is None else (x.shape, np.dtype(x.dtype)) for x in arrays
    )
    jitted = self._executables.pop(key, None)
    if jitted is None:
      # A new function, so that JAX drops its caches together with it.
      jitted = jax.jit(
          lambda *arguments: self._function(*arguments), **self._jit_options
      )
      check_memory(jitted, variables, arrays)
      while len(self._executables) >= self._max_shapes:
        self._executables.popitem(last=False)
    # The dict is ordered by last use.
    self._executables[key] = jitted
    return jitted(variables, *arrays)


def is_out_of_memory(error: Exception) -> bool:
  """Whether an error of JAX, NumPy or `Compiled` means lack of memory."""
  return isinstance(error, TooLargeError | MemoryError) or (
      isinstance(error, jax.errors.JaxRuntimeError)
      and 'RESOURCE_EXHAUSTED' in str(error)
  )


def check_memory(
    jitted: jax.stages.Wrapped, variables: Any, arrays: tuple[Any, ...]
) -> None:
  """Checks that the device has enough free memory for a call.

  Linux grants more memory than there is, and kills the process that uses it.

  Args:
    jitted: function to call.
    variables: its first argument.
    arrays: its other arguments, arrays or None.

  Raises:
    TooLargeError: the call would need more memory than is free.
  """
  free = free_bytes()
  if free is None:
    return
  memory = jitted.lower(variables, *arrays).compile().memory_analysis()
  if memory is None:
    return
  needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
  if needed > free:
    shapes = ', '.join(str(list(x.shape)) for x in arrays if x is not None)
    raise TooLargeError(
        f'Arrays of {shapes} need {needed / 2**30:.1f} GiB of memory on the'
        f' device, which has {free / 2**30:.1f} GiB free; use smaller images'
        ' (data.resize_shorter), or a device with more memory.'
    )


def free_bytes() -> int | None:
  """Returns the free bytes of the first local device; None if unknown."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats and 'bytes_in_use' in stats:
    return stats['bytes_limit'] - stats['bytes_in_use']
  if device.platform != 'cpu':
    return None
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
  except OSError:
    return None
  sizes = dict(line.split(':') for line in lines)
  free = int(sizes['MemAvailable'].split()[0]) * 1024
  try:
    # A container may have less memory than the machine.
    limit, used = (
        int(pathlib.Path('/sys/fs/cgroup', name).read_text())
        for name in ('memory.max', 'memory.current')
    )
  except (OSError, ValueError):  # There is no cgroup, or the limit is 'max'.
    return free
  return min(free, limit - used)
