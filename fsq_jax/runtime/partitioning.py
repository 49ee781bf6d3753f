"""Device mesh, shardings of the batch, and rules that shard parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import contextvars
import functools
import itertools
import math
import re
from typing import Any, NamedTuple

from einops import rearrange
import jax

from fsq_jax.runtime import parameter_paths

AXES = ('data', 'fsdp', 'tensor')
# Axes that shard the batch; devices along 'tensor' share its images.
BATCH_AXES = ('data', 'fsdp')
STRATEGIES = ('column', 'fsdp', 'replicate', 'row')
Strategy = str | Sequence[str | None]
# Whether `constrain` and its like have an effect; see `no_mesh`.
_is_constrained = contextvars.ContextVar('_is_constrained', default=True)


class DataShard(NamedTuple):
  """The part of each batch that a process reads.

  The fields are arguments of `data.build_dataset`.

  Attributes:
    process_index: number of the part.
    process_count: number of parts, all of the same size.
  """

  process_index: int
  process_count: int


def create_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Arranges devices in a mesh with the axes 'data', 'fsdp' and 'tensor'.

  Args:
    sizes: devices along each axis; at most one -1 takes all that are left.
      'tensor' may be left out, for 1.
    devices: devices to use; all of them by default.

  Returns:
    The mesh; the compiler chooses all shardings that nothing constrains.

  Raises:
    ValueError: other axes, or sizes that do not multiply to the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = {'tensor': 1, **sizes}
  if set(sizes) != set(AXES):
    raise ValueError(
        f'partitioning.mesh has the axes {sorted(sizes)}; give sizes for'
        f' {sorted(AXES)}.'
    )
  shape = [sizes[axis] for axis in AXES]
  if shape.count(-1) == 1:
    rest = math.prod(size for size in shape if size != -1)
    shape[shape.index(-1)] = len(devices) // max(rest, 1)
  if min(shape) < 1 or math.prod(shape) != len(devices):
    raise ValueError(
        f'partitioning.mesh is {dict(sizes)}, which does not fill'
        f' {len(devices)} devices; sizes must multiply to the number of'
        ' devices, and one of them may be -1.'
    )
  axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(
      tuple(shape), AXES, axis_types=axis_types, devices=devices
  )


def create_local_mesh() -> jax.sharding.Mesh:
  """Returns the mesh of this process's devices, along 'data'."""
  return create_mesh({'data': -1, 'fsdp': 1}, jax.local_devices())


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Sharding of an array that is replicated on every device."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Sharding of a batch: its first dimension over 'data' and 'fsdp'."""
  return jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(BATCH_AXES)
  )


def data_shard(mesh: jax.sharding.Mesh) -> DataShard:
  """Returns the part of each batch that this process reads.

  Processes along 'tensor' have devices for the same images and read the same.

  Args:
    mesh: from `create_mesh`, with the devices of all processes.

  Returns:
    The data shard, numbered in the order of the batch on the mesh.

  Raises:
    ValueError: the parts of two processes overlap or differ in size; raised in
      every process.
  """
  parts = {}
  for i, devices in enumerate(rearrange(mesh.devices, 'd f t -> (d f) t')):
    for device in devices:
      parts.setdefault(device.process_index, set()).add(i)
  # Among processes with the same images, the first one.
  firsts = {}
  for process in sorted(parts):
    firsts.setdefault(frozenset(parts[process]), process)
  shards = sorted(firsts, key=min)
  for a, b in itertools.combinations(shards, 2):
    if a & b or len(a) != len(b):
      raise ValueError(
          f'partitioning.mesh is {dict(mesh.shape)}: process {firsts[a]} has to'
          f' read the parts {sorted(a)} of a batch and process {firsts[b]}'
          f' {sorted(b)}; allowed: the same parts, or as many others. Give'
          ' every process the same number of devices, and make tensor a divisor'
          ' or a multiple of that number.'
      )
  return DataShard(shards.index(parts[jax.process_index()]), len(shards))


