"""The HTML page of a report, self-contained.

Texts of a run are escaped where they are inserted.
"""

import base64
from collections.abc import Mapping, Sequence
import html
import json
import math
from typing import Any, NamedTuple

from fsq_jax.report import codebook_section
from fsq_jax.report import curves
from fsq_jax.report import elements
from fsq_jax.report import image_section
from fsq_jax.report import style

# Metric by a frozen network -> label and note of its tile.
_NETWORK_TILES = {
    'lpips_alexnet': ('LPIPS', 'AlexNet'),
    'lpips_vgg16': ('LPIPS', 'VGG16'),
    'rfid': ('rFID', 'Inception-v3'),
    'rfid_tf1': ('rFID', 'Inception-v3, grid of TF 1'),
    'fd_vgg16': ('Frechet distance', 'VGG16'),
    'fd_encoder': ('Frechet distance', 'latents of an encoder'),
}


class Frame(NamedTuple):
  """A PNG of reconstructions: its step, size in pixels and bytes."""

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
  # Whole photographs above their reconstructions, by name, of the newest step.
  photographs: dict[str, Frame]
  # Grids of reconstructions with ascending steps.
  frames: list[Frame]
  # Contents of codebook.json.
  analysis: dict[str, Any]
  # Messages on files that could not be used.
  notices: list[str]


