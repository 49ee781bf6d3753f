"""Device mesh, shardings of the batch, and rules that shard parameters."""

from collections.abc import Mapping, Sequence
import contextlib
import itertools
import math
import re
from typing import Any, NamedTuple

from einops import rearrange
import jax

from fsq_jax.runtime import parameter_paths

AXES = ('data', 'fsdp', 'tensor')
# Those that the batch is split over; along 'tensor' devices share its images.
BATCH_AXES = ('data', 'fsdp')
STRATEGIES = ('column', 'fsdp', 'replicate', 'row')
Strategy = str | Sequence[str | None]


class Share(NamedTuple):
  """What a process reads of each batch: part `index` of `count` equal ones."""

  index: int
  count: int


def create_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Arranges devices in a mesh with the axes 'data', 'fsdp' and 'tensor'.

  Args:
    sizes: devices along each axis; at most one -1 takes all that are left.
      'tensor' may be left out, for 1.
    devices: devices to use; all of them by default.

  Returns:
    The mesh; the compiler chooses shardings that the program does not state.

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


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Sharding of an array that every device holds whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Sharding of a batch: its first axis over 'data' and 'fsdp'."""
  return jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(BATCH_AXES)
  )


def process_share(mesh: jax.sharding.Mesh) -> Share:
  """Tells which part of each batch this process has to read.

  Processes along 'tensor' have devices for the same images, and read the same.

  Args:
    mesh: from `create_mesh`, of the devices of all processes.

  Returns:
    The share, in the order of a batch's parts on the mesh.

  Raises:
    ValueError: two processes for parts of a batch that overlap, or that differ
      in size; every process raises it.
  """
  parts = {}
  for i, devices in enumerate(rearrange(mesh.devices, 'd f t -> (d f) t')):
    for device in devices:
      parts.setdefault(device.process_index, set()).add(i)
  # Of processes with the same images, the first.
  firsts = {}
  for process in sorted(parts):
    firsts.setdefault(frozenset(parts[process]), process)
  shares = sorted(firsts, key=min)
  for a, b in itertools.combinations(shares, 2):
    if a & b or len(a) != len(b):
      raise ValueError(
          f'partitioning.mesh is {dict(mesh.shape)}, which cuts a batch into'
          f' parts of which process {firsts[a]} has to read {sorted(a)} and'
          f' process {firsts[b]} {sorted(b)}; allowed are the same ones, or as'
          ' many others. Give every process as many devices, and make tensor'
          ' a divisor or a multiple of that number.'
      )
  return Share(shares.index(parts[jax.process_index()]), len(shares))


def shard_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Makes global arrays of the NumPy arrays that each process has read.

  Args:
    batch: tree of arrays [b, ...], this process's `process_share` of a batch.
    mesh: from `create_mesh`.

  Returns:
    Tree of arrays [B, ...], split as in `batch_sharding`.
  """
  sharding = batch_sharding(mesh)
  return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def mesh_of(x: jax.Array) -> contextlib.AbstractContextManager[Any]:
  """Makes the mesh of a traced argument that of `constrain`.

  Args:
    x: an argument of a function under jit.

  Returns:
    A context; it does nothing if x is on one device.
  """
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty:
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(mesh)


def constrain(x: jax.Array, tensor_axis: int | None = None) -> jax.Array:
  """States how activations are spread over the devices.

  Where parameters are split, the compiler would else be free to split channels
  and to gather the batch, which takes more memory by the number of devices.

  Args:
    x: [B, ...] activations.
    tensor_axis: the axis that 'tensor' splits, such as that of heads.

  Returns:
    x; nothing is stated outside of `mesh_of`, and of a batch that the devices
    do not divide.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if x.shape[0] % math.prod(mesh.shape.get(a, 1) for a in BATCH_AXES):
    return x
  return _constrain(x, {0: BATCH_AXES}, tensor_axis)


def gather_parameter(
    x: jax.Array, tensor_axis: int | None = None
) -> jax.Array:
  """States that a parameter is whole where it is used, but for 'tensor'.

  Where 'fsdp' splits it, the compiler would else use it piece by piece as the
  pieces arrive, and read all activations again for each: more memory traffic
  than a kernel is large.

  Args:
    x: of any shape.
    tensor_axis: as in `constrain`.

  Returns:
    x; nothing is stated outside of `mesh_of`.
  """
  return _constrain(x, {}, tensor_axis)


def gather(tree: Any) -> Any:
  """Returns the parameters of a small network, whole on every device."""
  return jax.tree.map(gather_parameter, tree)


def spread(x: jax.Array) -> jax.Array:
  """Spreads [B, ...] images over all devices, those along 'tensor' too.

  For networks of which every device has all parameters: without, the devices
  along 'tensor' would do the same work. In such a network `constrain` has to be
  of no effect, see `no_mesh`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if x.shape[0] % math.prod(mesh.shape.values()):
    return x
  return _constrain(x, {0: AXES}, None)


