"""Generators on tokens of digits: heads, orders, samplers, seeds.

  python -m experiments.generation.digits --run [--workdir=DIR]

With --run, trains the missing runs one after the other, samples from them, and
writes digits.json next to this script; an interrupted run resumes. Then prints
the tables. Tokens are exact patch codes; the shipped configs are also trained
on the tokens of a trained tokenizer.
"""

import argparse
from collections.abc import Mapping
import json
import pathlib
import statistics
import sys
from typing import Any

import numpy as np

from experiments import sweep
from experiments.generation import patch_codes
from fsq_jax import configuration
from fsq_jax import workdir as workdirs
from fsq_jax.evaluation import sample_files
from fsq_jax.evaluation import sample_metrics
from fsq_jax.generators import evaluation
from fsq_jax.generators import generator as generators
from fsq_jax.generators import token_files
from fsq_jax.generators import training
from fsq_jax.workdir import provenance

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / 'digits.json'
COMMAND = 'python -m experiments.generation.digits --run'
CONFIGS = {
    'masked': 'configs/digits_maskgit.py',
    'autoregressive': 'configs/digits_autoregressive.py',
}
HEADS = ('levels_autoregressive', 'levels_independent', 'flat')
SEEDS = (0, 1, 2)
SAMPLERS = {
    'masked': {
        'halton, 16 steps': {'order': 'halton', 'num_steps': 16},
        'halton, 8 steps': {'order': 'halton', 'num_steps': 8},
        'random, 16 steps': {'order': 'random', 'num_steps': 16},
        'confidence, 8 steps': {'order': 'confidence', 'num_steps': 8},
        'confidence, 8 steps, no noise': {
            'order': 'confidence', 'num_steps': 8, 'choice_temperature': 0.0,
        },
    },
    'autoregressive': {
        'temperature 1': {},
        'temperature 0.8': {'temperature': 0.8},
    },
}  # fmt: skip
TOKENIZER = 'configs/digits_fsq.py'
NUM_SAMPLES = 1000
NUM_TOKENS = 16
# Largest bits per image and Frechet distance, see the README.
GATES = {
    ('autoregressive', 'levels_autoregressive'): (58.0, 1.9),
    ('masked', 'levels_autoregressive'): (62.0, 2.5),
}
# Distances are in bins of a grey pixel: features take 255 for 1, and the three
# equal channels treble squared distances.
_FD_UNIT = 255**2 / 3


def run(folder: pathlib.Path) -> dict[str, Any]:
  """Trains the missing runs and returns the results."""
  files = patch_codes.write(folder / 'tokens')
  arrays = {
      split: token_files.read(source, range(len(source)))
      for split, source in files.items()
  }
  images = {
      split: patch_codes.decode(*part) for split, part in arrays.items()
  }
  results = {}
  for seed in SEEDS:
    for kind in CONFIGS:
      for head in HEADS:
        name = f'{kind}_{head}_{seed}'
        path = folder / name / 'measured.json'
        if not path.is_file():
          sys.stdout.write(f'== {name}\n')
          measured = _measure(folder, name, kind, head, seed, images)
          workdirs.write_json(path, measured)
        results[name] = json.loads(path.read_text())
  return {
      'command': COMMAND,
      'made_with': {
          x: provenance.describe()[x] for x in ('versions', 'devices', 'git')
      },
      'num_samples': NUM_SAMPLES,
      'baselines': next(iter(results.values()))['baselines'],
      'class_position_unigram_samples': _compare(
          patch_codes.decode(*_sample_unigram(arrays['train'])), images
      ),
      'training_images_as_samples': _compare(images['train'], images),
      'runs': results,
      'trained_tokenizer': _run_on_tokenizer(folder),
      'trained_tokenizer_samples': _sample_tokenizer(folder / 'tokenizer'),
  }


def _run_on_tokenizer(folder: pathlib.Path) -> dict[str, Any]:
  """Trains a tokenizer, and the shipped configs on its tokens."""
  sweep.train(TOKENIZER, {'tokenizer': {}}, folder)
  results = {}
  for kind, config in CONFIGS.items():
    runs = {
        f'{kind}_tokenizer_{seed}': {
            'seed': seed,
            'tokens.tokenizer': str(folder / 'tokenizer'),
            'eval.num_samples': NUM_SAMPLES,
            'sample.guidance.scale': 1.0,
        }
        for seed in SEEDS
    }
    sweep.train(config, runs, folder)
    for name in runs:
      result = json.loads((folder / name / 'evaluation.json').read_text())
      results[name] = {
          'kind': kind,
          **{x: result[x] for x in ('metrics', 'baselines')},
      }
  return results


