"""Detects changes of images since they were tokenized."""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import hashlib
import io
import pathlib
import time
from typing import NamedTuple

import jax
import numpy as np

from fsq_jax.data import image_errors
from fsq_jax.data import image_source
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import object_store
from fsq_jax.workdir import progress

HASHES_FILE = 'image_hashes.npy'
# Times of this copy of the images; without the file, hashes are compared.
TIMES_FILE = '.image_times.npy'
_UNKNOWN = (0, 0, 0)
# Two changes within the resolution of file times are not distinguished; FAT has
# the coarsest, 2 s.
RESOLUTION_NS = 2 * 10**9
_NUM_LISTED = 10
# Images submitted to the threads at a time.
_BLOCK = 1024


class ImageState(NamedTuple):
  """State of an image when it was read.

  Attributes:
    digest: sha256 of the encoded image; `image_source.NO_DIGEST` if not read.
    stamp: size in bytes, mtime and ctime in ns of its file; zeros if unknown.
  """

  digest: bytes
  stamp: tuple[int, int, int]


class ImageStates(NamedTuple):
  """The states of n images.

  Attributes:
    digests: [n, 32] uint8.
    stamps: [n, 3] int64.
  """

  digests: np.ndarray
  stamps: np.ndarray

  @property
  def content_hash(self) -> str:
    """`data.content_hash` of these images."""
    return image_source.content_hash(self.digests)


def stack(states: Sequence[ImageState]) -> ImageStates:
  """Returns the states of several images."""
  digests = b''.join(state.digest for state in states)
  stamps = [state.stamp for state in states]
  return ImageStates(
      np.frombuffer(digests, np.uint8).reshape((len(states), 32)),
      np.array(stamps, np.int64).reshape((len(states), 3)),
  )


def concatenate(parts: Sequence[ImageStates]) -> ImageStates:
  """Concatenates the states of several parts."""
  return ImageStates(*map(np.concatenate, zip(*parts, strict=True)))


def take_stamp(
    source: image_source.EncodedSource, index: int
) -> tuple[int, int, int]:
  """Returns the stamp of a file before it is read.

  Args:
    source: the images.
    index: of the image.

  Returns:
    `source.stamp(index)`; zeros if the file is so new that a change might not
    change its times.
  """
  stamp = source.stamp(index)
  is_new = time.time_ns() - max(stamp[1:]) < RESOLUTION_NS
  return _UNKNOWN if is_new else stamp


def check_unchanged(
    source: image_source.EncodedSource,
    states: ImageStates,
    indices: Sequence[int],
    *,
    verify: bool,
    folder: pathlib.Path,
    num_threads: int,
) -> None:
  """Checks that images have not changed since they were tokenized.

  As in Git's index, a file of the same size and times counts as unchanged; the
  hashes of all other files are compared.

  Args:
    source: the images.
    states: states of the images when they were tokenized.
    indices: indices of the images.
    verify: compare the hashes of all images.
    folder: of the token files.
    num_threads: reader threads.

  Raises:
    ValueError: images have changed; lists the first of them.
  """

  def is_suspect(row: int) -> bool:
    return verify or source.stamp(indices[row]) != tuple(states.stamps[row])

  def is_changed(row: int) -> bool:
    return _digest(source, indices[row]) != states.digests[row].tobytes()

  with futures.ThreadPoolExecutor(num_threads) as pool:
    suspects = list(_select(is_suspect, range(len(indices)), pool))
    bar = progress.ImageProgress(
        num_images=len(suspects), first=0,
        enabled=bool(suspects) and jax.process_index() == 0,
    )
    with contextlib.closing(bar):
      changed = [
          indices[row] for row in _select(is_changed, suspects, pool, bar)
      ]
  if changed:
    listing = '\n  '.join(map(source.describe, changed[:_NUM_LISTED]))
    raise ValueError(
        f'{len(changed)} of {len(source)} images have changed since the tokens'
        f' in {folder} were made. The first:\n  {listing}\nDelete that folder'
        ' to tokenize the images again, or give another folder with --tokens.'
    )


def _select(
    test: Callable[[int], bool],
    rows: Sequence[int],
    pool: futures.Executor,
    bar: progress.ImageProgress | None = None,
) -> Iterator[int]:
  """Yields the rows that pass a test, run by threads block by block."""
  for start in range(0, len(rows), _BLOCK):
    block = rows[start : start + _BLOCK]
    for row, passes in zip(block, pool.map(test, block), strict=True):
      if bar is not None:
        bar.update(1)
      if passes:
        yield row


def write(folder: pathlib.Path, states: ImageStates) -> None:
  """Writes the states of all images: a file of hashes and a file of times."""
  files = {HASHES_FILE: states.digests, TIMES_FILE: states.stamps}
  for name, array in files.items():
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    workdirs.write_bytes(folder / name, buffer.getvalue())


def read(folder: pathlib.Path, num_images: int, content: str) -> ImageStates:
  """Reads the files of `write`.

  Args:
    folder: of the token files.
    num_images: number of images in the source.
    content: content hash of all images.

  Returns:
    The states; stamps are zeros if their file is missing or corrupted.

  Raises:
    ValueError: the hashes are missing or corrupted.
  """
  digests = _load(folder / HASHES_FILE, (num_images, 32), np.uint8)
  stamps = _load(folder / TIMES_FILE, (num_images, 3), np.int64)
  if stamps is None:
    stamps = np.zeros((num_images, 3), np.int64)
  if digests is None or ImageStates(digests, stamps).content_hash != content:
    raise ValueError(
        f'{folder / HASHES_FILE}, the hashes of the images, is missing or'
        ' corrupted; copy it again, or delete the folder and run'
        ' --mode=tokenize again.'
    )
  return ImageStates(digests, stamps)


def _load(
    path: pathlib.Path, shape: tuple[int, ...], dtype: type
) -> np.ndarray | None:
  try:
    content = workdirs.read_bytes(path)
    array = np.load(io.BytesIO(content), allow_pickle=False)
  except object_store.StoreError:
    raise  # The file may be intact.
  except (OSError, ValueError, EOFError):
    return None
  return array if (array.shape, array.dtype) == (shape, dtype) else None


def _digest(source: image_source.EncodedSource, index: int) -> bytes:
  try:
    return hashlib.sha256(source.read(index)).digest()
  except image_errors.DamagedImageError:
    return image_source.NO_DIGEST
