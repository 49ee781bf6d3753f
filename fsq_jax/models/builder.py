"""Builds autoencoders and their parts from the `model` section of a config."""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any

from flax import linen as nn
from jax import numpy as jnp

from fsq_jax.models import autoencoder
from fsq_jax.models import conv
from fsq_jax.models import normalization
from fsq_jax.models import projectors
from fsq_jax.models import vit
from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import encoder as pretrained_vit
from fsq_jax.models.pretrained import mae_decoder
from fsq_jax.quantizers import base
from fsq_jax.quantizers import builder as quantizer_builder
from fsq_jax.quantizers import digits

ENCODERS = ('conv', 'pretrained', 'vit')
DECODERS = ('conv', 'mae', 'vit')
PROJECTORS_IN = ('linear', 'standardized', 'mlp', 'attention', 'none')
PROJECTORS_OUT = ('linear', 'mlp', 'fourier', 'levels', 'none')


def build_autoencoder(
    config: Mapping[str, Any], image_size: tuple[int, int], channels: int = 3
) -> autoencoder.Autoencoder:
  """Builds the autoencoder that the `model` section of a config describes.

  Args:
    config: the `model` section, see configs/default.py, whose fields have
      allowed values; this function checks that they fit each other. The
      architecture of a pretrained encoder is not 'checkpoint', which
      `configuration.resolve` replaces.
    image_size: (height, width) in pixels, which sets the grid of learned
      positions.
    channels: of the images: 1 (grey), 3 (RGB) or 4 (RGBA).

  Returns:
    The unbound module.

  Raises:
    ValueError: an unknown name, an image side that the patch does not divide,
      or parts that do not fit each other or the channels.
  """
  name = config['quantizer']['name']
  quantizer = quantizer_builder.build_quantizer(
      {'name': name, **config['quantizer'].get(name, {})}
  )
  compute = {
      'dtype': jnp.dtype(config['dtype']),
      'remat': config['remat'],
      'scan_unroll': config['scan_unroll'],
  }
  image_size = tuple(image_size)
  _check_channels(config, channels)
  encoder = _build_encoder(config, image_size, compute, quantizer.code_dim)
  decoder = _build_decoder(
      config, image_size, compute, quantizer.code_dim, encoder.grid_size,
      channels,
  )
  return autoencoder.Autoencoder(
      encoder=encoder,
      projector_in=build_projector_in(
          config['projector_in'], encoder.width, quantizer, compute
      ),
      quantizer=quantizer,
      projector_out=build_projector_out(
          config['projector_out'], decoder.input_width, quantizer, compute
      ),
      decoder=decoder,
      latent_noise=config['latent_noise'],
      statistics=_build_statistics(config, encoder, decoder),
  )


def check_image_sizes(
    config: Mapping[str, Any],
    image_sizes: Sequence[tuple[int, int]],
    channels: int = 3,
) -> None:
  """Checks that one set of parameters takes images of several sizes.

  Args:
    config: as for `build_autoencoder`.
    image_sizes: (height, width) of each size in pixels; () checks nothing.
    channels: of the images.

  Raises:
    ValueError: a part that fixes the size, or a size that the strides of the
      parts do not divide.
  """
  if not image_sizes:
    return
  for part in ('encoder', 'decoder'):
    name, position = config[part]['name'], config[part]['position']
    if name != 'conv' and (name, position) != ('vit', 'sincos'):
      given = f"'vit' with position {position!r}" if name == 'vit' else name
      raise ValueError(
          f'model.{part} is {given}, which takes one image size; use'
          f" 'conv', or 'vit' with model.{part}.position 'sincos'."
      )
  if config['latent_statistics']:
    raise ValueError(
        'model.latent_statistics has a value for each position of one image'
        " size; set it to ''."
    )
  for size in image_sizes:
    build_autoencoder(config, size, channels)


def _build_encoder(config, image_size, compute, code_dim) -> nn.Module:
  match _name('encoder', config['encoder'], ENCODERS):
    case 'conv':
      return conv.ConvEncoder(
          **_conv_options('encoder', config, image_size, compute, code_dim)
      )
    case 'pretrained':
      return _build_pretrained(config['encoder'], image_size, compute)
    case _:
      options = _vit_options('encoder', config, image_size)
      return vit.VitEncoder(**options, **compute)


