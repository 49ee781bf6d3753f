"""Trains the autoencoder of a config, evaluates it, writes the report."""

from collections.abc import Mapping
import functools
import os
import time
from typing import Any

import jax
import ml_collections

from fsq_jax.configuration import loading as configuration
from fsq_jax.data import pipelines
from fsq_jax.models import autoencoder
from fsq_jax.quantizers import specs
from fsq_jax.report import report
from fsq_jax.runtime import partitioning
from fsq_jax.train import frozen_networks
from fsq_jax.train import initialization
from fsq_jax.train import inputs
from fsq_jax.train import loop
from fsq_jax.train import optim
from fsq_jax.train import resources
from fsq_jax.train import run_record
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step
from fsq_jax.workdir import files as workdir_files
from fsq_jax.workdir import provenance


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    allow_config_change: bool = False,
) -> train_state.TrainState:
  """Trains until config.train.num_steps, evaluates, and writes the report.

  A workdir with checkpoints is resumed from the newest one. On the same devices
  an interrupted run and an uninterrupted run have bit-identical results.

  Args:
    config: see configs/default.py.
    workdir: folder of the run, created if it is missing.
    allow_config_change: resume although the config differs from the config of
      the checkpoint; if the data set or its order differ, the input starts
      anew.

  Returns:
    The last state.

  Raises:
    ValueError: an invalid config, data set or workdir.
    Preempted: SIGTERM or SIGINT arrived; the last step is saved.
    DivergedError: config.train.max_bad_steps non-finite steps in a row.
    RunError: something cannot be written, as on a full disk, or another process
      failed.
  """
  configuration.check_config(config, num_devices=jax.device_count())
  config = configuration.resolve(config)
  with resources.open_run(
      config,
      workdir,
      functools.partial(
          inputs.open_inputs, config, workdir, initialization.Initializer
      ),
      batch_size=config.data.batch_size,
  ) as run:
    return _train(run, allow_config_change)


def _train(
    run: resources.Run, allow_config_change: bool
) -> train_state.TrainState:
  """Builds the parts of a run in the order of their dependencies; trains."""
  config, mesh, folder = run.config, run.mesh, run.folder
  model, initializer, networks, dataset, evaluator = run.inputs
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  record = run_record.RunRecord(
      config,
      {'quantizer': model.quantizer.spec(), 'networks': networks.hashes},
      functools.partial(_check_parts, model, networks),
      dataset,
  )
  restored = record.restore_newest(
      run.checkpointer, builder.abstract, allow_config_change
  )
  if restored is not None:
    run.progress.say(f'Continuing {folder} from step {restored.step}.')
    record.started_from = provenance.read_started_from(
        folder / workdir_files.RUN
    )
    state = restored.state
  else:
    record.started_from = initializer.sources
    for line in initializer.describe():
      run.progress.say(line)
    state = builder.create(
        initializer.load(builder.abstract_variables, mesh)
    )

  sizes = pipelines.image_sizes(config.data)
  text = f' for {len(sizes)} image sizes' if len(sizes) > 1 else ''
  run.progress.say(f'Compiling the training step{text} ...')
  started = time.perf_counter()
  step_function = train_step.build_train_step(
      model, optimizer, config, networks.perceptual
  )
  steps = {
      size: builder.compile_step(
          step_function,
          train_state.abstract_images(config.data, mesh, size),
          networks.variables,
      )
      for size in sizes
  }
  writer = resources.start_log(
      run, record, state, time.perf_counter() - started
  )
  state = loop.run(
      state,
      record.iterator,
      train_step=lambda state, batch: steps[batch['image'].shape[1:3]](
          state,
          partitioning.shard_batch(batch['image'], mesh),
          networks.variables,
      ),
      hooks=resources.build_hooks(
          run, record, evaluator, writer, dataset.describe
      ),
      num_steps=config.train.num_steps,
  )
  if writer is not None:
    writer.flush()
    run.progress.say(f'Report: {report.write_report(folder)}')
  return state


def _check_parts(
    model: autoencoder.Autoencoder,
    networks: frozen_networks.Networks,
    saved: Mapping[str, Any],
) -> None:
  """Checks the record of a checkpoint against quantizer and networks."""
  specs.check_same_spec(saved['quantizer'], model.quantizer.spec())
  networks.check_same(saved['networks'])
