"""Attention for TPUs as a Pallas kernel that keeps the logits in VMEM."""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Elements along the minor dimension of a TPU's registers.
_LANES = 128
_SUBLANES = 8
# A step of the grid takes as many heads as have this many logits, so that its
# arithmetic hides the cost of starting it.
_MIN_LOGITS = 2**17
# Bytes per logit that the backward kernel needs; the compiler took 10 to 15
# with 257 to 1,024 tokens. It has 16 MiB without vmem_limit_bytes.
_BYTES_PER_LOGIT = 16
_DEFAULT_LIMIT = 2**24


class Options(NamedTuple):
  """Static arguments of `attention`.

  Attributes:
    head_dim: channels per head, d.
    causal: whether a token attends to itself and earlier tokens only.
    sharding: of the arrays, for `jax.shard_map`; None to run on one device.
  """

  head_dim: int
  causal: bool
  sharding: jax.sharding.NamedSharding | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, options: Options
) -> jax.Array:
  """Scaled dot-product attention, softmax in float32.

  The logits of a head, [N, N] in float32, are in VMEM only. The backward kernel
  recomputes them from q and k; no other residuals are kept. There is no second
  derivative.

  Args:
    q: [B, N, heads * d] queries.
    k: keys, same shape and dtype.
    v: values, same shape and dtype.
    options: head size, mask and sharding.

  Returns:
    Weighted means of the values, same shape and dtype.
  """
  (mixed,) = _call(_forward_kernel, options, 1, 2, q, k, v)
  return mixed


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, options: Options
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return attention(q, k, v, options), (q, k, v)


def _backward(
    options: Options, residuals: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
  return _call(_backward_kernel, options, 3, 5, *residuals, gradient)


attention.defvjp(_forward, _backward)


def needed_bytes(length: int, width: int, head_dim: int) -> int:
  """Returns the VMEM that the backward kernel needs, in bytes.

  Args:
    length: tokens.
    width: channels of the heads of one device.
    head_dim: channels per head.
  """
  rows = _round_up(length, _SUBLANES)
  logits = rows * _round_up(length, _LANES) * _BYTES_PER_LOGIT
  group = group_width(length, width, head_dim)
  # Four arrays in and three out, in two buffers each.
  return logits + 2 * 7 * 2 * rows * _round_up(group, _LANES)


def _call(
    kernel: Callable[..., None],
    options: Options,
    num_results: int,
    num_matmuls: int,
    *arrays: jax.Array,
) -> tuple[jax.Array, ...]:
  """Runs a kernel for each image and group of heads, on every device."""

  def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    batch, length, width = arrays[0].shape
    group = group_width(length, width, options.head_dim)
    block = pl.BlockSpec((1, length, group), lambda i, j: (i, 0, j))
    needed = needed_bytes(length, width, options.head_dim)
    num_logits = batch * width // options.head_dim * length**2
    return pl.pallas_call(
        functools.partial(
            kernel, head_dim=options.head_dim, causal=options.causal
        ),
        grid=(batch, width // group),
        in_specs=[block] * len(arrays),
        out_specs=(block,) * num_results,
        out_shape=tuple(
            jax.ShapeDtypeStruct(x.shape, x.dtype)
            for x in arrays[:num_results]
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel'),
            vmem_limit_bytes=max(_DEFAULT_LIMIT, 3 * needed // 2),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_matmuls * num_logits * options.head_dim,
            transcendentals=num_logits,
            bytes_accessed=sum(
                x.size * x.dtype.itemsize
                for x in (*arrays, *arrays[:num_results])
            ),
        ),
        name=kernel.__name__.strip('_').replace('kernel', 'attention'),
    )(*arrays)

  if options.sharding is not None:
    spec = options.sharding.spec
    run = jax.shard_map(
        run,
        mesh=options.sharding.mesh,
        in_specs=(spec,) * len(arrays),
        out_specs=(spec,) * num_results,
        check_vma=False,
    )
  return run(*arrays)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, head_dim, causal):
  """Attention of the heads of one block, [1, N, heads * d]."""
  for head in _heads(q_ref, head_dim):
    q, k, v = q_ref[head], k_ref[head], v_ref[head]
    logits = _dot(_scale(q), k, 1, 1)
    if causal:
      logits = jnp.where(_is_earlier(logits, 1, 0), logits, -jnp.inf)
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    mixed = _dot(weights.astype(v.dtype), v, 1, 0)
    mixed = mixed / jnp.sum(weights, axis=1, keepdims=True)
    out_ref[head] = mixed.astype(out_ref.dtype)


def _backward_kernel(
    q_ref, k_ref, v_ref, gradient_ref, dq_ref, dk_ref, dv_ref, *, head_dim,
    causal,
):
  """Gradients of the heads of one block.

  Logits are transposed, [keys, queries]: three of the five matmuls are then
  plain ones and only one has a transposed left operand.
  """
  for head in _heads(q_ref, head_dim):
    k, v, gradient = k_ref[head], v_ref[head], gradient_ref[head]
    q = _scale(q_ref[head])
    logits = _dot(k, q, 1, 1)
    if causal:
      logits = jnp.where(_is_earlier(logits, 0, 1), logits, -jnp.inf)
    weights = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    weights = weights / jnp.sum(weights, axis=0, keepdims=True)
    dv_ref[head] = _dot(weights.astype(v.dtype), gradient, 1, 0).astype(
        dv_ref.dtype
    )
    # Gradient of the weights, then of the logits.
    slope = _dot(v, gradient, 1, 1)
    mean = jnp.sum(weights * slope, axis=0, keepdims=True)
    slope = (weights * (slope - mean)).astype(q.dtype)
    dk_ref[head] = _dot(slope, q, 1, 0).astype(dk_ref.dtype)
    dq = _dot(slope, k, 0, 0) * head_dim**-0.5
    dq_ref[head] = dq.astype(dq_ref.dtype)


def _heads(ref, head_dim: int) -> list[tuple[int, slice, slice]]:
  """Returns the index of each head in a block [1, N, heads * d]."""
  return [
      (0, slice(None), slice(start, start + head_dim))
      for start in range(0, ref.shape[-1], head_dim)
  ]


def _scale(q: jax.Array) -> jax.Array:
  return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
  """Contracts one dimension of each matrix, float32."""
  return jax.lax.dot_general(
      x, y, (((x_axis,), (y_axis,)), ((), ())),
      precision=jax.lax.Precision.DEFAULT,
      preferred_element_type=jnp.float32,
  )


def _is_earlier(
    logits: jax.Array, key_axis: int, query_axis: int
) -> jax.Array:
  keys, queries = (
      jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis)
      for axis in (key_axis, query_axis)
  )
  return keys <= queries


def group_width(length: int, width: int, head_dim: int) -> int:
  """Returns the number of channels of a block, a divisor of the width.

  A block has whole heads, and a multiple of 128 channels or the whole width, as
  TPUs require.

  Args:
    length: tokens.
    width: channels of the heads of one device.
    head_dim: channels per head.
  """
  step = math.lcm(head_dim, _LANES)
  wanted = _MIN_LOGITS / length**2 * head_dim
  return next(
      (
          group
          for group in range(step, width, step)
          if width % group == 0 and group >= wanted
      ),
      width,
  )


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
