"""Ablation of the default run: changes one setting at a time.

  python experiments/default_run/ablation.py --run

Each variant is a smaller run under --workdir and resumes if interrupted. The
results are written to ablation.json next to this script; without --run only the
table is printed.
"""

import argparse
import json
import pathlib

from fsq_jax import configuration
from fsq_jax import train

HERE = pathlib.Path(__file__).resolve().parent
# A third of the default run's steps and less than half of its parameters.
SMALLER = {
    'train.num_steps': 1500,
    'train.eval_every_steps': 0,
    'model.encoder.width': 64,
    'model.encoder.mlp_dim': 128,
}
_DIVERSITY = 'model.quantizer.fsq.diversity_weight'
VARIANTS = {
    'default': {},
    'diversity loss x 0.2': {_DIVERSITY: 0.01},
    'diversity loss x 4': {_DIVERSITY: 0.2},
    'no diversity loss': {_DIVERSITY: 0.0},
    'no diversity loss, standardized projector_in': {
        _DIVERSITY: 0.0,
        'model.projector_in.name': 'standardized',
    },
    'projector_out linear': {'model.projector_out.name': 'linear'},
    'commitment loss': {'model.quantizer.fsq.commitment_weight': 1.0},
    'AdamW': {'optim.name': 'adamw'},
    'no colour jitter': {'data.color_jitter': 0.0},
}
COLUMNS = ('psnr', 'ssim', 'usage', 'perplexity')


def run_variant(name: str, workdir: pathlib.Path) -> dict[str, float]:
  """Trains one variant and returns its metrics."""
  config = configuration.load_config(HERE.parents[1] / 'configs/fsq_888.py')
  config.update_from_flattened_dict({**SMALLER, **VARIANTS[name]})
  folder = workdir / name.replace(' ', '_')
  train.train_and_evaluate(config, folder)
  evaluation = json.loads((folder / 'evaluation.json').read_text())
  numbers = {**evaluation['metrics'], **evaluation['codebook']}
  return {column: round(numbers[column], 4) for column in COLUMNS}


def print_table(results: dict[str, dict[str, float]]) -> None:
  """Prints a Markdown table of the results."""
  print('| variant | PSNR, dB | SSIM | usage | perplexity |')  # noqa: T201
  print('|---|---|---|---|---|')  # noqa: T201
  for name, row in results.items():
    print(  # noqa: T201
        f'| {name} | {row["psnr"]:.2f} | {row["ssim"]:.3f} |'
        f' {row["usage"]:.1%} | {row["perplexity"]:.0f} |'
    )


def main() -> None:
  """Optionally trains the variants, then prints the results."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--run', action='store_true', help='train the variants')
  parser.add_argument('--workdir', default='runs/ablation', type=pathlib.Path)
  arguments = parser.parse_args()
  path = HERE / 'ablation.json'
  if arguments.run:
    results = {
        name: run_variant(name, arguments.workdir.absolute())
        for name in VARIANTS
    }
    path.write_text(json.dumps(results, indent=2) + '\n')
  print_table(json.loads(path.read_text()))


if __name__ == '__main__':
  main()
