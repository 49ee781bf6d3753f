"""Reads files of pretrained weights, array by array and without pickle."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import struct
from typing import Any, NamedTuple
import zipfile
import zlib

from flax import serialization
from flax import traverse_util
from jax import numpy as jnp
import numpy as np
import safetensors

_SAFETENSORS_DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
# NumPy has no bfloat16 and stores its two bytes as void.
_NUMPY_DTYPES = {
    'float32': 'float32', 'float16': 'float16', 'void16': 'bfloat16'
}
_MAX_LISTED = 20
# Compression of np.savez and np.savez_compressed; others may allocate any
# amount of memory.
_NPZ_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Errors of zipfile, zlib, NumPy and safetensors on corrupted files.
_CORRUPTION = (
    EOFError, KeyError, MemoryError, NotImplementedError, OSError,
    OverflowError, RuntimeError, SyntaxError, TypeError, ValueError,
    safetensors.SafetensorError, struct.error, zipfile.BadZipFile, zlib.error,
)


class ArrayHeader(NamedTuple):
  """Shape and dtype of an array, from its header.

  Attributes:
    shape: sizes of the axes.
    dtype: name of the dtype; only arrays with a dtype of `FLOATS` can be read.
  """

  shape: tuple[int, ...]
  dtype: str


FLOATS = frozenset(_SAFETENSORS_DTYPES.values())


@dataclasses.dataclass(frozen=True)
class WeightFiles:
  """The arrays of one checkpoint; only their headers are in memory.

  Attributes:
    source: path of the file or directory, for messages.
    headers: shape and dtype of each array, by key.
  """

  source: str
  headers: Mapping[str, ArrayHeader]
  _read: Callable[[str], np.ndarray]

  def read(self, key: str) -> np.ndarray:
    """Reads one array as float32, which is exact for all dtypes of `FLOATS`.

    Raises:
      ValueError: the array is corrupted, or holds NaN or infinity.
    """
    with _corruption_named(f'{key!r} of {self.source}'):
      array = self._read(key)
    if array.dtype.kind == 'V':
      array = array.view(jnp.bfloat16)
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
      raise ValueError(
          f'{key!r} of {self.source} holds NaN or infinity: the file is'
          ' corrupted. Download it again.'
      )
    return array


@contextlib.contextmanager
def open_weights(path: pathlib.Path) -> Iterator[WeightFiles]:
  """Opens a directory with safetensors files, or an .npz file.

  Args:
    path: a directory with `model.safetensors` or, for weights in several
      files, `model.safetensors.index.json`; or an .npz file.

  Raises:
    ValueError: files are missing or corrupted.
  """
  with contextlib.ExitStack() as stack:
    # pathlib's methods raise on names that are no valid file names.
    if os.path.isdir(path):
      headers, read = _open_directory(path, stack)
    elif path.suffix == '.safetensors':
      raise ValueError(
          f'{path} is one file of a checkpoint; give its directory, which must'
          ' hold config.json too.'
      )
    elif os.path.isfile(path):
      headers, read = _open_npz(path, stack)
    else:
      raise ValueError(
          f'There is no {path}; give a directory with config.json and'
          ' model.safetensors, or a big_vision .npz file.'
      )
    yield WeightFiles(str(path), headers, read)


@contextlib.contextmanager
def open_file(path: pathlib.Path) -> Iterator[WeightFiles]:
  """Opens one safetensors file without a config.json.

  Args:
    path: the file.

  Raises:
    ValueError: the file is missing, corrupted, or a pickle.
  """
  if not os.path.isfile(path):
    raise ValueError(f'There is no file {path}.')
  with contextlib.ExitStack() as stack:
    headers, read = _open_safetensors(path, stack)
    yield WeightFiles(str(path), headers, read)


@contextlib.contextmanager
def open_flax(path: pathlib.Path) -> Iterator[WeightFiles]:
  """Opens a file of `flax.serialization`, msgpack of nested dicts of arrays.

  Args:
    path: the file, which is read into memory.

  Yields:
    The arrays, with keys such as 'params/encoder/Conv_0/kernel'.

  Raises:
    ValueError: the file is missing, corrupted, or of another format.
  """
  if not os.path.isfile(path):
    raise ValueError(f'There is no file {path}.')
  with _corruption_named(str(path), 'Flax msgpack'):
    tree = serialization.msgpack_restore(path.read_bytes())
    if not isinstance(tree, dict):
      raise TypeError(f'it holds {type(tree).__name__} instead of dict')
    leaves = traverse_util.flatten_dict(tree)
    # Leaves may also be numbers, strings or None.
    arrays = {'/'.join(map(str, x)): np.asarray(y) for x, y in leaves.items()}
    headers = {
        key: ArrayHeader(x.shape, x.dtype.name) for key, x in arrays.items()
    }
  yield WeightFiles(str(path), headers, arrays.__getitem__)


def hash_weights(path: str | os.PathLike[str]) -> str:
  """Returns a hash of weights, which identifies the network of a metric.

  Args:
    path: a file, or a directory with safetensors files as in `open_weights`.

  Returns:
    sha256 in hexadecimal of the file, or of the directory's concatenated weight
    files in the order of their names, as printed by `cat FILES | sha256sum`.

  Raises:
    ValueError: files are missing or unreadable.
  """
  path = pathlib.Path(path).expanduser()
  paths = _find_files(path) if os.path.isdir(path) else [path]
  digest = hashlib.sha256()
  for file_path in paths:
    try:
      with open(file_path, 'rb') as file:
        while block := file.read(1 << 20):
          digest.update(block)
    except (OSError, ValueError) as error:
      raise ValueError(f'{file_path} cannot be read: {error}.') from error
  return digest.hexdigest()


def list_misfits(
    headers: Mapping[str, ArrayHeader],
    shapes: Mapping[str, tuple[int, ...]],
    is_unexpected: Callable[[str], bool],
) -> str:
  """Lists differences between a checkpoint and the arrays that are required.

  Args:
    headers: of the checkpoint.
    shapes: required shapes, by key.
    is_unexpected: whether a key of the checkpoint should not be there.

  Returns:
    The keys that are missing, unexpected, or of another shape or dtype, as part
    of an error message; '' without differences.
  """
  problems = {
      'missing': [key for key in shapes if key not in headers],
      'unexpected': [key for key in headers if is_unexpected(key)],
      'of another shape': [
          f'{key} is {headers[key].shape} instead of {tuple(shape)}'
          for key, shape in shapes.items()
          if key in headers and headers[key].shape != tuple(shape)
      ],
      'of another dtype': [
          f'{key} is {headers[key].dtype} instead of one of {sorted(FLOATS)}'
          for key in shapes
          if key in headers and headers[key].dtype not in FLOATS
      ],
  }
  listed = []
  for problem, keys in problems.items():
    if keys:
      more = f' and {len(keys) - _MAX_LISTED} more'
      listed.append(
          f'{len(keys)} {problem}: {", ".join(sorted(keys)[:_MAX_LISTED])}'
          + (more if len(keys) > _MAX_LISTED else '')
      )
  return '; '.join(listed)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object from a file.

  Raises:
    ValueError: the file is missing or holds no JSON object.
  """
  if not os.path.isfile(path):
    raise ValueError(
        f'{path.parent} has no {path.name}; a Hugging Face checkpoint is a'
        ' directory with config.json and model.safetensors.'
    )
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, RecursionError, ValueError) as error:
    raise ValueError(f'{path} is not a JSON file: {error}.') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} holds no JSON object; download it again.')
  return content


