"""Checkpoints of a run: state, input position and config in one step.

Orbax stores no checksums: a flipped bit on disk is read as another number. So
each step has a manifest with a hash of every array and of the record, and
everything that is read is checked against it.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import errno
import pathlib
import re
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from fsq_jax.checkpoints import integrity
from fsq_jax.runtime import processes
from fsq_jax.workdir import files as workdirs

_FORMAT = 1
# Metric that ranks steps, of autoencoders and of generators, and its sign.
_RANKING = {'psnr': 1, 'bits_per_token': -1}
# Numbers of system errors that corrupted or missing files cause. Any other
# error, as of a disk or a server, says nothing about the files.
_CORRUPTION_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL}
_ERRNO = re.compile(r"(?:\[Errno |os_error_code=')(\d+)")
# Errors of object stores, for which TensorStore has no number.
_STORAGE_ERROR = re.compile(
    r'\b(ABORTED|CANCELLED|DEADLINE_EXCEEDED|PERMISSION_DENIED'
    r'|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE):'
)

# Packages whose errors are errors of an object store or of the network. They
# raise a FileNotFoundError for a missing object.
_STORAGE_PACKAGES = {'aiohttp', 'gcsfs', 'google', 'requests'}


class CorruptedError(ValueError):
  """The content of a step differs from the saved content."""


class ReadError(RuntimeError):
  """A step could not be read (I/O error); it may be intact."""


class SaveError(ValueError):
  """A step could not be written."""


class Restored(NamedTuple):
  """A step that was read and verified.

  Attributes:
    step: training steps taken.
    record: JSON values.
    state: tree of arrays.
  """

  step: int
  record: dict[str, Any]
  state: Any


class Checkpointer:
  """Saves and restores the steps under `checkpoints/` of a run's folder.

  Steps are written atomically: in the background, under another name, and then
  renamed; in an object store, a file commit_success.txt, written last, marks a
  step that is complete. The newest steps and the best one are kept.

  With several processes, all call each method together, and all skip a step
  that any of them cannot read.
  """

  def __init__(
      self, folder: pathlib.Path, *, keep: int = 1, read_only: bool = False
  ):
    """Opens the folder.

    Args:
      folder: the run's folder.
      keep: number of newest steps to keep, >= 1, beside the best one.
      read_only: leaves the remains of an interrupted save in place.

    Raises:
      ReadError: the manifest of a step cannot be read now.
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
    try:
      for step in self.steps:
        self._read_metrics(step)
    except BaseException:
      self.close()
      raise

  def _read_metrics(self, step: int) -> None:
    try:
      self._metrics[step] = self._read_manifest(step)['metrics']
    except CorruptedError as error:
      logging.warning('%s', error)

  @property
  def steps(self) -> list[int]:
    """All steps on disk, intact or not, ascending."""
    return sorted(self._manager.all_steps())

  @property
  def latest_step(self) -> int | None:
    """The newest step; None without any step."""
    return max(self.steps, default=None)

  @property
  def best_step(self) -> int | None:
    """The step with the best evaluation; None without any.

    The best one has the highest PSNR, or the fewest bits per token.
    """
    values = {
        step: sign * value
        for step in self.steps
        for name, sign in _RANKING.items()
        # A metric that is not finite is saved as null.
        if (value := self._metrics.get(step, {}).get(name)) is not None
    }
    return max(values, key=values.get, default=None)

  def is_evaluated(self, step: int) -> bool:
    """Whether the step was saved with the metrics of an evaluation."""
    return bool(self._metrics.get(step))

  def save(
      self,
      step: int,
      state: Any,
      record: Mapping[str, Any],
      metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to save a step; the state may be donated afterwards.

    A step that exists is not written again.

    Args:
      step: training steps taken.
      state: tree of arrays.
      record: JSON values: config, quantizer, position and fingerprint of the
        input.
      metrics: metrics of an evaluation at this step, with the key 'psnr' or
        'bits_per_token', which ranks last if it is not finite.

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
    # Orbax waits for the save before this one, whose error is raised here.
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
    """Returns the JSON values of a step and reads no array.

    Raises:
      CorruptedError: they differ from the saved ones.
      ReadError: they cannot be read now.
    """
    manifest = self._read_manifest(step)
    with _in_all_processes(step):
      record = self._read(step, 'record', ocp.args.JsonRestore())
      if integrity.hash_json(record) != manifest['record']:
        raise CorruptedError(
            f'Step {step}: the record differs from the saved one.'
        )
    return record

  def restore(
      self, step: int, abstract: Any, *, partial: bool = False
  ) -> Any:
    """Restores the state of a step.

    Args:
      step: one of `steps`.
      abstract: tree of `jax.ShapeDtypeStruct` with shardings, which may differ
        from the shardings of the saved arrays.
      partial: `abstract` is a dict with some fields of the state, and only
        these are read and checked. Without the fields of the optimizer, a state
        is a third of its size.

    Returns:
      The state; with `partial` a dict of its fields.

    Raises:
      CorruptedError: arrays differ from the saved ones.
      ReadError: arrays cannot be read now.
      ValueError: the step has other arrays than `abstract`; nothing is cast.
    """
    saved = self._read_manifest(step)['arrays']
    args = ocp.args.StandardRestore(abstract)
    if partial:
      saved = {
          path: x for path, x in saved.items() if path.split('/')[0] in abstract
      }
      args = ocp.args.PyTreeRestore(
          item=abstract,
          restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
          partial_restore=True,
      )
    hashes = {path: x.pop('hash') for path, x in saved.items()}
    if lines := integrity.compare(saved, integrity.describe_arrays(abstract)):
      raise ValueError(
          f'Step {step} of {self._folder} has other arrays than this model and'
          ' optimizer (saved -> wanted):\n  ' + '\n  '.join(lines)
      )
    with _in_all_processes(step):
      state = self._read(step, 'state', args)
      # Orbax returns abstract arrays in place of missing ones.
      if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(state)):
        raise CorruptedError(f'Step {step}: arrays of the state are missing.')
    lines = integrity.compare(hashes, integrity.hash_arrays(state))
    with _in_all_processes(step):  # Each process hashes its own replicas.
      if lines:
        raise CorruptedError(
            f'Step {step}: arrays differ from the saved ones (hash then ->'
            ' now):\n  ' + '\n  '.join(lines)
        )
    return state

  def restore_newest(
      self, abstract_of: Callable[[Mapping[str, Any]], Any]
  ) -> Restored | None:
    """Restores the newest intact step.

    Newer steps that are corrupted are moved to `damaged/` in the run's folder,
    so that their numbers can be used again.

    Args:
      abstract_of: from the record of a step to the tree for `restore`; it may
        reject the record with a ValueError.

    Returns:
      The step; None if there are no steps.

    Raises:
      ReadError: a step cannot be read now; no step is moved.
      ValueError: all steps are corrupted (none is moved), or an error of
        `abstract_of`.
    """
    reasons = {}
    for step in reversed(self.steps):
      try:
        record = self.restore_record(step)
        state = self.restore(step, abstract_of(record))
      except CorruptedError as error:
        logging.error('%s is skipped. %s', step, error)
        reasons[step] = str(error)
        continue
      self._set_aside(reasons)
      return Restored(step, record, state)
    if not reasons:
      return None
    raise ValueError(
        f'No step of {self._folder} can be restored; nothing was changed there.'
        ' Start a new run in another --workdir.\n'
        + '\n'.join(reasons.values())
    )

  def wait(self) -> None:
    """Waits until everything that was saved is on disk.

    Raises:
      SaveError: it cannot be written.
    """
    with self._saving('The last step'):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and closes; errors are logged, call `wait` to have them raised."""
    try:
      self._manager.close()
    except Exception as error:
      logging.error('The last step is not on disk. %s', error)

  def _read_manifest(self, step: int) -> dict[str, Any]:
    with _in_all_processes(step):
      manifest = self._read(step, 'manifest', ocp.args.JsonRestore())
      try:
        sha256 = manifest.pop('sha256')
        if sha256 != integrity.hash_json(manifest) or manifest['step'] != step:
          raise ValueError('its hash differs')
        if manifest['format'] != _FORMAT:
          raise ValueError(f'format {manifest["format"]}, not {_FORMAT}')
      except (AttributeError, KeyError, ValueError) as error:
        raise CorruptedError(
            f'Step {step}: the manifest cannot be used ({error}).'
        ) from error
    return manifest

  def _read(self, step: int, part: str, args: ocp.args.CheckpointArgs) -> Any:
    self.wait()
    folder = self._manager.directory / str(step)
    # The manager's own `restore` ends with a barrier, which a process that
    # cannot read would never reach. A reader takes one kind of arguments.
    with contextlib.closing(ocp.CompositeCheckpointHandler()) as reader:
      try:
        args = ocp.args.Composite(**{part: args})
        return reader.restore(folder, args=args)[part]
      except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # Says nothing about the files.
      except Exception as error:  # Corrupted files cause any kind of error.
        is_remote = workdirs.is_remote(self._folder)
        if cause := _find_storage_error(error, is_remote):
          raise ReadError(
              f'{folder}: the {part} cannot be read now ({_shorten(cause)}) and'
              ' may be intact. No step was moved; run the same command again'
              ' when it can be read, or move this step away.'
          ) from error
        raise CorruptedError(
            f'Step {step}: the {part} cannot be read ({type(error).__name__}:'
            f' {_shorten(error)}).'
        ) from error

  def _set_aside(self, reasons: Mapping[int, str]) -> None:
    """Moves corrupted steps to `damaged/`, since training repeats them."""
    if not reasons:
      return
    if jax.process_index() == 0:
      folder = self._folder / workdirs.DAMAGED
      workdirs.make_folder(folder)
      for step, reason in reasons.items():
        target = workdirs.unused(folder / str(step))
        source = self._folder / workdirs.CHECKPOINTS / str(step)
        workdirs.move_folder(source, target)
        logging.error('Moved to %s: %s', target, reason)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('corrupted steps are moved')
    for step in reasons:
      self._metrics.pop(step, None)
    self._manager.reload()

  @contextlib.contextmanager
  def _saving(self, what: str) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      raise SaveError(
          f'{what} of {self._folder} cannot be written ({_shorten(error)}).'
          f' Steps on disk are {self.steps}; free some space or make the folder'
          ' writable, and run the same command again.'
      ) from error


def _in_all_processes(step: int) -> contextlib.AbstractContextManager[None]:
  """Raises in every process if reading a step fails in any."""

  def error(kind: type[Exception], reason: str) -> Callable[[int], Exception]:
    return lambda process: kind(
        f'Step {step}: process {process} {reason}; its log says why.'
    )

  return processes.fail_together((
      (CorruptedError, error(CorruptedError, 'found it corrupted')),
      (Exception, error(ReadError, 'cannot read it now')),
  ))


def _find_storage_error(
    error: BaseException | None, is_remote: bool
) -> BaseException | None:
  """Returns the error among the causes that does not mean corrupted files.

  Args:
    error: with its causes.
    is_remote: whether the files are in an object store.
  """
  while error is not None:
    numbers = {int(x) for x in _ERRNO.findall(str(error))}
    if numbers - _CORRUPTION_ERRNOS or _STORAGE_ERROR.search(str(error)):
      return error
    package = type(error).__module__.partition('.')[0]
    # gcsfs raises an OSError without a number if access is denied.
    is_denied = type(error) is OSError and error.errno is None
    if is_remote and (package in _STORAGE_PACKAGES or is_denied):
      return error
    error = error.__cause__ or error.__context__
  return None


def _shorten(error: BaseException) -> str:
  """Returns the two ends of an error's text, which may fill pages."""
  # TensorStore appends how the file was opened.
  text = ' '.join(str(error).partition(' [tensorstore_spec')[0].split())
  return text if len(text) < 300 else f'{text[:120]} ... {text[-160:]}'


class _KeepBest(ocp.checkpoint_managers.PreservationPolicy):
  """Preserves the step that a function returns.

  The policy of Orbax for metrics reads them from files of its own, and a single
  corrupted one would keep the folder from being opened.
  """

  def __init__(self, best_step: Callable[[], int | None]):
    self._best_step = best_step

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    best = self._best_step()
    return [checkpoint.step == best for checkpoint in checkpoints]
