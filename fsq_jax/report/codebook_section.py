"""Sections of a report on tokens: usage, dependence and effect on images.

Each figure has its definition beside it.
"""

from collections.abc import Mapping
import html
import math
from typing import Any

from fsq_jax.report import curves
from fsq_jax.report import elements
from fsq_jax.report import image_section

_NEIGHBOURS = {
    'right': 'The token to the right',
    'below': 'The token below',
}
# log2 of the lift of the strongest color; pairs are shown from this expected
# number on.
_FULL_LIFT = 3
_FEWEST_EXPECTED = 5


def render(analysis: Mapping[str, Any]) -> str:
  """Returns sections on tokens; '' without an analysis or tokens.

  Args:
    analysis: contents of codebook.json.
  """
  if not analysis.get('codebook'):
    return ''
  return ''.join([
      _use_of_levels(analysis),
      _use_of_codes(analysis),
      _pairs_of_digits(analysis),
      _pairs_of_codes(analysis),
      _swaps(analysis),
      _nearest(analysis),
  ])


def _use_of_levels(analysis: Mapping[str, Any]) -> str:
  digits = analysis['digits']
  if not digits:
    return ''
  figures = [
      elements.levels(counts, entropy, _digit(analysis, i))
      for i, (counts, entropy) in enumerate(
          zip(digits['histograms'], digits['entropy_bits'], strict=True)
      )
  ]
  return elements.section(
      'How often each level occurs',
      f'<p class="soft">{image_section.describe(analysis)} Share of the tokens'
      ' at each level of each dimension, and its entropy. A dead level never'
      ' occurs.</p>'
      f'<div class="levels">{"".join(figures)}</div>',
  )


def _digit(analysis: Mapping[str, Any], number: int) -> str:
  """Returns the name of a dimension, with its index if tokens have several."""
  num = analysis['dimensions']
  name = f'Dimension {number % num + 1}'
  if analysis['index_shape']:
    return f'{name} of index {number // num + 1}'
  return name


def _use_of_codes(analysis: Mapping[str, Any]) -> str:
  """Renders frequencies over ranks, and the most frequent codes."""
  codebook, ranks = analysis['codebook'], analysis['code_ranks']
  size, total = codebook['codebook_size'], codebook['num_tokens']
  if not total:
    return ''
  shares = [count / total for count in ranks['counts']]
  points = {
      'codes of the model': list(zip(ranks['ranks'], shares, strict=True)),
      'uniform use': [(1, 1 / size), (size, 1 / size)],
  }
  plot = curves.plot(
      points,
      'log',
      'codes-',
      x_label='rank of the code',
      y_label='share of tokens',
      x_scale='log',
  )
  numbers = ', '.join(
      f'{num:,} for {100 * float(share):g} %'
      for share, num in ranks['num_codes_of_share'].items()
  )
  cards = ''.join(_code_card(analysis, code) for code in analysis['top_codes'])
  swatches = classes = ''
  if 'swatch' in analysis['top_codes'][0]:
    classes = ' codes'
    swatches = (
        ' The picture is the middle patch of a decoded grid of this code alone.'
    )
  return elements.section(
      'Codebook usage',
      f'<p class="soft">{codebook["num_used_codes"]:,} of {size:,} codes occur'
      f' in {total:,} tokens, {codebook["tokens_per_code"]:.3g} per code. The'
      ' curve has the codes in descending order of frequency. Fewest codes that'
      f' cover a share of the tokens: {numbers}.</p>'
      f'<div class="plots"><figure>{plot}</figure></div>'
      '<h3>Most frequent codes</h3><p class="soft">Code, its level indices if'
      f' it has any, and its share of all tokens.{swatches}</p>'
      f'<div class="cards{classes}">{cards}</div>',
  )


def _code_card(analysis: Mapping[str, Any], code: Mapping[str, Any]) -> str:
  share = code['count'] / analysis['codebook']['num_tokens']
  percent = f'{100 * share:#.3g}'.rstrip('.')
  digits = ' '.join(map(str, code.get('digits', ())))
  digits = f'<br>({digits})' if digits else ''
  swatch = ''
  if 'swatch' in code:
    swatch = elements.image(code['swatch'], f'code {code["code"]}')
  return (
      f'<figure>{swatch}<figcaption>{code["code"]:,}{digits}<br>'
      f'{percent} %</figcaption></figure>'
  )


