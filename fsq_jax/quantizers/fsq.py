"""Finite Scalar Quantization: every channel is rounded to a few levels."""

from collections.abc import Sequence
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsq_jax.quantizers import base
from fsq_jax.quantizers import level_sets

# What each convention knows and, for None, takes.
_BOUNDS = {'symmetric': ('tanh', 'clip'), 'paper': ('tanh',)}
_EPS = {'symmetric': 0.0, 'paper': 1e-3}
_COMMITMENT_WEIGHT = {'symmetric': 1.0, 'paper': 0.0}
_MIN_LEVEL = {'symmetric': 2, 'paper': 3}


class _Grid(NamedTuple):
  """Constants of a convention, one float32 [code_dim] each.

  unit = tanh(z + shift), steps = unit * half - offset,
  digit = round(steps + before) + after, code = (digit - origin) / scale.
  """

  shift: np.ndarray
  half: np.ndarray
  offset: np.ndarray
  before: np.ndarray
  after: np.ndarray
  origin: np.ndarray
  scale: np.ndarray


def _make_grid(levels: tuple[int, ...], convention: str, eps: float) -> _Grid:
  """Returns the constants, computed in float64 and rounded once."""
  L = np.asarray(levels, np.float64)
  half = (L - 1) * (1 - eps) / 2
  zero, one = np.zeros_like(L), np.ones_like(L)
  if convention == 'symmetric':
    center = (L - 1) / 2
    grid = _Grid(zero, half, zero, center, zero, center, one)
  else:
    # The paper's notebook shifts by the tangent; its exact counterpart, the
    # inverse of tanh, moves about one token in 10^5.
    offset = np.where(L % 2 == 0, 0.5, 0.0)
    h = L // 2
    grid = _Grid(np.tan(offset / half), half, offset, zero, h, h, h)
  return _Grid(*(constant.astype(np.float32) for constant in grid))


