"""Files of runs and tokens: names, lock, reading, atomic writes."""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import fcntl
import itertools
import json
import math
import os
import pathlib
import shutil
import socket
import tempfile
from typing import Any, BinaryIO
import uuid

from absl import logging

from fsq_jax.workdir import object_lock
from fsq_jax.workdir import object_store
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


# Bytes of an unfinished object that are kept in memory.
_SPOOLED = 2**25


def run_folder(
    path: str | os.PathLike[str], name: str = 'workdir'
) -> pathlib.Path:
  """Returns the folder of a run, which need not exist.

  Args:
    path: a local path or gs://BUCKET/X.
    name: flag or argument that has it, for messages.

  Returns:
    The absolute path with `~` expanded; for a URL an `etils.epath.Path`, which
    has the methods of a `pathlib.Path`, except `absolute` and `resolve`.

  Raises:
    ValueError: another URL, or a package for it is not installed.
  """
  if problem := urls.explain(path, name, urls.STORES):
    raise ValueError(problem)
  if is_remote(path):
    return object_store.open_path(urls.normalize(path), name)
  return pathlib.Path(path).expanduser().absolute()


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path from `run_folder`, or a path in it, is a URL.

  Raises:
    ValueError: a URL that `run_folder` rejects.
  """
  if problem := urls.explain(path, 'path', urls.STORES):
    raise ValueError(problem)
  return urls.find_scheme(path) is not None


def create(
    path: str | os.PathLike[str],
    flag: str = '--workdir',
    stores: Collection[str] = (),
) -> pathlib.Path:
  """Creates the folder of a run and checks that it is writable.

  Args:
    path: the folder; parents are created, too.
    flag: flag of the folder, for messages.
    stores: schemes that the folder may have; objects need no folder.

  Returns:
    The absolute path.

  Raises:
    ValueError: the path is a file or another URL, or the folder is not
      writable.
  """
  if problem := urls.explain(path, flag, stores):
    raise ValueError(problem)
  folder = run_folder(path, flag)
  if is_remote(folder):
    _check_writable(folder, flag)
    return folder
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


def _check_writable(folder: pathlib.Path, flag: str) -> None:
  """Checks that objects can be written to a folder of a store."""
  probe = folder / f'.probe-{uuid.uuid4().hex}'
  try:
    object_store.write(probe, b'')
    object_store.delete(probe)
  except OSError as error:
    raise ValueError(
        f'{folder} cannot be written ({error.strerror}); create the bucket, log'
        ' in (gcloud auth application-default login), or give another folder'
        f' with {flag}.'
    ) from error


@contextlib.contextmanager
def lock(folder: pathlib.Path, flag: str = '--workdir') -> Iterator[None]:
  """Locks the folder of a run against writes of a second run.

  The lock is released when the process ends, however it ends. It holds between
  hosts if the file system supports that (NFS 4, and Lustre with flock). In an
  object store, see `object_lock.hold`.

  Args:
    folder: the run's folder.
    flag: flag of the folder, for messages.

  Raises:
    ValueError: another process holds the lock.
  """
  if is_remote(folder):
    with object_lock.hold(folder / LOCK, folder, flag):
      yield
    return
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


def make_folder(path: pathlib.Path) -> None:
  """Creates a folder and its parents if they are missing."""
  if not is_remote(path):
    path.mkdir(parents=True, exist_ok=True)


def is_folder(path: pathlib.Path) -> bool:
  """Whether there is a folder; in an object store, any object in it."""
  return object_store.is_folder(path) if is_remote(path) else path.is_dir()


def is_file(path: pathlib.Path) -> bool:
  """Whether there is a file or an object."""
  return object_store.is_object(path) if is_remote(path) else path.is_file()


def is_empty(path: pathlib.Path) -> bool:
  """Whether a folder is missing or empty."""
  if is_remote(path):
    return not object_store.is_folder(path)
  return not path.is_dir() or not any(path.iterdir())


def list_names(path: pathlib.Path) -> list[str]:
  """Returns the sorted names in a folder; none if it is missing."""
  if is_remote(path):
    return object_store.list_names(path)
  return sorted(os.listdir(path)) if path.is_dir() else []


def size(path: pathlib.Path) -> int:
  """Returns the number of bytes of a file."""
  status = path.stat()
  return status.length if is_remote(path) else status.st_size


@contextlib.contextmanager
def local_copy(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a local file with the content of a file: itself if it is local."""
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder, path.name)
    with open(copy, 'wb') as file:
      object_store.read_into(path, file)
    yield copy


def move_folder(source: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a folder, atomically if it is local, to a name that is not in use."""
  if is_remote(source):
    object_store.move_folder(source, target)
  else:
    source.rename(target)


def delete(path: pathlib.Path) -> None:
  """Deletes a file if it exists."""
  if is_remote(path):
    with contextlib.suppress(FileNotFoundError):
      object_store.delete(path)
  else:
    path.unlink(missing_ok=True)


def delete_folder(path: pathlib.Path) -> None:
  """Deletes a folder and all in it as far as possible."""
  if not is_remote(path):
    shutil.rmtree(path, ignore_errors=True)
    return
  try:
    object_store.delete_folder(path)
  except OSError as error:
    logging.warning('%s cannot be deleted: %s', path, error)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
  """Reads a file.

  Raises:
    OSError: it is missing or cannot be read.
  """
  if is_remote(path):
    return object_store.read(path)
  return pathlib.Path(path).read_bytes()


def read_json(path: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Reads a JSON object; returns None if there is no such file.

  Raises:
    ValueError: the file cannot be read, or is not a JSON object.
  """
  try:
    value = json.loads(read_bytes(path).decode())
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
  if is_remote(path):
    with tempfile.SpooledTemporaryFile(_SPOOLED) as file:
      yield file
      object_store.write_file(path, file)
    return
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


@contextlib.contextmanager
def write_locally(
    path: pathlib.Path, folder: pathlib.Path
) -> Iterator[pathlib.Path]:
  """Yields a local path; its file appears under `path` when it is complete.

  For writers that need a path; `open_atomic` is for all others.

  Args:
    path: of the file, in an existing folder; an earlier file is replaced.
    folder: for the incomplete file, on the file system of `path`, where a
      killed process may leave it; an object store has it in a temporary folder.

  Yields:
    A path with the name of the file.
  """
  if is_remote(path):
    with tempfile.TemporaryDirectory() as local:
      temporary = pathlib.Path(local, path.name)
      yield temporary
      with open(temporary, 'rb') as file:
        object_store.write_file(path, file)
    return
  temporary = folder / path.name
  yield temporary
  with open(temporary, 'rb') as file:
    os.fsync(file.fileno())
  os.replace(temporary, path)


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
