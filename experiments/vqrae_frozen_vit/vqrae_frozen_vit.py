"""VQRAE on photographs: reconstruction from a frozen pretrained encoder.

  python -m experiments.vqrae_frozen_vit.vqrae_frozen_vit --run --data_dir=DIR
      --encoder=ENCODER

With --run, trains the missing runs under --workdir, where interrupted runs
resume, and writes results.json and reconstructions.png next to this script.
Then draws plot.png and prints the table.
"""

from collections.abc import Iterator, Mapping
import json
import pathlib
import sys
from typing import Any

from einops import rearrange
import jax
import matplotlib
import numpy as np

from experiments import sweep
from fsq_jax import data
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import saved_model
from fsq_jax.models import pixels as pixels_lib
from fsq_jax.runtime import partitioning

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = 'configs/vqrae_fsq_dinov2_s.py'
LABELS = {
    'trained': 'pretrained ViT, frozen',
    'random': 'random ViT, frozen',
    'scratch': 'ViT from scratch',
    'stage2': 'stage 2: pretrained ViT, unfrozen, distilled',
    'longer': 'stage 1, same number of steps',
}
_NUM_GRID_IMAGES = 8


def settings(
    workdir: pathlib.Path, data_dir: str, encoder: str
) -> dict[str, dict[str, Any]]:
  """Returns the config overrides of each run, by name.

  Args:
    workdir: parent folder of the runs.
    data_dir: folder with train/ and val/.
    encoder: Hugging Face directory of the pretrained ViT-S/14.
  """
  shared = {'data.data_dir': data_dir, 'data.eval_split': 'val'}
  trained_vit = shared | {'model.encoder.checkpoint': encoder}
  random_vit = shared | {'model.encoder.checkpoint': ''}
  # A short second stage with half the learning rate of the first.
  second = trained_vit | {
      'train.init_from': str(workdir / 'trained'),
      'train.num_steps': 300,
      'train.eval_every_steps': 100,
      'optim.warmup_steps': 50,
      'optim.learning_rate': 2e-3,
  }
  return {
      'trained': trained_vit,
      'random': random_vit,
      'scratch': random_vit | {'optim.frozen': ()},
      'stage2': second | {
          'optim.frozen': (),
          'optim.learning_rate_factors': (('encoder/.*', 0.1),),
          'losses.distillation_weight': 1.0,
      },
      'longer': second,
  }


def run(
    workdir: pathlib.Path, data_dir: str, encoder: str
) -> dict[str, Any]:
  """Trains the missing runs, draws reconstructions, returns the results."""
  runs = settings(workdir, data_dir, encoder)
  sweep.train(CONFIG, runs, workdir)
  results = sweep.collect(workdir, runs)
  for name, numbers in results['runs'].items():
    rows = workdirs.read_metrics(workdir / name)
    numbers['curve'] = [
        [row['step'], row['psnr']] for row in rows if row['split'] == 'eval'
    ]
    last = [row for row in rows if row['split'] == 'train'][-1]
    numbers['last_losses'] = {
        key: value for key, value in last.items() if key.endswith('_loss')
    }
    metadata = json.loads((workdir / name / workdirs.RUN).read_text('utf-8'))
    numbers['num_parameters'] = metadata['num_parameters']
    numbers['num_frozen_parameters'] = metadata['num_frozen_parameters']
  for name, psnr in probe_encoders(workdir, list(runs)).items():
    results['runs'][name]['linear_psnr'] = psnr
  sweep.draw_reconstructions(
      workdir, runs, HERE / 'reconstructions.png', num_images=_NUM_GRID_IMAGES
  )
  command = (
      'python -m experiments.vqrae_frozen_vit.vqrae_frozen_vit --run'
      ' --data_dir=DIR --encoder=ENCODER'
  )
  return {'command': command, **results}


