"""Trains an autoencoder by its config, evaluates it, writes the report."""

from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
import time
from typing import Any

from absl import logging
import jax
import ml_collections

from fsq_jax import checkpoints
from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax import report
from fsq_jax import workdir as workdirs
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.evaluation import saved_run
from fsq_jax.quantizers import convert
from fsq_jax.runtime import host
from fsq_jax.runtime import partitioning
from fsq_jax.runtime import preemption
from fsq_jax.runtime import processes
from fsq_jax.train import frozen_networks
from fsq_jax.train import hooks
from fsq_jax.train import initialization
from fsq_jax.train import loop
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step
from fsq_jax.workdir import progress as progress_lib
from fsq_jax.workdir import provenance


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    allow_config_change: bool = False,
) -> train_state.TrainState:
  """Trains until config.train.num_steps, evaluates, and writes the report.

  A workdir with checkpoints is resumed from the newest one; on the same devices
  the result equals that of an uninterrupted run bit for bit.

  Args:
    config: see configs/default.py.
    workdir: folder of the run, created if it is missing.
    allow_config_change: resume although the config differs from the one that
      the checkpoint was trained with; if the data set or its order differ, the
      input starts anew.

  Returns:
    The last state.

  Raises:
    ValueError: a config, data set or workdir that cannot be used.
    Preempted: SIGTERM or SIGINT arrived; the last step is saved.
    DivergedError: config.train.max_bad_steps non-finite steps in a row.
    RunError: something cannot be written, as on a full disk, or another of
      several processes cannot start.
  """
  configuration.check_config(config, num_devices=jax.device_count())
  config = configuration.resolve(config)
  host.use_compilation_cache(config.train.compilation_cache)
  try:
    # Everything that is opened is entered here, and closed whatever happens.
    with contextlib.ExitStack() as stack:
      # From here on, since building and compiling take a while too: a signal
      # then stops the run after its first step.
      stop_request = stack.enter_context(preemption.catch_signals())
      with processes.fail_together():
        folder = workdirs.create(workdir)
        if jax.process_index() == 0:
          stack.enter_context(workdirs.lock(folder))
      return _train(config, folder, stop_request, stack, allow_config_change)
  except (checkpoints.SaveError, processes.PeerError) as error:
    raise loop.RunError(str(error)) from error
  except OSError as error:
    raise loop.RunError(
        f'The run in {workdir} has stopped: {error}.'
    ) from error


def _train(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    stop_request: preemption.StopRequest,
    stack: contextlib.ExitStack,
    allow_config_change: bool,
) -> train_state.TrainState:
  """Builds the parts of a run in the order in which they need each other."""
  num_steps = config.train.num_steps
  is_writer = jax.process_index() == 0
  progress = progress_lib.Progress(
      num_steps=num_steps, batch_size=config.data.batch_size, enabled=is_writer
  )
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  progress.say(
      f'{jax.device_count()} x {jax.devices()[0].device_kind}, mesh'
      f' {dict(mesh.shape)}; writing to {folder}'
  )
  checkpointer = stack.enter_context(
      contextlib.closing(
          checkpoints.Checkpointer(folder, keep=config.train.keep_checkpoints)
      )
  )
  run = _Run(config, folder, mesh, checkpointer, progress)
  # Before the state, which takes long: files may be missing.
  evaluator = evaluators.build_evaluator(
      config, run.model, run.build_dataset('eval'), mesh, folder
  )
  optimizer = optim.build_optimizer(config.optim, num_steps)
  builder = train_state.StateBuilder(config, run.model, optimizer, mesh)
  state = run.restore_or_create(builder, allow_config_change)
  started = time.perf_counter()
  compiled_step = builder.compile_step(
      train_step.build_train_step(
          run.model, optimizer, config, run.networks.perceptual
      ),
      run.networks.variables,
  )
  compile_seconds = time.perf_counter() - started
  writer = None
  with processes.fail_together():
    if is_writer:
      run.describe(state, compile_seconds)
      writer = stack.enter_context(
          contextlib.closing(
              workdirs.MetricWriter(folder, first_step=int(state.step))
          )
      )
  stack.enter_context(contextlib.closing(progress))
  profiler = stack.enter_context(
      contextlib.closing(
          host.Profiler(folder / workdirs.PROFILE, config.train.profile_steps)
      )
  )

  state = loop.run(
      state,
      run.iterator,
      train_step=lambda state, batch: compiled_step(
          state,
          partitioning.shard_batch(batch['image'], mesh),
          run.networks.variables,
      ),
      hooks=_build_hooks(run, evaluator, writer, profiler, stop_request),
      num_steps=num_steps,
  )
  if is_writer:
    writer.flush()
    progress.say(f'Report: {report.write_report(folder)}')
  return state


