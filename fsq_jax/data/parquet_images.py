"""Random access to the encoded images of a Parquet file, by an Arrow file.

Parquet is read by row groups, of up to hundreds of images: too much for each
image of a shuffled epoch. As the `datasets` package does, the images of a file
are therefore copied once to an uncompressed Arrow file, which is then mapped
into memory. It is beside the Parquet file as FILE.fsq_images.arrow, or in
CACHE_FOLDER if that folder is not writable, and is written again if size or
modification time of the Parquet file have changed.
"""

import functools
import json
import os
import pathlib
from typing import Any

from absl import logging

from fsq_jax.data import derived_files
from fsq_jax.data import image_errors

CACHE_FOLDER = '~/.cache/fsq_jax/parquet_images'
SUFFIX = '.fsq_images.arrow'
# Part of the stamp of an Arrow file: to be raised when its content changes.
_VERSION = 1
_STAMP = b'fsq_jax'
# Images that are copied at a time.
_BATCH = 64


class Images:
  """The encoded images of one Parquet file by row; thread-safe."""

  def __init__(self, path: str, column: str):
    """Opens the Arrow file of a Parquet file, and writes it if it is missing.

    Args:
      path: of the Parquet file, absolute.
      column: dotted name of the column of encoded images.

    Raises:
      ValueError: the Arrow file cannot be written.
      OSError: the Parquet file cannot be read.
    """
    stamp = _stamp(path, column)
    places = derived_files.places(path, SUFFIX, CACHE_FOLDER)
    table = _load_any(places, stamp)
    if table is None:
      with derived_files.lock(places):
        table = _load_any(places, stamp)  # Of the process that had the lock.
        if table is None:
          table = _load(_write(path, column, stamp, places), stamp)
    self._images, self._errors = table['images'], table['errors']

  def __len__(self) -> int:
    return len(self._images)

  def read(self, row: int) -> bytes:
    """Returns an image; raises DamagedImageError if there is none."""
    value = self._images[row]
    if not value.is_valid:
      error = self._errors[row].as_py()
      raise image_errors.DamagedImageError(error or 'the image is null')
    return value.as_py()

  def num_bytes(self, row: int) -> int | None:
    """Returns the size of an image; None if there is none."""
    value = self._images[row]
    return value.as_buffer().size if value.is_valid else None


def _stamp(path: str, column: str) -> bytes:
  status = os.stat(path)
  stamp = [_VERSION, status.st_size, status.st_mtime_ns, column]
  return json.dumps(stamp).encode()


def _load_any(places: list[pathlib.Path], stamp: bytes) -> Any:
  """Maps the Arrow file of the first place that has it; None without."""
  tables = (_load(place, stamp) for place in places)
  return next((x for x in tables if x is not None), None)


def _load(place: pathlib.Path, stamp: bytes) -> Any:
  """Maps an Arrow file; None if it is missing, outdated or corrupted."""
  import pyarrow

  try:
    with pyarrow.memory_map(str(place)) as file:
      table = pyarrow.ipc.open_file(file).read_all()
  except (pyarrow.ArrowException, OSError):
    return None
  metadata = table.schema.metadata or {}
  return table if metadata.get(_STAMP) == stamp else None


def _write(
    path: str, column: str, stamp: bytes, places: list[pathlib.Path]
) -> pathlib.Path:
  """Writes the Arrow file of a Parquet file."""
  logging.warning(
      'Copying the images of %s to an Arrow file, once, for random access.',
      path,
  )
  try:
    return derived_files.write(
        places, functools.partial(_copy, path, column, stamp)
    )
  except OSError as error:
    raise ValueError(
        f'The images of {path} ({os.path.getsize(path) / 1e9:.1f} GB) cannot be'
        f' copied to an Arrow file: {error}. Free the space, or make the folder'
        ' writable.'
    ) from error


def _copy(path: str, column: str, stamp: bytes, file: Any) -> None:
  """Writes the images of a Parquet file, and why rows have none."""
  import pyarrow
  from pyarrow import parquet

  schema = pyarrow.schema(
      [('images', pyarrow.binary()), ('errors', pyarrow.string())],
      {_STAMP: stamp},
  )
  with (
      parquet.ParquetFile(path) as source,
      pyarrow.ipc.new_file(file, schema) as sink,
  ):
    for group in range(source.num_row_groups):
      missing, reason = source.metadata.row_group(group).num_rows, None
      batches = source.iter_batches(
          _BATCH, row_groups=[group], columns=[column], use_threads=False
      )
      while missing:
        try:
          images = _leaf(next(batches).column(0))
        except StopIteration:
          reason = 'its row group has fewer rows than its metadata say'
        except (pyarrow.ArrowException, OSError) as error:
          if isinstance(error, OSError) and error.errno:
            raise  # The disk fails; the file may be intact.
          reason = f'its row group cannot be read: {error}'
        if reason:
          images = pyarrow.nulls(missing, pyarrow.binary())
        errors = pyarrow.array([reason] * len(images), pyarrow.string())
        sink.write_batch(
            pyarrow.record_batch([images, errors], schema=schema)
        )
        missing -= len(images)


def _leaf(column: Any) -> Any:
  """Returns the bytes of a column of images, null where a struct is null."""
  import pyarrow

  while pyarrow.types.is_struct(column.type):
    (column,) = column.flatten()
  return column.cast(pyarrow.binary())
