"""Process-wide settings: malloc, compilation cache, profiler."""

from collections.abc import Sequence
import contextlib
import ctypes
import pathlib
from typing import Any

import jax

# Constants of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
  """Makes glibc reuse freed memory if the CPU is the accelerator.

  XLA's CPU backend allocates and frees the buffers of every step, and glibc
  returns large ones to the kernel each time: page faults then take a fifth of a
  step of 400 MiB. This keeps up to 2 GiB of free memory per heap. Only the heap
  of the main thread takes large buffers, so CPU computations are dispatched
  synchronously: with one CPU device the thread that calls them executes them.
  Call it before JAX is initialized. Without glibc, as on macOS, this has no
  effect; on hosts of accelerators only the few computations on the CPU become
  synchronous.
  """
  with contextlib.suppress(AttributeError, OSError, TypeError):
    set_option = ctypes.CDLL(None).mallopt
    jax.config.update('jax_cpu_enable_async_dispatch', False)
    if jax.default_backend() == 'cpu':
      set_option(_M_MMAP_MAX, 0)
      set_option(_M_TRIM_THRESHOLD, 2**31 - 1)
      set_option(_M_TOP_PAD, 2**28)


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
