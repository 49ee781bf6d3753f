"""Signals that ask a run to stop (SIGTERM, SIGINT)."""

from collections.abc import Iterator
import contextlib
import os
import signal
import threading

from absl import logging
import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Whether a signal has asked the run to stop.

  Of several processes, one that is asked stops them all, after the same step,
  if they take steps together.

  Attributes:
    together: whether they do.
  """

  def __init__(self, *, together: bool = True):
    self._asked = threading.Event()
    self.together = together and jax.process_count() > 1

  def ask(self) -> None:
    """Asks this process, or with others all of them, to stop."""
    self._asked.set()
    if self.together:
      # JAX passes this signal on to the other processes.
      os.kill(os.getpid(), signal.SIGTERM)

  def is_due(self, step: int | None = None) -> bool:
    """Whether to stop now.

    Args:
      step: steps taken; None between steps, where several processes never
        stop: they agree on the number of a step, which Orbax asks for too.
        They have to call this after every step.
    """
    if not self.together:
      return self._asked.is_set()
    return (
        step is not None and multihost_utils.reached_preemption_sync_point(step)
    )


@contextlib.contextmanager
def catch_signals(*, together: bool = True) -> Iterator[StopRequest]:
  """Turns the first SIGTERM or SIGINT into a request; a second one kills.

  Among several processes that take steps together SIGTERM is caught by JAX, and
  a second one does nothing.

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
        '%s: stopping as soon as all is saved. Once more stops at once.',
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
      # None was set by JAX, and is not to be had back.
      signal.signal(number, handler or signal.SIG_DFL)
