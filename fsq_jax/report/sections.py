"""Contents of a run, and what the pages of all runs share.

Texts of a run are escaped where they are inserted.
"""

import base64
from collections.abc import Mapping, Sequence
import html
import json
import math
from typing import Any, NamedTuple

from fsq_jax.report import elements
from fsq_jax.report import style


class Frame(NamedTuple):
  """A PNG of an evaluation: its step, size in pixels and bytes."""

  step: int
  width: int
  height: int
  png: bytes


class Run(NamedTuple):
  """Contents of the files of a run; empty for missing files."""

  name: str
  config: dict[str, Any]
  quantizer: dict[str, Any]
  provenance: dict[str, Any]
  evaluation: dict[str, Any]
  # split -> rows with ascending steps.
  rows: dict[str, list[dict[str, Any]]]
  # Other pictures of the newest step by name: whole photographs above their
  # reconstructions; of generators, 'inpainting' and 'nearest'.
  pictures: dict[str, Frame]
  # Grids of reconstructions or contact sheets of samples, ascending steps.
  frames: list[Frame]
  # Contents of codebook.json.
  analysis: dict[str, Any]
  # Messages on files that could not be used.
  notices: list[str]


def document(
    run: Run,
    summary: str,
    tiles: Sequence[tuple[str, str, str]],
    sections: Sequence[str],
) -> str:
  """Returns a page: headline, sections, configuration and provenance.

  Args:
    run: the run.
    summary: a sentence.
    tiles: (label, value, note) of the most important metrics.
    sections: HTML below the headline.
  """
  notices = [f'<p class="notice">{html.escape(n)}</p>' for n in run.notices]
  boxes = [
      '<div><b>{1}</b>{0}<span>{2}</span></div>'.format(*map(html.escape, tile))
      for tile in tiles
  ]
  protocol = dict(run.evaluation.get('protocol') or {})
  protocol.pop('definitions', None)
  body = '\n'.join([
      f'<header><h1>{html.escape(run.name)}</h1>'
      f'<p>{html.escape(summary)}</p>{"".join(notices)}'
      f'<div class="tiles">{"".join(boxes)}</div></header>',
      *sections,
      elements.section('Evaluation protocol', _tree(protocol)),
      elements.section('Quantizer', _tree(run.quantizer)),
      elements.section('Configuration', _tree(run.config)),
      elements.section('Command, versions and devices', _tree(run.provenance)),
  ])
  return (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      '<meta name="viewport" content="width=device-width, initial-scale=1">'
      f'<title>{html.escape(run.name)}</title><style>{style.STYLE}'
      '</style></head>'
      f'<body>\n{body}\n<script>{style.SCRIPT}</script></body></html>\n'
  )


def finite_values(run: Run) -> dict[str, Any]:
  """Returns the finite metrics of the evaluation, or of the last eval row."""
  values = {
      'step': run.evaluation.get('step'),
      **(run.evaluation.get('metrics') or {}),
      **(run.evaluation.get('codebook') or {}),
  }
  if not run.evaluation and run.rows['eval']:
    values = run.rows['eval'][-1]
  size = run.quantizer.get('codebook_size')
  if run.quantizer.get('levels'):
    size = math.prod(run.quantizer['levels'])
  values = {'codebook_size': size} | values
  return {name: value for name, value in values.items() if is_finite(value)}


def describe_quantizer(
    quantizer: Mapping[str, Any], values: Mapping[str, Any], default: str
) -> str:
  """Returns name, levels and size of a quantizer; `default` without a name."""
  name = str(quantizer.get('name', default))
  name = name.replace('_', ' ').upper() if name == name.lower() else name
  if quantizer.get('levels'):
    name += ' with levels ' + ' \N{MULTIPLICATION SIGN} '.join(
        map(str, quantizer['levels'])
    )
  if 'codebook_size' in values:
    name += f' ({values["codebook_size"]:,} codes)'
  return name


def describe_missing(run: Run, name: str, metric: str) -> str:
  """Returns a sentence on a run whose evaluation lacks its main metric."""
  if run.evaluation:
    return f'{name}: the evaluation has no finite {metric}.'
  if not run.rows['train']:
    return f'{name}: no metrics have been logged yet.'
  row = run.rows['train'][-1]
  return (
      f'{name}: no evaluation yet; after step {row["step"]:,} the loss is'
      f' {elements.number("loss", row.get("loss"))}.'
  )


def image(frame: Frame, alt: str, attributes: str = '') -> str:
  """Returns a picture; `attributes` are HTML."""
  data = base64.b64encode(frame.png).decode()
  return (
      f'<img{attributes} alt="{html.escape(alt)}" width="{frame.width}"'
      f' height="{frame.height}" src="data:image/png;base64,{data}">'
  )


def slider(frames: Sequence[Frame], title: str, caption: str) -> str:
  """Returns the last frame, and a slider over earlier ones (JavaScript).

  Args:
    frames: with ascending steps; without any, there is no section.
    title: of the section.
    caption: of all frames; their step follows.
  """
  if not frames:
    return ''
  images = []
  for frame in frames:
    hidden = '' if frame is frames[-1] else ' hidden'
    attributes = f' class="frame"{hidden}'
    images.append(image(frame, f'step {frame.step:,}', attributes))
  last = len(frames) - 1
  step = f'step {frames[-1].step:,}'
  text = f'<p class="soft">{caption}, {step}.</p>'
  if last:
    text = (
        f'<p class="soft">{caption}, <output id="shown">'
        f'{step}</output>. <input id="slider" type="range" min="0"'
        f' max="{last}" value="{last}" aria-label="step" hidden></p>'
    )
  images = f'<div class="wide">{"".join(images)}</div>'
  return elements.section(title, text + images)


def metrics(run: Run, values: Mapping[str, Any], title: str) -> str:
  """Returns a table of values with the definitions of the evaluation.

  Args:
    run: the run.
    values: numbers, texts or lists of numbers by name.
    title: of the section; without values there is no section.
  """
  definitions = (run.evaluation.get('protocol') or {}).get('definitions') or {}
  rows = []
  for name, value in values.items():
    parts = value if isinstance(value, list) else [value]
    text = ', '.join(elements.number(name, part) for part in parts)
    cells = (name, text, definitions.get(name, ''))
    cells = ''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)
    rows.append(f'<tr>{cells}</tr>')
  if not rows:
    return ''
  return elements.section(
      html.escape(title),
      '<table><tr><th>metric</th><th>value</th>'
      f'<th>definition</th></tr>{"".join(rows)}</table>',
  )


def is_finite(value: Any) -> bool:
  """Returns whether a value of a file is a finite number."""
  return isinstance(value, int | float) and math.isfinite(value)


def _tree(values: Mapping[str, Any]) -> str:
  """Renders nested fields as a list with collapsible branches."""
  parts, leaves = [], []
  for name, value in values.items():
    name = html.escape(str(name))
    if isinstance(value, Mapping) and value:
      parts.append(
          f'<details><summary>{name}</summary>{_tree(value)}</details>'
      )
    else:
      if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
      leaves.append(f'<dt>{name}</dt><dd>{html.escape(value)}</dd>')
  if leaves:
    parts.insert(0, f'<dl>{"".join(leaves)}</dl>')
  return ''.join(parts)
