"""Lock of a run's folder in an object store: an object that is renewed."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import socket
import threading
import time
import uuid

from absl import logging

from fsq_jax.workdir import object_store

# Seconds between renewals, and seconds without one after which a lock counts as
# left behind by a process that was killed.
RENEWAL = 10.0
PATIENCE = 60.0


@contextlib.contextmanager
def hold(path: pathlib.Path, folder: pathlib.Path, flag: str) -> Iterator[None]:
  """Holds the lock during the body.

  The object is created, renewed every `RENEWAL` seconds and deleted on the
  condition that no other process has written it. An existing lock is watched
  for `PATIENCE` seconds and taken over if it is not renewed meanwhile. Thus a
  process that was stopped for longer may lose its lock; it notices at its next
  conditional write. Token files have none: the same command writes the same
  bytes.

  Args:
    path: of the lock.
    folder: that it locks, for messages.
    flag: flag of the folder, for messages.

  Raises:
    OSError: the store cannot be read or written.
    ValueError: another process holds the lock.
  """
  lease = _Lease(path, _acquire(path, folder, flag))
  thread = threading.Thread(target=lease.renew, daemon=True)
  thread.start()
  try:
    yield
  finally:
    lease.stopped.set()
    thread.join()
    lease.release()


def _acquire(path: pathlib.Path, folder: pathlib.Path, flag: str) -> int:
  """Creates or takes over the lock; returns its generation."""
  content, generation = object_store.read_version(path)
  holder = content.decode(errors='replace').partition('\n')[0]
  if generation:
    logging.warning(
        '%s is locked by %s. Waiting for up to %d s to see whether it is still'
        ' running.', folder, holder, PATIENCE,
    )
    deadline = time.monotonic() + PATIENCE
    current = generation
    while current == generation and time.monotonic() < deadline:
      time.sleep(min(RENEWAL, PATIENCE) / 4)
      _, current = object_store.read_version(path)
    if current not in (0, generation):
      raise ValueError(_explain(folder, holder, flag))
    generation = current
  try:
    return object_store.write(path, _content(), generation)
  except object_store.ConflictError as error:
    raise ValueError(_explain(folder, 'another process', flag)) from error


def _explain(folder: pathlib.Path, holder: str, flag: str) -> str:
  return (
      f'{folder} is being written by {holder}; wait until that run has ended,'
      f' or give another {flag}.'
  )


def _content() -> bytes:
  holder = f'process {os.getpid()} on {socket.gethostname()}'
  # Every version differs, so that a repeated write is recognized.
  return f'{holder}\n{uuid.uuid4().hex}\n'.encode()


class _Lease:
  """A lock that this process holds."""

  def __init__(self, path: pathlib.Path, generation: int):
    self.stopped = threading.Event()
    self._path = path
    self._generation: int | None = generation

  def renew(self) -> None:
    """Renews the lock until `stopped` is set or the lock is lost."""
    while not self.stopped.wait(RENEWAL):
      try:
        self._generation = object_store.write(
            self._path, _content(), self._generation
        )
      except object_store.ConflictError:
        self._generation = None
        logging.error(
            '%s was taken over by another process: this one was not heard of'
            ' for %d s. Training stops at its next write of metrics.',
            self._path, PATIENCE,
        )
        return
      except OSError as error:
        logging.warning('%s cannot be renewed now: %s', self._path, error)

  def release(self) -> None:
    """Deletes the lock if this process still holds it."""
    if self._generation is None:
      return
    try:
      object_store.delete(self._path, self._generation)
    except OSError as error:
      logging.warning('%s cannot be deleted: %s', self._path, error)
