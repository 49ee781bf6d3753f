"""Generators on CIFAR-10 tokens of FSQ and VQ against codebook size.

  python -m experiments.generation.cifar10 --run --data_dir=DIR --vgg16=FILE

After figure 3 of the FSQ paper (arXiv 2309.15505), with other distances than
FID. With --run, trains the missing tokenizers and generators under --workdir,
where interrupted runs resume and the runs of experiments/quantizer_comparison
are reused, samples, and writes cifar10.json next to this script. Then draws
cifar10.png and prints the tables. FILE is the network of eval.networks.vgg16.
"""

from collections.abc import Mapping
import json
import pathlib
import sys
from typing import Any

import matplotlib
import numpy as np

from experiments import sweep
from experiments.quantizer_comparison import settings
from fsq_jax import data
from fsq_jax import quantizers
from fsq_jax import tokenizer as tokenizers
from fsq_jax import workdir as workdirs
from fsq_jax.evaluation import sample_files
from fsq_jax.evaluation import sample_metrics
from fsq_jax.generators import generator as generators
from fsq_jax.runtime import partitioning

HERE = pathlib.Path(__file__).resolve().parent
BITS = (4, 8, 10, 12, 14)
# Quantizer and head of each curve.
CURVES = {
    'FSQ, level heads': ('fsq', 'levels_autoregressive'),
    'FSQ, flat head': ('fsq', 'flat'),
    'VQ, flat head': ('vq_ema', 'flat'),
}
CONFIG = 'configs/cifar10_maskgit.py'
# The same for all generators, small enough for two CPU cores.
BUDGET = {
    'model.preset': 'tiny',
    'model.depth': 4,
    'model.width': 128,
    'model.num_heads': 4,
    'model.dtype': 'float32',
    'model.scan_unroll': 4,
    # Smoothing over levels and over codes would not be comparable.
    'losses.label_smoothing': 0.0,
    'tokens.train_views': 1,
    'tokens.batch_size': 32,
    'optim.learning_rate': 2e-3,
    'optim.warmup_steps': 100,
    'optim.ema_decay': 0.99,
    'train.num_steps': 1000,
    'train.eval_every_steps': 0,
    'train.checkpoint_every_steps': 500,
    'train.keep_checkpoints': 1,
    'eval.num_images': 1000,
    'eval.num_samples': 0,
}
NUM_SAMPLES = 2000
SEED = 0
_METRICS = (
    'fd_vgg16', 'fd_pixel_pca', 'precision_vgg16', 'recall_vgg16',
    'nearest_neighbour_accuracy', 'copies',
)  # fmt: skip
_BITS = (
    'bits_per_token', 'train_bits_per_token', 'compression_bits_per_token',
)  # fmt: skip


def run(
    workdir: pathlib.Path, data_dir: str, *, vgg16: str
) -> dict[str, Any]:
  """Trains the missing runs and returns the results."""
  stage_1, stage_2 = tokenizer_runs(data_dir), generator_runs(workdir)
  sweep.train(settings.CONFIG, stage_1, workdir)
  sweep.train(CONFIG, stage_2, workdir)
  evaluator, test = _build_evaluator(data_dir, vgg16)
  originals = sample_metrics.ImageSet(*(x[:NUM_SAMPLES] for x in test))
  for name in stage_1:
    _measure_once(workdir / name, evaluator, _reconstruct, originals)
  for name in stage_2:
    _measure_once(workdir / name, evaluator, _sample)
  first = next(iter(stage_2))
  return {
      'command': 'python -m experiments.generation.cifar10 --run',
      'num_samples': NUM_SAMPLES,
      'made_with': sweep.describe_runs(workdir, [*stage_1, *stage_2]),
      'networks': _read_json(workdir / first, 'measured')['networks'],
      'tokenizers': {
          name: sweep.read_numbers(workdir / name)
          | _read_json(workdir / name, 'measured')['metrics']
          for name in stage_1
      },
      'generators': {name: _read_numbers(workdir / name) for name in stage_2},
  }


