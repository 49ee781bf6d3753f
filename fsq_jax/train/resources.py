"""Resources and hooks of a training run, for any model."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections

from fsq_jax.checkpoints import checkpointer as checkpointers
from fsq_jax.configuration import loading as config_loading
from fsq_jax.runtime import host
from fsq_jax.runtime import partitioning
from fsq_jax.runtime import preemption
from fsq_jax.runtime import processes
from fsq_jax.train import hooks
from fsq_jax.train import loop
from fsq_jax.train import run_record
from fsq_jax.train import state as train_state
from fsq_jax.workdir import files as workdir_files
from fsq_jax.workdir import metric_log
from fsq_jax.workdir import progress as progress_lib
from fsq_jax.workdir import rows as rows_lib
from fsq_jax.workdir import trackers as trackers_lib
from fsq_jax.workdir import urls


class Run(NamedTuple):
  """Resources of a run, closed by the stack; `inputs` of `open_inputs`."""

  config: ml_collections.ConfigDict
  folder: pathlib.Path
  mesh: jax.sharding.Mesh
  stop_request: preemption.StopRequest
  progress: progress_lib.Progress
  checkpointer: checkpointers.Checkpointer
  trackers: Sequence[rows_lib.Tracker]
  inputs: Any
  stack: contextlib.ExitStack

  def close_at_end(self, part: Any) -> Any:
    """Closes a part at the end of the run; returns it."""
    return self.stack.enter_context(contextlib.closing(part))


@contextlib.contextmanager
def open_run(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    open_inputs: Callable[[jax.sharding.Mesh, bool], Any],
    *,
    batch_size: int,
) -> Iterator[Run]:
  """Opens the inputs, and the workdir, which no other run may use meanwhile.

  A local workdir that is missing or empty is created after the inputs were
  opened, so that nothing is left of a run whose inputs are missing. Otherwise
  the workdir is opened first, since another run may be using it.

  Everything that was opened is closed at the end, whatever fails.

  Args:
    config: resolved; its sections train and partitioning are read.
    workdir: folder of the run, created if it is missing.
    open_inputs: called with the mesh and whether there is no checkpoint to
      resume from; returns `Run.inputs`.
    batch_size: images per step, for the progress.

  Raises:
    RunError: something cannot be read or written, as on a full disk, or another
      process failed.
  """
  host.use_compilation_cache(config.train.compilation_cache)
  try:
    with contextlib.ExitStack() as stack:
      yield _open(config, workdir, open_inputs, batch_size, stack)
  except (
      checkpointers.ReadError, checkpointers.SaveError, processes.PeerError
  ) as error:
    raise loop.RunError(str(error)) from error
  except OSError as error:
    raise loop.RunError(
        f'The run in {workdir} has stopped: {error}.'
    ) from error


def _open(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    open_inputs: Callable[[jax.sharding.Mesh, bool], Any],
    batch_size: int,
    stack: contextlib.ExitStack,
) -> Run:
  # First: a signal during building and compiling stops the run after one step.
  stop_request = stack.enter_context(preemption.catch_signals())
  is_writer = jax.process_index() == 0
  with processes.fail_together():
    folder = workdir_files.run_folder(workdir, '--workdir')
    _check_local_outputs(config, folder)
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  # The same order in all processes.
  is_unused = not processes.is_any(not _is_unused(folder))
  inputs = open_inputs(mesh, True) if is_unused else None
  trackers = []
  with processes.fail_together():
    workdir_files.create(folder, stores=urls.STORES)
    if is_writer:
      stack.enter_context(workdir_files.lock(folder))
      trackers = _open_trackers(config, folder, stack)
  progress = progress_lib.Progress(
      num_steps=config.train.num_steps,
      batch_size=batch_size,
      enabled=is_writer,
  )
  progress.say(
      f'{jax.device_count()} x {jax.devices()[0].device_kind}, mesh'
      f' {dict(mesh.shape)}; writing to {folder}'
  )
  checkpointer = stack.enter_context(
      contextlib.closing(
          checkpointers.Checkpointer(folder, keep=config.train.keep_checkpoints)
      )
  )
  if not is_unused:
    inputs = open_inputs(mesh, checkpointer.latest_step is None)
  return Run(
      config, folder, mesh, stop_request, progress, checkpointer, trackers,
      inputs, stack,
  )


def _is_unused(folder: pathlib.Path) -> bool:
  """Whether a local folder is missing or empty, and could be created."""
  if workdir_files.is_remote(folder):
    return False
  try:
    existing = next(x for x in (folder, *folder.parents) if x.exists())
    return (
        existing.is_dir()
        and os.access(existing, os.W_OK | os.X_OK)
        and workdir_files.is_empty(folder)
    )
  except OSError:
    return False  # Creating it names the problem.


def _check_local_outputs(
    config: ml_collections.ConfigDict, folder: pathlib.Path
) -> None:
  """Raises ValueError for fields whose files cannot be in an object store."""
  for name in ('trackers', 'profile_steps'):
    if workdir_files.is_remote(folder) and config.train[name]:
      raise ValueError(
          f'train.{name} is {config.train[name]!r} with --workdir={folder}:'
          ' their files need a local folder; allowed: ().'
      )


def _open_trackers(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    stack: contextlib.ExitStack,
) -> list[rows_lib.Tracker]:
  """Connects to train.trackers before the run computes anything."""
  fields = dict(config_loading.flatten(config))
  trackers = []
  for name in config.train.trackers:
    tracker = trackers_lib.open_tracker(name, folder, fields)
    stack.push(
        lambda error_type, *_, tracker=tracker: tracker.close(
            failed=error_type is not None
        )
    )
    trackers.append(tracker)
  return trackers


def start_log(
    run: Run,
    record: run_record.RunRecord,
    state: train_state.TrainState,
    compile_seconds: float,
) -> metric_log.MetricWriter | None:
  """Writes the record of the run; opens metrics.jsonl, in the first process."""
  writer = None
  with processes.fail_together():
    if jax.process_index() == 0:
      record.write(run.folder, state, run.mesh, compile_seconds)
      writer = run.close_at_end(
          metric_log.MetricWriter(
              run.folder, first_step=int(state.step), trackers=run.trackers
          )
      )
  run.progress.say(
      f'{train_state.num_parameters(state.params):,} trainable and'
      f' {train_state.num_parameters(state.frozen_params):,} frozen parameters,'
      f' training step compiled in {compile_seconds:.1f} s.'
  )
  run.close_at_end(run.progress)
  return writer


def build_hooks(
    run: Run,
    record: run_record.RunRecord,
    evaluator: hooks.Evaluator,
    writer: metric_log.MetricWriter | None,
    describe_image: Callable[[int], str],
) -> list[loop.Hook]:
  """Returns the hooks in the order of their calls after a step.

  Args:
    run: the resources.
    record: of the run.
    evaluator: of the held-out split.
    writer: from `start_log`.
    describe_image: maps the 'index' of an image in a batch to its origin.
  """
  options, checkpointer = run.config.train, run.checkpointer
  log = hooks.Log(
      run.progress,
      writer,
      every_steps=options.log_every_steps,
      num_steps=options.num_steps,
      max_bad_steps=options.max_bad_steps,
      describe_image=describe_image,
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
