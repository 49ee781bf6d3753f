"""Frechet distances between sets of images, by the features of a network.

With features of the Inception network of 2015 and its resizing, the distance is
FID (arXiv 1706.08500), and rFID between images and their reconstructions. With
any other network it is another number, and has to go by another name.

All is in float64 on the host.
"""

from collections.abc import Mapping
import hashlib
import json
import os
import pathlib
from typing import NamedTuple

from absl import logging
import numpy as np
import safetensors
import safetensors.numpy

from fsq_jax import workdir as workdirs

# With fewer images per feature, distances are far too large: a covariance has
# as many directions as features, each to be estimated.
_IMAGES_PER_FEATURE = 10
_FORMAT = 'fsq_jax feature statistics 1'


class Origin(NamedTuple):
  """What statistics are of; distances are between equal networks.

  Attributes:
    network: name of the network, with the layer and the resizing.
    weights_sha256: hash of its weights.
    images_hash: hash of the list of images, and of how they are cropped.
  """

  network: str
  weights_sha256: str
  images_hash: str


class FeatureStatistics:
  """Mean and covariance of the features of images, which come in batches.

  How images are batched, and in what order, changes the results by rounding
  only. Of features, float64 sums of squares around their mean are kept, not
  around 0, so that no digits are lost where the mean is large.

  Attributes:
    num_images: images so far.
    mean: [D] float64, their mean.
    pixels: a hash of the images' pixels, '' where nobody has set it; it is
      kept in files.
  """

  def __init__(self, num_features: int):
    """Statistics of no image.

    Args:
      num_features: D, features of an image.
    """
    if num_features < 1:
      raise ValueError(f'num_features is {num_features}; use at least 1.')
    self.num_images = 0
    self.pixels = ''
    self.mean = np.zeros(num_features)
    self._scatter = np.zeros((num_features, num_features))

  @classmethod
  def from_moments(
      cls, num_images: int, mean: np.ndarray, covariance: np.ndarray
  ) -> 'FeatureStatistics':
    """Returns the statistics of images with this mean and covariance."""
    statistics = cls(len(mean))
    statistics._add(num_images, mean, covariance * (num_images - 1))
    return statistics

  @property
  def covariance(self) -> np.ndarray:
    """[D, D] float64, with n - 1 in the denominator.

    Raises:
      ValueError: there are fewer than two images.
    """
    if self.num_images < 2:
      raise ValueError(
          f'The covariance of features needs two images, not {self.num_images}.'
      )
    return self._scatter / (self.num_images - 1)

  def update(
      self, features: np.ndarray, mask: np.ndarray | None = None
  ) -> None:
    """Adds a batch.

    Args:
      features: [B, D], any float dtype.
      mask: [B], which of them are of an image; None for all.

    Raises:
      ValueError: other shapes, or NaN or infinity in features of an image.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] != len(self.mean):
      raise ValueError(
          f'Features are {list(features.shape)}; these statistics are of [B,'
          f' {len(self.mean)}].'
      )
    if mask is not None:
      features = features[np.asarray(mask, bool)]
    features = features.astype(np.float64)
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
      raise ValueError(
          f'Features of {bad.sum()} of {len(bad)} images hold NaN or infinity;'
          ' leave these images out by the mask, and say so.'
      )
    if len(features):
      mean = features.mean(axis=0)
      centred = features - mean
      scatter = np.einsum('bd,be->de', centred, centred, optimize=True)
      self._add(len(features), mean, scatter)

  def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
    """Adds images by their moments (Chan, Golub, LeVeque 1979)."""
    total = self.num_images + count
    share = count / total
    difference = mean - self.mean
    self.mean = self.mean + share * difference
    self._scatter = (
        self._scatter
        + scatter
        + self.num_images * share * np.outer(difference, difference)
    )
    self.num_images = total


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
  """Squared Frechet distance of the normal distributions of two sets.

  |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The last trace is the sum of the
  square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), that is, of the
  singular values of F1^T F2 with S = F F^T from a symmetric eigensolver. Taken
  as singular values they keep the digits that a square root of eigenvalues
  near 0 would lose: with fewer images than features, most of them are 0.

  Args:
    a: statistics of one set, of two or more images.
    b: of the other.

  Returns:
    The distance, >= 0. Where images are few for their features it is far too
    large; a warning says so.

  Raises:
    ValueError: the sets have different numbers of features, or one image.
  """
  num_features = len(a.mean)
  if num_features != len(b.mean):
    raise ValueError(
        f'One set has {num_features} features, the other {len(b.mean)}; take'
        ' both from one network.'
    )
  num_images = min(a.num_images, b.num_images)
  if num_images < _IMAGES_PER_FEATURE * num_features:
    logging.warning(
        'A Frechet distance of %d features from %d images is biased upwards;'
        ' take %d images or more.',
        num_features,
        num_images,
        _IMAGES_PER_FEATURE * num_features,
    )
  first, second = a.covariance, b.covariance
  overlap = np.einsum(
      'di,dj->ij', _factor(first), _factor(second), optimize=True
  )
  distance = (
      np.sum(np.square(a.mean - b.mean))
      + np.trace(first)
      + np.trace(second)
      - 2 * np.sum(np.linalg.svd(overlap, compute_uv=False))
  )
  # Of a set with itself it is 0 up to rounding.
  return max(float(distance), 0.0)


def write_statistics(
    path: str | os.PathLike[str], statistics: FeatureStatistics, origin: Origin
) -> None:
  """Writes statistics as a safetensors file, atomically.

  Args:
    path: the file; its folder exists.
    statistics: of two or more images.
    origin: of the statistics; `read_statistics` compares it.
  """
  arrays = {'mean': statistics.mean, 'covariance': statistics.covariance}
  metadata = {
      **origin._asdict(),
      'format': _FORMAT,
      'num_images': str(statistics.num_images),
      'pixels': statistics.pixels,
  }
  metadata['sha256'] = _hash(arrays, metadata)
  workdirs.write_bytes(path, safetensors.numpy.save(arrays, metadata=metadata))


def read_statistics(
    path: str | os.PathLike[str], origin: Origin
) -> FeatureStatistics:
  """Reads the statistics that `write_statistics` wrote.

  Args:
    path: the file.
    origin: that the statistics must have.

  Returns:
    The statistics, to which more images may be added.

  Raises:
    ValueError: the file is missing, corrupted or without a hash, or its
      statistics are of another network, other weights or other images.
  """
  path = pathlib.Path(path).expanduser()
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (OSError, TypeError, ValueError, safetensors.SafetensorError) as error:
    raise ValueError(f'{path} cannot be read: {error}.') from error
  sha256 = metadata.pop('sha256', '')
  if metadata.get('format') != _FORMAT or sha256 != _hash(arrays, metadata):
    raise ValueError(
        f'{path} is corrupted, or holds no feature statistics with a hash.'
    )
  differences = [
      f'{name} {metadata[name]!r}, not {value!r}'
      for name, value in origin._asdict().items()
      if metadata[name] != value
  ]
  if differences:
    raise ValueError(f'{path} holds statistics of {"; ".join(differences)}.')
  statistics = FeatureStatistics.from_moments(
      int(metadata['num_images']), **arrays
  )
  statistics.pixels = metadata['pixels']
  return statistics


def _hash(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> str:
  """Returns a sha256 of the content of a file of statistics."""
  digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
  for name in sorted(arrays):
    digest.update(np.ascontiguousarray(arrays[name]).tobytes())
  return digest.hexdigest()


def _factor(covariance: np.ndarray) -> np.ndarray:
  """Returns F [D, rank] with F F^T the covariance."""
  values, vectors = np.linalg.eigh(covariance)
  # The directions of no variance come out of the solver as tiny numbers of
  # either sign.
  tolerance = len(values) * np.finfo(np.float64).eps * values[-1]
  kept = values > max(tolerance, 0)
  return vectors[:, kept] * np.sqrt(values[kept])
