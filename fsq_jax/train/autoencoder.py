"""Trains the autoencoder of a config, evaluates it, writes the report."""

import contextlib
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import ml_collections

from fsq_jax.checkpoints import checkpointer as checkpointers
from fsq_jax.configuration import loading as configuration
from fsq_jax.data import builder as data_builder
from fsq_jax.data import pipelines
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.models import builder as models
from fsq_jax.report import report
from fsq_jax.runtime import host
from fsq_jax.runtime import partitioning
from fsq_jax.runtime import preemption
from fsq_jax.runtime import processes
from fsq_jax.train import frozen_networks
from fsq_jax.train import hooks
from fsq_jax.train import initialization
from fsq_jax.train import loop
from fsq_jax.train import optim
from fsq_jax.train import run_record
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step
from fsq_jax.workdir import files as workdir_files
from fsq_jax.workdir import metric_log
from fsq_jax.workdir import progress as progress_lib
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
  host.use_compilation_cache(config.train.compilation_cache)
  try:
    # The stack closes everything that is opened, whatever fails.
    with contextlib.ExitStack() as stack:
      return _train(_open(config, workdir, stack), allow_config_change)
  except (checkpointers.SaveError, processes.PeerError) as error:
    raise loop.RunError(str(error)) from error
  except OSError as error:
    raise loop.RunError(
        f'The run in {workdir} has stopped: {error}.'
    ) from error


class _Run(NamedTuple):
  """Resources of a run, closed by the stack."""

  config: ml_collections.ConfigDict
  folder: pathlib.Path
  mesh: jax.sharding.Mesh
  stop_request: preemption.StopRequest
  progress: progress_lib.Progress
  checkpointer: checkpointers.Checkpointer
  stack: contextlib.ExitStack

  def close_at_end(self, part: Any) -> Any:
    """Closes a part at the end of the run; returns it."""
    return self.stack.enter_context(contextlib.closing(part))


def _open(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    stack: contextlib.ExitStack,
) -> _Run:
  """Opens the workdir, which no other run may use meanwhile."""
  # First: a signal during building and compiling stops the run after one step.
  stop_request = stack.enter_context(preemption.catch_signals())
  is_writer = jax.process_index() == 0
  with processes.fail_together():
    folder = workdir_files.create(workdir)
    if is_writer:
      stack.enter_context(workdir_files.lock(folder))
  progress = progress_lib.Progress(
      num_steps=config.train.num_steps,
      batch_size=config.data.batch_size,
      enabled=is_writer,
  )
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  progress.say(
      f'{jax.device_count()} x {jax.devices()[0].device_kind}, mesh'
      f' {dict(mesh.shape)}; writing to {folder}'
  )
  checkpointer = stack.enter_context(
      contextlib.closing(
          checkpointers.Checkpointer(folder, keep=config.train.keep_checkpoints)
      )
  )
  return _Run(
      config, folder, mesh, stop_request, progress, checkpointer, stack
  )


def _train(run: _Run, allow_config_change: bool) -> train_state.TrainState:
  """Builds the parts of a run in the order of their dependencies; trains."""
  config, mesh, folder = run.config, run.mesh, run.folder
  model = models.build_autoencoder(config.model, config.data.image_size)
  initializer = None
  if run.checkpointer.latest_step is None:
    initializer = initialization.Initializer(config, model)
  networks = frozen_networks.load_networks(config, mesh)
  dataset = _build_dataset(config, 'train', mesh)
  # Before the state, which takes longer: files may be missing.
  evaluator = evaluators.build_evaluator(
      config, model, _build_dataset(config, 'eval', mesh), mesh, folder
  )
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.StateBuilder(config, model, optimizer, mesh)
  record = run_record.RunRecord(config, model.quantizer, networks, dataset)
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
    for name, value in initializer.sources.items():
      run.progress.say(f'Initialized from {name} {value}')
    state = builder.create(
        initializer.load(builder.abstract_variables, mesh)
    )

  step = train_step.build_train_step(
      model, optimizer, config, networks.perceptual
  )
  run.progress.say('Compiling the training step ...')
  started = time.perf_counter()
  step = builder.compile_step(step, networks.variables)
  compile_seconds = time.perf_counter() - started
  writer = None
  with processes.fail_together():
    if jax.process_index() == 0:
      record.write(folder, state, mesh, compile_seconds)
      writer = run.close_at_end(
          metric_log.MetricWriter(folder, first_step=int(state.step))
      )
  run.progress.say(
      f'{train_state.num_parameters(state.params):,} trainable and'
      f' {train_state.num_parameters(state.frozen_params):,} frozen parameters,'
      f' training step compiled in {compile_seconds:.1f} s.'
  )
  run.close_at_end(run.progress)
  state = loop.run(
      state,
      record.iterator,
      train_step=lambda state, batch: step(
          state,
          partitioning.shard_batch(batch['image'], mesh),
          networks.variables,
      ),
      hooks=_build_hooks(run, record, evaluator, writer, dataset),
      num_steps=config.train.num_steps,
  )
  if writer is not None:
    writer.flush()
    run.progress.say(f'Report: {report.write_report(folder)}')
  return state


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


def _build_hooks(
    run: _Run,
    record: run_record.RunRecord,
    evaluator: evaluators.Evaluator,
    writer: metric_log.MetricWriter | None,
    dataset: pipelines.Dataset,
) -> list[loop.Hook]:
  """Returns the hooks in the order of their calls after a step."""
  options, checkpointer = run.config.train, run.checkpointer
  log = hooks.Log(
      run.progress,
      writer,
      every_steps=options.log_every_steps,
      num_steps=options.num_steps,
      max_bad_steps=options.max_bad_steps,
      describe_image=dataset.describe,
      latest_saved=lambda: checkpointer.latest_step,
  )
  profiler = run.close_at_end(
      host.Profiler(run.folder / workdir_files.PROFILE, options.profile_steps)
  )
  saver = hooks.Saver(checkpointer, record.current, log)
  stop = hooks.Stop(run.stop_request, saver)
  evaluation = hooks.Evaluate(
      evaluator,
      log,
      stop,
      run.folder,
      every_steps=options.eval_every_steps,
      num_steps=options.num_steps,
      is_evaluated=checkpointer.is_evaluated,
  )
  saving = hooks.SaveSteps(saver, evaluation, options.checkpoint_every_steps)
  return [log, hooks.Profile(profiler), stop, evaluation, saving]
