"""Runs the benchmarks and prints the tables of the README.

  python -m experiments.benchmarks.benchmarks --write --torch_python=PYTHON

PYTHON is the interpreter of an environment with torch and
vector-quantize-pytorch; without it those comparisons are skipped and keep their
stored results. Alternatives run alternately in short blocks, so that other load
on the machine affects all of them.
"""

import argparse
import datetime
import json
import os
import pathlib
import sys
from typing import Any

from fsq_jax.runtime import host

RESULTS = pathlib.Path(__file__).with_name('results.json')
GROUPS = ('fsq', 'lookup', 'vit', 'compile', 'memory', 'input', 'read',
          'formats', 'evaluation', 'tokenize', 'start')


def print_tables(results: dict[str, Any]) -> None:
  """Prints the tables of the README."""
  for lines in (_lines(results), _memory_lines(results['memory'])):
    sys.stdout.write('\n'.join(lines) + '\n\n')


_LAYOUTS = {
    'unrolled_kept': 'unrolled, activations kept',
    'unrolled_remat': 'unrolled, remat of each block',
    'scan_kept': 'scan, activations kept',
    'scan_matmuls': 'scan, remat, matmul results saved',
    'scan_remat': 'scan, remat of each block',
}


def _memory_lines(figures: dict[str, Any]):
  yield '| 4 blocks | temporary memory (MiB) | CPU time per step (ratio) |'
  yield '|---|---|---|'
  for name, label in _LAYOUTS.items():
    figure = figures[name]
    yield (
        f'| {label} | {figure["temporary_mib"]:.0f} |'
        f' {figure["cpu_ratio"]:.2f} |'
    )


def _lines(results: dict[str, Any]):
  yield (
      '| benchmark | wall-clock ratio | CPU-time ratio | target |'
      ' stretch goal |'
  )
  yield '|---|---|---|---|---|'
  for label, figure, target, stretch in _figures(results):
    wall, cpu = (
        '' if value is None else f'{value:.2f}' for value in figure
    )
    yield f'| {label} | {wall} | {cpu} | {target} | {stretch} |'


def _figures(results: dict[str, Any]):
  """Yields label, (wall-clock ratio, CPU-time ratio), target, stretch goal."""
  fsq, vit = results['fsq'], results['vit']
  yield (
      'FSQ forward with indices, 2^20 x 4 float32, relative to a memory copy',
      (fsq['fsq']['ratio'], fsq['fsq']['cpu_ratio']), '2.0', '1.5',
  )
  by_torch = fsq['by_pytorch']
  yield (
      'vector-quantize-pytorch 1.32.0 relative to our FSQ',
      (by_torch['ratio'], by_torch['cpu_ratio']), '20', '40',
  )
  for name, label in (('unrolled', 'unrolled blocks'), ('scan', 'lax.scan')):
    yield (
        f'ViT autoencoder training step, {label}: PyTorch (eager) relative to'
        ' ours',
        tuple(
            vit['pytorch'][ratio] / vit[name][ratio]
            for ratio in ('ratio', 'cpu_ratio')
        ),
        '1.0', '1.3',
    )
  nearest = results['lookup']['nearest']
  yield (
      'VQ nearest-neighbour search relative to its matmul',
      (nearest['ratio'], nearest['cpu_ratio']), '1.0', '',
  )
  yield (
      'compile time of 24 blocks relative to 6, lax.scan',
      (None, results['compile']['ratio']), '1.3', '1.1',
  )
  real = results['input']['real_input']
  yield (
      'step with the data pipeline relative to a cached batch',
      (real['ratio'], real['cpu_ratio']), '1.05', '1.02',
  )
  folder = results['read']['folder']
  yield (
      'reading a folder of JPEG files, two threads, throughput relative to'
      ' plain Pillow',
      (1 / folder['ratio'], 1 / folder['cpu_ratio']), '0.85', '',
  )
  for name, label in (
      ('parquet', 'a Parquet file'), ('webdataset', 'a tar shard')
  ):
    figures = results['formats'][name]
    yield (
        f'reading JPEG files in random order from {label}, throughput relative'
        ' to a folder',
        (1 / figures['ratio'], 1 / figures['cpu_ratio']), '0.9', '',
    )
  start = results['start']
  yield (
      'process start to first step, compilation cached (s, no ratio)',
      (start['seconds'], start['cpu_seconds']), '10', '6',
  )
  evaluation = results['evaluation']
  for name, label in (
      ('forward', 'forward pass'),
      ('forward_and_metrics', 'forward pass and metrics'),
  ):
    yield (
        f'evaluation throughput relative to the jitted {label}',
        tuple(
            evaluation[name][ratio] / evaluation['evaluation'][ratio]
            for ratio in ('ratio', 'cpu_ratio')
        ),
        '0.9', '0.97',
    )
  for name, label in (
      ('vit_s', 'ViT-S/8, 64 x 64'), ('default_run', 'small model')
  ):
    case = results['tokenize'][name]
    yield (
        f'tokenizing PNG files, throughput relative to the encoder, {label}',
        tuple(1 / case['tokenize'][ratio] for ratio in ('ratio', 'cpu_ratio')),
        '0.9', '0.97',
    )


