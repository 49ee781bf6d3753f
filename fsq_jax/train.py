"""The training loop: build, restore, step, log, evaluate, save."""

import contextlib
import json
import math
import os
import pathlib
import time
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np

from fsq_jax import checkpoint
from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import evaluate
from fsq_jax import initialization
from fsq_jax import models
from fsq_jax import networks
from fsq_jax import optim
from fsq_jax import partitioning
from fsq_jax import progress
from fsq_jax import provenance
from fsq_jax import report
from fsq_jax import runtime
from fsq_jax import train_state
from fsq_jax import train_step
from fsq_jax import workdir as workdirs
from fsq_jax.quantizers import convert


class Preempted(Exception):  # noqa: N818  # Not an error: the run is intact.
  """Training was asked to stop by a signal and has saved its last step.

  Attributes:
    step: the step that was saved; the same command goes on from there.
  """

  def __init__(self, step: int):
    super().__init__(f'stopped by a signal after saving step {step}')
    self.step = step


class RunError(Exception):
  """A run that cannot go on; what it has saved is intact."""


class DivergedError(RunError):
  """Too many steps in a row had a loss or a gradient that was not finite."""


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    allow_config_change: bool = False,
) -> train_state.TrainState:
  """Trains until config.train.num_steps, evaluates, and writes the report.

  A workdir with checkpoints is continued from the newest one; on the same
  devices the result is bit for bit that of a run that never stopped.

  Args:
    config: see configs/default.py.
    workdir: folder of the run, created if it is missing.
    allow_config_change: continue although the config differs from the one
      that the checkpoint was trained with; if the data set or its order
      differ, the input starts anew.

  Returns:
    The last state.

  Raises:
    ValueError: a config, data set or workdir that cannot be used.
    Preempted: SIGTERM or SIGINT arrived; the last step is saved.
    DivergedError: config.train.max_bad_steps non-finite steps in a row.
    RunError: something cannot be written, as on a full disk, or another of
      several processes cannot start.
  """
  runtime.keep_freed_memory()  # Before JAX has threads.
  configuration.check_config(config, num_devices=jax.device_count())
  config = configuration.resolve(config)
  runtime.use_compilation_cache(config.train.compilation_cache)
  try:
    # From here on, since building and compiling take a while too: a signal then
    # stops the run after its first step.
    with contextlib.ExitStack() as stack:
      stop_request = stack.enter_context(runtime.catch_signals())
      with runtime.fail_together():
        folder = workdirs.create(workdir)
        if jax.process_index() == 0:
          stack.enter_context(workdirs.lock(folder))
      trainer = stack.enter_context(
          _Trainer(config, folder, stop_request, allow_config_change)
      )
      trainer.train()
      trainer.finish()
      return trainer.state
  except (checkpoint.SaveError, runtime.PeerError) as error:
    raise RunError(str(error)) from error
  except OSError as error:
    raise RunError(f'The run in {workdir} has stopped: {error}.') from error


