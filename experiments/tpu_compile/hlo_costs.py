"""Counts FLOPs, HBM traffic and collectives in HLO text.

XLA's own `cost_analysis` counts the body of a loop once, regardless of its trip
count, and does not report collectives. Here every instruction is counted once
per execution.
"""

from collections.abc import Iterator, Sequence
import math
import re
from typing import NamedTuple

import numpy as np

from experiments.tpu_compile import hlo

COLLECTIVES = (
    'all-gather', 'all-reduce', 'all-to-all', 'collective-permute',
    'reduce-scatter',
)
# Instructions without computation or memory traffic.
_FREE = frozenset({
    'after-all', 'bitcast', 'conditional', 'constant', 'get-tuple-element',
    'opt-barrier', 'parameter', 'partition-id', 'replica-id', 'tuple', 'while',
})


class Product(NamedTuple):
  """A matmul or convolution, or all matmuls of a Pallas kernel.

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


class Costs(NamedTuple):
  """Costs of one execution, per chip."""

  products: list[Product]
  collectives: list[Collective]
  hbm_bytes: float


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
    products, collectives, hbm_bytes = [], {}, 0.0
    for computation, instruction, count, is_fused in self._walk(
        self._entry, 1.0, False
    ):
      if instruction.opcode in ('convolution', 'dot'):
        flops = count * self._product_flops(computation, instruction)
        operands = self._operands(computation, instruction)
        dtypes = ' x '.join(sorted(x.dtype for x in operands[:2]))
        products.append(Product(dtypes, count, flops, _op_name(instruction)))
      elif instruction.opcode == 'custom-call':
        products += self._kernel_product(computation, instruction, count)
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
        hbm_bytes += count * self._traffic(computation, instruction)
    return Costs(products, list(collectives.values()), hbm_bytes)

  def _walk(
      self, name: str, count: float, is_fused: bool
  ) -> Iterator[tuple[hlo.Computation, hlo.Instruction, float, bool]]:
    """Yields every instruction with its number of executions."""
    computation = self._computations[name]
    for instruction in computation.values():
      yield computation, instruction, count, is_fused
      if instruction.opcode == 'while':
        body = re.search(r'body=%?([\w.\-]+)', instruction.rest).group(1)
        trips = self._trip_count(instruction)
        yield from self._walk(body, count * trips, is_fused)
        continue
      fused = is_fused or instruction.opcode == 'fusion'
      for called in _called(instruction):
        yield from self._walk(called, count, fused)

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

  def _product_flops(self, computation, instruction) -> float:
    lhs, rhs = self._operands(computation, instruction)[:2]
    (result,) = instruction.arrays
    if instruction.opcode == 'dot':
      axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest)
      sizes = [lhs.shape[int(i)] for i in axes.group(1).split(',') if i]
      return 2.0 * math.prod(result.shape) * math.prod(sizes)
    return convolution_flops(lhs.shape, rhs.shape, result.shape, instruction)

  def _kernel_product(self, computation, instruction, count) -> list[Product]:
    """Returns the matmuls of a Pallas kernel, as one, by its cost estimate."""
    flops = re.search(
        r'"cost_estimate":\{"flops":"(\d+)"', instruction.rest
    )
    if not flops or not int(flops.group(1)):
      return []
    operands = self._operands(computation, instruction)
    dtypes = ' x '.join(sorted(x.dtype for x in operands[:2]))
    return [
        Product(
            dtypes, count, count * int(flops.group(1)), _op_name(instruction)
        )
    ]

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

  def _traffic(self, computation, instruction) -> float:
    """Returns the bytes that an instruction reads from and writes to HBM."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith('-done') or opcode == 'call':
      return 0.0
    if opcode == 'dynamic-slice':
      return 2.0 * _hbm_bytes(instruction.arrays)
    if opcode == 'dynamic-update-slice':
      update = computation.get(instruction.operands[1])
      return 2.0 * _hbm_bytes(update.arrays) if update else 0.0
    if opcode.endswith('-start'):
      # Read and write; the type contains operands and results.
      return _hbm_bytes(instruction.arrays)
    called = _called(instruction) if opcode == 'fusion' else []
    fused = self._computations[called[0]] if called else None
    total = self._written(instruction, fused)
    for i, name in enumerate(instruction.operands):
      if name in computation:
        total += self._read(computation[name], fused, i)
    return total

  def _read(self, operand, fused, index: int) -> float:
    """Returns the bytes that a fusion reads; of a sliced operand, the slice."""
    whole = _hbm_bytes(operand.arrays)
    if fused is None or not whole:
      return whole
    return self._read_inside(fused, index, whole)

  def _read_inside(self, fused, index: int, whole: float) -> float:
    """Returns the bytes read of a parameter, also by fusions in a fusion."""
    (parameter,) = (
        x for x in fused.values()
        if x.opcode == 'parameter' and x.rest.startswith(f'{index})')
    )
    sizes = []
    for user in _users(fused, parameter.name):
      if user.opcode == 'dynamic-slice':
        sizes.append(sum(x.num_bytes for x in user.arrays))
      elif user.opcode == 'fusion':
        inner = self._computations[_called(user)[0]]
        sizes += [
            self._read_inside(inner, i, whole)
            for i, name in enumerate(user.operands)
            if _source(fused, name) == parameter.name
        ]
      elif user.opcode == 'dynamic-update-slice' and _is_target(
          fused, user, parameter.name
      ):
        sizes.append(0)
      else:
        return whole
    return min(whole, sum(sizes))

  def _written(self, instruction, fused) -> float:
    """Returns the bytes written; for an in-place update, only the update."""
    whole = _hbm_bytes(instruction.arrays)
    if fused is None or not whole:
      return whole
    updates = [
        x for x in fused.values() if x.opcode == 'dynamic-update-slice'
    ]
    for update in updates:
      size = sum(x.num_bytes for x in update.arrays)
      piece = fused.get(update.operands[1])
      if piece is not None and size <= whole:
        whole += sum(x.num_bytes for x in piece.arrays) - size
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


def _hbm_bytes(arrays: Sequence[hlo.Array]) -> float:
  return float(sum(x.num_bytes for x in arrays if x.in_hbm))


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