def tokenizer_runs(data_dir: str) -> dict[str, dict[str, Any]]:
  """Returns the config overrides of every tokenizer, by name."""
  return {
      settings.run_name(quantizer, bits, SEED): settings.final_run(
          quantizer, bits, SEED, data_dir
      )
      for bits in BITS
      for quantizer in dict(CURVES.values())
  }


def generator_runs(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns the config overrides of every generator, by name."""
  return {
      _run_name(quantizer, head, bits): {
          **BUDGET,
          'seed': SEED,
          'model.head': head,
          'tokens.tokenizer': str(
              workdir / settings.run_name(quantizer, bits, SEED)
          ),
      }
      for bits in BITS
      for quantizer, head in CURVES.values()
  }


def _read_numbers(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the numbers of a finished generator."""
  evaluation = _read_json(folder, 'evaluation')
  return {
      'num_parameters': _read_json(folder, 'run')['num_parameters'],
      **{name: evaluation['metrics'][name] for name in _BITS},
      'baselines': evaluation['baselines'],
      **_read_json(folder, 'measured')['metrics'],
  }


def _run_name(quantizer: str, head: str, bits: int) -> str:
  return f'generator_{quantizer}_{head}_{bits}_bits'


def _read_json(folder: pathlib.Path, name: str) -> Any:
  return json.loads((folder / f'{name}.json').read_text(encoding='utf-8'))


def _build_evaluator(
    data_dir: str, vgg16: str
) -> tuple[sample_metrics.SampleEvaluator, sample_metrics.ImageSet]:
  """Returns the comparison with the test images, and these."""
  sets = {}
  for split, part in (('test', 'test'), ('train', 'train[:20%]')):
    config = sweep.make_config(
        settings.CONFIG, {'data.data_dir': data_dir, 'data.eval_split': part}
    )
    dataset = data.build_dataset(config.data, split='eval', seed=SEED)
    source = data.open_source(config.data, 'eval')
    parts = [(x['image'][x['mask']], x['index'][x['mask']]) for x in dataset]
    images, numbers = map(np.concatenate, zip(*parts, strict=True))
    labels = np.array([source.metadata(int(i)).label for i in numbers])
    sets[split] = sample_metrics.ImageSet(images, labels)
  mesh = partitioning.create_mesh({'data': -1, 'fsdp': 1})
  networks = sample_metrics.load_networks({'vgg16': vgg16}, mesh)
  evaluator = sample_metrics.SampleEvaluator(
      [sets['test']], [sets['train']], networks
  )
  return evaluator, sets['test']


def _measure_once(
    folder: pathlib.Path,
    evaluator: sample_metrics.SampleEvaluator,
    make_images,
    *arguments: Any,
) -> None:
  """Writes measured.json of a run, unless it is newer than the run."""
  path = folder / 'measured.json'
  if (
      path.is_file()
      and path.stat().st_mtime > (folder / 'evaluation.json').stat().st_mtime
  ):
    return
  sys.stdout.write(f'== measuring {folder.name}\n')
  sys.stdout.flush()
  metrics, protocol = evaluator.run([make_images(folder, *arguments)])
  workdirs.write_json(
      path,
      {
          'metrics': {name: metrics[name] for name in _METRICS},
          'networks': protocol['networks'],
      },
  )


def _reconstruct(
    folder: pathlib.Path, originals: sample_metrics.ImageSet
) -> sample_metrics.ImageSet:
  tokenizer = tokenizers.Tokenizer.from_workdir(folder)
  images = tokenizer.decode(tokenizer.encode(originals.images))
  return originals._replace(images=images)


def _sample(folder: pathlib.Path) -> sample_metrics.ImageSet:
  generator = generators.Generator.from_workdir(folder, batch_size=100)
  labels = sample_files.balanced_labels(NUM_SAMPLES, 10, SEED)
  images = generator.sample(labels, seed=SEED).images
  return sample_metrics.ImageSet(images, labels)


def _rows(results: Mapping[str, Any], curve: str) -> list[dict[str, Any]]:
  """Returns tokenizer and generator numbers of a curve, a row per size."""
  quantizer, head = CURVES[curve]
  return [
      {
          'tokenizer': results['tokenizers'][
              settings.run_name(quantizer, bits, SEED)
          ],
          **results['generators'][_run_name(quantizer, head, bits)],
      }
      for bits in BITS
  ]


def print_tables(results: Mapping[str, Any]) -> None:
  """Prints Markdown tables of tokenizers and generators."""
  write = sys.stdout.write
  write(
      '| tokenizer | codes | PSNR, dB | usage | entropy, bits per token |'
      ' fd_vgg16 | fd_pixel_pca |\n' + '|---' * 7 + '|\n'
  )
  for quantizer in dict(CURVES.values()):
    for bits in BITS:
      row = results['tokenizers'][settings.run_name(quantizer, bits, SEED)]
      label = settings.LABELS[quantizer]
      if quantizer == 'fsq':
        levels = quantizers.recommended_levels(bits)
        label += f' {",".join(map(str, levels))}'
      write(
          f'| {label} | {row["codebook_size"]:,} | {row["psnr"]:.2f} |'
          f' {row["usage"]:.1%} | {row["entropy_bits"]:.2f} |'
          f' {row["fd_vgg16"]:.1f} | {row["fd_pixel_pca"]:.3g} |\n'
      )
  write(
      '\n| generator | codes | parameters | bits per token | training images |'
      ' compression cost | class x position unigram | left neighbour |'
      ' fd_vgg16 | fd_pixel_pca | precision | recall | 1-NN accuracy |'
      ' copies |\n' + '|---' * 14 + '|\n'
  )
  for curve in CURVES:
    for row in _rows(results, curve):
      baselines = row['baselines']
      write(
          f'| {curve} | {row["tokenizer"]["codebook_size"]:,} |'
          f' {row["num_parameters"]:,} | {row["bits_per_token"]:.2f} |'
          f' {row["train_bits_per_token"]:.2f} |'
          f' {row["compression_bits_per_token"]:.2f} |'
          f' {baselines["class_position_unigram"]:.2f} |'
          f' {baselines["left_neighbour"]:.2f} |'
          f' {row["fd_vgg16"]:.1f} | {row["fd_pixel_pca"]:.3g} |'
          f' {row["precision_vgg16"]:.2f} | {row["recall_vgg16"]:.2f} |'
          f' {row["nearest_neighbour_accuracy"]:.3f} | {row["copies"]:.0f} |\n'
      )


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws reconstruction, usage, samples and compression cost."""
  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  panels = (
      ('reconstruction: fd_vgg16', lambda x: x['tokenizer']['fd_vgg16']),
      ('codebook usage', lambda x: x['tokenizer']['usage']),
      ('samples: fd_vgg16', lambda x: x['fd_vgg16']),
      (
          'compression cost, bits per token',
          lambda x: x['compression_bits_per_token'],
      ),
  )
  figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout='constrained')
  styles = dict(zip(CURVES, ('C0o-', 'C0s--', 'C1o-'), strict=True))
  for i, (axis, (title, value)) in enumerate(zip(axes, panels, strict=True)):
    for curve, style in styles.items():
      if i < 2 and curve == 'FSQ, flat head':
        continue  # The same tokenizers.
      rows = _rows(results, curve)
      axis.plot(
          [x['tokenizer']['codebook_size'] for x in rows],
          [value(x) for x in rows],
          style,
          label=curve.split(',')[0] if i < 2 else curve,
          markersize=4,
      )
    axis.set_xscale('log', base=2)
    axis.set(xlabel='codebook size', title=title)
    axis.grid(alpha=0.3)
    axis.legend()
  axes[1].set_ylim(0, 1.03)
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  sweep.main(
      __doc__,
      HERE,
      run,
      print_tables=print_tables,
      plot=plot,
      names=('cifar10.json', 'cifar10.png'),
      paths={'vgg16': 'weights of VGG16, from experiments/weights'},
  )
