"""Metrics of frozen networks: LPIPS and Frechet distances of features.

Weights come from the files of the config section `eval.networks`; a metric
without a file is not measured. Results are reported with the sha256 of the
weights, since they are comparable only with equal weights.
"""

from collections.abc import Callable, Mapping
import hashlib
import json
import math
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.evaluation import frechet
from fsq_jax.evaluation import image_metrics
from fsq_jax.models import pixels as pixels_lib
from fsq_jax.models.pretrained import files as weight_files
from fsq_jax.models.pretrained import loading as pretrained
from fsq_jax.perceptual import frozen_network
from fsq_jax.perceptual import inception
from fsq_jax.perceptual import lpips
from fsq_jax.runtime import compiled
from fsq_jax.runtime import partitioning
from fsq_jax.workdir import files as workdirs

_FRECHET = (
    'Frechet distance between the features of all images and of all'
    ' reconstructions, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), lower is'
    ' better: '
)
DEFINITIONS = {
    'lpips_alexnet': 'LPIPS v0.1, AlexNet, inputs in [-1, 1]; lower is better',
    'lpips_vgg16': 'LPIPS v0.1, VGG16, inputs in [-1, 1]; lower is better',
    'rfid': (
        f'{_FRECHET}FID\'s Inception-v3, 2048 pooled features, images resized'
        ' as by pytorch-fid: to 299 x 299, bilinearly, without antialiasing'
    ),
    'rfid_tf1': (
        f"{_FRECHET}the same network, images resized on the grid of TensorFlow"
        ' 1, as by torch-fidelity and the ADM suite'
    ),
    'fd_vgg16': f'{_FRECHET}VGG16, 512 means of relu5_3; not to be called FID',
    'fd_encoder': (
        f'{_FRECHET}mean over all latents of a pretrained encoder, last'
        ' LayerNorm without scale and bias; not to be called FID'
    ),
}


class NetworkMetrics:
  """The frozen networks of a config, and their metrics for a split."""

  def __init__(
      self,
      files: Mapping[str, str],
      mesh: jax.sharding.Mesh,
      *,
      images: Mapping[str, Any],
      folder: pathlib.Path | None = None,
  ):
    """Loads the networks.

    Args:
      files: the `eval.networks` section: paths by the names of metrics, '' for
        metrics that are not wanted.
      mesh: from `partitioning.create_mesh`.
      images: JSON values that identify the images and their preprocessing.
      folder: where statistics of the originals' features are kept, so that the
        next evaluation measures only reconstructions; None keeps none.

    Raises:
      ValueError: weights that are missing or corrupted.
    """
    text = json.dumps(images, sort_keys=True)
    images_hash = hashlib.sha256(text.encode()).hexdigest()
    self._networks, self._references = {}, {}
    for name, path in files.items():
      if not path:
        continue
      try:
        network = load_network(name, path, mesh)
      except ValueError as error:
        raise ValueError(f'eval.networks.{name}: {error}') from error
      self._networks[name] = network
      if _METRICS[name].compares_sets:
        self._references[name] = _Reference(
            frechet.Origin(name, network.sha256, images_hash), folder
        )

  @property
  def definitions(self) -> dict[str, str]:
    """Definition of each metric, in a line."""
    return {name: DEFINITIONS[name] for name in self._networks}

  @property
  def protocol(self) -> dict[str, Any]:
    """sha256 of the weights of each metric."""
    return {name: x.sha256 for name, x in self._networks.items()}

  def check_size(self, image_size: tuple[int, int]) -> None:
    """Rejects networks for which images are too small.

    Args:
      image_size: (height, width) in pixels of all images.

    Raises:
      ValueError: a side below the smallest that a network takes.
    """
    for name, network in self._networks.items():
      if min(image_size) < network.min_side:
        raise ValueError(
            f'eval.networks.{name} needs images of {network.min_side} pixels'
            f' a side, and data.image_size is {tuple(image_size)}; use larger'
            f" images, or --config.eval.networks.{name}=''."
        )

  def start(self) -> 'Scores':
    """Returns the scores of a split of which no image is measured yet."""
    return Scores({
        name: _FrechetDistance(network, self._references[name])
        if name in self._references
        else _MeanDistance(network)
        for name, network in self._networks.items()
    })


