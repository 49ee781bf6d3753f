"""Metrics of generated images against a held-out reference set.

Frechet distances, improved precision and recall, Inception score, and distances
to the training images. Features come from principal components of pixels and
from frozen networks; the metrics are computed from them in float64 on the host.
"""

from collections.abc import Iterable, Mapping, Sequence
import hashlib
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from fsq_jax.evaluation import frechet
from fsq_jax.evaluation import neighbours
from fsq_jax.evaluation import network_metrics
from fsq_jax.evaluation import pixel_pca
from fsq_jax.perceptual import inception
from fsq_jax.runtime import batching
from fsq_jax.runtime import partitioning

NO_LABEL = -1
_NEIGHBOURS = 3
_BATCH_SIZE = 64
_NUM_SPLITS = 10
_SEED = 0
# Images per component of each class in the class-wise distance.
_IMAGES_PER_COMPONENT = 2


class ImageSet(NamedTuple):
  """Images with class labels.

  Attributes:
    images: [n, H, W, C] uint8.
    labels: [n] int64; -1 for no class.
  """

  images: np.ndarray
  labels: np.ndarray


class SampleMetrics(NamedTuple):
  """Metrics of generated images.

  Attributes:
    metrics: values by name.
    protocol: JSON values: definitions, numbers of images, sha256 of networks,
      settings.
  """

  metrics: dict[str, float]
  protocol: dict[str, Any]


class _Features(NamedTuple):
  """Features of images, and the names of their metrics.

  Attributes:
    description: of the features.
    frechet: name of the Frechet distance.
    feature_metric: key of `eval.networks` with the same network.
    inception_score: name of the Inception score; '' without.
  """

  description: str
  frechet: str
  feature_metric: str = ''
  inception_score: str = ''


_PIXEL_PCA = 'pixel_pca'
_NETWORKS = {
    'inception': _Features(
        "FID's Inception-v3, 2048 pooled features, images resized as by"
        ' pytorch-fid',
        'fid', 'rfid', 'inception_score',
    ),
    'inception_tf1': _Features(
        "FID's Inception-v3, 2048 pooled features, images resized on the grid"
        ' of TensorFlow 1, as by torch-fidelity and the ADM suite',
        'fid_tf1', 'rfid_tf1', 'inception_score_tf1',
    ),
    'vgg16': _Features(
        'VGG16, 512 means of relu5_3; not to be called FID',
        'fd_vgg16', 'fd_vgg16',
    ),
}
_FEATURES = {
    _PIXEL_PCA: _Features(
        'leading principal components of the training images; not to be called'
        ' FID',
        'fd_pixel_pca',
    ),
    **_NETWORKS,
}
_FRECHET = (
    'Frechet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) between the'
    ' features of samples and of reference images, lower is better'
)
_PRECISION = (
    'improved precision (arXiv 1904.06991), fraction of the samples inside the'
    ' k-nearest-neighbour balls of the reference, higher is better'
)
_RECALL = (
    'improved recall, fraction of the reference images inside the'
    ' k-nearest-neighbour balls of the samples, higher is better'
)
_SCORE = (
    'exp of the mean KL divergence of class probabilities from their mean,'
    ' logits without bias, images shuffled before they are split; '
)
DEFINITIONS = {
    **{x.frechet: f'{_FRECHET}: {x.description}' for x in _FEATURES.values()},
    **{
        f'{metric}_{name}': f'{text}: {x.description}'
        for name, x in _FEATURES.items()
        for metric, text in (('precision', _PRECISION), ('recall', _RECALL))
    },
    **{
        f'{x.inception_score}{suffix}': f'{_SCORE}{statistic}: {x.description}'
        for x in _NETWORKS.values()
        for suffix, statistic in (
            ('', 'mean over splits, higher is better'),
            ('_std', 'standard deviation over splits'),
        )
        if x.inception_score
    },
    'fd_pixel_pca_within_class': (
        'mean over classes of fd_pixel_pca between samples and reference images'
        ' of the class; biased upwards, since classes have few images'
    ),
    'nearest_neighbour_accuracy': (
        'fraction of the samples with a label whose nearest training image in'
        ' pixels has the same label; higher is better'
    ),
    'copies': (
        'samples that equal one of the num_images.train training images in'
        ' every pixel'
    ),
    'copies_share': 'copies as a fraction of the samples',
    'nearest_train_distance': (
        'mean over samples of the RMS difference per pixel, in [0, 255], to the'
        ' nearest training image; sides over 32 pixels reduced to 32'
    ),
    'nearest_train_distance_reference': (
        'nearest_train_distance of the reference images in place of the samples'
    ),
}


