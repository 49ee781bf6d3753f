"""The page of a generator's run."""

from collections.abc import Mapping
from typing import Any

from fsq_jax.report import curves
from fsq_jax.report import elements
from fsq_jax.report import sections

# Metric of samples -> label and note of its tile.
_SAMPLE_TILES = {
    'fid': ('FID', 'Inception-v3'),
    'fid_tf1': ('FID', 'Inception-v3, grid of TF 1'),
    'fd_vgg16': ('Frechet distance', 'VGG16'),
    'fd_pixel_pca': ('Frechet distance', 'PCA of pixels'),
    'inception_score': ('Inception score', 'Inception-v3'),
}
# Kind of model -> how its bits relate to the log-likelihood.
_LIKELIHOODS = {
    'masked': 'any-order bound', 'autoregressive': 'exact likelihood'
}


def render(run: sections.Run) -> str:
  """Returns the page of a generator's run."""
  values = sections.finite_values(run)
  step = elements.number('step', run.evaluation.get('step'))
  baselines = _baselines(run)
  table = {
      name: elements.number('bits_per_token', bits)
      for name, bits in (run.evaluation.get('baselines') or {}).items()
  }
  return sections.document(
      run,
      _summary(run, values, baselines),
      _tiles(run, values, baselines),
      [
          sections.slider(run.frames, 'Samples', _samples(run)),
          elements.section(
              'Training curves', curves.render(run.rows, baselines)
          ),
          _picture(
              run,
              'inpainting',
              'Inpainting',
              'Original, given part (unknown tokens are grey) and completions',
          ),
          _picture(
              run,
              'nearest',
              'Nearest training images',
              'Samples above the nearest training image, with the RMS'
              ' difference of pixels (0 to 255)',
          ),
          sections.metrics(
              run,
              run.evaluation.get('metrics') or {},
              f'All metrics at step {step}',
          ),
          sections.metrics(run, table, 'Baselines, bits per token'),
      ],
  )


def _baselines(run: sections.Run) -> dict[str, float]:
  """Returns the finite baselines, in bits per token, by readable name."""
  return {
      name.replace('class_position', 'class \N{MULTIPLICATION SIGN} position')
      .replace('_', ' '): bits
      for name, bits in (run.evaluation.get('baselines') or {}).items()
      if sections.is_finite(bits)
  }


def _kind(run: sections.Run) -> str:
  """Returns the kind of model: 'masked', 'autoregressive', '' if unknown."""
  return str((run.config.get('model') or {}).get('kind', ''))


def _summary(
    run: sections.Run,
    values: Mapping[str, Any],
    baselines: Mapping[str, float],
) -> str:
  """Returns a sentence on the model, its likelihood and the best baseline."""
  model = run.config.get('model') or {}
  kind = [
      'class-conditional' if model.get('class_conditional') else '',
      _kind(run),
      'generator',
  ]
  name = ' '.join(part for part in kind if part)
  name = f'{"An" if name[0] in "aeiou" else "A"} {name}'
  sizes = ('depth', 'width', 'num_heads', 'mlp_dim')  # Replace the preset's.
  if model.get('preset') and not any(model.get(x) for x in sizes):
    name += f' of size {model["preset"]}'
  if run.quantizer:
    quantizer = sections.describe_quantizer(
        run.quantizer, values, 'a quantizer'
    )
    name += f' on tokens of {quantizer}'
  if 'bits_per_token' not in values:
    return sections.describe_missing(run, name, 'bits per token')
  bits = elements.number('bits_per_token', values['bits_per_token'])
  text = f'{name} predicts held-out tokens at {bits} bits per token'
  if 'bits_per_image' in values:
    bits = elements.number('bits_per_image', values['bits_per_image'])
    text += f' ({bits} bits per image)'
  if 'step' in values:
    text += f' after {values["step"]:,} steps'
  if baselines:
    best = min(baselines, key=baselines.get)
    bits = elements.number('bits_per_token', baselines[best])
    text += f'; best baseline, {best}: {bits} bits'
  return text + '.'


def _tiles(
    run: sections.Run,
    values: Mapping[str, Any],
    baselines: Mapping[str, float],
) -> list[tuple[str, str, str]]:
  """Returns (label, value, note) of the available metrics."""
  tiles = []

  def add(name: str, label: str, note: str) -> None:
    if name in values:
      tiles.append((label, elements.number(name, values[name]), note))

  train = elements.number(
      'bits_per_token', values.get('train_bits_per_token')
  )
  add('bits_per_token', 'Bits per token', f'held-out; training {train}')
  num_tokens = (run.evaluation.get('protocol') or {}).get('num_tokens')
  notes = [
      f'{num_tokens:,} tokens' if sections.is_finite(num_tokens) else '',
      _LIKELIHOODS.get(_kind(run), ''),
  ]
  add('bits_per_image', 'Bits per image', ', '.join(filter(None, notes)))
  if baselines:
    best = min(baselines, key=baselines.get)
    bits = elements.number('bits_per_token', baselines[best])
    tiles.append(('Best baseline', bits, f'bits per token, {best}'))
  for name, (label, note) in _SAMPLE_TILES.items():
    add(name, label, note)
  if 'nearest_neighbour_accuracy' in values:
    share = f'{100 * values["nearest_neighbour_accuracy"]:.1f} %'
    note = 'samples whose nearest training image has their class'
    tiles.append(('1-NN accuracy', share, note))
  add('copies', 'Copies', 'samples that equal a training image')
  return tiles


def _samples(run: sections.Run) -> str:
  """Returns the caption of the contact sheets."""
  if (run.config.get('model') or {}).get('class_conditional'):
    return 'One row per class'
  return 'Random samples'


def _picture(run: sections.Run, name: str, title: str, caption: str) -> str:
  """Returns a section with a named picture of the newest step, if any."""
  if name not in run.pictures:
    return ''
  frame = run.pictures[name]
  image = sections.image(frame, title, ' class="sheet"')
  return elements.section(
      title,
      f'<p class="soft">{caption}, step {frame.step:,}.</p>'
      f'<div class="wide">{image}</div>',
  )