class FSQ(base.Quantizer):
  """Finite Scalar Quantization (arXiv 2309.15505), without parameters.

    fsq = FSQ(levels=(8, 8, 8))
    z_q, loss, indices = fsq.apply({}, z)

  A channel with L levels takes one of L values, its digit k in 0 ... L - 1; an
  index is the number that the digits spell. Two conventions are in use:

  * 'symmetric': code k - (L - 1) / 2, so unit steps around 0 and half-integers
    for even L; the last channel runs fastest in the index; the commitment loss
    mean((z_q - y)^2), y the scaled latents before rounding. With bound 'tanh'
    y = tanh(z) * (L - 1) / 2. With 'clip' y = z * (L - 1) / 2, made for
    latents already in [-1, 1]: digits are clipped, the gradient is not, and
    the loss pulls back latents outside. As in hugoycj/RAE.
  * 'paper': code (k - h) / h with h = floor(L / 2); even L shifted by half a
    step, so that 0 is a code; the first channel runs fastest; no loss. As in
    google-research/google-research, fsq/fsq.ipynb.

  Latents rounded to bfloat16 give other indices than unrounded ones for some
  0.5 % of tokens; the quantizer itself adds nothing to that. Codes in a narrow
  dtype give back their indices as long as the dtype tells the levels apart:
  L up to 128 in bfloat16.

  Attributes:
    levels: number of values of each channel.
    convention: 'symmetric' or 'paper'.
    bound: 'tanh' for any latents, or 'clip' (symmetric only).
    eps: narrows the range of y to (L - 1) * (1 - eps) / 2 if positive, widens
      it if negative. None: 0 for symmetric, 1e-3 for paper.
    commitment_weight: factor of the loss. None: 1 for symmetric, 0 for paper.
  """

  levels: Sequence[int]
  convention: str = 'symmetric'
  bound: str = 'tanh'
  eps: float | None = None
  commitment_weight: float | None = None

  def __post_init__(self):
    if self.convention not in _BOUNDS:
      raise ValueError(
          f'convention is {self.convention!r}; known: {sorted(_BOUNDS)}.'
      )
    if self.bound not in _BOUNDS[self.convention]:
      raise ValueError(
          f'bound is {self.bound!r}; convention {self.convention!r} knows '
          f'{list(_BOUNDS[self.convention])}.'
      )
    self.levels = level_sets.checked(
        self.levels, lowest=_MIN_LEVEL[self.convention]
    )
    _check_number('eps', self.eps)
    _check_number('commitment_weight', self.commitment_weight)
    limit = 1 / (max(self.levels) - 1)
    if abs(self._eps) >= limit:
      raise ValueError(
          f'eps is {self._eps}; with {max(self.levels)} levels its size must '
          f'be below {limit:.3g}, or a level is out of reach.'
      )
    if self._commitment_weight < 0:
      raise ValueError(
          f'commitment_weight is {self.commitment_weight}; use 0 or more.'
      )
    super().__post_init__()

  @property
  def codebook_size(self) -> int:
    return math.prod(self.levels)

  @property
  def code_dim(self) -> int:
    return len(self.levels)

  def __call__(
      self, z: jax.Array, *, train: bool = False
  ) -> base.QuantizerOutput:
    del train  # FSQ does the same in training and evaluation.
    z = jnp.asarray(z)
    grid = self._grid
    unit = self._unit(self._channels_last(z, 'Latents').astype(jnp.float32))
    steps = unit * grid.half - grid.offset
    digits = self._round(steps + grid.before, grid.after)
    codes = self._codes(digits)
    # Codes are made of integers and stop the gradient. Their sum with an exact
    # zero is exact; y + sg(codes - y) loses codes much smaller than y.
    slope = grid.half / grid.scale
    z_q = codes + (unit - jax.lax.stop_gradient(unit)) * slope
    loss = jnp.zeros((), jnp.float32)
    if self._commitment_weight > 0:
      error = codes - steps / grid.scale
      loss = self._commitment_weight * jnp.mean(jnp.square(error))
    return base.QuantizerOutput(
        z_q=self._channels_back(z_q).astype(z.dtype),
        loss=loss,
        indices=self.digits_to_indices(digits),
    )

  def codes_to_indices(self, codes: jax.Array) -> jax.Array:
    return self.digits_to_indices(self.codes_to_digits(codes))

  def indices_to_codes(self, indices: jax.Array) -> jax.Array:
    return self.digits_to_codes(self.indices_to_digits(indices))

  def codes_to_digits(self, codes: jax.Array) -> jax.Array:
    """Returns the nearest digits of codes.

    Args:
      codes: codes, any float dtype, channels on `channel_axis`.

    Returns:
      int32 [..., code_dim] in [0, L), channels last; -1 where a code is NaN.
    """
    codes = self._channels_last(jnp.asarray(codes), 'Codes')
    codes = codes.astype(jnp.float32)
    return self._round(codes * self._grid.scale + self._grid.origin, 0)

  def digits_to_codes(self, digits: jax.Array) -> jax.Array:
    """Returns float32 codes, channels on `channel_axis`, of digits.

    Args:
      digits: [..., code_dim] integers, channels last.

    Returns:
      Codes; NaN where a digit is outside [0, L).
    """
    return self._channels_back(self._codes(self._checked_digits(digits)))

  def digits_to_indices(self, digits: jax.Array) -> jax.Array:
    """Returns int32 indices [...]; -1 where a digit is outside [0, L).

    Args:
      digits: [..., code_dim] integers, channels last.
    """
    digits = self._checked_digits(digits)
    # Channel by channel: XLA reduces a short last axis slowly on CPU.
    indices, valid = 0, True
    for i, level in enumerate(self.levels):
      digit = digits[..., i]
      indices += digit.astype(jnp.int32) * self._bases[i]
      valid &= (digit >= 0) & (digit < level)
    return jnp.where(valid, indices, -1)

  def indices_to_digits(self, indices: jax.Array) -> jax.Array:
    """Returns int32 digits [..., code_dim], channels last, of indices.

    Args:
      indices: [...] integers.

    Returns:
      Digits in [0, L); all -1 for an index outside [0, codebook_size).
    """
    indices = base.integers(indices, 'Indices')
    # Compared before the cast: 64-bit indices must not wrap into the range.
    valid = (indices >= 0) & (indices < self.codebook_size)
    indices = jnp.where(valid, indices, 0).astype(jnp.int32)
    # Channel by channel, truncating: division by a constant is a product.
    digits = [
        jax.lax.rem(jax.lax.div(indices, np.int32(basis)), np.int32(level))
        for basis, level in zip(self._bases, self.levels, strict=True)
    ]
    return jnp.where(valid[..., None], jnp.stack(digits, axis=-1), -1)

  def spec(self) -> dict[str, Any]:
    if self.convention == 'paper':
      shift, order = 'tan', 'first dimension fastest'
      code = '(digit - floor(L/2)) / floor(L/2)'
    else:
      shift, order = 'none', 'last dimension fastest'
      code = 'digit - (L-1)/2'
    return {
        'name': 'fsq',
        'levels': list(self.levels),
        'convention': self.convention,
        'bound': self.bound,
        'eps': self._eps,
        'shift': shift,
        'rounding': 'half to even',
        'index_order': order,
        'code': code,
    }

  @property
  def _eps(self) -> float:
    return float(_EPS[self.convention] if self.eps is None else self.eps)

  @property
  def _commitment_weight(self) -> float:
    if self.commitment_weight is None:
      return _COMMITMENT_WEIGHT[self.convention]
    return float(self.commitment_weight)

  @property
  def _grid(self) -> _Grid:
    return _make_grid(self.levels, self.convention, self._eps)

  @property
  def _bases(self) -> tuple[int, ...]:
    """Weight of each digit in the index, in Python's unbounded integers."""
    if self.convention == 'paper':
      return tuple(math.prod(self.levels[:i]) for i in range(self.code_dim))
    return tuple(math.prod(self.levels[i + 1:]) for i in range(self.code_dim))

  def _unit(self, z: jax.Array) -> jax.Array:
    """Returns float32 latents [..., code_dim] in units of half the range."""
    if self.bound == 'tanh':
      return jnp.tanh(z + self._grid.shift)
    # Infinite latents become the largest finite ones: inf - inf is NaN.
    return jnp.nan_to_num(z, nan=jnp.nan)

  def _round(self, steps: jax.Array, after: np.ndarray | int) -> jax.Array:
    """Returns int32 digits of float32 steps, in [0, L), or -1 for NaN."""
    top = np.asarray(self.levels, np.float32) - 1
    digits = jnp.clip(jnp.round(steps) + after, 0, top)
    return jnp.where(jnp.isnan(digits), -1, digits).astype(jnp.int32)

  def _codes(self, digits: jax.Array) -> jax.Array:
    """Returns float32 codes of int32 digits, both channels last."""
    valid = (digits >= 0) & (digits < np.asarray(self.levels, np.int32))
    codes = (digits.astype(jnp.float32) - self._grid.origin) / self._grid.scale
    return jnp.where(valid, codes, jnp.nan)

  def _checked_digits(self, digits: jax.Array) -> jax.Array:
    digits = base.integers(digits, 'Digits')
    if digits.shape[-1:] != (self.code_dim,):
      raise ValueError(
          f'Digits have shape {digits.shape}; the last axis must hold '
          f'{self.code_dim} channels.'
      )
    return digits


def _check_number(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is None or a finite number."""
  if value is not None and (
      isinstance(value, bool)
      or not isinstance(value, numbers.Real)
      or not math.isfinite(value)
  ):
    raise ValueError(f'{name} is {value!r}; use a finite number, or None.')
