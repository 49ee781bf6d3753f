"""Base classes of image sources, and the record of unreadable images."""

import abc
from collections.abc import Callable, Mapping, Sequence
import hashlib
import itertools
import math
import threading
from typing import NamedTuple

from absl import logging
import numpy as np
from PIL import Image

from fsq_jax.data import decoding
from fsq_jax.data import image_errors
from fsq_jax.data import pixel_formats
from fsq_jax.data import transforms

_NUM_LISTED = 10
# Digest of an image that has not been read, or cannot be read.
NO_DIGEST = bytes(32)


class ImageMetadata(NamedTuple):
  """Metadata of an image.

  Attributes:
    name: of the image in its split, independent of the folder of the split.
    label: index of its class; -1 without classes.
    num_bytes: size of the encoded image; None if it is not stored encoded.
  """

  name: str
  label: int = -1
  num_bytes: int | None = None


class Tile(NamedTuple):
  """Place of an image in a photograph: its name, and a corner in pixels."""

  photograph: str
  top: int
  left: int


class ImageSource(abc.ABC):
  """Thread-safe random access to the images of one split.

  Attributes:
    identity: identifies the images without reading them: 'name', 'split' and
      'content', independent of their place. For a folder 'content' is a hash of
      file names and sizes, for tar shards also of labels, for 'tfds' of
      dataset_info.json: replacing an image by another image of the same name
      and size does not change it, but changes `content_hash`.
    damaged: error messages, by index, of the images found unreadable so far.
    upscaled: indices of the images scaled up so far, which have fewer pixels
      than data.resize_shorter or data.image_size.
    skipped: number of other files in a folder of images, by kind ('.heic',
      '.json').
    channels: of the images: 1 (grey), 3 (RGB) or 4 (RGBA).
    evaluation_crop: description of the crops of an evaluation.
    label_names: names of the classes, by label; () without classes.
    tiles: places of all images, by index, if they are the tiles of whole
      photographs; () otherwise.
  """

  evaluation_crop = 'centre crop, smaller images scaled up'
  label_names: tuple[str, ...] = ()
  tiles: Sequence[Tile] = ()

  def __init__(
      self, name: str, split: str, content: str, *, channels: int = 3
  ):
    self.channels = channels
    self.identity = {'name': name, 'split': split, 'content': content}
    self.damaged: dict[int, str] = {}
    self.upscaled: set[int] = set()
    self._lock = threading.Lock()
    self.skipped: Mapping[str, int] = {}

  @abc.abstractmethod
  def __len__(self) -> int:
    """Number of examples."""

  @property
  def digests(self) -> np.ndarray:
    """sha256 of each encoded image by index, [n, 32] uint8.

    n is the number of examples, with `NO_DIGEST` for images that have not been
    read so far. It is 0 if images are not stored encoded; `identity['content']`
    is then a hash of their content.
    """
    return np.zeros((0, 32), np.uint8)

  @abc.abstractmethod
  def load(self, index: int) -> np.ndarray:
    """Returns an image to crop from, [h, w, channels] uint8, maybe read-only.

    Raises:
      DamagedImageError: it cannot be read; it is added to `damaged`.
      ValueError: too many images cannot be read.
    """

  def load_with_size(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the image of `load`, and its (height, width) as stored."""
    image = self.load(index)
    return image, image.shape[:2]

  @abc.abstractmethod
  def describe(self, index: int) -> str:
    """Returns the place of an image, for people."""

  def metadata(self, index: int) -> ImageMetadata:
    """Returns the metadata of an image, which may be unreadable."""
    return ImageMetadata(str(index))

  def record_upscaled(self, index: int) -> None:
    """Records an upscaled image; warns at the 1st, 10th, 100th, ..."""
    with self._lock:
      if index in self.upscaled:
        return
      self.upscaled.add(index)
      count = len(self.upscaled)
    if count == 10 ** (len(str(count)) - 1):
      logging.warning(
          'Scaled up so far: %d of %d images, which have fewer pixels than'
          ' data.image_size or data.resize_shorter. The last: %s',
          count,
          len(self),
          printable(self.describe(index)),
      )


class EncodedSource(ImageSource):
  """Images that are stored encoded; some may be unreadable.

  More unreadable images than a fraction max_damaged_share, rounded up to a
  whole number of images, are an error.

  Decoded images are cached in memory up to cache_mib: reading and decoding a
  small image takes longer than a training step of a small model.
  """

  def __init__(
      self,
      name: str,
      split: str,
      content: str,
      *,
      resize_shorter: int = 0,
      max_damaged_share: float = 0.01,
      cache_mib: int = 0,
      channels: int = 3,
  ):
    super().__init__(name, split, content, channels=channels)
    self._resize_shorter = resize_shorter
    self._max_damaged_share = max_damaged_share
    self._cache: dict[int, np.ndarray] = {}
    self._cache_bytes_left = cache_mib * 2**20
    self._digests: np.ndarray | None = None

  @property
  def digests(self) -> np.ndarray:
    with self._lock:
      if self._digests is None:
        self._digests = np.zeros((len(self), 32), np.uint8)
    return self._digests

  @abc.abstractmethod
  def read(self, index: int) -> bytes:
    """Returns an encoded image.

    Raises:
      DamagedImageError: a file that is too large to be an image.
      OSError: a failure to read it, which says nothing about the image.
    """

  def decode(self, encoded: bytes) -> Image.Image:
    """Returns the image of `read`, of mode pixel_formats.MODES[channels].

    Raises:
      DamagedImageError: it cannot be decoded.
    """
    return decoding.decode_to_pillow(encoded, self.channels)

  @abc.abstractmethod
  def stamp(self, index: int) -> tuple[int, int, int]:
    """Returns size in bytes, mtime and ctime in ns of the file of an image."""

  def load(self, index: int) -> np.ndarray:
    if (cached := self._cache.get(index)) is not None:
      return cached
    image, _ = self.load_with_size(index)
    self._keep(index, image)
    return image

  def load_with_size(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
    if index in self.damaged:
      raise image_errors.DamagedImageError(self.damaged[index])
    try:
      encoded = self.read(index)
      digest = hashlib.sha256(encoded).digest()
      self.digests[index] = np.frombuffer(digest, np.uint8)
      image = self.decode(encoded)
      width, height = image.size
      resized = transforms.resize_pillow(image, self._resize_shorter)
      if min(image.size) < self._resize_shorter:
        self.record_upscaled(index)
      return pixel_formats.to_array(resized), (height, width)
    except image_errors.DamagedImageError as error:
      self._record_damage(index, str(error))
      raise

  def _keep(self, index: int, image: np.ndarray) -> None:
    with self._lock:
      if index not in self._cache and image.nbytes <= self._cache_bytes_left:
        self._cache_bytes_left -= image.nbytes
        # Read-only, since all later batches get this array.
        image.flags.writeable = False
        self._cache[index] = image

  def _record_damage(self, index: int, reason: str) -> None:
    with self._lock:
      if index in self.damaged:
        return
      self.damaged[index] = reason
      damaged = {self.describe(i): why for i, why in self.damaged.items()}
    name = printable(self.describe(index))
    logging.warning('Image %s is skipped: %s.', name, reason)
    check_damaged_share(damaged, len(self), self._max_damaged_share)


def check_labels(
    labels: np.ndarray,
    label_names: Sequence[str],
    describe: Callable[[int], str],
) -> None:
  """Raises ValueError for labels without a name; warns of missing labels.

  Args:
    labels: [n] int64, by index of the image; -1 without a label.
    label_names: names of all classes; () without names.
    describe: `ImageSource.describe`.
  """
  index = int(np.argmax(labels))
  if label_names and labels[index] >= len(label_names):
    raise ValueError(
        f'{describe(index)} has the label {labels[index]}, but data.label_names'
        f' has {len(label_names)} names, for labels from 0 to'
        f' {len(label_names) - 1}. Name all classes in the order of their'
        ' labels.'
    )
  missing = np.flatnonzero(labels < 0)
  if 0 < len(missing) < len(labels):
    logging.warning(
        '%d of %d images have label -1, such as %s', len(missing), len(labels),
        printable(describe(int(missing[0]))),
    )


def printable(name: str) -> str:
  """Returns a file name with bytes that are not UTF-8 escaped."""
  return name.encode(errors='backslashreplace').decode()


def content_hash(digests: np.ndarray) -> str:
  """Returns a hash of the content of all encoded images of a source.

  Args:
    digests: [n, 32] uint8, sha256 of each encoded image by index; zeros for an
      image that has not been read, such as a file that is too large.

  Returns:
    The hex sha256 of all digests.
  """
  return hashlib.sha256(digests.tobytes()).hexdigest()


def check_damaged_share(
    damaged: Mapping[str, str], num_images: int, max_share: float
) -> None:
  """Raises ValueError if too many images of a split are unreadable.

  Args:
    damaged: error messages of the unreadable images, by name.
    num_images: of the split.
    max_share: data.max_damaged_share.

  Raises:
    ValueError: there are more; lists the first of them.
  """
  limit = math.ceil(max_share * num_images)
  if len(damaged) > limit:
    listing = '\n'.join(
        f'  {name}: {reason}'
        for name, reason in itertools.islice(damaged.items(), _NUM_LISTED)
    )
    raise ValueError(
        f'{len(damaged)} of {num_images} images cannot be read, more than the'
        f' {limit} that data.max_damaged_share = {max_share} allows. Repair or'
        f' remove them, or raise the limit. The first:\n{listing}'
    )