def no_mesh() -> contextlib.AbstractContextManager[Any]:
  """A context in which `constrain` and the like state nothing."""
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


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
      strategies are 'replicate'; 'fsdp', the largest axis that the fsdp axis
      of the mesh divides; 'column' and 'row', the last axis and the one before
      it over 'tensor', and the largest other one as under 'fsdp'; and a tuple
      with a mesh axis or None for each axis.
    fsdp_min_size: arrays with fewer elements are not split over 'fsdp'.

  Returns:
    A tree of NamedShardings.

  Raises:
    ValueError: an array that no rule matches, or a rule that does not fit it.
  """
  return _place(state, mesh, rules, fsdp_min_size)[0]


def place_abstract(
    state: Any,
    mesh: jax.sharding.Mesh,
    rules: Sequence[tuple[str, Strategy]],
    fsdp_min_size: int,
) -> Any:
  """Adds to shapes and dtypes the shardings of `state_shardings`.

  Args:
    state: a tree of `jax.ShapeDtypeStruct`.
    mesh: from `create_mesh`.
    rules: as in `state_shardings`.
    fsdp_min_size: as in `state_shardings`.

  Returns:
    The tree of `jax.ShapeDtypeStruct` with shardings.
  """
  shardings = state_shardings(state, mesh, rules, fsdp_min_size)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state, shardings,
  )


def list_whole(
    state: Any,
    mesh: jax.sharding.Mesh,
    rules: Sequence[tuple[str, Strategy]],
    fsdp_min_size: int,
) -> dict[str, int]:
  """Lists what stays whole although a rule would split it.

  Args:
    state: as in `state_shardings`, like all the others.
    mesh: of these.
    rules: of these.
    fsdp_min_size: of these.

  Returns:
    Path and shape, such as 'quantizer/codebook (3, 5)', to bytes.
  """
  return _place(state, mesh, rules, fsdp_min_size)[1]


def _constrain(
    x: jax.Array, axes: dict[int, Any], tensor_axis: int | None
) -> jax.Array:
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.axis_names != AXES:
    return x
  num_shards = mesh.shape['tensor']
  if tensor_axis is not None and not x.shape[tensor_axis] % num_shards:
    axes |= {tensor_axis: 'tensor'}
  spec = jax.sharding.PartitionSpec(*(axes.get(i) for i in range(x.ndim)))
  return jax.lax.with_sharding_constraint(x, spec)


def _place(state, mesh, rules, min_size) -> tuple[Any, dict[str, int]]:
  """Returns the shardings and what `list_whole` does."""
  whole = {}

  def shard(path: str, array: Any) -> jax.sharding.NamedSharding:
    for pattern, strategy in rules:
      if re.search(pattern, path):
        axes, missed = _partition(path, array, strategy, mesh, min_size)
        if missed:
          size = array.size * array.dtype.itemsize
          whole[f'{path} {array.shape}'] = size
        while axes and axes[-1] is None:
          axes = axes[:-1]
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.sharding.NamedSharding(mesh, spec)
    raise ValueError(
        f'partitioning.rules match nothing in {path!r}; end them with'
        " ('.*', 'replicate')."
    )

  return jax.tree.map(shard, parameter_paths.tree_paths(state), state), whole


def _partition(
    path: str,
    array: Any,
    strategy: Strategy,
    mesh: jax.sharding.Mesh,
    min_size: int,
) -> tuple[list[str | None], bool]:
  """Returns a mesh axis for each axis, and whether one did not divide."""
  axes: list[str | None] = [None] * array.ndim
  if strategy == 'replicate' or array.ndim == 0:
    return axes, False
  if isinstance(strategy, str):
    if strategy not in STRATEGIES:
      raise ValueError(
          f'partitioning.rules has the strategy {strategy!r}; known:'
          f' {list(STRATEGIES)} or a tuple of axis names.'
      )
    split = {'column': -1, 'row': -2}.get(strategy)
    missed = False
    if split is not None and mesh.shape['tensor'] > 1:
      num_shards = mesh.shape['tensor']
      missed = -split > array.ndim or array.shape[split] % num_shards > 0
      if not missed:
        axes[split] = 'tensor'
    missed |= _split_fsdp(axes, array, mesh.shape['fsdp'], min_size)
    return axes, missed
  if len(strategy) != array.ndim or any(
      axis is not None and size % mesh.shape.get(axis, size + 1)
      for axis, size in zip(strategy, array.shape, strict=False)
  ):
    raise ValueError(
        f'partitioning.rules gives {tuple(strategy)} to {path!r} of shape'
        f' {array.shape} on the mesh {dict(mesh.shape)}; give one axis name or'
        ' None for each axis, and only names that divide it.'
    )
  return list(strategy), False


def _split_fsdp(
    axes: list[str | None], array: Any, num_shards: int, min_size: int
) -> bool:
  """Gives 'fsdp' one of the free axes; returns whether it divides none."""
  if num_shards == 1 or array.size < min_size:
    return False
  fitting = [
      (size, i)
      for i, size in enumerate(array.shape)
      if axes[i] is None and size % num_shards == 0
  ]
  if not fitting:
    return True
  # The last of several equally large axes: the rows of memory stay whole.
  axes[max(fitting)[1]] = 'fsdp'
  return False
