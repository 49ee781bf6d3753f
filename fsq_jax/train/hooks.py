"""Hooks of the training loop: log, profile, stop, evaluate, save."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import pathlib
from typing import Any, NamedTuple, Protocol

from absl import logging
import jax

from fsq_jax.checkpoints import checkpointer as checkpointers
from fsq_jax.runtime import host
from fsq_jax.runtime import preemption
from fsq_jax.train import loop
from fsq_jax.workdir import metric_log
from fsq_jax.workdir import progress as progress_lib

# Images that the message about a bad step names.
_NUM_NAMED = 8


class _Pending(NamedTuple):
  """A step whose scalars may still be computed."""

  step: int
  scalars: Mapping[str, jax.Array]
  indices: Sequence[int]


@dataclasses.dataclass
class Log(loop.Hook):
  """Logs scalars, and ends a run with too many non-finite steps in a row.

  The scalars of a step are fetched while the devices compute the next one.

  Attributes:
    progress: shows every step.
    writer: of metrics.jsonl; None in all processes but one.
    every_steps: interval between the rows that are written, >= 1.
    num_steps: of the whole run; the last one is written too.
    max_bad_steps: non-finite steps in a row at which to stop, >= 1.
    describe_image: maps the 'index' of an image in a batch to its origin.
    latest_saved: returns the newest saved step.
  """

  progress: progress_lib.Progress
  writer: metric_log.MetricWriter | None
  every_steps: int
  num_steps: int
  max_bad_steps: int
  describe_image: Callable[[int], str]
  latest_saved: Callable[[], int | None]
  _pending: _Pending | None = dataclasses.field(default=None, init=False)

  def start(self, step, state):
    self.progress.start(step)

  def after_step(self, step, state, scalars, batch):
    previous, self._pending = self._pending, _Pending(
        step, scalars, batch['index']
    )
    self._report(previous)

  def flush(self) -> None:
    """Logs the last step, and writes all rows to disk."""
    self._report(self._pending)
    self._pending = None
    if self.writer is not None:
      self.writer.flush()

  def _report(self, pending: _Pending | None) -> None:
    if pending is None:
      return
    step = pending.step
    fetched = jax.device_get(pending.scalars)
    scalars = {name: float(x) for name, x in fetched.items()}
    self._check_finite(step, scalars, pending.indices)
    rate = self.progress.update(step, scalars)
    if step % self.every_steps == 0 or step == self.num_steps:
      self.progress.log(step, scalars)
      if self.writer is not None:
        row = {**scalars, 'images_per_second': rate}
        self.writer.write(step, 'train', row)

  def _check_finite(self, step, scalars, indices) -> None:
    bad_steps = int(scalars['bad_steps'])
    if not bad_steps:
      return
    names = [name for name, x in scalars.items() if not math.isfinite(x)]
    images = ', '.join(map(self.describe_image, indices[:_NUM_NAMED]))
    tokens = ''
    if 'invalid_tokens' in scalars:
      tokens = f' ({scalars["invalid_tokens"]:.1%} of the tokens from NaN)'
    message = (
        f'Step {step}: {" and ".join(names)} not finite{tokens}, update'
        f' skipped, {bad_steps} in a row. Images: {images} ...'
    )
    logging.warning(message)
    if bad_steps >= self.max_bad_steps:
      raise loop.DivergedError(
          f'{message}\nStopped after train.max_bad_steps ='
          f' {self.max_bad_steps}. The last checkpoint is of step'
          f' {self.latest_saved()}; lower optim.learning_rate or'
          ' optim.clip_norm, or look at the images named.'
      )


@dataclasses.dataclass
class Profile(loop.Hook):
  """Traces the steps that a profiler was built for."""

  profiler: host.Profiler

  def before_step(self, step):
    self.profiler.start(step)

  def after_step(self, step, state, scalars, batch):
    self.profiler.stop(step, state)


@dataclasses.dataclass
class Saver:
  """Saves steps for other hooks.

  Attributes:
    checkpointer: of the run.
    record: returns the JSON-able record to save with a checkpoint.
    log: flushed first, so that the log always reaches the newest checkpoint.
  """

  checkpointer: checkpointers.Checkpointer
  record: Callable[[], Mapping[str, Any]]
  log: Log

  def save(
      self, step: int, state: Any, metrics: Mapping[str, float] | None
  ) -> None:
    """Saves a step in the background; metrics: of its evaluation or None."""
    self.log.flush()
    self.checkpointer.save(step, state, self.record(), metrics)
    self.log.progress.restart_clock()

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self.checkpointer.wait()


@dataclasses.dataclass
class Stop(loop.Hook):
  """Saves the step and raises `loop.Preempted` after a signal."""

  request: preemption.StopRequest
  saver: Saver

  def after_step(self, step, state, scalars, batch):
    if self.request.is_due(step):
      self._stop(step, state)

  def check(self, step: int, state: Any) -> None:
    """Does the same between two steps, as during an evaluation."""
    if self.request.is_due():
      self._stop(step, state)

  def _stop(self, step: int, state: Any) -> None:
    self.saver.save(step, state, None)
    self.saver.wait()
    raise loop.Preempted(step)


class Evaluation(Protocol):
  """Results of an evaluation."""

  def scalars(self) -> Mapping[str, float]:
    """Returns the numbers of a row of metrics.jsonl."""

  def summary(self) -> str:
    """Returns the most important numbers in one line."""

  def write(self, folder: pathlib.Path, step: int) -> Any:
    """Writes evaluation.json and pictures of a step."""


class Evaluator(Protocol):
  """Evaluates variables on the held-out split."""

  def run(
      self, variables: Any, *, before_batch: Callable[[], None]
  ) -> Evaluation:
    """Evaluates variables; `before_batch` may raise an error to stop."""


@dataclasses.dataclass
class Evaluate(loop.Hook):
  """Evaluates every N steps, at the end, and after a stop that prevented it.

  Attributes:
    evaluator: of the evaluation split.
    log: shows and writes the results.
    stop: checked before each batch: a preempted host may have less time left
      than an evaluation takes.
    folder: of the run.
    every_steps: interval, >= 1; 0 evaluates at the end only.
    num_steps: of the whole run.
    is_evaluated: whether a step was saved with its evaluation.
  """

  evaluator: Evaluator
  log: Log
  stop: Stop
  folder: pathlib.Path
  every_steps: int
  num_steps: int
  is_evaluated: Callable[[int], bool]
  _newest: tuple[int | None, Mapping[str, float]] = dataclasses.field(
      default=(None, {}), init=False
  )

  def start(self, step, state):
    if step and self._is_due(step) and not self.is_evaluated(step):
      self._evaluate(step, state)

  def after_step(self, step, state, scalars, batch):
    if step == self.num_steps or self._is_due(step):
      self._evaluate(step, state)

  def finish(self, step, state):
    if self.scalars(step) is None:
      self._evaluate(step, state)

  def scalars(self, step: int) -> Mapping[str, float] | None:
    """Returns the evaluation of a step, if it is the newest one."""
    return self._newest[1] if self._newest[0] == step else None

  def _is_due(self, step: int) -> bool:
    return self.every_steps > 0 and step % self.every_steps == 0

  def _evaluate(self, step: int, state: Any) -> None:
    self.log.flush()
    result = self.evaluator.run(
        state.eval_variables,
        before_batch=lambda: self.stop.check(step, state),
    )
    scalars = result.scalars()
    if self.log.writer is not None:
      result.write(self.folder, step)
      if not self._is_written(step):
        self.log.writer.write(step, 'eval', scalars)
    self.log.progress.say(f'Step {step}: {result.summary()}')
    self.log.progress.restart_clock()
    self._newest = (step, scalars)

  def _is_written(self, step: int) -> bool:
    """Whether metrics.jsonl has the evaluation, as when it is repeated."""
    rows = metric_log.read_metrics(self.folder)
    return any((row['step'], row['split']) == (step, 'eval') for row in rows)


@dataclasses.dataclass
class SaveSteps(loop.Hook):
  """Saves every N steps, and every step that has been evaluated.

  Attributes:
    saver: saves the steps.
    evaluation: called before this hook.
    every_steps: interval, >= 1.
  """

  saver: Saver
  evaluation: Evaluate
  every_steps: int

  def after_step(self, step, state, scalars, batch):
    evaluated = self.evaluation.scalars(step)
    if evaluated is not None or step % self.every_steps == 0:
      self.saver.save(step, state, evaluated)

  def finish(self, step, state):
    self.saver.wait()
