"""The transformer of generators: blocks, conditioning, final norm."""

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.generators import architecture as architectures
from fsq_jax.generators import attention
from fsq_jax.generators import dense
from fsq_jax.generators import positions
from fsq_jax.models import remat
from fsq_jax.runtime import partitioning

_EPSILON = 1e-6


class Mlp(nn.Module):
  """SwiGLU, (silu(x W_gate) * x W_in) W_out, or a GELU MLP."""

  architecture: architectures.Architecture

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Transforms each of the [B, N, w] tokens; returns the same shape."""
    a = self.architecture
    hidden = dense.block_dense(a, a.mlp_dim, 'in', tensor_axis=1)(x)
    if a.mlp == 'swiglu':
      gate = dense.block_dense(a, a.mlp_dim, 'gate', tensor_axis=1)(x)
      hidden *= nn.silu(gate)
    else:
      hidden = nn.gelu(hidden)
    hidden = partitioning.constrain(hidden, tensor_axis=2)
    return dense.block_dense(
        a, a.width, 'out', tensor_axis=0, width=a.mlp_dim,
        scale=(2 * a.depth) ** -0.5,
    )(hidden)


class Norm(nn.Module):
  """RMSNorm or LayerNorm in float32, modulated by adaLN where given."""

  architecture: architectures.Architecture

  @nn.compact
  def __call__(
      self, x: jax.Array, modulation: tuple[jax.Array, jax.Array] | None
  ) -> jax.Array:
    """Normalizes tokens.

    Args:
      x: [B, N, w].
      modulation: shift and scale, [B, 1, w] each, which replace the learned
        gain and bias; None without adaLN.

    Returns:
      [B, N, w] in the dtype of the architecture.
    """
    a = self.architecture
    options = {
        'epsilon': _EPSILON,
        'dtype': jnp.float32,
        'use_scale': modulation is None,
        'name': 'norm',
    }
    if a.norm == 'rms':
      norm = nn.RMSNorm(**options)
    else:
      norm = nn.LayerNorm(use_bias=modulation is None, **options)
    y = norm(x.astype(jnp.float32))
    if modulation is not None:
      shift, scale = modulation
      y = y * (1 + scale) + shift
    return y.astype(a.dtype)


class Block(nn.Module):
  """Pre-norm transformer block, in the form that nn.scan iterates.

  With adaLN-zero (arXiv 2212.09748) the condition gives shift, scale and gate
  of both branches; the gates start at 0.
  """

  architecture: architectures.Architecture
  train: bool

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      cache: attention.Cache | None,
      condition: jax.Array | None,
      rotation: positions.Rotation | None,
      position: jax.Array | None,
  ) -> tuple[jax.Array, attention.Cache | None]:
    """Transforms tokens; arguments as in `Trunk` and `Attention`."""
    a = self.architecture
    modulations, gates = [None, None], [1.0, 1.0]
    if condition is not None:
      parts = _modulation(condition, 6)
      modulations = [(parts[0], parts[1]), (parts[3], parts[4])]
      gates = [parts[2].astype(a.dtype), parts[5].astype(a.dtype)]
    dropout = nn.Dropout(a.dropout, deterministic=not self.train)
    x = partitioning.constrain(x)
    y = Norm(a, name='attention_norm')(x, modulations[0])
    y, cache = attention.Attention(a, name='attention')(
        y, cache, rotation, position
    )
    x = partitioning.constrain(x + gates[0] * dropout(y))
    y = Norm(a, name='mlp_norm')(x, modulations[1])
    x = x + gates[1] * dropout(Mlp(a, name='mlp')(y))
    return partitioning.constrain(x), cache


class Trunk(nn.Module):
  """A stack of blocks under nn.scan, then a norm.

  Parameters of the blocks are stacked along a leading axis of length depth.
  """

  architecture: architectures.Architecture

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      *,
      condition: jax.Array | None,
      rotation: positions.Rotation | None,
      cache: attention.Cache | None = None,
      position: jax.Array | None = None,
      train: bool = False,
  ) -> tuple[jax.Array, attention.Cache | None]:
    """Transforms a sequence, or its next token with a cache.

    Args:
      x: [B, N, w] embeddings; N is 1 with a cache.
      condition: [B, w] float32 with adaLN, else None.
      rotation: RoPE of the positions of x, else None.
      cache: [depth, ...] keys and values of earlier positions, or None.
      position: int32 scalar, the position of x with a cache, else None.
      train: whether dropout is applied (rng 'dropout').

    Returns:
      [B, N, w] normalized features in the dtype of the architecture, and the
      cache with x added.
    """
    a = self.architecture
    blocks = nn.scan(
        remat.apply_remat(Block, a.remat, prevent_cse=False),
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        out_axes=0,
        length=a.depth,
        unroll=min(a.scan_unroll, a.depth),
    )
    x, cache = blocks(a, train, name='blocks')(
        x.astype(a.dtype), cache, condition, rotation, position
    )
    modulation = None
    if condition is not None:
      modulation = tuple(_modulation(condition, 2))
    return Norm(a, name='final_norm')(x, modulation), cache


def _modulation(condition: jax.Array, count: int) -> list[jax.Array]:
  """Returns `count` zero-initialized linear maps [B, 1, w] of a condition."""
  values = nn.Dense(
      count * condition.shape[-1],
      kernel_init=nn.initializers.zeros,
      dtype=jnp.float32,
      name='modulation',
  )(nn.silu(condition))
  return list(rearrange(values, 'b (c w) -> c b 1 w', c=count))
