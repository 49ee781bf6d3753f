"""Metrics by frozen networks: LPIPS and Frechet distances of features.

Weights come from files that the `eval.networks` section of a config names; a
metric without a file is not measured. Results carry the sha256 of the weights:
numbers of other weights, or of another network, are other numbers.
"""

from collections.abc import Callable, Mapping
import functools
import hashlib
import json
import math
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax import models
from fsq_jax import perceptual
from fsq_jax.evaluation import frechet
from fsq_jax.evaluation import image_metrics
from fsq_jax.models import pixels as pixels_lib
from fsq_jax.runtime import compiled
from fsq_jax.runtime import partitioning

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
  """Scores reconstructions by the networks of a config, batch by batch."""

  def __init__(
      self,
      files: Mapping[str, str],
      mesh: jax.sharding.Mesh,
      *,
      images: Mapping[str, Any],
      folder: pathlib.Path | None = None,
  ):
    """Reads the networks.

    Args:
      files: the `eval.networks` section: names of metrics to paths, '' for
        those that are not wanted.
      mesh: from `partitioning.create_mesh`.
      images: JSON values that say which images are evaluated, and how they
        were made.
      folder: where the statistics of their features are kept, so that only
        reconstructions need be looked at the next time; None keeps none.

    Raises:
      ValueError: weights that are missing or damaged.
    """
    self._networks = {}
    for name, path in files.items():
      if path:
        try:
          self._networks[name] = _METRICS[name].load(path)
        except ValueError as error:
          raise ValueError(f'eval.networks.{name}: {error}') from error
    # Small beside what is measured, and whole on every device.
    self._variables = jax.device_put(
        {name: x.variables for name, x in self._networks.items()},
        partitioning.replicated(mesh),
    )
    # One program for originals and for reconstructions: equal images have equal
    # features, and numbers are the same whether originals are known or not.
    self._apply = {
        name: compiled.Compiled(
            functools.partial(_measure, name, x.module),
            out_shardings=partitioning.replicated(mesh),
        )
        for name, x in self._networks.items()
    }
    text = json.dumps(images, sort_keys=True)
    self._list_hash = hashlib.sha256(text.encode()).hexdigest()
    self._folder = folder
    self._references = self._read_references()

  @property
  def definitions(self) -> dict[str, str]:
    """What each number is, in a line."""
    return {name: DEFINITIONS[name] for name in self._networks}

  @property
  def protocol(self) -> dict[str, Any]:
    """sha256 of the weights of each metric."""
    return {name: x.sha256 for name, x in self._networks.items()}

  def check_size(self, image_size: tuple[int, int]) -> None:
    """Refuses networks that images are too small for.

    Args:
      image_size: (height, width) in pixels of all images.

    Raises:
      ValueError: a side below the least that a network takes.
    """
    for name, network in self._networks.items():
      if min(image_size) < _min_side(network):
        raise ValueError(
            f'eval.networks.{name} needs images of {_min_side(network)} pixels'
            f' a side, and data.image_size is {tuple(image_size)}; use larger'
            f" images, or --config.eval.networks.{name}=''."
        )

  def start(self) -> '_Run':
    """Starts to score a split anew."""
    return _Run(self)

  def _reference_path(self, name: str) -> pathlib.Path:
    return self._folder / f'{name}_{self._list_hash[:12]}.safetensors'

  def _origin(self, name: str) -> frechet.Origin:
    """What statistics of features are statistics of."""
    return frechet.Origin(name, self._networks[name].sha256, self._list_hash)

  def _read_references(self) -> dict[str, frechet.FeatureStatistics]:
    """Reads what an earlier evaluation of the same images has kept."""
    references = {}
    for name in _FRECHET_NAMES & self._networks.keys():
      if self._folder is None or not self._reference_path(name).is_file():
        continue
      try:
        references[name] = frechet.read_statistics(
            self._reference_path(name), self._origin(name)
        )
      except ValueError as error:
        logging.warning('Features are computed anew: %s', error)
    return references

  def _keep(self, name: str, statistics: frechet.FeatureStatistics) -> None:
    if self._folder is not None and jax.process_index() == 0:
      path = self._reference_path(name)
      path.parent.mkdir(parents=True, exist_ok=True)
      frechet.write_statistics(path, statistics, self._origin(name))
      # The next evaluation reads them, and must not differ in the last digit.
      statistics = frechet.read_statistics(path, self._origin(name))
    self._references[name] = statistics


