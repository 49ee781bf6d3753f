"""Maps from the encoder's latents to the quantizer's dimensions."""

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.models import vit

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

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps [B, h, w, C] latents to [B, h, w, code_dim], float32."""
    del train  # The same in training and evaluation.
    height = latents.shape[1]
    x = _layer_norm('norm')(latents)
    x = nn.Dense(self.width, dtype=self.dtype, name='input')(x)
    x = vit.Transformer(
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
