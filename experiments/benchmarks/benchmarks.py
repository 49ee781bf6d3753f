"""Runs the speed benchmarks and prints their tables.

  python -m experiments.benchmarks.benchmarks --write --torch_python=PYTHON

PYTHON is the interpreter of an environment with torch and
vector-quantize-pytorch. Without it the comparisons with PyTorch are skipped and
keep their results in results.json. Alternatives are timed in short alternating
blocks, so that other load of the machine affects all of them.
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
GROUPS = ('fsq', 'lookup', 'vit', 'compile', 'memory', 'input', 'evaluation',
          'tokenize', 'start')


def print_tables(results: dict[str, Any]) -> None:
  """Prints the tables of the README."""
  for lines in (_lines(results), _memory_lines(results['memory'])):
    sys.stdout.write('\n'.join(lines) + '\n\n')


_LAYOUTS = {
    'laid_out_kept': 'laid out, activations kept',
    'laid_out_remat': 'laid out, remat of each block',
    'scan_kept': 'scan, activations kept',
    'scan_products': 'scan, remat of all but matrix products',
    'scan_remat': 'scan, remat of each block',
}


def _memory_lines(figures: dict[str, Any]):
  yield '| 4 blocks | temporary memory, MiB | processor time of a step |'
  yield '|---|---|---|'
  for name, label in _LAYOUTS.items():
    figure = figures[name]
    yield (
        f'| {label} | {figure["temporary_mib"]:.0f} |'
        f' {figure["cpu_ratio"]:.2f} |'
    )


def _lines(results: dict[str, Any]):
  yield '| figure | measured | of processor time | reach | stretch |'
  yield '|---|---|---|---|---|'
  for label, figure, reach, stretch in _figures(results):
    measured, processor = (
        '' if value is None else f'{value:.2f}' for value in figure
    )
    yield f'| {label} | {measured} | {processor} | {reach} | {stretch} |'


def _figures(results: dict[str, Any]):
  """Yields label, (figure of wall time, of processor time), two targets."""
  fsq, vit = results['fsq'], results['vit']
  yield (
      'FSQ with indices, 2^20 x 4 float32, by a stream copy',
      (fsq['fsq']['ratio'], fsq['fsq']['cpu_ratio']), '2.0', '1.5',
  )
  by_torch = fsq['by_pytorch']
  yield (
      'vector-quantize-pytorch 1.32.0 by FSQ',
      (by_torch['ratio'], by_torch['cpu_ratio']), '20', '40',
  )
  for name, label in (('laid_out', 'laid out'), ('scan', 'under scan')):
    yield (
        f"ViT autoencoder's step, blocks {label}, PyTorch eager by ours",
        tuple(
            vit['pytorch'][ratio] / vit[name][ratio]
            for ratio in ('ratio', 'cpu_ratio')
        ),
        '1.0', '1.3',
    )
  nearest = results['lookup']['nearest']
  yield (
      'look-up of VQ by the product inside it',
      (nearest['ratio'], nearest['cpu_ratio']), '1.0', '',
  )
  yield (
      'compile time, 24 blocks by 6, under scan',
      (None, results['compile']['ratio']), '1.3', '1.1',
  )
  real = results['input']['real_input']
  yield (
      'step with real input by step with a fixed batch',
      (real['ratio'], real['cpu_ratio']), '1.05', '1.02',
  )
  start = results['start']
  yield (
      'process start to first step, programs cached, s',
      (start['seconds'], start['cpu_seconds']), '10', '6',
  )
  evaluation = results['evaluation']
  for name, label in (
      ('forward', 'forward pass'),
      ('forward_and_metrics', 'forward pass and metrics'),
  ):
    yield (
        f'evaluation, throughput by jitted {label}',
        tuple(
            evaluation[name][ratio] / evaluation['evaluation'][ratio]
            for ratio in ('ratio', 'cpu_ratio')
        ),
        '0.9', '0.97',
    )
  for name, label in (('vit_s', 'ViT-S/8, 64 x 64'), ('default_run', 'small')):
    case = results['tokenize'][name]
    yield (
        f'tokenizing PNG files, throughput by jitted encoder, {label}',
        tuple(1 / case['tokenize'][ratio] for ratio in ('ratio', 'cpu_ratio')),
        '0.9', '0.97',
    )


def _measure(
    groups: list[str], rounds: int, torch_python: str
) -> dict[str, Any]:
  # These import JAX, whose threads must find one heap.
  host.keep_freed_memory()
  import jax

  from experiments.benchmarks import blocks
  from experiments.benchmarks import quantizer
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
    # How much else wanted the cores.
    load = {'load_average': os.getloadavg()[0]}
    results[name] = measures[name]() | machine | load
    sys.stdout.write(f'{name}: {json.dumps(_rounded(results[name]))}\n')
    sys.stdout.flush()
  if peer is not None:
    peer.close()
  return results


def _rounded(value: Any) -> Any:
  """Rounds all numbers of a tree to 4 significant figures."""
  if isinstance(value, dict):
    return {key: _rounded(part) for key, part in value.items()}
  return float(f'{value:.4g}') if isinstance(value, float) else value


def main() -> None:
  """Runs the benchmarks that the command line names."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', nargs='+', choices=GROUPS, default=GROUPS)
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--torch_python', default='')
  parser.add_argument('--write', action='store_true', help='results.json')
  arguments = parser.parse_args()
  results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
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
