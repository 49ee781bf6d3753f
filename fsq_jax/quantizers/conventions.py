"""Conventions of FSQ: how published implementations number and scale codes."""

from typing import NamedTuple

import numpy as np

from fsq_jax.quantizers import digits


class Convention(NamedTuple):
  """What distinguishes a convention, and what FSQ takes where a field is None.

  Attributes:
    bounds: values that `bound` may have.
    bins: values that `bins` may have.
    eps: default of `eps`.
    commitment_weight: default of `commitment_weight`.
    lowest_level: smallest number of values of a channel.
    shift: function that gives the shift of even levels, or 'none'.
    rounding: where halves go, 'half to even' or 'half up'.
    index_order: which digit runs fastest in an index.
    code: formula of a code.
  """

  bounds: tuple[str, ...]
  bins: tuple[str, ...]
  eps: float
  commitment_weight: float
  lowest_level: int
  shift: str
  rounding: str
  index_order: str
  code: str


_PAPER = Convention(
    bounds=('tanh',),
    bins=('rounded',),
    eps=1e-3,
    commitment_weight=0.0,
    lowest_level=3,
    shift='tan',
    rounding='half to even',
    index_order=digits.FIRST_FASTEST,
    code='(digit - floor(L/2)) / floor(L/2)',
)

CONVENTIONS = {
    'symmetric': Convention(
        bounds=('tanh', 'ifsq', 'clip'),
        bins=('rounded', 'equal'),
        eps=0.0,
        commitment_weight=1.0,
        lowest_level=2,
        shift='none',
        rounding='half to even',
        index_order=digits.LAST_FASTEST,
        code='digit - (L-1)/2',
    ),
    'paper': _PAPER,
    'vqp': _PAPER._replace(eps=-1e-3, shift='arctanh'),
    'preserve_symmetry': Convention(
        bounds=('tanh',),
        bins=('rounded',),
        eps=0.0,
        commitment_weight=0.0,
        lowest_level=2,
        shift='none',
        rounding='half up',
        index_order=digits.FIRST_FASTEST,
        code='2 * digit / (L-1) - 1',
    ),
}

_SHIFTS = {'tan': np.tan, 'arctanh': np.arctanh}


class Grid(NamedTuple):
  """Constants of a convention, one float32 [d] each.

  unit = tanh(z + shift), steps = unit * half - offset,
  digit = round(steps + before) + after, or floor where halves go up,
  code = (digit - origin) / scale.
  """

  shift: np.ndarray
  half: np.ndarray
  offset: np.ndarray
  before: np.ndarray
  after: np.ndarray
  origin: np.ndarray
  scale: np.ndarray


def make_grid(
    levels: tuple[int, ...], convention: str, bins: str, eps: float
) -> Grid:
  """Returns the constants, computed in float64 and rounded once."""
  L = np.asarray(levels, np.float64)
  half = (L if bins == 'equal' else L - 1) * (1 - eps) / 2
  center, zero, h = (L - 1) / 2, np.zeros_like(L), L // 2
  if convention == 'symmetric':
    grid = Grid(zero, half, zero, center, zero, center, np.ones_like(L))
  elif convention == 'preserve_symmetry':
    grid = Grid(zero, half, zero, center + 0.5, zero, center, center)
  else:
    # The paper's notebook shifts by the tangent; its exact counterpart, the
    # inverse of tanh, moves about one token in 10^5.
    offset = np.where(L % 2 == 0, 0.5, 0.0)
    shift = _SHIFTS[CONVENTIONS[convention].shift](offset / half)
    grid = Grid(shift, half, offset, zero, h, h, h)
  return Grid(*(constant.astype(np.float32) for constant in grid))
