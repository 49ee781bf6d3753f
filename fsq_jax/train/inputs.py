"""The inputs of a run of an autoencoder: model, frozen networks, images."""

from collections.abc import Callable
import os
from typing import Any, NamedTuple

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
    initializer: of its variables; None for a resumed run, which needs none.
    networks: frozen networks of the losses.
    dataset: training images.
    evaluator: of the held-out images.
  """

  model: autoencoder.Autoencoder
  initializer: Any
  networks: frozen_networks.Networks
  dataset: pipelines.Dataset
  evaluator: evaluators.Evaluator


def open_inputs(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    open_initializer: Callable[..., Any],
    mesh: jax.sharding.Mesh,
    is_new: bool,
) -> Inputs:
  """Opens the inputs before a run computes anything.

  Args:
    config: resolved.
    workdir: folder of the run, for statistics of reference images.
    open_initializer: `initialization.Initializer`.
    mesh: from `partitioning.create_mesh`.
    is_new: whether there is no checkpoint to resume from.

  Raises:
    ValueError: an input that is missing or does not fit.
  """
  model = models.build_autoencoder(
      config.model, config.data.image_size, config.data.channels
  )
  initializer = open_initializer(config, model) if is_new else None
  networks = frozen_networks.load_networks(config, mesh)
  dataset = _build_dataset(config, 'train', mesh)
  evaluator = evaluators.build_evaluator(
      config, model, _build_dataset(config, 'eval', mesh), mesh,
      workdir_files.run_folder(workdir),
  )
  return Inputs(model, initializer, networks, dataset, evaluator)


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
