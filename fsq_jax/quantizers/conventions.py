"""FSQ conventions, and the level sets they are used with."""

import math
import numbers
from typing import Any, NamedTuple

import numpy as np

from fsq_jax.quantizers import digits

# Level sets that the paper (arXiv 2309.15505, table 1 and appendix) recommends,
# by the bits of the codebook they come closest to.
LEVELS = {
    4: (5, 3),
    6: (8, 8),
    8: (8, 6, 5),
    9: (8, 8, 8),
    10: (8, 5, 5, 5),
    11: (8, 8, 6, 5),
    12: (7, 5, 5, 5, 5),
    14: (8, 8, 8, 6, 5),
    16: (8, 8, 8, 5, 5, 5),
}
# Level sets met in published configs. (7, 5, 5, 5) has 875 codes: a misprint in
# the paper's appendix for the 4375 of (7, 5, 5, 5, 5). It can be built, for the
# checkpoints that use it, and is not recommended.
COMMON_LEVELS = ((8, 8, 8), (8, 6, 5), (7, 5, 5, 5), (8, 5, 5, 5))
# Digits are rounded in float32, which holds all half-integers up to here.
MAX_LEVEL = 2**22
_MAX_CODEBOOK_SIZE = 2**31 - 1


def recommended_levels(bits: int) -> tuple[int, ...]:
  """Returns the paper's levels for a codebook of about 2**bits codes."""
  if bits not in list(LEVELS):
    raise ValueError(
        f'No levels are recommended for {bits!r} bits; known: {sorted(LEVELS)}.'
    )
  return LEVELS[bits]


def checked(levels: Any, *, lowest: int) -> tuple[int, ...]:
  """Returns levels as Python ints, or raises ValueError if they cannot work.

  Args:
    levels: list or tuple of integers, one for each channel.
    lowest: smallest level that the convention takes.
  """
  if not isinstance(levels, (list, tuple)) or not levels:
    raise ValueError(
        f'levels is {levels!r}; give a tuple of one integer for each channel, '
        'such as (8, 8, 8).'
    )
  for level in levels:
    if isinstance(level, bool) or not isinstance(level, numbers.Integral):
      raise ValueError(f'levels has {level!r}; every level is an integer.')
    if not lowest <= level <= MAX_LEVEL:
      raise ValueError(
          f'levels has {level}; this convention takes {lowest} to {MAX_LEVEL}.'
      )
  levels = tuple(int(level) for level in levels)
  size = math.prod(levels)
  if size > _MAX_CODEBOOK_SIZE:
    raise ValueError(
        f'levels {levels} have {size} codes, int32 indices count to '
        f'{_MAX_CODEBOOK_SIZE}; use fewer or smaller levels, or GroupedFSQ: '
        'groups of channels with one index each.'
    )
  return levels


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
