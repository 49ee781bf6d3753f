"""Costs of a compiled step by part of the model."""

import re
from typing import Any

from experiments.accelerators import chips
from experiments.accelerators import hlo_costs

# The first expression found in the origin of an instruction decides. The
# teacher of stage 2 counts as encoder.
_PARTS = (
    ('discriminator', r'Discriminator'),
    ('perceptual loss', r'Lpips|OutputDistance'),
    ('generator', r'TokenModel'),
    ('decoder', r'\.decode\b|/decoder\b'),
    ('encoder', r'\.encode\b|/encoder\b|PretrainedVit'),
)
REST = 'rest'


def find_part(op_name: str) -> str:
  """Returns the part of the model, with ' forward' or ' backward'.

  Args:
    op_name: path in the model, of the metadata of an instruction.
  """
  for part, pattern in _PARTS:
    if re.search(pattern, op_name):
      # Recomputation is within the transposed function.
      direction = 'backward' if 'transpose(' in op_name else 'forward'
      return f'{part} {direction}'
  return REST


def by_part(
    costs: hlo_costs.Costs, chip: chips.Chip
) -> dict[str, dict[str, Any]]:
  """Returns HBM traffic and matmul time of each part.

  Args:
    costs: of a compiled step.
    chip: its peak values.

  Returns:
    By part, the slowest first: 'hbm_gbytes' with padding, 'unpadded_gbytes',
    'hbm_ms' at full bandwidth, and 'matmul_ms' at peak throughput.
  """
  totals: dict[str, list[float]] = {}
  for x in costs.traffic:
    total = totals.setdefault(find_part(x.op_name), [0.0, 0.0, 0.0])
    total[0] += x.padded_bytes
    total[1] += x.num_bytes
  for x in costs.products:
    total = totals.setdefault(find_part(x.op_name), [0.0, 0.0, 0.0])
    total[2] += x.flops
  slowest = sorted(totals.items(), key=lambda item: -item[1][0])
  return {
      part: {
          'hbm_gbytes': round(padded / 1e9, 2),
          'unpadded_gbytes': round(num_bytes / 1e9, 2),
          'hbm_ms': round(1e3 * padded / chip.hbm_bandwidth, 1),
          'matmul_ms': round(1e3 * flops / chip.flops, 1),
      }
      for part, (padded, num_bytes, flops) in slowest
  }
