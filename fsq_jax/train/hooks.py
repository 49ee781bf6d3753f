"""Hooks of the training loop: log, profile, stop, evaluate, save."""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

from absl import logging
import jax

from fsq_jax import workdir as workdirs
from fsq_jax.runtime import host
from fsq_jax.runtime import preemption
from fsq_jax.train import loop
from fsq_jax.workdir import progress as progress_lib

# Saves a step, of its number, the state and the scalars of an evaluation.
Save = Callable[[int, Any, Mapping[str, float] | None], None]
# Images of a bad step that its message names.
_NUM_NAMED = 8


class _Pending(NamedTuple):
  """A step whose scalars may still be under way."""

  step: int
  scalars: Mapping[str, jax.Array]
  indices: Sequence[int]


class Log(loop.Hook):
  """Logs scalars, and ends a run with too many non-finite steps in a row.

  The scalars of a step are fetched while the devices work on the next one.
  """

  def __init__(
      self,
      progress: progress_lib.Progress,
      writer: workdirs.MetricWriter | None,
      *,
      every_steps: int,
      num_steps: int,
      max_bad_steps: int,
      describe_image: Callable[[int], str],
      latest_saved: Callable[[], int | None],
  ):
    """Initializes the hook.

    Args:
      progress: shows every step.
      writer: gets a row every `every_steps` steps; None writes none.
      every_steps: >= 1.
      num_steps: of the whole run; the last one is logged in any case.
      max_bad_steps: non-finite steps in a row at which to stop, >= 1.
      describe_image: of the 'index' of an example in a batch to where it
        comes from.
      latest_saved: newest step that has been saved.
    """
    self._progress = progress
    self._writer = writer
    self._every_steps = every_steps
    self._num_steps = num_steps
    self._max_bad_steps = max_bad_steps
    self._describe_image = describe_image
    self._latest_saved = latest_saved
    self._pending: _Pending | None = None

  def start(self, step, state):
    self._progress.start(step)

  def after_step(self, step, state, scalars, batch):
    previous, self._pending = self._pending, _Pending(
        step, scalars, batch['index']
    )
    self._report(previous)

  def flush(self) -> None:
    """Logs the last step, and writes everything logged to disk."""
    self._report(self._pending)
    self._pending = None
    if self._writer is not None:
      self._writer.flush()

  def _report(self, pending: _Pending | None) -> None:
    if pending is None:
      return
    step = pending.step
    scalars = {
        name: float(x) for name, x in jax.device_get(pending.scalars).items()
    }
    self._check_finite(step, scalars, pending.indices)
    rate = self._progress.update(step, scalars)
    if step % self._every_steps == 0 or step == self._num_steps:
      self._progress.log(step, scalars)
      if self._writer is not None:
        row = {**scalars, 'images_per_second': rate}
        self._writer.write(step, 'train', row)

  def _check_finite(self, step, scalars, indices) -> None:
    bad_steps = int(scalars['bad_steps'])
    if not bad_steps:
      return
    names = [name for name, x in scalars.items() if not math.isfinite(x)]
    images = ', '.join(map(self._describe_image, indices[:_NUM_NAMED]))
    message = (
        f'Step {step}: {" and ".join(names)} not finite'
        f' ({scalars["invalid_tokens"]:.1%} of the tokens from NaN), update'
        f' skipped, {bad_steps} in a row. Images: {images} ...'
    )
    logging.warning(message)
    if bad_steps >= self._max_bad_steps:
      raise loop.DivergedError(
          f'{message}\nStopped after train.max_bad_steps ='
          f' {self._max_bad_steps}. The last checkpoint is of step'
          f' {self._latest_saved()}; lower optim.learning_rate or'
          ' optim.clip_norm, or look at the images named.'
      )


class Profile(loop.Hook):
  """Traces the steps that a profiler is for."""

  def __init__(self, profiler: host.Profiler):
    self._profiler = profiler

  def before_step(self, step):
    self._profiler.start(step)

  def after_step(self, step, state, scalars, batch):
    self._profiler.stop(step, state)


class Stop(loop.Hook):
  """Saves the step and raises `loop.Preempted` once a signal has arrived."""

  def __init__(
      self,
      request: preemption.StopRequest,
      save: Save,
      wait: Callable[[], None],
  ):
    """Initializes the hook.

    Args:
      request: of a signal.
      save: saves a step.
      wait: returns when it is on disk.
    """
    self._request = request
    self._save = save
    self._wait = wait

  def after_step(self, step, state, scalars, batch):
    if self._request.is_due(step):
      self._stop(step, state)

  def check(self, step: int, state: Any) -> None:
    """Stops between two steps, as during an evaluation, if that is asked."""
    if self._request.is_due():
      self._stop(step, state)

  def _stop(self, step: int, state: Any) -> None:
    self._save(step, state, None)
    self._wait()
    raise loop.Preempted(step)


class Evaluate(loop.Hook):
  """Evaluates every N steps, at the end, and where a stop left it undone."""

  def __init__(
      self,
      evaluate: Callable[[int, Any], Mapping[str, float]],
      *,
      every_steps: int,
      num_steps: int,
      is_evaluated: Callable[[int], bool],
  ):
    """Initializes the hook.

    Args:
      evaluate: of a step and its state to scalars.
      every_steps: >= 1, or 0 for the end alone.
      num_steps: of the whole run.
      is_evaluated: whether a step was saved with its evaluation.
    """
    self._evaluate = evaluate
    self._every_steps = every_steps
    self._num_steps = num_steps
    self._is_evaluated = is_evaluated
    self._newest: tuple[int | None, Mapping[str, float]] = (None, {})

  def start(self, step, state):
    if step and self._is_due(step) and not self._is_evaluated(step):
      self._run(step, state)

  def after_step(self, step, state, scalars, batch):
    if step == self._num_steps or self._is_due(step):
      self._run(step, state)

  def finish(self, step, state):
    if self.scalars(step) is None:
      self._run(step, state)

  def scalars(self, step: int) -> Mapping[str, float] | None:
    """Returns the evaluation of a step, if it is the newest one."""
    return self._newest[1] if self._newest[0] == step else None

  def _is_due(self, step: int) -> bool:
    return self._every_steps > 0 and step % self._every_steps == 0

  def _run(self, step: int, state: Any) -> None:
    self._newest = (step, self._evaluate(step, state))


class SaveSteps(loop.Hook):
  """Saves every N steps, and every step that has been evaluated."""

  def __init__(
      self,
      save: Save,
      wait: Callable[[], None],
      evaluation: Evaluate,
      *,
      every_steps: int,
  ):
    """Initializes the hook.

    Args:
      save: saves a step.
      wait: returns when all is on disk.
      evaluation: called before this hook.
      every_steps: >= 1.
    """
    self._save = save
    self._wait = wait
    self._evaluation = evaluation
    self._every_steps = every_steps

  def after_step(self, step, state, scalars, batch):
    evaluated = self._evaluation.scalars(step)
    if evaluated is not None or step % self._every_steps == 0:
      self._save(step, state, evaluated)

  def finish(self, step, state):
    self._wait()
