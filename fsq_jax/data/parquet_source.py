"""Images in Parquet files, as the data sets of the Hugging Face Hub.

Functions import `pyarrow` where they need it, since importing it takes a tenth
of a second.
"""

import bisect
from collections.abc import Mapping, Sequence
import hashlib
import itertools
import json
import os
import re
from typing import Any, NamedTuple

from absl import logging
import numpy as np

from fsq_jax.data import image_errors
from fsq_jax.data import image_source
from fsq_jax.data import listing
from fsq_jax.data import parquet_files
from fsq_jax.data import parquet_images

# Number of images whose bytes are part of the fingerprint.
_NUM_HASHED = 16
# Errors of PyArrow for corrupted metadata, apart from its own.
_UNREADABLE = (UnicodeDecodeError, KeyError, StopIteration)
_NUMBER = re.compile(r'u?int\d+|halffloat|float|double')


class _Columns(NamedTuple):
  """Columns of the images.

  Attributes:
    values: dotted name of the column of encoded images.
    names: dotted name of the column of file names, if there is one.
    labels: name of the column of labels, if there is one.
    label_names: names of the classes; () without.
    warning: why there are no labels, or ''.
  """

  values: str
  names: str | None
  labels: str | None
  label_names: tuple[str, ...]
  warning: str


class ParquetSource(image_source.EncodedSource):
  """The images of the Parquet files of a split, in the order of files and rows.

  The image column has the type Image of the `datasets` package (a struct of
  `bytes` and `path`), or is binary; it is named 'image' if there are several.
  The label is the column 'label', or the only ClassLabel; other labels than
  integers are -1, with a warning. Names of images are their paths, if all have
  one of their own, or else their numbers.

  Images are mapped into memory (`parquet_images`); labels and paths are kept in
  memory.
  """

  def __init__(
      self,
      name: str,
      data_dir: str,
      split: str,
      *,
      label_names: Sequence[str] = (),
      **reading: Any,
  ):
    """Opens the files of a split.

    Args:
      name: data.name, see `parquet_files.find`.
      data_dir: data.data_dir.
      split: see `parquet_files.select`.
      label_names: names of all classes, by label, for files without.
      **reading: resize_shorter, max_damaged_share, cache_mib and channels of
        EncodedSource.

    Raises:
      ValueError: no files, rows or images, files that are truncated or differ
        in their columns, labels outside of the names, or no space for the
        images.
    """
    root, files = parquet_files.find(name, data_dir, split)
    self._paths = [os.path.join(root, x) for x in files]
    contents = [_open(path) for path in self._paths]
    columns = contents[0].columns
    for path, content in zip(self._paths, contents, strict=True):
      if content.columns != columns:
        raise ValueError(
            f'{path} has the columns {content.columns}, {self._paths[0]}'
            f' {columns}. All files of a split need the same columns.'
        )
    if columns.warning:
      logging.warning('%s: %s', self._paths[0], columns.warning)
    self._starts = [0, *itertools.accumulate(x.num_rows for x in contents)]
    self._labels = np.concatenate([x.labels for x in contents])
    self._names = _distinct([x.names for x in contents])
    self._images = [
        parquet_images.Images(path, columns.values) for path in self._paths
    ]
    super().__init__('', split, '', **reading)
    if not len(self):
      raise ValueError(f'{root}: the files of split {split!r} have no rows.')
    self.identity['content'] = self._hash_content()
    self.label_names = columns.label_names or tuple(label_names)
    image_source.check_labels(self._labels, self.label_names, self.describe)

  def __len__(self) -> int:
    return self._starts[-1]

  def describe(self, index: int) -> str:
    file, row = self._locate(index)
    return f'{self._paths[file]} row {row}'

  def metadata(self, index: int) -> image_source.ImageMetadata:
    file, row = self._locate(index)
    name = str(index)
    if self._names is not None:
      name = self._names[index].as_py().decode('utf-8', 'surrogateescape')
    return image_source.ImageMetadata(
        name=name,
        label=int(self._labels[index]),
        num_bytes=self._images[file].num_bytes(row),
    )

  def stamp(self, index: int) -> tuple[int, int, int]:
    # Of the file that holds the row.
    status = os.stat(self._paths[self._locate(index)[0]])
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns

  def read(self, index: int) -> bytes:
    file, row = self._locate(index)
    return self._images[file].read(row)

  def _locate(self, index: int) -> tuple[int, int]:
    """Returns the number of the file and the row in it."""
    file = bisect.bisect_right(self._starts, index) - 1
    return file, index - self._starts[file]

  def _hash_content(self) -> str:
    """Hashes paths, labels and some images, independent of files and pages."""
    content = hashlib.sha256(f'{len(self)}\0'.encode())
    content.update(self._labels.tobytes())
    if self._names is not None:
      for names in self._names.chunks:
        content.update(b''.join(x + b'\0' for x in names.to_pylist()))
    for index in np.unique(
        np.linspace(0, len(self) - 1, _NUM_HASHED).astype(np.int64)
    ):
      try:
        content.update(hashlib.sha256(self.read(int(index))).digest())
      except image_errors.DamagedImageError:
        content.update(image_source.NO_DIGEST)
    return content.hexdigest()[:16]


class _Content(NamedTuple):
  """One file: its columns and rows, [n] labels and [n] names or None."""

  columns: _Columns
  num_rows: int
  labels: np.ndarray
  names: Any