def _find_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the safetensors files of a directory, sorted by name."""
  if os.path.isfile(path / 'model.safetensors'):
    return [path / 'model.safetensors']
  return [path / name for name in sorted(set(_read_index(path).values()))]


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """Returns the name of the file with each key, from the index."""
  index = path / 'model.safetensors.index.json'
  if not os.path.isfile(index):
    raise ValueError(
        f'{path} has neither model.safetensors nor {index.name}. Files such as'
        ' pytorch_model.bin are pickles, which can run any code and are never'
        ' read; save the model as safetensors.'
    )
  files = read_json(index).get('weight_map')
  if not isinstance(files, dict) or not all(
      isinstance(name, str) and pathlib.PurePath(name).name == name
      for name in files.values()
  ):
    raise ValueError(
        f'{index} has no weight_map from keys to names of files beside it;'
        ' download it again.'
    )
  absent = sorted(
      name for name in set(files.values()) if not os.path.isfile(path / name)
  )
  if absent:
    raise ValueError(f'{path} lacks {absent}, which {index.name} names.')
  return files


def _open_directory(path, stack):
  whole = path / 'model.safetensors'
  if os.path.isfile(whole):
    return _open_safetensors(whole, stack)
  files = _read_index(path)
  headers, reads = {}, {}
  for name in sorted(set(files.values())):
    shard_headers, read = _open_safetensors(path / name, stack)
    for key, header in shard_headers.items():
      if files.get(key, name) == name:
        headers[key], reads[key] = header, read
  return headers, lambda key: reads[key](key)


def _open_safetensors(path, stack):
  with _corruption_named(str(path)):
    file = stack.enter_context(safetensors.safe_open(path, framework='numpy'))
    headers = {}
    for key in file.keys():  # noqa: SIM118, not a mapping.
      header = file.get_slice(key)
      dtype = header.get_dtype()
      headers[key] = ArrayHeader(
          tuple(header.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype)
      )
  return headers, file.get_tensor


def _open_npz(path, stack):
  with _corruption_named(str(path)):
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = {
        name.removesuffix('.npy'): name
        for name in archive.namelist()
        if name.endswith('.npy')
    }
    headers = {}
    for key, name in members.items():
      info = archive.getinfo(name)
      if info.compress_type not in _NPZ_COMPRESSION:
        raise ValueError(f'{key} has a compression that NumPy does not use')
      with archive.open(name) as file:
        headers[key] = _read_npy_header(file, key, info.file_size)

  def read(key):
    with archive.open(members[key]) as file:
      return np.lib.format.read_array(file, allow_pickle=False)

  return headers, read


def _read_npy_header(file, key: str, size: int) -> ArrayHeader:
  """Reads shape and dtype, and checks the number of bytes that follow."""
  version = np.lib.format.read_magic(file)
  # Later versions are for structured arrays; headers may have 4 GiB.
  if version != (1, 0):
    raise ValueError(f'{key} has the .npy format {version}')
  shape, _, dtype = np.lib.format.read_array_header_1_0(file)
  # Pickled objects have no known size; their dtype is rejected later.
  if not dtype.hasobject:
    claimed, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed != held:
      raise ValueError(f'{key} claims {claimed} bytes and holds {held}')
  name = dtype.name if dtype.names is None else 'structured'
  return ArrayHeader(tuple(shape), _NUMPY_DTYPES.get(name, name))


@contextlib.contextmanager
def _corruption_named(
    source: str, formats: str = 'safetensors or .npz'
) -> Iterator[None]:
  """Raises ValueError with the source for every error on corrupted files."""
  try:
    yield
  except _CORRUPTION as error:
    raise ValueError(
        f'{source} cannot be read: it is corrupted, or not {formats}.'
        f' {type(error).__name__}: {error}. Download it again.'
    ) from error
