"""Generators on CIFAR-10 tokens of FSQ and VQ against codebook size.

  python -m experiments.generation.cifar10 --run --data_dir=DIR --vgg16=FILE

After figure 3 of the FSQ paper (arXiv 2309.15505), with other distances than
FID. With --run, trains the missing tokenizers and generators under --workdir,
where interrupted runs resume and the runs of experiments/quantizer_comparison
are reused, samples, and writes cifar10.json next to this script. Then draws
cifar10.png and prints the tables. FILE is the network of eval.networks.vgg16.
"""

from collections.abc import Callable, Iterable, Mapping
import functools
import hashlib
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
QUANTIZERS = 'fsq', 'vq_ema'
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
_PIXEL_METRICS = 'fd_pixel_pca', 'nearest_neighbour_accuracy', 'copies'
_SAMPLE_METRICS = (
    'fd_vgg16', 'precision_vgg16', 'recall_vgg16', *_PIXEL_METRICS
)  # fmt: skip
_LIKELIHOODS = (
    'bits_per_token', 'train_bits_per_token', 'compression_bits_per_token',
)  # fmt: skip


def run(
    workdir: pathlib.Path, data_dir: str, *, vgg16: str
) -> dict[str, Any]:
  """Trains and measures what is missing and returns the results."""
  stage_1, stage_2 = tokenizer_runs(data_dir), generator_runs(workdir)
  sweep.train(settings.CONFIG, stage_1, workdir)
  sweep.train(CONFIG, stage_2, workdir)
  test, train = _load_images(data_dir)
  originals = sample_metrics.ImageSet(*(x[:NUM_SAMPLES] for x in test))
  evaluator = functools.cache(lambda: _build_evaluator(test, train, vgg16))
  with open(vgg16, 'rb') as file:
    network = hashlib.file_digest(file, 'sha256').hexdigest()
  protocol = {
      'networks': {'vgg16': network},
      'test_images': hashlib.sha256(test.images).hexdigest(),
      'num_images': NUM_SAMPLES,
  }
  sampling = {**protocol, 'seed': SEED, 'sampling': _sampling(workdir, stage_2)}
  metrics, hashes = {}, {}
  for name in stage_1:
    tokenizer = tokenizers.Tokenizer.from_workdir(workdir / name)
    hashes[str(workdir / name)] = tokenizer.model_hash
    metrics[name] = measure_once(
        workdir / name,
        {**protocol, 'model_hash': tokenizer.model_hash},
        functools.partial(_reconstruct, tokenizer, originals),
        evaluator,
    )
  for name, overrides in stage_2.items():
    made_from = _read_json(workdir / name, 'evaluation')['protocol']
    model_hash = hashes[overrides['tokens.tokenizer']]
    if made_from['model_hash'] != model_hash:
      raise ValueError(
          f'{workdir / name} was trained on tokens of another tokenizer than'
          f' {overrides["tokens.tokenizer"]}; delete its folder.'
      )
    metrics[name] = measure_once(
        workdir / name,
        {**sampling, 'generator_hash': made_from['generator_hash']},
        functools.partial(_sample, workdir / name),
        evaluator,
    )
  references, pixels = _measure_references(test, train, originals)
  return {
      'command': 'python -m experiments.generation.cifar10 --run',
      'protocol': sampling | pixels,
      'made_with': sweep.describe_runs(workdir, [*stage_1, *stage_2]),
      'references': references,
      'tokenizers': {
          name: sweep.read_numbers(workdir / name) | metrics[name]
          for name in stage_1
      },
      'generators': {
          name: _read_numbers(workdir / name) | metrics[name]
          for name in stage_2
      },
  }


