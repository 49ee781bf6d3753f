"""FSQ conventions: where the levels of a channel lie, and level sets."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsq_jax.quantizers import checks

# Level sets that the paper (arXiv 2309.15505, table 1 and appendix) recommends,
# by the nearest number of bits per token.
LEVELS = {
    4: (5, 3),
    6: (8, 8),
    8: (8, 6, 5),
    9: (8, 8, 8),
    10: (8, 5, 5, 5),
    11: (8, 8, 6, 5),
    # The appendix has (7, 5, 5, 5), 875 codes: a typo. Some checkpoints use it.
    12: (7, 5, 5, 5, 5),
    14: (8, 8, 8, 6, 5),
    16: (8, 8, 8, 5, 5, 5),
}
# Level indices are rounded in float32, which represents every half-integer up
# to this one.
MAX_LEVEL = 2**22
_MAX_CODEBOOK_SIZE = 2**31 - 1


def recommended_levels(bits: int) -> tuple[int, ...]:
  """Returns the paper's levels for a codebook of about 2**bits codes."""
  if bits not in list(LEVELS):
    raise ValueError(
        f'No recommended levels for {bits!r} bits; known: {sorted(LEVELS)}.'
    )
  return LEVELS[bits]


def validated_levels(levels: Any, *, lowest: int) -> tuple[int, ...]:
  """Returns levels as a tuple of ints, or raises ValueError.

  Args:
    levels: list or tuple of integers, one for each channel.
    lowest: smallest number of levels of a channel.
  """
  if not isinstance(levels, (list, tuple)) or not levels:
    raise ValueError(
        f'levels is {levels!r}; give a tuple of one integer for each channel, '
        'such as (8, 8, 8).'
    )
  levels = tuple(
      checks.validated_integer(f'levels[{i}]', level, lowest, MAX_LEVEL)
      for i, level in enumerate(levels)
  )
  size = math.prod(levels)
  if size > _MAX_CODEBOOK_SIZE:
    raise ValueError(
        f'levels {levels} have {size} codes, int32 indices count to '
        f'{_MAX_CODEBOOK_SIZE}; use fewer or smaller levels, or GroupedFSQ: '
        'groups of channels with one index each.'
    )
  return levels


_BOUNDS = {
    'tanh': jnp.tanh,
    # 2 sigmoid(1.6 z) - 1 without cancellation.
    'ifsq': lambda z: jnp.tanh(0.8 * z),
    # Infinite latents become the largest finite ones: inf - inf is NaN.
    'clip': lambda z: jnp.nan_to_num(z, nan=jnp.nan),
}
# The paper's notebook shifts by the tangent. The inverse of tanh, which would
# be exact, changes about one token in 10^5.
_SHIFTS = {'none': np.zeros_like, 'tan': np.tan, 'arctanh': np.arctanh}


