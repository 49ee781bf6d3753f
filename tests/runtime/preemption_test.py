"""Tests of requests to stop a run."""

import os
import signal

import jax
from jax.experimental import multihost_utils

from fsq_jax.runtime import preemption


def test_the_first_signal_is_a_request_and_a_second_one_kills():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.catch_signals() as request:
    assert not request.is_due()
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.is_due()
    for number in (signal.SIGINT, signal.SIGTERM):
      assert signal.getsignal(number) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGTERM) == before


def test_several_processes_stop_after_a_step_alone(monkeypatch):
  asked = []

  def is_reached(step):
    asked.append(step)
    return step == 3

  monkeypatch.setattr(
      multihost_utils, 'reached_preemption_sync_point', is_reached
  )
  with preemption.catch_signals() as request:
    os.kill(os.getpid(), signal.SIGINT)
    assert request.is_due()
    assert request.is_due(1)
    assert not request.together
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    assert preemption.StopRequest().together
    assert not preemption.StopRequest(together=False).together
    request.together = True
    assert [request.is_due(step) for step in (2, None, 3)] == [
        False, False, True,
    ]  # fmt: skip
  assert asked == [2, 3]