def _pairs_of_digits(analysis: Mapping[str, Any]) -> str:
  """Renders matrices of mutual information between dimensions."""
  digits = analysis['digits']
  title = 'Mutual information between dimensions'
  if not digits:
    reason = 'The codes of this quantizer have no level indices.'
    if analysis['dimensions']:
      reason = 'There are too many levels to count pairs of them.'
    return elements.section(title, f'<p class="soft">{reason}</p>')
  if not digits['pairs']:
    num = len(digits['histograms'])
    text = f'A position has {num} level indices, too many for a matrix.'
    return elements.section(title, f'<p class="soft">{text}</p>')
  tables = []
  for name, pairs in digits['pairs'].items():
    label = _NEIGHBOURS.get(name, 'The same token')
    bits = pairs['bits']
    names = [str(i + 1) for i in range(len(bits))]
    # The diagonal of a token has entropies, which are much larger.
    own = name == 'token'
    largest = max(
        [
            x
            for i, row in enumerate(bits)
            for j, x in enumerate(row)
            if x is not None and not (own and i == j)
        ],
        default=0,
    )
    cells = [
        [
            elements.heat_cell(
                elements.decimals(x),
                0 if own and i == j else (x or 0) / (largest or 1),
                f'{_digit(analysis, i)}, {_digit(analysis, j)}',
            )
            for j, x in enumerate(row)
        ]
        for i, row in enumerate(bits)
    ]
    tables.append(
        f'<figure><figcaption>{label}, {pairs["num_pairs"]:,} pairs'
        f'</figcaption>{elements.heat_table(names, cells)}</figure>'
    )
  order = ''
  if analysis['index_shape']:
    order = ' Dimensions are numbered across indices.'
  return elements.section(
      title,
      '<p class="soft">Mutual information in bits: sum of p(x, y) log2 p(x, y)'
      ' / (p(x) p(y)) over levels x of the row and y of the column, p their'
      ' frequencies among all pairs. Rows are dimensions of a token, columns'
      ' dimensions of the token in the title. 0 means independent; within a'
      f' token the diagonal is the entropy of a dimension.{order}</p>'
      f'<div class="heats">{"".join(tables)}</div>',
  )


def _pairs_of_codes(analysis: Mapping[str, Any]) -> str:
  """Renders matrices of lift between the most frequent codes or classes."""
  pairs = analysis['code_pairs']
  size = pairs['codes_per_class']
  swatches = {code['code']: code for code in analysis['top_codes']}
  names = []
  for number in pairs['shown']:
    name = f'{number:,}'
    if size == 1 and 'swatch' in swatches.get(number, {}):
      swatch = swatches[number]['swatch']
      name = elements.image(swatch, f'code {number}') + name
    names.append(name)
  what = 'codes'
  note = ''
  if size > 1:
    what = 'classes of codes'
    note = (
        f' Pairs of {analysis["codebook"]["codebook_size"]:,} codes are too'
        f' many to count: {size:,} consecutive codes, ordered by'
        f' {html.escape(pairs["order"])}, are one class of'
        f' {pairs["num_classes"]:,}. The mutual information of classes is at'
        ' most that of their codes.'
    )
  figures = []
  for name, direction in pairs['directions'].items():
    cells = [
        [
            _lift_cell(observed, expected)
            for observed, expected in zip(*row, strict=True)
        ]
        for row in zip(
            direction['observed'], direction['expected'], strict=True
        )
    ]
    bits, less_bias = (
        elements.decimals(direction[key])
        for key in ('bits', 'bits_miller_madow')
    )
    table = (
        '<p class="soft">No pair is expected at least'
        f' {_FEWEST_EXPECTED} times.</p>'
    )
    if max(map(max, direction['expected']), default=0) >= _FEWEST_EXPECTED:
      table = elements.heat_table(names, cells, 'small')
    figures.append(
        f'<figure><figcaption>{_NEIGHBOURS[name]}: mutual information'
        f' {bits} bits, {less_bias} bias-corrected; {direction["num_pairs"]:,}'
        f' pairs, {direction["num_cells"]:,} distinct</figcaption>'
        f'{table}</figure>'
    )
  return elements.section(
      f'Neighbouring {what}',
      '<p class="soft">log2 of the lift: observed pairs divided by the pairs'
      ' expected of independent neighbours, of the token of the row and its'
      f' neighbour of the column, for the {len(names)} most frequent {what}. +1'
      ' is twice as many as expected, -1 half; empty if fewer than'
      f' {_FEWEST_EXPECTED} are expected.{note} Mutual information is estimated'
      f' by the frequencies of all {what}: far too high with few pairs per'
      ' distinct pair, where the Miller-Madow bias correction is too small.</p>'
      f'<div class="heats">{"".join(figures)}</div>',
  )


