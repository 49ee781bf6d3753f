"""What a run shows: a bar on a terminal, lines elsewhere, true speeds."""

import io
import logging
import sys
import types

import numpy as np
import pytest

from fsq_jax.workdir import progress

_SCALARS = {
    'loss': 0.75,
    'reconstruction_loss': 0.5,
    'quantizer_loss': 0.25,
    'gradient_norm': 12.0,
    'learning_rate': 1e-3,
}


class _Stream(io.StringIO):
  """Standard error that claims to be a terminal, or not."""

  def __init__(self, *, terminal):
    super().__init__()
    self._terminal = terminal

  def isatty(self):
    return self._terminal


class _Clock:
  """Seconds that pass only when a test says so."""

  def __init__(self):
    self.now = 100.0

  def perf_counter(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = _Clock()
  module = types.SimpleNamespace(perf_counter=clock.perf_counter)
  monkeypatch.setattr(progress, 'time', module)
  return clock


def _stream(monkeypatch, *, terminal):
  stream = _Stream(terminal=terminal)
  monkeypatch.setattr(sys, 'stderr', stream)
  return stream


def _start(step=0, *, enabled=True):
  shown = progress.Progress(num_steps=100, batch_size=8, enabled=enabled)
  shown.start(step)
  return shown


def test_speed_counts_the_images_since_the_clock_was_restarted(clock):
  shown = _start(10, enabled=False)
  clock.now += 2
  assert shown.update(11, _SCALARS) == 4  # 1 step of 8 images in 2 s.
  clock.now += 2
  assert shown.update(14, _SCALARS) == 8  # 4 steps in 4 s.
  shown.log(14, _SCALARS)
  clock.now += 2
  assert shown.update(15, _SCALARS) == 4  # 1 step in 2 s since `log`.


def test_speed_leaves_out_what_restart_clock_excludes(clock):
  shown = _start(enabled=False)
  clock.now += 1
  assert shown.update(2, _SCALARS) == 16
  clock.now += 500  # An evaluation.
  shown.restart_clock()
  clock.now += 1
  assert shown.update(4, _SCALARS) == 16


def test_lines_without_a_terminal(clock, monkeypatch):
  stream = _stream(monkeypatch, terminal=False)
  shown = _start()
  clock.now += 10
  shown.update(10, _SCALARS)
  assert stream.getvalue() == ''
  shown.log(10, _SCALARS)
  shown.say('Evaluated.')
  shown.close()
  # 90 steps at 1 step, or 8 images, a second are left.
  assert stream.getvalue() == (
      'step 10/100: loss 0.7500, reconstruction_loss 0.5000, quantizer_loss'
      ' 0.2500, gradient_norm 12.0000, 8 images/s, 01:30 left\n'
      'Evaluated.\n'
  )


def test_losses_by_networks_are_in_the_line(clock, monkeypatch):
  stream = _stream(monkeypatch, terminal=False)
  shown = _start()
  clock.now += 10
  adversarial = {
      'discriminator_loss': 0.125, 'adversarial_loss': -0.5,
      'perceptual_loss': 0.0625, 'real_logits': 3.0,
  }
  shown.update(10, _SCALARS | adversarial)
  shown.log(10, _SCALARS | adversarial)
  assert (
      'loss 0.7500, reconstruction_loss 0.5000, perceptual_loss 0.0625,'
      ' quantizer_loss 0.2500, adversarial_loss -0.5000, discriminator_loss'
      ' 0.1250, gradient_norm 12.0000, 8 images/s'
  ) in stream.getvalue()


def test_bar_on_a_terminal(clock, monkeypatch):
  stream = _stream(monkeypatch, terminal=True)
  shown = _start(40)
  assert '40/100' in stream.getvalue()
  clock.now += 2
  shown.update(41, _SCALARS)
  shown.update(42, _SCALARS)
  shown.log(42, _SCALARS)
  shown.say('Evaluated.')
  shown.close()
  text = stream.getvalue()
  assert '42/100' in text.splitlines()[-1]
  assert 'loss 0.7500, 8 images/s' in text.splitlines()[-1]
  # The bar replaces the lines of `log`, and lets those of `say` through.
  assert 'step 42/100:' not in text
  assert 'Evaluated.\n' in text


@pytest.mark.parametrize('terminal', [True, False])
def test_nothing_is_shown_if_not_enabled(clock, monkeypatch, terminal):
  stream = _stream(monkeypatch, terminal=terminal)
  shown = _start(enabled=False)
  clock.now += 1
  assert shown.update(1, _SCALARS) == 8
  shown.log(1, _SCALARS)
  shown.say('Evaluated.')
  shown.close()
  assert stream.getvalue() == ''


def test_an_exploding_loss_is_warned_of_once(caplog):
  shown = _start()
  losses = [1.0] * 8 + [200.0]  # Too few for a median.
  losses += [-1.0, 1.0, 99.0, 120.0, np.nan, 500.0, 1.0, -120.0]
  with caplog.at_level(logging.WARNING):
    for step, loss in enumerate(losses, start=1):
      shown.update(step, {'loss': loss})
  warned = [x.getMessage() for x in caplog.records]
  middle = ' is over 100 times the median 1 '
  assert [x.partition(middle)[0] for x in warned] == [
      'Step 13: loss 120', 'Step 17: loss -120'
  ]
  caplog.clear()
  hidden = _start(enabled=False)
  for step, loss in enumerate(losses, start=1):
    hidden.update(step, {'loss': loss})
  assert not caplog.records


def test_the_median_follows_the_losses():
  alarm = progress.LossAlarm()
  for loss in np.geomspace(1, 1e4, 1000):
    assert alarm.check(loss) is None
  assert alarm.check(2e5) is None
  median = alarm.check(2e6)
  assert median == pytest.approx(np.geomspace(1, 1e4, 1000)[-50], rel=0.05)


def test_a_pass_over_images_says_what_is_done_and_left(monkeypatch, clock):
  stream = _stream(monkeypatch, terminal=False)
  shown = progress.ImageProgress(num_images=100, first=20, enabled=True)
  clock.now += 4
  shown.update(8)
  shown.update(8)
  assert stream.getvalue() == ''
  shown.log()
  # 16 images in 4 s; those of earlier runs took no time of this one.
  assert stream.getvalue() == '36/100 images, 4 images/s, 00:16 left\n'
  shown.close()


def test_a_pass_over_images_has_a_bar_on_a_terminal(monkeypatch, clock):
  stream = _stream(monkeypatch, terminal=True)
  shown = progress.ImageProgress(num_images=100, first=20, enabled=True)
  shown.update(30)
  shown.log()
  shown.close()
  assert '50/100' in stream.getvalue()
  assert 'images,' not in stream.getvalue()


def test_a_pass_over_images_shows_nothing_in_other_processes(
    monkeypatch, clock
):
  stream = _stream(monkeypatch, terminal=False)
  shown = progress.ImageProgress(num_images=100, first=0, enabled=False)
  shown.update(30)
  shown.log()
  shown.close()
  assert stream.getvalue() == ''
