"""Device mesh, shardings of the batch, and rules that shard parameters."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

from absl import logging
import jax
import numpy as np

AXES = ('data', 'fsdp')
Strategy = str | Sequence[str | None]


def create_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Arranges devices in a mesh with the axes 'data' and 'fsdp'.

  Args:
    sizes: devices along each axis; at most one -1 takes all that are left.
    devices: devices to use; all of them by default.

  Returns:
    The mesh; the compiler chooses shardings that the program does not state.

  Raises:
    ValueError: other axes, or sizes that do not multiply to the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  if set(sizes) != set(AXES):
    raise ValueError(
        f'partitioning.mesh has the axes {sorted(sizes)}; give sizes for'
        f' {sorted(AXES)}.'
    )
  shape = [sizes[axis] for axis in AXES]
  if shape.count(-1) == 1:
    rest = int(np.prod([size for size in shape if size != -1]))
    shape[shape.index(-1)] = len(devices) // max(rest, 1)
  if min(shape) < 1 or np.prod(shape) != len(devices):
    raise ValueError(
        f'partitioning.mesh is {dict(sizes)}, which does not fill'
        f' {len(devices)} devices; sizes must multiply to the number of'
        ' devices, and one of them may be -1.'
    )
  axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(
      tuple(shape), AXES, axis_types=axis_types, devices=devices
  )


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Sharding of an array that every device holds whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Sharding of a batch: its first axis over all axes of the mesh."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXES))


def shard_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Makes global arrays of the NumPy arrays that each process has read."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def tree_paths(tree: Any) -> Any:
  """Replaces every leaf by its path, such as 'encoder/patches/kernel'."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: jax.tree_util.keystr(path, simple=True, separator='/'),
      tree,
  )


def state_shardings(
    state: Any,
    mesh: jax.sharding.Mesh,
    rules: Sequence[tuple[str, Strategy]],
    fsdp_min_size: int,
) -> Any:
  """Chooses a sharding for every array of a train state.

  Args:
    state: a tree of arrays or `jax.ShapeDtypeStruct`.
    mesh: from `create_mesh`.
    rules: (regular expression, strategy); the first one whose expression is
      found in an array's path applies. The paths of optimizer state and
      averages end in those of their parameters, so they follow them. The
      strategies are 'replicate', 'fsdp' (the largest axis that the fsdp axis
      of the mesh divides) and a tuple with a mesh axis or None for each axis.
    fsdp_min_size: arrays with fewer elements stay whole under 'fsdp'.

  Returns:
    A tree of NamedShardings.

  Raises:
    ValueError: an array that no rule matches, or a rule that does not fit it.
  """

  def shard(path: str, array: Any) -> jax.sharding.NamedSharding:
    for pattern, strategy in rules:
      if re.search(pattern, path):
        spec = _partition(path, array, strategy, mesh, fsdp_min_size)
        return jax.sharding.NamedSharding(mesh, spec)
    raise ValueError(
        f'partitioning.rules match nothing in {path!r}; end them with'
        " ('.*', 'replicate')."
    )

  return jax.tree.map(shard, tree_paths(state), state)


def _partition(
    path: str,
    array: Any,
    strategy: Strategy,
    mesh: jax.sharding.Mesh,
    fsdp_min_size: int,
) -> jax.sharding.PartitionSpec:
  if strategy == 'replicate' or array.ndim == 0:
    return jax.sharding.PartitionSpec()
  if strategy == 'fsdp':
    return _partition_fsdp(path, array, mesh.shape['fsdp'], fsdp_min_size)
  if isinstance(strategy, str):
    raise ValueError(
        f'partitioning.rules has the strategy {strategy!r}; known:'
        " ['fsdp', 'replicate'] or a tuple of axis names."
    )
  if len(strategy) != array.ndim or any(
      axis is not None and size % mesh.shape.get(axis, size + 1)
      for axis, size in zip(strategy, array.shape, strict=False)
  ):
    raise ValueError(
        f'partitioning.rules gives {tuple(strategy)} to {path!r} of shape'
        f' {array.shape} on the mesh {dict(mesh.shape)}; give one axis name or'
        ' None for each axis, and only names that divide it.'
    )
  return jax.sharding.PartitionSpec(*strategy)


def _partition_fsdp(
    path: str, array: Any, num_shards: int, min_size: int
) -> jax.sharding.PartitionSpec:
  if num_shards == 1 or array.size < min_size:
    return jax.sharding.PartitionSpec()
  fitting = [n for n in array.shape if n % num_shards == 0]
  if not fitting:
    logging.warning(
        '%s of shape %s stays whole: %d shards divide none of its axes.',
        path, array.shape, num_shards,
    )
    return jax.sharding.PartitionSpec()
  # The last of several equally large axes: the rows of memory stay whole.
  axis = max(i for i, n in enumerate(array.shape) if n == max(fitting))
  spec = [None] * array.ndim
  spec[axis] = 'fsdp'
  return jax.sharding.PartitionSpec(*spec)
