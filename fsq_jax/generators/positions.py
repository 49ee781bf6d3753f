"""2-D rotary position embedding (RoPE) with identity rows for prefix tokens."""

from typing import NamedTuple

from einops import rearrange
import jax
from jax import numpy as jnp
import numpy as np

_BASE = 10_000.0


class Rotation(NamedTuple):
  """Cosines and sines, float32 [N, d / 2], one row per sequence position."""

  cos: jax.Array
  sin: jax.Array

  def at(self, position: jax.Array) -> 'Rotation':
    """Returns the single row [1, d / 2] of a position, an int32 scalar."""
    return Rotation(
        *(jax.lax.dynamic_slice_in_dim(x, position, 1) for x in self)
    )


def axial_rotation(
    grid: tuple[int, int], head_dim: int, num_prefix: int
) -> Rotation:
  """Returns the rotation of prefix tokens followed by a grid in raster order.

  The first half of the channel pairs rotates by the row, the second half by the
  column, with frequencies 10000^(-i / (d / 4)), as in LlamaGen
  (github.com/FoundationVision/LlamaGen, autoregressive/models/gpt.py). Prefix
  tokens have the identity (cos 1, sin 0), where LlamaGen has zeros, which erase
  their queries and keys.

  Args:
    grid: (rows, columns).
    head_dim: channels per head, d, a multiple of 4.
    num_prefix: tokens in front of the grid.

  Returns:
    Rotation of num_prefix + rows * columns positions, computed in float64.
  """
  frequencies = _BASE ** -(np.arange(head_dim // 4) / (head_dim / 4))
  rows, columns = (x.reshape(-1, 1) for x in np.mgrid[: grid[0], : grid[1]])
  angles = np.concatenate([rows * frequencies, columns * frequencies], axis=-1)
  angles = np.pad(angles, ((num_prefix, 0), (0, 0)))
  return Rotation(
      np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
  )


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
  """Rotates consecutive channel pairs of queries or keys.

  Args:
    x: [B, heads, N, d], any float dtype.
    rotation: of N positions.

  Returns:
    Rotated x, same shape and dtype; computed in float32.
  """
  pairs = rearrange(x.astype(jnp.float32), 'b h n (p t) -> t b h n p', t=2)
  even, odd = pairs[0], pairs[1]
  rotated = jnp.stack([
      even * rotation.cos - odd * rotation.sin,
      even * rotation.sin + odd * rotation.cos,
  ])
  return rearrange(rotated, 't b h n p -> b h n (p t)').astype(x.dtype)
