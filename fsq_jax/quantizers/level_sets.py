"""Sets of levels: the recommended ones, and the rules for any."""

import math
import numbers
from typing import Any

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