def shard_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Makes global arrays of the NumPy arrays that each process has read.

  Args:
    batch: tree of arrays [b, ...], the `data_shard` of this process.
    mesh: from `create_mesh`.

  Returns:
    Tree of arrays [B, ...] with `batch_sharding`.
  """
  sharding = batch_sharding(mesh)
  is_cpu = mesh.devices.flat[0].platform == 'cpu'
  if is_cpu and mesh.size == 1:
    batch = _copy_to(sharding)(batch)
  else:
    batch = jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )
  if is_cpu:
    # With arguments that are not ready, a computation on the CPU is executed
    # by another thread, see `host.keep_freed_memory`.
    jax.block_until_ready(batch)
  return batch


@functools.cache
def _copy_to(sharding: jax.sharding.Sharding) -> Callable[[Any], Any]:
  """Returns a function that copies arrays to one device of this process.

  A compiled call places its arguments in C++; `jax.device_put` does it in
  Python, which takes longer between two steps, with cold caches. Each shape is
  compiled once.
  """

  def batch(x: Any) -> Any:
    return x

  return jax.jit(batch, in_shardings=sharding, out_shardings=sharding)


def constrain(x: jax.Array, tensor_axis: int | None = None) -> jax.Array:
  """Constrains activations to be sharded over the batch axes of their mesh.

  The mesh is a property of the array: JAX carries it from the arguments of a
  compiled function to everything computed from them (constants have none, so
  that an array made of constants alone is not constrained). Without it,
  sharded parameters let the compiler shard the channels and gather the batch,
  which multiplies the memory by the number of devices.

  Args:
    x: [B, ...] activations.
    tensor_axis: dimension to shard over 'tensor', such as the heads.

  Returns:
    x, unconstrained if it is on no mesh of `create_mesh`, if the devices do not
    divide the batch, and under `no_mesh`.
  """
  return _constrain(x, BATCH_AXES, tensor_axis)


def gather_parameter(
    x: jax.Array, tensor_axis: int | None = None
) -> jax.Array:
  """All-gathers a parameter over 'fsdp' before use.

  Otherwise the compiler may use a parameter that 'fsdp' shards shard by shard
  as they arrive, and read all activations again for each: more memory traffic
  than the parameter is large.

  Args:
    x: parameter of any shape.
    tensor_axis: dimension that stays sharded over 'tensor'.

  Returns:
    x, unconstrained in the same cases as by `constrain`.
  """
  return _constrain(x, (), tensor_axis)


def gather(tree: Any) -> Any:
  """Replicates the parameters of a small network on every device."""
  return jax.tree.map(gather_parameter, tree)


def shard_over_all_axes(x: jax.Array) -> jax.Array:
  """Shards [B, ...] images over every mesh axis, 'tensor' included.

  For networks whose parameters are replicated: otherwise the devices along
  'tensor' would repeat the same work. Apply such a network under `no_mesh`.
  """
  return _constrain(x, AXES, None)


def find_mesh(x: jax.Array) -> jax.sharding.AbstractMesh | None:
  """Returns the mesh of `create_mesh` that an array is on; None without one."""
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty:
    mesh = jax.sharding.get_abstract_mesh()
  return mesh if mesh.axis_names == AXES else None


def is_on_gpu(x: jax.Array) -> bool:
  """Whether an array is on a mesh of `create_mesh` whose devices are GPUs."""
  mesh = find_mesh(x)
  device = None if mesh is None else mesh.abstract_device
  return device is not None and device.platform.lower() in ('cuda', 'gpu')


def activation_sharding(
    x: jax.Array, tensor_axis: int
) -> jax.sharding.NamedSharding | None:
  """Returns the sharding that activations of a mesh have in `jax.shard_map`.

  Args:
    x: [B, ...] activations.
    tensor_axis: dimension to shard over 'tensor', such as the heads.

  Returns:
    The sharding that `constrain` gives x, under `no_mesh` the sharding of
    `shard_over_all_axes`, with None for the other dimensions. None if x is on
    no mesh of `create_mesh`, or the devices do not divide the batch.
  """
  mesh = find_mesh(x)
  if mesh is None or set(mesh.axis_types) != {jax.sharding.AxisType.Auto}:
    return None
  choices = [(BATCH_AXES, tensor_axis)]
  if not _is_constrained.get():
    choices = [(AXES, None), (BATCH_AXES, None)]
  for batch_axes, axis in choices:
    sharding = _sharding_on(mesh, x, batch_axes, axis)
    if sharding is not None:
      return sharding
  return None


@contextlib.contextmanager
def no_mesh() -> Iterator[None]:
  """Context without effect of `constrain` and the functions like it."""
  token = _is_constrained.set(False)
  try:
    yield
  finally:
    _is_constrained.reset(token)


def state_shardings(
    state: Any,
    mesh: jax.sharding.Mesh,
    rules: Sequence[tuple[str, Strategy]],
    fsdp_min_size: int,
) -> Any:
  """Chooses the sharding of every array of a train state by rules.

  Args:
    state: a tree of arrays or `jax.ShapeDtypeStruct`.
    mesh: from `create_mesh`.
    rules: (regular expression, strategy) pairs; the first expression found in
      the path of an array decides. Paths of optimizer state and EMA end in the
      paths of their parameters, so they are sharded alike. Strategies:
      'replicate'; 'fsdp': the largest dimension that the fsdp axis of the mesh
      divides; 'column' and 'row': the last and the second-last dimension over
      'tensor', and the largest other one as under 'fsdp'; or a tuple with a
      mesh axis or None for each dimension.
    fsdp_min_size: arrays with fewer elements are not sharded over 'fsdp'.

  Returns:
    A tree of NamedShardings.

  Raises:
    ValueError: no rule matches an array, or the rule does not fit it.
  """

  def shard(path: str, array: Any) -> jax.sharding.NamedSharding:
    axes, _ = _partition(path, array, rules, mesh, fsdp_min_size)
    while axes and axes[-1] is None:
      axes = axes[:-1]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

  return jax.tree.map(shard, parameter_paths.tree_paths(state), state)


def place_abstract(
    state: Any,
    mesh: jax.sharding.Mesh,
    rules: Sequence[tuple[str, Strategy]],
    fsdp_min_size: int,
) -> Any:
  """Returns a tree of `jax.ShapeDtypeStruct` with its `state_shardings`."""
  shardings = state_shardings(state, mesh, rules, fsdp_min_size)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state, shardings,
  )


def list_replicated(
    state: Any,
    mesh: jax.sharding.Mesh,
    rules: Sequence[tuple[str, Strategy]],
    fsdp_min_size: int,
) -> dict[str, int]:
  """Lists arrays that stay replicated because no mesh axis divides them.

  Takes the arguments of `state_shardings`.

  Returns:
    Path and shape, such as 'quantizer/codebook (3, 5)', to bytes.
  """
  paths = jax.tree.leaves(parameter_paths.tree_paths(state))
  return {
      f'{path} {x.shape}': x.size * x.dtype.itemsize
      for path, x in zip(paths, jax.tree.leaves(state), strict=True)
      if _partition(path, x, rules, mesh, fsdp_min_size)[1]
  }


def _constrain(
    x: jax.Array, batch_axes: tuple[str, ...], tensor_axis: int | None
) -> jax.Array:
  """Constrains the first dimension, the tensor axis and no other one."""
  mesh = find_mesh(x)
  if mesh is None or not _is_constrained.get():
    return x
  sharding = _sharding_on(mesh, x, batch_axes, tensor_axis)
  if sharding is None:
    return x
  return jax.lax.with_sharding_constraint(x, sharding)


def _sharding_on(
    mesh: jax.sharding.AbstractMesh,
    x: jax.Array,
    batch_axes: tuple[str, ...],
    tensor_axis: int | None,
) -> jax.sharding.NamedSharding | None:
  """Shards the first dimension and the tensor axis; None if it is not even."""
  axes: list[Any] = [None] * x.ndim
  if batch_axes:
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in batch_axes):
      return None
    axes[0] = batch_axes
  if tensor_axis is not None and not (
      x.shape[tensor_axis] % mesh.shape['tensor']
  ):
    axes[tensor_axis] = 'tensor'
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def _partition(
    path: str,
    array: Any,
    rules: Sequence[tuple[str, Strategy]],
    mesh: jax.sharding.Mesh,
    min_size: int,
) -> tuple[list[str | None], bool]:
  """Returns the mesh axis of each dimension, and whether one did not divide."""
  strategy = next((s for rule, s in rules if re.search(rule, path)), None)
  if strategy is None:
    raise ValueError(
        f'partitioning.rules match nothing in {path!r}; end them with'
        " ('.*', 'replicate')."
    )
  axes: list[str | None] = [None] * array.ndim
  if strategy == 'replicate' or array.ndim == 0:
    return axes, False
  if not isinstance(strategy, str):
    _check_axes(path, array, strategy, mesh)
    return list(strategy), False
  if strategy not in STRATEGIES:
    raise ValueError(
        f'partitioning.rules has the strategy {strategy!r}; known:'
        f' {list(STRATEGIES)} or a tuple of axis names.'
    )
  missed = False
  split = {'column': -1, 'row': -2}.get(strategy)
  if split is not None and mesh.shape['tensor'] > 1:
    missed = (
        -split > array.ndim or array.shape[split] % mesh.shape['tensor'] > 0
    )
    if not missed:
      axes[split] = 'tensor'
  missed |= _split_fsdp(axes, array, mesh.shape['fsdp'], min_size)
  return axes, missed


def _check_axes(
    path: str,
    array: Any,
    axes: Sequence[str | None],
    mesh: jax.sharding.Mesh,
) -> None:
  """Raises a ValueError if axes named by a rule do not fit an array."""
  if len(axes) != array.ndim or any(
      axis is not None and size % mesh.shape.get(axis, size + 1)
      for axis, size in zip(axes, array.shape, strict=False)
  ):
    raise ValueError(
        f'partitioning.rules gives {tuple(axes)} to {path!r} of shape'
        f' {array.shape} on the mesh {dict(mesh.shape)}; give one axis name or'
        ' None for each axis, and only names that divide it.'
    )


def _split_fsdp(
    axes: list[str | None], array: Any, num_shards: int, min_size: int
) -> bool:
  """Gives 'fsdp' a free dimension; returns whether it divides none."""
  if num_shards == 1 or array.size < min_size:
    return False
  fitting = [
      (size, i)
      for i, size in enumerate(array.shape)
      if axes[i] is None and size % num_shards == 0
  ]
  if not fitting:
    return True
  # Of equally large dimensions the last one.
  axes[max(fitting)[1]] = 'fsdp'
  return False
