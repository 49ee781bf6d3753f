"""Process-wide settings: malloc, compilation cache, profiler."""

from collections.abc import Sequence
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import pathlib
from typing import Any

import jax

# Constants of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_freed_memory() -> None:
  """Makes glibc reuse freed memory if the CPU is the accelerator.

  XLA's CPU backend allocates and frees the buffers of every step, and glibc
  returns large ones to the kernel each time: page faults then take a fifth of a
  step of 400 MiB. This allocates everything from one heap and keeps up to 2 GiB
  of free memory. Call it before JAX starts its threads, which otherwise get
  heaps of their own that are too small for large buffers. If JAX may find an
  accelerator, threads keep their heaps, since threads that decode images would
  contend for one. Without glibc, as on macOS, this has no effect.
  """
  with contextlib.suppress(AttributeError, OSError, TypeError):
    library = ctypes.CDLL(None)
    if _has_cpu_alone():
      library.mallopt(_M_ARENA_MAX, 1)
    if jax.default_backend() == 'cpu':
      library.mallopt(_M_MMAP_MAX, 0)
      library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
      library.mallopt(_M_TOP_PAD, 2**28)


def _has_cpu_alone() -> bool:
  """Whether JAX only finds CPUs; asking JAX itself would start its threads."""
  if platforms := jax.config.jax_platforms:
    return platforms == 'cpu'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return not plugins and importlib.util.find_spec('libtpu') is None


def use_compilation_cache(folder: str) -> None:
  """Sets the folder of JAX's persistent compilation cache; '' disables it."""
  if folder:
    path = str(pathlib.Path(folder).expanduser())
    jax.config.update('jax_compilation_cache_dir', path)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


class Profiler:
  """Traces a range of training steps into a folder for xprof."""

  def __init__(self, folder: pathlib.Path, steps: Sequence[int]):
    """Does not trace before `start`.

    Args:
      folder: folder of the trace.
      steps: (first, last) step to trace; () traces none.
    """
    self._folder = folder
    self._steps = steps
    self._is_tracing = False

  def start(self, step: int) -> None:
    """Starts tracing if the next step is in the range."""
    if self._is_tracing or not self._steps:
      return
    if self._steps[0] <= step <= self._steps[1]:
      jax.profiler.start_trace(self._folder)
      self._is_tracing = True

  def stop(self, step: int, results: Any) -> None:
    """Stops tracing after the last step, once its results are ready."""
    if self._is_tracing and step == self._steps[1]:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Stops tracing."""
    if self._is_tracing:
      jax.profiler.stop_trace()
      self._is_tracing = False
