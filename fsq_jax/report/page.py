"""The page of an autoencoder's run."""

from collections.abc import Mapping
import html
import math
from typing import Any

from fsq_jax.report import codebook_section
from fsq_jax.report import curves
from fsq_jax.report import elements
from fsq_jax.report import image_section
from fsq_jax.report import sections

# Metric by a frozen network -> label and note of its tile.
_NETWORK_TILES = {
    'lpips_alexnet': ('LPIPS', 'AlexNet'),
    'lpips_vgg16': ('LPIPS', 'VGG16'),
    'rfid': ('rFID', 'Inception-v3'),
    'rfid_tf1': ('rFID', 'Inception-v3, grid of TF 1'),
    'fd_vgg16': ('Frechet distance', 'VGG16'),
    'fd_encoder': ('Frechet distance', 'latents of an encoder'),
}


def render(run: sections.Run) -> str:
  """Returns the page of an autoencoder's run."""
  values = sections.finite_values(run)
  evaluation = run.evaluation
  sizes = evaluation.get('image_sizes') or {}
  codebook = evaluation.get('codebook') or {}
  table = {**(evaluation.get('metrics') or {}), **codebook}
  table.pop('level_histograms', None)
  step = elements.number('step', evaluation.get('step'))
  return sections.document(
      run,
      _summary(run, values),
      _tiles(run, values),
      [
          _photographs({
              name: frame
              for name, frame in run.pictures.items()
              if name not in sizes
          }),
          sections.slider(
              run.frames, 'Reconstructions', 'Originals above reconstructions'
          ),
          _at_sizes(run, values, sizes),
          image_section.render(run.analysis),
          elements.section('Training curves', curves.render(run.rows)),
          codebook_section.render(run.analysis) or _levels(codebook),
          sections.metrics(run, table, f'All metrics at step {step}'),
      ],
  )


def _summary(run: sections.Run, values: Mapping[str, Any]) -> str:
  """Returns a sentence on the model and its results."""
  name = sections.describe_quantizer(run.quantizer, values, 'The model')
  if run.quantizer.get('name') == 'none':
    name = 'A continuous autoencoder'
  if 'psnr' not in values:
    return sections.describe_missing(run, name, 'PSNR')
  protocol = run.evaluation.get('protocol') or {}
  images = 'images'
  if sections.is_finite(protocol.get('num_images')):
    images = f'{protocol["num_images"]:,} images'
  source = [protocol.get('source'), protocol.get('split')]
  source = ' / '.join(str(part) for part in source if part)
  text = f'{name} reconstructs {images}' + (f' of {source}' if source else '')
  text += f' at {elements.number("psnr", values["psnr"])} dB PSNR'
  if 'ssim' in values:
    text += f' and {elements.number("ssim", values["ssim"])} SSIM'
  if 'usage' in values:
    text += f', using {100 * values["usage"]:.1f} % of its codes'
  if 'step' in values:
    text += f', after {values["step"]:,} steps'
  return text + '.'


def _tiles(
    run: sections.Run, values: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
  """Returns (label, value, note) of the available metrics."""
  size = values.get('codebook_size')
  bits = math.log2(size) if size else None
  tiles = []
  if 'psnr' in values:
    text = f'{elements.number("psnr", values["psnr"])} dB'
    tiles.append(('PSNR', text, 'mean over images'))
  if 'ssim' in values:
    text = elements.number('ssim', values['ssim'])
    tiles.append(('SSIM', text, 'Gaussian window'))
  for name, (label, note) in _NETWORK_TILES.items():
    if name in values:
      tiles.append((label, elements.number(name, values[name]), note))
  if 'usage' in values:
    used = values.get('num_used_codes')
    note = f'{used:,} of {size:,} codes' if used and size else 'of the codes'
    tiles.append(('Codebook usage', f'{100 * values["usage"]:.1f} %', note))
  if 'perplexity' in values:
    note = f'of {size:,} codes' if size else 'codes in effective use'
    text = elements.number('perplexity', values['perplexity'])
    tiles.append(('Perplexity', text, note))
  if 'entropy_bits' in values:
    note = f'entropy, of {bits:.2f}' if size else 'entropy'
    text = elements.number('entropy_bits', values['entropy_bits'])
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


def _photographs(photographs: Mapping[str, sections.Frame]) -> str:
  """Renders whole photographs of the evaluation and their reconstructions."""
  if not photographs:
    return ''
  figures = [
      f'<figure>{sections.image(frame, f"{name}: original, reconstruction")}'
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


def _at_sizes(
    run: sections.Run,
    values: Mapping[str, Any],
    sizes: Mapping[str, Mapping[str, Any]],
) -> str:
  """Renders metrics at each image size, and grids of the other sizes.

  Args:
    run: the run.
    values: metrics at data.image_size.
    sizes: contents of evaluation.json of the other sizes.
  """
  if not sizes:
    return ''
  sides = (run.config.get('data') or {}).get('image_size') or ()
  columns = {'x'.join(map(str, sides)): values} | {
      size: {**(x.get('metrics') or {}), **(x.get('codebook') or {})}
      for size, x in sizes.items()
  }
  rows = []
  for name in values:
    numbers = [column.get(name) for column in columns.values()]
    if all(map(sections.is_finite, numbers)):
      cells = (name, *(elements.number(name, x) for x in numbers))
      rows.append(''.join(f'<td>{html.escape(x)}</td>' for x in cells))
  header = ''.join(f'<th>{html.escape(x)}</th>' for x in ('metric', *columns))
  figures = [
      f'<figure>{sections.image(run.pictures[size], f"{size}: grid")}'
      f'<figcaption>{html.escape(size)}</figcaption></figure>'
      for size in sizes
      if size in run.pictures
  ]
  return elements.section(
      'Image sizes',
      f'<table><tr>{header}</tr>{"".join(f"<tr>{x}</tr>" for x in rows)}'
      '</table><p class="soft">Height x width in pixels. Originals above'
      f' reconstructions.</p><div class="photos">{"".join(figures)}</div>',
  )


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
