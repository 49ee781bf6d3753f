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

from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import saved_model
from fsq_jax.models import pixels
from fsq_jax.runtime import partitioning
from fsq_jax.train import initialization
from fsq_jax.train import optim
from fsq_jax.train import state as train_state

FILE = 'latent_statistics.safetensors'


class _Moments(NamedTuple):
  """Number of images, their mean, and the sum of squares around it."""

  count: jax.Array
  mean: jax.Array
  squares: jax.Array


def measure(config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
  """Computes mean and variance of the latents of the training images.

  Every image is taken once, with a centre crop, and every latent counts alike.
  RAE (arXiv 2510.11690) averages over batches with a momentum of 0.1, which
  weighs the last ten of them.

  Args:
    config: the whole config; model.latent_statistics is left aside.

  Returns:
    'mean' and 'variance', [h, w, C] float32.

  Raises:
    ValueError: a config that is not valid, or an encoder that would be random.
  """
  configuration.check_config(
      config, jax.device_count(), mode='latent_statistics'
  )
  config = configuration.resolve(config)
  config.model.decoder.mae.checkpoint = ''  # Of no use here.
  config.model.latent_statistics = ''
  if config.train.init_from:
    # That run may have some, and is of the same model only with them.
    with initialization.naming('train.init_from'):
      found = saved_model.find_run(config.train.init_from)
    config.model.latent_statistics = found.config.model.latent_statistics
  if not (initialization.reads_encoder(config) or config.train.init_from):
    raise ValueError(
        'Statistics of latents need a trained encoder: set'
        " model.encoder.name='pretrained' with a model.encoder.checkpoint, or"
        ' train.init_from.'
    )
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  start = initialization.Start(config, model)
  dataset = data.build_dataset(
      config.data,
      split='train_once',
      seed=config.seed,
      **partitioning.data_shard(mesh)._asdict(),
  )
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.StateBuilder(config, model, optimizer, mesh)
  variables = start.load(builder, mesh)
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
  """Writes what `measure` returned, atomically, and of what latents it is.

  Args:
    statistics: 'mean' and 'variance'.
    workdir: folder for the file, created if it is missing.
    config: what they were measured with.

  Returns:
    Path of the file, for model.latent_statistics.
  """
  path = workdirs.create(workdir) / FILE
  images = config.data.source, config.data.name, config.data.train_split
  facts = {
      **initialization.encoder_facts(config),
      'checkpoint': config.train.init_from or config.model.encoder.checkpoint,
      'images': ' '.join(filter(None, images)),
  }
  workdirs.write_bytes(
      path, safetensors.numpy.save(dict(statistics), metadata=facts)
  )
  return path


def measure_to_workdir(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> pathlib.Path:
  """Does what `measure` and `write` do; one process writes.

  Args:
    config: the whole config.
    workdir: folder for the file, which is tried before anything is read.

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
  """Moments over the [B, h, w, C] latents of images whose mask [B] is set."""
  weights = mask.astype(jnp.float32)
  count = jnp.sum(weights)
  mean = jnp.einsum('b,bhwc->hwc', weights, latents) / jnp.maximum(count, 1)
  squares = jnp.einsum('b,bhwc->hwc', weights, jnp.square(latents - mean))
  return _Moments(count, mean, squares)


def _merge(a: _Moments, b: _Moments) -> _Moments:
  """Moments of the images of both, in float64 (Chan, Golub, LeVeque 1979)."""
  a, b = (_Moments(*(np.asarray(x, np.float64) for x in m)) for m in (a, b))
  count = a.count + b.count
  share = b.count / max(count, 1)
  difference = b.mean - a.mean
  return _Moments(
      count,
      a.mean + share * difference,
      a.squares + b.squares + a.count * share * np.square(difference),
  )
