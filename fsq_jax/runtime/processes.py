"""Several processes: joining, collectives on the host, errors of peers."""

from collections.abc import Iterator
import contextlib
import itertools

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

# Longer than one process can be busy with its part.
_PATIENCE_MS = 30 * 24 * 3600 * 1000
# Numbers of the barriers that all processes have passed.
_barriers = itertools.count()


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
