"""report.html: one self-contained page on a run."""

import io
import os
import pathlib
import re
from typing import Any

import numpy as np
import PIL.Image

from fsq_jax.report import generator_page
from fsq_jax.report import page
from fsq_jax.report import sections
from fsq_jax.workdir import files as workdir_files
from fsq_jax.workdir import metric_log

# Version of codebook.json; increment it if pages need new contents.
ANALYSIS_VERSION = 1
# Limits of the grids in a report: number and total bytes.
MAX_FRAMES = 8
MAX_FRAME_BYTES = 12_000_000


def write_report(
    workdir: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
) -> str:
  """Writes report.html from the files of a workdir.

  Args:
    workdir: folder with any of config.json, quantizer.json, run.json,
      metrics.jsonl, evaluation.json, codebook.json, and the pictures
      reconstructions/step_*.png; of a generator, whose config has a section
      tokens, samples/step_*.png.
    output: folder for the page; its files take precedence over files of the
      workdir. None is the workdir.

  Returns:
    The path of the page.
  """
  output = workdir if output is None else output
  folder = workdir_files.run_folder(output, 'output')
  run = _read_workdir(workdir_files.run_folder(workdir), folder)
  pages = generator_page if 'tokens' in run.config else page
  text = pages.render(run)
  workdir_files.write_bytes(
      folder / workdir_files.REPORT, text.encode('utf-8', 'replace')
  )
  return os.path.join(output, workdir_files.REPORT)


def _read_workdir(
    workdir: pathlib.Path, output: pathlib.Path
) -> sections.Run:
  def find(name: str) -> pathlib.Path:
    written = output / name
    return written if workdir_files.is_file(written) else workdir / name

  notices = []
  config, quantizer, provenance, evaluation = (
      _read_json(find(name), notices)
      for name in (
          workdir_files.CONFIG, workdir_files.QUANTIZER, workdir_files.RUN,
          workdir_files.EVALUATION,
      )
  )
  analysis = _read_json(find(workdir_files.CODEBOOK), notices)
  if analysis and analysis.get('version') != ANALYSIS_VERSION:
    analysis = {}
    notices.append(
        f'{workdir_files.CODEBOOK} is of another version of fsq_jax and is'
        ' skipped; --mode=report writes a new one.'
    )
  step = evaluation.get('step')
  if analysis and step not in (None, analysis['step']):
    notices.append(
        f'Single images and the codebook are of step {analysis["step"]},'
        f' everything else is of step {step}; --mode=report updates them.'
    )
  pictures, frames = _read_pictures(
      find(
          workdir_files.SAMPLES
          if 'tokens' in config
          else workdir_files.RECONSTRUCTIONS
      ),
      notices,
  )
  return sections.Run(
      name=workdir.name,
      config=config,
      quantizer=quantizer,
      provenance=provenance,
      evaluation=evaluation,
      rows=_read_rows(find(workdir_files.METRICS).parent),
      pictures=pictures,
      frames=frames,
      analysis=analysis,
      notices=notices,
  )


def _read_json(path: pathlib.Path, notices: list[str]) -> dict[str, Any]:
  try:
    return workdir_files.read_json(path) or {}
  except ValueError as error:
    notices.append(str(error))
    return {}


def _read_rows(folder: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Returns the rows of metrics.jsonl by split, in ascending steps.

  A resumed run may have repeated steps; the last row of a step is kept.
  """
  rows = metric_log.read_metrics(folder)
  by_split = {}
  for split in ('train', 'eval'):
    last = {row['step']: row for row in rows if row.get('split') == split}
    by_split[split] = [last[step] for step in sorted(last)]
  return by_split


def _read_pictures(
    folder: pathlib.Path, notices: list[str]
) -> tuple[dict[str, sections.Frame], list[sections.Frame]]:
  """Returns the newest named pictures, and grids evenly spaced in time."""
  grids, pictures = {}, {}
  paths = folder.iterdir() if workdir_files.is_folder(folder) else ()
  for path in sorted(paths):
    if match := re.fullmatch(r'step_(\d+)(?:_(.+))?\.png', path.name):
      if match[2] is None:
        grids[int(match[1])] = path
      else:
        pictures[int(match[1]), match[2]] = path
  if not grids:
    return {}, []
  steps = sorted(grids)
  largest = max(map(workdir_files.size, grids.values()))
  num = min(MAX_FRAMES, len(steps), MAX_FRAME_BYTES // max(largest, 1))
  positions = np.linspace(len(steps) - 1, 0, max(num, 1)).round()[::-1]
  newest = {
      name: frame
      for (step, name), path in pictures.items()
      if step == steps[-1] and (frame := _read_frame(path, step, notices))
  }
  frames = [
      _read_frame(grids[step], step, notices)
      for step in (steps[int(position)] for position in positions)
  ]
  return newest, [frame for frame in frames if frame is not None]


def _read_frame(
    path: pathlib.Path, step: int, notices: list[str]
) -> sections.Frame | None:
  """Returns a PNG; None, and a notice, if it cannot be read."""
  try:
    png = workdir_files.read_bytes(path)
    with PIL.Image.open(io.BytesIO(png)) as image:
      image.load()
      return sections.Frame(step, *image.size, png)
  except (OSError, SyntaxError) as error:
    notices.append(f'{path.name}: {error}')
    return None