def _open(path: str) -> _Content:
  """Reads metadata, labels and names of a file."""
  import pyarrow
  from pyarrow import parquet

  try:
    with parquet.ParquetFile(path) as file:
      columns = _find_columns(path, file.schema_arrow)
      num_rows = file.metadata.num_rows
      wanted = [x for x in (columns.labels, columns.names) if x]
      table = file.read(wanted, use_threads=False) if wanted else None
  except (pyarrow.ArrowException, OSError, *_UNREADABLE) as error:
    if isinstance(error, FileNotFoundError | PermissionError):
      raise
    raise ValueError(
        f'{path} is truncated, corrupted or no Parquet file ({error}). Copy or'
        ' download it again.'
    ) from error
  if table is not None and table.num_rows != num_rows:
    raise ValueError(
        f'{path} is corrupted: {num_rows} rows of images and'
        f' {table.num_rows} of labels. Copy or download it again.'
    )
  labels, names = np.full(num_rows, -1, np.int64), None
  if columns.labels:
    labels = _to_labels(path, table[columns.labels])
  if columns.names:
    image = columns.names.rpartition('.')[0]
    names = table[image].combine_chunks().field('path')
    names = None if names.null_count else names
  return _Content(columns, num_rows, labels, names)


def _find_columns(path: str, schema: Any) -> _Columns:
  """Chooses the columns of a file by its schema and `datasets`' metadata."""
  features = _read_features(schema.metadata or {})
  kinds = {x: features.get(x, {}).get('_type', '') for x in schema.names}
  leaves = {
      x.name: leaf for x in schema if (leaf := _bytes_leaf(x.name, x.type))
  }
  images = [x for x in leaves if kinds[x] == 'Image'] or list(leaves)
  if 'image' in images:
    images = ['image']
  if len(images) != 1:
    raise ValueError(
        f"{path} has {len(images)} image columns {images}; there must be one,"
        " or one named 'image': of type Image of the `datasets` package (a"
        ' struct of bytes and path), or binary. All columns:'
        f' {schema.names}.'
    )
  (image,) = images
  classes = [x for x, kind in kinds.items() if kind == 'ClassLabel']
  label = 'label' if 'label' in schema.names else None
  if label is None and len(classes) == 1:
    (label,) = classes
  names: tuple[str, ...] = ()
  warning = ''
  if label and not _NUMBER.fullmatch(str(schema.field(label).type)):
    warning = (
        f'the column {label!r} holds {schema.field(label).type}, no integers;'
        ' all labels are -1.'
    )
    label = None
  elif label in classes:
    names = tuple(map(str, features[label].get('names') or ()))
  elif label is None and classes:
    warning = (
        f'the columns {listing.shorten(classes)} are classes, but none is'
        " named 'label'; all labels are -1."
    )
  has_path = 'path' in _field_names(schema.field(image).type)
  return _Columns(
      leaves[image], f'{image}.path' if has_path else None, label, names,
      warning,
  )  # fmt: skip


def _read_features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
  """Returns the features that `datasets` writes, by column; {} without."""
  try:
    features = json.loads(metadata[b'huggingface'])['info']['features']
    return {x: kind for x, kind in features.items() if isinstance(kind, dict)}
  except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
    return {}


def _field_names(kind: Any) -> list[str]:
  """Returns the names of the fields of a struct; [] of another type."""
  if not str(kind).startswith('struct<'):
    return []
  return [kind.field(i).name for i in range(kind.num_fields)]


def _bytes_leaf(name: str, kind: Any) -> str | None:
  """Returns the column of encoded images, if a column has them."""
  if str(kind) in ('binary', 'large_binary'):
    return name
  if 'bytes' in _field_names(kind):
    return _bytes_leaf(f'{name}.bytes', kind.field('bytes').type)
  return None


def _to_labels(path: str, column: Any) -> np.ndarray:
  """Returns labels as [n] int64, -1 for null; raises ValueError below -1.

  In a column of floats 3.0 is the label 3; 3.5 is -1, with a warning.
  """
  import pyarrow

  numbers = column
  if not str(column.type).startswith(('int', 'uint')):
    values = column.cast('float64').fill_null(-1).to_numpy()
    bad = ~(np.isfinite(values) & (values == np.trunc(values)))
    if bad.any():
      row = int(np.argmax(bad))
      logging.warning(
          '%s: %d of %d labels are not integers and are -1, such as %s in row'
          ' %d.', path, bad.sum(), len(bad), values[row], row,
      )  # fmt: skip
    numbers = pyarrow.chunked_array([np.where(bad, -1, values)])
  # Numbers of more than 63 bits become negative.
  labels = numbers.cast('int64', safe=False).fill_null(-1).to_numpy()
  if len(labels) and labels.min() < -1:
    row = int(np.argmin(labels))
    raise ValueError(
        f'{path} row {row}: the label is {column[row]}. Labels are integers'
        ' >= 0, or -1 without a class.'
    )
  return labels


def _distinct(names: Sequence[Any]) -> Any:
  """Returns all names as bytes, or None if some are missing or repeat."""
  import pyarrow
  from pyarrow import compute

  if any(x is None for x in names):
    return None
  # Not every program writes UTF-8.
  joined = pyarrow.chunked_array(
      [x.cast('binary').cast('large_binary') for x in names]
  )
  distinct = compute.count_distinct(joined).as_py()
  return joined if distinct == len(joined) else None
