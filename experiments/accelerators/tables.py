"""Tables of the README, from the results."""

from collections.abc import Collection, Iterable, Mapping, Sequence
import sys
from typing import Any

_CASE = ('model', 'chips', 'images', 'mesh')
# In the order of the table.
_KINDS = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
    'collective-permute',
)
_PARTS = (
    'encoder forward', 'encoder backward', 'decoder forward',
    'decoder backward', 'discriminator forward', 'discriminator backward',
    'perceptual loss forward', 'perceptual loss backward', 'generator forward',
    'generator backward', 'rest',
)


def print_tables(
    results: Mapping[str, Any], brief: Collection[str]
) -> None:
  """Prints bounds, the quantities behind them, and costs by part of the model.

  Args:
    results: content of results.json.
    brief: names of the cases that are in the first table only.
  """
  cases = results['cases'].items()
  detailed = [(name, x) for name, x in cases if name not in brief]
  tables = (
      (
          ('peak HBM (GiB)', 'step time lower bound (ms)', 'MFU upper bound',
           'attention kernels', 'commit'),
          [(*_name(name, x), *_bounds(x)) for name, x in cases],
      ),
      (
          ('arguments (GiB)', 'donated', 'temporaries (GiB)', 'matmul TFLOP',
           'bf16 x bf16', 'HBM traffic (GB)', 'sent (GB)',
           'matmul / HBM / link bound (ms)'),
          [
              (*_name(name, x), *_quantities(x))
              for name, x in detailed
              if 'needs_gib' not in x
          ],
      ),
      (
          _PARTS,
          [
              (*_name(name, x), *_parts(x))
              for name, x in detailed
              if 'parts' in x
          ],
      ),
  )
  for header, rows in tables:
    for row in ((*_CASE, *header), ['---'] * (4 + len(header)), *rows):
      sys.stdout.write(f'| {" | ".join(row)} |\n')
    sys.stdout.write('\n')


def _name(name: str, figures: Mapping[str, Any]) -> Sequence[str]:
  return (
      name.partition('/')[0],
      figures['topology'],
      f'{figures["batch_size"]:,}',
      ' x '.join(str(n) for n in figures['mesh'].values()),
  )


def _bounds(figures: Mapping[str, Any]) -> Iterable[str]:
  commit = (figures.get('commit') or '-')[:7]
  if 'needs_gib' in figures:
    needed = f'out of memory, temporaries {figures["needs_gib"]}'
    return needed, '-', '-', '-', commit
  attention = figures.get('attention', {})
  return (
      f'{figures["memory_gib"]["peak"]:.1f}',
      f'{figures["step_ms"]:.0f}',
      f'{figures["mfu"]:.0%}',
      ', '.join(f'{kind} {count}' for kind, count in attention.items()) or '-',
      commit,
  )


def _quantities(figures: Mapping[str, Any]) -> Iterable[str]:
  memory = figures['memory_gib']
  traffic = f'{figures["hbm_gbytes"]:,.0f}'
  if 'unpadded_gbytes' in figures:
    traffic += f' ({figures["unpadded_gbytes"]:,.0f})'
  sent = (
      figures['collectives'].get(kind, {'sent_gbytes': 0.0})['sent_gbytes']
      for kind in _KINDS
  )
  return (
      f'{memory["argument"]:.2f}',
      f'{memory["alias"] / memory["argument"]:.0%}',
      f'{memory["temp"]:.2f}',
      f'{figures["product_tflops"]:.1f}',
      f'{figures["products_by_dtype"].get("bf16 x bf16", 0):.1%}',
      traffic,
      ' / '.join(f'{x:.2f}' for x in sent),
      ' / '.join(f'{x:.0f}' for x in figures['roofline_ms'].values()),
  )


def _parts(figures: Mapping[str, Any]) -> Iterable[str]:
  cells = []
  for name in _PARTS:
    part = figures['parts'].get(name)
    cells.append(
        f'{part["hbm_gbytes"]:.1f} ({part["unpadded_gbytes"]:.1f}) /'
        f' {part["hbm_ms"]:.0f} / {part["matmul_ms"]:.0f}' if part else '-'
    )
  return cells
