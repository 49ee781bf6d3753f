"""Settings of the process: memory, compilation cache, profiler."""

from collections.abc import Sequence
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import pathlib
from typing import Any

import jax

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_freed_memory() -> None:
  """Has glibc reuse freed memory where the CPU does the work.

  XLA's CPU backend allocates and frees the buffers of every step, and glibc
  gives large ones back to the kernel each time: fetching their pages again
  takes a fifth of a step of 400 MiB. This takes all memory from one heap and
  keeps up to 2 GiB of it. Call it before JAX starts its threads, which would
  otherwise have heaps of their own, too small for large buffers; they keep
  them where JAX might find an accelerator, since threads that read images
  would wait for each other at one. Without glibc, as on macOS, nothing changes.
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
  """Whether JAX has nothing but CPUs; asking it would start its threads."""
  if platforms := jax.config.jax_platforms:
    return platforms == 'cpu'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return not plugins and importlib.util.find_spec('libtpu') is None


def use_compilation_cache(folder: str) -> None:
  """Keeps compiled programs in a folder for later runs; '' does not."""
  if folder:
    path = str(pathlib.Path(folder).expanduser())
    jax.config.update('jax_compilation_cache_dir', path)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


class Profiler:
  """Traces the steps that are to be traced, into a folder for xprof."""

  def __init__(self, folder: pathlib.Path, steps: Sequence[int]):
    """Traces nothing yet.

    Args:
      folder: for the trace.
      steps: (first, last), or () for none.
    """
    self._folder = folder
    self._steps = steps
    self._is_tracing = False

  def start(self, step: int) -> None:
    """Starts if the step that comes is one of them."""
    if self._is_tracing or not self._steps:
      return
    if self._steps[0] <= step <= self._steps[1]:
      jax.profiler.start_trace(self._folder)
      self._is_tracing = True

  def stop(self, step: int, results: Any) -> None:
    """Stops after the last of them, when its results are there."""
    if self._is_tracing and step == self._steps[1]:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Stops in any case."""
    if self._is_tracing:
      jax.profiler.stop_trace()
      self._is_tracing = False
