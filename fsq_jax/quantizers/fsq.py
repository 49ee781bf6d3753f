"""Finite Scalar Quantization: every channel is rounded to a few levels."""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsq_jax.quantizers import base
from fsq_jax.quantizers import checks
from fsq_jax.quantizers import conventions
from fsq_jax.quantizers import digits as digits_lib
from fsq_jax.quantizers import diversity

_NOISE_PER = ('element', 'example')


class FSQ(digits_lib.DigitQuantizer):
  """Finite Scalar Quantization (arXiv 2309.15505), without parameters.

    fsq = FSQ(levels=(8, 8, 8))
    z_q, loss, indices = fsq.apply({}, z)

  Latents are bounded, scaled to L levels per channel and rounded to a level
  index k in 0 ... L - 1. The index is the mixed-radix number of the level
  indices. Conventions:

  * 'symmetric', as in hugoycj/RAE: code k - (L - 1) / 2, unit steps around 0,
    half-integers for even L; the last channel varies fastest in the index;
    commitment loss mean((z_q - y)^2) with y the scaled latents. Bounds:
    'tanh': y = tanh(z) * (L - 1) / 2. 'ifsq': y = (2 sigmoid(1.6 z) - 1) *
    (L - 1) / 2, which distributes normal latents evenly (arXiv 2601.17124).
    'clip': y = z * (L - 1) / 2 for latents already in [-1, 1]; level indices
    are clipped, the gradient is not, and the loss pulls back latents outside.
  * 'paper', as in google-research/google-research, fsq/fsq.ipynb: code
    (k - h) / h with h = floor(L / 2); even L are shifted by half a step, so
    that 0 is a code; the first channel varies fastest; no loss.
  * 'vqp', the default of lucidrains/vector-quantize-pytorch and several forks:
    'paper' with a wider range (eps < 0) and the shift an arctanh, which changes
    about 1 % of the tokens.
  * 'preserve_symmetry', the option of that name there: code 2 k / (L - 1) - 1,
    ties rounded up; the first channel varies fastest; no loss.

  Rounding latents to bfloat16 changes about 0.5 % of the tokens. Codes in a
  narrow dtype still have their indices if the dtype resolves the levels: L up
  to 128 in bfloat16.

  Noise is drawn from the rng 'quantizer', in training only; it changes neither
  indices nor loss. Under jax.shard_map or jax.pmap give each replica its own
  key.

  Attributes:
    levels: number of levels of each channel.
    convention: 'symmetric', 'paper', 'vqp' or 'preserve_symmetry'.
    bound: 'tanh' or 'ifsq' for any latents, or 'clip'; the last two symmetric
      only.
    eps: narrows the range of y to (L - 1) * (1 - eps) / 2 if positive, widens
      it if negative. None: 1e-3 for paper, -1e-3 for vqp, otherwise 0.
    commitment_weight: factor of the loss. None: 1 for symmetric, otherwise 0.
    bins: 'rounded': |y| <= (L - 1) / 2, so that the outermost bins are half as
      wide; 'equal' (symmetric only): |y| <= L / 2, equally wide bins.
    noise: amplitude, in steps between codes, of the uniform noise that is added
      to codes in training.
    noise_per: 'element': the same amplitude everywhere; 'example': times a
      factor in [0, 1) drawn for each example (leading axis).
    diversity_weight: weight of the diversity loss, which evens out the use of
      the levels: `diversity.missing_entropy` of the batch.
    axis_name: in training, the axis of jax.shard_map, jax.pmap or jax.vmap, or
      a tuple of axes, over which replicas hold parts of the batch; only the
      diversity loss needs it.
  """

  levels: Sequence[int]
  convention: str = 'symmetric'
  bound: str = 'tanh'
  eps: float | None = None
  commitment_weight: float | None = None
  bins: str = 'rounded'
  noise: float = 0.0
  noise_per: str = 'element'
  diversity_weight: float = 0.0
  axis_name: str | Sequence[str] | None = None

  def __post_init__(self):
    checks.check_name('convention', self.convention, conventions.CONVENTIONS)
    checks.check_name('noise_per', self.noise_per, _NOISE_PER)
    convention = self._convention
    for name, allowed in (
        ('bound', convention.bounds),
        ('bins', convention.bins),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
            f'{name} is {getattr(self, name)!r}; convention '
            f'{self.convention!r} allows {list(allowed)}.'
        )
    self.levels = conventions.validated_levels(
        self.levels, lowest=convention.lowest_level
    )
    if self.eps is not None:
      checks.set_numbers(self, 'eps', low=-math.inf)
    if self.commitment_weight is not None:
      checks.set_numbers(self, 'commitment_weight')
    checks.set_numbers(self, 'noise', 'diversity_weight')
    self.axis_name = checks.validated_axis_name(self.axis_name)
    convention(self.levels, self.bound, self.bins, self._eps)  # Checks them.
    super().__post_init__()

  def __call__(
      self, z: jax.Array, *, train: bool = False
  ) -> base.QuantizerOutput:
    z = jnp.asarray(z)
    x = self._channels_last(z, 'Latents').astype(jnp.float32)
    grid = self._grid
    bounded = grid.bound(x)
    steps = grid.to_steps(bounded)
    level_indices = grid.round(steps)
    if self._needs_clipping:
      level_indices = self._clip(level_indices)
    codes = jax.lax.stop_gradient(grid.codes(level_indices))
    # Straight-through. The sum with an exact zero is exact; y + sg(codes - y)
    # loses codes much smaller than y.
    slope = grid.half / grid.scale
    z_q = codes + (bounded - jax.lax.stop_gradient(bounded)) * slope
    # From codes, which are written to memory anyway: from level indices, XLA's
    # CPU backend keeps tanh in memory too and takes twice the time.
    indices = self._pack(grid.nearest(jax.lax.stop_gradient(z_q)))
    if train and self.noise:
      z_q += self._noise_in_steps(codes.shape, z.ndim) / grid.scale
    loss = jnp.zeros((), jnp.float32)
    if self._commitment_weight > 0:
      error = codes - steps / grid.scale
      loss = self._commitment_weight * jnp.mean(jnp.square(error))
    if self.diversity_weight > 0:
      # The axis does not exist in initialization.
      is_mapped = train and not self.is_initializing()
      loss += self.diversity_weight * diversity.missing_entropy(
          self._clip(steps + grid.origin),
          self.levels,
          # Groups of channels have histograms of their own.
          range(steps.ndim - 1 - len(self.index_shape)),
          self.axis_name if is_mapped else None,
      )
    return base.QuantizerOutput(
        z_q=self._channels_back(z_q).astype(z.dtype),
        loss=loss,
        indices=indices,
    )

  @property
  def code_steps(self) -> tuple[float, ...]:
    return tuple(float(1 / scale) for scale in self._grid.scale)

  def spec(self) -> dict[str, Any]:
    convention = self._convention
    return {
        'name': 'fsq',
        'levels': list(self.levels),
        'convention': self.convention,
        'bound': self.bound,
        'bins': self.bins,
        'eps': self._eps,
        'shift': convention.shift,
        'rounding': convention.rounding,
        'index_order': self._index_order,
        'code': convention.code,
    }

  @property
  def _convention(self) -> type[conventions.Convention]:
    return conventions.CONVENTIONS[self.convention]

  @property
  def _grid(self) -> conventions.Convention:
    return self._convention(self.levels, self.bound, self.bins, self._eps)

  @property
  def _eps(self) -> float:
    return self._convention.eps if self.eps is None else self.eps

  @property
  def _commitment_weight(self) -> float:
    if self.commitment_weight is None:
      return self._convention.commitment_weight
    return self.commitment_weight

  @property
  def first_fastest(self) -> bool:
    return self._convention.first_fastest

  @property
  def _needs_clipping(self) -> bool:
    """Whether a bounded latent may round to a level index outside [0, L)."""
    # tanh may exceed 1 by a rounding.
    half = self._grid.half * (1 + 1e-6)
    return self.bound == 'clip' or np.any(2 * half >= self.levels)

  def _nearest_digits(self, codes: jax.Array) -> jax.Array:
    digits = jnp.stack(self._grid.nearest(codes), axis=-1)
    digits = self._clip(digits)
    return jnp.where(jnp.isnan(digits), -1, digits).astype(jnp.int32)

  def _clip(self, level_indices: jax.Array) -> jax.Array:
    return jnp.clip(level_indices, 0, np.asarray(self.levels, np.float32) - 1)

  def _codes(self, digits: jax.Array) -> jax.Array:
    codes = self._grid.codes(digits.astype(jnp.float32))
    return jnp.where(self._is_valid(digits), codes, jnp.nan)

  def _noise_in_steps(self, shape: Sequence[int], rank: int) -> jax.Array:
    """Returns float32 noise in steps; equal on any number of devices."""
    noise_key, amplitude_key = jax.random.split(self._random_key('noise'))
    amplitude = self.noise
    if self.noise_per == 'example':
      amplitude *= jax.random.uniform(
          amplitude_key, digits_lib.per_example(shape, rank), jnp.float32
      )
    return amplitude * jax.random.uniform(
        noise_key, shape, jnp.float32, minval=-1
    )
