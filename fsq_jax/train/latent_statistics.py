"""Mean and variance of an encoder's latents over a data set."""

from collections.abc import Mapping
import contextlib
import functools
import os
import pathlib

import jax
import ml_collections
import numpy as np
import safetensors.numpy

from fsq_jax.configuration import loading as configuration
from fsq_jax.data import builder as data
from fsq_jax.evaluation import moments
from fsq_jax.models import builder as models
from fsq_jax.models import pixels
from fsq_jax.models import variables as variables_lib
from fsq_jax.runtime import partitioning
from fsq_jax.train import initialization
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import progress

FILE = 'latent_statistics.safetensors'


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
  config.losses.distillation_weight = 0.0
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(
      config.model, config.data.image_size, config.data.channels
  )
  initializer = initialization.Initializer(config, model)
  if not initializer.has_encoder:
    raise ValueError(
        'Latent statistics need a trained encoder: set'
        " model.encoder.name='pretrained' with a model.encoder.checkpoint, or"
        ' train.init_from with this encoder.'
    )
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

  @functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
  def measure_batch(variables, images, mask):
    latents = model.encoder.apply(variables, pixels.to_float(images))
    return moments.masked_moments(latents, mask)

  total = moments.Moments(0.0, 0.0, 0.0)
  num_images, batch_size = dataset.num_examples, config.data.eval_batch_size
  bar = progress.ImageProgress(
      num_images=num_images, first=0, enabled=jax.process_index() == 0
  )
  with contextlib.closing(bar):
    starts = range(0, num_images, batch_size)
    for start, local_batch in zip(starts, dataset, strict=True):
      batch = partitioning.shard_batch(local_batch, mesh)
      part = measure_batch(variables, batch['image'], batch['mask'])
      part = (np.asarray(x, np.float64) for x in jax.device_get(part))
      total = moments.merge(total, moments.Moments(*part))
      bar.update(min(batch_size, num_images - start))
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
