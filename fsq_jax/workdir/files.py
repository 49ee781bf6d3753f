"""The folder of a run: names of its files, lock, reading, atomic writes."""

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import itertools
import json
import math
import os
import pathlib
import socket
from typing import Any, BinaryIO
import uuid

from absl import logging

from fsq_jax.workdir import urls

CONFIG = 'config.json'
QUANTIZER = 'quantizer.json'
RUN = 'run.json'
METRICS = 'metrics.jsonl'
EVALUATION = 'evaluation.json'
CODEBOOK = 'codebook.json'
REPORT = 'report.html'
CHECKPOINTS = 'checkpoints'
DAMAGED = 'damaged'
LOCK = '.lock'
RECONSTRUCTIONS = 'reconstructions'
SAMPLES = 'samples'
REFERENCES = 'reference_statistics'
TENSORBOARD = 'tensorboard'
TRACKERS = 'trackers.json'
PROFILE = 'profile'


def create(
    path: str | os.PathLike[str], flag: str = '--workdir'
) -> pathlib.Path:
  """Creates the folder of a run and checks that it is writable.

  Args:
    path: the folder; parents are created, too.
    flag: flag of the folder, for messages.

  Returns:
    The absolute path.

  Raises:
    ValueError: the path is a file or a URL, or the folder is not writable.
  """
  folder = urls.local_path(path, flag).absolute()
  if folder.is_file():
    raise ValueError(f'{folder} is a file; give a folder with {flag}.')
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.probe-{os.getpid()}'
    probe.touch()
    # A process of another host may have the same id and unlink it first.
    probe.unlink(missing_ok=True)
  except OSError as error:
    raise ValueError(
        f'{folder} cannot be written ({error.strerror}); give another folder'
        f' with {flag}.'
    ) from error
  return folder


@contextlib.contextmanager
def lock(folder: pathlib.Path, flag: str = '--workdir') -> Iterator[None]:
  """Locks the folder of a run against writes of a second run.

  The lock is released when the process ends, however it ends. It holds between
  hosts if the file system supports that (NFS 4, and Lustre with flock).

  Args:
    folder: the run's folder.
    flag: flag of the folder, for messages.

  Raises:
    ValueError: another process holds the lock.
  """
  with open(folder / LOCK, 'a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      # The file is empty until the holder has written its name.
      holder = file.read().strip() or 'another process'
      raise ValueError(
          f'{folder} is being written by {holder}; wait until that run has'
          f' ended, or give another {flag}.'
      ) from error
    except OSError as error:
      logging.warning(
          '%s cannot be locked (%s): another run could write there, too.',
          folder, error.strerror,
      )
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield
    file.truncate(0)


def unused(path: pathlib.Path) -> pathlib.Path:
  """Returns the path, with a number appended if it exists."""
  numbers = itertools.count(2)
  candidate = path
  while candidate.exists():
    candidate = path.with_name(f'{path.name}_{next(numbers)}')
  return candidate


def read_json(path: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Reads a JSON object; returns None if there is no such file.

  Raises:
    ValueError: the file cannot be read, or is not a JSON object.
  """
  try:
    value = json.loads(pathlib.Path(path).read_text('utf-8'))
    if not isinstance(value, dict):
      raise ValueError('it is not a JSON object')
  except FileNotFoundError:
    return None
  except (OSError, RecursionError, ValueError) as error:
    raise ValueError(f'{path} cannot be read: {error}.') from error
  return value


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """Opens a file for writing that appears under its name when it is complete.

  Args:
    path: of the file, in an existing folder; an earlier file is replaced.

  Yields:
    The open file. If the body raises, nothing is left of it.
  """
  path = pathlib.Path(path)
  # A random name, since processes of other hosts may have the same id; cut,
  # since file systems limit the length of names.
  name = os.fsdecode(os.fsencode(path.name)[:200])
  temporary = path.with_name(f'.{name}.{uuid.uuid4().hex}.tmp')
  try:
    with open(temporary, 'wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file atomically."""
  with open_atomic(path) as file:
    file.write(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes JSON values atomically; non-finite numbers become null."""
  text = json.dumps(finite_or_null(value), indent=2, allow_nan=False)
  write_bytes(path, (text + '\n').encode())


def finite_or_null(value: Any) -> Any:
  """Returns a tree of dicts and lists with None for non-finite floats."""
  if isinstance(value, Mapping):
    return {str(k): finite_or_null(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [finite_or_null(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