def _build_hooks(
    run: '_Run',
    evaluator: evaluators.Evaluator,
    writer: workdirs.MetricWriter | None,
    profiler: host.Profiler,
    stop_request: preemption.StopRequest,
) -> list[loop.Hook]:
  """Returns the hooks in the order in which they act after a step."""
  options, checkpointer = run.config.train, run.checkpointer
  log = hooks.Log(
      run.progress,
      writer,
      every_steps=options.log_every_steps,
      num_steps=options.num_steps,
      max_bad_steps=options.max_bad_steps,
      describe_image=run.dataset.describe,
      latest_saved=lambda: checkpointer.latest_step,
  )

  def save(step: int, state: Any, metrics: Mapping[str, float] | None) -> None:
    log.flush()
    checkpointer.save(step, state, run.record(), metrics)
    run.progress.restart_clock()

  def evaluate(step: int, state: Any) -> dict[str, float]:
    log.flush()
    result = evaluator.run(
        state.eval_variables,
        # An evaluation may take longer than a host that is reclaimed has left.
        before_batch=lambda: stop.check(step, state),
    )
    if writer is not None:
      saved_run.write_evaluation(run.folder, step, result)
      if not _is_logged(run.folder, step):
        writer.write(step, 'eval', result.scalars())
    run.progress.say(f'Step {step}: {result.summary()}')
    run.progress.restart_clock()
    return result.scalars()

  stop = hooks.Stop(stop_request, save, checkpointer.wait)
  evaluation = hooks.Evaluate(
      evaluate,
      every_steps=options.eval_every_steps,
      num_steps=options.num_steps,
      is_evaluated=checkpointer.is_evaluated,
  )
  saving = hooks.SaveSteps(
      save,
      checkpointer.wait,
      evaluation,
      every_steps=options.checkpoint_every_steps,
  )
  return [log, hooks.Profile(profiler), stop, evaluation, saving]


class _Run:
  """The parts of a run that a checkpoint is checked against."""

  def __init__(
      self,
      config: ml_collections.ConfigDict,
      folder: pathlib.Path,
      mesh: jax.sharding.Mesh,
      checkpointer: checkpoints.Checkpointer,
      progress: progress_lib.Progress,
  ):
    self.config = config
    self.folder = folder
    self._mesh = mesh
    self.checkpointer = checkpointer
    self.progress = progress
    self.model = models.build_autoencoder(config.model, config.data.image_size)
    self._start = None
    if checkpointer.latest_step is None:
      self._start = initialization.Start(config, self.model)
    self.networks = frozen_networks.load_networks(config, mesh)
    self.dataset = self.build_dataset('train')
    self.iterator = self.dataset.iterator()
    self._started_from: Mapping[str, Any] = {}

  def build_dataset(self, split: str) -> data.Dataset:
    """Builds a split, this process's part of each batch."""
    return data.build_dataset(
        self.config.data,
        split=split,
        seed=self.config.seed,
        **partitioning.data_shard(self._mesh)._asdict(),
    )

  def restore_or_create(
      self, builder: train_state.StateBuilder, allow_config_change: bool
  ) -> train_state.TrainState:
    """Returns the newest saved state and moves the input there, or a new one.

    Raises:
      ValueError: a checkpoint of another config, data set or frozen network.
    """

    def check(record: Mapping[str, Any]) -> Any:
      configuration.check_resumable(
          configuration.config_from_json(json.dumps(record['config'])),
          self.config,
          allow_config_change=allow_config_change,
      )
      convert.check_same_dialect(
          record['quantizer'], self.model.quantizer.spec()
      )
      self.networks.check_same(record['networks'])
      if not allow_config_change:
        data.check_fingerprint(record['fingerprint'], self.dataset.fingerprint)
      return builder.abstract

    restored = self.checkpointer.restore_newest(check)
    if restored is None:
      self._started_from = self._start.facts
      for name, value in self._started_from.items():
        self.progress.say(f'Starts from {name} {value}')
      return builder.create(self._start.load(builder, self._mesh))
    self._started_from = provenance.read_started_from(
        self.folder / workdirs.RUN
    )
    record = restored.record
    try:
      data.check_fingerprint(record['fingerprint'], self.dataset.fingerprint)
    except ValueError as error:
      logging.warning('The input starts anew. %s', error)
    else:
      self.iterator.set_state(record['iterator'])
    self.progress.say(
        f'Continuing {self.folder} from step {restored.step}.'
    )
    return restored.state

  def record(self) -> dict[str, Any]:
    """Returns what a checkpoint holds beside the state, JSON-able."""
    return {
        'config': json.loads(configuration.config_to_json(self.config)),
        'quantizer': self.model.quantizer.spec(),
        'networks': self.networks.hashes,
        'fingerprint': dict(self.dataset.fingerprint),
        'iterator': self.iterator.get_state(),
    }

  def describe(
      self, state: train_state.TrainState, compile_seconds: float
  ) -> None:
    """Writes run.json, config.json and quantizer.json."""
    num_trained, num_frozen = (
        sum(x.size for x in jax.tree.leaves(params))
        for params in (state.params, state.frozen_params)
    )
    workdirs.write_json(
        self.folder / workdirs.RUN,
        {
            **provenance.describe(),
            'mesh': dict(self._mesh.shape),
            'num_parameters': num_trained + num_frozen,
            'num_frozen_parameters': num_frozen,
            'num_train_examples': self.dataset.num_examples,
            'first_step': int(state.step),
            'started_from': self._started_from,
            'networks': self.networks.hashes,
            'compile_seconds': round(compile_seconds, 2),
        },
    )
    workdirs.write_json(
        self.folder / workdirs.CONFIG, self.record()['config']
    )
    workdirs.write_json(
        self.folder / workdirs.QUANTIZER, self.model.quantizer.spec()
    )
    self.progress.say(
        f'{num_trained:,} trainable and {num_frozen:,} frozen parameters,'
        f' training step compiled in {compile_seconds:.1f} s.'
    )


def _is_logged(folder: pathlib.Path, step: int) -> bool:
  """Whether metrics.jsonl has the evaluation, as where a run is run again."""
  rows = workdirs.read_metrics(folder)
  return any((row['step'], row['split']) == (step, 'eval') for row in rows)
