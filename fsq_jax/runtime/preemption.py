"""Signals that stop a run (SIGTERM, SIGINT)."""

from collections.abc import Iterator
import contextlib
import os
import signal
import threading

from absl import logging
import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):  # noqa: N818  # Not an error.
  """A signal has stopped the work; the same command continues it."""


class StopRequest:
  """Whether a signal has requested the run to stop.

  If several processes take steps together, a request to any of them stops all
  after the same step.

  Attributes:
    together: whether several processes take steps together.
  """

  def __init__(self, *, together: bool = True):
    self._asked = threading.Event()
    self.together = together and jax.process_count() > 1

  def ask(self) -> None:
    """Requests this process, or all that take steps together, to stop."""
    self._asked.set()
    if self.together:
      # JAX forwards this signal to the other processes.
      os.kill(os.getpid(), signal.SIGTERM)

  def is_due(self, step: int | None = None) -> bool:
    """Whether to stop now.

    Args:
      step: training steps taken; None between steps, where several processes
        never stop: they agree on a step, after which each has to call this.
        Orbax does so, too.
    """
    if not self.together:
      return self._asked.is_set()
    return (
        step is not None and multihost_utils.reached_preemption_sync_point(step)
    )


@contextlib.contextmanager
def catch_signals(*, together: bool = True) -> Iterator[StopRequest]:
  """Turns the first SIGTERM or SIGINT into a request; a second one kills.

  If several processes take steps together, JAX catches SIGTERM, and a second
  SIGTERM has no effect.

  Args:
    together: whether several processes take steps together.
  """
  request = StopRequest(together=together)
  if threading.current_thread() is not threading.main_thread():
    yield request  # Python delivers signals to the main thread only.
    return
  previous = {}

  def stop(number: int, _) -> None:
    logging.warning(
        '%s: finishing the current step and saving. Send the signal again to'
        ' exit immediately.',
        signal.Signals(number).name,
    )
    for caught in previous:
      signal.signal(caught, signal.SIG_DFL)
    request.ask()

  caught = [signal.SIGINT]
  if not request.together:
    caught.append(signal.SIGTERM)
  for number in caught:
    previous[number] = signal.signal(number, stop)
  try:
    yield request
  finally:
    for number, handler in previous.items():
      # JAX installs its handler outside of Python, where it reads as None.
      signal.signal(number, handler or signal.SIG_DFL)
