"""Counts FLOPs, HBM traffic and collectives in HLO text.

XLA's own `cost_analysis` counts the body of a loop once, regardless of its trip
count, and does not report collectives. Here every instruction is counted once
per execution.
"""

from collections.abc import Iterator, Sequence
import math
import re
from typing import Any, NamedTuple

import numpy as np

from experiments.accelerators import hlo
from experiments.accelerators import kernels

COLLECTIVES = (
    'all-gather', 'all-reduce', 'all-to-all', 'collective-permute',
    'reduce-scatter',
)
# Instructions without computation or memory traffic.
_FREE = frozenset({
    'after-all', 'bitcast', 'conditional', 'constant', 'get-tuple-element',
    'opt-barrier', 'parameter', 'partition-id', 'replica-id', 'tuple', 'while',
})


_NOTHING = np.zeros(2)


class Product(NamedTuple):
  """A matmul or convolution, or all matmuls of a kernel.

  Attributes:
    dtypes: dtypes of the operands, such as 'bf16 x bf16'.
    count: number of executions.
    flops: FLOPs of all executions, two per multiply-add, without
      multiplications by the zeros of a dilation.
    op_name: its origin in the model.
  """

  dtypes: str
  count: float
  flops: float
  op_name: str


class Collective(NamedTuple):
  """One collective.

  Attributes:
    kind: an entry of `COLLECTIVES`.
    arrays: result arrays; for a reduce-scatter, operands.
    num_bytes: bytes of `arrays`.
    group_size: number of participating devices.
    count: number of executions.
    op_name: its origin in the model.
  """

  kind: str
  arrays: tuple[hlo.Array, ...]
  num_bytes: int
  group_size: int
  count: float
  op_name: str

  @property
  def sent_bytes(self) -> float:
    """Bytes sent per chip by the ring algorithm, over all executions."""
    share = (self.group_size - 1) / self.group_size
    factor = {'all-reduce': 2 * share, 'collective-permute': 1.0}
    return self.count * self.num_bytes * factor.get(self.kind, share)


class Traffic(NamedTuple):
  """Bytes that all executions of an instruction read from and write to HBM.

  Attributes:
    num_bytes: without padding.
    padded_bytes: with the padding of the arrays' tiles.
    op_name: its origin in the model.
    instruction: the instruction.
  """

  num_bytes: float
  padded_bytes: float
  op_name: str
  instruction: hlo.Instruction


class Costs(NamedTuple):
  """Costs of one execution, per chip.

  Attributes:
    products: matmuls and convolutions.
    collectives: transfers between chips.
    traffic: transfers between a chip and its HBM.
    attention: executions by kernel, see `kernels.attention_kernel`.
  """

  products: list[Product]
  collectives: list[Collective]
  traffic: list[Traffic]
  attention: dict[str, int]

  @property
  def hbm_bytes(self) -> float:
    """Bytes read from and written to HBM, without padding."""
    return sum(x.num_bytes for x in self.traffic)

  @property
  def padded_bytes(self) -> float:
    """Bytes read from and written to HBM, with padding."""
    return sum(x.padded_bytes for x in self.traffic)