class _Trainer:
  """The parts of one run, and the order in which they act."""

  def __init__(
      self,
      config: ml_collections.ConfigDict,
      folder: pathlib.Path,
      stop_request: runtime.StopRequest,
      allow_config_change: bool,
  ):
    self.config = config
    self.folder = folder
    self.stop_request = stop_request
    self.is_writer = jax.process_index() == 0
    self.progress = progress.Progress(
        num_steps=config.train.num_steps,
        batch_size=config.data.batch_size,
        enabled=self.is_writer,
    )
    self.mesh = partitioning.create_mesh(config.partitioning.mesh)
    self.share = partitioning.process_share(self.mesh)
    self.progress.say(
        f'{jax.device_count()} x {jax.devices()[0].device_kind}, mesh'
        f' {dict(self.mesh.shape)}; writing to {self.folder}'
    )
    self.checkpointer = checkpoint.Checkpointer(
        folder, keep=config.train.keep_checkpoints
    )
    self.model = models.build_autoencoder(config.model, config.data.image_size)
    start = None
    if self.checkpointer.latest_step is None:
      start = initialization.Start(config, self.model)
    self.networks = networks.load_networks(config, self.mesh)
    self.dataset = self._build_dataset('train')
    self.iterator = self.dataset.iterator()
    # Before the state, which takes long: files may be missing.
    self.evaluator = evaluate.build_evaluator(
        config, self.model, self._build_dataset('eval'), self.mesh, folder
    )
    optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
    builder = train_state.StateBuilder(config, self.model, optimizer, self.mesh)
    self.state = self._restore(builder, allow_config_change)
    if self.state is not None:
      self.started_from = provenance.read_started_from(folder / workdirs.RUN)
    else:
      self.started_from = start.facts
      for name, value in self.started_from.items():
        self.progress.say(f'Starts from {name} {value}')
      self.state = builder.create(start.load(builder, self.mesh))
    self.step = self.first_step = int(self.state.step)
    self.train_step, compile_seconds = self._compile(optimizer, builder)
    self.evaluated_step = None
    self.profiler = runtime.Profiler(
        folder / workdirs.PROFILE, config.train.profile_steps
    )
    self.pending = None
    self.writer = None
    with runtime.fail_together():
      if self.is_writer:
        self._describe_run(compile_seconds)
        self.writer = workdirs.MetricWriter(folder, first_step=self.step)
    self.progress.start(self.step)

  def __enter__(self) -> '_Trainer':
    return self

  def __exit__(self, *exception) -> None:
    self.profiler.close()
    self.progress.close()
    self.checkpointer.close()
    if self.writer is not None:
      self.writer.close()

  def train(self) -> None:
    """Takes the steps that are left; saves and raises Preempted on a stop."""
    train = self.config.train
    if self._owes_evaluation():
      self._evaluate()
    while self.step < train.num_steps:
      self.profiler.start(self.step + 1)
      self._take_step()
      self.profiler.stop(self.step, self.state)
      self._stop_if(self.stop_request.is_due(self.step))
      last = self.step == train.num_steps
      if last or self._is_due(train.eval_every_steps):
        self._save(self._evaluate())
      elif self._is_due(train.checkpoint_every_steps):
        self._save(None)
    self.checkpointer.wait()

  def finish(self) -> None:
    """Evaluates if the last step has not been, and writes the report."""
    if self.evaluated_step != self.step:
      self._evaluate()
    if self.is_writer:
      self.writer.flush()
      path = report.write_report(self.folder)
      self.progress.say(f'Report: {path}')

  def _build_dataset(self, split: str) -> data.Dataset:
    return data.build_dataset(
        self.config.data,
        split=split,
        seed=self.config.seed,
        process_index=self.share.index,
        process_count=self.share.count,
    )

  def _restore(self, builder, allow_config_change: bool):
    """Returns the newest saved state and moves the input there, or None."""

    def check(record) -> Any:
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
        data.check_fingerprint(
            record['fingerprint'], self.dataset.fingerprint
        )
      return builder.abstract

    restored = self.checkpointer.restore_newest(check)
    if restored is None:
      return None
    record = restored.record
    try:
      data.check_fingerprint(record['fingerprint'], self.dataset.fingerprint)
    except ValueError as error:
      logging.warning('The input starts anew. %s', error)
    else:
      self.iterator.set_state(record['iterator'])
    self.progress.say(f'Continuing {self.folder} from step {restored.step}.')
    return restored.state

  def _compile(self, optimizer, builder):
    """Compiles the training step; returns it and the seconds it took."""
    started = time.perf_counter()
    step = train_step.build_train_step(
        self.model, optimizer, self.config, self.networks.perceptual
    )
    compiled = builder.compile_step(step, self.networks.variables)
    return compiled, time.perf_counter() - started

  def _describe_run(self, compile_seconds: float) -> None:
    """Writes what the run is, before its first step."""
    num_trained, num_frozen = (
        sum(x.size for x in jax.tree.leaves(params))
        for params in (self.state.params, self.state.frozen_params)
    )
    facts = {
        **provenance.describe(),
        'mesh': dict(self.mesh.shape),
        'num_parameters': num_trained + num_frozen,
        'num_frozen_parameters': num_frozen,
        'num_train_examples': self.dataset.num_examples,
        'first_step': self.first_step,
        'started_from': self.started_from,
        'networks': self.networks.hashes,
        'compile_seconds': round(compile_seconds, 2),
    }
    workdirs.write_json(self.folder / workdirs.RUN, facts)
    workdirs.write_json(
        self.folder / workdirs.CONFIG, self._record()['config']
    )
    workdirs.write_json(
        self.folder / workdirs.QUANTIZER, self.model.quantizer.spec()
    )
    self.progress.say(
        f'{num_trained:,} parameters to train and {num_frozen:,} frozen ones,'
        f' training step compiled in {compile_seconds:.1f} s.'
    )

  def _record(self) -> dict[str, Any]:
    """What a checkpoint holds beside the state."""
    return {
        'config': json.loads(configuration.config_to_json(self.config)),
        'quantizer': self.model.quantizer.spec(),
        'networks': self.networks.hashes,
        'fingerprint': dict(self.dataset.fingerprint),
        'iterator': self.iterator.get_state(),
    }

  def _owes_evaluation(self) -> bool:
    """Whether a signal kept the run from evaluating the step it restored."""
    return (
        self.step > 0
        and self._is_due(self.config.train.eval_every_steps)
        and not self.checkpointer.is_evaluated(self.step)
    )

  def _is_due(self, every_steps: int) -> bool:
    return every_steps > 0 and self.step % every_steps == 0

  def _take_step(self) -> None:
    local_batch = next(self.iterator)
    images = partitioning.shard_batch(local_batch['image'], self.mesh)
    self.state, scalars = self.train_step(
        self.state, images, self.networks.variables
    )
    self.step += 1
    # Read a step's scalars while the device works on the next one.
    previous, self.pending = self.pending, (
        self.step, scalars, local_batch['index']
    )
    self._report(previous)

  def _report(self, pending) -> None:
    """Logs one step that has been taken, or stops the run if it must."""
    if pending is None:
      return
    step, scalars, indices = pending
    scalars = {name: float(x) for name, x in jax.device_get(scalars).items()}
    self._check_finite(step, scalars, indices)
    rate = self.progress.update(step, scalars)
    due = step % self.config.train.log_every_steps == 0
    if due or step == self.config.train.num_steps:
      self.progress.log(step, scalars)
      if self.is_writer:
        row = {**scalars, 'images_per_second': rate}
        self.writer.write(step, 'train', row)

  def _check_finite(self, step: int, scalars, indices: np.ndarray) -> None:
    bad_steps = int(scalars['bad_steps'])
    if not bad_steps:
      return
    names = [name for name, x in scalars.items() if not math.isfinite(x)]
    message = (
        f'Step {step}: {" and ".join(names)} not finite'
        f' ({scalars["invalid_tokens"]:.1%} of the tokens from NaN), update'
        f' skipped, {bad_steps} in a row. Images:'
        f' {", ".join(self.dataset.describe(i) for i in indices[:8])} ...'
    )
    logging.warning(message)
    if bad_steps >= self.config.train.max_bad_steps:
      raise DivergedError(
          f'{message}\nStopped after train.max_bad_steps ='
          f' {self.config.train.max_bad_steps}. The last checkpoint is of step'
          f' {self.checkpointer.latest_step}; lower optim.learning_rate or'
          ' optim.clip_norm, or look at the images named.'
      )

  def _evaluate(self) -> dict[str, float]:
    """Evaluates the current step, writes what it gave, returns the scalars."""
    self._flush_pending()
    evaluation = self.evaluator.run(
        self.state.eval_variables,
        # An evaluation may take longer than a host that is reclaimed has left.
        before_batch=lambda: self._stop_if(self.stop_request.is_due()),
    )
    scalars = evaluation.scalars()
    self.evaluated_step = self.step
    if self.is_writer:
      evaluate.write_evaluation(self.folder, self.step, evaluation)
      if not self._is_evaluation_logged():
        self.writer.write(self.step, 'eval', scalars)
    self.progress.say(f'Step {self.step}: {evaluation.summary()}')
    self.progress.restart_clock()
    return scalars

  def _is_evaluation_logged(self) -> bool:
    """Whether the row is there, as in a finished run that is run again."""
    rows = workdirs.read_metrics(self.folder)
    return any((r['step'], r['split']) == (self.step, 'eval') for r in rows)

  def _save(self, metrics: dict[str, float] | None) -> None:
    self._flush_pending()
    if self.writer is not None:
      self.writer.flush()
    self.checkpointer.save(self.step, self.state, self._record(), metrics)
    self.progress.restart_clock()

  def _stop_if(self, due: bool) -> None:
    """Saves the step and ends the run, which will owe an evaluation begun."""
    if due:
      self._save(None)
      self.checkpointer.wait()
      raise Preempted(self.step)

  def _flush_pending(self) -> None:
    self._report(self.pending)
    self.pending = None
