"""Projectors from latents to the quantizer and from codes to the decoder."""

from collections.abc import Sequence
import math

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.models import layers
from fsq_jax.quantizers import digits as digits_lib

BOUNDS = {'none': lambda x: x, 'tanh': jnp.tanh}
# Variance of gelu(x) for unit-normal x; its mean is 1 / (2 sqrt(pi)).
_GELU_VARIANCE = 0.345644


class LinearProjectorIn(nn.Module):
  """LayerNorm and a linear map to the quantizer's dimensions, float32.

  Normalized latents and a kernel of variance 1 / C give every dimension unit
  variance at initialization.
  """

  code_dim: int

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [B, h, w, C] latents to [B, h, w, code_dim], float32."""
    del train  # Makes no difference.
    x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name='norm')(latents)
    return nn.Dense(self.code_dim, dtype=jnp.float32, name='linear')(x)


class StandardizedProjectorIn(nn.Module):
  """A linear map whose outputs have mean 0 and variance 1, float32.

  BatchNorm without scale and bias: each dimension is standardized over all
  tokens of the global batch in training and by running averages, in the
  collection `batch_stats`, in evaluation. Whatever the encoder does, no
  dimension shrinks to the middle levels of a tanh-bounded FSQ or saturates at
  the outer ones: for normal latents and L = 5 and 8 levels the entropy is 98.9
  to 99.3 % of log2(L) bits. The batch is global for arrays sharded under
  jax.jit, but not inside jax.shard_map or jax.pmap.
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

  The parameters equal FSQAdapter's in github.com/hugoycj/RAE:
  LayerNorm(C), C -> width -> width -> code_dim, a bound and a gain for each
  dimension. The initialization differs. The original's 3 tanh(z), clipped at 1,
  puts two fifths of all tokens into each outermost level: for unit-normal z the
  entropy is 79, 72 and 62 % of log2(L) bits for L = 5, 8 and 17. A tanh-bounded
  FSQ of unit-normal z has 99.3, 99.3 and 99.2 %, within 0.6 % of the best
  standard deviation. Here the gain is therefore 1, and the kernels map
  unit-normal latents to unit-normal outputs: kernels after a GELU account for
  its variance and cancel its mean, which would shift every dimension.

  Attributes:
    code_dim: dimensions of the quantizer.
    width: channels of the two hidden layers; 512 in the original.
    bound: 'none' if the quantizer has its own bound or needs no bound; 'tanh'
      for FSQ with bound 'clip'.
    dtype: of the hidden layers; the last one is float32.
  """

  code_dim: int
  width: int
  bound: str
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [B, h, w, C] latents to [B, h, w, code_dim], float32."""
    del train  # Makes no difference.
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

  AttnFSQProjector of github.com/hugoycj/RAE with two LayerNorms that it lacks:
  one before the blocks, for latents of any scale, and one after them, so that
  the linear map gives every dimension unit variance at initialization, which
  uses all levels evenly (see `MlpProjectorIn`). There is no dropout, and no
  position embedding: the encoder adds positions.

  Attributes:
    code_dim: dimensions of the quantizer.
    width: channels of the blocks; 512 in the original.
    depth: number of blocks; 4 in the original.
    num_heads: attention heads, a divisor of width; 8 in the original.
    mlp_dim: hidden channels of the blocks' MLPs; 2048 in the original.
    bound: 'none' or 'tanh', as in `MlpProjectorIn`.
    dtype: of the blocks; the last layer is float32.
    remat: of blocks, see `remat.apply_remat`.
    scan_unroll: blocks per iteration of the loop over blocks.
  """

  code_dim: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  bound: str
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1
  # Attention mixes positions; see `autoencoder.takes_size`.
  takes_size = False

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [B, h, w, C] latents to [B, h, w, code_dim], float32."""
    del train  # Makes no difference.
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
  """Identity, for latents with as many channels as a code."""

  code_dim: int

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns [B, h, w, code_dim] latents in float32."""
    del train  # Makes no difference.
    if latents.shape[-1] != self.code_dim:
      raise ValueError(
          f'Latents have {latents.shape[-1]} channels, codes {self.code_dim};'
          " without a projector they must agree: use 'linear' or another."
      )
    return latents.astype(jnp.float32)


class _BoundedLinear(nn.Module):
  """gain * bound(kernel x + bias), float32; gains are initialized to 1."""

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
  """Initializes a kernel [in, out] that maps GELUs of unit normals to them."""
  init = nn.initializers.variance_scaling(
      1 / _GELU_VARIANCE, 'fan_in', 'truncated_normal'
  )
  kernel = init(key, shape, dtype)
  # Weights that sum to 0 cancel the mean, which all inputs share.
  return kernel - jnp.mean(kernel, axis=0)


def _layer_norm(name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)


class LinearProjectorOut(nn.Module):
  """One linear map from codes to the decoder's width."""

  width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, codes: jax.Array) -> jax.Array:
    """Maps [B, h, w, code_dim] codes to [B, h, w, width]."""
    return nn.Dense(self.width, dtype=self.dtype, name='linear')(codes)


