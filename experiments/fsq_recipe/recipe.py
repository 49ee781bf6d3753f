"""What FSQ loses against VQ at equal codebook size, and what closes the gap.

  python -m experiments.fsq_recipe.recipe --run --data_dir=DIR --photos=PHOTOS

With --run, trains the missing runs under --workdir, where interrupted runs
resume, measures latents and patches, and writes results.json next to this
script. Then draws plot.png and prints the tables.
"""

from collections.abc import Iterator, Mapping
import pathlib
import re
import statistics
import sys
from typing import Any

import matplotlib

from experiments import sweep
from experiments.fsq_recipe import frozen_codes
from experiments.fsq_recipe import latents
from experiments.fsq_recipe import patches
from experiments.fsq_recipe import variants
from experiments.quantizer_comparison import settings
from fsq_jax import quantizers

HERE = pathlib.Path(__file__).resolve().parent
BITS = (10, 14)
SEEDS = (0, 1, 2)
_MLP = {'model.projector_out.name': 'mlp'}
_PROJECTOR_IN = {'model.projector_in.name': 'mlp'}
_MLPS = {**_MLP, **_PROJECTOR_IN}
_DIVERSITY = 'model.quantizer.fsq.diversity_weight'
_LEVELS = 'model.quantizer.fsq.levels'
_FOURIER = {'model.projector_out.name': 'fourier'}
_DEEP = {'model.encoder.depth': 4}
_DEEP_DECODER = {'model.decoder.depth': 8}
_WIDE = {'model.encoder.width': 128, 'model.encoder.mlp_dim': 256}
# The MLP was chosen by the screening, the diversity loss for usage at 2^14.
RECIPE = {**_MLP, _DIVERSITY: 0.001}