def _sample_tokenizer(folder: pathlib.Path) -> dict[str, dict[str, float]]:
  """Returns metrics of decoded training images and of independent tokens."""
  config = configuration.load_config(ROOT / CONFIGS['masked'])
  config.tokens.tokenizer = str(folder)
  files = token_files.open_files(config)

  def decode(arrays: token_files.TokenArrays) -> sample_metrics.ImageSet:
    images = evaluation.decode(
        files.tokenizer, arrays.tokens, files.format.grid
    )
    return sample_metrics.ImageSet(images, np.int64(arrays.labels))

  train = token_files.read(files.train, range(len(files.train)))
  held_out = token_files.read(files.eval, range(len(files.eval)))
  images = {'train': decode(train), 'eval': decode(held_out)}
  return {
      'training images': _compare(images['train'], images, fd_unit=1.0),
      'class x position unigram': _compare(
          decode(_sample_unigram(train)), images, fd_unit=1.0
      ),
  }


def _measure(
    folder: pathlib.Path, name: str, kind: str, head: str, seed: int, images
) -> dict[str, Any]:
  """Trains a run, or resumes it, and samples from its best checkpoint."""
  config = configuration.load_config(ROOT / CONFIGS[kind])
  config.seed = seed
  config.tokens.tokenizer = ''
  config.tokens.train = str(folder / 'tokens' / 'train')
  config.tokens.eval = str(folder / 'tokens' / 'eval')
  config.model.head = head
  config.eval.num_samples = 0
  config.train.eval_every_steps = 100
  config.train.checkpoint_every_steps = 100
  training.train_and_evaluate(config, folder / name)
  generator = generators.Generator.from_workdir(
      folder / name, 'best', batch_size=250
  )
  result = json.loads((folder / name / 'evaluation.json').read_text())
  rows = [
      row
      for row in workdirs.read_metrics(folder / name)
      if row['split'] == 'eval' and row['step'] == generator.step
  ]
  labels = sample_files.balanced_labels(NUM_SAMPLES, 10, seed)
  samples = {}
  for sampler, options in SAMPLERS[kind].items():
    tokens = generator.sample(
        labels, seed=seed, guidance={'scale': 1.0}, **options
    ).tokens
    samples[sampler] = _compare(
        patch_codes.decode(tokens.reshape(NUM_SAMPLES, -1), labels), images
    )
  return {
      'kind': kind,
      'head': head,
      'seed': seed,
      'best_step': generator.step,
      'num_parameters': json.loads(
          (folder / name / 'run.json').read_text()
      )['num_parameters'],
      'best': {
          x: y for x, y in rows[-1].items() if x not in ('step', 'split')
      },
      'baselines': result['baselines'],
      'samples': samples,
  }


def _compare(
    samples: sample_metrics.ImageSet, images, fd_unit: float = _FD_UNIT
) -> dict[str, float]:
  """Returns the metrics of samples against the held-out images."""
  metrics = sample_metrics.SampleEvaluator(
      [images['eval']], [images['train']]
  ).run([samples]).metrics
  return {
      name: value * fd_unit if name.startswith('fd_') else value
      for name, value in metrics.items()
  }


def _sample_unigram(train: token_files.TokenArrays) -> token_files.TokenArrays:
  """Samples each token from training images of its class, independently."""
  labels = sample_files.balanced_labels(NUM_SAMPLES, 10, 0)
  rng = np.random.default_rng(0)
  tokens = np.stack([
      [
          rng.choice(train.tokens[train.labels == label, position])
          for position in range(train.tokens.shape[1])
      ]
      for label in labels
  ])
  return token_files.TokenArrays(tokens, labels)


