"""Builds discriminators and their training from a config."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
from jax import numpy as jnp
import optax

from fsq_jax.adversarial import adversary
from fsq_jax.adversarial import dino_discriminator
from fsq_jax.adversarial import discriminators
from fsq_jax.models.pretrained import architectures

_DISCRIMINATORS = {
    'dino': dino_discriminator.DinoDiscriminator,
    'patch': discriminators.PatchDiscriminator,
    'stylegan': discriminators.StyleGanDiscriminator,
}


def build_discriminator(config: Mapping[str, Any]) -> nn.Module:
  """Builds the discriminator of a config; reads no file.

  Args:
    config: the `discriminator` section; see configs/default.py.

  Returns:
    The unbound module, of images to [B, N] logits.

  Raises:
    ValueError: an unknown name or architecture.
  """
  name = config['name']
  if name not in _DISCRIMINATORS:
    raise ValueError(
        f'discriminator.name is {name!r}; known: {sorted(_DISCRIMINATORS)}.'
    )
  fields = {
      field: tuple(value) if isinstance(value, list | tuple) else value
      for field, value in config[name].items()
      if field != 'checkpoint'
  }
  if name == 'dino':
    try:
      architecture = architectures.parse_architecture(fields['architecture'])
    except ValueError as error:
      raise ValueError(f'discriminator.dino: {error}') from error
    fields['dtype'] = jnp.dtype(fields['dtype'])
    # As in the published discriminators.
    fields['architecture'] = dataclasses.replace(
        architecture, activation='gelu_tanh'
    )
  return _DISCRIMINATORS[name](**fields)


def build_adversary(
    config: Mapping[str, Any], optimizer: optax.GradientTransformation
) -> adversary.Adversary | None:
  """Builds discriminator training; None if discriminator.name is 'none'.

  Args:
    config: the whole config.
    optimizer: of the discriminator.
  """
  if config['discriminator']['name'] == 'none':
    return None
  module = build_discriminator(config['discriminator'])
  return adversary.Adversary(config, module, optimizer)