def _build_decoder(
    config, image_size, compute, code_dim, latent_grid, channels
) -> nn.Module:
  name = _name('decoder', config['decoder'], DECODERS)
  if name == 'mae':
    return mae_decoder.build_mae_decoder(
        config['decoder'], latent_grid=latent_grid, image_size=image_size,
        compute=compute,
    )
  if name == 'conv':
    decoder = conv.ConvDecoder(
        **_conv_options('decoder', config, image_size, compute, code_dim),
        channels=channels,
    )
    stride, field = decoder.stride, 'conv.channel_multipliers'
  else:
    options = _vit_options('decoder', config, image_size)
    decoder = vit.VitDecoder(**options, **compute, channels=channels)
    stride, field = decoder.patch_size, 'patch_size'
  if decoder.grid_size != latent_grid:
    raise ValueError(
        f'model.encoder makes {latent_grid} latents and model.decoder {name!r}'
        f' takes {decoder.grid_size}, one for {stride} x {stride} pixels of'
        f' data.image_size {image_size}. Change model.decoder.{field} or the'
        " encoder's, or use the decoder 'mae', which resizes."
    )
  return decoder


def _check_channels(config, channels) -> None:
  for part, name in (('encoder', 'pretrained'), ('decoder', 'mae')):
    if channels != 3 and config[part]['name'] == name:
      raise ValueError(
          f'model.{part}.name is {name!r} with data.channels {channels}, and'
          " its images are RGB; use channels 3, or 'vit' or 'conv'."
      )


def _build_pretrained(options, image_size, compute) -> nn.Module:
  """Builds a pretrained encoder; reads no file."""
  try:
    architecture = architectures.parse_architecture(options['architecture'])
  except ValueError as error:
    raise ValueError(f'model.encoder: {error}') from error
  size = tuple(options['image_size']) or image_size
  if min(size) < architecture.patch_size:
    raise ValueError(
        f'model.encoder.image_size is {size} (() takes data.image_size),'
        f' less than one patch, which has {architecture.patch_size} pixels.'
    )
  return pretrained_vit.PretrainedVit(
      architecture=architecture,
      image_size=size,
      final_affine=options['final_affine'],
      resize=options['resize'],
      **compute,
  )