# One change at a time of FSQ with 1,000 codes, 1,500 steps, measured on the
# held-out tenth of the training images.
SCREENING: dict[str, dict[str, Any]] = {
    'linear projectors, no loss': {},
    'diversity loss x 0.001': {_DIVERSITY: 0.001},
    'diversity loss x 0.01': {_DIVERSITY: 0.01},
    'levels 12, 7, 4, 3': {_LEVELS: (12, 7, 4, 3)},
    'levels 8, 4, 4, 2, 2, 2': {_LEVELS: (8, 4, 4, 2, 2, 2)},
    'projector_out mlp': _MLP,
    'projector_out mlp, diversity loss x 0.001': RECIPE,
    'encoder of four blocks': _DEEP,
    'projector_out fourier': _FOURIER,
    'projector_out fourier, sigma 0.05': {
        **_FOURIER, 'model.projector_out.fourier.sigma': 0.05
    },
}
# Changes of parts that the package does not have, see variants.py.
_LEVELS_OUT = {'model.projector_out.name': 'levels'}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in variants.QUANTIZERS},
    'renormalized': {'model.projector_in.name': 'standardized'},
    'residual_in': {},
    'table': _LEVELS_OUT,
    'mlp_differences': _LEVELS_OUT,
    variants.UNROUNDED: _MLP,
}
VARIANT_LABELS = {
    'unrounded_25': 'quantization dropout, 25 % of images',
    'unrounded_50': 'quantization dropout, 50 % of images',
    'unrounded_dimensions_25': 'quantization dropout, 25 % of dimensions',
    'unrounded_annealed_50': 'quantization dropout, 50 % of images, annealed',
    'noise_annealed_50': 'noise of 0.5 levels on codes, annealed',
    'dithered_25': 'stochastic rounding, 0.25 levels',
    'dithered_100': 'stochastic rounding, 1 level',
    'pass_through_30': '30 % of the gradient bypasses the bound',
    'soft_rounded_50': 'gradient of soft rounding',
    'latent_codebook': "FSQ between MLPs as VQ's codebook",
    'renormalized': 'batch renormalization of latents',
    'residual_in': 'MLP beside the linear projector_in',
    'table': 'embedding of codes beside the linear projector_out',
    'mlp_differences': 'projector_out mlp, finite differences as gradient',
    variants.UNROUNDED: "projector_out mlp, gradient at unrounded latents",
}
# Changes tried with either quantizer.
_RATE = 'optim.learning_rate'
_FACTORS = 'optim.learning_rate_factors'
_DOUBLE_RATE = {_RATE: 8e-3}
TUNING: dict[str, dict[str, Any]] = {
    'learning rate x 2': _DOUBLE_RATE,
    'learning rate x 0.5': {_RATE: 2e-3},
    'learning rate of projectors x 3': {_FACTORS: (('projector_.*', 3.0),)},
    'learning rate of projectors x 0.3': {_FACTORS: (('projector_.*', 0.3),)},
    'AdamW in place of Muon': {'optim.name': 'adamw'},
    'learning rate x 4': {_RATE: 16e-3},
}
# One change at a time of VQ with 1,024 codes, as many as of FSQ.
VQ_SCREENING: dict[str, dict[str, Any]] = {
    '8 channels': {},
    **{
        f'{x} channels': {'model.quantizer.vq.code_dim': x}
        for x in (2, 4, 6, 16, 32)
    },
    'gradient by rotation': {'model.quantizer.vq.gradient': 'rotation'},
    **{
        f'commitment loss x {x}': {'model.quantizer.vq.commitment_weight': x}
        for x in (0.1, 0.5, 1.0)
    },
    **{
        f'decay {x}': {'model.quantizer.vq.decay': x}
        for x in (0.9, 0.95, 0.999)
    },
    **{
        f'dead-code threshold {x}': {'model.quantizer.vq.dead_share': x}
        for x in (0.001, 0.1)
    },
    'dead codes reset to halves of others': {
        'model.quantizer.vq.restart': 'split'
    },
    'no reset': {'model.quantizer.vq.restart': 'none'},
    'random initialization': {'model.quantizer.vq.codebook_init': 'normal'},
    **{
        f'entropy loss x {x}': {'model.quantizer.vq.entropy_weight': x}
        for x in (0.01, 0.1)
    },
    'projector_in mlp': _PROJECTOR_IN,
    'projector_out mlp': _MLP,
    'both projectors mlp': _MLPS,
    'standardized latents': {'model.projector_in.name': 'standardized'},
    'encoder of four blocks': _DEEP,
}
# 64 x 64 photographs, as in perceptual_ablation, with 256 tokens each.
_PHOTOS = {
    'data.source': 'folder',
    'data.eval_split': 'val',
    'data.image_size': (64, 64),
    'data.resize_shorter': 64,
    'train.num_steps': 1000,
}
# A convolutional encoder and decoder of stride 4, in place of the ViTs.
_CONV = {
    'model.encoder.name': 'conv',
    'model.decoder.name': 'conv',
    'model.encoder.conv.filters': 32,
    'model.encoder.conv.channel_multipliers': (1, 2, 2),
    'model.encoder.conv.num_res_blocks': 1,
    'model.encoder.conv.latent_width': 64,
    'train.num_steps': 2000,
}
# Best of the other level sets for patches.
_BEST_LEVELS = '(16, 4, 4, 4)'
LABELS = {
    'fsq': 'FSQ',
    'fsq_mlp': 'FSQ, projector_out mlp',
    'fsq_mlps': 'FSQ, both projectors mlp',
    'fsq_recipe': 'FSQ, recipe',
    'vq_ema': 'VQ, EMA',
    'vq_ema_mlp': 'VQ, EMA, projector_out mlp',
    'fsq_recipe_rate': 'FSQ, recipe, learning rate x 2',
    'vq_ema_rate': 'VQ, EMA, learning rate x 2',
    'fsq_recipe_deep': 'FSQ, recipe, encoder of four blocks',
    'vq_ema_deep': 'VQ, EMA, encoder of four blocks',
    'fsq_recipe_decoder': 'FSQ, recipe, decoder of eight blocks',
    'vq_ema_decoder': 'VQ, EMA, decoder of eight blocks',
    'fsq_recipe_wide': 'FSQ, recipe, twice the width',
    'vq_ema_wide': 'VQ, EMA, twice the width',
}
# By label: suffix of the models in `LABELS`.
CAPACITY = {
    'baseline': '',
    'encoder of four blocks': '_deep',
    'decoder of eight blocks': '_decoder',
    'twice the width': '_wide',
}
# Channels of models without a quantizer; FSQ has 4 and VQ 8.
CONTINUOUS = (4, 8)
# Models whose latents, and whose codes, are measured.
MEASURED = ('fsq', 'fsq_recipe', 'vq_ema')
FROZEN = ('fsq', 'vq_ema')
_COMPARED = (('fsq_recipe', 'fsq', RECIPE), ('vq_ema', 'vq_ema', {}))
# Numbers of steps of the curves, by bits.
STEPS = {10: (1000, 4000, 8000, 20_000), 14: (1000, 4000, 8000)}


