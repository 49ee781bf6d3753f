"""Transformer blocks for pretrained weights of several families."""

import functools

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.models import layers
from fsq_jax.models import remat
from fsq_jax.models.pretrained import architectures
from fsq_jax.runtime import partitioning

_ACTIVATIONS = {
    'gelu': functools.partial(nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(nn.gelu, approximate=True),
    'silu': nn.silu,
}
# Sines and cosines, each [N, head channels], or None without a rotation.
Rotation = tuple[jax.Array, jax.Array] | None


def layer_norm(
    arch: architectures.Architecture, name: str, affine: bool = True
) -> nn.LayerNorm:
  """Returns a LayerNorm of the architecture, in float32."""
  # E[x^2] - E[x]^2 is too inexact for an epsilon of 1e-12.
  return nn.LayerNorm(
      epsilon=arch.norm_epsilon, use_bias=affine, use_scale=affine,
      use_fast_variance=False, dtype=jnp.float32, name=name,
  )


class DenseParameters(nn.Module):
  """Parameters of nn.Dense, under its names, without applying them."""

  features: int
  use_bias: bool

  @nn.compact
  def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
    """Returns the [channels, features] kernel and the bias, 0 without one."""
    init = nn.linear.default_kernel_init
    shape = (channels, self.features)
    kernel = self.param('kernel', init, shape, jnp.float32)
    if not self.use_bias:
      return kernel, jnp.zeros(self.features, kernel.dtype)
    bias = self.param('bias', nn.initializers.zeros, shape[1:], jnp.float32)
    return kernel, bias


class RotaryAttention(nn.Module):
  """Multi-head self-attention with optional rotary position embedding."""

  architecture: architectures.Architecture
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, rotation: Rotation) -> jax.Array:
    """Maps [B, N, C] tokens to the same shape."""
    heads = self.architecture.num_heads
    q, k, v = (
        partitioning.constrain(
            rearrange(y, 'b n (h d) -> b h n d', h=heads), tensor_axis=1
        )
        for y in _dense_together(self, ('query', 'key', 'value'), x)
    )
    mixed = layers.attend(_rotate(q, rotation), _rotate(k, rotation), v)
    mixed = rearrange(mixed, 'b h n d -> b n (h d)').astype(self.dtype)
    return _dense(self, 'out', x.shape[-1])(mixed)


