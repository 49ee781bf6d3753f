"""Token files in the formats array_record and npz."""

from collections.abc import Mapping, Sequence
import hashlib
import math
import pathlib
import struct
from typing import Any, NamedTuple

from array_record.python import array_record_module
import numpy as np

from fsq_jax.tokens import manifest

# label, h, w, H, W, H and W of the original, bytes of the name.
_HEADER = struct.Struct('<q7I')
# The same with view, crop and flip before the bytes of the name.
_VIEW_HEADER = struct.Struct('<q13I')
# One image per record, for random access. Tokens hardly compress, and
# compression would dominate the time.
_WRITER_OPTIONS = 'group_size:1,uncompressed,max_parallelism:1'
_READER_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'


class Example(NamedTuple):
  """The tokens of one image.

  Attributes:
    tokens: [h, w, *index_shape] int32.
    name: of the image in its source.
    label: class label; -1 for no label.
    size: (height, width) in pixels of the image that was fitted to the model.
    original_size: (height, width) before data.resize_shorter.
    view: number of the random crop of the image; 0 with one view.
    crop: (top, left, height, width) of the random crop, in pixels of the image
      of `size`; None with one view.
    is_flipped: whether the crop is mirrored left to right.
  """

  tokens: np.ndarray
  name: str
  label: int
  size: tuple[int, int]
  original_size: tuple[int, int]
  view: int = 0
  crop: tuple[int, int, int, int] | None = None
  is_flipped: bool = False


def write(
    path: pathlib.Path, examples: Sequence[Example], job: manifest.Job
) -> None:
  """Writes a file; its bytes depend on the arguments alone.

  Args:
    path: of the file; not written atomically.
    examples: the tokens of its images.
    job: the job, with the storage.
  """
  _WRITERS[job.storage](path, examples, job)


def open_shard(path: pathlib.Path, job: manifest.Job) -> Sequence[Example]:
  """Opens a file for random access, from several threads at once.

  Args:
    path: of the file.
    job: of its manifest.

  Returns:
    The examples. Indexing raises ValueError for a corrupted example, or an
    example that contradicts the job.

  Raises:
    ValueError: a file of another kind.
  """
  return _READERS[job.storage](path, job)


