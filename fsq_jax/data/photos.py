"""Photographs of the scikit-image package: data without a download.

The files are read from the installed package; scikit-image is not imported.
"""

from collections.abc import Mapping, Sequence
import hashlib
import importlib.util
import math
import pathlib

import numpy as np

from fsq_jax.data import decoding
from fsq_jax.data import image_source
from fsq_jax.data import transforms

# Files in skimage/data, and their twentieths of the training crops: natural
# scenes first; tissue, retina and stars for variety of colour.
TRAIN_PHOTOS = {
    'astronaut.png': 6,
    'motorcycle_left.png': 4,  # a stereo pair
    'motorcycle_right.png': 4,
    'rocket.jpg': 2,  # three quarters of it are empty sky
    'ihc.png': 2,
    'retina.jpg': 1,
    'hubble_deep_field.jpg': 1,
}
# All but the pair for which scikit-image states no licence.
PUBLIC_DOMAIN_PHOTOS = {
    name: share
    for name, share in TRAIN_PHOTOS.items()
    if not name.startswith('motorcycle')
}
# Never trained on.
VALIDATION_PHOTOS = ('coffee.png', 'chelsea.png')
# Length of an epoch; the number of crops is unlimited.
CROPS_PER_EPOCH = 10_000


class _PhotoSource(image_source.ImageSource):
  """Images that are photographs, or crops of photographs."""

  def __init__(
      self,
      split: str,
      names: Sequence[str],
      resize_shorter: int,
      channels: int,
  ):
    self._photos, self._is_upscaled, content = _load_photos(
        names, resize_shorter, channels
    )
    super().__init__('skimage', split, content, channels=channels)

  def _take(self, name: str, index: int) -> np.ndarray:
    """Returns the photograph of the image with this index."""
    if self._is_upscaled[name]:
      self.record_upscaled(index)
    return self._photos[name]


class TrainPhotos(_PhotoSource):
  """Whole training photographs, for random crops: a few images, repeated.

  `TrainGrid` has the crops of a single pass.
  """

  def __init__(
      self,
      photos: Mapping[str, int] = TRAIN_PHOTOS,
      *,
      resize_shorter: int = 0,
      channels: int = 3,
  ):
    super().__init__('train', list(photos), resize_shorter, channels)
    self._turns = [
        name for name, share in photos.items() for _ in range(share)
    ]

  def __len__(self) -> int:
    return CROPS_PER_EPOCH

  def describe(self, index: int) -> str:
    return self._turns[index % len(self._turns)]

  def load(self, index: int) -> np.ndarray:
    return self._take(self.describe(index), index)


class _Crops(_PhotoSource):
  """Crops of photographs at given places."""

  # (photograph, top, left) of each.
  _places: list[tuple[str, int, int]]
  _size: tuple[int, int]

  def __len__(self) -> int:
    return len(self._places)

  def describe(self, index: int) -> str:
    name, top, left = self._places[index]
    return f'{name} at row {top}, column {left}'

  def load(self, index: int) -> np.ndarray:
    name, top, left = self._places[index]
    return self._crop(self._take(name, index), top, left)

  def _crop(self, photo: np.ndarray, top: int, left: int) -> np.ndarray:
    height, width = self._size
    return photo[top : top + height, left : left + width]


class TrainGrid(_Crops):
  """Distinct crops of the training photographs, for a single pass.

  Crops lie on a regular grid in each photograph, as many as it has in an epoch
  of training, without duplicates. A photograph smaller than the crop is one
  crop.
  """

  evaluation_crop = 'regular grid in whole photographs'

  def __init__(
      self,
      photos: Mapping[str, int] = TRAIN_PHOTOS,
      *,
      size: Sequence[int],
      resize_shorter: int = 0,
      channels: int = 3,
  ):
    super().__init__('train_grid', list(photos), resize_shorter, channels)
    self._size = tuple(size)
    num_shares = sum(photos.values())
    self._places = [
        (name, top, left)
        for name, share in photos.items()
        for top, left in _regular_grid(
            [
                max(side - crop, 0) + 1
                for side, crop in zip(
                    self._photos[name].shape[:2], self._size, strict=True
                )
            ],
            CROPS_PER_EPOCH * share // num_shares,
        )
    ]
    # Black margins have equal crops.
    first = {}
    for name, top, left in self._places:
      pixels = np.ascontiguousarray(self._crop(self._photos[name], top, left))
      first.setdefault(hashlib.sha256(pixels).digest(), (name, top, left))
    self._places = list(first.values())


class ValidationTiles(_Crops):
  """Tiles of the validation photographs, side by side and row by row.

  They start in the upper left corner, do not overlap, and omit the remainder
  at the right and lower edges.
  """

  evaluation_crop = 'disjoint tiles of whole photographs'

  def __init__(
      self, *, size: Sequence[int], resize_shorter: int = 0, channels: int = 3
  ):
    super().__init__(
        'validation', VALIDATION_PHOTOS, resize_shorter, channels
    )
    self._size = height, width = tuple(size)
    self._places = [
        (name, row * height, column * width)
        for name, photo in self._photos.items()
        for row in range(photo.shape[0] // height)
        for column in range(photo.shape[1] // width)
    ]
    if not self._places:
      shapes = [photo.shape[:2] for photo in self._photos.values()]
      raise ValueError(
          f'data.image_size is {tuple(size)}, but the validation photographs '
          f'have only {shapes} pixels; use a smaller image_size, a '
          'resize_shorter that enlarges them, or another data.source.'
      )
    self.tiles = [
        image_source.Tile(pathlib.Path(name).stem, top, left)
        for name, top, left in self._places
    ]


def _regular_grid(
    num_places: Sequence[int], num_points: int
) -> list[tuple[int, int]]:
  """Returns a regular grid of at most `num_points` (row, column) points.

  Args:
    num_places: numbers of rows and columns.
    num_points: desired number of points.
  """
  rows, columns = num_places
  num_rows = min(max(round(math.sqrt(num_points * rows / columns)), 1), rows)
  num_columns = min(num_points // num_rows, columns)
  return [
      (int(row), int(column))
      for row in np.linspace(0, rows - 1, num_rows)
      for column in np.linspace(0, columns - 1, num_columns)
  ]


def _load_photos(
    names: Sequence[str], resize_shorter: int, channels: int
) -> tuple[dict[str, np.ndarray], dict[str, bool], str]:
  """Loads photographs.

  Returns:
    Images [h, w, channels] uint8 by name; whether each was scaled up; a hash of
    the files.
  """
  package = importlib.util.find_spec('skimage')
  if package is None:
    raise ValueError(
        "data.source is 'photos', which needs the scikit-image package: "
        'pip install scikit-image'
    )
  folder = pathlib.Path(package.submodule_search_locations[0]) / 'data'
  photos, is_upscaled, content = {}, {}, hashlib.sha256()
  for name in names:
    data = (folder / name).read_bytes()
    content.update(data)
    image = decoding.decode_image(data, channels)
    is_upscaled[name] = min(image.shape[:2]) < resize_shorter
    photos[name] = transforms.resize_shorter(image, resize_shorter)
  return photos, is_upscaled, content.hexdigest()[:16]
