"""Transformer layers: attention, MLP, block, stack of blocks."""

import functools
from typing import Any

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.models import fused_attention
from fsq_jax.models import remat
from fsq_jax.runtime import partitioning


def sincos_positions(height: int, width: int, channels: int) -> np.ndarray:
  """Returns the fixed sine-cosine position embedding of a 2D grid.

  The first half of the channels encodes the column, the second half the row;
  each half is [sin, cos] of position / 10000^(i / (channels / 4)), as in MAE
  (github.com/facebookresearch/mae, `util/pos_embed.py`).

  Args:
    height: rows of the grid.
    width: columns of the grid.
    channels: a multiple of 4.

  Returns:
    [height, width, channels] float32 in [-1, 1].

  Raises:
    ValueError: channels is not a multiple of 4.
  """
  if channels % 4:
    raise ValueError(
        f'The width is {channels}; sincos positions need a multiple of 4.'
    )
  frequencies = 10000.0 ** -(np.arange(channels // 4) / (channels / 4))

  def encode(positions: np.ndarray) -> np.ndarray:
    angles = positions[..., None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

  rows, columns = np.mgrid[:height, :width]
  grid = np.concatenate([encode(columns), encode(rows)], axis=-1)
  return grid.astype(np.float32)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Scaled dot-product attention, softmax in float32.

  By a fused kernel where the devices have one, see `fused_attention.attend`.

  Args:
    q: [B, heads, N, d] queries.
    k: keys, same shape.
    v: values, same shape and the dtype of the matmuls.

  Returns:
    Weighted means of the values, same shape, float32.
  """
  fused = fused_attention.attend(q, k, v)
  if fused is not None:
    return fused.astype(jnp.float32)
  scale = q.shape[-1] ** -0.5
  logits = jnp.einsum(
      'bhqd,bhkd->bhqk', q * scale, k, preferred_element_type=jnp.float32
  )
  # A softmax whose division comes after the matmul, where there are fewer
  # values: the training step with four heads of 16 channels is 1.7x as fast on
  # XLA's CPU backend.
  highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  weights = jnp.exp(logits - highest)
  mixed = jnp.einsum(
      'bhqk,bhkd->bhqd',
      weights.astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
  )
  return mixed / jnp.sum(weights, axis=-1, keepdims=True)


class QkvDense(nn.Module):
  """Computes queries, keys and values of all heads in one matmul.

  The columns of the kernel are the queries of all heads, then keys, then
  values, so that sharding them over 'tensor' would cut heads apart. The stored
  kernel is sharded by rows and resharded by heads before use: devices exchange
  a part of one kernel, and no activations.
  """

  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, N, C] tokens to [3, B, heads, N, d]."""
    channels = x.shape[-1]
    init = nn.linear.default_kernel_init
    shape = (channels, 3 * channels)
    kernel = self.param('kernel', init, shape, jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, shape[1:], jnp.float32)
    x, kernel, bias = nn.dtypes.promote_dtype(
        x, kernel, bias, dtype=self.dtype
    )
    sizes = {'s': 3, 'h': self.num_heads}
    kernel = partitioning.gather_parameter(
        rearrange(kernel, 'c (s h d) -> c s h d', **sizes), tensor_axis=2
    )
    # Tokens as rows: see `dot_rows`.
    rows = rearrange(x, 'b n c -> (b n) c')
    qkv = jnp.einsum('rc,cshd->rshd', rows, kernel)
    # Heads before tokens make attention a plain batched matmul, which is about
    # a tenth faster than a strided one on XLA's CPU backend.
    return rearrange(
        qkv + rearrange(bias, '(s h d) -> s h d', **sizes),
        '(b n) s h d -> s b h n d', n=x.shape[1],
    )


def dot_rows(
    x: jax.Array,
    kernel: jax.Array,
    dimension_numbers: Any,
    *,
    tensor_axis: int,
    **kwargs: Any,
) -> jax.Array:
  """A `dot_general` for nn.Dense that flattens [B, N, C] tokens to B * N rows.

  The result is the same, but the kernel's gradient contracts one dimension
  instead of two, for which XLA's CPU backend would transpose the activations.

  Args:
    x: [..., C].
    kernel: [C, features].
    dimension_numbers: ignored; nn.Dense contracts C.
    tensor_axis: of the kernel, as in `partitioning.gather_parameter`.
    **kwargs: of `jax.lax.dot_general`.

  Returns:
    [..., features].
  """
  del dimension_numbers
  kernel = partitioning.gather_parameter(kernel, tensor_axis)
  rows = rearrange(x, '... c -> (...) c')
  y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **kwargs)
  return jnp.reshape(y, (*x.shape[:-1], y.shape[-1]))


class Attention(nn.Module):
  """Multi-head self-attention over all tokens; the softmax is in float32."""

  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, N, C] tokens to the same shape."""
    q, k, v = (
        partitioning.constrain(y, tensor_axis=1)
        for y in QkvDense(self.num_heads, self.dtype, name='qkv')(x)
    )
    mixed = rearrange(attend(q, k, v), 'b h n d -> b n (h d)')
    return _branch_output(x.shape[-1], self.dtype)(mixed.astype(self.dtype))


class Mlp(nn.Module):
  """Two dense layers with a tanh-approximated GELU between them."""

  mlp_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps each of the [B, N, C] tokens; returns the same shape."""
    hidden = _dense(self.mlp_dim, self.dtype, 'in', tensor_axis=1)(x)
    hidden = partitioning.constrain(hidden, tensor_axis=2)
    return _branch_output(x.shape[-1], self.dtype)(nn.gelu(hidden))


class Block(nn.Module):
  """Pre-LayerNorm transformer block with the signature of nn.scan's body."""

  num_heads: int
  mlp_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    """Maps [B, N, C] tokens; the second value is nn.scan's output."""
    attention = Attention(self.num_heads, self.dtype, name='attention')
    mlp = Mlp(self.mlp_dim, self.dtype, name='mlp')
    x = partitioning.constrain(x)
    y = _layer_norm('attention_norm')(x.astype(jnp.float32))
    x = x + attention(y.astype(self.dtype))
    x = partitioning.constrain(x)
    y = _layer_norm('mlp_norm')(x.astype(jnp.float32))
    x = x + mlp(y.astype(self.dtype))
    return partitioning.constrain(x), None


class Transformer(nn.Module):
  """A stack of blocks under nn.scan, without a LayerNorm at the end.

  A last LayerNorm would remove the magnitude of tokens, which tells the
  brightness of patches. Since residual branches start small, encoder and
  decoder start as a linear autoencoder.

  Parameters of the blocks are stacked along a leading dimension of length
  depth, so that compile time does not grow with depth. `scan_unroll` is the
  number of blocks per iteration of the loop; it affects only speed.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  dtype: jnp.dtype
  remat: str
  scan_unroll: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, N, C] tokens to the same shape."""
    blocks = nn.scan(
        remat.apply_remat(Block, self.remat, prevent_cse=False),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=self.depth,
        unroll=min(self.scan_unroll, self.depth),
    )
    x, _ = blocks(self.num_heads, self.mlp_dim, self.dtype, name='blocks')(
        x.astype(self.dtype), None
    )
    return x


def _branch_output(channels: int, dtype: jnp.dtype) -> nn.Dense:
  """Last layer of a residual branch, initialized to a tenth of its scale."""
  init = nn.initializers.variance_scaling(0.01, 'fan_in', 'truncated_normal')
  return _dense(channels, dtype, 'out', tensor_axis=0, kernel_init=init)


def _dense(
    features: int, dtype: jnp.dtype, name: str, tensor_axis: int, **kwargs: Any
) -> nn.Dense:
  return nn.Dense(
      features, dtype=dtype, name=name,
      dot_general=functools.partial(dot_rows, tensor_axis=tensor_axis),
      **kwargs,
  )


def _layer_norm(name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)