def hash_file(path: pathlib.Path) -> str:
  """Returns the sha256 of a file."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _encode_name(name: str) -> bytes:
  # File names need not be valid UTF-8.
  return name.encode('utf-8', 'surrogateescape')


def _decode_name(name: bytes) -> str:
  return name.decode('utf-8', 'surrogateescape')


def _write_array_record(path, examples, job):
  writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
  for example in examples:
    name = _encode_name(example.name)
    view = ()
    if job.views > 1:
      view = example.view, *example.crop, example.is_flipped
    header = _header(job).pack(
        example.label, *example.tokens.shape[:2], *example.size,
        *example.original_size, *view, len(name),
    )  # fmt: skip
    tokens = example.tokens.astype(job.dtype).tobytes()
    writer.write(header + name + tokens)
  writer.close()


def _header(job: manifest.Job) -> struct.Struct:
  return _VIEW_HEADER if job.views > 1 else _HEADER


def _write_npz(path, examples, job):
  views = {}
  if job.views > 1:
    views = {
        'view': np.array([x.view for x in examples], '<u4'),
        'crop': _rows([x.crop for x in examples], 4),
        'flipped': np.array([x.is_flipped for x in examples], bool),
    }
  tokens = [x.tokens.astype(job.dtype).reshape(-1) for x in examples]
  tokens = np.concatenate([np.zeros(0, job.dtype), *tokens])
  np.savez_compressed(
      path,
      tokens=tokens.reshape(
          (tokens.size // math.prod(job.index_shape), *job.index_shape)
      ),
      grid=_rows([x.tokens.shape[:2] for x in examples], 2),
      size=_rows([x.size for x in examples], 2),
      original_size=_rows([x.original_size for x in examples], 2),
      **views,
      label=np.array([x.label for x in examples], '<i8'),
      name=np.array([x.name for x in examples], '<U'),
  )


def _rows(rows: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
  return np.array(rows, '<u4').reshape((len(rows), width))


class _ArrayRecordShard(Sequence[Example]):
  """The examples of an array_record file."""

  def __init__(self, path: pathlib.Path, job: manifest.Job):
    self._path = path
    self._job = job
    try:
      self._reader = array_record_module.ArrayRecordReader(
          str(path), _READER_OPTIONS
      )
      self._length = self._reader.num_records()
    except Exception as error:  # array_record raises errors of any class.
      raise ValueError(f'{path} is no array_record file: {error}') from error

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Example:
    try:
      (record,) = self._reader.read([index])
    except Exception as error:  # array_record raises errors of any class.
      raise ValueError(
          f'{self._path} record {index} cannot be read: {error}'
      ) from error
    try:
      return self._parse(record)
    except ValueError as error:
      raise ValueError(f'{self._path} record {index}: {error}') from error

  def _parse(self, record: bytes) -> Example:
    header = _header(self._job)
    if len(record) < header.size:
      raise ValueError(f'{len(record)} bytes are less than a header.')
    label, *numbers, num_name = header.unpack_from(record)
    grid, size, original_size = (tuple(numbers[i : i + 2]) for i in (0, 2, 4))
    start = header.size + num_name
    shape = (*grid, *self._job.index_shape)
    num_bytes = start + math.prod(shape) * self._job.dtype.itemsize
    if len(record) != num_bytes:
      raise ValueError(
          f'it has {len(record)} bytes; tokens {shape} need {num_bytes}.'
      )
    tokens = np.frombuffer(record, self._job.dtype, offset=start)
    return Example(
        _check_tokens(tokens.reshape(shape), self._job),
        _decode_name(record[header.size : start]),
        label,
        size,
        original_size,
        *_parse_view(numbers[6:], size, self._job),
    )


class _NpzShard(Sequence[Example]):
  """The examples of an npz file, whose arrays are held in memory."""

  def __init__(self, path: pathlib.Path, job: manifest.Job):
    self._path = path
    self._job = job
    try:
      with np.load(path, allow_pickle=False) as file:
        self._arrays = {name: file[name] for name in file.files}
    # A foreign file may be of any kind, and claim any size.
    except Exception as error:
      raise ValueError(
          f'{path} is no npz file of tokens: {type(error).__name__}: {error}'
      ) from error
    try:
      _check_arrays(self._arrays, job)
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from error
    lengths = self._arrays['grid'].astype(np.int64).prod(axis=1)
    self._ends = np.cumsum(lengths)

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)} images in {self._path}.')
    end = self._ends[index]
    grid = tuple(map(int, self._arrays['grid'][index]))
    tokens = self._arrays['tokens'][end - math.prod(grid) : end]
    size, original_size = (
        tuple(map(int, self._arrays[name][index]))
        for name in ('size', 'original_size')
    )
    view = ()
    if self._job.views > 1:
      view, crop, flipped = (
          self._arrays[name][index] for name in ('view', 'crop', 'flipped')
      )
      view = list(map(int, (view, *crop, flipped)))
    try:
      tokens = _check_tokens(
          tokens.reshape((*grid, *self._job.index_shape)), self._job
      )
      view = _parse_view(view, size, self._job)
    except ValueError as error:
      raise ValueError(f'{self._path} image {index}: {error}') from error
    return Example(
        tokens,
        str(self._arrays['name'][index]),
        int(self._arrays['label'][index]),
        size,
        original_size,
        *view,
    )


def _check_arrays(arrays: Mapping[str, Any], job: manifest.Job) -> None:
  num = len(arrays['grid']) if np.ndim(arrays.get('grid')) else 0
  needed = {
      'tokens': (job.dtype.str, ('...', *job.index_shape)),
      'grid': ('<u4', (num, 2)),
      'size': ('<u4', (num, 2)),
      'original_size': ('<u4', (num, 2)),
      'label': ('<i8', (num,)),
      'name': ('<U', (num,)),
  }
  if job.views > 1:
    needed |= {
        'view': ('<u4', (num,)),
        'crop': ('<u4', (num, 4)),
        'flipped': ('|b1', (num,)),
    }
  given = {
      name: (
          array.dtype.str if array.dtype.kind != 'U' else '<U',
          array.shape if name != 'tokens' else ('...', *array.shape[1:]),
      )
      for name, array in arrays.items()
  }
  if given != needed or arrays['tokens'].ndim != 1 + len(job.index_shape):
    raise ValueError(f'it has the arrays {given}; needed: {needed}.')
  # As Python integers: int32 products of a foreign file may overflow.
  num_tokens = sum(math.prod(map(int, grid)) for grid in arrays['grid'])
  if len(arrays['tokens']) != num_tokens:
    raise ValueError(
        f'it has tokens of {len(arrays["tokens"])} codes; its grids have'
        f' {num_tokens}.'
    )


def _parse_view(
    numbers: Sequence[int], size: tuple[int, int], job: manifest.Job
) -> tuple[int, tuple[int, int, int, int], bool] | tuple[()]:
  """Returns view, crop and flip, () with one view; raises ValueError."""
  if job.views == 1:
    return ()
  view, top, left, height, width, flipped = numbers
  if (
      view >= job.views
      or flipped > 1
      or not min(height, width)
      or top + height > size[0]
      or left + width > size[1]
  ):
    raise ValueError(
        f'it is view {view} of {job.views}, a crop of {height} x {width} pixels'
        f' at row {top}, column {left} of an image of {size}, mirrored:'
        f' {flipped}.'
    )
  return view, (top, left, height, width), bool(flipped)


def _check_tokens(tokens: np.ndarray, job: manifest.Job) -> np.ndarray:
  """Returns tokens as int32; raises ValueError for invalid tokens."""
  if not tokens.size:
    raise ValueError(f'its grid is {tokens.shape[:2]}; needed: 1 or more.')
  low, high = int(tokens.min()), int(tokens.max())
  if low < 0 or high >= job.codebook_size:
    raise ValueError(
        f'its tokens are {low} ... {high}; allowed: 0 ...'
        f' {job.codebook_size - 1}.'
    )
  return tokens.astype(np.int32)


_WRITERS = {'array_record': _write_array_record, 'npz': _write_npz}
_READERS = {'array_record': _ArrayRecordShard, 'npz': _NpzShard}
