"""What a report says of tokens: how they are used, and what they do.

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
# Lift, as a power of 2, at which a color is full; fewer expected pairs than
# these are not shown.
_FULL_LIFT = 3
_FEWEST_EXPECTED = 5


def render(analysis: Mapping[str, Any]) -> str:
  """Returns sections on tokens; '' without an analysis or tokens.

  Args:
    analysis: what codebook.json holds.
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
      'Levels of each dimension',
      f'<p class="soft">Of {image_section.describe(analysis)} Tokens at each'
      ' level of each digit, from level 0, and the entropy of these shares. A'
      ' dead level never occurs.</p>'
      f'<div class="levels">{"".join(figures)}</div>',
  )


def _digit(analysis: Mapping[str, Any], number: int) -> str:
  """Names a digit; where a token has several indices, with that of its own."""
  num = analysis['dimensions']
  name = f'Dimension {number % num + 1}'
  if analysis['index_shape']:
    return f'{name} of index {number // num + 1}'
  return name


def _use_of_codes(analysis: Mapping[str, Any]) -> str:
  """The curve of counts over ranks, and the codes with the most tokens."""
  codebook, ranks = analysis['codebook'], analysis['code_ranks']
  size, total = codebook['codebook_size'], codebook['num_tokens']
  if not total:
    return ''
  shares = [count / total for count in ranks['counts']]
  points = {
      'share of tokens': list(zip(ranks['ranks'], shares, strict=True)),
      'if all were as likely': [(1, 1 / size), (size, 1 / size)],
  }
  plot = curves.plot(
      points, 'log', 'codes-', x_label='rank of the code', x_scale='log'
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
        ' The picture is the middle patch of what a grid of this code alone'
        ' decodes to.'
    )
  return elements.section(
      'Use of codes',
      f'<p class="soft">{codebook["num_used_codes"]:,} of {size:,} codes occur'
      f' in {total:,} tokens, {codebook["tokens_per_code"]:.3g} for each code.'
      ' The curve has the codes by descending number of tokens; rank 1 has the'
      f' most. Fewest codes that have a share of all tokens: {numbers}.</p>'
      f'<div class="plots"><figure>{plot}</figure></div>'
      '<h3>Codes with the most tokens</h3><p class="soft">Code, its digits if'
      f' it has any, and its share of all tokens.{swatches}</p>'
      f'<div class="cards{classes}">{cards}</div>',
  )


def _code_card(analysis: Mapping[str, Any], code: Mapping[str, Any]) -> str:
  share = 100 * code['count'] / analysis['codebook']['num_tokens']
  digits = ' '.join(map(str, code.get('digits', ())))
  digits = f'<br>({digits})' if digits else ''
  swatch = ''
  if 'swatch' in code:
    swatch = elements.image(code['swatch'], f'code {code["code"]}')
  return (
      f'<figure>{swatch}<figcaption>{code["code"]:,}{digits}<br>'
      f'{share:.3g} %</figcaption></figure>'
  )


def _pairs_of_digits(analysis: Mapping[str, Any]) -> str:
  """Matrices of mutual information between digits."""
  digits = analysis['digits']
  title = 'What digits say about each other'
  if not digits:
    reason = 'The codes of this quantizer have no digits.'
    if analysis['dimensions']:
      reason = 'Its digits have too many levels to count pairs of them.'
    return elements.section(title, f'<p class="soft">{reason}</p>')
  if not digits['pairs']:
    num = len(digits['histograms'])
    text = f'A position has {num} digits, too many for a matrix.'
    return elements.section(title, f'<p class="soft">{text}</p>')
  tables = []
  for name, pairs in digits['pairs'].items():
    label = _NEIGHBOURS.get(name, 'The same token')
    bits = pairs['bits']
    names = [str(i + 1) for i in range(len(bits))]
    # On the diagonal of one token are entropies, which would outshine the rest.
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
    order = ' Digits are numbered through, index after index.'
  return elements.section(
      title,
      '<p class="soft">Mutual information in bits, sum of p(x, y) log2 p(x, y)'
      ' / (p(x) p(y)) over levels x of the digit of the row and y of that of'
      ' the column, p the shares among all pairs. Rows are digits of a token,'
      ' columns those of the token that the title names. 0 is independence;'
      f' in the same token a digit says its entropy about itself.{order}</p>'
      f'<div class="heats">{"".join(tables)}</div>',
  )


def _pairs_of_codes(analysis: Mapping[str, Any]) -> str:
  """Matrices of lift between the codes, or classes, with the most tokens."""
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
        f' many to count: {size:,} codes that follow each other, ordered by'
        f' {html.escape(pairs["order"])}, are one class of'
        f' {pairs["num_classes"]:,}. Classes say at most as much about each'
        ' other as their codes do.'
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
        f'<p class="soft">None of these pairs is expected {_FEWEST_EXPECTED}'
        ' times.</p>'
    )
    if max(map(max, direction['expected']), default=0) >= _FEWEST_EXPECTED:
      table = elements.heat_table(names, cells, 'small')
    figures.append(
        f'<figure><figcaption>{_NEIGHBOURS[name]}: mutual information of'
        f' {bits} bits, {less_bias} less its bias; {direction["num_pairs"]:,}'
        f' pairs, {direction["num_cells"]:,} of them different</figcaption>'
        f'{table}</figure>'
    )
  return elements.section(
      f'Which {what} are neighbours',
      '<p class="soft">log2 of pairs counted over pairs expected, if neighbours'
      ' were independent, of the token of the row and the neighbour of the'
      f' column; the {len(names)} {what} with the most tokens. +1 is twice as'
      f' many as expected, -1 half; empty where fewer than {_FEWEST_EXPECTED}'
      f' are expected.{note} Mutual information is that of all {what}, from the'
      ' shares as counted: with few pairs for each different one it is far too'
      ' high. Its bias is that of Miller and Madow, which is too little'
      f' then.</p><div class="heats">{"".join(figures)}</div>',
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
      'One digit of the framed token is set to each of its levels, all others'
      ' and all other tokens stay; the level that the image has is framed.'
  )
  if not has_digits:
    how = (
        'Its codes have no digits: the framed token becomes another code, of'
        ' growing rank by the Euclidean distance from its own, which has rank'
        ' 0 and is framed; all other tokens stay.'
    )
  elif swaps[0]['num_digits'] > len(swaps[0]['rows']):
    how += (
        f' Shown are the first {len(swaps[0]["rows"])} of'
        f' {swaps[0]["num_digits"]} digits.'
    )
  return elements.section(
      'One digit changed' if has_digits else 'One token changed',
      f'<p class="soft">{how} Below each: the difference from the image as it'
      ' is, grey where there is none. RMS is over the pixels of the patch that'
      ' the token stands for, in grey levels of 255; "in the patch" is the'
      ' share of the squared change, over the whole image, that falls'
      f' there.</p>{figures}',
  )


def _swap(analysis: Mapping[str, Any], swap: Mapping[str, Any]) -> str:
  """One image: the whole, and a strip for each digit."""
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
      '<p class="soft">First a reconstruction, then those of the'
      f' {analysis["num_grids"]:,} images, spread evenly over the split, whose'
      ' codes are nearest to its own: by the mean over positions of the squared'
      ' Euclidean distance of the two codes there. "Equal" is the share of'
      f' tokens that are the same.</p>{"".join(rows)}',
  )
