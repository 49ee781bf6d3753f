"""Progress of a run: a bar on a terminal, plain lines anywhere else."""

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
# Of a loss, over the median of so many before it, to be called an explosion.
_EXPLOSION = 100
_NUM_MEDIAN = 101
_MIN_MEDIAN = 10


class LossAlarm:
  """Tells explosions of a loss: far above what it was, though finite."""

  def __init__(self):
    """Knows no loss yet."""
    self._sizes = collections.deque(maxlen=_NUM_MEDIAN)
    self._exploded = False

  def check(self, loss: float) -> float | None:
    """Takes the loss of a step; adversarial ones may be negative.

    Args:
      loss: any number. What is not finite is passed over: such steps are
        skipped anyhow.

    Returns:
      The median size of the losses before, where an explosion begins: where the
      loss is 100 times as large, and the one before was not. Otherwise None.
    """
    if not math.isfinite(loss):
      return None
    median = math.inf
    if len(self._sizes) >= _MIN_MEDIAN:
      median = statistics.median(self._sizes)
    self._sizes.append(abs(loss))
    before, self._exploded = self._exploded, abs(loss) > _EXPLOSION * median
    return median if self._exploded and not before else None


class Progress:
  """Shows steps, speed, time left and losses on standard error."""

  def __init__(self, *, num_steps: int, batch_size: int, enabled: bool):
    """Shows nothing yet.

    Args:
      num_steps: steps of the whole run.
      batch_size: images a step.
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
    """Counts a finished step, and warns where its loss explodes.

    Args:
      step: steps taken.
      scalars: of that step.

    Returns:
      Images a second since the last `log` or `restart_clock`.
    """
    self._step = step
    median = self._alarm.check(scalars['loss'])
    if median is not None and self._enabled:
      logging.warning(
          'Step %d: loss %.4g is over %d times the median %.4g of the steps'
          ' before. Earlier checkpoints are in the workdir; lower'
          ' optim.learning_rate or optim.clip_norm if it does not fall again.',
          step, scalars['loss'], _EXPLOSION, median,
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
    """Writes a line about a step where there is no bar; restarts the clock."""
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
    """Counts images a second from here on."""
    self._since = (self._step, time.perf_counter())

  def say(self, text: str) -> None:
    """Shows a line without disturbing the bar."""
    if self._enabled:
      tqdm.tqdm.write(text, file=sys.stderr)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()


class ImageProgress:
  """Shows images, speed and time left of one pass on standard error."""

  def __init__(self, *, num_images: int, first: int, enabled: bool):
    """Starts the bar and the clock.

    Args:
      num_images: of the whole pass.
      first: images that earlier runs have done.
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
    """Counts images."""
    self._done += num_images
    if self._bar is not None:
      self._bar.update(num_images)

  def log(self) -> None:
    """Writes a line where there is no bar."""
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
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()