class Network(NamedTuple):
  """A network that gives features of images.

  Attributes:
    features: a key of `_NETWORKS`.
    network: on the devices of `mesh`.
    classifier: [K, D] weights of the Inception score; None without.
    mesh: from `partitioning.create_mesh`.
  """

  features: str
  network: network_metrics.Network
  classifier: np.ndarray | None
  mesh: jax.sharding.Mesh


def load_networks(
    paths: Mapping[str, str], mesh: jax.sharding.Mesh
) -> tuple[Network, ...]:
  """Loads the networks of samples' features.

  Args:
    paths: weights by network: 'inception', 'inception_tf1' and 'vgg16', the
      files of rfid, rfid_tf1 and fd_vgg16 in `eval.networks`; '' for networks
      that are not wanted.
    mesh: from `partitioning.create_mesh`; the networks run on it.

  Raises:
    ValueError: an unknown network, or weights that are missing or corrupted.
  """
  loaded = []
  for name, path in paths.items():
    if not path:
      continue
    if name not in _NETWORKS:
      raise ValueError(f'The network is {name!r}; known: {sorted(_NETWORKS)}.')
    features = _NETWORKS[name]
    try:
      network = network_metrics.load_network(
          features.feature_metric, path, mesh
      )
      classifier = None
      if features.inception_score:
        classifier = inception.read_classifier(path)
    except ValueError as error:
      raise ValueError(f'eval.networks.{name}: {error}') from error
    loaded.append(Network(name, network, classifier, mesh))
  return tuple(loaded)