def tokenizer_runs(data_dir: str) -> dict[str, dict[str, Any]]:
  """Returns the config overrides of every tokenizer, by name."""
  return {
      settings.run_name(quantizer, bits, SEED): settings.final_run(
          quantizer, bits, SEED, data_dir
      )
      for bits in BITS
      for quantizer in QUANTIZERS
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
  """Returns likelihoods of a finished generator."""
  evaluation = _read_json(folder, 'evaluation')
  return {
      'num_parameters': _read_json(folder, 'run')['num_parameters'],
      **{name: evaluation['metrics'][name] for name in _LIKELIHOODS},
      'baselines': evaluation['baselines'],
  }


def _run_name(quantizer: str, head: str, bits: int) -> str:
  return f'generator_{quantizer}_{head}_{bits}_bits'


def _read_json(folder: pathlib.Path, name: str) -> Any:
  return json.loads((folder / f'{name}.json').read_text(encoding='utf-8'))


def _load_images(
    data_dir: str,
) -> tuple[sample_metrics.ImageSet, sample_metrics.ImageSet]:
  """Returns the test images and a fifth of the training images."""
  sets = []
  for split in ('test', 'train[:20%]'):
    config = sweep.make_config(
        settings.CONFIG, {'data.data_dir': data_dir, 'data.eval_split': split}
    )
    source = data.open_source(config.data, 'eval')
    numbers = range(len(source))
    sets.append(sample_metrics.ImageSet(
        np.stack([source.load(i) for i in numbers]),
        np.array([source.metadata(i).label for i in numbers]),
    ))
  return sets[0], sets[1]


def _build_evaluator(
    test: sample_metrics.ImageSet, train: sample_metrics.ImageSet, vgg16: str
) -> sample_metrics.SampleEvaluator:
  mesh = partitioning.create_mesh({'data': -1, 'fsdp': 1})
  networks = sample_metrics.load_networks({'vgg16': vgg16}, mesh)
  return sample_metrics.SampleEvaluator([test], [train], networks)


def _measure_references(
    test: sample_metrics.ImageSet,
    train: sample_metrics.ImageSet,
    originals: sample_metrics.ImageSet,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns metrics in pixels of unchanged images, and their protocol."""
  evaluator = sample_metrics.SampleEvaluator([test], [train])
  training = sample_metrics.ImageSet(*(x[:NUM_SAMPLES] for x in train))
  rows = {}
  for name, images in (
      ('test images', originals), ('training images', training)
  ):
    metrics, protocol = evaluator.run([images])
    rows[name] = {x: metrics[x] for x in _PIXEL_METRICS}
  kept = ('num_images', 'precision_recall_k', 'pixel_pca')
  return rows, {'reference': {name: protocol[name] for name in kept}}


def measure_once(
    folder: pathlib.Path,
    protocol: Mapping[str, Any],
    make_images: Callable[[], sample_metrics.ImageSet],
    evaluator: Callable[[], sample_metrics.SampleEvaluator],
) -> dict[str, float]:
  """Returns the metrics of a run's images, from measured.json if it has them.

  Args:
    folder: of the run.
    protocol: all that the metrics depend on, as JSON values; measured.json of
      another protocol is replaced.
    make_images: makes the images.
    evaluator: returns the evaluator of the images.
  """
  path = folder / 'measured.json'
  measured = workdirs.read_json(path)
  if measured is None or measured.get('protocol') != protocol:
    sys.stdout.write(f'== measuring {folder.name}\n')
    sys.stdout.flush()
    metrics, _ = evaluator().run([make_images()])
    measured = {
        'metrics': {name: metrics[name] for name in _SAMPLE_METRICS},
        'protocol': protocol,
    }
    workdirs.write_json(path, measured)
  return measured['metrics']


def _sampling(
    workdir: pathlib.Path, names: Iterable[str]
) -> dict[str, Any]:
  """Returns the sampler that all generators have."""
  options = [_read_json(workdir / name, 'config')['sample'] for name in names]
  if any(x != options[0] for x in options):
    raise ValueError(f'Generators in {workdir} have different sections sample.')
  # Of the command line, not of `Generator.sample`.
  others = {'num_images', 'classes', 'batch_size'}
  return {name: x for name, x in options[0].items() if name not in others}


def _reconstruct(
    tokenizer: tokenizers.Tokenizer, originals: sample_metrics.ImageSet
) -> sample_metrics.ImageSet:
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
      ' fd_vgg16 | fd_pixel_pca | 1-NN accuracy |\n' + '|---' * 8 + '|\n'
  )
  for quantizer in QUANTIZERS:
    for bits in BITS:
      row = results['tokenizers'][settings.run_name(quantizer, bits, SEED)]
      label = settings.LABELS[quantizer]
      if quantizer == 'fsq':
        levels = quantizers.recommended_levels(bits)
        label += f' {",".join(map(str, levels))}'
      write(
          f'| {label} | {row["codebook_size"]:,} | {row["psnr"]:.2f} |'
          f' {row["usage"]:.1%} | {row["entropy_bits"]:.2f} |'
          f' {row["fd_vgg16"]:.1f} | {row["fd_pixel_pca"]:.3f} |'
          f' {row["nearest_neighbour_accuracy"]:.3f} |\n'
      )
  for name, row in results['references'].items():
    write(
        f'| none: {name} | | | | | | {row["fd_pixel_pca"]:.3f} |'
        f' {row["nearest_neighbour_accuracy"]:.3f} |\n'
    )
  write(
      '\n| generator | codes | parameters | bits per token |'
      ' of training images | compression cost | class x position unigram |'
      ' left neighbour |'
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
          f' {row["fd_vgg16"]:.1f} | {row["fd_pixel_pca"]:.2f} |'
          f' {row["precision_vgg16"]:.2f} | {row["recall_vgg16"]:.2f} |'
          f' {row["nearest_neighbour_accuracy"]:.3f} | {row["copies"]:.0f} |\n'
      )


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws reconstruction, usage, samples and compression cost."""
  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  panels = (
      (
          'fd_vgg16 of reconstructions (lower is better)',
          lambda x: x['tokenizer']['fd_vgg16'],
      ),
      ('codebook usage', lambda x: x['tokenizer']['usage']),
      ('fd_vgg16 of samples (lower is better)', lambda x: x['fd_vgg16']),
      (
          'compression cost, bits per token',
          lambda x: x['compression_bits_per_token'],
      ),
  )
  figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout='constrained')
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
