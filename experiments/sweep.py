"""Runs of one config with fields changed, each resumable by itself."""

import argparse
from collections.abc import Callable, Iterable, Mapping
import json
import pathlib
import re
import signal
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

# Fields that say where the same data set, network or run is; it may have moved.
_PLACES = re.compile(
    r'data\.data_dir|train\.init_from|eval\.networks\..*|.*\.checkpoint'
)

# Metrics of an evaluation that are kept.
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
    paths: Mapping[str, str] | None = None,
) -> None:
  """Parses the flags of a sweep, trains with --run, and prints and plots.

  Args:
    description: description of the script.
    folder: folder for results.json, with the results of `run`, and plot.png.
    run: from the folder of the runs, data.data_dir and the values of `paths` by
      their names to the results.
    print_tables: prints the results.
    plot: draws them.
    runs: name of the folder of the runs under runs/.
    paths: further flags that --run needs, with their descriptions.
  """
  paths = paths or {}
  results = folder / 'results.json'
  parser = argparse.ArgumentParser(
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
      '--run',
      action='store_true',
      help='train what is not trained yet; else print what is stored',
  )
  parser.add_argument(
      '--workdir',
      default=ROOT / 'runs' / runs,
      type=lambda x: pathlib.Path(x).absolute(),
      help=f'folder of the runs (default: runs/{runs})',
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
    parser.error(f'there is no {results} yet; use --run')
  record = _read_json(results)
  plot(record, folder / 'plot.png')
  print_tables(record)


def train(
    config_path: str,
    runs: Mapping[str, Overrides],
    workdir: pathlib.Path,
) -> None:
  """Trains the runs that are not finished, one after the other.

  Each run is a command of its own, and an interrupted one resumes. The command
  fails if the folder of the run holds another config.

  Args:
    config_path: relative to the repository.
    runs: name, and dotted fields of the config with their values.
    workdir: gets a folder for each run.

  Raises:
    SystemExit: a run fails or is interrupted, with its exit code.
  """
  for number, (name, overrides) in enumerate(runs.items(), start=1):
    if _is_finished(config_path, overrides, workdir / name):
      continue
    print(f'== {number} of {len(runs)}: {name}', flush=True)  # noqa: T201
    command = [
        sys.executable,
        str(ROOT / 'launch.py'),
        f'--config={ROOT / config_path}',
        f'--workdir={workdir / name}',
        *(f'--config.{field}={x}' for field, x in overrides.items()),
    ]
    if code := _run(command):
      sys.exit(code)


def _run(command: list[str]) -> int:
  """Runs a command and returns its exit code, 75 if it was asked to stop.

  A run that is asked to stop saves first, so it is waited for. Ctrl-C reaches
  it from the terminal, and a second one would kill it; SIGTERM is passed on.
  """
  stopped = []
  process = subprocess.Popen(command)

  def pass_on(number: int, _) -> None:
    stopped.append(number)
    if number == signal.SIGTERM:
      process.terminate()

  previous = {
      number: signal.signal(number, pass_on)
      for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    code = process.wait()
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
  return _INTERRUPTED if stopped and not code else code


def read_numbers(folder: pathlib.Path) -> dict[str, float]:
  """Returns image metrics and codebook statistics of a finished run."""
  evaluation = _read_json(folder / 'evaluation.json')
  numbers = {**evaluation['metrics'], **evaluation['codebook']}
  return {name: numbers[name] for name in _NUMBERS}


def collect(workdir: pathlib.Path, names: Iterable[str]) -> dict[str, Any]:
  """Returns results and provenance of finished runs.

  Args:
    workdir: holds a folder for each run.
    names: of the runs.

  Returns:
    'runs': the numbers of each; 'made_with': versions, devices and commits.
  """
  numbers = {name: read_numbers(workdir / name) for name in names}
  facts = [_read_json(workdir / name / 'run.json') for name in numbers]
  made_with = {
      name: sorted({json.dumps(fact[name]) for fact in facts})
      for name in ('versions', 'devices', 'git')
  }
  return {
      'made_with': {
          name: [json.loads(value) for value in values]
          for name, values in made_with.items()
      },
      'runs': numbers,
  }


def draw_reconstructions(
    workdir: pathlib.Path,
    names: Iterable[str],
    path: pathlib.Path,
    *,
    num_images: int,
    enlargement: int = 1,
) -> None:
  """Draws held-out images above the reconstructions of each run.

  Args:
    workdir: holds a folder for each run; all evaluate the same images.
    names: of the runs, one row each.
    path: of the PNG.
    num_images: images per row, evenly spaced in the split.
    enlargement: pixels a side of the square that a pixel becomes.
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
  """Loads a config and sets the fields that a run changes.

  Args:
    config_path: relative to the repository.
    overrides: dotted fields and their values.

  Returns:
    The config, not checked.
  """
  config = configuration.load_config(ROOT / config_path)
  config.update_from_flattened_dict(dict(overrides))
  return config


def _is_finished(
    config_path: str, overrides: Overrides, folder: pathlib.Path
) -> bool:
  """Whether a folder holds the evaluation of the run's last step."""
  files = folder / 'config.json', folder / 'evaluation.json'
  if not all(path.is_file() for path in files):
    return False
  config = make_config(config_path, overrides)
  saved, evaluation = map(_read_json, files)
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
