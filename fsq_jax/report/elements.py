"""HTML elements of report sections."""

import base64
from collections.abc import Sequence
import html
import math
import struct

# Decimals of metrics; other numbers have at most four significant digits.
_DECIMALS = {
    'psnr': 2,
    'ssim': 3,
    'ssim_uniform': 3,
    'perplexity': 1,
    'bits_per_image': 1,
    'generalization_gap': 2,
}
_BITS_DECIMALS = 2
# Most numbers along the axis of a histogram.
_MAX_TICKS = 8
# Narrower images are enlarged with visible pixels.
_SMALL = 96


def section(title: str, content: str) -> str:
  """Returns a section of the page; '' without content."""
  return f'<section><h2>{title}</h2>{content}</section>' if content else ''


def levels(counts: Sequence[int], entropy: float, label: str) -> str:
  """Returns a histogram of the levels of a dimension; dead levels in red.

  Args:
    counts: number of tokens at each level.
    entropy: of the counts, in bits.
    label: name of the dimension, already escaped.
  """
  dead_class = ' class="dead"'
  total, largest = max(sum(counts), 1), max(*counts, 1)
  bars = [
      f'<i style="height:{100 * count / largest:.1f}%"'
      f'{"" if count else dead_class} title="level {level}: {count:,}'
      f' tokens, {100 * count / total:.2f} %"></i>'
      for level, count in enumerate(counts)
  ]
  dead = sum(count == 0 for count in counts)
  note = f', {dead} dead' if dead else ''
  interval = math.ceil(len(counts) / _MAX_TICKS)
  ticks = ''.join(
      f'<i>{"" if level % interval else level}</i>'
      for level in range(len(counts))
  )
  return (
      f'<figure><figcaption>{label}: {entropy:.2f} of'
      f' {math.log2(len(counts)):.2f} bits{note}</figcaption>'
      '<div class="histogram"><b>share of tokens</b>'
      f'<div class="scale"><span>{100 * largest / total:.1f} %</span>'
      f'<span>0</span></div><div class="bars">{"".join(bars)}</div>'
      f'<div class="ticks">{ticks}</div><b class="below">level index</b></div>'
      '</figure>'
  )


def image(data: str, alt: str, classes: str = '') -> str:
  """Returns an image; pixels of small images stay squares when enlarged.

  Args:
    data: a PNG in base64.
    alt: description, already escaped.
    classes: CSS classes.
  """
  # The position in every PNG.
  header = base64.b64decode(data[:32])
  width, height = struct.unpack('>II', header[16:24])
  if width < _SMALL:
    classes = f'pixels {classes}'
  return (
      f'<img class="{classes}" alt="{alt}" width="{width}" height="{height}"'
      f' src="data:image/png;base64,{html.escape(data)}">'
  )


def heat_table(
    names: Sequence[str], cells: Sequence[Sequence[str]], classes: str = ''
) -> str:
  """Returns a square table of `heat_cell`s, labelled on both sides."""
  head = ''.join(f'<th>{name}</th>' for name in ('', *names))
  body = ''.join(
      f'<tr><th>{name}</th>{"".join(row)}</tr>'
      for name, row in zip(names, cells, strict=True)
  )
  return (
      f'<div class="wide"><table class="heat {classes}"><tr>{head}</tr>{body}'
      '</table></div>'
  )


def heat_cell(text: str, strength: float, title: str) -> str:
  """Returns a cell from grey for strength -1 over no color to blue for 1."""
  # The text stays readable.
  color, most = ('--mark', 70) if strength > 0 else ('--soft', 45)
  share = most * min(abs(strength), 1)
  return (
      f'<td title="{title}" style="background:color-mix(in srgb, var({color})'
      f' {share:.0f}%, var(--tile))">{text}</td>'
  )


def number(name: str, value: float | str | None) -> str:
  """Formats a value of a metric; missing and infinite ones as a dash.

  Args:
    name: of the metric, which has the number of decimals.
    value: of the metric; texts are returned as they are.
  """
  if value is not None and not isinstance(value, int | float):
    return str(value)
  if value is None or not math.isfinite(value):
    return '\N{EN DASH}'
  if isinstance(value, int):
    return f'{value:,}'
  decimals = _DECIMALS.get(name)
  if decimals is None and 'bits' in name.split('_'):
    decimals = _BITS_DECIMALS
  return f'{value:.4g}' if decimals is None else f'{value:,.{decimals}f}'


def decimals(value: float | None) -> str:
  """Returns two decimals; a dash for None."""
  return '\N{EN DASH}' if value is None else f'{value:.2f}'