def _named(*words: Any) -> str:
  return '_'.join(str(x).replace(' ', '_') for x in words)


def screening_runs(data_dir: str) -> dict[str, dict[str, Any]]:
  """Returns the config overrides of the screening runs, by name."""
  shared = {
      **settings.TUNING_BUDGET,
      'data.data_dir': data_dir,
      **settings.size('fsq', settings.TUNING_BITS),
  }
  changes = {f'screening_{i}': x for i, x in enumerate(SCREENING.values())}
  changes |= {_named('variant', name): x for name, x in VARIANTS.items()}
  for i, change in enumerate(TUNING.values()):
    changes[f'tuning_fsq_{i}'] = change
  runs = {name: {**shared, **x} for name, x in changes.items()}
  vq = {
      **settings.chosen('vq_ema'),
      **settings.size('vq_ema', settings.TUNING_BITS),
  }
  changes = {_named('vq', x): y for x, y in VQ_SCREENING.items()}
  for i, change in enumerate(TUNING.values()):
    changes[f'tuning_vq_ema_{i}'] = change
  return runs | {name: {**shared, **vq, **x} for name, x in changes.items()}


def final_runs(data_dir: str) -> dict[str, dict[str, Any]]:
  """Returns the config overrides of the runs on all images, by name."""
  runs = {}
  for bits in BITS:
    once = SEEDS[: bits == BITS[0]]
    for name, seeds, quantizer, changes in (
        ('fsq_recipe', SEEDS, 'fsq', RECIPE),
        ('fsq_mlp', SEEDS[:1], 'fsq', _MLP),
        ('fsq_mlps', SEEDS[:1], 'fsq', _MLPS),
        ('vq_ema_mlp', once, 'vq_ema', _MLP),
        ('fsq', SEEDS[:1], 'fsq', {}),
        ('vq_ema', SEEDS, 'vq_ema', {}),
        ('fsq_recipe_rate', once, 'fsq', {**RECIPE, **_DOUBLE_RATE}),
        ('vq_ema_rate', once, 'vq_ema', _DOUBLE_RATE),
        ('fsq_recipe_deep', SEEDS[:1], 'fsq', {**RECIPE, **_DEEP}),
        ('vq_ema_deep', SEEDS[:1], 'vq_ema', _DEEP),
        ('fsq_recipe_decoder', once, 'fsq', {**RECIPE, **_DEEP_DECODER}),
        ('vq_ema_decoder', once, 'vq_ema', _DEEP_DECODER),
        ('fsq_recipe_wide', SEEDS[:1], 'fsq', {**RECIPE, **_WIDE}),
        ('vq_ema_wide', SEEDS[:1], 'vq_ema', _WIDE),
    ):
      for seed in seeds:
        run = settings.final_run(quantizer, bits, seed, data_dir)
        runs[_named(name, bits, 'bits_seed', seed)] = {**run, **changes}
    for name, quantizer, changes in _COMPARED:
      for steps in STEPS[bits]:
        if steps != settings.BUDGET['train.num_steps']:
          run = settings.final_run(quantizer, bits, 0, data_dir)
          runs[_named(name, bits, 'bits', steps, 'steps')] = {
              **run, **changes, 'train.num_steps': steps
          }
  for name, quantizer, changes in _COMPARED:
    run = settings.final_run(quantizer, BITS[0], 0, data_dir)
    runs[_named('conv', name)] = {**run, **changes, **_CONV}
  for channels in CONTINUOUS:
    run = settings.final_run('fsq', BITS[0], 0, data_dir)
    runs[_named('continuous', channels)] = {
        **run,
        'model.quantizer.name': 'none',
        'model.quantizer.none.code_dim': channels,
    }
  return runs


def photo_runs(photos: str) -> dict[str, dict[str, Any]]:
  """Returns the config overrides of the runs on photographs, by name."""
  return {
      _named('photos', quantizer): {
          **settings.final_run(quantizer, BITS[0], 0, photos), **_PHOTOS
      }
      for quantizer in ('fsq', 'vq_ema')
  }


