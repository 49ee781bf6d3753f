"""Reconstruction losses; they refuse to broadcast."""

from collections.abc import Callable

import jax
from jax import numpy as jnp

ReconstructionLoss = Callable[[jax.Array, jax.Array], jax.Array]


def l1(reconstructions: jax.Array, images: jax.Array) -> jax.Array:
  """Mean absolute difference of two arrays of one shape; float32 scalar."""
  return jnp.mean(jnp.abs(_difference(reconstructions, images)))


def l2(reconstructions: jax.Array, images: jax.Array) -> jax.Array:
  """Mean squared difference of two arrays of one shape; float32 scalar."""
  return jnp.mean(jnp.square(_difference(reconstructions, images)))


_LOSSES = {'l1': l1, 'l2': l2}


def build_reconstruction_loss(name: str) -> ReconstructionLoss:
  """Returns the loss of that name; ValueError lists the known ones."""
  if name not in _LOSSES:
    raise ValueError(
        f'losses.reconstruction is {name!r}; known: {sorted(_LOSSES)}.'
    )
  return _LOSSES[name]


def _difference(reconstructions: jax.Array, images: jax.Array) -> jax.Array:
  if reconstructions.shape != images.shape:
    raise ValueError(
        f'reconstructions have shape {reconstructions.shape} and images'
        f' {images.shape}; a loss compares arrays of one shape.'
    )
  return reconstructions.astype(jnp.float32) - images.astype(jnp.float32)
