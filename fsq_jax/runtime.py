"""Settings of the process that trains: memory, compiled programs, signals."""

from collections.abc import Iterator, Sequence
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import signal
import threading
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

# Longer than one process can be busy with its part.
_PATIENCE_MS = 30 * 24 * 3600 * 1000
# Numbers of the barriers that all processes have passed.
_barriers = itertools.count()


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


def join_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
  """Makes this one of several processes that train together.

  Call it before anything asks for devices. Without arguments, JAX finds them
  where it knows the environment: Cloud TPU, SLURM, Open MPI, Kubernetes.

  Args:
    coordinator_address: host:port of process 0.
    num_processes: how many there are.
    process_id: this one's number, in [0, num_processes).

  Raises:
    ValueError: the environment does not say, or the others do not answer.
  """
  given = (coordinator_address, num_processes, process_id)
  if any(x is not None for x in given) and None in given:
    raise ValueError(
        'Of coordinator_address, num_processes and process_id, given as'
        f' {given}, all are needed, or none where JAX can find them.'
    )
  if jax.config.jax_platforms in (None, '', 'cpu'):
    # Read by the CPU backend alone, which has no other between processes.
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(*given)
  except (RuntimeError, ValueError) as error:
    raise ValueError(
        f'The processes cannot be joined ({str(error).strip()}); give the same'
        ' --coordinator_address=HOST:PORT and --num_processes to each, and to'
        ' each its --process_id.'
    ) from error


class PeerError(RuntimeError):
  """Another of several processes has failed."""


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
  """Ends all of several processes where the body fails in one of them.

  Otherwise the others would wait for it, in what they compute together. All
  have to come here, and the body must compute nothing together.

  Raises:
    PeerError: the body has failed in another process alone.
  """
  error = None
  try:
    yield
  except Exception as caught:
    error = caught
    if jax.process_count() > 1:
      logging.error('%s Waits for the other processes.', error)
  failed = gather(np.array(error is not None))
  if error is not None:
    raise error
  if failed.any():
    raise PeerError(
        f'Stopped because process {failed.argmax()} has failed, whose output'
        ' says why.'
    )


def is_any(value: bool) -> bool:
  """Whether a value is true in any of the processes, which all call this."""
  return bool(gather(np.array(value)).any())


def gather(x: np.ndarray) -> np.ndarray:
  """Returns [processes, ...], the arrays of all processes, which all call this.

  However late the last one comes.

  Args:
    x: an array of the same shape and dtype in each.
  """
  if jax.process_count() == 1:
    return x[None]
  # Collectives of CPUs wait half a minute for the others, which may take hours.
  wait = ocp.multihost.get_barrier_sync_fn()
  wait(key=f'fsq_jax_{next(_barriers)}', timeout_ms=_PATIENCE_MS)
  return multihost_utils.process_allgather(x)


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


class StopRequest:
  """Whether a signal has asked the run to stop.

  Of several processes, one that is asked stops them all, after the same step,
  if they take steps together.

  Attributes:
    together: whether they do.
  """

  def __init__(self, *, together: bool = True):
    self._asked = threading.Event()
    self.together = together and jax.process_count() > 1

  def ask(self) -> None:
    """Asks this process, or with others all of them, to stop."""
    self._asked.set()
    if self.together:
      # JAX passes this signal on to the other processes.
      os.kill(os.getpid(), signal.SIGTERM)

  def is_due(self, step: int | None = None) -> bool:
    """Whether to stop now.

    Args:
      step: steps taken; None between steps, where several processes never
        stop: they agree on the number of a step, which Orbax asks for too.
        They have to call this after every step.
    """
    if not self.together:
      return self._asked.is_set()
    return (
        step is not None and multihost_utils.reached_preemption_sync_point(step)
    )


@contextlib.contextmanager
def catch_signals(*, together: bool = True) -> Iterator[StopRequest]:
  """Turns the first SIGTERM or SIGINT into a request; a second one kills.

  Among several processes that take steps together SIGTERM is caught by JAX, and
  a second one does nothing.

  Args:
    together: whether several processes take steps together.
  """
  request = StopRequest(together=together)
  if threading.current_thread() is not threading.main_thread():
    yield request  # Python delivers signals to the main thread only.
    return
  previous = {}

  def stop(number: int, _) -> None:
    logging.warning(
        '%s: stopping as soon as all is saved. Once more stops at once.',
        signal.Signals(number).name,
    )
    for caught in previous:
      signal.signal(caught, signal.SIG_DFL)
    request.ask()

  caught = [signal.SIGINT]
  if not request.together:
    caught.append(signal.SIGTERM)
  for number in caught:
    previous[number] = signal.signal(number, stop)
  try:
    yield request
  finally:
    for number, handler in previous.items():
      # None was set by JAX, and is not to be had back.
      signal.signal(number, handler or signal.SIG_DFL)
