"""Multiple processes: joining, collectives on the host, shared errors."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import itertools

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

# Longer than any process computes between two collectives.
_PATIENCE_MS = 30 * 24 * 3600 * 1000
# Numbers of the barriers, the same in all processes.
_barriers = itertools.count()


def join_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
  """Initializes `jax.distributed` for multi-process training.

  Call it before JAX initializes its devices. Without arguments JAX detects them
  on Cloud TPU, SLURM, Open MPI and Kubernetes.

  Args:
    coordinator_address: host:port of process 0.
    num_processes: number of processes.
    process_id: number of this process, in [0, num_processes).

  Raises:
    ValueError: JAX detects no environment, or the processes do not connect.
  """
  given = (coordinator_address, num_processes, process_id)
  if any(x is not None for x in given) and None in given:
    raise ValueError(
        f'coordinator_address, num_processes and process_id are {given}; give'
        ' all of them, or none where JAX detects them.'
    )
  if jax.config.jax_platforms in (None, '', 'cpu'):
    # Only read by the CPU backend, which has no other collectives.
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(*given)
  except (RuntimeError, ValueError) as error:
    raise ValueError(
        f'The processes cannot be joined ({str(error).strip()}); give each the'
        ' same --coordinator_address=HOST:PORT and --num_processes, and its own'
        ' --process_id.'
    ) from error


class PeerError(RuntimeError):
  """Another of several processes has failed."""


def _peer_error(process: int) -> PeerError:
  return PeerError(
      f'Stopped because process {process} has failed; its output says why.'
  )


@contextlib.contextmanager
def fail_together(
    kinds: Sequence[tuple[type[Exception], Callable[[int], Exception]]] = (
        (Exception, _peer_error),
    ),
) -> Iterator[None]:
  """Collective: raises in every process if the body fails in any.

  Otherwise the other processes would wait for the failed one at their next
  collective. Every process has to call this; the body must not compute anything
  collectively.

  Args:
    kinds: in order of severity, a class of errors and a function from the
      number of a process with such an error to the error that processes with no
      or a less severe error raise. The last class covers all errors.

  Raises:
    PeerError: by default, where the body failed in another process only.
  """
  error, severity = None, 0
  try:
    yield
  except Exception as caught:
    error = caught
    fits = [isinstance(caught, kind) for kind, _ in kinds]
    severity = 1 + fits.index(True)
    if jax.process_count() > 1:
      logging.error('%s Waiting for the other processes.', error)
  severities = gather(np.array(severity, np.int32))
  if severity < severities.max():
    _, make_error = kinds[severities.max() - 1]
    raise make_error(int(severities.argmax()))
  if error is not None:
    raise error


def is_any(value: bool) -> bool:
  """Collective: returns the logical OR of the values of all processes."""
  return bool(gather(np.array(value)).any())


def gather(x: np.ndarray) -> np.ndarray:
  """Collective: returns [processes, ...], the arrays of all processes.

  There is no timeout.

  Args:
    x: an array, of the same shape and dtype in every process.
  """
  if jax.process_count() == 1:
    return x[None]
  # CPU collectives time out after half a minute; a process may take hours.
  wait = ocp.multihost.get_barrier_sync_fn()
  wait(key=f'fsq_jax_{next(_barriers)}', timeout_ms=_PATIENCE_MS)
  return multihost_utils.process_allgather(x)
