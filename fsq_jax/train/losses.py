"""Losses on images that need no discriminator."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

ReconstructionLoss = Callable[[jax.Array, jax.Array], jax.Array]


def l1(reconstructions: jax.Array, images: jax.Array) -> jax.Array:
  """Mean absolute error of two arrays of the same shape; float32 scalar."""
  return jnp.mean(jnp.abs(_difference(reconstructions, images)))


def l2(reconstructions: jax.Array, images: jax.Array) -> jax.Array:
  """Mean squared error of two arrays of the same shape; float32 scalar."""
  return jnp.mean(jnp.square(_difference(reconstructions, images)))


_LOSSES = {'l1': l1, 'l2': l2}


def build_reconstruction_loss(name: str) -> ReconstructionLoss:
  """Returns the loss of that name; ValueError lists the known ones."""
  if name not in _LOSSES:
    raise ValueError(
        f'losses.reconstruction is {name!r}; known: {sorted(_LOSSES)}.'
    )
  return _LOSSES[name]


@dataclasses.dataclass(frozen=True)
class ImageLoss:
  """Weighted sum of the reconstruction loss and the perceptual loss.

  Attributes:
    reconstruction: of reconstructions and images to a scalar.
    reconstruction_weight: >= 0.
    perceptual: network of two batches of images to distances [B]; None without
      a perceptual loss.
    perceptual_weight: >= 0.
  """

  reconstruction: ReconstructionLoss
  reconstruction_weight: float
  perceptual: nn.Module | None
  perceptual_weight: float

  def __call__(
      self, reconstructions: jax.Array, images: jax.Array, variables: Any = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss.

    Args:
      reconstructions: [B, H, W, C] float32.
      images: the same shape.
      variables: of the perceptual network.

    Returns:
      The loss, and each part of it without its weight.
    """
    scalars = {
        'reconstruction_loss': self.reconstruction(reconstructions, images)
    }
    loss = self.reconstruction_weight * scalars['reconstruction_loss']
    if self.perceptual is not None:
      distances = self.perceptual.apply(variables, reconstructions, images)
      scalars['perceptual_loss'] = jnp.mean(distances)
      loss += self.perceptual_weight * scalars['perceptual_loss']
    return loss, scalars


def build_image_loss(
    config: Mapping[str, Any], perceptual: nn.Module | None
) -> ImageLoss:
  """Builds the losses on images of the `losses` section of a config.

  Args:
    config: the `losses` section.
    perceptual: the network of losses.perceptual; None if its name is 'none'.

  Raises:
    ValueError: perceptual does not match losses.perceptual.name.
  """
  options = config['perceptual']
  if (options['name'] == 'none') != (perceptual is None):
    raise ValueError(
        f"losses.perceptual.name is {options['name']!r}; pass the network of"
        " that name as perceptual, and None for 'none'."
    )
  return ImageLoss(
      reconstruction=build_reconstruction_loss(config['reconstruction']),
      reconstruction_weight=config['reconstruction_weight'],
      perceptual=perceptual,
      perceptual_weight=options['weight'],
  )


def _difference(reconstructions: jax.Array, images: jax.Array) -> jax.Array:
  if reconstructions.shape != images.shape:
    raise ValueError(
        f'reconstructions have shape {reconstructions.shape} and images'
        f' {images.shape}; both must have the same shape.'
    )
  return reconstructions.astype(jnp.float32) - images.astype(jnp.float32)
