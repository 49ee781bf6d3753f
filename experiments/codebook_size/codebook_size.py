"""FSQ and VQ from 2^4 codes on CIFAR-10.

  python -m experiments.codebook_size.codebook_size --run [--data_dir=DIR]

After figure 3 of the FSQ paper (arXiv 2309.15505), with PSNR in place of FID.
Trains all runs that are not finished, each in its own folder under --workdir;
interrupted runs resume, and runs of experiments/quantizer_comparison are
reused. Writes results.json and plot.png beside this script and prints the
table. Without --run the plot and the table are made from results.json.
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
# Sizes of each curve. The paper recommends levels for more sizes than VQ is
# trained at.
BITS = {
    'fsq': (4, 6, 8, 9, 10, 11, 12, 14, 16),
    'vq_ema': (4, 6, 8, 10, 12, 14),
    'vq_plain': (4, 6, 8, 10, 12, 14),
}
LABELS = {
    'fsq': 'FSQ',
    'vq_ema': 'VQ, k-means and restarts',
    'vq_plain': 'VQ, plain',
}


def seeds(quantizer: str, bits: int) -> tuple[int, ...]:
  """Returns the seeds: two for FSQ and VQ at the sizes that both have."""
  if quantizer != 'vq_plain' and bits in BITS['vq_ema']:
    return (0, 1)
  return (0,)


def run(workdir: pathlib.Path, data_dir: str) -> dict[str, Any]:
  """Trains; returns the results to store."""
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
  """Returns the numbers of a quantizer at one size, one row a seed."""
  return [
      results['runs'][settings.run_name(quantizer, bits, seed)]
      for seed in seeds(quantizer, bits)
  ]


def print_tables(results: Mapping[str, Any]) -> None:
  """Prints a Markdown table; values of two seeds stand side by side."""
  columns = (
      ('psnr', '.2f'), ('num_used_codes', ',d'), ('usage', '.1%'),
      ('entropy_bits', '.2f'), ('entropy_share', '.1%'),
  )  # fmt: skip
  sys.stdout.write(
      '| quantizer | codes | PSNR, dB | used codes | usage |'
      ' bits a token | share of log2 K |\n' + '|---' * 7 + '|\n'
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
  """Draws the three curves against the codebook's size; a point a seed."""
  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  panels = (
      ('psnr', 'reconstruction: PSNR, dB'),
      ('usage', 'codebook usage'),
      ('entropy_bits', 'compression cost: bits a token'),
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
  axes[2].legend(even, ['all codes as likely'], loc='upper left')
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  sweep.main(__doc__, HERE, run, print_tables=print_tables, plot=plot)