class Scores:
  """The metrics of one evaluation of a split."""

  def __init__(self, metrics: Mapping[str, Any]):
    """Scores of no images.

    Args:
      metrics: `_MeanDistance` or `_FrechetDistance` by name.
    """
    self._metrics = metrics
    # Results have means first, whatever the order of the config.
    self._names = sorted(metrics, key=lambda name: _METRICS[name].compares_sets)
    self._hashes_pixels = any(_METRICS[name].compares_sets for name in metrics)
    self._all_finite = True
    # A sum of hashes, which does not depend on the order of images.
    self._pixels = 0

  def update(
      self,
      images: jax.Array,
      reconstructions: jax.Array,
      mask: np.ndarray,
      finite: np.ndarray,
      *,
      pixels: np.ndarray,
  ) -> dict[str, str]:
    """Adds a batch to all metrics that take images of its size.

    Args:
      images: [B, H, W, 3] uint8 on devices.
      reconstructions: the same, rounded.
      mask: [B] bool, False for padding.
      finite: [B] bool, False where a reconstruction was not finite.
      pixels: [B, ...] uint8 on the host: the images or a copy, to be hashed.

    Returns:
      The reason for each metric that does not measure the images, by name.
    """
    if self._hashes_pixels:
      self._pixels += sum(
          int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], 'big')
          for image in pixels[mask]
      )
    self._all_finite = self._all_finite and bool(np.all(finite[mask]))
    measured, missing = {}, {}
    for name, metric in self._metrics.items():
      min_side = metric.network.min_side
      if min(images.shape[1:3]) < min_side:
        missing[name] = f'takes {min_side} pixels a side or more'
        continue
      try:
        measured[name] = metric.measure(images, reconstructions)
      except Exception as error:
        if not compiled.is_out_of_memory(error):
          raise
        missing[name] = str(error)
    for name, values in jax.device_get(measured).items():
      self._metrics[name].update(values, mask, finite)
    return missing

  @property
  def num_images(self) -> dict[str, int]:
    """Number of images that each metric has measured."""
    return {name: self._metrics[name].num_images for name in self._names}

  def result(self) -> dict[str, float]:
    """Returns the metrics by name.

    NaN if a reconstruction was not finite; distances of sets also if there
    are fewer than two images.
    """
    pixels = f'{self._pixels:x}'
    return {
        name: self._metrics[name].result(self._all_finite, pixels)
        for name in self._names
    }


class Network:
  """A network on the devices, compiled once for each size of images.

  Originals and reconstructions share the compiled function: equal images have
  equal features, and results do not depend on whether originals are measured.

  Attributes:
    sha256: of the weights.
    min_side: smallest side of images, in pixels.
  """

  def __init__(
      self,
      network: frozen_network.FrozenNetwork,
      apply: Callable[..., jax.Array],
      mesh: jax.sharding.Mesh,
  ):
    self.sha256 = network.sha256
    self.min_side = getattr(network.module, 'min_side', 1)
    replicated = partitioning.replicated(mesh)
    # Small beside the images.
    self._variables = jax.device_put(network.variables, replicated)

    def measure(variables: Any, *images: jax.Array) -> jax.Array:
      floats = [pixels_lib.to_float(x) for x in images]
      return apply(network.module, variables, *floats)

    self._measure = compiled.Compiled(measure, out_shardings=replicated)

  def __call__(self, *images: jax.Array) -> jax.Array:
    """Measures [B, H, W, 3] uint8 images; the result is replicated."""
    return self._measure(self._variables, *images)


def load_network(name: str, path: str, mesh: jax.sharding.Mesh) -> Network:
  """Loads the network of a metric.

  Args:
    name: of the metric, a key of `DEFINITIONS`.
    path: of the weights.
    mesh: from `partitioning.create_mesh`.

  Returns:
    The network, with [B] distances of two arrays of images, or [B, D] features.

  Raises:
    ValueError: weights that are missing or corrupted.
  """
  metric = _METRICS[name]
  return Network(metric.load(path), metric.apply, mesh)


class _MeanDistance:
  """Mean over images of a distance between original and reconstruction."""

  def __init__(self, network):
    self.network = network
    self._mean = image_metrics.Mean()

  @property
  def num_images(self) -> int:
    return self._mean.num_values

  def measure(self, images, reconstructions) -> jax.Array:
    """Returns [B] distances without waiting for them."""
    return self.network(images, reconstructions)

  def update(self, distances, mask, finite) -> None:
    self._mean.update(np.where(finite, distances, np.nan), mask)

  def result(self, all_finite, pixels) -> float:
    del all_finite, pixels  # The mean of a NaN is NaN.
    return self._mean.result()


