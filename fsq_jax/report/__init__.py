"""Reconstruction grids, and the report of a workdir as one HTML page.

What a workdir lacks is left out of the report, and a file that a crash left
half written is named in it.
"""

import io
import json
import math
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

# Pixels of a grid: its width is about this, images are at most so many times
# enlarged, labels stand in a margin, white gaps part images and pairs of rows.
_GRID_WIDTH = 1200
_MAX_ENLARGEMENT = 8
_MARGIN = 22
_GAP = 3
_PAIR_GAP = 14
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


def reconstruction_grid(
    originals: np.ndarray,
    reconstructions: np.ndarray,
    *,
    columns: int | None = None,
) -> np.ndarray:
  """Lays rows of originals directly over rows of their reconstructions.

  Args:
    originals: [B, H, W, 3] uint8.
    reconstructions: as originals.
    columns: images in a row; None chooses for a width of about 1200 pixels.

  Returns:
    [height, width, 3] uint8: each pixel of an image is a square of the same
    colour, whose side is 1 for large images and more for small ones.
  """
  pair = np.asarray(originals), np.asarray(reconstructions)
  if pair[0].shape != pair[1].shape or pair[0].ndim != 4 or not pair[0].size:
    raise ValueError(
        f'reconstruction_grid got shapes {pair[0].shape} and {pair[1].shape};'
        ' give two equal shapes [B, H, W, 3] of at least one image.'
    )
  if pair[0].dtype != np.uint8 or pair[1].dtype != np.uint8:
    raise ValueError(
        f'reconstruction_grid got {pair[0].dtype} and {pair[1].dtype}; give'
        ' uint8 (metrics.to_uint8 converts).'
    )
  num, height, width, _ = pair[0].shape
  columns = columns or max(1, min(8, num, _GRID_WIDTH // width))
  scale = _GRID_WIDTH // (columns * width)
  scale = max(1, min(_MAX_ENLARGEMENT, scale))
  height, width = scale * height, scale * width
  num_pairs = math.ceil(num / columns)
  pair_height = 2 * height + _GAP + _PAIR_GAP
  shape = (
      num_pairs * pair_height - _PAIR_GAP,
      _MARGIN + columns * (width + _GAP) - _GAP,
      3,
  )
  grid = np.full(shape, 255, np.uint8)
  for side, (label, images) in enumerate(
      zip(('original', 'reconstruction'), pair, strict=True)
  ):
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    label = _vertical_label(label, height)
    for i in range(num):
      top = i // columns * pair_height + side * (height + _GAP)
      left = _MARGIN + i % columns * (width + _GAP)
      grid[top : top + height, left : left + width] = images[i]
      grid[top : top + height, :_MARGIN] = label
  return grid


def save_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
  """Writes [H, W, 3] uint8 as a PNG, whole or not at all."""
  file = io.BytesIO()
  PIL.Image.fromarray(np.asarray(image)).save(file, 'png')
  os.makedirs(os.path.dirname(os.fspath(path)) or '.', exist_ok=True)
  workdirs.write_bytes(path, file.getvalue())


def _vertical_label(text: str, height: int) -> np.ndarray:
  """Text that reads upwards in the middle of [height, _MARGIN, 1] uint8."""
  label = PIL.Image.new('L', (height, _MARGIN), 255)
  font = PIL.ImageFont.load_default(13)
  middle = height / 2, _MARGIN / 2
  PIL.ImageDraw.Draw(label).text(middle, text, 100, font, anchor='mm')
  return np.asarray(label.transpose(PIL.Image.Transpose.ROTATE_90))[..., None]


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
      rows=_read_rows(find('metrics.jsonl')),
      frames=_read_frames(find('reconstructions'), notices),
      analysis=analysis,
      notices=notices,
  )


def _read_json(path: str, notices: list[str]) -> dict[str, Any]:
  try:
    with open(path, encoding='utf-8') as file:
      value = json.load(file)
    if isinstance(value, dict):
      return value
    notices.append(f'{os.path.basename(path)} is not a JSON object.')
  except FileNotFoundError:
    pass
  except (OSError, ValueError) as error:
    notices.append(f'{os.path.basename(path)} cannot be read: {error}')
  return {}


def _read_rows(path: str) -> dict[str, list[dict[str, Any]]]:
  """Rows of each split; of a step that was repeated after a resume the last."""
  rows = {'train': {}, 'eval': {}}
  if os.path.exists(path):
    with open(path, encoding='utf-8', errors='replace') as file:
      for line in file:
        try:
          row = json.loads(line)
          step = int(row['step'])
          rows[row['split']][step] = row | {'step': step}
        except (ValueError, TypeError, KeyError, OverflowError):
          # A crash cuts lines short; other splits are not drawn.
          continue
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
