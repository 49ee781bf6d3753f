"""Residual FSQ: each stage quantizes the residual of the stages before."""

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


class ResidualFSQ(digits_lib.DigitQuantizer):
  """Residual FSQ with stage scale L^-q, without parameters.

    residual = ResidualFSQ(levels=(8, 5, 5, 5), num_stages=4)
    z_q, loss, indices = residual.apply({}, z)  # [..., 4], 0, [..., 4]

  Latents are bounded by a soft clamp x = c tanh(z / c), c = L / (L - 1). Stage
  q = 0, 1, ... rounds the residual, in units of L^-q, to L values in [-1, 1]:

    r_0 = x,  r_{q+1} = r_q - L^-q Q(r_q L^q),  code = x - r_{num_stages}.

  With this clamp and scale every bin of a stage, end bins included, is as wide
  as the range of the next stage: the residual shrinks by L per stage, to at
  most L^-q / (L - 1) after stage q. The level indices of the stages are then
  the base-L digits of the number of one of L^num_stages equal steps, and they
  are computed as such: exactly, in one pass. Equal to ResidualFSQ of
  lucidrains/vector-quantize-pytorch away from rounding boundaries, except for
  the gradient: here the soft clamp has it once, there once per stage.

  Every stage has an index in [0, codebook_size), first channel fastest, on the
  last axis of the indices, coarse to fine; `levels` and `codebook_size`
  describe one index. The indices of the first stages decode to coarser codes;
  so do all indices if the last are -1, the mark of dropped stages in
  vector-quantize-pytorch. A NaN channel makes every stage -1. The whole code is
  NaN if all stages are -1, if -1 precedes another index, or if an index is out
  of range.

  Attributes:
    levels: number of levels of each channel in a stage.
    num_stages: number of stages; L^num_stages is at most 2^22.
    stage_dropout: probability in [0, 1] that the last stages of an example
      (leading axis) are dropped in training; the number of stages left is drawn
      uniformly from 1 ... num_stages - 1, from the rng 'quantizer'. Indices
      have all stages.
  """

  levels: Sequence[int]
  num_stages: int
  stage_dropout: float = 0.0

  def __post_init__(self):
    self.levels = conventions.validated_levels(self.levels, lowest=2)
    most = int(math.log2(conventions.MAX_LEVEL) / math.log2(max(self.levels)))
    checks.set_integers(self, 'num_stages', low=1, high=most)
    checks.set_numbers(self, 'stage_dropout')
    if self.stage_dropout > 1 or (self.stage_dropout and self.num_stages == 1):
      raise ValueError(
          f'stage_dropout is {self.stage_dropout} with {self.num_stages} '
          'stages; use a probability in [0, 1], and 0 with one stage.'
      )
    super().__post_init__()

  @property
  def code_steps(self) -> tuple[float, ...]:
    return tuple(2 / (level - 1) for level in self.levels)

  @property
  def index_shape(self) -> tuple[int, ...]:
    return (self.num_stages,)

  def __call__(
      self, z: jax.Array, *, train: bool = False
  ) -> base.QuantizerOutput:
    z = jnp.asarray(z)
    x = self._channels_last(z, 'Latents').astype(jnp.float32)
    L = np.asarray(self.levels, np.float32)
    clamp = L / (L - 1)
    unit = jnp.tanh(x / clamp)
    half = np.float32(L**self.num_stages / 2)
    fine = self._clipped(jnp.floor(unit * half + half))
    digits = self._split(fine)
    if train and self.stage_dropout:
      codes = self._drop_stages(digits, z.ndim)
    else:
      codes = self._codes(digits)
    # Codes stop the gradient; their sum with an exact zero is exact.
    z_q = codes + (unit - jax.lax.stop_gradient(unit)) * clamp
    return base.QuantizerOutput(
        z_q=self._channels_back(z_q).astype(z.dtype),
        loss=jnp.zeros((), jnp.float32),
        indices=self.digits_to_indices(digits),
    )

  def spec(self) -> dict[str, Any]:
    return {
        'name': 'residual_fsq',
        'levels': list(self.levels),
        'num_stages': self.num_stages,
        'clamp': 'c * tanh(z / c), c = L/(L-1)',
        'rounding': 'half up',
        'index_order': self._index_order,
        'code': 'sum over stages q of L^-q * (2 * digit / (L-1) - 1)',
    }

  @property
  def first_fastest(self) -> bool:
    return True

  def indices_to_codes(self, indices: jax.Array) -> jax.Array:
    indices = checks.as_integers(indices, 'Indices')
    self.check_index_axes(indices.shape)
    stages = jnp.arange(1, indices.shape[-1] + 1, dtype=jnp.int32)
    count = jnp.max(jnp.where(indices == -1, 0, stages), axis=-1, keepdims=True)
    digits = self.indices_to_digits(indices)
    return self._channels_back(self._first_stages(digits, count))

  def _first_stages(self, digits: jax.Array, count: jax.Array) -> jax.Array:
    """Returns codes [..., d] of level indices [..., stages, d].

    `count` is the int32 number of stages that are used, 0 for all; it
    broadcasts to the codes.
    """
    codes = self._codes(digits)
    for num in range(1, digits.shape[-2]):
      codes = jnp.where(count == num, self._codes(digits[..., :num, :]), codes)
    return codes

  def _drop_stages(self, digits: jax.Array, rank: int) -> jax.Array:
    """Returns codes [..., d], for some examples without the last stages."""
    drop_key, count_key = jax.random.split(self._random_key('stage_dropout'))
    shape = digits_lib.per_example(digits[..., 0, :].shape, rank)
    count = jnp.where(
        jax.random.bernoulli(drop_key, np.float32(self.stage_dropout), shape),
        jax.random.randint(count_key, shape, 1, self.num_stages, jnp.int32),
        self.num_stages,
    )
    return self._first_stages(digits, count)

  def _nearest_digits(self, codes: jax.Array) -> jax.Array:
    L = np.asarray(self.levels, np.float64)
    fine = L**self.num_stages
    per_code = np.float32((L - 1) * L ** (self.num_stages - 1) / 2)
    center = np.float32((fine - 1) / 2)
    return self._split(self._clipped(jnp.round(codes * per_code + center)))

  def _clipped(self, fine: jax.Array) -> jax.Array:
    """Returns float32 integers as int32 in range, or -1 for NaN."""
    top = np.asarray(self.levels, np.float32) ** self.num_stages - 1
    fine = jnp.clip(fine, 0, top)
    return jnp.where(jnp.isnan(fine), -1, fine).astype(jnp.int32)

  def _split(self, fine: jax.Array) -> jax.Array:
    """Returns level indices [..., num_stages, d] of steps [..., d]."""
    L = np.asarray(self.levels, np.int32)
    stages = [
        fine // L ** (self.num_stages - 1 - q) % L
        for q in range(self.num_stages)
    ]
    return jnp.where((fine >= 0)[..., None, :], jnp.stack(stages, -2), -1)

  def _codes(self, digits: jax.Array) -> jax.Array:
    """Returns float32 codes [..., d] of level indices [..., stages, d]."""
    num = digits.shape[-2]
    L = np.asarray(self.levels, np.int32)
    fine = 0
    for q in range(num):
      fine = fine * L + digits[..., q, :]
    center = np.float32((L.astype(np.float64) ** num - 1) / 2)
    step = np.float32(2 / ((L - 1) * L.astype(np.float64) ** (num - 1)))
    codes = (fine.astype(jnp.float32) - center) * step
    valid = jnp.all(self._is_valid(digits), axis=-2)
    return jnp.where(valid, codes, jnp.nan)

  def check_index_axes(self, shape: Sequence[int]) -> None:
    if not shape or not 1 <= shape[-1] <= self.num_stages:
      raise ValueError(
          f'Indices have shape {tuple(shape)}; the last axis must hold 1 to'
          f' {self.num_stages} stages.'
      )
