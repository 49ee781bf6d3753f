"""The inputs of a run of an autoencoder: model, frozen networks, images."""

import os
from typing import NamedTuple

import jax
import ml_collections

from fsq_jax.data import builder as data_builder
from fsq_jax.data import pipelines
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.models import autoencoder
from fsq_jax.models import builder as models
from fsq_jax.runtime import partitioning
from fsq_jax.train import frozen_networks
from fsq_jax.workdir import files as workdir_files


class Inputs(NamedTuple):
  """All that a run reads, and the model.

  Attributes:
    model: of the config.
    networks: frozen networks of the losses.
    dataset: training images.
    evaluator: of the held-out images.
  """

  model: autoencoder.Autoencoder
  networks: frozen_networks.Networks
  dataset: pipelines.Dataset
  evaluator: evaluators.Evaluator


def open_inputs(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    mesh: jax.sharding.Mesh,
) -> Inputs:
  """Opens the inputs before a run computes anything.

  Args:
    config: resolved.
    workdir: folder of the run, for statistics of reference images.
    mesh: from `partitioning.create_mesh`.

  Raises:
    ValueError: an input that is missing or does not fit.
  """
  model = models.build_autoencoder(
      config.model, config.data.image_size, config.data.channels
  )
  networks = frozen_networks.load_networks(config, mesh)
  dataset = _build_dataset(config, 'train', mesh)
  evaluator = evaluators.build_evaluator(
      config, model, _build_dataset(config, 'eval', mesh), mesh,
      workdir_files.run_folder(workdir),
  )
  return Inputs(model, networks, dataset, evaluator)


def _build_dataset(
    config: ml_collections.ConfigDict, split: str, mesh: jax.sharding.Mesh
) -> pipelines.Dataset:
  """Builds this process's data shard of a split."""
  return data_builder.build_dataset(
      config.data,
      split=split,
      seed=config.seed,
      **partitioning.data_shard(mesh)._asdict(),
  )