class GatedMlp(nn.Module):
  """Two dense layers; the first may have a gate."""

  architecture: architectures.Architecture
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps each of the [B, N, C] tokens; returns the same shape."""
    arch = self.architecture
    activate = _ACTIVATIONS[arch.activation]

    names = ('in', 'gate') if arch.mlp == 'gated' else ('in',)
    hidden, *gate = (
        partitioning.constrain(y, tensor_axis=2)
        for y in _dense_together(self, names, x, arch.mlp_dim, 'mlp')
    )
    hidden = activate(gate[0]) * hidden if gate else activate(hidden)
    return _dense(self, 'out', x.shape[-1], 'mlp')(hidden)


class PretrainedBlock(nn.Module):
  """Pre-LayerNorm transformer block with the signature of nn.scan.

  Attributes:
    architecture: sizes and variants.
    dtype: of the matmuls.
    keep: whether nn.scan stacks the outputs of all blocks.
  """

  architecture: architectures.Architecture
  dtype: jnp.dtype
  keep: bool

  @nn.compact
  def __call__(
      self, x: jax.Array, rotation: Rotation
  ) -> tuple[jax.Array, jax.Array | None]:
    """Maps [B, N, C] tokens; the second value is the output of nn.scan."""
    arch = self.architecture

    def scale(name: str, y: jax.Array) -> jax.Array:
      if not arch.layer_scale:
        return y
      init = nn.initializers.ones
      factor = self.param(name, init, (arch.width,), jnp.float32)
      return y * factor.astype(self.dtype)

    x = partitioning.constrain(x)
    y = layer_norm(arch, 'attention_norm')(x.astype(jnp.float32))
    attention = RotaryAttention(arch, self.dtype, name='attention')
    x = x + scale('attention_scale', attention(y.astype(self.dtype), rotation))
    x = partitioning.constrain(x)
    y = layer_norm(arch, 'mlp_norm')(x.astype(jnp.float32))
    mlp = GatedMlp(arch, self.dtype, name='mlp')
    x = x + scale('mlp_scale', mlp(y.astype(self.dtype)))
    x = partitioning.constrain(x)
    return x, x if self.keep else None


def apply_blocks(
    module: nn.Module,
    x: jax.Array,
    rotation: Rotation = None,
    *,
    keep_all: bool = False,
) -> jax.Array:
  """Applies all blocks of a module by nn.scan, under the name 'blocks'.

  Args:
    module: has the fields architecture, dtype, remat and scan_unroll.
    x: [B, N, C] tokens.
    rotation: rotary position embedding, if any.
    keep_all: whether the outputs of all blocks are returned.

  Returns:
    [B, N, C] tokens after the last block, with keep_all [depth, B, N, C] after
    each block, of the module's dtype.
  """
  depth = module.architecture.depth
  blocks = nn.scan(
      remat.apply_remat(PretrainedBlock, module.remat, prevent_cse=False),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=depth,
      unroll=min(module.scan_unroll, depth),
  )(module.architecture, module.dtype, keep_all, name='blocks')
  last, outputs = blocks(x.astype(module.dtype), rotation)
  return outputs if keep_all else last


def _rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
  """Rotates pairs of channels, half a head apart, of [B, h, N, d] tokens."""
  if rotation is None:
    return x
  sin, cos = rotation
  y = x.astype(jnp.float32)
  first, second = jnp.split(y, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return (y * cos + turned * sin).astype(x.dtype)


def _dense_together(
    module: nn.Module,
    names: tuple[str, ...],
    x: jax.Array,
    features: int | None = None,
    bias: str | None = None,
) -> jax.Array:
  """Applies dense layers of the module to the same tokens by one matmul.

  Tokens are read once, and with 'tensor' parallelism their gradient is summed
  over devices once instead of once per layer.

  Args:
    module: has the fields architecture and dtype.
    names: of the layers.
    x: [B, N, C] tokens.
    features: output channels of each layer; by default C.
    bias: as in `_dense`.

  Returns:
    [layers, B, N, features].
  """
  parameters = [
      DenseParameters(
          features or x.shape[-1],
          (bias or name) in module.architecture.biases,
          name=name,
      )(x.shape[-1])
      for name in names
  ]
  kernels, biases = zip(*parameters, strict=True)
  x, kernel, bias = nn.dtypes.promote_dtype(
      x, jnp.stack(kernels, axis=1), jnp.stack(biases), dtype=module.dtype
  )
  kernel = partitioning.gather_parameter(kernel, tensor_axis=2)
  if partitioning.is_on_gpu(x):
    # As in `layers.dot_rows`: the XLA of JAX 0.10 finds no tiles for the
    # gradient of the matmul below when it compiles without a GPU and N is odd.
    rows = jnp.einsum('rc,csf->srf', rearrange(x, 'b n c -> (b n) c'), kernel)
    y = rearrange(rows, 's (b n) f -> s b n f', n=x.shape[1])
  else:
    y = jnp.einsum('bnc,csf->sbnf', x, kernel)
  return y + rearrange(bias, 's f -> s 1 1 f')


def _dense(
    module: nn.Module, name: str, features: int, bias: str | None = None
) -> nn.Dense:
  """Returns a dense layer, with a bias if `bias`, or `name`, is in `biases`."""
  use_bias = (bias or name) in module.architecture.biases
  return nn.Dense(
      features, use_bias=use_bias, dtype=module.dtype,
      dot_general=functools.partial(layers.dot_rows, tensor_axis=0), name=name,
  )
