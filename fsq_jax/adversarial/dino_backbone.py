"""Weights of the frozen DINO backbone of a discriminator."""

from collections.abc import Mapping
import dataclasses
import os
from typing import Any

from fsq_jax.adversarial import dino_discriminator
from fsq_jax.models.pretrained import loading as pretrained

# Fields of an architecture that a checkpoint's parameters do not determine.
_FREE = ('activation', 'norm_epsilon')


def load_discriminator_backbone(
    path: str | os.PathLike[str],
    discriminator: dino_discriminator.DinoDiscriminator,
) -> Mapping[str, Any]:
  """Loads the frozen parameters of a discriminator.

  Args:
    path: as in `models.load_encoder`: a Hugging Face directory of DINO,
      such as facebook/dino-vits8 with a model.safetensors.
    discriminator: must have the architecture of the checkpoint, except for the
      activation and LayerNorm's epsilon, which remain the discriminator's.
      (Hugging Face's epsilon of DINO is 1e-12; training used 1e-6.)

  Returns:
    Parameters for 'backbone', float32.

  Raises:
    ValueError: missing or corrupted files, or another architecture.
  """
  found = pretrained.build_encoder(path).architecture
  differences = [
      f'{field.name} is {getattr(found, field.name)!r} instead of {expected!r}'
      for field in dataclasses.fields(found)
      if field.name not in _FREE
      and getattr(found, field.name)
      != (expected := getattr(discriminator.architecture, field.name))
  ]
  if differences:
    raise ValueError(
        f'{path} does not fit the discriminator: {"; ".join(differences)}.'
    )
  encoder = pretrained.load_encoder(
      path, discriminator.image_size, final_affine=False
  )
  return encoder.variables['params']
