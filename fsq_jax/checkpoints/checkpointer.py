"""Checkpoints of a run: state, input position and config in one step.

Orbax keeps no checksums: a bit that flips on disk comes back as another number.
So each step has a manifest with a hash of every array and of the record, which
is compared with what is read before anybody gets it.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import integrity
from fsq_jax.checkpoints import storage_errors
from fsq_jax.runtime import processes

_FORMAT = 1


class DamagedError(ValueError):
  """A step that is not what was saved."""


class ReadError(RuntimeError):
  """A step that cannot be read now, and may be whole."""


class SaveError(ValueError):
  """A step that could not be written."""


class Restored(NamedTuple):
  """A step that was read whole and checked.

  Attributes:
    step: steps taken.
    record: JSON values.
    state: tree of arrays.
  """

  step: int
  record: dict[str, Any]
  state: Any


class Checkpointer:
  """Saves and restores the steps under `checkpoints/` of a run's folder.

  A step appears whole or not at all: it is written in the background under
  another name and then renamed. The newest ones and the best one are kept.

  Several processes call each method together: what one cannot read, none gets.
  """

  def __init__(
      self, folder: pathlib.Path, *, keep: int = 1, read_only: bool = False
  ):
    """Opens the folder.

    Args:
      folder: the run's folder.
      keep: newest steps to keep, >= 1, beside the one of the highest PSNR.
      read_only: for looking; else what an interrupted save has left is removed.

    Raises:
      ReadError: what a step says of itself cannot be read now.
    """
    self._folder = folder
    self._metrics: dict[int, Mapping[str, float | None]] = {}
    keep_newest = ocp.checkpoint_managers.LatestN(n=keep)
    self._manager = ocp.CheckpointManager(
        folder / workdirs.CHECKPOINTS,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(
                [keep_newest, _KeepBest(lambda: self.best_step)]
            ),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        ),
    )
    # The manager's own `restore` ends at a barrier, which a process that cannot
    # read would never reach.
    self._reader = ocp.CompositeCheckpointHandler()
    # One takes each item by one kind of arguments alone.
    self._part_reader = ocp.CompositeCheckpointHandler()
    for step in self.steps:
      try:
        self._metrics[step] = self._read_manifest(step)['metrics']
      except DamagedError as error:
        logging.warning('%s', error)

  @property
  def steps(self) -> list[int]:
    """Steps that are there, whole or not, ascending."""
    return sorted(self._manager.all_steps())

  @property
  def latest_step(self) -> int | None:
    """The newest step, None without any."""
    return max(self.steps, default=None)

  @property
  def best_step(self) -> int | None:
    """The step of the highest evaluated PSNR, None without any."""
    values = {
        step: psnr
        for step in self.steps
        # Those not finite are null.
        if (psnr := self._metrics.get(step, {}).get('psnr')) is not None
    }
    return max(values, key=values.get, default=None)

  def is_evaluated(self, step: int) -> bool:
    """Whether the step was saved with the numbers of an evaluation."""
    return bool(self._metrics.get(step))

  def save(
      self,
      step: int,
      state: Any,
      record: Mapping[str, Any],
      metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to save one step; the state may be donated afterwards.

    A step that is there already stays as it is.

    Args:
      step: steps taken.
      state: tree of arrays.
      record: JSON values: config, quantizer, position and fingerprint of the
        input.
      metrics: of an evaluation at this step, with the key 'psnr'; one that is
        not finite ranks last.

    Raises:
      SaveError: this step, or the one before it, cannot be written.
    """
    if step in self.steps:
      return
    metrics = workdirs.finite_or_null(metrics or {})
    arrays = integrity.describe_arrays(state)
    for path, digest in integrity.hash_arrays(state).items():
      arrays[path]['hash'] = digest
    manifest = {
        'format': _FORMAT,
        'step': step,
        'arrays': arrays,
        'record': integrity.hash_json(record),
        'metrics': metrics,
    }
    self._metrics[step] = metrics
    # It waits for the one before, whose error comes up here.
    with self._saving(f'Step {step}, or the one before it,'):
      self._manager.save(
          step,
          args=ocp.args.Composite(
              state=ocp.args.StandardSave(state),
              record=ocp.args.JsonSave(dict(record)),
              manifest=ocp.args.JsonSave(
                  {**manifest, 'sha256': integrity.hash_json(manifest)}
              ),
          ),
      )

  def restore_record(self, step: int) -> dict[str, Any]:
    """Reads the JSON values of one step, without its arrays.

    Raises:
      DamagedError: they are not what was saved.
      ReadError: they cannot be read now.
    """
    manifest = self._read_manifest(step)
    with _in_all_processes(step):
      record = self._read(step, 'record', ocp.args.JsonRestore())
      if integrity.hash_json(record) != manifest['record']:
        raise DamagedError(f'Step {step}: the record is not what was saved.')
    return record

  def restore(self, step: int, abstract: Any) -> Any:
    """Reads the state of one step.

    Args:
      step: one of the steps that are there.
      abstract: tree of `jax.ShapeDtypeStruct` with the shardings wanted; how
        the arrays were sharded when saved does not matter.

    Returns:
      The state.

    Raises:
      DamagedError: arrays are not what was saved.
      ReadError: they cannot be read now.
      ValueError: the step has other arrays than `abstract`; nothing is cast.
    """
    saved = self._read_manifest(step)['arrays']
    args = ocp.args.StandardRestore(abstract)
    return self._restore(step, abstract, saved, args, self._reader)

  def restore_fields(
      self, step: int, abstract: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Reads some fields of the state of one step, and compares only these.

    Args:
      step: as in `restore`.
      abstract: by field of the state, as in `restore`. Without the optimizer's
        fields, a state is a third of its size.

    Returns:
      The fields.

    Raises:
      DamagedError: as in `restore`.
      ReadError: as in `restore`.
      ValueError: as in `restore`.
    """
    abstract = dict(abstract)
    saved = {
        path: x
        for path, x in self._read_manifest(step)['arrays'].items()
        if path.split('/')[0] in abstract
    }
    args = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    return self._restore(step, abstract, saved, args, self._part_reader)

  def _restore(
      self,
      step: int,
      abstract: Any,
      saved: Mapping[str, dict[str, Any]],
      args: ocp.args.CheckpointArgs,
      reader: ocp.CompositeCheckpointHandler,
  ) -> Any:
    hashes = {path: x.pop('hash') for path, x in saved.items()}
    if lines := integrity.compare(saved, integrity.describe_arrays(abstract)):
      raise ValueError(
          f'Step {step} of {self._folder} has other arrays than this model and'
          ' optimizer (saved -> wanted):\n  ' + '\n  '.join(lines)
      )
    with _in_all_processes(step):
      state = self._read(step, 'state', args, reader)
      # In the place of arrays that Orbax does not find, it leaves their shapes.
      if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(state)):
        raise DamagedError(f'Step {step}: arrays of the state are missing.')
    lines = integrity.compare(hashes, integrity.hash_arrays(state))
    with _in_all_processes(step):  # Some arrays are whole in each of them.
      if lines:
        raise DamagedError(
            f'Step {step}: arrays are not what was saved (hash then -> now):'
            '\n  ' + '\n  '.join(lines)
        )
    return state

  def restore_newest(
      self, abstract_of: Callable[[Mapping[str, Any]], Any]
  ) -> Restored | None:
    """Reads the newest step that is undamaged.

    Damaged ones that are newer are moved to `damaged/` in the run's folder, so
    that their numbers are free again.

    Args:
      abstract_of: the tree for `restore`, of the step's record; it may refuse
        the record with a ValueError.

    Returns:
      The step; None if there are none.

    Raises:
      ReadError: one cannot be read now; none is moved.
      ValueError: all steps are damaged (they stay where they are), or as
        raised by `abstract_of`.
    """
    refused = {}
    for step in reversed(self.steps):
      try:
        record = self.restore_record(step)
        state = self.restore(step, abstract_of(record))
      except DamagedError as error:
        logging.error('%s is passed over. %s', step, error)
        refused[step] = str(error)
        continue
      self._set_aside(refused)
      return Restored(step, record, state)
    if not refused:
      return None
    reasons = '\n'.join(refused.values())
    raise ValueError(
        f'No step of {self._folder} can be restored; nothing was changed there.'
        f' Take another --workdir to start anew.\n{reasons}'
    )

  def wait(self) -> None:
    """Returns when everything that was saved is on disk.

    Raises:
      SaveError: it cannot be written.
    """
    with self._saving('The last step'):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and closes; `wait` first, to know that all is on disk."""
    try:
      self._manager.close()
      self._reader.close()
      self._part_reader.close()
    except Exception as error:
      logging.error('The last step is not on disk. %s', error)

  def _read_manifest(self, step: int) -> dict[str, Any]:
    with _in_all_processes(step):
      manifest = self._read(step, 'manifest', ocp.args.JsonRestore())
      try:
        sha256 = manifest.pop('sha256')
        if sha256 != integrity.hash_json(manifest) or manifest['step'] != step:
          raise ValueError('it is not what was saved')
        if manifest['format'] != _FORMAT:
          raise ValueError(f'format {manifest["format"]}, not {_FORMAT}')
      except (AttributeError, KeyError, ValueError) as error:
        raise DamagedError(
            f'Step {step}: the manifest cannot be used ({error}).'
        ) from error
    return manifest

  def _read(
      self,
      step: int,
      part: str,
      args: ocp.args.CheckpointArgs,
      reader: ocp.CompositeCheckpointHandler | None = None,
  ) -> Any:
    self.wait()
    folder = self._manager.directory / str(step)
    try:
      parts = ocp.args.Composite(**{part: args})
      return (reader or self._reader).restore(folder, args=parts)[part]
    except (MemoryError, jax.errors.JaxRuntimeError):
      raise  # Says nothing about the files.
    except Exception as error:  # Whatever a reader makes of damaged bytes.
      if cause := storage_errors.find_other_cause(error):
        raise ReadError(
            f'{folder}: the {part} cannot be read now'
            f' ({storage_errors.shorten(cause)}) and may be whole. No step was'
            ' moved; run the same command again when it can be read, or move'
            ' this step away.'
        ) from error
      raise DamagedError(
          f'Step {step}: the {part} cannot be read ({type(error).__name__}:'
          f' {storage_errors.shorten(error)}).'
      ) from error

  def _set_aside(self, refused: Mapping[int, str]) -> None:
    """Moves steps out of the way, whose numbers will come again."""
    if not refused:
      return
    if jax.process_index() == 0:
      folder = self._folder / workdirs.DAMAGED
      folder.mkdir(exist_ok=True)
      for step, reason in refused.items():
        target = workdirs.unused(folder / str(step))
        (self._folder / workdirs.CHECKPOINTS / str(step)).rename(target)
        logging.error('Moved to %s: %s', target, reason)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('damaged steps are set aside')
    for step in refused:
      self._metrics.pop(step, None)
    self._manager.reload()

  @contextlib.contextmanager
  def _saving(self, what: str) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      raise SaveError(
          f'{what} of {self._folder} cannot be written'
          f' ({storage_errors.shorten(error)}). Steps on disk are {self.steps};'
          ' make room, or the folder writable, and run the same command again.'
      ) from error


@contextlib.contextmanager
def _in_all_processes(step: int) -> Iterator[None]:
  """Raises in every process if what is done inside fails in one of them."""
  failure = None
  try:
    yield
  except Exception as error:
    failure = error
  kind = 0 if failure is None else 1 if isinstance(failure, DamagedError) else 2
  worst = processes.gather(np.array(kind, np.int32)).max()
  if kind < worst:
    error = DamagedError if worst == 1 else ReadError
    reason = 'found it damaged' if worst == 1 else 'cannot read it now'
    raise error(f'Step {step}: another process {reason}; its log says why.')
  if failure is not None:
    raise failure


class _KeepBest(ocp.checkpoint_managers.PreservationPolicy):
  """Preserves the step that a function names.

  Orbax has a policy of that kind for metrics that it keeps itself, in files of
  which one that is damaged would keep the folder from being opened.
  """

  def __init__(self, best_step: Callable[[], int | None]):
    self._best_step = best_step

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    best = self._best_step()
    return [checkpoint.step == best for checkpoint in checkpoints]
