"""Maps from the quantizer's codes to the decoder's width."""

from collections.abc import Sequence
import math

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax import quantizers


class LinearProjectorOut(nn.Module):
  """Codes to the decoder's width: one linear map."""

  width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, codes: jax.Array) -> jax.Array:
    """Maps [B, h, w, code_dim] codes to [B, h, w, width]."""
    return nn.Dense(self.width, dtype=self.dtype, name='linear')(codes)


class MlpProjectorOut(nn.Module):
  """Three dense layers of the decoder's width, exact GELUs between them.

  Attributes:
    width: the decoder's, and that of the hidden layers.
    code_scales: for each channel, what codes are divided by first: half their
      range, so that levels fill about [-1, 1] whatever their number.
    dtype: of the layers.
  """

  width: int
  code_scales: Sequence[float]
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, codes: jax.Array) -> jax.Array:
    """Maps [B, h, w, code_dim] codes to [B, h, w, width]."""
    x = codes.astype(jnp.float32) / np.asarray(self.code_scales, np.float32)
    for i in range(2):
      x = nn.Dense(self.width, dtype=self.dtype, name=f'hidden_{i}')(x)
      x = nn.gelu(x, approximate=False)
    return nn.Dense(self.width, dtype=self.dtype, name='output')(x)


def fourier_features(x: jax.Array, frequencies: jax.Array) -> jax.Array:
  """Sines and cosines of a few frequencies.

  Args:
    x: [..., d] float32.
    frequencies: [d, F] float32, periods a unit of x.

  Returns:
    [..., 2 F] float32 in [-1, 1], sines first.
  """
  # Rounded to bfloat16, as TPUs do by default, phases of many periods err.
  phases = 2 * np.pi * jnp.einsum(
      '...d,df->...f', x, frequencies, precision=jax.lax.Precision.HIGHEST
  )
  return jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1)


class FourierProjectorOut(nn.Module):
  """Random Fourier features of the codes, then three dense layers.

  FourierFSQUnprojector of github.com/hugoycj/RAE, parameter for parameter:
  features sin(2 pi c B) and cos(2 pi c B) (arXiv 2006.10739), then three layers
  of the decoder's width with LayerNorm and exact GELU behind the first two. The
  frequencies B, normal with standard deviation sigma, are no parameters: they
  live in the collection `constants`, which checkpoints keep and no optimizer or
  average touches.

  The mean product of the features of two codes a distance delta apart is
  exp(-2 pi^2 sigma^2 delta^2) / 2. The original has sigma 10 for codes that
  are 1 apart: neighbours then have nothing in common, codes are as good as
  looked up at random, and gradients are multiplied by about 2 pi 10. Here
  sigma is in units of one step between codes, and 0.187 makes neighbours half
  similar: exp(-2 pi^2 0.187^2) = 0.50, two steps 0.06.

  Attributes:
    width: the decoder's, and that of the hidden layers.
    num_frequencies: rows of B; 128 in the original.
    sigma: standard deviation of the frequencies, in periods a step.
    code_steps: `quantizer.code_steps`.
    dtype: of the layers; the features are float32.
  """

  width: int
  num_frequencies: int
  sigma: float
  code_steps: Sequence[float]
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, codes: jax.Array) -> jax.Array:
    """Maps [B, h, w, code_dim] codes to [B, h, w, width]."""
    shape = (len(self.code_steps), self.num_frequencies)
    frequencies = self.variable(
        'constants',
        'frequencies',
        lambda: self.sigma * jax.random.normal(
            self.make_rng('params'), shape, jnp.float32
        ),
    )
    steps = codes.astype(jnp.float32) / np.asarray(self.code_steps, np.float32)
    x = fourier_features(steps, frequencies.value)
    for i in range(2):
      x = nn.Dense(self.width, dtype=self.dtype, name=f'hidden_{i}')(x)
      x = x.astype(jnp.float32)
      x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=f'norm_{i}')(x)
      x = nn.gelu(x, approximate=False)
    return nn.Dense(self.width, dtype=self.dtype, name='output')(x)


