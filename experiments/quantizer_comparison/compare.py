"""Compares quantizers at equal codebook sizes on CIFAR-10.

  python -m experiments.quantizer_comparison.compare --run [--data_dir=DIR]

With --run, trains the missing runs under --workdir, where interrupted runs
resume, measures time and memory, and writes results.json next to this script.
Then draws plot.png and prints the tables.
"""

from collections.abc import Mapping
import pathlib
import statistics
import sys
from typing import Any

import matplotlib

from experiments import sweep
from experiments.quantizer_comparison import cost
from experiments.quantizer_comparison import settings

HERE = pathlib.Path(__file__).resolve().parent
BITS = (9, 10, 14)
# Seeds by (quantizer, bits); the default is one seed.
SEEDS = {(name, 10): (0, 1, 2) for name in ('fsq', 'vq_ema', 'simvq')}


def runs() -> list[tuple[str, int, int]]:
  """Returns (quantizer, bits, seed) of every run of the comparison."""
  return [
      (quantizer, bits, seed)
      for bits in BITS
      for quantizer in settings.LABELS
      for seed in SEEDS.get((quantizer, bits), (0,))
  ]


def run(workdir: pathlib.Path, data_dir: str) -> dict[str, Any]:
  """Trains the missing runs, measures costs, returns the results."""
  sweep.train(settings.CONFIG, settings.tuning_runs(data_dir), workdir)
  tuning = _tuning(workdir)
  final = {
      settings.run_name(*key): settings.final_run(*key, data_dir)
      for key in runs()
  }
  sweep.train(settings.CONFIG, final, workdir)
  return {
      'command': 'python -m experiments.quantizer_comparison.compare --run',
      **sweep.collect(workdir, final),
      'tuning': tuning,
      'costs': measure_costs(),
  }


def measure_costs() -> dict[str, dict[str, float]]:
  """Returns time and memory of each quantizer, by '<name>_<bits>'."""
  costs = {}
  for bits in BITS:
    variants = {
        f'{quantizer}_{bits}': settings.final_run(quantizer, bits, 0, '')
        for quantizer in settings.LABELS
    }
    costs |= cost.measure(settings.CONFIG, variants, f'fsq_{bits}')
  return costs


def _tuning(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns the metrics of all candidates; exits if CHOSEN is not the best."""
  names = iter(settings.tuning_runs(''))
  tuning = {
      quantizer: {
          candidate: sweep.read_numbers(workdir / next(names))
          for candidate in candidates
      }
      for quantizer, candidates in settings.CANDIDATES.items()
  }
  best = {
      quantizer: max(rows, key=lambda name: rows[name]['psnr'])
      for quantizer, rows in tuning.items()
  }
  if best != settings.CHOSEN:
    sys.exit(
        f'settings.CHOSEN is {settings.CHOSEN}, but tuning selects {best}.'
        ' Update settings.CHOSEN and run this again.'
    )
  return tuning


def print_tables(results: Mapping[str, Any]) -> None:
  """Prints the comparison and the tuning as Markdown tables."""
  write = sys.stdout.write
  write(
      '| codes | quantizer | PSNR, dB | SSIM | usage | perplexity |'
      ' normalized entropy | step time (relative to FSQ) |'
      ' quantizer params + state (bytes) | temporary memory (MiB) |\n'
      + '|---' * 10
      + '|\n'
  )
  for bits in BITS:
    for quantizer, label in settings.LABELS.items():
      rows = _rows(results, quantizer, bits)
      costs = results['costs'][f'{quantizer}_{bits}']
      write(
          f'| {rows[0]["codebook_size"]:,} | {label} |'
          f' {sweep.format_mean(rows, "psnr", ".2f")} |'
          f' {sweep.format_mean(rows, "ssim", ".3f")} |'
          f' {sweep.format_mean(rows, "usage", ".1%")} |'
          f' {sweep.format_mean(rows, "perplexity", ",.0f")} |'
          f' {sweep.format_mean(rows, "entropy_share", ".1%")} |'
          f' {costs["step_ratio"]:.2f} | {costs["quantizer_bytes"]:,} |'
          f' {costs["temporary_bytes"] / 2**20:,.1f} |\n'
      )
  write('\n| quantizer | setting | PSNR, dB | usage | perplexity |\n')
  write('|---' * 5 + '|\n')
  for quantizer, candidates in results['tuning'].items():
    for name, row in candidates.items():
      name = f'**{name}**' if name == settings.CHOSEN[quantizer] else name
      write(
          f'| {settings.LABELS[quantizer]} | {name} | {row["psnr"]:.2f} |'
          f' {row["usage"]:.1%} | {row["perplexity"]:,.0f} |\n'
      )


def _rows(
    results: Mapping[str, Any], quantizer: str, bits: int
) -> list[dict[str, Any]]:
  """Returns the metrics of a quantizer at one size, one row per seed."""
  return [
      results['runs'][settings.run_name(*key)]
      for key in runs()
      if key[:2] == (quantizer, bits)
  ]


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws PSNR and normalized entropy against codebook size."""
  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
  columns = (('psnr', 'PSNR, dB'), ('entropy_share', 'normalized entropy'))
  for quantizer, label in settings.LABELS.items():
    for axis, (column, title) in zip(axes, columns, strict=True):
      values = [
          statistics.mean(row[column] for row in _rows(results, quantizer, b))
          for b in BITS
      ]
      axis.plot(BITS, values, marker='o', label=label)
      axis.set(xlabel='codebook size, log2 K', ylabel=title)
  for axis in axes:
    axis.grid(alpha=0.3)
  axes[1].set_ylim(0.8, 1)
  axes[1].legend()
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  sweep.main(__doc__, HERE, run, print_tables=print_tables, plot=plot)
