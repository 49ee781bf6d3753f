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

from fsq_jax import frechet
from fsq_jax import metrics
from fsq_jax import models
from fsq_jax import partitioning
from fsq_jax import train_step

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
        ' to 299 x 299 bilinearly without antialiasing'
    ),
    'fd_vgg16': f'{_FRECHET}VGG16, 512 means of relu5_3; not to be called FID',
    'fd_encoder': (
        f'{_FRECHET}mean over all latents of a pretrained encoder, last'
        ' LayerNorm without scale and bias; not to be called FID'
    ),
}


class Scores(NamedTuple):
  """What the networks give for one batch.

  Attributes:
    distances: name to [B] float32.
    originals: name to [B, D] float32 features; {} where they are known.
    reconstructions: name to [B, D] float32 features.
  """

  distances: dict[str, jax.Array]
  originals: dict[str, jax.Array]
  reconstructions: dict[str, jax.Array]


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
    self._mesh = mesh
    # Small beside what is measured, and whole on every device.
    self._variables = jax.device_put(
        {name: x.variables for name, x in self._networks.items()},
        partitioning.replicated(mesh),
    )
    text = json.dumps(images, sort_keys=True)
    self._list_hash = hashlib.sha256(text.encode()).hexdigest()
    self._folder = folder
    self._references = self._read_references()
    self._score = jax.jit(
        self._compute,
        static_argnames='originals_of',
        out_shardings=partitioning.replicated(mesh),
    )

  @property
  def definitions(self) -> dict[str, str]:
    """What each number is, in a line."""
    return {name: DEFINITIONS[name] for name in self._networks}

  @property
  def protocol(self) -> dict[str, Any]:
    """sha256 of the weights of each metric."""
    return {name: x.sha256 for name, x in self._networks.items()}

  def start(self) -> '_Run':
    """Starts to score a split anew."""
    return _Run(self)

  def _compute(
      self, variables, images, reconstructions, *, originals_of
  ) -> Scores:
    images, reconstructions = (
        train_step.to_float(x) for x in (images, reconstructions)
    )
    scores = Scores({}, {}, {})
    for name, network in self._networks.items():
      apply = functools.partial(
          _METRICS[name].apply, network.module, variables[name]
      )
      if name in _FRECHET_NAMES:
        scores.reconstructions[name] = apply(reconstructions)
        if name in originals_of:
          scores.originals[name] = apply(images)
      else:
        scores.distances[name] = apply(images, reconstructions)
    return scores

  def _reference_path(self, name: str) -> pathlib.Path:
    return self._folder / f'{name}.safetensors'

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
    # Of those that are not known yet, which does not change within a run.
    self._originals = {
        name: None
        for name in networks._networks
        if name in _FRECHET_NAMES and name not in networks._references
    }
    self._reconstructions = {}
    self._means = {}

  def update(
      self,
      images: jax.Array,
      reconstructions: jax.Array,
      mask: np.ndarray,
      finite: np.ndarray,
  ) -> None:
    """Adds a batch.

    Args:
      images: [B, H, W, 3] uint8 on devices.
      reconstructions: the same, rounded.
      mask: [B] bool, False where there is no image.
      finite: [B] bool, False where a reconstruction was not finite.
    """
    networks = self._networks
    scores = jax.device_get(
        networks._score(
            networks._variables,
            images,
            reconstructions,
            originals_of=tuple(self._originals),
        )
    )
    for name, values in scores.distances.items():
      values = np.where(finite, values, np.nan)
      self._means.setdefault(name, metrics.Mean()).update(values, mask)
    for name, features in scores.originals.items():
      _add(self._originals, name, features, mask)
    for name, features in scores.reconstructions.items():
      _add(self._reconstructions, name, features, mask & finite)

  def result(self) -> dict[str, float]:
    """The metrics under their names; NaN where no two images can be used."""
    values = {name: mean.result() for name, mean in self._means.items()}
    for name, statistics in self._originals.items():
      self._networks._keep(name, statistics)
    for name, statistics in self._reconstructions.items():
      values[name] = math.nan
      if statistics.num_images > 1:
        values[name] = frechet.frechet_distance(
            self._networks._references[name], statistics
        )
    return values


def _add(statistics, name, features, mask) -> None:
  """Adds [B, D] features to the statistics of a name."""
  if statistics.get(name) is None:
    statistics[name] = frechet.FeatureStatistics(features.shape[1])
  statistics[name].update(features, mask)


class _Metric(NamedTuple):
  """How weights are read, and what is computed with them."""

  load: Callable[[str], models.FrozenNetwork]
  apply: Callable[..., jax.Array]


def _distance(module, variables, images, others) -> jax.Array:
  return module.apply(variables, images, others)


def _pooled(module, variables, images) -> jax.Array:
  return module.apply(variables, images, method='pooled')


def _mean_latent(module, variables, images) -> jax.Array:
  latents = module.apply(variables, images)
  return jnp.mean(latents.astype(jnp.float32), axis=(1, 2))


def _load_encoder(path: str) -> models.FrozenNetwork:
  """Loads an encoder for the size that its checkpoint was trained for."""
  encoder = models.load_encoder(path, final_affine=False)
  return models.FrozenNetwork(
      encoder.module, encoder.variables, models.hash_weights(path)
  )


def _inception(module, variables, images) -> jax.Array:
  return module.apply(variables, images)


_METRICS = {
    'lpips_alexnet': _Metric(
        lambda path: models.load_lpips(path, 'alexnet'), _distance
    ),
    'lpips_vgg16': _Metric(
        lambda path: models.load_lpips(path, 'vgg16'), _distance
    ),
    'rfid': _Metric(models.load_inception, _inception),
    'fd_vgg16': _Metric(
        lambda path: models.load_lpips(path, 'vgg16'), _pooled
    ),
    'fd_encoder': _Metric(_load_encoder, _mean_latent),
}
_FRECHET_NAMES = frozenset({'rfid', 'fd_vgg16', 'fd_encoder'})
