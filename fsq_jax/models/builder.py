"""Builds autoencoders and their parts from the `model` section of a config."""

from collections.abc import Mapping
import dataclasses
import itertools
from typing import Any

from flax import linen as nn
from jax import numpy as jnp

from fsq_jax import quantizers
from fsq_jax.models import autoencoder
from fsq_jax.models import conv
from fsq_jax.models import normalization
from fsq_jax.models import projectors
from fsq_jax.models import resampling
from fsq_jax.models import vit
from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import encoder as pretrained_vit
from fsq_jax.models.pretrained import loading as pretrained
from fsq_jax.models.pretrained import mae_decoder

_ENCODERS = {
    'conv': conv.ConvEncoder,
    'pretrained': pretrained_vit.PretrainedVit,
    'vit': vit.VitEncoder,
}
_DECODERS = {
    'conv': conv.ConvDecoder,
    'mae': mae_decoder.MaeDecoder,
    'vit': vit.VitDecoder,
}
_PROJECTORS_IN = {
    'linear': projectors.LinearProjectorIn,
    'standardized': projectors.StandardizedProjectorIn,
    'mlp': projectors.MlpProjectorIn,
    'attention': projectors.AttentionProjectorIn,
    'none': projectors.NoProjectorIn,
}
_PROJECTORS_OUT = {
    'linear': projectors.LinearProjectorOut,
    'mlp': projectors.MlpProjectorOut,
    'fourier': projectors.FourierProjectorOut,
    'levels': projectors.LevelsProjectorOut,
    'none': projectors.NoProjectorOut,
}


def build_autoencoder(
    config: Mapping[str, Any], image_size: tuple[int, int]
) -> autoencoder.Autoencoder:
  """Builds the autoencoder that the `model` section of a config describes.

  Args:
    config: the `model` section; see configs/default.py.
    image_size: (height, width) in pixels, the grid of learned positions.

  Returns:
    The unbound module.

  Raises:
    ValueError: an unknown name, an image side that the patch does not divide,
      or parts that do not fit each other.
  """
  quantizer = quantizers.build_quantizer({
      'name': config['quantizer']['name'],
      **config['quantizer'].get(config['quantizer']['name'], {}),
  })
  dtype = jnp.dtype(config['dtype'])
  compute = {
      'dtype': dtype,
      'remat': config['remat'],
      'scan_unroll': config['scan_unroll'],
  }
  code_dim = quantizer.code_dim
  encoder = _build_encoder(config, image_size, compute, code_dim)
  decoder = _build_decoder(config, image_size, compute, code_dim, encoder)
  return autoencoder.Autoencoder(
      encoder=encoder,
      projector_in=_build_projector_in(config, encoder, quantizer, compute),
      quantizer=quantizer,
      projector_out=_build_projector_out(config, decoder, quantizer, compute),
      decoder=decoder,
      latent_noise=config['latent_noise'],
      statistics=_build_statistics(config, encoder, decoder),
  )


def _build_encoder(config, image_size, compute, code_dim) -> nn.Module:
  cls = _lookup('encoder', _ENCODERS, config)
  if cls is pretrained_vit.PretrainedVit:
    return _build_pretrained(config['encoder'], image_size, compute)
  if cls is conv.ConvEncoder:
    return _build_conv('encoder', cls, config, image_size, compute, code_dim)
  return _build_vit('encoder', cls, config, image_size, compute)


def _build_decoder(
    config, image_size, compute, code_dim, encoder
) -> nn.Module:
  """Builds a decoder of the encoder's grid."""
  cls = _lookup('decoder', _DECODERS, config)
  if cls is mae_decoder.MaeDecoder:
    return mae_decoder.build_mae_decoder(
        config['decoder'], latent_grid=encoder.grid_size,
        image_size=image_size, compute=compute,
    )
  if cls is conv.ConvDecoder:
    decoder = _build_conv('decoder', cls, config, image_size, compute, code_dim)
    name, stride, field = 'conv', decoder.stride, 'conv.channel_multipliers'
  else:
    decoder = _build_vit('decoder', cls, config, image_size, compute)
    name, stride, field = 'vit', decoder.patch_size, 'patch_size'
  if decoder.grid_size != encoder.grid_size:
    raise ValueError(
        f'model.encoder makes {encoder.grid_size} latents and model.decoder'
        f' {name!r} takes {decoder.grid_size}, one for {stride} x {stride}'
        f' pixels of data.image_size {tuple(image_size)}. Change'
        f" model.decoder.{field} or the encoder's, or use the decoder 'mae',"
        ' which resizes.'
    )
  return decoder


def _build_pretrained(options, image_size, compute) -> nn.Module:
  """Builds a pretrained encoder; no file is read unless it has to be."""
  if options['architecture'] == 'checkpoint':
    if not options['checkpoint']:
      raise ValueError(
          "model.encoder.architecture is 'checkpoint' without a"
          ' model.encoder.checkpoint; name one, or an architecture.'
      )
    try:
      module = pretrained.build_encoder(options['checkpoint'])
      architecture = module.architecture
    except ValueError as error:
      raise ValueError(
          f'model.encoder.checkpoint: {error} A run that has started needs no'
          ' checkpoint, with the model.encoder.architecture of its config.json.'
      ) from error
  else:
    try:
      architecture = architectures.parse_architecture(options['architecture'])
    except ValueError as error:
      raise ValueError(f'model.encoder: {error}') from error
  size = tuple(options['image_size']) or tuple(image_size)
  if min(size) < architecture.patch_size:
    raise ValueError(
        f'model.encoder.image_size is {size} (() takes data.image_size),'
        f' less than one patch, which has {architecture.patch_size} pixels.'
    )
  if options['resize'] not in resampling.KERNELS:
    raise ValueError(
        f'model.encoder.resize is {options["resize"]!r}; known:'
        f' {sorted(resampling.KERNELS)}.'
    )
  return pretrained_vit.PretrainedVit(
      architecture=architecture,
      image_size=size,
      final_affine=options['final_affine'],
      resize=options['resize'],
      **compute,
  )


