"""Finite Scalar Quantization: every channel is rounded to a few levels."""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsq_jax.quantizers import base
from fsq_jax.quantizers import conventions
from fsq_jax.quantizers import digits as digits_lib

_NOISE_PER = ('element', 'example')


class FSQ(digits_lib.DigitQuantizer):
  """Finite Scalar Quantization (arXiv 2309.15505), without parameters.

    fsq = FSQ(levels=(8, 8, 8))
    z_q, loss, indices = fsq.apply({}, z)

  A channel with L levels takes one of L values, its digit k in 0 ... L - 1; an
  index is the number that the digits spell. Conventions in use:

  * 'symmetric': code k - (L - 1) / 2, so unit steps around 0 and half-integers
    for even L; the last channel runs fastest in the index; the commitment loss
    mean((z_q - y)^2), y the scaled latents before rounding. With bound 'tanh'
    y = tanh(z) * (L - 1) / 2. With 'ifsq' y = (2 sigmoid(1.6 z) - 1) *
    (L - 1) / 2, which spreads normal latents evenly (arXiv 2601.17124). With
    'clip' y = z * (L - 1) / 2, made for latents already in [-1, 1]: digits are
    clipped, the gradient is not, and the loss pulls back latents outside. As
    in hugoycj/RAE.
  * 'paper': code (k - h) / h with h = floor(L / 2); even L shifted by half a
    step, so that 0 is a code; the first channel runs fastest; no loss. As in
    google-research/google-research, fsq/fsq.ipynb.
  * 'vqp': 'paper' but with the range widened (eps < 0) and the shift an
    arctanh, which moves about 1 % of the tokens. The default of
    lucidrains/vector-quantize-pytorch, also met elsewhere.
  * 'preserve_symmetry': code 2 k / (L - 1) - 1, halves rounded up; the first
    channel runs fastest; no loss. The option of that name there.

  Latents rounded to bfloat16 give other indices than unrounded ones for some
  0.5 % of tokens; the quantizer itself adds nothing to that. Codes in a narrow
  dtype give back their indices as long as the dtype tells the levels apart:
  L up to 128 in bfloat16.

  Noise draws from the rng 'quantizer' in training alone; indices and loss are
  always those of the codes without noise. Inside jax.shard_map or jax.pmap give
  each replica a key of its own.

  Attributes:
    levels: number of values of each channel.
    convention: 'symmetric', 'paper', 'vqp' or 'preserve_symmetry'.
    bound: 'tanh' or 'ifsq' for any latents, or 'clip'; the last two symmetric
      only.
    eps: narrows the range of y to (L - 1) * (1 - eps) / 2 if positive, widens
      it if negative. None: 1e-3 for paper, -1e-3 for vqp, otherwise 0.
    commitment_weight: factor of the loss. None: 1 for symmetric, otherwise 0.
    bins: 'rounded': y ends at the outermost codes, whose bins are half as wide
      as the others; or 'equal' (symmetric only): y spans L / 2 in place of
      (L - 1) / 2, and all bins are equally wide.
    noise: half the width, in steps between codes, of the uniform noise added
      to codes in training.
    noise_per: what this amplitude holds for: every 'element', or every
      'example' (leading axis) up to a factor in [0, 1) drawn for it.
  """

  levels: Sequence[int]
  convention: str = 'symmetric'
  bound: str = 'tanh'
  eps: float | None = None
  commitment_weight: float | None = None
  bins: str = 'rounded'
  noise: float = 0.0
  noise_per: str = 'element'

  def __post_init__(self):
    base.check_name('convention', self.convention, conventions.CONVENTIONS)
    convention = self._convention
    for name, allowed in (
        ('bound', convention.bounds),
        ('bins', convention.bins),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
            f'{name} is {getattr(self, name)!r}; convention '
            f'{self.convention!r} knows {list(allowed)}.'
        )
    base.check_name('noise_per', self.noise_per, _NOISE_PER)
    self.levels = conventions.checked(
        self.levels, lowest=convention.lowest_level
    )
    if self.eps is not None:
      self._set_numbers('eps', lowest=-math.inf)
    if self.commitment_weight is not None:
      self._set_numbers('commitment_weight')
    self._set_numbers('noise')
    limit = 1 / (max(self.levels) - 1)
    if abs(self._eps) >= limit:
      raise ValueError(
          f'eps is {self._eps}; with {max(self.levels)} levels its size must '
          f'be below {limit:.3g}, or a level is out of reach.'
      )
    if self.bins == 'equal' and self._eps:
      raise ValueError(
          f"eps is {self._eps}; bins 'equal' need 0, any other makes the outer "
          'bins narrower or wider.'
      )
    super().__post_init__()

  def __call__(
      self, z: jax.Array, *, train: bool = False
  ) -> base.QuantizerOutput:
    z = jnp.asarray(z)
    grid = self._grid
    unit = self._unit(self._channels_last(z, 'Latents').astype(jnp.float32))
    steps = _subtract(unit * grid.half, grid.offset)
    digits = self._whole(steps, jnp)
    if self._leaves_levels:
      digits = jnp.clip(digits, 0, np.asarray(self.levels, np.float32) - 1)
    codes = jax.lax.stop_gradient(self._codes_of_whole(digits))
    # Their sum with an exact zero is exact; y + sg(codes - y) loses codes much
    # smaller than y.
    slope = grid.half / grid.scale
    z_q = codes + (unit - jax.lax.stop_gradient(unit)) * slope
    # Of codes, which are written to memory anyway: indices of the digits would
    # have XLA's CPU backend keep tanh too and round twice, in twice the time.
    indices = self._spell(self._nearest(jax.lax.stop_gradient(z_q)))
    if train and self.noise:
      z_q += self._noise_steps(codes.shape, z.ndim) / grid.scale
    loss = jnp.zeros((), jnp.float32)
    if self._commitment_weight > 0:
      error = codes - _divide(steps, grid.scale)
      loss = self._commitment_weight * jnp.mean(jnp.square(error))
    return base.QuantizerOutput(
        z_q=self._channels_back(z_q).astype(z.dtype),
        loss=loss,
        indices=indices,
    )

  @property
  def code_steps(self) -> tuple[float, ...]:
    return tuple(float(1 / scale) for scale in self._grid.scale)

  def spec(self) -> dict[str, Any]:
    return {
        'name': 'fsq',
        'levels': list(self.levels),
        'convention': self.convention,
        'bound': self.bound,
        'bins': self.bins,
        'eps': self._eps,
        'shift': self._convention.shift,
        'rounding': self._convention.rounding,
        'index_order': self._convention.index_order,
        'code': self._convention.code,
    }

  @property
  def _convention(self) -> conventions.Convention:
    return conventions.CONVENTIONS[self.convention]

  @property
  def _index_order(self) -> str:
    return self._convention.index_order

  @property
  def _eps(self) -> float:
    return float(self._convention.eps if self.eps is None else self.eps)

  @property
  def _commitment_weight(self) -> float:
    if self.commitment_weight is None:
      return self._convention.commitment_weight
    return float(self.commitment_weight)

  @property
  def _grid(self) -> conventions.Grid:
    return conventions.make_grid(
        self.levels, self.convention, self.bins, self._eps
    )

  def _unit(self, z: jax.Array) -> jax.Array:
    """Returns float32 latents [..., d] in units of half the range."""
    if self.bound == 'tanh':
      return jnp.tanh(z + self._grid.shift)
    if self.bound == 'ifsq':
      return jnp.tanh(0.8 * z)  # 2 sigmoid(1.6 z) - 1 without cancellation
    # Infinite latents become the largest finite ones: inf - inf is NaN.
    return jnp.nan_to_num(z, nan=jnp.nan)

  def _whole(self, steps: jax.Array, numpy: Any) -> jax.Array:
    """Returns the whole float32 digits of steps, rounded by `numpy`."""
    halves_up = self._convention.rounding == 'half up'
    rounded = (numpy.floor if halves_up else numpy.round)(
        _subtract(steps, -self._grid.before)
    )
    return _subtract(rounded, -self._grid.after)

  @property
  def _leaves_levels(self) -> bool:
    """Whether a latent may round to a digit that is no level."""
    if self.bound == 'clip':
      return True
    grid = self._grid
    # tanh may be off by a rounding.
    reach = grid.half * np.float32(1 + 1e-6)
    lowest = self._whole(-reach - grid.offset, np)
    highest = self._whole(reach - grid.offset, np)
    return bool(np.any(lowest < 0) or np.any(highest >= self.levels))

  def _noise_steps(self, shape: Sequence[int], rank: int) -> jax.Array:
    """Returns float32 noise in steps; the same on any number of devices."""
    noise_key, amplitude_key = jax.random.split(self._random_key('noise'))
    amplitude = self.noise
    if self.noise_per == 'example':
      amplitude *= jax.random.uniform(
          amplitude_key, digits_lib.per_example(shape, rank), jnp.float32
      )
    return amplitude * jax.random.uniform(
        noise_key, shape, jnp.float32, minval=-1
    )

  def _nearest_digits(self, codes: jax.Array) -> jax.Array:
    digits = jnp.stack(self._nearest(codes), axis=-1)
    top = np.asarray(self.levels, np.float32) - 1
    digits = jnp.clip(digits, 0, top)
    return jnp.where(jnp.isnan(digits), -1, digits).astype(jnp.int32)

  def _nearest(self, codes: jax.Array) -> list[jax.Array]:
    """Returns the whole float32 digits [...] of each channel of codes."""
    grid = self._grid
    return [
        jnp.round(codes[..., i] * grid.scale[i] + grid.origin[i])
        for i in range(len(self.levels))
    ]

  def _codes(self, digits: jax.Array) -> jax.Array:
    codes = self._codes_of_whole(digits.astype(jnp.float32))
    return jnp.where(self._is_valid(digits), codes, jnp.nan)

  def _codes_of_whole(self, digits: jax.Array) -> jax.Array:
    """Returns float32 codes of whole float32 digits in [0, L), or of NaN."""
    grid = self._grid
    if self.convention == 'preserve_symmetry':
      return _rounded_product(digits, 1 / grid.origin) - 1
    return _divide(digits - grid.origin, grid.scale)


def _subtract(x: jax.Array, constant: np.ndarray) -> jax.Array:
  """Returns x - constant; the compiler does not see that it is all zeros."""
  return x - constant if np.any(constant) else x


def _divide(x: jax.Array, constant: np.ndarray) -> jax.Array:
  """Returns x / constant; the compiler does not see that it is all ones."""
  return x / constant if np.any(constant != 1) else x


def _rounded_product(digits: jax.Array, factor: np.ndarray) -> jax.Array:
  """Returns digits * factor in float32, rounded before it is used further.

  Compilers may fuse a product with the sum that follows and round once, which
  moves the sum off the published codes. Both partial products here are exact
  for digits below 2^12, and their sum is rounded once however it is compiled.
  """
  high = (factor.view(np.int32) & np.int32(-(2**12))).view(np.float32)
  return digits * high + digits * (factor - high)
