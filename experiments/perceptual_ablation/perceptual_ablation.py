"""Effects and costs of LPIPS and of a discriminator.

  python -m experiments.perceptual_ablation.perceptual_ablation --run
      --data_dir=DIR --vgg16=FILE --alexnet=FILE

Trains all runs that are not finished, each in its own folder under --workdir;
interrupted runs resume. Writes results.json, plot.png and reconstructions.png
beside this script and prints the table. Without --run the plot and the table
are made from results.json.
"""

from collections.abc import Mapping
import json
import pathlib
import sys
from typing import Any

import matplotlib
import numpy as np

from experiments import sweep
from fsq_jax import workdir as workdirs

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = 'configs/folder_fsq_8555.py'
START = 'start'
LABELS = {
    'l2': 'L2',
    'lpips': 'L2 + LPIPS',
    'gan': 'L2 + LPIPS + GAN',
}
_METRICS = ('psnr', 'ssim', 'lpips_alexnet', 'fd_vgg16', 'usage')
# Drawn over the steps, where a run has them.
_LOSSES = (
    'reconstruction_loss', 'perceptual_loss', 'adversarial_loss',
    'discriminator_loss', 'real_logits', 'fake_logits',
)  # fmt: skip
_NUM_GRID_IMAGES = 10
_ENLARGEMENT = 2


def settings(
    workdir: pathlib.Path, data_dir: str, vgg16: str, alexnet: str
) -> dict[str, dict[str, Any]]:
  """Returns the fields of the config that each run changes, by its name.

  Args:
    workdir: folder of the runs.
    data_dir: holds train/ and val/.
    vgg16: weights of LPIPS and of fd_vgg16.
    alexnet: weights of LPIPS.
  """
  shared = {
      'data.data_dir': data_dir,
      'data.eval_split': 'val',
      # 64 tokens per image, few enough for the losses to make a difference.
      'model.encoder.patch_size': 8,
      'model.encoder.width': 192,
      'model.encoder.num_heads': 6,
      'model.encoder.mlp_dim': 768,
      'model.encoder.depth': 2,
      'model.decoder.depth': 6,
      'model.scan_unroll': 6,
      'eval.networks.lpips_alexnet': alexnet,
      'eval.networks.fd_vgg16': vgg16,
  }
  more = shared | {
      'train.init_from': str(workdir / START),
      'train.num_steps': 1000,
      'train.eval_every_steps': 500,
      'train.log_every_steps': 10,
      'optim.learning_rate': 5e-4,
      'optim.warmup_steps': 50,
  }
  lpips = more | {
      'losses.perceptual.name': 'lpips_vgg16',
      'losses.perceptual.checkpoint': vgg16,
  }
  return {
      START: shared | {
          'train.num_steps': 2000,
          'train.eval_every_steps': 1000,
      },
      'l2': more,
      'lpips': lpips,
      'gan': lpips | {
          'discriminator.name': 'patch',
          'discriminator.patch.channels': 64,
          'discriminator.optim.learning_rate': 4e-4,
          'losses.adversarial.weighting': 'adaptive',
          'losses.adversarial.weight': 0.2,
          'losses.adversarial.start_step': 100,
          'losses.adversarial.ramp_steps': 200,
      },
  }


def run(
    workdir: pathlib.Path, data_dir: str, vgg16: str, alexnet: str
) -> dict[str, Any]:
  """Trains and draws the reconstructions; returns the results to store."""
  runs = settings(workdir, data_dir, vgg16, alexnet)
  sweep.train(CONFIG, runs, workdir)
  results = sweep.collect(workdir, runs)
  for name, numbers in results['runs'].items():
    numbers |= _read_evaluation(workdir / name)
    rows = workdirs.read_metrics(workdir / name)
    numbers['num_steps'] = rows[-1]['step']
    numbers['curves'] = {
        loss: [
            [row['step'], float(f'{row[loss]:.5g}')]
            for row in rows
            if row['split'] == 'train' and loss in row
        ]
        for loss in _LOSSES
        if any(loss in row for row in rows)
    }
  sweep.draw_reconstructions(
      workdir,
      LABELS,
      HERE / 'reconstructions.png',
      num_images=_NUM_GRID_IMAGES,
      enlargement=_ENLARGEMENT,
  )
  command = (
      'python -m experiments.perceptual_ablation.perceptual_ablation --run'
      ' --data_dir=DIR --vgg16=FILE --alexnet=FILE'
  )
  return {'command': command, **results}


def _read_evaluation(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what networks measured, the weights by which, and of how much."""
  text = (folder / workdirs.EVALUATION).read_text('utf-8')
  evaluation = json.loads(text)
  protocol = evaluation['protocol']
  return {
      **{name: evaluation['metrics'][name] for name in protocol['networks']},
      'networks': protocol['networks'],
      'num_images': protocol['num_images'],
  }


def print_tables(results: Mapping[str, Any]) -> None:
  """Prints a Markdown table of the runs."""
  sys.stdout.write(
      '| losses | PSNR, dB | SSIM | LPIPS, AlexNet | fd_vgg16 |'
      ' used codes |\n' + '|---' * 6 + '|\n'
  )
  for name, label in LABELS.items():
    row = results['runs'][name]
    psnr, ssim, lpips, distance, usage = (row[metric] for metric in _METRICS)
    sys.stdout.write(
        f'| {label} | {psnr:.2f} | {ssim:.3f} | {lpips:.3f} | {distance:.1f} |'
        f' {usage:.1%} |\n'
    )


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws the losses of all runs over their steps, one panel a loss."""
  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout='constrained')
  for axis, loss in zip(axes.ravel(), _LOSSES, strict=True):
    for number, (name, label) in enumerate(LABELS.items()):
      points = results['runs'][name]['curves'].get(loss)
      if points:
        steps, values = np.array(points).T
        # Means over five logged steps: single batches scatter.
        count = len(values) // 5 * 5
        values = values[:count].reshape(-1, 5).mean(axis=1)
        axis.plot(steps[4:count:5], values, color=f'C{number}', label=label)
    axis.set(title=loss.replace('_', ' '), xlabel='step')
    axis.grid(alpha=0.3)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside upper center', ncols=len(labels))
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  sweep.main(
      __doc__,
      HERE,
      run,
      print_tables=print_tables,
      plot=plot,
      runs='perceptual_ablation',
      paths={
          'vgg16': "weights of LPIPS' VGG16, from experiments/weights",
          'alexnet': "weights of LPIPS' AlexNet, from experiments/weights",
      },
  )
