"""Google Cloud Storage: objects are read, written and replaced atomically.

An object appears with all its bytes or not at all, and each version has a
generation, a number by which a write can be made conditional.

Paths are text, gs://bucket/name, or `etils.epath.Path`, through which Orbax and
this package list folders.
"""

from collections.abc import Iterator
import contextlib
import errno
import functools
import importlib
import os
import pathlib
from typing import Any, BinaryIO

_MODULES = ('gcsfs', 'google.cloud.storage')
_Path = str | os.PathLike[str]


class StoreError(OSError, RuntimeError):
  """The store cannot be used: no network, no permission, no such bucket."""


class ConflictError(StoreError):
  """Another process has written the object meanwhile."""


def open_path(url: str, name: str) -> pathlib.Path:
  """Returns the path object of a URL; uses no network.

  Args:
    url: gs://bucket with any path, as from `urls.normalize`.
    name: flag or argument that has it, for messages.

  Raises:
    ValueError: no bucket, or a package that is not installed.
  """
  if url.partition('://')[2][:1] in ('', '/'):
    raise ValueError(f'{name} is {url}: there is no bucket; give gs://BUCKET/X.')
  # etils prefers TensorFlow's file system where TensorFlow is installed.
  os.environ.setdefault('EPATH_USE_TF', 'false')
  try:
    for module in _MODULES:
      importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
        f'{name} is {url}: gs:// needs the packages gcsfs and'
        f' google-cloud-storage ({error}). Install them by: pip install gcsfs'
        ' google-cloud-storage'
    ) from error
  from etils import epath
  import fsspec

  # TensorStore writes the files of checkpoints past gcsfs.
  options = fsspec.config.conf.setdefault('gcs', {})
  options.setdefault('use_listings_cache', False)
  return epath.Path(url)


def read(path: _Path) -> bytes:
  """Returns the bytes of an object.

  Raises:
    FileNotFoundError: there is no such object.
    OSError: it cannot be read.
  """
  with _errors_of(path):
    return _blob(path).download_as_bytes()


def read_into(path: _Path, file: BinaryIO) -> None:
  """Writes the bytes of an object to an open file.

  Raises:
    FileNotFoundError: there is no such object.
    OSError: it cannot be read, or the file cannot be written.
  """
  with _errors_of(path):
    _blob(path).download_to_file(file)


def read_version(path: _Path) -> tuple[bytes, int]:
  """Returns bytes and generation of an object; (b'', 0) if it is missing.

  Raises:
    OSError: it cannot be read.
  """
  while True:
    blob = _blob(path)
    try:
      with _errors_of(path):
        blob.reload()
    except FileNotFoundError:
      return b'', 0
    generation = blob.generation
    # The bytes of this generation are missing if it was replaced meanwhile.
    with contextlib.suppress(FileNotFoundError), _errors_of(path):
      return blob.download_as_bytes(), generation


def write(path: _Path, data: bytes, generation: int | None = None) -> int:
  """Writes an object atomically.

  Args:
    path: of the object.
    data: its content.
    generation: of the version to replace, 0 if there must be no object; None
      replaces any version.

  Returns:
    The new generation.

  Raises:
    ConflictError: the object has another generation.
    OSError: it cannot be written.
  """
  blob = _blob(path)
  try:
    with _errors_of(path):
      blob.upload_from_string(
          data, 'application/octet-stream', if_generation_match=generation
      )
  except ConflictError:
    # A write whose answer was lost has been repeated.
    written, current = read_version(path)
    if written != data:
      raise
    return current
  return blob.generation


def write_file(path: _Path, file: BinaryIO) -> None:
  """Writes an object atomically from an open file, read from its start.

  Raises:
    OSError: it cannot be written.
  """
  with _errors_of(path):
    _blob(path).upload_from_file(file, rewind=True)


def delete(path: _Path, generation: int | None = None) -> None:
  """Deletes an object.

  Args:
    path: of the object.
    generation: as in `write`.

  Raises:
    ConflictError: the object has another generation.
    OSError: it cannot be deleted, or is missing.
  """
  with _errors_of(path):
    _blob(path).delete(if_generation_match=generation)


def is_folder(path: _Path) -> bool:
  """Whether there are objects in a folder.

  Raises:
    OSError: the folder cannot be listed.
  """
  bucket, prefix = _split(path)
  with _errors_of(path):
    found = _client().list_blobs(bucket, prefix=f'{prefix}/', max_results=1)
    return bool(list(found))


def list_names(path: _Path) -> list[str]:
  """Returns the names of objects and folders in a folder, sorted.

  Raises:
    OSError: the folder cannot be listed.
  """
  bucket, prefix = _split(path)
  with _errors_of(path):
    found = _client().list_blobs(bucket, prefix=f'{prefix}/', delimiter='/')
    names = [blob.name for blob in found]
  names = {x[len(prefix) + 1 :].rstrip('/') for x in (*names, *found.prefixes)}
  # Some tools write an empty object for the folder itself.
  return sorted(names - {''})


def is_object(path: _Path) -> bool:
  """Whether there is an object of this name.

  Raises:
    OSError: the bucket cannot be read.
  """
  with _errors_of(path):
    return _blob(path).exists()


def move_folder(source: _Path, target: _Path) -> None:
  """Moves all objects of a folder to another folder of the same bucket.

  Not atomic: all are copied, then all are deleted.

  Raises:
    OSError: they cannot be moved.
  """
  name, prefix = _split(source)
  new_prefix = _split(target)[1]
  with _errors_of(source):
    bucket = _client().bucket(name)
    blobs = list(_client().list_blobs(name, prefix=f'{prefix}/'))
    for blob in blobs:
      bucket.copy_blob(blob, bucket, new_prefix + blob.name[len(prefix) :])
    for blob in blobs:
      blob.delete()


def delete_folder(path: _Path) -> None:
  """Deletes all objects of a folder, one by one.

  Raises:
    OSError: they cannot be deleted.
  """
  bucket, prefix = _split(path)
  with _errors_of(path):
    for blob in _client().list_blobs(bucket, prefix=f'{prefix}/'):
      with contextlib.suppress(FileNotFoundError), _errors_of(path):
        blob.delete()


@functools.cache
def _client() -> Any:
  from google.cloud import storage  # An optional dependency.

  return storage.Client()


def _split(path: _Path) -> tuple[str, str]:
  bucket, _, name = os.fspath(path).removeprefix('gs://').partition('/')
  return bucket, name


def _blob(path: _Path) -> Any:
  bucket, name = _split(path)
  with _errors_of(path):
    return _client().bucket(bucket).blob(name)


@contextlib.contextmanager
def _errors_of(path: _Path) -> Iterator[None]:
  """Raises errors of the client's packages as OSErrors that name the path."""
  from google.api_core import exceptions
  from google.auth import exceptions as auth_exceptions

  try:
    yield
  except (StoreError, FileNotFoundError):
    raise  # Of a call within.
  except exceptions.NotFound as error:
    raise FileNotFoundError(
        errno.ENOENT, 'no such object or bucket', os.fspath(path)
    ) from error
  except exceptions.PreconditionFailed as error:
    raise ConflictError(
        errno.EBUSY, 'written by another process', os.fspath(path)
    ) from error
  except (
      exceptions.GoogleAPIError, auth_exceptions.GoogleAuthError, OSError
  ) as error:
    raise StoreError(
        errno.EIO, f'{type(error).__name__}: {error}', os.fspath(path)
    ) from error