def _build_statistics(
    config, encoder, decoder
) -> normalization.LatentStatistics | None:
  if not config['latent_statistics']:
    return None
  if decoder.input_width != encoder.width:
    raise ValueError(
        'model.latent_statistics normalizes the encoder\'s latents, of'
        f' {encoder.width} channels, and the decoder\'s back, of'
        f' {decoder.input_width}; make them equal (model.decoder.width, with'
        " 'mae' model.decoder.mae.input_width)."
    )
  return normalization.LatentStatistics(
      grid_size=encoder.grid_size, width=encoder.width
  )


def _build_projector_in(config, encoder, quantizer, compute) -> nn.Module:
  name = config['projector_in']['name']
  if name == 'none' and encoder.width != quantizer.code_dim:
    raise ValueError(
        f"model.projector_in.name is 'none' with {encoder.width} channels of"
        f' the encoder (model.encoder.width) and {quantizer.code_dim} of a code'
        " (model.quantizer); make them equal, with 'conv' by latent_width=0, or"
        " use 'linear'."
    )
  return _build_projector(
      'projector_in',
      _PROJECTORS_IN,
      config,
      {'code_dim': quantizer.code_dim, **compute},
  )


def _build_projector_out(config, decoder, quantizer, compute) -> nn.Module:
  name = config['projector_out']['name']
  if name == 'none' and decoder.input_width != quantizer.code_dim:
    raise ValueError(
        f"model.projector_out.name is 'none' with {quantizer.code_dim} channels"
        f' of a code (model.quantizer) and {decoder.input_width} of the decoder'
        " (model.decoder.width); make them equal, with 'conv' by"
        " latent_width=0, or use 'linear'."
    )
  return _build_projector(
      'projector_out',
      _PROJECTORS_OUT,
      config,
      {
          'width': decoder.input_width,
          'code_steps': quantizer.code_steps,
          'code_scales': _code_scales(quantizer),
          # Of its own: one module cannot be part of two.
          'quantizer': quantizer.clone(),
          **compute,
      },
  )


def _build_projector(part, table, config, known) -> nn.Module:
  """Builds a projector from its section and from what it asks of the model."""
  cls = _lookup(part, table, config)
  fields = {field.name for field in dataclasses.fields(cls)}
  options = config[part].get(config[part]['name'], {})
  return cls(
      **{name: known[name] for name in known if name in fields}, **options
  )


def _code_scales(quantizer: quantizers.Quantizer) -> tuple[float, ...]:
  """Returns half the range of codes in each channel, 1 without a grid."""
  steps = quantizer.code_steps
  if not isinstance(quantizer, quantizers.DigitQuantizer):
    return steps
  levels = itertools.cycle(quantizer.levels)
  return tuple(
      step * (level - 1) / 2
      for step, level in zip(steps, levels, strict=False)
  )


def _build_conv(
    part, cls, config, image_size, compute, code_dim
) -> conv.ConvEncoder | conv.ConvDecoder:
  """Builds a convolutional part; there is no loop for scan_unroll to unroll."""
  options = config[part]['conv']
  multipliers = tuple(options['channel_multipliers'])
  stride = conv.stride_of(multipliers)
  if any(side % stride for side in image_size):
    raise ValueError(
        f'data.image_size is {tuple(image_size)}, which does not halve'
        f' {len(multipliers) - 1} times, as the {len(multipliers)} levels of'
        f' model.{part}.conv.channel_multipliers do; use multiples of {stride}.'
    )
  channels = [options['filters'] * multiplier for multiplier in multipliers]
  if any(number % conv.NUM_GROUPS for number in channels):
    raise ValueError(
        f'model.{part}.conv has levels of {channels} channels (filters times'
        ' channel_multipliers), which GroupNorm does not divide into'
        f' {conv.NUM_GROUPS}; use multiples of {conv.NUM_GROUPS}.'
    )
  return cls(
      filters=options['filters'],
      channel_multipliers=multipliers,
      num_res_blocks=options['num_res_blocks'],
      latent_width=options['latent_width'] or code_dim,
      grid_size=tuple(side // stride for side in image_size),
      dtype=compute['dtype'],
      remat=compute['remat'],
  )


def _build_vit(part, cls, config, image_size, compute) -> nn.Module:
  fields = dict(config[part])
  names = {field.name for field in dataclasses.fields(cls)} - {'name'}
  fields = {name: fields[name] for name in fields if name in names}
  patch = fields['patch_size']
  if any(side % patch for side in image_size):
    raise ValueError(
        f'data.image_size is {tuple(image_size)}, which model.{part}.patch_size'
        f' {patch} does not divide; use multiples of {patch}.'
    )
  if fields['width'] % fields['num_heads']:
    raise ValueError(
        f'model.{part}.width {fields["width"]} is no multiple of num_heads'
        f' {fields["num_heads"]}.'
    )
  if fields['position'] not in vit.POSITIONS:
    raise ValueError(
        f'model.{part}.position is {fields["position"]!r}; known:'
        f' {sorted(vit.POSITIONS)}.'
    )
  grid_size = tuple(side // patch for side in image_size)
  return cls(grid_size=grid_size, **fields, **compute)


def _lookup(part: str, table: Mapping[str, type], config) -> type:
  name = config[part]['name']
  if name not in table:
    raise ValueError(f'model.{part}.name is {name!r}; known: {sorted(table)}.')
  return table[name]
