"""Mask schedules, as float64 tables computed once on the host.

A schedule gamma(r) is the fraction of masked tokens, falling from 1 at r = 0 to
0 at r = 1. In float32 cos gives 127 masked tokens of 256 at r = 2/3 where
float64 gives the intended 128, so nothing here is computed on the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Added before rounding down, for fractions that are exact but for rounding.
_TOLERANCE = 1e-6


class Schedule(NamedTuple):
  """A decreasing function from [0, 1] to [0, 1] and its inverse.

  Attributes:
    ratio: masked fraction at r, float64.
    inverse: r at which that fraction is masked, float64.
  """

  ratio: Callable[[np.ndarray], np.ndarray]
  inverse: Callable[[np.ndarray], np.ndarray]


def _cosine(r: np.ndarray) -> np.ndarray:
  return np.cos(np.pi / 2 * r)


def _arccos(r: np.ndarray) -> np.ndarray:
  return np.arccos(r) * 2 / np.pi


def _linear(r: np.ndarray) -> np.ndarray:
  return 1 - r


# 'cosine' is MaskGIT's and the FSQ paper's, 'arccos' MUSE's and MaskBit's.
SCHEDULES = {
    'cosine': Schedule(_cosine, _arccos),
    'arccos': Schedule(_arccos, _cosine),
    'linear': Schedule(_linear, _linear),
}


def get_schedule(name: str) -> Schedule:
  """Returns a schedule by name, or raises ValueError."""
  if name not in SCHEDULES:
    raise ValueError(
        f'mask_schedule is {name!r}; known: {list(SCHEDULES)}.'
    )
  return SCHEDULES[name]


def training_thresholds(
    name: str, num_tokens: int, floor: float = 0.0
) -> np.ndarray:
  """Returns the table that turns uniform numbers into counts of masked tokens.

  A uniform number u masks max(1, ceil(gamma(u r_max) N)) tokens, with r_max the
  point where gamma is `floor`. The count exceeds n where u < table[n - 1].

  Args:
    name: of the schedule.
    num_tokens: tokens per image, N.
    floor: smallest masked fraction, in [0, 1). The FSQ paper's appendix A.4.2
      uses 'cosine' with 0.45, so at least 116 of 256 tokens.

  Returns:
    [N - 1] float32, not increasing, in [0, 1].
  """
  schedule = get_schedule(name)
  if not 0 <= floor < 1:
    raise ValueError(f'mask_floor is {floor}; use a ratio in [0, 1).')
  fractions = np.arange(1, num_tokens, dtype=np.float64) / num_tokens
  thresholds = schedule.inverse(fractions) / schedule.inverse(np.float64(floor))
  return np.minimum(thresholds, 1.0).astype(np.float32)


def remaining_counts(
    name: str, num_tokens: int, num_steps: int
) -> np.ndarray:
  """Returns how many tokens are still masked after each step of sampling.

  Row u is for examples with u unknown tokens at the start: floor(gamma((t + 1)
  / T) u) after step t, but at least one token becomes known per step and the
  last step ends with 0. An example with fewer unknown tokens than steps needs
  u steps only and has 0 in all later ones.

  Args:
    name: of the schedule.
    num_tokens: tokens per image, N.
    num_steps: steps, T.

  Returns:
    [N + 1, T] int32.

  Raises:
    ValueError: an unknown schedule, or more steps than tokens.
  """
  schedule = get_schedule(name)
  check_steps(num_tokens, num_steps)
  table = np.zeros((num_tokens + 1, num_steps), np.int32)
  for unknown in range(1, num_tokens + 1):
    steps = min(num_steps, unknown)
    progress = np.arange(1, steps, dtype=np.float64) / steps
    left = np.floor(schedule.ratio(progress) * unknown + _TOLERANCE)
    remaining = unknown
    for t, target in enumerate(left):
      # Every later step needs a token that it makes known.
      remaining = max(min(remaining - 1, int(target)), steps - 1 - t)
      table[unknown, t] = remaining
  return table


def power_group_sizes(
    num_tokens: int, num_steps: int, alpha: float
) -> np.ndarray:
  """Returns sizes of groups that grow as (t + 1)^alpha.

  The schedule of M2T (arXiv 2304.07313) and of the FSQ paper's compression
  cost, with alpha 2.2 and 12 steps.

  Args:
    num_tokens: tokens per image, N, the sum of the sizes.
    num_steps: groups, T <= N.
    alpha: exponent, >= 0.

  Returns:
    [T] int32, each at least 1.
  """
  check_steps(num_tokens, num_steps)
  weights = np.arange(1, num_steps + 1, dtype=np.float64) ** alpha
  ends = np.round(np.cumsum(weights) / np.sum(weights) * num_tokens)
  sizes, previous = [], 0
  for t, end in enumerate(ends):
    # One token at least for this group and for each later group.
    end = min(max(int(end), previous + 1), num_tokens - (num_steps - 1 - t))
    sizes.append(end - previous)
    previous = end
  return np.asarray(sizes, np.int32)


def check_steps(num_tokens: int, num_steps: int) -> None:
  """Raises ValueError unless there are 1 to N steps."""
  if not 1 <= num_steps <= num_tokens:
    raise ValueError(
        f'num_steps is {num_steps} for {num_tokens} tokens; use 1 to'
        f' {num_tokens}, so that each step makes a token known.'
    )