def run(workdir: pathlib.Path, data_dir: str, photos: str) -> dict[str, Any]:
  """Trains the missing runs and returns the results."""
  screening = screening_runs(data_dir)
  final = {**final_runs(data_dir), **photo_runs(photos)}
  plain = {x: y for x, y in screening.items() if not x.startswith('variant')}
  sweep.train(settings.CONFIG, plain, workdir)
  for name in VARIANTS:
    key = _named('variant', name)
    script = ('-m', 'experiments.fsq_recipe.variants', name)
    sweep.train(settings.CONFIG, {key: screening[key]}, workdir, script)
  sweep.train(settings.CONFIG, final, workdir)
  return {
      'command': (
          'python -m experiments.fsq_recipe.recipe --run --data_dir=DIR'
          ' --photos=PHOTOS'
      ),
      **sweep.collect(workdir, {**screening, **final}),
      'latents': {
          name: latents.measure(
              workdir / _named(name, BITS[0], 'bits_seed_0')
          )
          for name in MEASURED
      },
      'frozen_codes': {
          name: frozen_codes.measure(
              workdir / _named(name, BITS[0], 'bits_seed_0')
          )
          for name in FROZEN
      },
      'patches': patches.measure(data_dir),
  }


def print_tables(results: Mapping[str, Any]) -> None:
  """Prints the tables of the README."""
  write = sys.stdout.write
  runs = results['runs']
  names = {
      **{x: f'screening_{i}' for i, x in enumerate(SCREENING)},
      **{VARIANT_LABELS[x]: _named('variant', x) for x in VARIANTS},
  }
  _print_changes(runs, names)
  names = {f'VQ, {x}': _named('vq', x) for x in VQ_SCREENING}
  _print_changes(runs, names)
  write('| change | FSQ | VQ, EMA |\n|---|---|---|\n')
  pairs = {'baseline': ('screening_0', 'vq_8_channels')}
  for i, name in enumerate(TUNING):
    pairs[name] = f'tuning_fsq_{i}', f'tuning_vq_ema_{i}'
  for name, keys in pairs.items():
    fsq, vq = (runs[key]['psnr'] for key in keys)
    write(f'| {name} | {fsq:.2f} | {vq:.2f} |\n')
  num_fsq = len(SCREENING) + len(VARIANTS) + len(TUNING)
  num_vq = len(VQ_SCREENING) + len(TUNING)
  write(f'| *settings tried* | {num_fsq} | {num_vq} |\n')
  write('\n| codes | model | PSNR, dB | usage | normalized entropy |\n')
  write('|---' * 5 + '|\n')
  for bits in BITS:
    for name in LABELS:
      rows = _rows(results, name, bits)
      if not rows:
        continue
      write(
          f'| {rows[0]["codebook_size"]:,} | {LABELS[name]} |'
          f' {sweep.format_mean(rows, "psnr", ".2f")} |'
          f' {sweep.format_mean(rows, "usage", ".1%")} |'
          f' {sweep.format_mean(rows, "entropy_share", ".1%")} |\n'
      )
  write('\n| models | codes | FSQ | VQ, EMA | gap, dB |\n' + '|---' * 5 + '|\n')
  for label, bits, fsq, vq in _pairs(results):
    write(f'| {label} | 2^{bits} | {fsq:.2f} | {vq:.2f} | {vq - fsq:.2f} |\n')
  write('\n| model | distortion / variance | PSNR, dB | without rounding |')
  write(' decoder retrained |\n')
  write('|---' * 5 + '|\n')
  for name, row in results['latents'].items():
    frozen = results['frozen_codes'].get(name)
    write(
        f'| {LABELS[name]} | {row["distortion"]:.3f} | {row["psnr"]:.2f} |'
        f' {row["psnr_unquantized"]:.2f} |'
        f' {"" if frozen is None else format(frozen, ".2f")} |\n'
    )
  write('\n| channels without a quantizer | PSNR, dB |\n|---|---|\n')
  for channels in CONTINUOUS:
    psnr = runs[_named('continuous', channels)]['psnr']
    write(f'| {channels} | {psnr:.2f} |\n')
  write('\n| code of 4 x 4 patches | PSNR, dB |\n|---|---|\n')
  hidden = set(map(str, patches.LEVELS[1:])) - {_BEST_LEVELS}
  for name, psnr in results['patches'].items():
    if name not in hidden:
      write(f'| {name.strip("()")} | {psnr:.2f} |\n')


