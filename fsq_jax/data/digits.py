"""Handwritten digits of the scikit-learn package: labels without a download.

The file is read from the installed package; scikit-learn is not imported.
"""

import gzip
import hashlib
import importlib.util
import pathlib

import numpy as np
from PIL import Image

from fsq_jax.data import image_source
from fsq_jax.data import pixel_formats
from fsq_jax.data import transforms

# Of 1,797 images; the remaining 1,437 are the training split.
_NUM_VALIDATION = 360
_SIDE = 8
# The largest grey value of the file, white.
_WHITE = 16


class DigitsSource(image_source.ImageSource):
  """The 1,797 handwritten digits of scikit-learn, white on black.

  They are the test set of "Optical Recognition of Handwritten Digits" of the
  UCI repository: 8 x 8 pixels with 17 grey values, and labels 0 to 9. Strokes
  touch the border, so each image gets a black margin of one pixel. The 10 x 10
  pixels are rendered at `size` (Pillow's bicubic), which does not count as
  upscaling.

  The first 1,437 images of a permutation with a fixed seed are the training
  split, and the last 360 the validation split, each in the order of the file.
  A writer may be in both splits.
  """

  label_names = tuple('0123456789')

  def __init__(self, split: str, *, size: int, channels: int = 3):
    """Reads the images of a split.

    Args:
      split: 'train' or 'validation'.
      size: sides of the rendered images, pixels.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
      ValueError: scikit-learn is not installed.
    """
    data = _find_file().read_bytes()
    content = hashlib.sha256(data).hexdigest()[:16]
    super().__init__('sklearn', split, content, channels=channels)
    # Each row has the pixels of an image, row by row, and its label.
    rows = np.loadtxt(
        gzip.decompress(data).decode().splitlines(), np.int32, delimiter=','
    )
    # NumPy guarantees the stream of RandomState for all versions.
    order = np.random.RandomState(0).permutation(len(rows))
    self._rows = np.sort({
        'train': order[:-_NUM_VALIDATION],
        'validation': order[-_NUM_VALIDATION:],
    }[split])
    self._pixels = rows[self._rows, :-1]
    self._labels = rows[self._rows, -1]
    self._size = size

  def __len__(self) -> int:
    return len(self._rows)

  def describe(self, index: int) -> str:
    return f'{self.metadata(index).name}, a {self._labels[index]}'

  def metadata(self, index: int) -> image_source.ImageMetadata:
    return image_source.ImageMetadata(
        name=f'digit_{self._rows[index]:04}', label=int(self._labels[index])
    )

  def load(self, index: int) -> np.ndarray:
    grey = np.rint(self._pixels[index] * (255 / _WHITE)).astype(np.uint8)
    grey = Image.fromarray(np.pad(grey.reshape(_SIDE, _SIDE), 1))
    image = pixel_formats.to_array(pixel_formats.convert(grey, self.channels))
    return transforms.resize(image, (self._size, self._size))


def _find_file() -> pathlib.Path:
  package = importlib.util.find_spec('sklearn')
  if package is None:
    raise ValueError(
        "data.source is 'digits', which needs the scikit-learn package: "
        'pip install scikit-learn'
    )
  folder = pathlib.Path(package.submodule_search_locations[0])
  return folder / 'datasets' / 'data' / 'digits.csv.gz'