class MlpProjectorOut(nn.Module):
  """Three dense layers with exact GELUs between them.

  Attributes:
    width: channels of all layers, the decoder's width.
    code_scales: half the range of the codes in each channel. Codes are divided
      by it first, so that levels fill about [-1, 1].
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
  """Returns sines and cosines of linear maps of x.

  Args:
    x: [..., d] float32.
    frequencies: [d, F] float32, periods per unit of x.

  Returns:
    [..., 2 F] float32 in [-1, 1], sines first.
  """
  # TPUs round to bfloat16 by default: too coarse for phases of many periods.
  phases = 2 * np.pi * jnp.einsum(
      '...d,df->...f', x, frequencies, precision=jax.lax.Precision.HIGHEST
  )
  return jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1)


class FourierProjectorOut(nn.Module):
  """Random Fourier features of the codes, then three dense layers.

  The parameters equal FourierFSQUnprojector's in github.com/hugoycj/RAE:
  features sin(2 pi c B) and cos(2 pi c B) (arXiv 2006.10739), then three layers
  with LayerNorm and exact GELU after the first two. The frequencies B, normal
  with standard deviation sigma, are constants: they are in the collection
  `constants`, are saved in checkpoints, and have no gradient or EMA.

  The mean product of the features of two codes at a distance delta is
  exp(-2 pi^2 sigma^2 delta^2) / 2. The original has sigma 10 for codes at a
  distance of 1: features of neighbours are then uncorrelated, as in a random
  table, and gradients are multiplied by about 2 pi 10. Here sigma is relative
  to one step between codes, and 0.187 gives neighbours a correlation of
  exp(-2 pi^2 0.187^2) = 0.50, and codes two steps apart 0.06.

  Attributes:
    width: channels of all layers, the decoder's width.
    num_frequencies: rows of B; 128 in the original.
    sigma: standard deviation of the frequencies, in periods per step.
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
  """An embedding for each level of each dimension, summed over dimensions.

  The result is a piecewise linear function of the code with knots at the
  levels. At a code it equals the sum of the embeddings of its level indices.
  Its slope there, which straight-through gradients use, is half the difference
  between the next and the previous embedding per step, or at the ends the
  difference to the only neighbour. Codes with noise are interpolated between
  knots; beyond the ends the function is constant. The initialization is a
  linear map of the codes.

  If a code has several stages (ResidualFSQ), each stage has its own embeddings,
  and only the first stage has a slope.

  Attributes:
    width: the decoder's width.
    quantizer: of the codes; it must have level indices.
    dtype: of the result.
  """

  width: int
  quantizer: digits_lib.DigitQuantizer
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    if not isinstance(self.quantizer, digits_lib.DigitQuantizer):
      raise ValueError(
          f"model.projector_out is 'levels', but codes of"
          f' {type(self.quantizer).__name__} have no levels to embed; use a'
          " quantizer with levels, such as FSQ, or 'linear'."
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
    # The stages one after another; only the first has a slope.
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
  """Identity, for codes with as many channels as the decoder."""

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
  """Returns the weight of each level's embedding in one channel.

  Args:
    digits: [...] int32 index of the nearest level, in [0, level).
    error: [...] or scalar float32, distance from it in steps; 0 at a code.
    level: number of levels.

  Returns:
    [..., level] float32 that sum to 1; NaN for a NaN error.
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
  """Initializes [sum of levels, width] embeddings to a linear map of codes."""
  stddev = len(levels) ** -0.5
  directions = stddev * jax.random.normal(
      key, (len(levels), width), jnp.float32
  )
  return jnp.concatenate([
      np.linspace(-1, 1, level, dtype=np.float32)[:, None] * direction
      for level, direction in zip(levels, directions, strict=True)
  ])
