"""Transformer layers: attention, MLP, block, stack."""

import functools
from typing import Any

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.runtime import partitioning


def sincos_positions(height: int, width: int, channels: int) -> np.ndarray:
  """Fixed sine and cosine position embedding of a two-dimensional grid.

  The first half of the channels encodes the column, the second half the row;
  each half is [sin, cos] of position / 10000^(i / (channels / 4)). This is the
  embedding of MAE (github.com/facebookresearch/mae, `util/pos_embed.py`).

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
        f'sincos positions need a width that 4 divides, not {channels}.'
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

  Args:
    q: [B, heads, N, d] queries.
    k: keys, same shape.
    v: values, same shape and the dtype of the products.

  Returns:
    Mixed values, same shape, float32.
  """
  scale = q.shape[-1] ** -0.5
  logits = jnp.einsum(
      'bhqd,bhkd->bhqk', q * scale, k, preferred_element_type=jnp.float32
  )
  # The softmax, with its division after the product instead of before: there
  # are fewer values to divide, and XLA's CPU backend is 1.7 times as fast on
  # the whole training step with four heads of 16 channels.
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
  """Queries, keys and values of all heads by one product.

  The kernel's columns are those of all queries, then keys, then values, heads
  in each: the 'tensor' axis of a mesh would cut them elsewhere than between
  heads. It splits the kernel's rows where it is kept, and its heads where it
  is used. What then moves between devices is a share of one kernel, and no
  activations.
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
    # Heads before tokens: the products of attention are then plain batched
    # matmuls, which XLA's CPU backend runs about a tenth faster than strided
    # ones.
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
  """A `dot_general` for nn.Dense that sees [B, N, C] tokens as B * N rows.

  The product is the same. The kernel's gradient then contracts one axis and not
  two, for which XLA's CPU backend transposes activations in memory first.

  Args:
    x: [..., C].
    kernel: [C, features].
    dimension_numbers: those of nn.Dense, which are the only ones that fit.
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
  """Multi-head self-attention over all tokens, softmax in float32."""

  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Mixes [B, N, C] tokens; returns the same shape."""
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
    """Transforms each of the [B, N, C] tokens; returns the same shape."""
    hidden = _dense(self.mlp_dim, self.dtype, 'in', tensor_axis=1)(x)
    hidden = partitioning.constrain(hidden, tensor_axis=2)
    return _branch_output(x.shape[-1], self.dtype)(nn.gelu(hidden))


class Block(nn.Module):
  """Pre-LayerNorm transformer block, in the form that nn.scan iterates."""

  num_heads: int
  mlp_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    """Transforms [B, N, C] tokens; the second value is nn.scan's output."""
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
  """A stack of blocks under nn.scan, with no LayerNorm at the end.

  The magnitude of a token is left alone: patches that differ in brightness
  differ in magnitude, which a last LayerNorm would take away. With small
  residual branches at the start, encoder and decoder begin as one linear
  autoencoder.

  Parameters of the blocks are stacked along a leading axis of length depth, so
  compile time does not grow with depth. `scan_unroll` lays that many blocks
  out in one iteration; it changes speed and never results.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  dtype: jnp.dtype
  remat: bool
  scan_unroll: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Transforms [B, N, C] tokens; returns the same shape."""
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    blocks = nn.scan(
        block,
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
  """The last layer of a residual branch; it starts at a tenth of its scale."""
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
