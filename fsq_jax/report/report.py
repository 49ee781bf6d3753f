"""report.html: one self-contained page on a run."""

import io
import os
import re
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from fsq_jax import workdir as workdirs
from fsq_jax.report import page

# Of what codebook.json holds; raise it with any change that pages would miss.
ANALYSIS_VERSION = 1
# Grids in the report: at most so many, and so many bytes.
_MAX_FRAMES = 8
_MAX_FRAME_BYTES = 12_000_000


def write_report(
    workdir: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
) -> str:
  """Writes report.html from the files of a workdir.

  Args:
    workdir: folder with any of config.json, quantizer.json, run.json,
      metrics.jsonl, evaluation.json, codebook.json and
      reconstructions/step_*.png.
    output: folder for the page; files that it has are read in place of those of
      the workdir. None is the workdir.

  Returns:
    The path of the page.
  """
  output = os.fspath(workdir if output is None else output)
  run = _read_workdir(os.path.abspath(os.fspath(workdir)), output)
  text = page.render(run)
  path = os.path.join(output, 'report.html')
  workdirs.write_bytes(path, text.encode('utf-8', 'replace'))
  return path


def _read_workdir(workdir: str, output: str) -> page.Run:
  def find(name: str) -> str:
    written = os.path.join(output, name)
    return written if os.path.exists(written) else os.path.join(workdir, name)

  notices = []
  files = {
      name: _read_json(find(f'{name}.json'), notices)
      for name in ('config', 'quantizer', 'run', 'evaluation')
  }
  analysis = _read_json(find(workdirs.CODEBOOK), notices)
  if analysis and analysis.get('version') != ANALYSIS_VERSION:
    analysis = {}
    notices.append(
        f'{workdirs.CODEBOOK} is of another version of fsq_jax and left out;'
        ' --mode=report writes it anew.'
    )
  step = files['evaluation'].get('step')
  if analysis and step not in (None, analysis['step']):
    notices.append(
        f'Single images and the codebook are of step {analysis["step"]}, all'
        f' else of step {step}; --mode=report looks at them anew.'
    )
  return page.Run(
      name=os.path.basename(workdir),
      config=files['config'],
      quantizer=files['quantizer'],
      provenance=files['run'],
      evaluation=files['evaluation'],
      rows=_read_rows(os.path.dirname(find(workdirs.METRICS))),
      frames=_read_frames(find('reconstructions'), notices),
      analysis=analysis,
      notices=notices,
  )


def _read_json(path: str, notices: list[str]) -> dict[str, Any]:
  try:
    return workdirs.read_json(path) or {}
  except ValueError as error:
    notices.append(str(error))
    return {}


def _read_rows(folder: str) -> dict[str, list[dict[str, Any]]]:
  """Rows of each split; the last row of a step repeated after a resume."""
  rows = {'train': {}, 'eval': {}}
  for row in workdirs.read_metrics(folder):
    if (by_step := rows.get(str(row.get('split')))) is not None:
      by_step[row['step']] = row
  return {
      split: [by_step[step] for step in sorted(by_step)]
      for split, by_step in rows.items()
  }


def _read_frames(folder: str, notices: list[str]) -> list[page.Frame]:
  """The last grid and, evenly spaced, some earlier ones."""
  paths = {}
  for name in os.listdir(folder) if os.path.isdir(folder) else ():
    if match := re.fullmatch(r'step_(\d+)\.png', name):
      paths[int(match[1])] = os.path.join(folder, name)
  if not paths:
    return []
  steps = sorted(paths)
  largest = max(os.path.getsize(path) for path in paths.values())
  num = min(_MAX_FRAMES, len(steps), _MAX_FRAME_BYTES // max(largest, 1))
  frames = []
  for position in np.linspace(len(steps) - 1, 0, max(num, 1)).round()[::-1]:
    step = steps[int(position)]
    try:
      with open(paths[step], 'rb') as file:
        png = file.read()
      with PIL.Image.open(io.BytesIO(png)) as image:
        image.load()
        frames.append(page.Frame(step, *image.size, png))
    except (OSError, SyntaxError) as error:
      notices.append(f'{os.path.basename(paths[step])}: {error}')
  return frames
