"""Self-attention of generators: causal mask, QK-norm, RoPE, key-value cache."""

from typing import NamedTuple

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.generators import architecture as architectures
from fsq_jax.generators import dense
from fsq_jax.generators import positions
from fsq_jax.models import fused_attention
from fsq_jax.runtime import partitioning

_EPSILON = 1e-6


class Cache(NamedTuple):
  """Keys and values of all positions so far, zeros elsewhere.

  Attributes:
    keys: [B, heads, N, d] in the dtype of the activations; [depth, B, heads, N,
      d] for a stack of blocks.
    values: same shape.
  """

  keys: jax.Array
  values: jax.Array


def empty_cache(
    architecture: architectures.Architecture, batch_size: int, length: int
) -> Cache:
  """Returns zeros for a stack of blocks and sequences of up to `length`."""
  a = architecture
  shape = (a.depth, batch_size, a.num_heads, length, a.head_dim)
  return Cache(jnp.zeros(shape, a.dtype), jnp.zeros(shape, a.dtype))


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None
) -> jax.Array:
  """Scaled dot-product attention, softmax in float32.

  Args:
    q: [B, heads, Q, d] queries.
    k: [B, heads, N, d] keys.
    v: values, same shape as the keys.
    allowed: bool [Q, N], the keys that each query sees, at least one per query;
      None for all keys.

  Returns:
    [B, heads, Q, d] float32.
  """
  logits = jnp.einsum(
      'bhqd,bhkd->bhqk',
      q * q.shape[-1] ** -0.5,
      k,
      preferred_element_type=jnp.float32,
  )
  if allowed is not None:
    logits = jnp.where(allowed, logits, -jnp.inf)
  weights = jax.nn.softmax(logits, axis=-1)
  return jnp.einsum(
      'bhqk,bhkd->bhqd',
      weights.astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
  )


def attend_within(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool
) -> jax.Array:
  """Attention within a sequence, see `fused_attention.attend` and `attend`."""
  fused = fused_attention.attend(q, k, v, causal=causal)
  if fused is not None:
    return fused.astype(jnp.float32)
  allowed = None
  if causal:
    allowed = jnp.tril(jnp.ones((q.shape[2], q.shape[2]), bool))
  return attend(q, k, v, allowed)


class QkvProjection(nn.Module):
  """Queries, keys and values of all heads by one matmul.

  As `layers.QkvDense`, with an optional bias and this package's initializer.
  """

  architecture: architectures.Architecture

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, N, w] to [3, B, heads, N, d]."""
    a = self.architecture
    shape = (a.width, 3 * a.width)
    sizes = {'s': 3, 'h': a.num_heads}
    init = dense.kernel_init(a.width)
    kernel = self.param('kernel', init, shape, jnp.float32)
    # Heads, not columns, are sharded over 'tensor', as in `layers.QkvDense`.
    kernel = partitioning.gather_parameter(
        rearrange(kernel.astype(a.dtype), 'c (s h d) -> c s h d', **sizes),
        tensor_axis=2,
    )
    rows = rearrange(x.astype(a.dtype), 'b n c -> (b n) c')
    qkv = jnp.einsum('rc,cshd->rshd', rows, kernel)
    if a.use_bias:
      bias = self.param('bias', nn.initializers.zeros, shape[1:], jnp.float32)
      bias = rearrange(bias, '(s h d) -> s h d', **sizes)
      qkv += bias.astype(a.dtype)
    return rearrange(qkv, '(b n) s h d -> s b h n d', n=x.shape[1])


class Attention(nn.Module):
  """Multi-head self-attention within a sequence, or over a cache."""

  architecture: architectures.Architecture

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      cache: Cache | None,
      rotation: positions.Rotation | None,
      position: jax.Array | None,
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes tokens.

    Args:
      x: [B, N, w]; N is 1 with a cache.
      cache: keys and values of earlier positions; None to attend within x.
      rotation: RoPE of the positions of x; None without RoPE.
      position: int32 scalar, the position of x in the cache; None without one.

    Returns:
      [B, N, w] in the dtype of the architecture, and the cache with x added.
    """
    a = self.architecture
    q, k, v = (
        partitioning.constrain(y, tensor_axis=1)
        for y in QkvProjection(a, name='qkv')(x)
    )
    if a.qk_norm:
      q, k = (
          nn.RMSNorm(epsilon=_EPSILON, dtype=jnp.float32, name=name)(
              y.astype(jnp.float32)
          ).astype(a.dtype)
          for name, y in (('query_norm', q), ('key_norm', k))
      )
    if rotation is not None:
      q, k = positions.rotate(q, rotation), positions.rotate(k, rotation)
    if cache is not None:
      cache = Cache(*(
          jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=2)
          for old, new in ((cache.keys, k), (cache.values, v))
      ))
      allowed = (jnp.arange(cache.keys.shape[2]) <= position)[None]
      mixed = attend(q, *cache, allowed)
    else:
      mixed = attend_within(q, k, v, causal=a.causal)
    mixed = rearrange(mixed, 'b h n d -> b n (h d)')
    out = dense.block_dense(
        a, a.width, 'out', tensor_axis=0, scale=(2 * a.depth) ** -0.5
    )
    return out(mixed.astype(a.dtype)), cache
