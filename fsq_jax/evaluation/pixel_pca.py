"""Principal components of pixels: features of images without a network."""

from typing import Any, NamedTuple

from einops import rearrange
import numpy as np

from fsq_jax.evaluation import frechet
from fsq_jax.evaluation import neighbours

_MAX_SIDE = 32
_MAX_COMPONENTS = 16
_WHITE = 255


class PixelPca(NamedTuple):
  """Mean and leading principal components of the pixels of images.

  Attributes:
    size: (height, width) that images are reduced to by area averaging.
    mean: [D] float64 pixels in [0, 255], D = height * width * C.
    components: [P, D] float64 orthonormal rows, largest variance first.
    variance_share: fraction of the variance along the components.
  """

  size: tuple[int, int]
  mean: np.ndarray
  components: np.ndarray
  variance_share: float

  @property
  def protocol(self) -> dict[str, Any]:
    """JSON values that describe the features."""
    return {
        'fitted_on': 'training images',
        'components': len(self.components),
        'variance_share': self.variance_share,
        'pixel_range': [0, 1],
        'image_size': list(self.size),
        'reduction': f'sides over {_MAX_SIDE} pixels by area averaging',
    }

  def project(self, images: np.ndarray) -> np.ndarray:
    """Maps images as in the fit to [n, P] float64; white pixels are 1."""
    parts = [
        np.einsum(
            'nd,pd->np', _reduce(images[rows], self.size) - self.mean,
            self.components, optimize=True,
        )
        for rows in neighbours.row_blocks(images)
    ]
    return np.concatenate(parts) / _WHITE


def fit_pixel_pca(images: np.ndarray) -> PixelPca:
  """Fits 16 components, or fewer if the images have fewer.

  Sides over 32 pixels are reduced to 32 by area averaging.

  Args:
    images: [n, H, W, C] training images, uint8 or from `reduce`.

  Raises:
    ValueError: fewer than two different images.
  """
  size = tuple(min(side, _MAX_SIDE) for side in images.shape[1:3])
  mean, variances, components = _decompose(images, size)
  tolerance = len(mean) * np.finfo(np.float64).eps * variances[0]
  rank = np.count_nonzero(variances > tolerance)
  if not rank:
    raise ValueError(
        f'The {len(images)} training images are all equal, and principal'
        ' components need different ones; give more images.'
    )
  num_components = min(rank, _MAX_COMPONENTS)
  return PixelPca(
      size,
      mean,
      np.ascontiguousarray(components[:num_components]),
      float(np.sum(variances[:num_components]) / np.sum(variances)),
  )


def reduce(images: np.ndarray) -> np.ndarray:
  """Reduces sides over 32 pixels to 32 by area averaging, as in the fit.

  Args:
    images: [n, H, W, C] uint8.

  Returns:
    [n, h, w, C], uint8 where nothing is reduced, else float64.
  """
  size = tuple(min(side, _MAX_SIDE) for side in images.shape[1:3])
  if size == images.shape[1:3]:
    return images
  parts = [
      _reduce(images[rows], size) for rows in neighbours.row_blocks(images)
  ]
  return np.concatenate(parts).reshape(len(images), *size, images.shape[3])


def _decompose(
    images: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns mean [D], variances [R] in falling order, and components [R, D]."""
  num_values = size[0] * size[1] * images.shape[3]
  if len(images) <= num_values:
    pixels = _reduce(images, size)
    mean = pixels.mean(axis=0)
    _, singular, components = np.linalg.svd(pixels - mean, full_matrices=False)
    return mean, np.square(singular) / max(len(images) - 1, 1), components
  moments = frechet.FeatureStatistics(num_values)
  for rows in neighbours.row_blocks(images):
    moments.update(_reduce(images[rows], size))
  variances, vectors = np.linalg.eigh(moments.covariance)
  return moments.mean, variances[::-1], vectors.T[::-1]


def _reduce(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Reduces [n, H, W, C] images by area averaging to [n, D] float64."""
  if images.shape[1:3] != size:
    images = np.einsum(
        'yh,xw,nhwc->nyxc',
        *(_overlaps(*s) for s in zip(images.shape[1:3], size, strict=True)),
        images.astype(np.float64), optimize=True,
    )
  return rearrange(images.astype(np.float64), 'n y x c -> n (y x c)')


def _overlaps(size_in: int, size_out: int) -> np.ndarray:
  """Returns [out, in] weights of input pixels in the mean over an output pixel.

  Output pixels cover size_in / size_out input pixels, also fractions of them.
  """
  scale = size_in / size_out
  left = np.arange(size_in)
  start = scale * np.arange(size_out)[:, None]
  ends = np.minimum(left + 1, start + scale)
  return np.maximum(ends - np.maximum(left, start), 0) / scale
