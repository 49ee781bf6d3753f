"""Projectors of latents to codes and of codes to the decoder."""

from collections.abc import Sequence
import math

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax import quantizers
from fsq_jax.models import layers

BOUNDS = {'none': lambda x: x, 'tanh': jnp.tanh}
# Variance of gelu(x) for unit-normal x; its mean is 1 / (2 sqrt(pi)).
_GELU_VARIANCE = 0.345644


class LinearProjectorIn(nn.Module):
  """Latents to the quantizer's dimensions: LayerNorm and a linear map, float32.

  Normalised latents and a kernel of variance 1 / C start every dimension at
  unit variance; nothing keeps it there.
  """

  code_dim: int

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [B, h, w, C] latents to [B, h, w, code_dim], float32."""
    del train  # The same in training and evaluation.
    x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name='norm')(latents)
    return nn.Dense(self.code_dim, dtype=jnp.float32, name='linear')(x)


class StandardizedProjectorIn(nn.Module):
  """A linear map whose outputs have mean 0 and variance 1, float32.

  Each dimension is standardised over all tokens of the global batch in
  training and by running averages in evaluation (BatchNorm without scale and
  bias, statistics in the collection `batch_stats`). At unit variance a
  tanh-bounded FSQ uses its levels about evenly, 98.9 to 99.3 % of log2(L) bits
  each for normal latents and L = 5 and 8, whatever the encoder does: no
  dimension shrinks to its middle levels or saturates at the outer ones. The
  batch is global for arrays sharded under jax.jit; inside jax.shard_map or
  jax.pmap each replica would take the statistics of its own part.
  """

  code_dim: int

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [B, h, w, C] latents to [B, h, w, code_dim], float32."""
    z = nn.Dense(
        self.code_dim, use_bias=False, dtype=jnp.float32, name='linear'
    )(latents)
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.99,
        use_bias=False,
        use_scale=False,
        dtype=jnp.float32,
        name='standardize',
    )(z)


class MlpProjectorIn(nn.Module):
  """LayerNorm and three dense layers with exact GELUs between them.

  FSQAdapter of github.com/hugoycj/RAE, parameter for parameter:
  LayerNorm(C), C -> width -> width -> code_dim, a bound and a gain for each
  dimension. What differs is where it starts. The original's 3 tanh(z) into
  digits that are clipped at 1 puts two fifths of all tokens into each outermost
  level: for unit-normal z the digits carry 79, 72 and 62 % of log2(L) bits for
  L = 5, 8 and 17. A tanh-bounded FSQ that sees unit-normal z keeps 99.3, 99.3
  and 99.2 % of them, and no other standard deviation gives more than 0.6 %
  more. So the gain starts at 1, and the kernels such that unit-normal latents
  stay unit normal all the way: those behind a GELU allow for its variance, and
  cancel its mean, which would shift every dimension.

  Attributes:
    code_dim: dimensions of the quantizer.
    width: channels of the two hidden layers; 512 in the original.
    bound: 'none' where the quantizer has a bound of its own, or none is
      wanted; 'tanh' for FSQ with bound 'clip'.
    dtype: of the hidden layers; the last one is float32.
  """

  code_dim: int
  width: int
  bound: str
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [B, h, w, C] latents to [B, h, w, code_dim], float32."""
    del train  # The same in training and evaluation.
    x = _layer_norm('norm')(latents)
    x = nn.Dense(self.width, dtype=self.dtype, name='hidden_0')(x)
    x = nn.gelu(x, approximate=False)
    x = nn.Dense(
        self.width, dtype=self.dtype, kernel_init=_behind_gelu, name='hidden_1'
    )(x)
    x = nn.gelu(x, approximate=False)
    return _BoundedLinear(
        self.code_dim, self.bound, kernel_init=_behind_gelu, name='output'
    )(x)


class AttentionProjectorIn(nn.Module):
  """Transformer blocks over all tokens, then a linear map.

  AttnFSQProjector of hugoycj/RAE, where nothing used it, with what it lacks:
  a LayerNorm before it, so that the blocks count whatever the scale of the
  latents, and one after its pre-norm blocks, whose output has no scale of its
  own. The linear map thus starts every dimension at unit variance, where
  digits are used evenly (see `MlpProjectorIn`). There is no dropout, and no
  position embedding: latents know their positions from the encoder.

  Attributes:
    code_dim: dimensions of the quantizer.
    width: channels of the blocks; 512 in the original.
    depth: blocks; 4 in the original.
    num_heads: attention heads, which divide width; 8 in the original.
    mlp_dim: channels inside of the blocks' MLPs; 2048 in the original.
    bound: 'none' or 'tanh', as in `MlpProjectorIn`.
    dtype: of the blocks; the last layer is float32.
    remat: recompute the activations of each block in the backward pass.
    scan_unroll: blocks in one iteration of the loop over blocks.
  """

  code_dim: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  bound: str
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  scan_unroll: int = 1
  # Attention sees all latents; see `autoencoder.takes_size`.
  takes_size = False

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [B, h, w, C] latents to [B, h, w, code_dim], float32."""
    del train  # The same in training and evaluation.
    height = latents.shape[1]
    x = _layer_norm('norm')(latents)
    x = nn.Dense(self.width, dtype=self.dtype, name='input')(x)
    x = layers.Transformer(
        self.depth, self.num_heads, self.mlp_dim, self.dtype, self.remat,
        self.scan_unroll, name='transformer',
    )(rearrange(x, 'b h w c -> b (h w) c'))
    x = _layer_norm('output_norm')(x.astype(jnp.float32))
    z = _BoundedLinear(
        self.code_dim,
        self.bound,
        kernel_init=nn.initializers.lecun_normal(),
        name='output',
    )(x)
    return rearrange(z, 'b (h w) c -> b h w c', h=height)


class NoProjectorIn(nn.Module):
  """The latents themselves, which have as many channels as a code."""

  code_dim: int

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns [B, h, w, code_dim] latents in float32."""
    del train  # The same in training and evaluation.
    if latents.shape[-1] != self.code_dim:
      raise ValueError(
          f'Latents have {latents.shape[-1]} channels, codes {self.code_dim};'
          " without a projector they must agree: use 'linear' or another."
      )
    return latents.astype(jnp.float32)


class _BoundedLinear(nn.Module):
  """gain * bound(kernel x + bias), float32; the gains start at 1."""

  code_dim: int
  bound: str
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., C] to [..., code_dim], float32."""
    if self.bound not in BOUNDS:
      raise ValueError(
          f'bound is {self.bound!r}; known: {sorted(BOUNDS)}.'
      )
    z = nn.Dense(
        self.code_dim,
        dtype=jnp.float32,
        kernel_init=self.kernel_init,
        name='linear',
    )(x.astype(jnp.float32))
    gain = self.param(
        'gain', nn.initializers.ones, (self.code_dim,), jnp.float32
    )
    return gain * BOUNDS[self.bound](z)


def _behind_gelu(key, shape, dtype=jnp.float32) -> jax.Array:
  """A kernel [in, out] that maps GELUs of unit normals to unit normals."""
  init = nn.initializers.variance_scaling(
      1 / _GELU_VARIANCE, 'fan_in', 'truncated_normal'
  )
  kernel = init(key, shape, dtype)
  # All inputs have the same mean; weights that sum to 0 cancel it.
  return kernel - jnp.mean(kernel, axis=0)


def _layer_norm(name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)


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