def _print_changes(
    runs: Mapping[str, Mapping[str, float]], names: Mapping[str, str]
) -> None:
  """Prints PSNR of runs, by label, relative to the first one."""
  write = sys.stdout.write
  first, *_ = (runs[key]['psnr'] for key in names.values())
  write('| change | PSNR, dB | difference | normalized entropy |\n')
  write('|---' * 4 + '|\n')
  for name, key in names.items():
    row = runs[key]
    write(
        f'| {name} | {row["psnr"]:.2f} | {row["psnr"] - first:+.2f} |'
        f' {row["entropy_share"]:.1%} |\n'
    )
  write('\n')


def _pairs(
    results: Mapping[str, Any],
) -> Iterator[tuple[str, int, float, float]]:
  """Yields a label, bits of the codebook, and PSNR of FSQ and of VQ."""
  for bits in BITS:
    for steps in STEPS[bits]:
      psnr = [_psnr(results, name, bits, steps) for name, *_ in _COMPARED]
      yield f'{steps:,} steps', bits, *psnr
    for label, suffix in CAPACITY.items():
      names = [f'{name}{suffix}' for name, *_ in _COMPARED]
      if suffix and all(_rows(results, name, bits) for name in names):
        budget = settings.BUDGET['train.num_steps']
        psnr = [_psnr(results, name, bits, budget) for name in names]
        yield label, bits, *psnr
  for label, names in (
      ('convolutional, 2,000 steps', ('conv_fsq_recipe', 'conv_vq_ema')),
      ('64 x 64 photographs, 1,000 steps', ('photos_fsq', 'photos_vq_ema')),
  ):
    yield label, BITS[0], *(results['runs'][name]['psnr'] for name in names)


def _rows(
    results: Mapping[str, Any], name: str, bits: int
) -> list[dict[str, Any]]:
  """Returns the metrics of a model at one size, one row per seed."""
  keys = [_named(name, bits, 'bits_seed', seed) for seed in SEEDS]
  return [results['runs'][key] for key in keys if key in results['runs']]


def _psnr(
    results: Mapping[str, Any], name: str, bits: int, steps: int
) -> float:
  if steps == settings.BUDGET['train.num_steps']:
    rows = _rows(results, name, bits)
    return statistics.mean(row['psnr'] for row in rows)
  return results['runs'][_named(name, bits, 'bits', steps, 'steps')]['psnr']


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws the gap to VQ against training length, depth and width."""
  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(
      1, 2, figsize=(9, 3.4), sharey=True, layout='constrained'
  )
  budget = settings.BUDGET['train.num_steps']
  for bits in BITS:
    size = quantizers.FSQ(quantizers.recommended_levels(bits)).codebook_size
    gaps = [
        _psnr(results, 'vq_ema', bits, steps)
        - _psnr(results, 'fsq_recipe', bits, steps)
        for steps in STEPS[bits]
    ]
    axes[0].plot(STEPS[bits], gaps, marker='o', label=f'{size:,} codes')
    by_model = {
        label: _psnr(results, f'vq_ema{suffix}', bits, budget)
        - _psnr(results, f'fsq_recipe{suffix}', bits, budget)
        for label, suffix in CAPACITY.items()
        if _rows(results, f'vq_ema{suffix}', bits)
    }
    axes[1].plot(
        [re.sub(' (of|the) ', r'\n\1 ', x) for x in by_model],
        by_model.values(),
        'o',
        label=f'{size:,} codes',
    )
  gap = 'VQ-EMA minus FSQ recipe, dB'
  axes[0].set(xlabel='steps', xscale='log', ylabel=gap)
  steps = max(STEPS.values(), key=len)
  axes[0].set_xticks(steps, [f'{x:,}' for x in steps])
  axes[0].minorticks_off()
  for axis in axes:
    axis.axhline(0, color='black', linewidth=0.8)
    axis.grid(alpha=0.3)
  axes[1].legend(loc='lower left')
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  sweep.main(
      __doc__,
      HERE,
      run,
      print_tables=print_tables,
      plot=plot,
      runs='fsq_recipe',
      paths={'photos': '64 x 64 images in train/ and val/'},
  )