class _Run:
  """One evaluation of a split."""

  def __init__(self, networks: NetworkMetrics):
    self._networks = networks
    self._means, self._reconstructions, self._originals = {}, {}, {}
    for name in networks._networks:
      if name not in _FRECHET_NAMES:
        self._means[name] = image_metrics.Mean()
        continue
      # None until there are features, which say how many they are.
      self._reconstructions[name] = None
      # Of those that are not known yet, which does not change within a run.
      if name not in networks._references:
        self._originals[name] = None
    self._finite = True
    # A sum, which does not depend on the order of images.
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
    """Adds a batch, to the metrics that take images of its size.

    Args:
      images: [B, H, W, 3] uint8 on devices.
      reconstructions: the same, rounded.
      mask: [B] bool, False where there is no image.
      finite: [B] bool, False where a reconstruction was not finite.
      pixels: [B, ...] uint8 on the host, by which images that are the same are
        known again.

    Returns:
      By the name of each metric that does not take them, why not.
    """
    if self._reconstructions:
      self._pixels += sum(
          int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], 'big')
          for image in pixels[mask]
      )
    distances, originals, features, missing = {}, {}, {}, {}
    for name, network in self._networks._networks.items():
      if min(images.shape[1:3]) < _min_side(network):
        missing[name] = f'takes {_min_side(network)} pixels a side or more'
        continue
      apply = functools.partial(
          self._networks._apply[name], self._networks._variables[name]
      )
      try:
        if name in self._means:
          distances[name] = apply(images, reconstructions)
        else:
          features[name] = apply(reconstructions)
          if name in self._originals:
            originals[name] = apply(images)
      except Exception as error:
        if not compiled.is_out_of_memory(error):
          raise
        missing[name] = str(error)
        features.pop(name, None)
    distances, originals, features = jax.device_get(
        (distances, originals, features)
    )
    for name, values in distances.items():
      self._means[name].update(np.where(finite, values, np.nan), mask)
    for name, values in originals.items():
      _add(self._originals, name, values, mask)
    for name, values in features.items():
      _add(self._reconstructions, name, values, mask)
    self._finite = self._finite and bool(np.all(finite[mask]))
    return missing

  @property
  def num_images(self) -> dict[str, int]:
    """How many images each metric has been given."""
    return {
        name: mean.num_values for name, mean in self._means.items()
    } | {
        name: 0 if x is None else x.num_images
        for name, x in self._reconstructions.items()
    }

  def result(self) -> dict[str, float]:
    """The metrics under their names.

    NaN where any reconstruction was not finite; distances of sets also where
    there are no two images.
    """
    values = {name: mean.result() for name, mean in self._means.items()}
    for name, statistics in self._originals.items():
      if statistics is not None and statistics.num_images > 1:
        statistics.pixels = f'{self._pixels:x}'
        self._networks._keep(name, statistics)
    for name in self._reconstructions:
      values[name] = self._distance(name)
    return values

  def _distance(self, name: str) -> float:
    reference = self._networks._references.get(name)
    statistics = self._reconstructions[name]
    if reference is None or statistics is None or not self._finite:
      return math.nan
    if (
        reference.pixels != f'{self._pixels:x}'
        or reference.num_images != statistics.num_images
    ):
      logging.error(
          'No %s: %s is of %d other images than the %d that were read. Remove'
          ' that file, and evaluate again.',
          name,
          self._networks._reference_path(name),
          reference.num_images,
          statistics.num_images,
      )
      return math.nan
    return frechet.frechet_distance(reference, statistics)


def _add(statistics, name, features, mask) -> None:
  """Adds [B, D] features to the statistics of a name."""
  if statistics.get(name) is None:
    statistics[name] = frechet.FeatureStatistics(features.shape[1])
  statistics[name].update(features, mask)


class _Metric(NamedTuple):
  """How weights are read, and what is computed with them."""

  load: Callable[[str], perceptual.FrozenNetwork]
  apply: Callable[..., jax.Array]


def _measure(name, module, variables, *images) -> jax.Array:
  """Applies a network to uint8 images."""
  floats = [pixels_lib.to_float(x) for x in images]
  return _METRICS[name].apply(module, variables, *floats)


def _min_side(network: perceptual.FrozenNetwork) -> int:
  return getattr(network.module, 'min_side', 1)


def _distance(module, variables, images, others) -> jax.Array:
  return module.apply(variables, images, others)


def _pooled(module, variables, images) -> jax.Array:
  return module.apply(variables, images, method='pooled')


def _mean_latent(module, variables, images) -> jax.Array:
  latents = module.apply(variables, images)
  return jnp.mean(latents.astype(jnp.float32), axis=(1, 2))


def _load_encoder(path: str) -> perceptual.FrozenNetwork:
  """Loads an encoder for the size that its checkpoint was trained for."""
  encoder = models.load_encoder(path, final_affine=False)
  return perceptual.FrozenNetwork(
      encoder.module, encoder.variables, models.hash_weights(path)
  )


def _inception(module, variables, images) -> jax.Array:
  return module.apply(variables, images)


_METRICS = {
    'lpips_alexnet': _Metric(
        lambda path: perceptual.load_lpips(path, 'alexnet'), _distance
    ),
    'lpips_vgg16': _Metric(
        lambda path: perceptual.load_lpips(path, 'vgg16'), _distance
    ),
    'rfid': _Metric(perceptual.load_inception, _inception),
    'rfid_tf1': _Metric(
        lambda path: perceptual.load_inception(path, 'tf1'), _inception
    ),
    'fd_vgg16': _Metric(
        lambda path: perceptual.load_lpips(path, 'vgg16'), _pooled
    ),
    'fd_encoder': _Metric(_load_encoder, _mean_latent),
}
_FRECHET_NAMES = frozenset({'rfid', 'rfid_tf1', 'fd_vgg16', 'fd_encoder'})