def _lift_cell(observed: int, expected: float) -> str:
  title = f'{observed:,} pairs, expected {expected:.1f}'
  if expected < _FEWEST_EXPECTED:
    return elements.heat_cell('', 0, title)
  if not observed:
    return elements.heat_cell('\N{MINUS SIGN}\N{INFINITY}', -1, title)
  lift = math.log2(observed / expected)
  return elements.heat_cell(f'{lift:+.1f}', lift / _FULL_LIFT, title)


def _swaps(analysis: Mapping[str, Any]) -> str:
  swaps = analysis['swaps']
  if not swaps:
    return ''
  has_digits = swaps[0]['num_digits'] > 0
  figures = ''.join(_swap(analysis, swap) for swap in swaps)
  how = (
      'One level index of the framed token is set to each of its levels; all'
      ' other level indices and tokens are unchanged. The level of the image is'
      ' framed.'
  )
  if not has_digits:
    how = (
        'The codes have no level indices: the framed token is replaced by other'
        ' codes, ranked by their Euclidean distance from its code, which has'
        ' rank 0 and is framed. All other tokens are unchanged.'
    )
  elif swaps[0]['num_digits'] > len(swaps[0]['rows']):
    how += (
        f' Shown are the first {len(swaps[0]["rows"])} of'
        f' {swaps[0]["num_digits"]} dimensions.'
    )
  return elements.section(
      'One level index changed' if has_digits else 'One token changed',
      f'<p class="soft">{how} Below each image: its difference from the'
      ' unchanged image, grey for 0. RMS is over the pixels of the token\'s'
      ' patch, in grey levels of 255; "in the patch" is the fraction of the'
      f' squared change of the whole image inside the patch.</p>{figures}',
  )


def _swap(analysis: Mapping[str, Any], swap: Mapping[str, Any]) -> str:
  """Renders one image, and a strip for each of its dimensions."""
  names = ('left', 'top', 'width', 'height')
  box = ';'.join(
      f'{name}:{100 * share:.3f}%'
      for name, share in zip(names, swap['box'], strict=True)
  )
  strips = []
  for row in swap['rows']:
    cells = ''.join(map(_swap_cell, row['cells']))
    label = 'Codes by distance'
    if 'slot' in row:
      num = row['slot'] * analysis['dimensions'] + row['dimension']
      label = _digit(analysis, num)
    strips.append(
        f'<div><figcaption>{label}: {100 * row["share_in_patch"]:.0f} % in the'
        f' patch</figcaption><div class="wide"><div class="strip">{cells}</div>'
        '</div></div>'
    )
  row, column = swap['position']
  return (
      '<div class="swap"><figure><div class="whole">'
      f'{elements.image(swap["reconstruction"], "reconstruction")}'
      f'<i style="{box}"></i></div><figcaption>'
      f'{image_section.name_of(analysis, swap["index"])}, token in row'
      f' {row + 1}, column {column + 1}. Differences times'
      f' {swap["gain"]:.2g}.</figcaption></figure>'
      f'<div class="strips">{"".join(strips)}</div></div>'
  )


def _swap_cell(cell: Mapping[str, Any]) -> str:
  label = f'level {cell["level"]}' if 'level' in cell else (
      f'rank {cell["rank"]:,}<br>code {cell["code"]:,}<br>'
      f'{cell["distance"]:.3g} away'
  )
  own = ' class="own"' if cell['own'] else ''
  swapped = elements.image(cell['image'], 'swapped')
  difference = elements.image(cell['difference'], 'difference')
  return (
      f'<figure{own}>{swapped}{difference}<figcaption>{label}<br>RMS'
      f' {cell["rms"]:.1f}</figcaption></figure>'
  )


def _nearest(analysis: Mapping[str, Any]) -> str:
  rows = []
  for query in analysis['nearest']:
    captions = [image_section.name_of(analysis, query['index'])] + [
        f'{near["distance"]:.3g},'
        f' {image_section.name_of(analysis, near["index"])}<br>'
        f'{100 * near["equal_tokens"]:.0f} % equal'
        for near in query['nearest']
    ]
    cells = [
        f'<figure>{elements.image(entry["image"], "reconstruction")}'
        f'<figcaption>{caption}</figcaption></figure>'
        for entry, caption in zip(
            [query, *query['nearest']], captions, strict=True
        )
    ]
    rows.append(f'<div class="cards near">{"".join(cells)}</div>')
  if not rows:
    return ''
  return elements.section(
      'Nearest reconstructions',
      '<p class="soft">A reconstruction and its nearest neighbours among'
      f' {analysis["num_grids"]:,} images, spaced evenly over the split. The'
      ' distance is the squared Euclidean distance of codes, averaged over'
      ' positions. "Equal" is the fraction of equal tokens.</p>'
      f'{"".join(rows)}',
  )