class Convention:
  """A convention for given levels: bounded latents to level indices to codes.

  Methods take and return float32 [..., d]. Level index k has the code
  (k - origin) / scale. Class attributes do not depend on the levels.

  Attributes:
    lowest_level: smallest number of levels of a channel.
    commitment_weight: default of `FSQ.commitment_weight`.
    bounds: names of bounds that can be used.
    bins: kinds of bins that can be used.
    eps: default of `FSQ.eps`.
    shift: function that gives the shift of even levels, or 'none'.
    rounding: rounding of ties, 'half to even' or 'half up'.
    first_fastest: whether the first channel varies fastest in an index.
    code: formula of a code.
    half: [d] half the range of latents in steps between codes.
    scale: [d] steps per unit of code.
    origin: [d] level index of code 0; a half-integer if it is between levels.
  """

  lowest_level = 2
  commitment_weight = 0.0
  bounds = ('tanh',)
  bins = ('rounded',)
  eps = 0.0
  shift = 'none'
  rounding = 'half to even'
  first_fastest = True
  code: str

  def __init__(
      self, levels: tuple[int, ...], bound: str, bins: str, eps: float
  ):
    """Checks the fields of FSQ; computes constants, rounded once to float32."""
    limit = 1 / (max(levels) - 1)
    if abs(eps) >= limit:
      raise ValueError(
          f'eps is {eps}; with {max(levels)} levels its size must be below'
          f' {limit:.3g}, or a level is out of reach.'
      )
    if bins == 'equal' and eps:
      raise ValueError(
          f"eps is {eps}; bins 'equal' need 0, any other makes the outer bins"
          ' narrower or wider.'
      )
    L = np.asarray(levels, np.float64)
    half = (L if bins == 'equal' else L - 1) * (1 - eps) / 2
    offset = np.where(L % 2 == 0, 0.5, 0.0)
    if self.shift == 'none':
      offset = np.zeros_like(L)
    origin, scale = self._origin_and_scale(L)
    self.half, self.scale = np.float32(half), np.float32(scale)
    self.origin, self._offset = np.float32(origin), np.float32(offset)
    self._shift = np.float32(_SHIFTS[self.shift](offset / half))
    self._bound = _BOUNDS[bound]

  def bound(self, z: jax.Array) -> jax.Array:
    """Returns latents in [-1, 1]; bound 'clip' leaves them as they are."""
    return self._bound(z + self._shift)

  def to_steps(self, bounded: jax.Array) -> jax.Array:
    """Returns bounded latents in steps between codes."""
    return bounded * self.half - self._offset

  def round(self, steps: jax.Array) -> jax.Array:
    """Returns the level indices nearest to latents in steps, not clipped."""
    return jnp.round(steps + self.origin)

  def codes(self, level_indices: jax.Array) -> jax.Array:
    """Returns the codes of level indices in [0, L), or of NaN."""
    return (level_indices - self.origin) / self.scale

  def nearest(self, codes: jax.Array) -> list[jax.Array]:
    """Returns the level indices [...] of each channel of codes."""
    return [
        jnp.round(codes[..., i] * self.scale[i] + self.origin[i])
        for i in range(len(self.scale))
    ]

  def _origin_and_scale(self, num_levels: np.ndarray) -> tuple:
    return (num_levels - 1) / 2, (num_levels - 1) / 2


class Symmetric(Convention):
  """Unit steps around 0, as in hugoycj/RAE."""

  commitment_weight = 1.0
  bounds = ('tanh', 'ifsq', 'clip')
  bins = ('rounded', 'equal')
  first_fastest = False
  code = 'digit - (L-1)/2'

  def _origin_and_scale(self, num_levels: np.ndarray) -> tuple:
    return (num_levels - 1) / 2, np.ones_like(num_levels)


class Paper(Convention):
  """Codes in [-1, 1] with 0, as in google-research, fsq/fsq.ipynb."""

  lowest_level = 3
  eps = 1e-3
  shift = 'tan'
  code = '(digit - floor(L/2)) / floor(L/2)'

  def round(self, steps: jax.Array) -> jax.Array:
    return jnp.round(steps) + self.origin

  def _origin_and_scale(self, num_levels: np.ndarray) -> tuple:
    return num_levels // 2, num_levels // 2


class VectorQuantizePytorch(Paper):
  """The default of lucidrains/vector-quantize-pytorch."""

  eps = -1e-3
  shift = 'arctanh'


class PreserveSymmetry(Convention):
  """The option of that name in lucidrains/vector-quantize-pytorch."""

  rounding = 'half up'
  code = '2 * digit / (L-1) - 1'

  def round(self, steps: jax.Array) -> jax.Array:
    return jnp.floor(steps + (self.origin + np.float32(0.5)))

  def codes(self, level_indices: jax.Array) -> jax.Array:
    return _rounded_product(level_indices, 1 / self.origin) - 1


CONVENTIONS: dict[str, type[Convention]] = {
    'symmetric': Symmetric,
    'paper': Paper,
    'vqp': VectorQuantizePytorch,
    'preserve_symmetry': PreserveSymmetry,
}


def _rounded_product(x: jax.Array, factor: np.ndarray) -> jax.Array:
  """Returns x * factor in float32, rounded before it is used further.

  Compilers may fuse a product with the sum that follows and round once, which
  moves the sum off the published codes. Both partial products here are exact
  for integers x below 2^12, and their sum is rounded once however it is
  compiled.
  """
  high = (factor.view(np.int32) & np.int32(-(2**12))).view(np.float32)
  return x * high + x * (factor - high)