def render(run: Run) -> str:
  """Returns the page of a run."""
  protocol = dict(run.evaluation.get('protocol') or {})
  definitions = protocol.pop('definitions', None) or {}
  body = '\n'.join([
      _headline(run),
      _photographs(run.photographs),
      _reconstructions(run.frames),
      image_section.render(run.analysis),
      elements.section('Training curves', curves.render(run.rows)),
      _tokens(run),
      _results(run.evaluation, definitions),
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


def _headline(run: Run) -> str:
  """Renders name, summary, notices and tiles."""
  values = _values(run)
  notices = [f'<p class="notice">{html.escape(n)}</p>' for n in run.notices]
  tiles = [
      f'<div><b>{value}</b>{label}<span>{note}</span></div>'
      for label, value, note in _tiles(run, values)
  ]
  return (
      f'<header><h1>{html.escape(run.name)}</h1>'
      f'<p>{html.escape(_summary(run, values))}</p>{"".join(notices)}'
      f'<div class="tiles">{"".join(tiles)}</div></header>'
  )


def _values(run: Run) -> dict[str, Any]:
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
  return {name: value for name, value in values.items() if _finite(value)}


def _summary(run: Run, values: Mapping[str, Any]) -> str:
  """Returns a sentence on the model and its results."""
  name = str(run.quantizer.get('name', 'The model'))
  name = name.replace('_', ' ').upper() if name == name.lower() else name
  if run.quantizer.get('name') == 'none':
    name = 'A continuous autoencoder'
  if run.quantizer.get('levels'):
    name += ' with levels ' + ' \N{MULTIPLICATION SIGN} '.join(
        map(str, run.quantizer['levels'])
    )
  if 'codebook_size' in values:
    name += f' ({values["codebook_size"]:,} codes)'
  if 'psnr' not in values:
    if run.evaluation:
      return f'{name}: the evaluation has no finite PSNR.'
    if not run.rows['train']:
      return f'{name}: no metrics have been logged yet.'
    row = run.rows['train'][-1]
    return (
        f'{name}: no evaluation yet; after step {row["step"]:,} the loss is'
        f' {_number("loss", row.get("loss"))}.'
    )
  protocol = run.evaluation.get('protocol') or {}
  images = 'images'
  if _finite(protocol.get('num_images')):
    images = f'{protocol["num_images"]:,} images'
  source = [protocol.get('source'), protocol.get('split')]
  source = ' / '.join(str(part) for part in source if part)
  text = f'{name} reconstructs {images}' + (f' of {source}' if source else '')
  text += f' at {_number("psnr", values["psnr"])} dB PSNR'
  if 'ssim' in values:
    text += f' and {_number("ssim", values["ssim"])} SSIM'
  if 'usage' in values:
    text += f', using {100 * values["usage"]:.1f} % of its codes'
  if 'step' in values:
    text += f', after {values["step"]:,} steps'
  return text + '.'


def _tiles(run: Run, values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """Returns (label, value, note) of the available metrics."""
  size = values.get('codebook_size')
  bits = math.log2(size) if size else None
  tiles = []
  if 'psnr' in values:
    text = f'{_number("psnr", values["psnr"])} dB'
    tiles.append(('PSNR', text, 'mean over images'))
  if 'ssim' in values:
    text = _number('ssim', values['ssim'])
    tiles.append(('SSIM', text, 'Gaussian window'))
  for name, (label, note) in _NETWORK_TILES.items():
    if name in values:
      tiles.append((label, _number(name, values[name]), note))
  if 'usage' in values:
    used = values.get('num_used_codes')
    note = f'{used:,} of {size:,} codes' if used and size else 'of the codes'
    tiles.append(('Codebook usage', f'{100 * values["usage"]:.1f} %', note))
  if 'perplexity' in values:
    note = f'of {size:,} codes' if size else 'codes in effective use'
    text = _number('perplexity', values['perplexity'])
    tiles.append(('Perplexity', text, note))
  if 'entropy_bits' in values:
    note = f'entropy, of {bits:.2f}' if size else 'entropy'
    text = _number('entropy_bits', values['entropy_bits'])
    tiles.append(('Bits per token', text, note))
  num_images = (run.evaluation.get('protocol') or {}).get('num_images')
  sides = (run.config.get('data') or {}).get('image_size')
  if size and sides and num_images and 'num_tokens' in values:
    tokens = values['num_tokens'] + values.get('num_invalid_tokens', 0)
    tokens /= num_images
    rate = tokens * bits / math.prod(sides)
    note = f'{tokens:g} tokens per image'
    tiles.append(('Bits per pixel', f'{rate:.3f}', note))
  return tiles


def _photographs(photographs: Mapping[str, Frame]) -> str:
  """Renders whole photographs of the evaluation and their reconstructions."""
  if not photographs:
    return ''
  figures = [
      f'<figure>{_image(frame, f"{name}: original, reconstruction")}'
      f'<figcaption>{html.escape(name)}</figcaption></figure>'
      for name, frame in photographs.items()
  ]
  step = next(iter(photographs.values())).step
  return elements.section(
      'Held-out photographs',
      f'<p class="soft">Original above reconstruction, step {step:,}. The'
      ' evaluated images are tiles of these photographs; they are joined'
      f' here.</p><div class="photos">{"".join(figures)}</div>',
  )


def _image(frame: Frame, alt: str, attributes: str = '') -> str:
  data = base64.b64encode(frame.png).decode()
  return (
      f'<img{attributes} alt="{html.escape(alt)}" width="{frame.width}"'
      f' height="{frame.height}" src="data:image/png;base64,{data}">'
  )


def _reconstructions(frames: Sequence[Frame]) -> str:
  """Renders the last grid, and a slider over earlier grids (JavaScript)."""
  if not frames:
    return ''
  images = []
  for frame in frames:
    hidden = '' if frame is frames[-1] else ' hidden'
    attributes = f' class="frame"{hidden}'
    images.append(_image(frame, f'step {frame.step:,}', attributes))
  last = len(frames) - 1
  label = f'step {frames[-1].step:,}'
  caption = f'<p class="soft">Originals above reconstructions, {label}.</p>'
  if last:
    caption = (
        '<p class="soft">Originals above reconstructions, <output id="shown">'
        f'{label}</output>. <input id="slider" type="range" min="0"'
        f' max="{last}" value="{last}" aria-label="step" hidden></p>'
    )
  images = f'<div class="wide">{"".join(images)}</div>'
  return elements.section('Reconstructions', caption + images)


def _tokens(run: Run) -> str:
  """Renders the analysis of --mode=report, or the levels of the evaluation."""
  found = codebook_section.render(run.analysis)
  return found or _levels(run.evaluation.get('codebook') or {})


def _levels(codebook: Mapping[str, Any]) -> str:
  """Renders a histogram of the levels of each dimension."""
  histograms = codebook.get('level_histograms') or []
  entropies = codebook.get('level_entropy_bits') or []
  figures = [
      elements.levels(counts, entropy, f'Dimension {number}')
      for number, (counts, entropy) in enumerate(
          zip(histograms, entropies, strict=True), 1
      )
  ]
  content = f'<div class="levels">{"".join(figures)}</div>' if figures else ''
  return elements.section('How often each level occurs', content)


def _results(
    evaluation: Mapping[str, Any], definitions: Mapping[str, str]
) -> str:
  """Renders all metrics of the evaluation with their definitions."""
  values = {
      **(evaluation.get('metrics') or {}),
      **(evaluation.get('codebook') or {}),
  }
  rows = []
  for name, value in values.items():
    if name == 'level_histograms':
      continue
    parts = value if isinstance(value, list) else [value]
    text = ', '.join(_number(name, part) for part in parts)
    cells = (name, text, definitions.get(name, ''))
    cells = ''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)
    rows.append(f'<tr>{cells}</tr>')
  if not rows:
    return ''
  return elements.section(
      f'All metrics at step {html.escape(_number("", evaluation.get("step")))}',
      '<table><tr><th>metric</th><th>value</th>'
      f'<th>definition</th></tr>{"".join(rows)}</table>',
  )


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


def _finite(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def _number(name: str, value: Any) -> str:
  """Formats a metric by `elements.number`, texts by `str`."""
  if value is None or isinstance(value, int | float):
    return elements.number(name, value)
  return str(value)
