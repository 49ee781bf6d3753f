"""Costs of a compiled program, counted in the text of its HLO.

XLA's own `cost_analysis` counts the body of a loop once, whatever its trip
count, and says nothing of collectives. Here every instruction counts as often
as it runs.
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
# Which compute nothing and read nothing from memory by themselves.
_FREE = frozenset({
    'after-all', 'bitcast', 'conditional', 'constant', 'get-tuple-element',
    'opt-barrier', 'parameter', 'partition-id', 'replica-id', 'tuple', 'while',
})


class Product(NamedTuple):
  """Matrix products or convolutions of one kind.

  Attributes:
    dtypes: of the operands, such as 'bf16 x bf16'.
    count: how often they run.
    flops: of all runs, two for each multiplication and addition, without those
      by zeros that dilation puts between values.
    op_name: where in the model it comes from.
  """

  dtypes: str
  count: float
  flops: float
  op_name: str


class Collective(NamedTuple):
  """One collective.

  Attributes:
    kind: of `COLLECTIVES`.
    arrays: of the result; of a reduce-scatter, of the operand.
    num_bytes: of these.
    group_size: devices that take part.
    count: how often it runs.
    op_name: where in the model it comes from.
  """

  kind: str
  arrays: tuple[hlo.Array, ...]
  num_bytes: int
  group_size: int
  count: float
  op_name: str

  @property
  def sent_bytes(self) -> float:
    """What every chip sends, by the ring algorithm, in all runs."""
    share = (self.group_size - 1) / self.group_size
    factor = {'all-reduce': 2 * share, 'collective-permute': 1.0}
    return self.count * self.num_bytes * factor.get(self.kind, share)


class Costs(NamedTuple):
  """Costs of one run of a program on one chip."""

  products: list[Product]
  collectives: list[Collective]
  hbm_bytes: float


class Program:
  """A compiled program, parsed."""

  def __init__(self, text: str):
    """Parses the text.

    Args:
      text: `jax.stages.Compiled.as_text()`.
    """
    self._computations, self._entry = hlo.parse(text)

  def costs(self) -> Costs:
    """Adds up everything, as often as it runs."""
    products, collectives, hbm_bytes = [], {}, 0.0
    for computation, instruction, count, is_fused in self._walk(
        self._entry, 1.0, False
    ):
      if instruction.opcode in ('convolution', 'dot'):
        flops = count * self._product_flops(computation, instruction)
        operands = self._operands(computation, instruction)
        dtypes = ' x '.join(sorted(x.dtype for x in operands[:2]))
        products.append(Product(dtypes, count, flops, _op_name(instruction)))
      kind = instruction.opcode.removesuffix('-start')
      if kind in COLLECTIVES:
        # One that runs beside others is written in each of the fusions that it
        # runs beside, loops too, and has one channel.
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
    """Yields every instruction with the number of its runs."""
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
    # From 0 to below a constant, as all loops of scans and of products whose
    # operand is gathered piece by piece; these take several steps a trip.
    (compare,) = (x for x in condition.values() if x.is_root)
    counter, limit = (condition.get(x) for x in compare.operands[:2])
    if (
        counter is None
        or limit is None
        or limit.opcode != 'constant'
        or 'direction=LT' not in compare.rest
    ):
      raise ValueError(
          f'The loop {instruction.name!r} ends by {compare}; only loops up to a'
          ' constant can be counted.'
      )
    index = int(re.search(r'index=(\d+)', counter.rest).group(1))
    (root,) = (x for x in body.values() if x.is_root)
    step = self._added(body, root.operands[index])
    return -(-hlo.read_constant(limit) // step)

  def _added(self, body: hlo.Computation, name: str) -> int:
    """Returns the constants that a value is the sum of, beside the counter."""
    instruction = body[name]
    if instruction.opcode == 'constant':
      return hlo.read_constant(instruction)
    if instruction.opcode in ('add', 'bitcast', 'copy'):
      return sum(self._added(body, x) for x in instruction.operands)
    if instruction.opcode == 'get-tuple-element':
      return 0
    raise ValueError(
        f'The counter of a loop is made by {instruction}; only sums with'
        ' constants can be followed.'
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

  def _collective(self, computation, instruction, kind, count) -> Collective:
    arrays = instruction.arrays
    if kind == 'reduce-scatter':
      arrays = self._operands(computation, instruction)
    elif instruction.opcode.endswith('-start') and kind != 'all-reduce':
      # (operands, results, ...): the results are as many as the operands.
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
    """Bytes that an instruction reads from HBM and writes there."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith('-done') or opcode == 'call':
      return 0.0
    if opcode == 'dynamic-slice':
      return 2.0 * _hbm_bytes(instruction.arrays)
    if opcode == 'dynamic-update-slice':
      update = computation.get(instruction.operands[1])
      return 2.0 * _hbm_bytes(update.arrays) if update else 0.0
    if opcode.endswith('-start'):
      # Each side once; the type repeats the operands.
      return _hbm_bytes(instruction.arrays)
    called = _called(instruction) if opcode == 'fusion' else []
    fused = self._computations[called[0]] if called else None
    total = self._written(instruction, fused)
    for i, name in enumerate(instruction.operands):
      if name in computation:
        total += self._read(computation[name], fused, i)
    return total

  def _read(self, operand, fused, index: int) -> float:
    """Bytes of an operand that a fusion reads: of a slice, the slice."""
    whole = _hbm_bytes(operand.arrays)
    if fused is None or not whole:
      return whole
    (parameter,) = (
        x for x in fused.values()
        if x.opcode == 'parameter' and x.rest.startswith(f'{index})')
    )
    sizes = []
    for user in _users(fused, parameter.name):
      if user.opcode == 'dynamic-slice':
        sizes.append(sum(x.num_bytes for x in user.arrays))
      elif user.opcode == 'dynamic-update-slice' and _is_target(
          fused, user, parameter.name
      ):
        sizes.append(0)
      else:
        return whole
    return min(whole, sum(sizes))

  def _written(self, instruction, fused) -> float:
    """Bytes of its result; of one updated in place, the update."""
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
  """FLOPs of a convolution, without products with padding or dilation.

  Args:
    lhs: shape of the input.
    rhs: shape of the kernel.
    result: shape of the result.
    instruction: with window and dim_labels.
  """
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest)
  lhs_labels, rhs_labels, out_labels = labels.groups()
  groups = re.search(r'batch_group_count=(\d+)', instruction.rest)
  window = _window(instruction.rest)
  flops = 2.0 * result[out_labels.index('b')] * result[out_labels.index('f')]
  flops *= rhs[rhs_labels.index('i')]
  if groups:
    # The batch of the input is contracted, a group for each feature.
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
  """Names of the computations that an instruction runs once."""
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
  """Yields what reads a value, behind bitcasts too."""
  for instruction in computation.values():
    if name in instruction.operands:
      if instruction.opcode == 'bitcast':
        yield from _users(computation, instruction.name)
      else:
        yield instruction


def _is_target(computation, update: hlo.Instruction, name: str) -> bool:
  """Whether an update in place is of the value, or of a bitcast of it."""
  target = update.operands[0]
  while target != name and computation[target].opcode == 'bitcast':
    (target,) = computation[target].operands
  return target == name


def _hbm_bytes(arrays: Sequence[hlo.Array]) -> float:
  return float(sum(x.num_bytes for x in arrays if x.in_hbm))


def _group_size(text: str) -> int:
  """Devices of one group of a collective, in the three ways they are written.

  They are {{0,1},{2,3}}, [groups,size]<=[...] and mesh[...] {axes}.
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
  return 2  # Pairs of a permutation.


def _op_name(instruction: hlo.Instruction) -> str:
  found = re.search(r'op_name="([^"]*)"', instruction.rest)
  return found.group(1) if found else ''