def print_tables(results: Mapping[str, Any]) -> None:
  """Prints Markdown tables of means over the seeds, with their range."""
  write = sys.stdout.write
  write('| baseline | bits per image |\n|---|---|\n')
  for name, bits in results['baselines'].items():
    write(f'| {name.replace("_", " ")} | {NUM_TOKENS * bits:.1f} |\n')
  write(
      '\n| model | head | parameters | best step | bits per image |'
      ' training images | 12-group cost | gate |\n' + '|---' * 8 + '|\n'
  )
  groups = [(kind, head) for kind in CONFIGS for head in HEADS]
  for group in groups:
    runs = _runs_of(results, group)
    gate = GATES.get(group)
    cells = [
        *(x.replace('_', ' ') for x in group),
        f'{runs[0]["num_parameters"]:,}',
        ', '.join(str(x['best_step']) for x in runs),
        _range([x['best']['bits_per_image'] for x in runs]),
        _range([NUM_TOKENS * x['best']['train_bits_per_token'] for x in runs]),
        _range([
            NUM_TOKENS * x['best']['compression_bits_per_token']
            for x in runs
            if 'compression_bits_per_token' in x['best']
        ]),
        f'at most {gate[0]:g}' if gate else '',
    ]
    write(f'| {" | ".join(cells)} |\n')
  write(
      '\n| samples | FD | 1-NN accuracy | precision | recall |'
      ' copies | gate |\n' + '|---' * 7 + '|\n'
  )
  for name, key in (
      ('training images', 'training_images_as_samples'),
      ('class x position unigram', 'class_position_unigram_samples'),
  ):
    write(f'| {name} | {_sample_cells([results[key]])} | |\n')
  for group in groups:
    runs = _runs_of(results, group)
    for i, sampler in enumerate(runs[0]['samples']):
      gate = GATES.get(group) if i == 0 else None
      label = ', '.join((*group, sampler)).replace('_', ' ')
      cells = _sample_cells([x['samples'][sampler] for x in runs])
      write(
          f'| {label} | {cells} |'
          f' {f"at most {gate[1]:g}" if gate else ""} |\n'
      )
  _print_trained_tokenizer(
      results['trained_tokenizer'], results['trained_tokenizer_samples']
  )


def _print_trained_tokenizer(
    results: Mapping[str, Any], samples: Mapping[str, Mapping[str, float]]
) -> None:
  """Prints the table of the runs on tokens of a trained tokenizer."""
  sys.stdout.write(
      '\n| trained tokenizer | bits per image | class x position unigram |'
      ' FD, [0, 1] | 1-NN accuracy | precision | recall | copied grids |\n'
      + '|---' * 8 + '|\n'
  )
  columns = (
      ('fd_pixel_pca', '.3f'), ('nearest_neighbour_accuracy', '.3f'),
      ('precision_pixel_pca', '.2f'), ('recall_pixel_pca', '.2f'),
      ('copied_token_grids', '.0f'),
  )  # fmt: skip
  for name, metrics in samples.items():
    cells = [format(metrics[x], y) for x, y in columns if x in metrics]
    sys.stdout.write(f'| {name} | | | {" | ".join(cells)} | |\n')
  for kind in CONFIGS:
    runs = [x for x in results.values() if x['kind'] == kind]
    unigram = runs[0]['baselines']['class_position_unigram']
    cells = [
        kind,
        _range([x['metrics']['bits_per_image'] for x in runs]),
        f'{NUM_TOKENS * unigram:.1f}',
        *(
            _range([x['metrics'][name] for x in runs], form)
            for name, form in columns
        ),
    ]
    sys.stdout.write(f'| {" | ".join(cells)} |\n')


def _runs_of(results, group) -> list[dict[str, Any]]:
  return [
      run
      for run in results['runs'].values()
      if (run['kind'], run['head']) == group
  ]


def _sample_cells(samples: list[dict[str, float]]) -> str:
  columns = (
      ('fd_pixel_pca', '.2f'), ('nearest_neighbour_accuracy', '.3f'),
      ('precision_pixel_pca', '.2f'), ('recall_pixel_pca', '.2f'),
      ('copies', '.0f'),
  )  # fmt: skip
  return ' | '.join(
      _range([x[name] for x in samples if name in x], form)
      for name, form in columns
  )


def _range(values: list[float], form: str = '.1f') -> str:
  """Returns the mean, and the range if there are several values."""
  if not values:
    return ''
  text = format(statistics.mean(values), form)
  if min(values) < max(values):
    text += f' ({min(values):{form}} to {max(values):{form}})'
  return text


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--run', action='store_true', help='train missing runs')
  parser.add_argument(
      '--workdir',
      default=ROOT / 'runs' / 'generation_digits',
      type=lambda x: pathlib.Path(x).absolute(),
      help='parent folder of the runs',
  )
  arguments = parser.parse_args()
  if arguments.run:
    workdirs.write_json(RESULTS, run(arguments.workdir))
  elif not RESULTS.is_file():
    parser.error(f'{RESULTS} does not exist; use --run')
  print_tables(json.loads(RESULTS.read_text()))


if __name__ == '__main__':
  main()
