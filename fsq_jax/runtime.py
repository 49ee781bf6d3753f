"""Settings of the process that trains: memory, compiled programs, signals."""

from collections.abc import Iterator
import contextlib
import ctypes
import pathlib
import signal
import threading

from absl import logging
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
  otherwise have heaps of their own, too small for large buffers. Without
  glibc, as on macOS, nothing changes.
  """
  with contextlib.suppress(AttributeError, OSError, TypeError):
    library = ctypes.CDLL(None)
    library.mallopt(_M_ARENA_MAX, 1)
    if jax.default_backend() == 'cpu':
      library.mallopt(_M_MMAP_MAX, 0)
      library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
      library.mallopt(_M_TOP_PAD, 2**28)


def use_compilation_cache(folder: str) -> None:
  """Keeps compiled programs in a folder for later runs; '' does not."""
  if folder:
    path = str(pathlib.Path(folder).expanduser())
    jax.config.update('jax_compilation_cache_dir', path)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@contextlib.contextmanager
def catch_signals() -> Iterator[threading.Event]:
  """Turns the first SIGTERM or SIGINT into an event; a second one kills."""
  stop_requested = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stop_requested  # Python delivers signals to the main thread only.
    return
  previous = {}

  def request_stop(number: int, _) -> None:
    stop_requested.set()
    logging.warning(
        '%s: saving after this step, then stopping. Once more stops at once.',
        signal.Signals(number).name,
    )
    for caught in previous:
      signal.signal(caught, signal.SIG_DFL)

  for number in (signal.SIGTERM, signal.SIGINT):
    previous[number] = signal.signal(number, request_stop)
  try:
    yield stop_requested
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
