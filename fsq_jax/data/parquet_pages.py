"""Random access to one binary column of Parquet files, by pages.

PyArrow reads whole row groups, which hold about 100 images or 100 MB in files
of the Hugging Face Hub: too much for each image of a shuffled epoch. This
module parses the headers of the pages of a row group, decompresses one page
with PyArrow's codecs and locates the values in it. An image in an uncompressed
page is read alone.

Format: https://parquet.apache.org/docs/file-format/data-pages and
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

import bisect
import collections
from collections.abc import Hashable, Iterator
import itertools
import os
import struct
import threading
from typing import Any, NamedTuple

import numpy as np

from fsq_jax.data import image_errors

# By the names of PyArrow's column metadata.
CODECS = {
    'UNCOMPRESSED': None, 'SNAPPY': 'snappy', 'GZIP': 'gzip',
    'BROTLI': 'brotli', 'ZSTD': 'zstd', 'LZ4': 'lz4_raw',
}  # fmt: skip
ENCODINGS = {'PLAIN', 'RLE', 'BIT_PACKED', 'RLE_DICTIONARY', 'PLAIN_DICTIONARY'}

# Default size of the cache of decompressed pages.
CACHE_BYTES = 64 * 2**20

_DATA, _INDEX, _DICTIONARY, _DATA_V2 = range(4)  # PageType
_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY = 0, 2, 3, 8  # Encoding
# Kinds of fields of the compact protocol.
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 7, 8, 12
_INTEGERS = (4, 5, 6)
_HEADER_BYTES = 256
# More than a header with statistics of long values needs.
_MAX_HEADER_BYTES = 2**22
_MAX_DEPTH = 8
_SIZE = struct.Struct('<I')


class CorruptPageError(ValueError):
  """A page cannot be read; the message says why."""


class Chunk(NamedTuple):
  """The column in one row group.

  Attributes:
    path: of the file.
    offset: of the first page in the file, bytes.
    size: of all pages with their headers, bytes.
    num_rows: of the row group.
    codec: name in CODECS.
    max_level: largest definition level, at which a value is not null.
  """

  path: str
  offset: int
  size: int
  num_rows: int
  codec: str
  max_level: int


class Page(NamedTuple):
  """A page of a chunk.

  Attributes:
    kind: PageType of the format.
    offset: of the content in the file, bytes.
    size: of the content in the file, bytes.
    raw_size: of the decompressed content, bytes.
    num_values: values, including nulls.
    encoding: of the values.
    num_level_bytes: data pages of version 2: bytes of levels, not compressed.
    is_compressed: whether the content, apart from these levels, is compressed.
  """

  kind: int
  offset: int
  size: int
  raw_size: int
  num_values: int
  encoding: int
  num_level_bytes: int
  is_compressed: bool


class Values(NamedTuple):
  """Places of the values of a data page.

  Attributes:
    page: the page that holds the bytes: itself, or a dictionary.
    starts: [n] int64, positions in the decompressed content, bytes.
    sizes: [n] int64, bytes; -1 for null.
  """

  page: Page
  starts: np.ndarray
  sizes: np.ndarray


class PageReader:
  """Reads single values of chunks; thread-safe.

  Headers and places of values stay in memory after the first use of a page, 16
  bytes per image. Of decompressed pages the most recent are kept, up to
  `cache_bytes`, and always the last one: neighbours in an evaluation's order
  share a page.
  """

  def __init__(self, cache_bytes: int = CACHE_BYTES):
    self._pages: dict[Hashable, tuple[list[Page], list[int]]] = {}
    self._values: dict[Hashable, Values] = {}
    self._bodies: collections.OrderedDict[Hashable, Any] = (
        collections.OrderedDict()
    )
    self._cache_bytes = cache_bytes
    self._lock = threading.Lock()

  def read(self, chunk: Chunk, row: int) -> bytes | None:
    """Returns the value of a row of a chunk; None for null.

    Raises:
      CorruptPageError: its page or the headers before it are corrupted.
      OSError: the file cannot be read, or is shorter than its metadata say.
    """
    values, i = self._locate(chunk, row)
    start, size = int(values.starts[i]), int(values.sizes[i])
    if size < 0:
      return None
    if values.page.is_compressed:
      return bytes(self._body(chunk, values.page)[start : start + size])
    return _read_at(chunk.path, values.page.offset + start, size)

  def num_bytes(self, chunk: Chunk, row: int) -> int | None:
    """Returns the size of a value, bytes; None for null. Raises as `read`."""
    values, i = self._locate(chunk, row)
    return None if values.sizes[i] < 0 else int(values.sizes[i])

  def largest_page(self, chunk: Chunk) -> int:
    """Returns the most bytes to decompress for one value. Raises as `read`."""
    return max(
        (x.raw_size for x in self._scan(chunk)[0] if x.is_compressed),
        default=0,
    )

  def _scan(self, chunk: Chunk) -> tuple[list[Page], list[int]]:
    """Returns the pages of a chunk, and the rows up to each one's end."""
    key = chunk.path, chunk.offset
    if key not in self._pages:
      pages = list(_scan_pages(chunk))
      ends = itertools.accumulate(
          0 if x.kind == _DICTIONARY else x.num_values for x in pages
      )
      self._pages[key] = pages, list(ends)
    return self._pages[key]

  def _locate(self, chunk: Chunk, row: int) -> tuple[Values, int]:
    """Returns the values of the page of a row, and the row's place in them."""
    pages, ends = self._scan(chunk)
    number = bisect.bisect_right(ends, row)
    page = pages[number]
    key = chunk.path, page.offset
    if key not in self._values:
      dictionary = None
      if page.encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY):
        dictionary = pages[0]
        if dictionary.kind != _DICTIONARY:
          raise CorruptPageError('there is no dictionary page')
      self._values[key] = self._find_values(chunk, page, dictionary)
    return self._values[key], row - (ends[number] - page.num_values)

  def _find_values(
      self, chunk: Chunk, page: Page, dictionary: Page | None
  ) -> Values:
    body = self._body(chunk, page)
    try:
      is_value, start = _read_levels(body, page, chunk.max_level)
      count = int(is_value.sum())
      if dictionary is None:
        places = _find_plain(body, start, count)
      else:
        entries = _find_plain(
            self._body(chunk, dictionary), 0, dictionary.num_values
        )
        numbers = _decode_hybrid(body[start + 1 :], body[start], count)
        places = tuple(x[numbers] for x in entries)
    except (IndexError, struct.error) as error:
      raise CorruptPageError(
          'the values of a page do not fit its size'
      ) from error
    starts = np.zeros(page.num_values, np.int64)
    sizes = np.full(page.num_values, -1, np.int64)
    starts[is_value], sizes[is_value] = places
    return Values(dictionary or page, starts, sizes)

  def _body(self, chunk: Chunk, page: Page) -> memoryview:
    """Returns the decompressed content of a page."""
    key = chunk.path, page.offset
    with self._lock:
      if (body := self._bodies.get(key)) is not None:
        self._bodies.move_to_end(key)
        return body
    body = _decompress(chunk, page)
    with self._lock:
      self._bodies[key] = body
      total = sum(map(len, self._bodies.values()))
      while total > self._cache_bytes and len(self._bodies) > 1:
        total -= len(self._bodies.popitem(last=False)[1])
    return body