class Program:
  """A parsed HLO module."""

  def __init__(self, text: str):
    """Parses the text.

    Args:
      text: `jax.stages.Compiled.as_text()`.
    """
    self._computations, self._entry = hlo.parse(text)

  def costs(self) -> Costs:
    """Returns the costs, with every instruction counted per execution."""
    costs = Costs([], [], [], {})
    collectives: dict[Any, Collective] = {}
    for step in self._walk(self._entry, 1.0, '', is_fused=False):
      computation, instruction, count, op_name, is_fused = step
      flops = self._flops(computation, instruction)
      if flops:
        operands = self._operands(computation, instruction)
        dtypes = ' x '.join(sorted(x.dtype for x in operands[:2]))
        costs.products.append(Product(dtypes, count, count * flops, op_name))
        kernel = kernels.find_attention(instruction, op_name)
        if kernel:
          total = costs.attention.get(kernel, 0)
          costs.attention[kernel] = total + int(count)
      kind = instruction.opcode.removesuffix('-start')
      if kind in COLLECTIVES:
        # An asynchronous collective is repeated in each fusion that it overlaps
        # with, with the same channel: count it once.
        channel = re.search(r'channel_id=\d+', instruction.rest)
        key = channel.group() if channel else len(collectives)
        if key not in collectives or count < collectives[key].count:
          collectives[key] = self._collective(
              computation, instruction, kind, count
          )
      if not is_fused:
        sizes = count * self._traffic(computation, instruction)
        if sizes.any():
          costs.traffic.append(
              Traffic(*sizes.tolist(), op_name, instruction)
          )
    costs.collectives.extend(collectives.values())
    return costs

  def _walk(
      self, name: str, count: float, caller: str, *, is_fused: bool
  ) -> Iterator[
      tuple[hlo.Computation, hlo.Instruction, float, str, bool]
  ]:
    """Yields every instruction, its number of executions and its origin.

    The origin of an instruction without a path in the model is that of its
    operands or of the instruction that calls its computation.
    """
    computation = self._computations[name]
    origins: dict[str, str] = {}
    for instruction in computation.values():
      op_name = self._origin(instruction)
      if '/' not in op_name:
        inputs = (origins.get(x, '') for x in instruction.operands)
        op_name = next(filter(None, inputs), caller)
      origins[instruction.name] = op_name
      yield computation, instruction, count, op_name, is_fused
      if instruction.opcode == 'while':
        body = re.search(r'body=%?([\w.\-]+)', instruction.rest).group(1)
        trips = self._trip_count(instruction)
        yield from self._walk(
            body, count * trips, op_name, is_fused=is_fused
        )
        continue
      fused = is_fused or instruction.opcode == 'fusion'
      for called in _called(instruction):
        yield from self._walk(called, count, op_name, is_fused=fused)

  def _trip_count(self, instruction: hlo.Instruction) -> int:
    known = re.search(
        r'known_trip_count["\\:{ ]+n["\\: ]+(\d+)', instruction.rest
    )
    if known:
      return int(known.group(1))
    condition, body = (
        self._computations[
            re.search(rf'{x}=%?([\w.\-]+)', instruction.rest).group(1)
        ]
        for x in ('condition', 'body')
    )
    # The counter runs from 0 to below a constant, in loops of scans and of
    # matmuls with an operand gathered shard by shard. The latter advance it
    # by several steps per iteration.
    (compare,) = (x for x in condition.values() if x.is_root)
    counter, limit = (condition.get(x) for x in compare.operands[:2])
    if (
        counter is None
        or limit is None
        or limit.opcode != 'constant'
        or 'direction=LT' not in compare.rest
    ):
      raise ValueError(
          f'The loop {instruction.name!r} has the condition {compare}; expected'
          ' a counter below a constant.'
      )
    index = int(re.search(r'index=(\d+)', counter.rest).group(1))
    (root,) = (x for x in body.values() if x.is_root)
    step = self._added(body, root.operands[index])
    return -(-hlo.read_constant(limit) // step)

  def _added(self, body: hlo.Computation, name: str) -> int:
    """Returns the sum of the constants added to the counter."""
    instruction = body[name]
    if instruction.opcode == 'constant':
      return hlo.read_constant(instruction)
    if instruction.opcode in ('add', 'bitcast', 'copy'):
      return sum(self._added(body, x) for x in instruction.operands)
    if instruction.opcode == 'get-tuple-element':
      return 0
    raise ValueError(
        f'The counter of a loop is computed by {instruction}; expected a sum'
        ' with constants.'
    )

  def _operands(self, computation, instruction) -> list[hlo.Array]:
    return [
        array
        for name in instruction.operands
        if name in computation
        for array in computation[name].arrays
    ]

  def _flops(self, computation, instruction) -> float:
    """Returns the matmul FLOPs of one execution, without its computations."""
    if instruction.opcode not in ('convolution', 'custom-call', 'dot'):
      return 0.0
    operands = self._operands(computation, instruction)
    if instruction.opcode == 'custom-call':
      return kernels.custom_call_flops(instruction, operands, convolution_flops)
    lhs, rhs = operands[:2]
    (result,) = instruction.arrays
    if instruction.opcode == 'dot':
      axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest)
      sizes = [lhs.shape[int(i)] for i in axes.group(1).split(',') if i]
      return 2.0 * math.prod(result.shape) * math.prod(sizes)
    return convolution_flops(lhs.shape, rhs.shape, result.shape, instruction)

  def _origin(self, instruction) -> str:
    """Returns the path in the model of an instruction or of a fused one."""
    op_name = _op_name(instruction)
    if '/' not in op_name and instruction.opcode == 'fusion':
      (called,) = _called(instruction)
      fused = map(_op_name, reversed(self._computations[called].values()))
      op_name = next((x for x in fused if '/' in x), '')
    return op_name

  def _collective(self, computation, instruction, kind, count) -> Collective:
    arrays = instruction.arrays
    if kind == 'reduce-scatter':
      arrays = self._operands(computation, instruction)
    elif instruction.opcode.endswith('-start') and kind != 'all-reduce':
      # (operands, results, ...), with as many results as operands.
      num_operands = len(instruction.operands)
      arrays = arrays[num_operands:2 * num_operands]
    return Collective(
        kind,
        tuple(arrays),
        sum(x.num_bytes for x in arrays),
        _group_size(instruction.rest),
        count,
        _op_name(instruction),
    )

  def _traffic(self, computation, instruction) -> np.ndarray:
    """Returns the bytes that an instruction reads from and writes to HBM.

    Like the methods below, without and with padding.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith('-done') or opcode == 'call':
      return _NOTHING
    if opcode == 'dynamic-slice':
      return 2 * _hbm_bytes(instruction.arrays)
    if opcode == 'dynamic-update-slice':
      update = computation.get(instruction.operands[1])
      return 2 * _hbm_bytes(update.arrays) if update else _NOTHING
    if opcode.endswith('-start'):
      # Read and write; the type contains operands and results.
      return _hbm_bytes(instruction.arrays)
    called = _called(instruction) if opcode == 'fusion' else []
    fused = self._computations[called[0]] if called else None
    total = self._written(instruction, fused)
    for i, name in enumerate(instruction.operands):
      if name in computation:
        total = total + self._read(computation[name], fused, i)
    return total

  def _read(self, operand, fused, index: int) -> np.ndarray:
    """Returns the bytes that a fusion reads; of a sliced operand, the slice."""
    whole = _hbm_bytes(operand.arrays)
    if fused is None or not whole.any():
      return whole
    return self._read_inside(fused, index, whole)

  def _read_inside(self, fused, index: int, whole: np.ndarray) -> np.ndarray:
    """Returns the bytes read of a parameter, also by fusions in a fusion."""
    (parameter,) = (
        x for x in fused.values()
        if x.opcode == 'parameter' and x.rest.startswith(f'{index})')
    )
    total = _NOTHING
    for user in _users(fused, parameter.name):
      if user.opcode == 'dynamic-slice':
        total = total + _bytes(user.arrays)
      elif user.opcode == 'fusion':
        inner = self._computations[_called(user)[0]]
        for i, name in enumerate(user.operands):
          if _source(fused, name) == parameter.name:
            total = total + self._read_inside(inner, i, whole)
      elif user.opcode != 'dynamic-update-slice' or not _is_target(
          fused, user, parameter.name
      ):
        return whole
    return np.minimum(whole, total)

  def _written(self, instruction, fused) -> np.ndarray:
    """Returns the bytes written; for an in-place update, only the update."""
    whole = _hbm_bytes(instruction.arrays)
    if fused is None or not whole.any():
      return whole
    updates = [
        x for x in fused.values() if x.opcode == 'dynamic-update-slice'
    ]
    for update in updates:
      size = _bytes(update.arrays)
      piece = fused.get(update.operands[1])
      if piece is not None and size[0] <= whole[0]:
        whole = np.maximum(whole + _bytes(piece.arrays) - size, 0)
    return whole


def convolution_flops(
    lhs: Sequence[int],
    rhs: Sequence[int],
    result: Sequence[int],
    instruction: hlo.Instruction,
) -> float:
  """Returns the FLOPs of a convolution, without padding and dilation.

  Args:
    lhs: shape of the input.
    rhs: shape of the kernel.
    result: shape of the result.
    instruction: the convolution, with window and dim_labels.
  """
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest)
  lhs_labels, rhs_labels, out_labels = labels.groups()
  groups = re.search(r'batch_group_count=(\d+)', instruction.rest)
  window = _window(instruction.rest)
  flops = 2.0 * result[out_labels.index('b')] * result[out_labels.index('f')]
  flops *= rhs[rhs_labels.index('i')]
  if groups:
    # The batch axis of the input is contracted, one group per feature.
    flops *= lhs[lhs_labels.index('b')] / int(groups.group(1))
    flops /= result[out_labels.index('b')]
  spatial = sorted(x for x in out_labels if x.isdigit())
  for axis, label in enumerate(spatial):
    size = lhs[lhs_labels.index(label)]
    stride, low, base, kernel = (
        window[name][axis] for name in ('stride', 'pad', 'lhs', 'rhs')
    )
    outputs = np.arange(result[out_labels.index(label)])[:, None] * stride
    taps = np.arange(rhs[rhs_labels.index(label)])[None] * kernel
    places = outputs + taps - low
    inside = (places >= 0) & (places <= (size - 1) * base)
    flops *= np.count_nonzero(inside & (places % base == 0))
  return flops


def _window(text: str) -> dict[str, list[int]]:
  fields = dict(
      part.split('=')
      for part in re.search(r'window=\{([^}]*)\}', text).group(1).split()
  ) if 'window={' in text else {}
  rank = len(fields['size'].split('x')) if 'size' in fields else 0

  def read(name: str, default: int) -> list[int]:
    if name not in fields:
      return [default] * rank
    return [int(x.split('_')[0]) for x in fields[name].split('x')]

  return {
      'stride': read('stride', 1),
      'pad': read('pad', 0),
      'lhs': read('lhs_dilate', 1),
      'rhs': read('rhs_dilate', 1),
  }


def _called(instruction: hlo.Instruction) -> list[str]:
  """Returns the computations that an instruction executes once."""
  if instruction.opcode == 'conditional':
    branches = re.search(r'branch_computations=\{([^}]*)\}', instruction.rest)
    if branches:
      return re.findall(r'%?([\w.\-]+)', branches.group(1))
    return re.findall(
        r'(?:true|false)_computation=%?([\w.\-]+)', instruction.rest
    )
  if instruction.opcode in ('fusion', 'async-start', 'call'):
    pattern = r'(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)'
    return re.findall(pattern, instruction.rest)[:1]
  return []


def _users(computation, name: str) -> Iterator[hlo.Instruction]:
  """Yields the users of a value, looking through bitcasts."""
  for instruction in computation.values():
    if name in instruction.operands:
      if instruction.opcode == 'bitcast':
        yield from _users(computation, instruction.name)
      else:
        yield instruction


def _is_target(computation, update: hlo.Instruction, name: str) -> bool:
  """Whether an in-place update writes to a value or a bitcast of it."""
  return _source(computation, update.operands[0]) == name


def _source(computation, name: str) -> str:
  """Returns the value that a name is a bitcast of."""
  while computation[name].opcode == 'bitcast':
    (name,) = computation[name].operands
  return name


def _hbm_bytes(arrays: Sequence[hlo.Array]) -> np.ndarray:
  return _bytes([x for x in arrays if x.in_hbm])


def _bytes(arrays: Sequence[hlo.Array]) -> np.ndarray:
  """Returns the size of arrays without and with padding."""
  sizes = (np.array([x.num_bytes, x.padded_bytes]) for x in arrays)
  return sum(sizes, _NOTHING)


def _group_size(text: str) -> int:
  """Returns the number of devices per group of a collective.

  Replica groups have three formats: {{0,1},{2,3}}, [groups,size]<=[...] and
  mesh[...] {axes}.
  """
  named = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', text)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
    axes = re.findall(r"'(\w+)'", named.group(2))
    return math.prod(int(sizes[axis]) for axis in axes)
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]', text)
  if iota:
    return int(iota.group(2))
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', text)
  if listed:
    return len(listed.group(1).split(','))
  return 2  # A collective-permute has pairs.


def _op_name(instruction: hlo.Instruction) -> str:
  found = re.search(r'op_name="([^"]*)"', instruction.rest)
  return found.group(1) if found else ''
