"""Applies functions of a batch to arrays of any length, in few shapes."""

from collections.abc import Callable, Iterator
import math
import numbers
from typing import Any, Literal

from einops import rearrange
import jax
import numpy as np

from fsq_jax.runtime import partitioning


class Batcher:
  """Splits arrays into batches of few shapes and fills up the last batch."""

  def __init__(
      self,
      mesh: jax.sharding.Mesh,
      batch_size: int,
      *,
      fill: Literal['batch', 'none', 'power'] = 'power',
      split: bool = True,
      shared: bool = False,
  ):
    """Takes the devices.

    Args:
      mesh: from `partitioning.create_mesh`.
      batch_size: largest number of elements in a batch; with `split` rounded up
        to a multiple of the devices along the batch axes.
      fill: how the last batch is completed. 'batch': with zeros to
        `batch_size`. 'power': the same, but an array shorter than one batch
        only to the next power of 2. 'none': not at all, the rest is split into
        powers of 2 (without `split` only).
      split: whether batches are sharded over the batch axes, for meshes of this
        process's devices; otherwise they are replicated, and all processes pass
        the same arrays.
      shared: `split` for a mesh of the devices of all processes, which pass the
        same arrays to functions with replicated results.

    Raises:
      ValueError: an invalid batch size, or `split` over devices of other
        processes.
    """
    if (
        not isinstance(batch_size, numbers.Integral)
        or isinstance(batch_size, bool)
        or batch_size < 1
    ):
      raise ValueError(
          f'batch_size is {batch_size!r}; use an integer, 1 or more.'
      )
    self._fill = fill
    self._multiple = 1
    self._shared = shared
    self._sharding = partitioning.replicated(mesh)
    if split:
      if not shared and any(
          d.process_index != jax.process_index() for d in mesh.devices.flat
      ):
        raise ValueError(
            'The mesh has devices of other processes; every process takes'
            ' images of its own: create_mesh(sizes, jax.local_devices()).'
        )
      self._multiple = math.prod(mesh.shape[x] for x in partitioning.BATCH_AXES)
      self._sharding = partitioning.batch_sharding(mesh)
    self._batch_size = math.ceil(batch_size / self._multiple) * self._multiple

  def put(self, x: Any) -> Any:
    """Places arrays on the devices: sharded with `split`, else replicated."""

    def put(x: np.ndarray) -> jax.Array:
      if self._shared:
        return jax.make_array_from_callback(
            x.shape, self._sharding, x.__getitem__
        )
      return jax.make_array_from_process_local_data(self._sharding, x)

    return jax.tree.map(put, x)

  def map(
      self,
      function: Callable[[Any], Any],
      x: Any,
      usual_size: tuple[int, int] | None = None,
  ) -> Any:
    """Applies a function to the elements of arrays.

    Args:
      function: from a batch [b, ...] to a tree of arrays [b, ...].
      x: [B, ...], B at least 1, or a tree of such arrays.
      usual_size: (height, width) of the [H, W, ...] elements that `batch_size`
        is meant for; batches of larger elements have fewer.

    Returns:
      The tree of NumPy arrays [B, ...].
    """
    batch_size = self._batch_size
    if usual_size is not None:
      ratio = math.prod(x.shape[1:3]) / math.prod(usual_size)
      parts = math.ceil(batch_size / self._multiple / max(ratio, 1.0))
      batch_size = parts * self._multiple
    results = self._apply(
        function,
        len(jax.tree.leaves(x)[0]),
        lambda part: jax.tree.map(lambda y: y[part], x),
        batch_size,
    )
    first, *rest = (result for _, result in results)
    if not rest:
      return first
    return jax.tree.map(lambda *y: np.concatenate(y), first, *rest)

  def map_tiles(
      self,
      function: Callable[[jax.Array], Any],
      x: np.ndarray,
      tile: tuple[int, int],
  ) -> Any:
    """Applies a function to each tile independently.

    Results are written straight into the output, without another copy of large
    images.

    Args:
      function: from tiles [b, *tile, ...] to a tree of arrays [b, h, w, ...],
        or [b] for one value per tile.
      x: [B, R * tile[0], C * tile[1], ...].
      tile: (height, width).

    Returns:
      The tree of NumPy arrays [B, R * h, C * w, ...], or [B * R * C].
    """
    if x.shape[1:3] == tuple(tile):
      return self.map(function, x)
    grid = len(x), x.shape[1] // tile[0], x.shape[2] // tile[1]
    tiles = rearrange(
        x, 'b (r h) (c w) ... -> b r h c w ...', h=tile[0], w=tile[1]
    )
    batch, row, column = np.unravel_index(np.arange(math.prod(grid)), grid)

    def at(part: slice) -> tuple[np.ndarray | slice, ...]:
      return batch[part], row[part], slice(None), column[part]

    def allocate(y: np.ndarray) -> np.ndarray:
      if y.ndim < 3:
        return np.empty((math.prod(grid), *y.shape[1:]), y.dtype)
      shape = *grid[:2], y.shape[1], grid[2], *y.shape[2:]
      return np.empty(shape, y.dtype)

    outputs = None
    for part, results in self._apply(
        function, math.prod(grid), lambda part: tiles[at(part)],
        self._batch_size,
    ):
      if outputs is None:
        outputs = jax.tree.map(allocate, results)
      for output, y in zip(
          jax.tree.leaves(outputs), jax.tree.leaves(results), strict=True
      ):
        output[part if y.ndim < 3 else at(part)] = y
    return jax.tree.map(
        lambda y: (
            y
            if y.ndim < 5
            else rearrange(y, 'b r h c w ... -> b (r h) (c w) ...')
        ),
        outputs,
    )

  def _apply(
      self,
      function: Callable[[Any], Any],
      num: int,
      take: Callable[[slice], Any],
      batch_size: int,
  ) -> Iterator[tuple[slice, Any]]:
    """Yields the result of each batch with the slice of its elements."""

    def fetch(part: slice, result: Any) -> tuple[slice, Any]:
      length = part.stop - part.start
      return part, jax.tree.map(lambda y: np.asarray(y)[:length], result)

    pending, start = None, 0
    for size in self._sizes(num, batch_size):
      part = slice(start, min(start + size, num))
      batch = jax.tree.map(lambda y, size=size: fill(y, size), take(part))
      result = function(self.put(batch))
      # Fetched while the devices compute the next batch.
      if pending is not None:
        yield fetch(*pending)
      pending, start = (part, result), part.stop
    yield fetch(*pending)

  def _sizes(self, num: int, batch_size: int) -> list[int]:
    """Returns the sizes of the batches of `num` elements."""
    if self._fill == 'none':
      sizes = []
      while num:
        sizes.append(min(batch_size, 2 ** (num.bit_length() - 1)))
        num -= sizes[-1]
      return sizes
    if self._fill == 'power' and num < batch_size:
      parts = math.ceil(num / self._multiple)
      power = 2 ** (parts - 1).bit_length()
      batch_size = min(batch_size, self._multiple * power)
    return [batch_size] * math.ceil(num / batch_size)


def fill(x: np.ndarray, size: int) -> np.ndarray:
  """Returns [size, ...], the array with zeros behind its elements."""
  if len(x) == size:
    return x
  zeros = np.zeros((size - len(x), *x.shape[1:]), x.dtype)
  return np.concatenate([x, zeros])