def _read_at(path: str, offset: int, size: int) -> bytes:
  with open(path, 'rb', buffering=0) as file:
    file.seek(offset)
    content = file.read(size)
  if len(content) < size:
    raise OSError(
        f'{path}: {len(content)} of {size} bytes at {offset} can be read. The'
        ' file has changed since the start of this command, or its disk fails.'
    )
  return content


def _decompress(chunk: Chunk, page: Page) -> memoryview:
  import pyarrow

  content = _read_at(chunk.path, page.offset, page.size)
  if not page.is_compressed:
    return memoryview(content)
  levels = content[: page.num_level_bytes]
  size = page.raw_size - len(levels)
  if not size:
    return memoryview(levels)
  try:
    values = pyarrow.Codec(CODECS[chunk.codec]).decompress(
        memoryview(content)[len(levels) :], size
    )
  except (pyarrow.ArrowException, OSError) as error:
    raise CorruptPageError(f'a page cannot be decompressed: {error}') from error
  if values.size != size:
    raise CorruptPageError(f'a page has {values.size} of {size} bytes')
  values = memoryview(values).cast('B')
  return memoryview(levels + bytes(values)) if levels else values


# Headers.


def _scan_pages(chunk: Chunk) -> Iterator[Page]:
  """Yields the pages of a chunk; raises CorruptPageError."""
  position, end, num_rows = chunk.offset, chunk.offset + chunk.size, 0
  with open(chunk.path, 'rb', buffering=0) as file:
    if (size := os.fstat(file.fileno()).st_size) < end:
      raise OSError(
          f'{chunk.path} has {size} bytes, less than the {end} that its'
          ' metadata say. It has changed since the start of this command.'
      )
    while num_rows < chunk.num_rows:
      header, start = _read_header(file, position, end)
      page = _to_page(header, start, chunk.codec)
      position = page.offset + page.size
      if position > end:
        raise CorruptPageError('the pages are larger than the row group')
      num_rows += 0 if page.kind == _DICTIONARY else page.num_values
      if page.kind != _INDEX:
        yield page
  if num_rows != chunk.num_rows:
    raise CorruptPageError(
        f'the pages have {num_rows} rows, the row group {chunk.num_rows}'
    )


