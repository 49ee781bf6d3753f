"""Progress of a run: a bar on a terminal, plain lines otherwise."""

import collections
from collections.abc import Mapping
import math
import statistics
import sys
import time

from absl import logging
import tqdm

_SHOWN = (
    'loss', 'reconstruction_loss', 'perceptual_loss', 'quantizer_loss',
    'distillation_loss', 'adversarial_loss', 'discriminator_loss',
    'gradient_norm',
)
# A loss spikes if it exceeds the running median of the losses before by this
# factor; window of the median, and number of losses that it needs.
_SPIKE_FACTOR = 100
_NUM_MEDIAN = 101
_MIN_MEDIAN = 10


class LossAlarm:
  """Detects finite loss spikes."""

  def __init__(self):
    """Starts with an empty window."""
    self._sizes = collections.deque(maxlen=_NUM_MEDIAN)
    self._is_spike = False

  def check(self, loss: float) -> float | None:
    """Adds the loss of a step and returns the median if a spike starts.

    Args:
      loss: any number. Losses that are not finite are ignored, since training
        skips such steps; adversarial losses may be negative.

    Returns:
      The median magnitude of the losses before, if the loss is over 100 times
      as large and the one before was not. Otherwise None.
    """
    if not math.isfinite(loss):
      return None
    median = math.inf
    if len(self._sizes) >= _MIN_MEDIAN:
      median = statistics.median(self._sizes)
    self._sizes.append(abs(loss))
    before, self._is_spike = self._is_spike, abs(loss) > _SPIKE_FACTOR * median
    return median if self._is_spike and not before else None


class Progress:
  """Shows steps, speed, time left and losses on standard error."""

  def __init__(self, *, num_steps: int, batch_size: int, enabled: bool):
    """Shows nothing before `start`.

    Args:
      num_steps: number of steps of the whole run.
      batch_size: images per step.
      enabled: False shows nothing, as in all processes but one.
    """
    self._num_steps = num_steps
    self._batch_size = batch_size
    self._enabled = enabled
    self._bar = None
    self._rate = 0.0
    self._step = 0
    self._alarm = LossAlarm()

  def start(self, step: int) -> None:
    """Starts the bar and the clock at a step."""
    if self._enabled and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
          total=self._num_steps, initial=step, unit='step', smoothing=0.05
      )
    self._step = step
    self.restart_clock()

  def update(self, step: int, scalars: Mapping[str, float]) -> float:
    """Counts a finished step and warns of a loss spike.

    Args:
      step: training steps taken.
      scalars: metrics of that step.

    Returns:
      Images per second since the last `log` or `restart_clock`.
    """
    self._step = step
    median = self._alarm.check(scalars['loss'])
    if median is not None and self._enabled:
      logging.warning(
          'Step %d: loss %.4g is over %d times the median %.4g of the steps'
          ' before. Earlier checkpoints are in the workdir; lower'
          ' optim.learning_rate or optim.clip_norm if it does not fall again.',
          step, scalars['loss'], _SPIKE_FACTOR, median,
      )
    first, started = self._since
    seconds = time.perf_counter() - started
    self._rate = (step - first) * self._batch_size / max(seconds, 1e-9)
    if self._bar is not None:
      self._bar.update(step - self._bar.n)
      self._bar.set_postfix_str(
          f'loss {scalars["loss"]:.4f}, {self._rate:.0f} images/s',
          refresh=False,
      )
    return self._rate

  def log(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes a line about a step if there is no bar; restarts the clock."""
    if self._enabled and self._bar is None:
      left = (self._num_steps - step) * self._batch_size / self._rate
      shown = [name for name in _SHOWN if name in scalars]
      losses = ', '.join(f'{name} {scalars[name]:.4f}' for name in shown)
      self.say(
          f'step {step}/{self._num_steps}: {losses}, {self._rate:.0f} images/s,'
          f' {tqdm.tqdm.format_interval(left)} left'
      )
    self.restart_clock()

  def restart_clock(self) -> None:
    """Restarts the measurement of images per second."""
    self._since = (self._step, time.perf_counter())

  def say(self, text: str) -> None:
    """Shows a line without disturbing the bar."""
    if self._enabled:
      tqdm.tqdm.write(text, file=sys.stderr)

  def close(self) -> None:
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()


class ImageProgress:
  """Shows images, speed and time left of one pass over a data set."""

  def __init__(self, *, num_images: int, first: int, enabled: bool):
    """Starts the bar and the clock.

    Args:
      num_images: number of images of the whole pass.
      first: number of images finished by earlier runs.
      enabled: False shows nothing, as in all processes but one.
    """
    self._enabled = enabled
    self._num_images = num_images
    self._first = self._done = first
    self._started = time.perf_counter()
    self._bar = None
    if enabled and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
          total=num_images, initial=first, unit='image', smoothing=0.05
      )

  def update(self, num_images: int) -> None:
    """Counts finished images."""
    self._done += num_images
    if self._bar is not None:
      self._bar.update(num_images)

  def log(self) -> None:
    """Writes a line if there is no bar."""
    if self._enabled and self._bar is None:
      seconds = time.perf_counter() - self._started
      rate = (self._done - self._first) / max(seconds, 1e-9)
      left = (self._num_images - self._done) / max(rate, 1e-9)
      tqdm.tqdm.write(
          f'{self._done}/{self._num_images} images, {rate:.0f} images/s,'
          f' {tqdm.tqdm.format_interval(left)} left',
          file=sys.stderr,
      )

  def close(self) -> None:
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()
