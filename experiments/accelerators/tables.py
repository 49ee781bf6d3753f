"""Tables of the README, from the results."""

from collections.abc import Mapping, Sequence
import sys
from typing import Any


def print_tables(results: Mapping[str, Any]) -> None:
  """Prints two tables: bounds, and the quantities they are computed from."""
  rows = [_describe(name, x) for name, x in results['cases'].items()]
  _print_table(
      ('model', 'chips', 'images', 'mesh (data x fsdp x tensor)',
       'peak HBM (GiB)', 'step time lower bound (ms)', 'MFU upper bound'),
      [(*case, *outcome) for case, outcome, _ in rows],
  )
  sys.stdout.write('\n')
  _print_table(
      ('model', 'chips', 'mesh (data x fsdp x tensor)', 'arguments (GiB)',
       'donated', 'temporaries (GiB)', 'matmul TFLOP', 'bf16 x bf16',
       'HBM traffic (GB)', 'sent (GB): ' + ' / '.join(_KINDS),
       'matmul / HBM / ICI bound (ms)'),
      [(case[0], case[1], case[3], *parts) for case, _, parts in rows if parts],
  )


# In the order of the table.
_KINDS = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
    'collective-permute',
)


def _describe(name: str, figures: Mapping[str, Any]) -> tuple[Any, Any, Any]:
  """Returns the cells of a case: name and mesh, bounds, quantities."""
  case = (
      name.partition('/')[0],
      figures['topology'],
      f'{figures["batch_size"]:,}',
      ' x '.join(str(n) for n in figures['mesh'].values()),
  )
  if 'needs_gib' in figures:
    needed = f'out of memory, temporaries {figures["needs_gib"]}'
    return case, (needed, '-', '-'), ()
  memory = figures['memory_gib']
  sent = (
      figures['collectives'].get(kind, {'sent_gbytes': 0.0})['sent_gbytes']
      for kind in _KINDS
  )
  outcome = (
      f'{memory["peak"]:.1f}', f'{figures["step_ms"]:.0f}',
      f'{figures["mfu"]:.0%}',
  )
  parts = (
      f'{memory["argument"]:.2f}',
      f'{memory["alias"] / memory["argument"]:.0%}',
      f'{memory["temp"]:.2f}',
      f'{figures["product_tflops"]:.1f}',
      f'{figures["products_by_dtype"].get("bf16 x bf16", 0):.1%}',
      f'{figures["hbm_gbytes"]:,.0f}',
      ' / '.join(f'{x:.2f}' for x in sent),
      ' / '.join(f'{x:.0f}' for x in figures['roofline_ms'].values()),
  )
  return case, outcome, parts


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  for row in (header, ['---'] * len(header), *rows):
    sys.stdout.write(f'| {" | ".join(row)} |\n')