def _read_header(file: Any, position: int, end: int) -> tuple[Any, int]:
  """Returns a page header, and the position after it in the file."""
  size = _HEADER_BYTES
  while True:
    file.seek(position)
    start = file.read(min(size, end - position))
    try:
      header, length = _parse_struct(start, 0)
      return header, position + length
    except (IndexError, struct.error) as error:
      # The header is longer, with statistics, or corrupted.
      size *= 16
      if len(start) < size // 16 or size > _MAX_HEADER_BYTES:
        raise CorruptPageError('a page header is corrupted') from error


def _to_page(header: Any, offset: int, codec: str) -> Page:
  """Returns the page of a parsed PageHeader; raises CorruptPageError."""
  kind = header.get(1)
  # DataPageHeader, IndexPageHeader, DictionaryPageHeader and DataPageHeaderV2.
  own = header.get(5 + kind) if type(kind) is int else None
  raw_size, size = header.get(2), header.get(3)
  num_values, encoding, num_level_bytes = 0, _PLAIN, 0
  is_compressed = codec != 'UNCOMPRESSED'
  if isinstance(own, dict) and kind != _INDEX:
    num_values = own.get(1)
    encoding = own.get(4 if kind == _DATA_V2 else 2)
    if kind == _DATA_V2:
      num_level_bytes = _add(own.get(5), own.get(6))
      is_compressed &= own.get(7, True) is True
  fields = raw_size, size, num_values, encoding, num_level_bytes
  if (
      kind not in (_DATA, _INDEX, _DICTIONARY, _DATA_V2)
      or not isinstance(own, dict)
      or any(type(x) is not int or not 0 <= x < 2**31 for x in fields)
      or num_level_bytes > min(raw_size, size)
  ):
    raise CorruptPageError('a page header is corrupted')
  known = (
      (_PLAIN, _PLAIN_DICTIONARY) if kind == _DICTIONARY
      else (_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY)
  )  # fmt: skip
  if kind != _INDEX and encoding not in known:
    raise CorruptPageError(f'a page has the unknown encoding {encoding}')
  for x in (raw_size, size):
    try:
      image_errors.check_num_bytes(x)
    except image_errors.DamagedImageError as error:
      raise CorruptPageError(f'a page is too large: {error}') from error
  return Page(
      kind, offset, size, raw_size, num_values, encoding, num_level_bytes,
      is_compressed,
  )  # fmt: skip


def _add(*lengths: Any) -> int:
  return sum(lengths) if all(type(x) is int for x in lengths) else -1


