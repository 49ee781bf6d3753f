"""Mean and variance of an encoder's latents over a data set."""

from collections.abc import Mapping
import math
import os
import pathlib
from typing import NamedTuple

import jax
from jax import numpy as jnp
import ml_collections
import numpy as np
import safetensors.numpy
import tqdm

from fsq_jax.checkpoints import saved_model
from fsq_jax.configuration import errors
from fsq_jax.configuration import loading as configuration
from fsq_jax.data import builder as data
from fsq_jax.models import builder as models
from fsq_jax.models import pixels
from fsq_jax.models import variables as variables_lib
from fsq_jax.runtime import partitioning
from fsq_jax.train import initialization
from fsq_jax.workdir import files as workdirs

FILE = 'latent_statistics.safetensors'


class _Moments(NamedTuple):
  """Number of images, mean, and sum of squared deviations from the mean."""

  count: jax.Array
  mean: jax.Array
  squares: jax.Array


def measure(config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
  """Computes mean and variance of the latents of the training images.

  Each image counts once, with a centre crop. RAE (arXiv 2510.11690) uses an EMA
  over batches with a momentum of 0.1, dominated by the last ten of them.

  Args:
    config: the whole config; model.latent_statistics is ignored.

  Returns:
    'mean' and 'variance', [h, w, C] float32.

  Raises:
    ValueError: an invalid config, or an encoder with random weights.
  """
  configuration.check_config(
      config, jax.device_count(), mode='latent_statistics'
  )
  config = configuration.resolve(config)
  config.model.decoder.mae.checkpoint = ''  # Only the encoder is used.
  config.model.latent_statistics = ''
  if config.train.init_from:
    # That run may use statistics, which are part of its model.
    with errors.about('train.init_from'):
      found = saved_model.find_run(config.train.init_from)
    config.model.latent_statistics = found.config.model.latent_statistics
  if not (initialization.reads_encoder(config) or config.train.init_from):
    raise ValueError(
        'Latent statistics need a trained encoder: set'
        " model.encoder.name='pretrained' with a model.encoder.checkpoint, or"
        ' train.init_from.'
    )
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  initializer = initialization.Initializer(config, model)
  dataset = data.build_dataset(
      config.data,
      split='train_once',
      seed=config.seed,
      **partitioning.data_shard(mesh)._asdict(),
  )
  abstract = partitioning.place_abstract(
      variables_lib.abstract_variables(model, config.data.image_size),
      mesh,
      config.partitioning.rules,
      config.partitioning.fsdp_min_size,
  )
  variables = initializer.load(abstract, mesh)
  variables = {
      collection: parts['encoder']
      for collection, parts in variables.items()
      if 'encoder' in parts
  }

  def moments(variables, images, mask):
    latents = model.encoder.apply(variables, pixels.to_float(images))
    return _moments(latents, mask)

  moments = jax.jit(moments, out_shardings=partitioning.replicated(mesh))
  total = _Moments(0.0, 0.0, 0.0)
  num_batches = math.ceil(dataset.num_examples / config.data.eval_batch_size)
  for local_batch in tqdm.tqdm(dataset, total=num_batches, disable=None):
    batch = partitioning.shard_batch(local_batch, mesh)
    part = moments(variables, batch['image'], batch['mask'])
    total = _merge(total, _Moments(*jax.device_get(part)))
  if not total.count:
    raise ValueError('No image of the training split can be read.')
  return {
      'mean': np.asarray(total.mean, np.float32),
      'variance': np.asarray(total.squares / total.count, np.float32),
  }


def write(
    statistics: Mapping[str, np.ndarray],
    workdir: str | os.PathLike[str],
    config: ml_collections.ConfigDict,
) -> pathlib.Path:
  """Writes statistics atomically, with metadata of their encoder and images.

  Args:
    statistics: from `measure`.
    workdir: folder for the file, created if it is missing.
    config: that they were measured with.

  Returns:
    Path of the file, for model.latent_statistics.
  """
  path = workdirs.create(workdir) / FILE
  images = config.data.source, config.data.name, config.data.train_split
  metadata = {
      **initialization.encoder_metadata(config),
      'checkpoint': config.train.init_from or config.model.encoder.checkpoint,
      'images': ' '.join(filter(None, images)),
  }
  workdirs.write_bytes(
      path, safetensors.numpy.save(dict(statistics), metadata=metadata)
  )
  return path


def measure_to_workdir(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> pathlib.Path:
  """Measures and writes statistics; only one process writes.

  Args:
    config: the whole config.
    workdir: folder for the file, created before anything is read.

  Returns:
    Path of the file.

  Raises:
    ValueError: as `measure`, or a workdir that cannot be written.
  """
  folder = workdirs.create(workdir)
  statistics = measure(config)
  if jax.process_index() == 0:
    write(statistics, folder, config)
  return folder / FILE


def _moments(latents: jax.Array, mask: jax.Array) -> _Moments:
  """Returns the moments of [B, h, w, C] latents whose mask [B] is set."""
  weights = mask.astype(jnp.float32)
  count = jnp.sum(weights)
  mean = jnp.einsum('b,bhwc->hwc', weights, latents) / jnp.maximum(count, 1)
  squares = jnp.einsum('b,bhwc->hwc', weights, jnp.square(latents - mean))
  return _Moments(count, mean, squares)


def _merge(a: _Moments, b: _Moments) -> _Moments:
  """Returns the moments of both, in float64 (Chan, Golub, LeVeque 1979)."""
  a, b = (_Moments(*(np.asarray(x, np.float64) for x in m)) for m in (a, b))
  count = a.count + b.count
  fraction = b.count / max(count, 1)
  difference = b.mean - a.mean
  return _Moments(
      count,
      a.mean + fraction * difference,
      a.squares + b.squares + a.count * fraction * np.square(difference),
  )