class SampleEvaluator:
  """Compares generated images with held-out and with training images.

  Images come in batches, of which features and reduced pixels are kept: 50,000
  images of 256 x 256 pixels, 9.8 GB, take 1.2 GB and their features. What is
  computed from held-out and training images is cached.
  """

  def __init__(
      self,
      reference: Iterable[ImageSet],
      train: Iterable[ImageSet],
      networks: Sequence[Network] = (),
  ):
    """Measures both sets and fits the principal components.

    Args:
      reference: batches of held-out images.
      train: batches of images that the generator was trained on.
      networks: from `load_networks`.

    Raises:
      ValueError: an empty set, images that are not uint8, of different sizes,
        all equal, or too small for a network, or wrong labels.
    """
    self._networks = networks
    self._reference = _measure('reference', reference, networks)
    self._train = _measure('train', train)
    self._check_size('reference', self._reference)
    self._pca = pixel_pca.fit_pixel_pca(self._train.images)
    self._components = self._pca.project(self._reference.images)
    _, self._distances = _nearest(self._reference, self._train)

  def run(self, samples: Iterable[ImageSet]) -> SampleMetrics:
    """Measures samples; results depend on the images and networks alone.

    With several processes all call it with the same sets, and get the same.

    Args:
      samples: batches of generated images, with the labels they were generated
        for.

    Returns:
      The metrics. `nearest_neighbour_accuracy` is left out if no sample has a
      label, `fd_pixel_pca_within_class` if a class has too few images.

    Raises:
      ValueError: an empty set, images that are not uint8 or of another size
        than the reference, wrong or missing labels, or too few images.
    """
    reference, train = self._reference, self._train
    samples = _measure('samples', samples, self._networks)
    self._check_size('samples', samples)
    missing = np.count_nonzero(train.labels == NO_LABEL)
    if np.any(samples.labels != NO_LABEL) and missing:
      raise ValueError(
          f'Samples have class labels, and {missing} of {len(train.labels)}'
          ' training images have none; give every training image its label, or'
          f' all samples {NO_LABEL}.'
      )
    components = self._pca.project(samples.images), self._components
    metrics = _compare(_PIXEL_PCA, components)
    metrics |= _within_class(components, samples.labels, reference.labels)
    for network in self._networks:
      name = network.features
      features = samples.features[name], reference.features[name]
      metrics |= _compare(name, features)
      if score := _NETWORKS[name].inception_score:
        metrics[score], metrics[f'{score}_std'] = inception_score(
            features[0], network.classifier, num_splits=_NUM_SPLITS, seed=_SEED
        )
    metrics |= self._compare_with_train(samples)
    sets = {'samples': samples, 'reference': reference, 'train': train}
    protocol = {
        'definitions': {name: DEFINITIONS[name] for name in metrics},
        'num_images': {name: len(x.labels) for name, x in sets.items()},
        'image_size': list(samples.size[:2]),
        'networks': {x.features: x.network.sha256 for x in self._networks},
        'precision_recall_k': _NEIGHBOURS,
        'inception_score_splits': _NUM_SPLITS,
        'inception_score_seed': _SEED,
        'pixel_pca': self._pca.protocol,
    }
    return SampleMetrics(metrics, protocol)

  def find_nearest(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the nearest training image of each image, in pixels.

    Sides over 32 pixels are reduced to 32 by area averaging: whole photographs
    would take hours.

    Args:
      images: [n, H, W, C] uint8, of the size of the training images.

    Returns:
      Indices [n] int64 of training images, in the order of `train`, the lowest
      of equally near ones; distances [n] float64, RMS over pixels and channels
      in [0, 255].

    Raises:
      ValueError: images that are not uint8 or of another size.
    """
    labels = np.full(len(images), NO_LABEL)
    samples = _measure('samples', [ImageSet(images, labels)])
    self._check_size('samples', samples)
    return _nearest(samples, self._train)

  def _check_size(self, name: str, measured: '_Measured') -> None:
    if measured.size != self._train.size:
      sizes = {name: measured.size, 'train': self._train.size}
      raise ValueError(
          f'Images have the sizes {sizes}; convert them to the same height,'
          ' width and channels.'
      )

  def _compare_with_train(self, samples: '_Measured') -> dict[str, float]:
    """Returns the metrics of the nearest training images."""
    indices, distances = _nearest(samples, self._train)
    known = set(self._train.digests)
    is_copy = [x in known for x in samples.digests]
    metrics = {
        'copies': float(np.sum(is_copy)),
        'copies_share': float(np.mean(is_copy)),
        'nearest_train_distance': float(np.mean(distances)),
        'nearest_train_distance_reference': float(np.mean(self._distances)),
    }
    has_label = samples.labels != NO_LABEL
    if has_label.any():
      matches = self._train.labels[indices] == samples.labels
      metrics['nearest_neighbour_accuracy'] = float(np.mean(matches[has_label]))
    return metrics


class _Measured(NamedTuple):
  """Features and reduced pixels of the images of a set.

  Attributes:
    images: [n, h, w, C], sides over 32 pixels reduced to 32.
    labels: [n] integers.
    digests: sha256 of the pixels of each image.
    features: [n, D] float32 by network.
    size: (H, W, C) of the images.
  """

  images: np.ndarray
  labels: np.ndarray
  digests: list[bytes]
  features: dict[str, np.ndarray]
  size: tuple[int, int, int]


def _measure(
    name: str, batches: Iterable[ImageSet], networks: Sequence[Network] = ()
) -> _Measured:
  """Measures a set, whose images are not kept."""
  images, labels, digests, sizes = [], [], [], []
  features = {x.features: [] for x in networks}
  for batch in batches:
    check_image_set(name, batch)
    sizes.append(batch.images.shape[1:])
    if sizes[-1] != sizes[0]:
      raise ValueError(
          f'The images of {name} have the sizes {sizes[0]} and {sizes[-1]};'
          ' convert them to the same height, width and channels.'
      )
    for network in networks:
      _check_min_side(network, sizes[0][:2])
      # Rows per call are those of the first batch: compiled once.
      num_rows = len(images[0]) if images else len(batch.images)
      features[network.features].append(
          _apply(network, batch.images, min(num_rows, _BATCH_SIZE))
      )
    images.append(pixel_pca.reduce(batch.images))
    labels.append(batch.labels)
    digests += [hashlib.sha256(x.tobytes()).digest() for x in batch.images]
  if not sizes:
    raise ValueError(f'The set {name!r} has no images; give one or more.')
  return _Measured(
      np.concatenate(images),
      np.concatenate(labels),
      digests,
      {network: np.concatenate(x) for network, x in features.items()},
      sizes[0],
  )


def _check_min_side(network: Network, size: tuple[int, int]) -> None:
  min_side = network.network.min_side
  if min(size) < min_side:
    raise ValueError(
        f'{network.features} needs images of {min_side} pixels per side or'
        f' more, and these are {tuple(size)}; leave it out of networks.'
    )


def _nearest(
    samples: _Measured, train: _Measured
) -> tuple[np.ndarray, np.ndarray]:
  """Returns indices of the nearest training images and RMS differences."""
  pixels = [x.images.reshape(len(x.images), -1) for x in (samples, train)]
  indices, squares = neighbours.nearest(*pixels)
  return indices, np.sqrt(squares / pixels[0].shape[1])


def inception_score(
    features: np.ndarray, classifier: np.ndarray, *, num_splits: int, seed: int
) -> tuple[float, float]:
  """Computes the Inception score (arXiv 1606.03498).

  Images are shuffled before they are split: in a file sorted by class each
  split would have few classes, and a score far too low.

  Args:
    features: [n, D] floats.
    classifier: [K, D] weights of logits without bias, as in ADM's evaluator and
      torch-fidelity.
    num_splits: splits of equal size, up to one image.
    seed: of the order.

  Returns:
    Mean and standard deviation of the score over the splits.

  Raises:
    ValueError: fewer images than splits.
  """
  if len(features) < num_splits:
    raise ValueError(
        f'The Inception score of {num_splits} splits needs as many images, not'
        f' {len(features)}; use more samples.'
    )
  order = np.random.default_rng(seed).permutation(len(features))
  scores = []
  for part in np.array_split(order, num_splits):
    logits = np.einsum(
        'nd,kd->nk', features[part].astype(np.float64),
        classifier.astype(np.float64), optimize=True,
    )
    logits -= logits.max(axis=1, keepdims=True)
    logs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    probabilities = np.exp(logs)
    mean = np.mean(probabilities, axis=0)
    # Classes whose probability underflows to 0 in all images add 0.
    log_mean = np.log(np.maximum(mean, np.finfo(np.float64).tiny))
    divergences = np.sum(probabilities * (logs - log_mean), axis=1)
    scores.append(np.exp(np.mean(divergences)))
  return float(np.mean(scores)), float(np.std(scores))


def check_image_set(name: str, image_set: ImageSet) -> None:
  """Raises ValueError unless these are uint8 images with their labels.

  Args:
    name: of the set, for messages.
    image_set: with one image or more.
  """
  images, labels = image_set
  shape, dtype = np.shape(images), getattr(images, 'dtype', None)
  if (
      dtype != np.uint8
      or len(shape) != 4
      or shape[-1] not in (1, 3, 4)
      or 0 in shape
  ):
    raise ValueError(
        f'The images of {name} are {dtype} {list(shape)}; give uint8'
        ' [n, H, W, C] with n of 1 or more and C of 1, 3 or 4.'
    )
  if (
      not isinstance(labels, np.ndarray)
      or labels.shape != shape[:1]
      or not np.issubdtype(labels.dtype, np.integer)
      or labels.min() < NO_LABEL
  ):
    raise ValueError(
        f'The labels of {name} are {labels!r}; give an array of {shape[0]}'
        f' integers, one per image, 0 or more, or {NO_LABEL} for no class.'
    )


def _apply(
    network: Network, images: np.ndarray, num_rows: int
) -> np.ndarray:
  """Returns the features [n, D] float32 of all images, in every process."""
  mesh = network.mesh
  shard = partitioning.data_shard(mesh)
  parts = math.prod(mesh.shape[axis] for axis in partitioning.BATCH_AXES)
  size = math.ceil(num_rows / parts) * parts
  features = []
  for start in range(0, len(images), size):
    batch = batching.fill(images[start:start + size], size)
    local = np.split(batch, shard.process_count)[shard.process_index]
    features.append(
        np.asarray(network.network(partitioning.shard_batch(local, mesh)))
    )
  return np.concatenate(features)[:len(images)]


def _statistics(features) -> frechet.FeatureStatistics:
  statistics = frechet.FeatureStatistics(features.shape[1])
  for rows in neighbours.row_blocks(features):
    statistics.update(features[rows])
  return statistics


def _compare(name, features) -> dict[str, float]:
  """Compares the features of samples and of the reference."""
  shares = neighbours.precision_recall(*features, _NEIGHBOURS)
  statistics = map(_statistics, features)
  return {
      _FEATURES[name].frechet: frechet.frechet_distance(*statistics),
      f'precision_{name}': shares.precision,
      f'recall_{name}': shares.recall,
  }


def _within_class(features, *labels) -> dict[str, float]:
  """Returns the class-wise distance, or nothing if a class is too small."""
  classes = np.setdiff1d(np.concatenate(labels), NO_LABEL)
  smallest = min(
      (np.count_nonzero(x == c) for c in classes for x in labels), default=0
  )
  if smallest < _IMAGES_PER_COMPONENT * features[0].shape[1]:
    return {}
  distances = [
      frechet.biased_frechet_distance(*(
          _statistics(x[y == c]) for x, y in zip(features, labels, strict=True)
      ))
      for c in classes
  ]
  return {'fd_pixel_pca_within_class': float(np.mean(distances))}
