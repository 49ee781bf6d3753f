"""Settings of the process that trains: memory, compiled programs."""

import contextlib
import ctypes
import pathlib

import jax

# Of malloc.h.
_M_TOP_PAD = -2
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
  """Has glibc reuse freed memory where the CPU does the work.

  XLA's CPU backend allocates and frees the buffers of every step, and glibc
  gives large ones back to the kernel each time: fetching their pages again
  takes a third of a small step. This takes all memory from one heap and keeps
  256 MiB of it. Without glibc, as on macOS, nothing changes.
  """
  if jax.default_backend() != 'cpu':
    return
  with contextlib.suppress(AttributeError, OSError, TypeError):
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TOP_PAD, 2**28)


def use_compilation_cache(folder: str) -> None:
  """Keeps compiled programs in a folder for later runs; '' does not."""
  if folder:
    path = str(pathlib.Path(folder).expanduser())
    jax.config.update('jax_compilation_cache_dir', path)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
