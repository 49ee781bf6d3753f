"""The training loop, for any model: steps and hooks around them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class Preempted(Exception):  # noqa: N818  # Not an error: the run is intact.
  """A signal stopped training after its last step was saved.

  Attributes:
    step: the step that was saved; the same command resumes from it.
  """

  def __init__(self, step: int):
    super().__init__(f'stopped by a signal after saving step {step}')
    self.step = step


class RunError(RuntimeError):
  """The run cannot continue; its checkpoints are intact."""


class DivergedError(RunError):
  """Too many steps in a row had a non-finite loss or gradient."""


class Hook:
  """Base class of hooks, whose methods do nothing.

  Hooks must not keep a state: its buffers are donated to the next step.
  """

  def start(self, step: int, state: Any) -> None:
    """Called once before the first step, after `step` earlier steps."""

  def before_step(self, step: int) -> None:
    """Called before step number `step`, counted from 1."""

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
      scalars: of the step, on the devices, possibly not computed yet.
      batch: of the step.
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
  """Trains until `num_steps` steps have been taken.

  Args:
    state: its `step` is the number of earlier steps.
    batches: one for each step.
    train_step: maps a state and a batch to the next state and scalars.
    hooks: called in this order; an error in a hook ends the run.
    num_steps: of the whole run, steps before a restart included.

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
