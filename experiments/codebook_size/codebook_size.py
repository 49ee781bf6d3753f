"""Reconstruction and usage of FSQ and VQ against codebook size, on CIFAR-10.

  python -m experiments.codebook_size.codebook_size --run [--data_dir=DIR]

After figure 3 of the FSQ paper (arXiv 2309.15505), with PSNR instead of FID.
With --run, trains the missing runs under --workdir, where interrupted runs
resume and the runs of experiments/quantizer_comparison are reused, and writes
results.json next to this script. Then draws plot.png and prints the table.
"""

from collections.abc import Mapping
import pathlib
import statistics
import sys
from typing import Any

import matplotlib

from experiments import sweep
from experiments.quantizer_comparison import settings
from fsq_jax import quantizers

HERE = pathlib.Path(__file__).resolve().parent
# log2 of the codebook sizes of each curve. FSQ has more sizes than VQ.
BITS = {
    'fsq': (4, 6, 8, 9, 10, 11, 12, 14, 16),
    'vq_ema': (4, 6, 8, 10, 12, 14),
    'vq_plain': (4, 6, 8, 10, 12, 14),
}
LABELS = {
    'fsq': 'FSQ',
    'vq_ema': 'VQ, k-means init and dead-code reset',
    'vq_plain': 'VQ, plain',
}


def seeds(quantizer: str, bits: int) -> tuple[int, ...]:
  """Returns the seeds: two for FSQ and VQ at sizes that both have, else one."""
  if quantizer != 'vq_plain' and bits in BITS['vq_ema']:
    return (0, 1)
  return (0,)


def run(workdir: pathlib.Path, data_dir: str) -> dict[str, Any]:
  """Trains the missing runs and returns the results."""
  keys = {
      settings.run_name(quantizer, bits, seed): (quantizer, bits, seed)
      # Whole curves of one seed first.
      for seed in (0, 1)
      for quantizer in BITS
      for bits in BITS[quantizer]
      if seed in seeds(quantizer, bits)
  }
  sweep.train(
      settings.CONFIG,
      {name: settings.final_run(*key, data_dir) for name, key in keys.items()},
      workdir,
  )
  command = 'python -m experiments.codebook_size.codebook_size --run'
  return {'command': command, **sweep.collect(workdir, keys)}


def _rows(
    results: Mapping[str, Any], quantizer: str, bits: int
) -> list[dict[str, Any]]:
  """Returns the metrics of a quantizer at one size, one row per seed."""
  return [
      results['runs'][settings.run_name(quantizer, bits, seed)]
      for seed in seeds(quantizer, bits)
  ]


def print_tables(results: Mapping[str, Any]) -> None:
  """Prints a Markdown table; values of two seeds are separated by a slash."""
  columns = (
      ('psnr', '.2f'), ('num_used_codes', ',d'), ('usage', '.1%'),
      ('entropy_bits', '.2f'), ('entropy_share', '.1%'),
  )  # fmt: skip
  sys.stdout.write(
      '| quantizer | codes | PSNR, dB | used codes | usage |'
      ' bits per token | normalized entropy |\n' + '|---' * 7 + '|\n'
  )
  for quantizer in BITS:
    for bits in BITS[quantizer]:
      rows = _rows(results, quantizer, bits)
      label = LABELS[quantizer]
      if quantizer == 'fsq':
        levels = quantizers.recommended_levels(bits)
        label += f' {",".join(map(str, levels))}'
      cells = [label, f'{rows[0]["codebook_size"]:,}']
      cells += [
          ' / '.join(format(row[column], form) for row in rows)
          for column, form in columns
      ]
      sys.stdout.write(f'| {" | ".join(cells)} |\n')


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws PSNR, usage and entropy against codebook size; a dot per seed."""
  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  panels = (
      ('psnr', 'reconstruction: PSNR, dB'),
      ('usage', 'codebook usage'),
      ('entropy_bits', 'entropy, bits per token'),
  )
  figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout='constrained')
  for axis, (column, title) in zip(axes, panels, strict=True):
    for quantizer, color in zip(BITS, ('C0', 'C1', 'C2'), strict=True):
      curves = [_rows(results, quantizer, bits) for bits in BITS[quantizer]]
      sizes = [rows[0]['codebook_size'] for rows in curves]
      axis.plot(
          sizes,
          [statistics.mean(row[column] for row in rows) for rows in curves],
          color=color,
          label=LABELS[quantizer],
      )
      for size, rows in zip(sizes, curves, strict=True):
        for row in rows:
          axis.plot(size, row[column], 'o', color=color, markersize=4)
    axis.set_xscale('log', base=2)
    axis.set(xlabel='codebook size', title=title)
    axis.grid(alpha=0.3)
  axes[1].set_ylim(0, 1.03)
  axes[1].legend()
  even = axes[2].plot([2**4, 2**16], [4, 16], 'k:', linewidth=1)
  axes[2].legend(even, ['uniform: log2 K'], loc='upper left')
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  sweep.main(__doc__, HERE, run, print_tables=print_tables, plot=plot)