def _measure(
    groups: list[str], rounds: int, torch_python: str
) -> dict[str, Any]:
  # Before JAX is initialized.
  host.keep_freed_memory()
  import jax

  from experiments.benchmarks import blocks
  from experiments.benchmarks import quantizer
  from experiments.benchmarks import reading
  from experiments.benchmarks import runs
  from experiments.benchmarks import tokenizing
  from experiments.benchmarks import vit_step

  peer = blocks.TorchPeer(torch_python) if torch_python else None
  measures = {
      'fsq': lambda: quantizer.fsq_figures(rounds, peer),
      'lookup': lambda: quantizer.lookup_figures(rounds),
      'vit': lambda: vit_step.torch_figures(rounds, peer),
      'compile': lambda: vit_step.compile_figures(max(3, rounds // 3)),
      'memory': lambda: vit_step.memory_figures(rounds),
      'input': lambda: runs.input_figures(rounds),
      'read': lambda: reading.read_figures(rounds),
      'formats': lambda: reading.format_figures(rounds),
      'evaluation': lambda: runs.evaluation_figures(rounds),
      'tokenize': lambda: tokenizing.tokenize_figures(max(3, rounds // 3)),
      'start': lambda: runs.start_figures(max(2, rounds // 3)),
  }
  machine = {
      'rounds': rounds,
      'date': datetime.date.today().isoformat(),
      'jax': jax.__version__,
      'device': jax.devices()[0].device_kind,
      'cores': len(os.sched_getaffinity(0)),
  }
  results = {}
  for name in groups:
    # Load by other processes.
    load = {'load_average': os.getloadavg()[0]}
    results[name] = measures[name]() | machine | load
    sys.stdout.write(f'{name}: {json.dumps(_rounded(results[name]))}\n')
    sys.stdout.flush()
  if peer is not None:
    peer.close()
  return results


def _rounded(value: Any) -> Any:
  """Rounds all floats of a tree to four significant figures."""
  if isinstance(value, dict):
    return {key: _rounded(part) for key, part in value.items()}
  return float(f'{value:.4g}') if isinstance(value, float) else value


def main() -> None:
  """Runs the selected groups and prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', nargs='+', choices=GROUPS, default=GROUPS)
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--torch_python', default='')
  parser.add_argument('--write', action='store_true', help='write results.json')
  arguments = parser.parse_args()
  stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
  results = {name: stored[name] for name in GROUPS if name in stored}
  measured = _measure(
      arguments.only, arguments.rounds, arguments.torch_python
  )
  for name, figures in measured.items():
    results[name] = results.get(name, {}) | _rounded(figures)
    if arguments.write:
      text = json.dumps(results, indent=2, sort_keys=True) + '\n'
      RESULTS.write_text(text, encoding='utf-8')
  if results.keys() >= set(GROUPS):
    print_tables(results)


if __name__ == '__main__':
  main()
