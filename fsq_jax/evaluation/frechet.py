"""Frechet distances between sets of images, from features of a network.

With features of the Inception network of 2015 and its resizing the distance is
FID (arXiv 1706.08500), and rFID between images and their reconstructions. With
other networks it has other values and needs another name.

Everything is computed in float64 on the host.
"""

from collections.abc import Mapping
import hashlib
import json
import os
from typing import NamedTuple

from absl import logging
import numpy as np
import safetensors
import safetensors.numpy

from fsq_jax.evaluation import moments
from fsq_jax.workdir import files as workdirs

# With fewer images per feature, distances are far too large: a covariance has
# as many directions as features, each to be estimated.
_IMAGES_PER_FEATURE = 10
_FORMAT = 'fsq_jax feature statistics 1'


class Origin(NamedTuple):
  """Network and images of statistics.

  Attributes:
    network: name of the metric, which fixes network, layer and resizing.
    weights_sha256: hash of the network's weights.
    images_hash: hash of the list of images and their preprocessing.
  """

  network: str
  weights_sha256: str
  images_hash: str


class FeatureStatistics:
  """Mean and covariance of the features of images, accumulated by batches.

  Batch size and order change results only by rounding. Squares are summed
  around the mean, not around 0, so that large means cost no precision.

  Attributes:
    num_images: images so far.
    mean: [D] float64.
    pixels: hash of the images' pixels, stored in files; '' if not set.
  """

  def __init__(self, num_features: int):
    """Statistics of no images.

    Args:
      num_features: D, features per image.
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
    """Covariance [D, D] float64, with denominator num_images - 1.

    Raises:
      ValueError: fewer than two images.
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
      mask: [B], False for padding; None without padding.

    Raises:
      ValueError: features of another shape, or NaN or infinity in them.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] != len(self.mean):
      raise ValueError(
          f'Features are {list(features.shape)}; these statistics take [B,'
          f' {len(self.mean)}].'
      )
    if mask is not None:
      features = features[np.asarray(mask, bool)]
    features = features.astype(np.float64)
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
      raise ValueError(
          f'Features of {bad.sum()} of {len(bad)} images hold NaN or infinity;'
          ' exclude these images by the mask, and report their number.'
      )
    if len(features):
      mean = features.mean(axis=0)
      centred = features - mean
      scatter = np.einsum('bd,be->de', centred, centred, optimize=True)
      self._add(len(features), mean, scatter)

  def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
    """Adds images by their moments."""
    self.num_images, self.mean, self._scatter = moments.merge(
        moments.Moments(self.num_images, self.mean, self._scatter),
        moments.Moments(count, mean, scatter),
        product=lambda x: np.outer(x, x),
    )


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
  """Returns the squared Frechet distance of two normal distributions.

  |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The last trace is the sum of the
  square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2). They are the singular
  values of F1^T F2, with S = F F^T from a symmetric eigensolver, and keep the
  precision that square roots of eigenvalues near 0 lose; with fewer images than
  features most eigenvalues are 0.

  Args:
    a: statistics of one set, with two or more images.
    b: statistics of the other set.

  Returns:
    The distance, >= 0. It is biased upwards if there are few images per
    feature; a warning is logged.

  Raises:
    ValueError: different numbers of features, or a set of one image.
  """
  num_features = len(a.mean)
  if num_features != len(b.mean):
    raise ValueError(
        f'One set has {num_features} features, the other {len(b.mean)}; use'
        ' features of the same network.'
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
  return biased_frechet_distance(a, b)


def biased_frechet_distance(
    a: FeatureStatistics, b: FeatureStatistics
) -> float:
  """Returns `frechet_distance` without its warning about few images."""
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
  # Rounding may make it negative.
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
  path = workdirs.run_folder(path, 'path')
  try:
    with (
        workdirs.local_copy(path) as local,
        safetensors.safe_open(local, framework='numpy') as file,
    ):
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (OSError, TypeError, ValueError, safetensors.SafetensorError) as error:
    raise ValueError(f'{path} cannot be read: {error}.') from error
  sha256 = metadata.pop('sha256', '')
  if metadata.get('format') != _FORMAT or sha256 != _hash(arrays, metadata):
    raise ValueError(
        f'{path} is corrupted, or written by another version of fsq_jax.'
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
  # Eigenvalues that are 0 come out of the solver as tiny numbers of both signs.
  tolerance = len(values) * np.finfo(np.float64).eps * values[-1]
  kept = values > max(tolerance, 0)
  return vectors[:, kept] * np.sqrt(values[kept])
