"""Frechet distances between sets of images, by the features of a network.

With features of the Inception network of 2015 and its resizing, the distance is
FID (arXiv 1706.08500), and rFID between images and their reconstructions. With
any other network it is another number, and has to go by another name.

All is in float64 on the host.
"""

import json
import os
import pathlib
from typing import NamedTuple

from absl import logging
import numpy as np
import safetensors
import safetensors.numpy

from fsq_jax import workdir as workdirs

# Below this number of images a feature, distances are too large by far: a
# covariance has as many directions as features, each to be estimated.
MIN_IMAGES_PER_FEATURE = 10
_FORMAT = 'fsq_jax feature statistics 1'
# Share of the largest entry by which a covariance may differ from its mirror
# image.
_ASYMMETRY = 1e-9


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

  @property
  def images_per_feature(self) -> float:
    """Images / D; below `MIN_IMAGES_PER_FEATURE` distances say little."""
    return self.num_images / len(self.mean)

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
      mask = np.asarray(mask, bool)
      if mask.shape != features.shape[:1]:
        raise ValueError(
            f'mask is {list(mask.shape)} for {len(features)} rows of features;'
            ' it has one value for each.'
        )
      features = features[mask]
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
  _check_same_features(a, b)
  smaller = min(a, b, key=lambda x: x.num_images)
  if smaller.images_per_feature < MIN_IMAGES_PER_FEATURE:
    logging.warning(
        'A Frechet distance of %d features from %d images is too large; take'
        ' %d or more.',
        len(smaller.mean),
        smaller.num_images,
        MIN_IMAGES_PER_FEATURE * len(smaller.mean),
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
  """Writes statistics as a safetensors file, whole or not at all.

  Args:
    path: the file; its folder exists.
    statistics: of two or more images.
    origin: what they are of, which `read_statistics` asks for.
  """
  arrays = {'mean': statistics.mean, 'covariance': statistics.covariance}
  facts = {
      **origin._asdict(),
      'format': _FORMAT,
      'num_images': str(statistics.num_images),
      'pixels': statistics.pixels,
  }
  workdirs.write_bytes(path, safetensors.numpy.save(arrays, metadata=facts))


def read_statistics(
    path: str | os.PathLike[str], origin: Origin
) -> FeatureStatistics:
  """Reads what `write_statistics` wrote.

  Args:
    path: the file.
    origin: what the statistics have to be of.

  Returns:
    The statistics, to which more images may be added.

  Raises:
    ValueError: no such file, a damaged one, one of another network, of other
      weights or of other images, or one that holds no mean and covariance.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise ValueError(f'There is no file {path} of feature statistics.')
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      facts = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (OSError, TypeError, safetensors.SafetensorError) as error:
    raise ValueError(f'{path} is no safetensors file: {error}.') from error
  num_images = facts.get('num_images', '')
  if facts.get('format') != _FORMAT or not num_images.isdecimal():
    raise ValueError(
        f'{path} holds no feature statistics of the format {_FORMAT!r}, but'
        f' {json.dumps(facts)}; measure them again.'
    )
  differences = [
      f'{name} {facts.get(name)!r}, not {value!r}'
      for name, value in origin._asdict().items()
      if facts.get(name) != value
  ]
  if differences:
    raise ValueError(
        f'{path} holds statistics of {"; ".join(differences)}. Distances'
        ' between such sets mean nothing; measure them again.'
    )
  num_images = int(num_images)
  _check_arrays(path, arrays, num_images)
  statistics = FeatureStatistics(len(arrays['mean']))
  statistics.pixels = facts.get('pixels', '')
  statistics._add(
      num_images, arrays['mean'], arrays['covariance'] * (num_images - 1)
  )
  return statistics


def _check_arrays(path, arrays, num_images: int) -> None:
  """Refuses what is no mean and no covariance of images."""
  shapes = {name: x.shape for name, x in arrays.items()}
  size = arrays['mean'].size if 'mean' in arrays else 0
  problem = ''
  if shapes != {'mean': (size,), 'covariance': (size, size)} or not size:
    problem = f'arrays of shapes {shapes}, not mean [D] and covariance [D, D]'
  elif any(x.dtype != np.float64 for x in arrays.values()):
    problem = 'arrays of another dtype than float64'
  elif num_images < 2:
    problem = f'statistics of {num_images} images; a covariance needs two'
  elif not all(np.isfinite(x).all() for x in arrays.values()):
    problem = 'NaN or infinity'
  else:
    covariance = arrays['covariance']
    asymmetry = np.abs(covariance - covariance.T).max()
    if asymmetry > _ASYMMETRY * np.abs(covariance).max():
      problem = f'a covariance that is not symmetric, by {asymmetry:.3g}'
    elif covariance.diagonal().min() < 0:
      problem = 'a covariance with negative variances'
  if problem:
    raise ValueError(f'{path} holds {problem}; measure the statistics again.')


def _check_same_features(a: FeatureStatistics, b: FeatureStatistics) -> None:
  if len(a.mean) != len(b.mean):
    raise ValueError(
        f'One set has {len(a.mean)} features, the other {len(b.mean)}; take'
        ' both from one network.'
    )


def _factor(covariance: np.ndarray) -> np.ndarray:
  """Returns F [D, rank] with F F^T the covariance."""
  values, vectors = np.linalg.eigh(covariance)
  # The directions of no variance come out of the solver as tiny numbers of
  # either sign.
  tolerance = len(values) * np.finfo(np.float64).eps * values[-1]
  kept = values > max(tolerance, 0)
  return vectors[:, kept] * np.sqrt(values[kept])