def _vit_options(part, config, image_size) -> dict[str, Any]:
  """Returns the arguments of a ViT encoder or decoder, apart from `compute`."""
  options = config[part]
  patch, width = options['patch_size'], options['width']
  if any(side % patch for side in image_size):
    raise ValueError(
        f'image_size is {image_size}, which model.{part}.patch_size'
        f' {patch} does not divide; use multiples of {patch}.'
    )
  _check_heads(f'model.{part}', options)
  if options['position'] == 'sincos' and width % 4:
    raise ValueError(
        f"model.{part}.position is 'sincos' with model.{part}.width {width};"
        ' use a multiple of 4.'
    )
  fields = ('patch_size', 'width', 'depth', 'num_heads', 'mlp_dim', 'position')
  return {
      **{field: options[field] for field in fields},
      'grid_size': tuple(side // patch for side in image_size),
  }


def _conv_options(
    part, config, image_size, compute, code_dim
) -> dict[str, Any]:
  """Returns the arguments of a convolutional encoder or decoder."""
  options = config[part]['conv']
  multipliers = tuple(options['channel_multipliers'])
  stride = conv.stride_of(multipliers)
  if any(side % stride for side in image_size):
    raise ValueError(
        f'image_size is {image_size}, which does not halve'
        f' {len(multipliers) - 1} times, as the {len(multipliers)} levels of'
        f' model.{part}.conv.channel_multipliers do; use multiples of {stride}.'
    )
  channels = [options['filters'] * multiplier for multiplier in multipliers]
  if any(number % conv.NUM_GROUPS for number in channels):
    raise ValueError(
        f'model.{part}.conv has levels of {channels} channels (filters times'
        ' channel_multipliers), which GroupNorm does not divide into'
        f' {conv.NUM_GROUPS} groups; use multiples of {conv.NUM_GROUPS}.'
    )
  projector = {'encoder': 'projector_in', 'decoder': 'projector_out'}[part]
  if not options['latent_width'] and config[projector]['name'] != 'none':
    raise ValueError(
        f'model.{part}.conv.latent_width is 0 with model.{projector}.name'
        f' {config[projector]["name"]!r}; use a latent_width >= 1, unless'
        f" {projector} is 'none'."
    )
  return {
      'filters': options['filters'],
      'channel_multipliers': multipliers,
      'num_res_blocks': options['num_res_blocks'],
      'latent_width': options['latent_width'] or code_dim,
      'grid_size': tuple(side // stride for side in image_size),
      # There is no loop over blocks to unroll.
      'dtype': compute['dtype'],
      'remat': compute['remat'],
      'pixel_range': tuple(options['pixel_range']),
  }


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


def build_projector_in(
    config: Mapping[str, Any],
    latent_width: int,
    quantizer: base.Quantizer,
    compute: Mapping[str, Any],
) -> nn.Module:
  """Builds the projector of latents to codes.

  Args:
    config: the section `model.projector_in`.
    latent_width: channels of the encoder's latents.
    quantizer: the quantizer of its outputs.
    compute: dtype, remat and scan_unroll.
  """
  name = _name('projector_in', config, PROJECTORS_IN)
  options, code_dim = config.get(name, {}), quantizer.code_dim
  match name:
    case 'linear':
      return projectors.LinearProjectorIn(code_dim)
    case 'standardized':
      return projectors.StandardizedProjectorIn(code_dim)
    case 'mlp':
      return projectors.MlpProjectorIn(
          code_dim, options['width'], options['bound'], compute['dtype']
      )
    case 'attention':
      _check_heads('model.projector_in.attention', options)
      return projectors.AttentionProjectorIn(
          code_dim=code_dim,
          width=options['width'],
          depth=options['depth'],
          num_heads=options['num_heads'],
          mlp_dim=options['mlp_dim'],
          bound=options['bound'],
          **compute,
      )
  if latent_width != code_dim:
    raise ValueError(
        f"model.projector_in.name is 'none' with {latent_width} channels of"
        f' the encoder (model.encoder.width) and {code_dim} of a code'
        " (model.quantizer); make them equal, with 'conv' by latent_width=0, or"
        " use 'linear'."
    )
  return projectors.NoProjectorIn(code_dim)


def build_projector_out(
    config: Mapping[str, Any],
    width: int,
    quantizer: base.Quantizer,
    compute: Mapping[str, Any],
) -> nn.Module:
  """Builds the projector of codes to the decoder's latents.

  Args:
    config: the section `model.projector_out`.
    width: channels of the decoder's latents.
    quantizer: the quantizer of the codes.
    compute: has the dtype.
  """
  dtype = compute['dtype']
  name = _name('projector_out', config, PROJECTORS_OUT)
  match name:
    case 'linear':
      return projectors.LinearProjectorOut(width, dtype)
    case 'mlp':
      return projectors.MlpProjectorOut(width, code_scales(quantizer), dtype)
    case 'fourier':
      return projectors.FourierProjectorOut(
          width,
          num_frequencies=config[name]['num_frequencies'],
          sigma=config[name]['sigma'],
          code_steps=quantizer.code_steps,
          dtype=dtype,
      )
    case 'levels':
      # A clone: one module cannot be part of two.
      return projectors.LevelsProjectorOut(width, quantizer.clone(), dtype)
  if width != quantizer.code_dim:
    raise ValueError(
        f"model.projector_out.name is 'none' with {quantizer.code_dim} channels"
        f' of a code (model.quantizer) and {width} of the decoder'
        " (model.decoder.width); make them equal, with 'conv' by"
        " latent_width=0, or use 'linear'."
    )
  return projectors.NoProjectorOut(width, dtype)


def code_scales(quantizer: base.Quantizer) -> tuple[float, ...]:
  """Returns half the range of codes in each channel, 1 without a grid."""
  steps = quantizer.code_steps
  if not isinstance(quantizer, digits.DigitQuantizer):
    return steps
  levels = itertools.cycle(quantizer.levels)
  return tuple(
      step * (level - 1) / 2
      for step, level in zip(steps, levels, strict=False)
  )


def _check_heads(section: str, options: Mapping[str, Any]) -> None:
  if options['width'] % options['num_heads']:
    raise ValueError(
        f'{section}.width {options["width"]} is no multiple of num_heads'
        f' {options["num_heads"]}; use a width that is a multiple of num_heads.'
    )


def _name(part: str, config: Mapping[str, Any], known: tuple[str, ...]) -> str:
  if config['name'] not in known:
    raise ValueError(
        f'model.{part}.name is {config["name"]!r}; known: {sorted(known)}.'
    )
  return config['name']
