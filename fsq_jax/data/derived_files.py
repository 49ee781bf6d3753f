"""Files that are made once from a file of a data set, for random access.

They are beside that file or, if its folder is not writable, in a cache folder.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import fcntl
import hashlib
import os
import pathlib
from typing import BinaryIO
import uuid

from absl import logging


def places(path: str, suffix: str, folder: str) -> list[pathlib.Path]:
  """Returns where the derived file of a file may be, the first choice first.

  Args:
    path: of the file, absolute.
    suffix: of the name of the derived file.
    folder: the cache folder; '~' is the home folder.
  """
  digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
  beside = pathlib.Path(path + suffix)
  return [beside, pathlib.Path(folder).expanduser() / f'{digest}_{beside.name}']


@contextlib.contextmanager
def lock(paths: Sequence[pathlib.Path]) -> Iterator[None]:
  """Lets one process at a time make a derived file; other processes wait.

  The lock is released when the process ends, however it ends. It holds between
  hosts if the file system supports that (NFS 4, and Lustre with flock); without
  support there is a warning. If no place can be written, nothing is locked.

  Args:
    paths: from `places`.
  """
  locked = None
  for path in paths:
    with contextlib.suppress(OSError):
      locked = _open_locked(path)
      break
  if locked is None:
    yield
    return
  with locked:
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        os.unlink(locked.name)


def _open_locked(path: pathlib.Path) -> BinaryIO:
  """Opens and locks a file beside a derived file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  place = _hidden(path, 'lock')
  while True:
    file = open(place, 'ab')  # noqa: SIM115
    try:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        logging.info('Waiting for another process that writes %s.', path)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      logging.log_first_n(
          logging.WARNING,
          '%s cannot be locked (%s): several processes may write %s at a time.',
          1, place, error.strerror, path,
      )  # fmt: skip
      return file
    # A process deletes its lock file while others wait for it.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), os.stat(place)):
        return file
    file.close()


def _hidden(path: pathlib.Path, suffix: str) -> pathlib.Path:
  # File systems limit the length of names.
  name = os.fsdecode(os.fsencode(path.name)[:200])
  return path.with_name(f'.{name}.{suffix}')


def write(
    paths: list[pathlib.Path], write_content: Callable[[BinaryIO], None]
) -> pathlib.Path:
  """Writes a file to the first place that can be written, atomically.

  Args:
    paths: from `places`.
    write_content: writes to an open file.

  Returns:
    The path.

  Raises:
    OSError: no place can be written; the message has the error of each.
  """
  errors = []
  for path in paths:
    temporary = _hidden(path, f'{uuid.uuid4().hex}.tmp')
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      with open(temporary, 'xb') as file:
        write_content(file)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
      return path
    except OSError as error:
      errors.append(f'{path}: {error.strerror or error}')
    finally:
      with contextlib.suppress(OSError):
        temporary.unlink()
  raise OSError('; '.join(errors))
