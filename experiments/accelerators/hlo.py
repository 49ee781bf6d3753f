"""Parses HLO text."""

import dataclasses
import math
import re
from typing import NamedTuple

_BYTES = {'pred': 1, 'bf16': 2}
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$')
_INSTRUCTION = re.compile(r'^  (ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?')


class Array(NamedTuple):
  """Type of one array.

  Attributes:
    dtype: such as 'bf16'.
    shape: logical shape.
    in_hbm: whether the array is in HBM.
    order: dimensions from minor to major.
    tiles: tile of the minor dimensions, tile of these tiles, ...; () for none.
  """

  dtype: str
  shape: tuple[int, ...]
  in_hbm: bool
  order: tuple[int, ...] = ()
  tiles: tuple[tuple[int, ...], ...] = ()

  @property
  def num_bytes(self) -> int:
    """Size in bytes, without padding."""
    return int(math.prod(self.shape) * self._itemsize)

  @property
  def padded_bytes(self) -> int:
    """Size in bytes with the padding of the tiles."""
    sizes = [self.shape[i] for i in reversed(self.order)]
    for tile in self.tiles:
      sizes = [1] * (len(tile) - len(sizes)) + sizes
      first = len(sizes) - len(tile)
      counts = [-(-n // t) for n, t in zip(sizes[first:], tile, strict=True)]
      sizes = [*sizes[:first], *counts, *tile]
    if not self.tiles:
      return self.num_bytes
    return int(math.prod(sizes) * self._itemsize)

  @property
  def _itemsize(self) -> float:
    bits = re.search(r'\d+', self.dtype)
    return _BYTES.get(self.dtype) or (int(bits.group()) / 8 if bits else 1)


@dataclasses.dataclass
class Instruction:
  """One instruction of a computation."""

  name: str
  arrays: list[Array]
  opcode: str
  operands: list[str]
  rest: str
  is_root: bool


# Instructions by name, in order.
Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """Parses the text of an HLO module.

  Args:
    text: HLO text, such as `jax.stages.Compiled.as_text()`.

  Returns:
    The computations by name, and the name of the entry computation.

  Raises:
    ValueError: the text is not HLO.
  """
  computations: dict[str, Computation] = {}
  entry = ''
  current: Computation = {}
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations.setdefault(header.group(2), {})
      if header.group(1):
        entry = header.group(2)
      continue
    match = _INSTRUCTION.match(line)
    if match:
      instruction = _parse_line(*match.groups())
      current[instruction.name] = instruction
  if not entry:
    raise ValueError('The text has no ENTRY computation; give HLO text.')
  return computations, entry


def _parse_line(root: str | None, name: str, text: str) -> Instruction:
  """Parses the right-hand side: type, opcode, operands, attributes."""
  kind, _, text = _split_type(text)
  opcode, _, text = text.partition('(')
  depth, end = 1, 0
  while depth and end < len(text):
    depth += {'(': 1, ')': -1}.get(text[end], 0)
    end += 1
  inside, rest, opcode = text[:end - 1], text[end:], opcode.strip()
  operands = [x.lstrip('%') for x in re.findall(r'%?[\w.\-]+(?=, |$)', inside)]
  if opcode in ('constant', 'parameter'):
    # Their value is in the place of the operands.
    operands, rest = [], f'{inside}){rest}'
  return Instruction(name, _arrays(kind), opcode, operands, rest, bool(root))


def _split_type(text: str) -> tuple[str, str, str]:
  if not text.startswith('('):
    return text.partition(' ')
  depth = 0
  for i, letter in enumerate(text):
    depth += {'(': 1, ')': -1}.get(letter, 0)
    if not depth:
      return text[:i + 1], ' ', text[i + 1:].lstrip()
  raise ValueError(f'The type of {text[:80]!r} does not end.')


def read_constant(instruction: Instruction) -> int:
  """Returns the value of an integer constant."""
  return int(re.match(r'(\d+)\)', instruction.rest).group(1))


def _arrays(text: str) -> list[Array]:
  arrays = []
  for dtype, sizes, layout in _ARRAY.findall(text):
    order, _, rest = layout.partition(':')
    tiles = re.match(r'T((?:\([\d,]+\))+)', rest)
    arrays.append(
        Array(
            dtype,
            _integers(sizes),
            'S(' not in layout,
            _integers(order),
            tuple(
                _integers(x)
                for x in re.findall(r'\(([\d,]+)\)', tiles.group(1))
            ) if tiles else (),
        )
    )
  return arrays


def _integers(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(',') if n)