def probe_encoders(
    workdir: pathlib.Path, names: list[str]
) -> dict[str, float]:
  """Returns the linear-probe PSNR of each run's encoder.

  The probe is the least-squares linear map, fitted on the training images, from
  each latent, before projector and quantizer, to the pixels of its patch.

  Args:
    workdir: parent folder of the runs.
    names: names of the runs.

  Returns:
    PSNR in dB on the held-out images, by run.
  """
  results = {}
  for name in names:
    found = saved_model.find_run(workdir / name)
    mesh = partitioning.create_mesh(found.config.partitioning.mesh)
    model, variables = saved_model.restore(found, mesh)
    gram, product = 0.0, 0.0
    known = found.config, model, variables
    for latents, pixels in _pairs(*known, split='train_once'):
      gram += np.einsum('bhwc,bhwd->cd', latents, latents)
      product += np.einsum('bhwc,bhwp->cp', latents, pixels)
    weights = np.linalg.lstsq(gram, product, rcond=1e-9)[0]
    values = []
    for latents, pixels in _pairs(*known, split='eval'):
      error = np.clip(latents @ weights, -1, 1) - pixels
      values.extend(10 * np.log10(4 / np.mean(error**2, axis=(1, 2, 3))))
    results[name] = float(np.mean(values))
  return results


def _pairs(
    config, model, variables, *, split: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields latents with a bias [B, h, w, C + 1], and the pixels of patches."""
  encode = jax.jit(model.encoder.apply)
  params = {'params': variables['params']['encoder']}
  patch = config.model.decoder.patch_size
  for batch in data.build_dataset(config.data, split=split, seed=0):
    images = np.asarray(pixels_lib.to_float(batch['image'][batch['mask']]))
    latents = np.asarray(encode(params, images), np.float64)
    constant = np.ones((*latents.shape[:3], 1))
    pixels = rearrange(
        images, 'b (h p) (w q) c -> b h w (p q c)', p=patch, q=patch
    )
    yield np.concatenate([latents, constant], axis=-1), pixels


def print_tables(results: Mapping[str, Any]) -> None:
  """Prints a Markdown table of the runs."""
  sys.stdout.write(
      '| encoder | steps | trained parameters | PSNR, dB | SSIM | usage |'
      ' perplexity | bits per token | normalized entropy |'
      ' linear-probe PSNR, dB |\n' + '|---' * 10 + '|\n'
  )
  for name, label in LABELS.items():
    row = results['runs'][name]
    steps = row['curve'][-1][0]
    if name in ('stage2', 'longer'):
      steps = f'{results["runs"]["trained"]["curve"][-1][0]} + {steps}'
    num_trained = row['num_parameters'] - row['num_frozen_parameters']
    cells = [
        label, steps, f'{num_trained / 1e6:.1f} M', f'{row["psnr"]:.2f}',
        f'{row["ssim"]:.3f}', f'{row["usage"]:.1%}',
        f'{row["perplexity"]:,.0f}', f'{row["entropy_bits"]:.2f}',
        f'{row["entropy_share"]:.1%}', f'{row["linear_psnr"]:.2f}',
    ]  # fmt: skip
    sys.stdout.write(f'| {" | ".join(map(str, cells))} |\n')


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws the PSNR of all runs against the step."""
  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  figure, axis = plt.subplots(figsize=(6, 3.6), layout='constrained')
  first = results['runs']['trained']['curve']
  for name, label in LABELS.items():
    curve = results['runs'][name]['curve']
    if name in ('stage2', 'longer'):
      start, value = first[-1]
      curve = [[start, value], *([start + s, v] for s, v in curve)]
    axis.plot(*zip(*curve, strict=True), 'o-', markersize=3, label=label)
  axis.set(xlabel='steps of 8 images', ylabel='PSNR on held-out images, dB')
  axis.grid(alpha=0.3)
  axis.legend(fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  sweep.main(
      __doc__,
      HERE,
      run,
      print_tables=print_tables,
      plot=plot,
      runs='vqrae_frozen_vit',
      paths={'encoder': 'Hugging Face directory of the pretrained ViT-S/14'},
  )
