"""The training loop of any model: steps, and hooks around them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class Preempted(Exception):  # noqa: N818  # Not an error: the run is intact.
  """Training was asked to stop by a signal and has saved its last step.

  Attributes:
    step: the step that was saved; the same command resumes from it.
  """

  def __init__(self, step: int):
    super().__init__(f'stopped by a signal after saving step {step}')
    self.step = step


class RunError(RuntimeError):
  """A run that cannot continue; what it has saved is intact."""


class DivergedError(RunError):
  """Too many steps in a row had a loss or a gradient that was not finite."""


class Hook:
  """Called around the steps of a run; here, every method does nothing.

  A state must not be kept: its buffers are donated to the next step.
  """

  def start(self, step: int, state: Any) -> None:
    """Called once before the first step; `step` steps have been taken."""

  def before_step(self, step: int) -> None:
    """Called before step number `step`, counted from 1, is taken."""

  def after_step(
      self,
      step: int,
      state: Any,
      scalars: Mapping[str, Any],
      batch: Mapping[str, Any],
  ) -> None:
    """Called after each step.

    Args:
      step: number of the step, counted from 1.
      state: after the step.
      scalars: of the step, on devices, perhaps still being computed.
      batch: that the step was taken on.
    """

  def finish(self, step: int, state: Any) -> None:
    """Called once after the last step."""


def run(
    state: Any,
    batches: Iterator[Mapping[str, Any]],
    *,
    train_step: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    hooks: Sequence[Hook],
    num_steps: int,
) -> Any:
  """Takes steps until there are `num_steps`.

  Args:
    state: with `step`, the number of steps taken so far.
    batches: one for each step.
    train_step: of a state and a batch to the next state and scalars.
    hooks: called in this order; an error that one raises ends the run.
    num_steps: of the whole run, those before a restart included.

  Returns:
    The last state.
  """
  step = int(state.step)
  for hook in hooks:
    hook.start(step, state)
  while step < num_steps:
    for hook in hooks:
      hook.before_step(step + 1)
    batch = next(batches)
    state, scalars = train_step(state, batch)
    step += 1
    for hook in hooks:
      hook.after_step(step, state, scalars, batch)
  for hook in hooks:
    hook.finish(step, state)
  return state