def _parse_struct(data: bytes, position: int, depth: int = 0):
  """Parses a struct of Thrift's compact protocol.

  Raises:
    IndexError, struct.error: the data end before the struct.
    CorruptPageError: no struct.

  Returns:
    The values by number of the field, and the position after the struct.
  """
  if depth > _MAX_DEPTH:
    raise CorruptPageError('a page header is corrupted')
  fields, number = {}, 0
  while head := data[position]:
    position += 1
    if head >> 4:
      number += head >> 4
    else:
      number, position = _parse_integer(data, position)
    fields[number], position = _parse_value(data, position, head & 15, depth)
  return fields, position + 1


def _parse_value(data: bytes, position: int, kind: int, depth: int):
  """Parses a value; returns it and the position after it."""
  if kind in (_TRUE, _FALSE):
    return kind == _TRUE, position
  if kind == _BYTE:
    return data[position], position + 1
  if kind in _INTEGERS:
    return _parse_integer(data, position)
  if kind == _DOUBLE:
    return struct.unpack_from('<d', data, position)[0], position + 8
  if kind == _BINARY:
    size, position = _parse_varint(data, position)
    if position + size > len(data):
      raise IndexError
    return data[position : position + size], position + size
  if kind == _STRUCT:
    return _parse_struct(data, position, depth + 1)
  raise CorruptPageError('a page header is corrupted')


def _parse_varint(data: Any, position: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[position]
    position += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value, position
    shift += 7
    if shift > 63:
      raise CorruptPageError('a page has an integer of more than 64 bits')


def _parse_integer(data: bytes, position: int) -> tuple[int, int]:
  value, position = _parse_varint(data, position)
  return (value >> 1) ^ -(value & 1), position  # zigzag


# Values.


def _read_levels(
    body: memoryview, page: Page, max_level: int
) -> tuple[np.ndarray, int]:
  """Returns which rows of a data page have a value, and where values start."""
  start, size = 0, page.num_level_bytes
  if page.kind == _DATA and max_level:
    (size,) = _SIZE.unpack_from(body)
    start = _SIZE.size
  if not max_level:
    return np.ones(page.num_values, bool), start + size
  levels = _decode_hybrid(
      body[start : start + size], max_level.bit_length(), page.num_values
  )
  return levels == max_level, start + size


def _find_plain(
    body: memoryview, position: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns starts and sizes of values after their sizes as 4 bytes each."""
  if count * _SIZE.size > len(body) - position:
    raise IndexError
  starts, sizes = np.empty((2, count), np.int64)
  for i in range(count):
    (size,) = _SIZE.unpack_from(body, position)
    position += _SIZE.size
    starts[i], sizes[i] = position, size
    position += size
  if position != len(body):
    raise IndexError
  return starts, sizes


def _decode_hybrid(data: memoryview, width: int, count: int) -> np.ndarray:
  """Decodes integers of the RLE / bit-packing hybrid encoding.

  Args:
    data: runs, each after its header.
    width: bits per integer, 0 ... 32.
    count: of the integers.

  Returns:
    [count] int64.

  Raises:
    IndexError, struct.error: the data end before.
    CorruptPageError: the width is not in range.
  """
  if width > 32:
    raise CorruptPageError(f'a page has integers of {width} bits')
  values = np.zeros(count, np.int64)
  if not width:
    return values
  num_done = position = 0
  while num_done < count:
    header, position = _parse_varint(data, position)
    if header & 1:  # Groups of 8 integers, width bytes each.
      size = min((header >> 1) * width, -(-(count - num_done) // 8) * width)
      bits = np.unpackbits(
          np.frombuffer(data[position : position + size], np.uint8),
          bitorder='little',
      )
      bits = bits[: len(bits) // width * width].reshape(-1, width)
      run = bits.astype(np.int64) @ (1 << np.arange(width))
      position += (header >> 1) * width
    else:
      size = (width + 7) // 8
      value = int.from_bytes(data[position : position + size], 'little')
      run = np.full(min(header >> 1, count - num_done), value, np.int64)
      position += size
    if not len(run):
      raise IndexError
    run = run[: count - num_done]
    values[num_done : num_done + len(run)] = run
    num_done += len(run)
  return values
