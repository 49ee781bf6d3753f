"""Autoencoders and their parts, built from a config by name."""

from collections.abc import Mapping
import dataclasses
import itertools
from typing import Any

from flax import linen as nn
from jax import numpy as jnp

from fsq_jax import quantizers
from fsq_jax.models import autoencoder
from fsq_jax.models import mae_decoder
from fsq_jax.models import pretrained
from fsq_jax.models import projector_in as projectors_in
from fsq_jax.models import projector_out as projectors_out
from fsq_jax.models import vit
from fsq_jax.models import vit_families

Autoencoder = autoencoder.Autoencoder
AutoencoderOutput = autoencoder.AutoencoderOutput
ARCHITECTURES = vit_families.ARCHITECTURES
DECODER_PRESETS = mae_decoder.PRESETS
build_encoder = pretrained.build_encoder
load_decoder = pretrained.load_decoder
load_encoder = pretrained.load_encoder

_ENCODERS = {'vit': vit.VitEncoder}
_DECODERS = {'mae': mae_decoder.MaeDecoder, 'vit': vit.VitDecoder}
_PROJECTORS_IN = {
    'linear': projectors_in.LinearProjectorIn,
    'standardized': projectors_in.StandardizedProjectorIn,
    'mlp': projectors_in.MlpProjectorIn,
    'attention': projectors_in.AttentionProjectorIn,
    'none': projectors_in.NoProjectorIn,
}
_PROJECTORS_OUT = {
    'linear': projectors_out.LinearProjectorOut,
    'mlp': projectors_out.MlpProjectorOut,
    'fourier': projectors_out.FourierProjectorOut,
    'levels': projectors_out.LevelsProjectorOut,
    'none': projectors_out.NoProjectorOut,
}


def build_autoencoder(
    config: Mapping[str, Any], image_size: tuple[int, int]
) -> Autoencoder:
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
  encoder = _build_vit('encoder', _ENCODERS, config, image_size, compute)
  if _lookup('decoder', _DECODERS, config) is mae_decoder.MaeDecoder:
    decoder = mae_decoder.build_mae_decoder(
        config['decoder'], latent_grid=encoder.grid_size,
        image_size=image_size, compute=compute,
    )
  else:
    decoder = _build_vit('decoder', _DECODERS, config, image_size, compute)
  return Autoencoder(
      encoder=encoder,
      projector_in=_build_projector_in(config, encoder, quantizer, compute),
      quantizer=quantizer,
      projector_out=_build_projector_out(config, decoder, quantizer, compute),
      decoder=decoder,
      latent_noise=config['latent_noise'],
  )


def _build_projector_in(config, encoder, quantizer, compute) -> nn.Module:
  name = config['projector_in']['name']
  if name == 'none' and encoder.width != quantizer.code_dim:
    raise ValueError(
        f"model.projector_in.name is 'none' with {encoder.width} channels of"
        f' the encoder (model.encoder.width) and {quantizer.code_dim} of a code'
        " (model.quantizer); make them equal, or use 'linear'."
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
        " (model.decoder.width); make them equal, or use 'linear'."
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


def _build_vit(part, table, config, image_size, compute) -> nn.Module:
  fields = dict(config[part])
  cls = _lookup(part, table, config)
  del fields['name']
  fields.pop('mae', None)  # The section of the decoder of that name.
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
