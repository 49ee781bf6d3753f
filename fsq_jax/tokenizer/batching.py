"""Functions of a batch, applied to any number of images."""

from collections.abc import Callable, Iterator
import math
import numbers
from typing import Any

from einops import rearrange
import jax
import numpy as np

from fsq_jax.runtime import partitioning


class Batcher:
  """Applies compiled functions to arrays of any length, in few shapes.

  These are batches of `batch_size`, the last one filled up with zeros; an array
  that is shorter is filled up to the next power of 2.
  """

  def __init__(self, mesh: jax.sharding.Mesh, batch_size: int):
    """Takes the devices.

    Args:
      mesh: from `partitioning.create_mesh`, of devices of this process.
      batch_size: elements that devices take together, at most; rounded up to
        what they divide.

    Raises:
      ValueError: no batch, or devices of other processes.
    """
    if (
        not isinstance(batch_size, numbers.Integral)
        or isinstance(batch_size, bool)
        or batch_size < 1
    ):
      raise ValueError(
          f'batch_size is {batch_size!r}; use an integer, 1 or more.'
      )
    if any(d.process_index != jax.process_index() for d in mesh.devices.flat):
      raise ValueError(
          'The mesh has devices of other processes; every process takes images'
          ' of its own: create_mesh(sizes, jax.local_devices()).'
      )
    self._mesh = mesh
    self._share = math.prod(mesh.shape[x] for x in partitioning.BATCH_AXES)
    self._batch_size = math.ceil(batch_size / self._share) * self._share

  def map(
      self,
      function: Callable[..., jax.Array],
      variables: Any,
      x: np.ndarray,
      usual_size: tuple[int, int],
  ) -> np.ndarray:
    """Applies a function to the elements of an array.

    Args:
      function: of variables and a batch [b, ...] to [b, ...].
      variables: its first argument.
      x: [B, H, W, ...], with B at least 1.
      usual_size: H and W of what batch_size is meant for; of larger elements
        fewer are taken together.

    Returns:
      [B, ...].
    """
    results, pending = [], None
    ratio = math.prod(x.shape[1:3]) / math.prod(usual_size)
    shares = math.ceil(self._batch_size / self._share / max(ratio, 1.0))
    batch_size = shares * self._share
    for batch, num in self._batches(x, batch_size):
      result = function(variables, batch)
      # Fetches one while devices work on the next.
      if pending is not None:
        results.append(np.asarray(pending[0])[: pending[1]])
      pending = result, num
    results.append(np.asarray(pending[0])[: pending[1]])
    return results[0] if len(results) == 1 else np.concatenate(results)

  def map_tiles(
      self,
      function: Callable[..., jax.Array],
      variables: Any,
      x: np.ndarray,
      tile: tuple[int, int],
  ) -> np.ndarray:
    """Applies a function to each tile by itself.

    Args:
      function: of variables and tiles [b, *tile, ...] to [b, h, w, ...].
      variables: its first argument.
      x: [B, R * tile[0], C * tile[1], ...].
      tile: (height, width).

    Returns:
      [B, R * h, C * w, ...].
    """
    tiles = rearrange(
        x, 'b (r h) (c w) ... -> (b r c) h w ...', h=tile[0], w=tile[1]
    )
    return rearrange(
        self.map(function, variables, tiles, tile),
        '(b r c) h w ... -> b (r h) (c w) ...',
        b=len(x), r=x.shape[1] // tile[0],
    )

  def _batches(
      self, x: np.ndarray, batch_size: int
  ) -> Iterator[tuple[jax.Array, int]]:
    """Yields batches on the devices, and how many of each are not filling."""
    if len(x) < batch_size:
      shares = math.ceil(len(x) / self._share)
      power = 2 ** (shares - 1).bit_length()
      batch_size = min(batch_size, self._share * power)
    for start in range(0, len(x), batch_size):
      part = x[start : start + batch_size]
      filling = np.zeros((batch_size - len(part), *x.shape[1:]), x.dtype)
      batch = np.concatenate([part, filling]) if len(filling) else part
      yield partitioning.shard_batch(batch, self._mesh), len(part)
