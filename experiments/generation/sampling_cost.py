"""Speed and memory of sampling: masked, and autoregressive with and without a
key-value cache.

  python -m experiments.generation.sampling_cost --run

With --run, measures with random weights and writes sampling_cost.json. Variants
take turns, and the median of their times is reported. Then prints the table.
"""

import argparse
from collections.abc import Callable
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
from jax import numpy as jnp

from fsq_jax import generators
from fsq_jax import workdir as workdirs
from fsq_jax.generators import model as models
from fsq_jax.workdir import provenance

RESULTS = pathlib.Path(__file__).resolve().parent / 'sampling_cost.json'
GRIDS = {'4 x 4 tokens': (4, 4), '16 x 16 tokens': (16, 16)}
PRESETS = {'4 x 4 tokens': 'tiny', '16 x 16 tokens': 'tiny'}
BATCH_SIZES = {'4 x 4 tokens': 64, '16 x 16 tokens': 16}
LEVELS = (8, 5, 5, 5)
ROUNDS = 3


def measure() -> dict[str, Any]:
  """Returns images/s and memory of each variant and grid."""
  rows = {}
  for name, grid in GRIDS.items():
    samplers = {
        variant: build_sampler(variant, PRESETS[name], BATCH_SIZES[name], grid)
        for variant in _variants(grid)
    }
    times = {variant: [] for variant in samplers}
    for _ in range(ROUNDS):
      for variant, (call, _) in samplers.items():
        started = time.perf_counter()
        jax.block_until_ready(call())
        times[variant].append(time.perf_counter() - started)
    for variant, (_, memory) in samplers.items():
      rows[f'{name}: {variant}'] = {
          'images_per_second': BATCH_SIZES[name]
          / statistics.median(times[variant]),
          'temporary_mib': memory / 2**20,
      }
  return {
      'command': 'python -m experiments.generation.sampling_cost --run',
      'processor': _processor(),
      'made_with': {
          x: provenance.describe()[x] for x in ('versions', 'devices', 'git')
      },
      'presets': PRESETS,
      'batch_sizes': BATCH_SIZES,
      'levels': LEVELS,
      'rows': rows,
  }


def _variants(grid: tuple[int, int]) -> list[str]:
  steps = [x for x in (8, 12, 16) if x <= grid[0] * grid[1]]
  return [
      *(f'masked, {x} steps' for x in steps),
      'autoregressive, cache',
      'autoregressive, no cache',
  ]


def build_sampler(
    variant: str, preset: str, batch_size: int, grid: tuple[int, int],
    **options: Any,
) -> tuple[Callable[[], jax.Array], int]:
  """Compiles a sampler with random weights.

  Args:
    variant: 'masked, T steps', 'autoregressive, cache' or 'autoregressive, no
      cache'.
    preset: of the generator's size.
    batch_size: images per call.
    grid: (rows, columns) of the tokens.
    **options: of `generators.preset`.

  Returns:
    A function that samples tokens, and the bytes of its temporary arrays.
  """
  kind, option = variant.split(', ')
  causal = kind == 'autoregressive'
  model = generators.TokenModel(
      architecture=generators.preset(preset, causal=causal, **options),
      vocabulary=generators.from_levels(LEVELS, first_fastest=True),
      grid=grid,
      num_classes=10,
      embedding='levels',
      head='levels_autoregressive',
  )
  variables = models.init_variables(model, jax.random.key(0))
  if causal:
    module = generators.autoregressive_sampling
    sampling = generators.AutoregressiveSampling(
        cache='static' if option == 'cache' else 'none'
    )
  else:
    module = generators.masked_sampling
    sampling = generators.MaskedSampling(num_steps=int(option.split()[0]))

  def sample(variables, labels, key):
    return module.sample(model, variables, labels, key, options=sampling).tokens

  labels = jnp.arange(batch_size) % 10
  arguments = variables, labels, jax.random.key(1)
  compiled = jax.jit(sample).lower(*arguments).compile()
  compiled(*arguments)
  memory = compiled.memory_analysis().temp_size_in_bytes
  return lambda: compiled(*arguments), memory


def _processor() -> str:
  lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  names = [x.partition(': ')[2] for x in lines if x.startswith('model name')]
  return f'{len(names)} x {names[0]}'


def print_table(results: dict[str, Any]) -> None:
  """Prints a Markdown table."""
  sys.stdout.write(
      f'On {results["processor"]}:\n\n| sampler | images/s | temporary memory,'
      ' MiB |\n|---|---|---|\n'
  )
  for name, row in results['rows'].items():
    speed = float(f'{row["images_per_second"]:.3g}')
    sys.stdout.write(
        f'| {name} | {speed:,g} |'
        f' {row["temporary_mib"]:.1f} |\n'
    )


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--run', action='store_true', help='measure again')
  if parser.parse_args().run:
    workdirs.write_json(RESULTS, measure())
  elif not RESULTS.is_file():
    parser.error(f'{RESULTS} does not exist; use --run')
  print_table(json.loads(RESULTS.read_text()))


if __name__ == '__main__':
  main()