class LevelsProjectorOut(nn.Module):
  """One embedding for every level of every dimension, summed over dimensions.

  The table is read as a piecewise linear function of the code, with the levels
  as its knots. At a code it is therefore exactly the sum of the embeddings of
  its digits, whether the code comes from the quantizer or from indices; and it
  has a slope there, half the difference between the next and the previous
  embedding (at the ends, the difference to the only neighbour) a step, along
  which the gradient goes straight through the code to the latents. Codes with
  noise fall between knots and are interpolated; beyond the ends the function
  is constant. It starts as a linear map of the codes.

  Where a code has several stages (ResidualFSQ), each stage has its embeddings,
  and the slope is that of the first.

  Attributes:
    width: the decoder's.
    quantizer: the one that makes the codes, one with digits.
    dtype: of the result.
  """

  width: int
  quantizer: quantizers.DigitQuantizer
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    if not isinstance(self.quantizer, quantizers.DigitQuantizer):
      raise ValueError(
          f'The codes of {type(self.quantizer).__name__} have no levels to'
          " embed: model.projector_out 'levels' needs a quantizer with digits,"
          " such as FSQ; use 'linear'."
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, codes: jax.Array) -> jax.Array:
    """Maps [B, h, w, code_dim] codes to [B, h, w, width]."""
    levels = tuple(self.quantizer.levels)
    levels *= math.prod(self.quantizer.index_shape)
    digits = self.quantizer.codes_to_digits(codes)
    error = codes.astype(jnp.float32) - self.quantizer.digits_to_codes(digits)
    error /= np.asarray(self.quantizer.code_steps, np.float32)
    # Of each index after another; those of later stages have no slope.
    if self.quantizer.index_shape:
      digits = rearrange(digits, '... g d -> ... (g d)')
    no_error = jnp.zeros((), jnp.float32)
    weights = [
        _knot_weights(
            digits[..., i],
            error[..., i] if i < error.shape[-1] else no_error,
            level,
        )
        for i, level in enumerate(levels)
    ]
    table = self.param('table', _linear_table, levels, self.width)
    return jnp.einsum(
        '...k,kc->...c',
        jnp.concatenate(weights, axis=-1).astype(self.dtype),
        table.astype(self.dtype),
    )


class NoProjectorOut(nn.Module):
  """The codes themselves, which have as many channels as the decoder."""

  width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, codes: jax.Array) -> jax.Array:
    """Returns [B, h, w, width] codes."""
    if codes.shape[-1] != self.width:
      raise ValueError(
          f'Codes have {codes.shape[-1]} channels, the decoder {self.width};'
          " without a projector they must agree: use 'linear' or another."
      )
    return codes.astype(self.dtype)


def _knot_weights(
    digits: jax.Array, error: jax.Array, level: int
) -> jax.Array:
  """Returns how much of each level's embedding a channel takes.

  Args:
    digits: [...] int32, the nearest level, in [0, level).
    error: [...] or scalar float32, distance from it in steps; 0 at a code.
    level: number of levels.

  Returns:
    [..., level] float32 that sum to 1; NaN where the error is.
  """
  above = jnp.minimum(digits + (error >= 0).astype(jnp.int32), level - 1)
  below = jnp.maximum(digits - (error <= 0).astype(jnp.int32), 0)
  distance = jnp.maximum(above - below, 1)[..., None]
  digits, above, below = (
      jax.nn.one_hot(x, level, dtype=jnp.float32)
      for x in (digits, above, below)
  )
  distance = distance.astype(jnp.float32)
  return digits + error[..., None] * (above - below) / distance


def _linear_table(key, levels: Sequence[int], width: int) -> jax.Array:
  """Embeddings [sum of levels, width] that add up to a linear map."""
  stddev = len(levels) ** -0.5
  directions = stddev * jax.random.normal(
      key, (len(levels), width), jnp.float32
  )
  return jnp.concatenate([
      np.linspace(-1, 1, level, dtype=np.float32)[:, None] * direction
      for level, direction in zip(levels, directions, strict=True)
  ])
