"""Sections of a report on images: comparison, worst and best."""

from collections.abc import Mapping, Sequence
import html
from typing import Any

from fsq_jax.report import elements


def render(analysis: Mapping[str, Any]) -> str:
  """Returns sections with images; '' without an analysis.

  Args:
    analysis: contents of codebook.json.
  """
  if not analysis:
    return ''
  wipes = ''.join(_wipe(analysis, image) for image in analysis['spread'])
  wipes = elements.section(
      'Originals and reconstructions',
      f'<p class="soft">{describe(analysis)} Move the line with mouse, finger'
      ' or arrow keys: the original is to its left, the reconstruction to its'
      f' right.</p><div class="wipes">{wipes}</div>',
  )
  return wipes + elements.section(
      'Worst and best images',
      '<p class="soft">By PSNR of the image, in dB: 10 log10(1 / mse) of uint8'
      ' images divided by 255. Originals above reconstructions; # is the number'
      ' in the split of images without a name.</p>'
      f'<h3>Worst</h3>{_cards(analysis, analysis["worst"])}'
      f'<h3>Best</h3>{_cards(analysis, analysis["best"])}',
  )


def name_of(analysis: Mapping[str, Any], index: int) -> str:
  """Returns the escaped name of an image, or # and its number."""
  return html.escape(analysis.get('names', {}).get(str(index), f'#{index}'))


def describe(analysis: Mapping[str, Any]) -> str:
  """Returns an escaped sentence on the analyzed images."""
  protocol = analysis['protocol']
  source = [protocol.get('source'), protocol.get('split')]
  source = ' / '.join(str(part) for part in source if part)
  text = f'{analysis["num_images"]:,} images of {html.escape(source)} after'
  text += f' {analysis["step"]:,} steps.'
  if analysis['num_nonfinite_reconstructions']:
    num = analysis['num_nonfinite_reconstructions']
    text += f' {num:,} reconstructions are not finite and have no PSNR.'
  return text


def _wipe(analysis: Mapping[str, Any], image: Mapping[str, Any]) -> str:
  """Renders a reconstruction over an original, clipped at a movable line."""
  name = name_of(analysis, image['index'])
  original = elements.image(image['original'], 'original')
  reconstruction = elements.image(
      image['reconstruction'], 'reconstruction', 'over'
  )
  return (
      f'<figure><div class="wipe">{original}{reconstruction}'
      '<b style="left:.3rem">original</b>'
      '<b style="right:.3rem">reconstruction</b>'
      '<input type="range" min="0" max="100" value="50" aria-label="line'
      f' between original and reconstruction of {name}"></div><figcaption>'
      f'{elements.decimals(image["psnr"])} dB, {name}</figcaption>'
      '</figure>'
  )


def _cards(
    analysis: Mapping[str, Any], images: Sequence[Mapping[str, Any]]
) -> str:
  cards = []
  for image in images:
    original = elements.image(image['original'], 'original')
    reconstruction = elements.image(
        image['reconstruction'], 'reconstruction'
    )
    cards.append(
        f'<figure>{original}{reconstruction}<figcaption>'
        f'{elements.decimals(image["psnr"])} dB,'
        f' {name_of(analysis, image["index"])}</figcaption></figure>'
    )
  return f'<div class="cards">{"".join(cards)}</div>'
