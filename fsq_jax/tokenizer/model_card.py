"""Model cards of saved tokenizers."""

from collections.abc import Mapping
import math
import pathlib
from typing import Any

import ml_collections

# Heading and format of each metric.
_METRICS = {
    'psnr': ('PSNR, dB', '.2f'),
    'ssim': ('SSIM', '.3f'),
}
_CODEBOOK = {
    'usage': ('codebook usage', '.1%'),
    'perplexity': ('perplexity', ',.1f'),
    'entropy_bits': ('bits per token', '.2f'),
}
_FRONT = """\
---
library_name: fsq_jax
tags:
- image-tokenizer
- finite-scalar-quantization
- jax
---
"""
_ENCODING = """\
tokens = tokenizer.encode(images)  # [B, H, W, {channels}] uint8 -> {tokens}
images = tokenizer.decode(tokens)"""
_DECODING = """\
# {tokens} -> [B, {height}, {width}, {channels}] uint8
images = tokenizer.decode(tokens)"""


def write(
    config: ml_collections.ConfigDict, metadata: Mapping[str, Any]
) -> str:
  """Writes a model card in Markdown, with the front matter of Hugging Face.

  Args:
    config: of the run.
    metadata: of the model: 'spec' and 'codebook_size' of the quantizer,
      'tokens_shape' (h, w, *index_shape) of an image, 'step', 'evaluation'
      (content of evaluation.json, or None), 'model_hash', 'num_parameters' and
      'decoder_only'.
  """
  height, width = config.data.image_size
  channels = config.data.channels
  spec, grid = metadata['spec'], metadata['tokens_shape'][:2]
  shape = f'[B, {", ".join(map(str, metadata["tokens_shape"]))}] int32'
  num = math.prod(metadata['tokens_shape'])
  bits = num * math.log2(metadata['codebook_size'])
  usage = _DECODING if metadata['decoder_only'] else _ENCODING
  lines = [
      f'# {spec["name"]} tokenizer, {height} x {width} pixels to'
      f' {grid[0]} x {grid[1]} tokens',
      '',
      f'{num} tokens per image with {metadata["codebook_size"]:,} codes:'
      f' {bits:,.0f} bits for {height * width * channels * 8:,} bits of pixels;'
      f' {metadata["num_parameters"]:,} parameters'
      + (' (decoder only).' if metadata['decoder_only'] else '.'),
      '',
      '```python',
      'from fsq_jax.tokenizer import Tokenizer',
      '',
      "tokenizer = Tokenizer.from_pretrained('FOLDER')",
      usage.format(
          tokens=shape, height=height, width=width, channels=channels
      ),
      '```',
      '',
      '## Token convention',
      '',
      'Token ids are not interchangeable between conventions; `decode` rejects'
      ' tokens of another convention if it is given their `spec`.',
      '',
      '| | |',
      '|---|---|',
      *(f'| {name} | {_show(value)} |' for name, value in spec.items()),
      '',
      '## Evaluation',
      '',
      *_evaluation(metadata['evaluation']),
      '',
      '## Training',
      '',
      *_training(config, metadata),
      '',
      '## Limits',
      '',
      'Reconstructions are best for images similar to the training images;'
      ' text, faces and fine texture degrade first. PSNR and SSIM compare'
      ' pixels and say little about sharpness; codebook usage is limited by the'
      ' variety of the evaluated images.',
  ]
  return _FRONT + '\n'.join(lines) + '\n'


def _evaluation(evaluation: Mapping[str, Any] | None) -> list[str]:
  if evaluation is None:
    return ['These weights have not been evaluated.']
  protocol = evaluation['protocol']
  networks = protocol.get('networks', {})
  values = [
      (*_METRICS[name], value)
      if name in _METRICS
      else (name, '.4g', value)
      for name, value in evaluation['metrics'].items()
      if value is not None
      and (name in _METRICS or name in networks)
  ]
  values += [
      (*_CODEBOOK[name], evaluation['codebook'][name])
      for name in _CODEBOOK
      if evaluation['codebook'].get(name) is not None
  ]
  return [
      f'{protocol["num_images"]:,} images of {protocol["source"]}'
      f' ({protocol["split"]}), {protocol["crop"]}; resized:'
      f' {protocol["resize"]}, {protocol["kernel"]};'
      f' {protocol["rounding"]}.',
      '',
      '| ' + ' | '.join(heading for heading, _, _ in values) + ' |',
      '|---' * len(values) + '|',
      '| ' + ' | '.join(f'{x:{form}}' for _, form, x in values) + ' |',
  ]


def _training(
    config: ml_collections.ConfigDict, metadata: Mapping[str, Any]
) -> list[str]:
  step = metadata['step']
  source = f'{config.data.source} {config.data.name}'.strip()
  losses = f'reconstruction {config.losses.reconstruction}'
  if config.losses.perceptual.name != 'none':
    losses += f', perceptual {config.losses.perceptual.name}'
  if config.discriminator.name != 'none':
    losses += f', discriminator {config.discriminator.name}'
  steps = 'An unknown number of' if step is None else f'{step:,}'
  training = (
      f'{steps} steps with {config.data.batch_size} images of {source}'
      f' ({config.data.train_split}); losses: {losses}'
  )
  if step == 0:
    training = f'Weights of {pathlib.PurePath(config.train.init_from).name}'
  return [
      f'{training}; encoder {config.model.encoder.name}, decoder'
      f' {config.model.decoder.name}. The full config is in config.json.',
      '',
      f'Model hash: `{metadata["model_hash"]}`',
  ]


def _show(value: Any) -> str:
  if isinstance(value, list | tuple):
    return ', '.join(map(str, value))
  return str(value)
