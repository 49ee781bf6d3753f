"""Images in NumPy files: SPLIT.npy, memory-mapped, or SPLIT.npz."""

from collections.abc import Sequence
import hashlib
import os
from typing import Any

import numpy as np
from PIL import Image

from fsq_jax.data import image_errors
from fsq_jax.data import image_source
from fsq_jax.data import listing
from fsq_jax.data import pixel_formats

# Number of images whose pixels are part of the fingerprint.
_NUM_HASHED = 256


class ArraySource(image_source.EncodedSource):
  """The images of an array [N, H, W, channels] uint8, in its order.

  data_dir/SPLIT.npy is memory-mapped, and its labels are in SPLIT_labels.npy,
  if there is such a file. data_dir/SPLIT.npz is read into memory; its arrays
  are 'images' and, if there are labels, 'labels'. Labels are [N] integers >= 0,
  or -1 without a class. Nothing is unpickled.
  """

  def __init__(
      self,
      root: str,
      split: str,
      *,
      label_names: Sequence[str] = (),
      channels: int = 3,
      **reading: Any,
  ):
    """Opens the file of a split.

    Args:
      root: data.data_dir.
      split: name of the file without its extension.
      label_names: names of all classes, by label.
      channels: of the array.
      **reading: resize_shorter, max_damaged_share and cache_mib of
        EncodedSource.

    Raises:
      ValueError: no such file, no NumPy file, arrays of another shape or dtype,
        or labels outside of label_names.
    """
    root = os.path.abspath(os.path.expanduser(root))
    self._file, self._images, labels = _load_split(root, split)
    _check_images(self._file, self._images, channels)
    self._labels = _check_labels(self._file, labels, len(self._images))
    hashed = np.unique(
        np.linspace(0, len(self._images) - 1, _NUM_HASHED).astype(np.int64)
    )
    content = hashlib.sha256(f'{self._images.shape}'.encode())
    content.update(self._images[hashed].tobytes())
    content.update(self._labels.tobytes())
    super().__init__(
        '', split, content.hexdigest()[:16], channels=channels, **reading
    )
    self.label_names = tuple(label_names)
    image_source.check_labels(self._labels, self.label_names, self.describe)

  def __len__(self) -> int:
    return len(self._images)

  def describe(self, index: int) -> str:
    return f'{self._file} image {index}'

  def metadata(self, index: int) -> image_source.ImageMetadata:
    return image_source.ImageMetadata(str(index), int(self._labels[index]))

  def stamp(self, index: int) -> tuple[int, int, int]:
    # Of the file of all images.
    status = os.stat(self._file)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns

  def read(self, index: int) -> bytes:
    return self._images[index].tobytes()

  def decode(self, encoded: bytes) -> Image.Image:
    _, height, width, channels = self._images.shape
    mode = pixel_formats.MODES[channels]
    return Image.frombytes(mode, (width, height), encoded)


def _load_split(
    root: str, split: str
) -> tuple[str, np.ndarray, np.ndarray | None]:
  """Returns file, images and labels of a split, unchecked."""
  if not os.path.isdir(root):
    raise ValueError(f'data.data_dir is {root!r}, which is not a folder.')
  path = os.path.join(root, split)
  found = [x for x in (f'{path}.npy', f'{path}.npz') if os.path.isfile(x)]
  if len(found) != 1:
    raise ValueError(
        f'{root} has {len(found)} files of {split}.npy and {split}.npz; there'
        ' must be one. Set data.train_split and data.eval_split to names of'
        ' files without their extension; files there:'
        f' {listing.shorten(sorted(os.listdir(root)))}.'
    )
  if found[0].endswith('.npz'):
    with _load(found[0]) as arrays:
      if 'images' not in arrays:
        raise ValueError(
            f"{found[0]} has no array 'images'; its arrays are"
            f' {sorted(arrays)}. Write np.savez(FILE, images=..., labels=...).'
        )
      images = _take(found[0], arrays, 'images')
      labels = None
      if 'labels' in arrays:
        labels = _take(found[0], arrays, 'labels')
  else:
    images, labels = _load(found[0], mmap_mode='r'), None
    if os.path.isfile(f'{path}_labels.npy'):
      labels = _load(f'{path}_labels.npy')
  return found[0], images, labels


def _load(path: str, **kwargs: Any) -> Any:
  """Returns the content of a NumPy file of the kind that its name says."""
  try:
    content = np.load(path, allow_pickle=False, **kwargs)
  except image_errors.UNREADABLE_NUMPY as error:
    if isinstance(error, FileNotFoundError | PermissionError):
      raise
    raise ValueError(_describe_unreadable(path, error)) from error
  if isinstance(content, np.ndarray) == path.endswith('.npz'):
    raise ValueError(_describe_unreadable(path, 'not the format of its name'))
  return content


def _take(path: str, arrays: Any, name: str) -> np.ndarray:
  try:
    return arrays[name]
  except image_errors.UNREADABLE_NUMPY as error:
    raise ValueError(_describe_unreadable(path, error)) from error


def _describe_unreadable(path: str, reason: Any) -> str:
  return (
      f'{path} cannot be read ({reason}). It has to be a complete NumPy file'
      ' without objects; write it again by np.save or np.savez.'
  )


def _check_images(path: str, images: np.ndarray, channels: int) -> None:
  shape = images.shape
  if (
      images.dtype != np.uint8
      or len(shape) != 4
      or shape[-1] != channels
      or not images.size
  ):
    raise ValueError(
        f'{path} holds {images.dtype} of shape {shape}; images are uint8'
        f' [N, H, W, {channels}], in 0 ... 255, with at least one image.'
        ' Transpose channels to the end, scale and convert floats, save'
        ' images[..., None] of [N, H, W], or set data.channels to 1 (grey), 3'
        ' (RGB) or 4 (RGBA).'
    )


def _check_labels(
    path: str, labels: np.ndarray | None, num_images: int
) -> np.ndarray:
  """Returns the labels of a file, [N] int64; -1 where it has no labels."""
  if labels is None:
    return np.full(num_images, -1, np.int64)
  if (
      labels.shape != (num_images,)
      or labels.dtype.kind not in 'iu'
      or not -1 <= int(labels.min()) <= int(labels.max()) < 2**62
  ):
    raise ValueError(
        f'The labels of {path} are {labels.dtype} of shape {labels.shape};'
        f' labels are integers [{num_images}], one per image, >= 0, or -1'
        ' without a class.'
    )
  return labels.astype(np.int64)
