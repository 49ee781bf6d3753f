"""Trains variants of a config as resumable runs and collects the results."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import pathlib
import re
import signal
import statistics
import subprocess
import sys
from typing import Any

import numpy as np

from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import report
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import saved_model
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.runtime import partitioning

ROOT = pathlib.Path(__file__).resolve().parents[1]

Overrides = Mapping[str, Any]

_INTERRUPTED = 75  # As launch.py: run the same command again.

# Paths of data sets, networks and runs. They may differ between machines, so a
# finished run with other paths is still valid.
_PLACES = re.compile(
    r'data\.data_dir|train\.init_from|eval\.networks\..*|.*\.checkpoint'
    r'|tokens\.tokenizer'
)

# Metrics stored in results.json.
_NUMBERS = (
    'psnr', 'ssim', 'codebook_size', 'num_used_codes', 'usage', 'perplexity',
    'entropy_bits', 'entropy_share',
)  # fmt: skip


def main(
    description: str,
    folder: pathlib.Path,
    run: Callable[..., dict[str, Any]],
    *,
    print_tables: Callable[[dict[str, Any]], None],
    plot: Callable[[dict[str, Any], pathlib.Path], None],
    runs: str = 'quantizers',
    names: tuple[str, str] = ('results.json', 'plot.png'),
    paths: Mapping[str, str] | None = None,
) -> None:
  """Command line of a sweep: optionally trains, then plots and prints.

  Args:
    description: help text of the script.
    folder: the results and the plot are written here.
    run: trains the runs and returns the results. Called with the workdir,
      data.data_dir and the `paths` as keyword arguments.
    print_tables: prints the results.
    plot: draws the results to a path.
    runs: name of the default workdir under runs/.
    names: of the files of the results and of the plot.
    paths: names and help texts of further flags that --run requires.
  """
  paths = paths or {}
  results = folder / names[0]
  parser = argparse.ArgumentParser(
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
      '--run',
      action='store_true',
      help='train the missing runs; default: print the stored results',
  )
  parser.add_argument(
      '--workdir',
      default=ROOT / 'runs' / runs,
      type=lambda x: pathlib.Path(x).absolute(),
      help=f'parent folder of the runs (default: runs/{runs})',
  )
  parser.add_argument(
      '--data_dir',
      default='',
      type=_absolute,
      help='data.data_dir of the runs',
  )
  for name, text in paths.items():
    parser.add_argument(f'--{name}', default='', type=_absolute, help=text)
  arguments = parser.parse_args()
  if arguments.run:
    values = {name: getattr(arguments, name) for name in paths}
    for name in paths:
      if not values[name]:
        parser.error(f'--run needs --{name}: {paths[name]}')
    record = run(arguments.workdir, arguments.data_dir, **values)
    workdirs.write_json(results, record)
  elif not results.is_file():
    parser.error(f'{results} does not exist; use --run')
  record = _read_json(results)
  plot(record, folder / names[1])
  print_tables(record)


def train(
    config_path: str,
    runs: Mapping[str, Overrides],
    workdir: pathlib.Path,
    script: Sequence[str] = ('launch.py',),
) -> None:
  """Trains the unfinished runs one after the other.

  Each run is a launch.py command, which resumes from its latest checkpoint and
  raises an error if its folder has a different config.

  Args:
    config_path: config, relative to the repository.
    runs: dotted config overrides of each run, by name.
    workdir: parent folder of the runs.
    script: arguments of Python, in the repository, that take launch.py's flags.

  Raises:
    SystemExit: a run failed or was interrupted; has the exit code of the run.
  """
  for number, (name, overrides) in enumerate(runs.items(), start=1):
    if _is_finished(config_path, overrides, workdir / name):
      continue
    print(f'== {number} of {len(runs)}: {name}', flush=True)  # noqa: T201
    command = [
        sys.executable,
        *script,
        f'--config={ROOT / config_path}',
        f'--workdir={workdir / name}',
        *(f'--config.{field}={x}' for field, x in overrides.items()),
    ]
    if code := _run(command):
      sys.exit(code)


def _run(command: list[str]) -> int:
  """Runs a command and returns its exit code; 75 if it was interrupted.

  An interrupted run saves before it exits, so it is waited for. The terminal
  sends Ctrl-C to the run too, and a second SIGINT would kill it; SIGTERM is
  forwarded.
  """
  stopped = []
  process = subprocess.Popen(command, cwd=ROOT)

  def forward(number: int, _) -> None:
    stopped.append(number)
    if number == signal.SIGTERM:
      process.terminate()

  previous = {
      number: signal.signal(number, forward)
      for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    code = process.wait()
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
  return _INTERRUPTED if stopped and not code else code


def read_numbers(folder: pathlib.Path) -> dict[str, float]:
  """Returns the image metrics and codebook statistics of a finished run."""
  evaluation = _read_json(folder / 'evaluation.json')
  numbers = {**evaluation['metrics'], **evaluation['codebook']}
  names = _NUMBERS if evaluation['codebook'] else ('psnr', 'ssim')
  return {name: numbers[name] for name in names}


def collect(workdir: pathlib.Path, names: Iterable[str]) -> dict[str, Any]:
  """Returns the metrics and the provenance of finished runs.

  Args:
    workdir: parent folder of the runs.
    names: names of the runs.

  Returns:
    'runs': the metrics of each; 'made_with': versions, devices and commits.
  """
  numbers = {name: read_numbers(workdir / name) for name in names}
  return {'made_with': describe_runs(workdir, numbers), 'runs': numbers}


def describe_runs(
    workdir: pathlib.Path, names: Iterable[str]
) -> dict[str, list[Any]]:
  """Returns the versions, devices and commits of runs, each value once."""
  metadata = [_read_json(workdir / name / 'run.json') for name in names]
  values = {
      name: sorted({json.dumps(x[name]) for x in metadata})
      for name in ('versions', 'devices', 'git')
  }
  return {name: [json.loads(y) for y in x] for name, x in values.items()}


def format_mean(
    rows: Sequence[Mapping[str, float]], column: str, form: str
) -> str:
  """Formats the mean of a column and its standard deviation over seeds."""
  values = [row[column] for row in rows]
  text = format(statistics.mean(values), form)
  if len(values) > 1:
    text += f' ± {format(statistics.stdev(values), form)}'
  return text


def draw_reconstructions(
    workdir: pathlib.Path,
    names: Iterable[str],
    path: pathlib.Path,
    *,
    num_images: int,
    enlargement: int = 1,
) -> None:
  """Draws held-out images over the reconstructions of each run.

  Args:
    workdir: parent folder of the runs; all evaluate the same images.
    names: names of the runs, one row each.
    path: output path of the PNG.
    num_images: images per row, evenly spaced in the split.
    enlargement: integer factor by which the image is enlarged.
  """
  rows = []
  for name in names:
    found = saved_model.find_run(workdir / name)
    mesh = partitioning.create_mesh(found.config.partitioning.mesh)
    model, variables = saved_model.restore(found, mesh)
    dataset = data.build_dataset(found.config.data, split='eval', seed=0)
    evaluator = evaluators.Evaluator(
        model, dataset, mesh, num_grid_images=num_images
    )
    evaluation = evaluator.run(variables)
    rows = rows or [evaluation.originals]
    rows.append(evaluation.reconstructions)
  bands = [np.concatenate(list(images), axis=1) for images in rows]
  grid = np.concatenate(bands, axis=0)
  for axis in (0, 1):
    grid = grid.repeat(enlargement, axis=axis)
  report.save_png(path, grid)


def make_config(
    config_path: str, overrides: Overrides
) -> configuration.Config:
  """Loads a config and applies overrides.

  Args:
    config_path: config, relative to the repository.
    overrides: dotted fields and their values.

  Returns:
    The config, not validated.
  """
  config = configuration.load_config(ROOT / config_path)
  config.update_from_flattened_dict(dict(overrides))
  return config


def _is_finished(
    config_path: str, overrides: Overrides, folder: pathlib.Path
) -> bool:
  """Whether a folder has the evaluation of the last step of this config."""
  files = folder / 'config.json', folder / 'evaluation.json'
  if not all(path.is_file() for path in files):
    return False
  config = make_config(config_path, overrides)
  saved = configuration.config_from_json(files[0].read_text(encoding='utf-8'))
  evaluation = _read_json(files[1])
  changed = [
      name
      for line in configuration.diff_configs(saved, config)
      if not _PLACES.fullmatch(name := line.partition(':')[0])
  ]
  return (
      not changed
      and evaluation['step'] == config.train.num_steps
  )


def _read_json(path: pathlib.Path) -> Any:
  return json.loads(path.read_text(encoding='utf-8'))


def _absolute(path: str) -> str:
  return str(pathlib.Path(path).expanduser().absolute()) if path else ''