class _FrechetDistance:
  """Frechet distance between the features of originals and reconstructions."""

  def __init__(self, network, reference):
    self.network = network
    self._reference = reference
    self._measures_originals = reference.statistics is None
    # One for reconstructions and one for originals that are measured, from the
    # first batch on, which has the number of features.
    self._statistics = ()

  @property
  def num_images(self) -> int:
    return self._statistics[0].num_images if self._statistics else 0

  def measure(self, images, reconstructions) -> tuple[jax.Array, ...]:
    """Returns [B, D] features without waiting for them."""
    measured = (reconstructions, images)[:1 + self._measures_originals]
    return tuple(self.network(x) for x in measured)

  def update(self, features, mask, finite) -> None:
    del finite  # The result is NaN unless all are.
    if not self._statistics:
      self._statistics = tuple(
          frechet.FeatureStatistics(x.shape[1]) for x in features
      )
    for statistics, x in zip(self._statistics, features, strict=True):
      statistics.update(x, mask)

  def result(self, all_finite: bool, pixels: str) -> float:
    """Returns the distance; keeps the statistics of originals for later.

    Args:
      all_finite: whether all reconstructions of the split were finite.
      pixels: hash of all originals.
    """
    if self._measures_originals and self.num_images > 1:
      originals = self._statistics[1]
      originals.pixels = pixels
      self._reference.keep(originals)
    reference = self._reference.statistics
    if reference is None or not self._statistics or not all_finite:
      return math.nan
    if (reference.pixels, reference.num_images) != (pixels, self.num_images):
      logging.error(
          'No %s: %s is of %d other images than the %d that were read. Remove'
          ' that file, and evaluate again.',
          self._reference.origin.network,
          self._reference.path,
          reference.num_images,
          self.num_images,
      )
      return math.nan
    return frechet.frechet_distance(reference, self._statistics[0])


class _Reference:
  """Statistics of the originals' features, kept between evaluations.

  Attributes:
    origin: of the statistics.
    path: of their file; None without.
    statistics: None while they are unknown.
  """

  def __init__(self, origin: frechet.Origin, folder: pathlib.Path | None):
    self.origin = origin
    self.path = self.statistics = None
    if folder is None:
      return
    name = f'{origin.network}_{origin.images_hash[:12]}.safetensors'
    self.path = folder / name
    if workdirs.is_file(self.path):
      try:
        self.statistics = frechet.read_statistics(self.path, origin)
      except ValueError as error:
        logging.warning('Features of originals are computed again: %s', error)

  def keep(self, statistics: frechet.FeatureStatistics) -> None:
    """Sets the statistics, and writes them in the first process."""
    if self.path is not None and jax.process_index() == 0:
      workdirs.make_folder(self.path.parent)
      frechet.write_statistics(self.path, statistics, self.origin)
      # The next evaluation reads the file and must give the same bits.
      statistics = frechet.read_statistics(self.path, self.origin)
    self.statistics = statistics


class _Metric(NamedTuple):
  """How a metric loads and applies its network.

  Attributes:
    load: from a path to the network.
    apply: of module, variables and images in [-1, 1], to [B] distances or to
      [B, D] features.
    compares_sets: whether the metric is a Frechet distance of features.
  """

  load: Callable[[str], frozen_network.FrozenNetwork]
  apply: Callable[..., jax.Array]
  compares_sets: bool = True


def _output(module, variables, *images) -> jax.Array:
  return module.apply(variables, *images)


def _pooled(module, variables, images) -> jax.Array:
  return module.apply(variables, images, method='pooled')


def _mean_latent(module, variables, images) -> jax.Array:
  latents = module.apply(variables, images)
  return jnp.mean(latents.astype(jnp.float32), axis=(1, 2))


def _load_encoder(path: str) -> frozen_network.FrozenNetwork:
  """Loads an encoder for the size that its checkpoint was trained for."""
  encoder = pretrained.load_encoder(path, final_affine=False)
  return frozen_network.FrozenNetwork(
      encoder.module, encoder.variables, weight_files.hash_weights(path)
  )


def _lpips(network: str) -> Callable[[str], frozen_network.FrozenNetwork]:
  return lambda path: lpips.load_lpips(path, network)


_METRICS = {
    'lpips_alexnet': _Metric(_lpips('alexnet'), _output, compares_sets=False),
    'lpips_vgg16': _Metric(_lpips('vgg16'), _output, compares_sets=False),
    'rfid': _Metric(inception.load_inception, _output),
    'rfid_tf1': _Metric(
        lambda path: inception.load_inception(path, 'tf1'), _output
    ),
    'fd_vgg16': _Metric(_lpips('vgg16'), _pooled),
    'fd_encoder': _Metric(_load_encoder, _mean_latent),
}
