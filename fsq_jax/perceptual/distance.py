"""Perceptual losses: distances of images in what frozen networks see.

Which published recipes they cover: 'lpips_vgg16' is the loss of RAE, LlamaGen
and SEED-Voken; 'convnext' that of TiTok and VQRAE; 'resnet50' the kind that
MaskGIT has, with torchvision's weights instead of its own; 'vit' compares
latents of any encoder of `models.load_encoder`.
"""

from collections.abc import Callable, Mapping
import functools
import os
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax import models
from fsq_jax.perceptual import classifiers
from fsq_jax.perceptual import frozen_network
from fsq_jax.perceptual import lpips

# Gradients need no more digits than those of the model that they train;
# numbers that are quoted do, and come from lpips.load_lpips.
_PRECISION = 'default'


class OutputDistance(nn.Module):
  """Mean squared difference of what a network makes of images.

  Attributes:
    network: maps [B, H, W, 3] images in [-1, 1] to [B, ...] floats.
  """

  network: nn.Module

  def __call__(self, images: jax.Array, others: jax.Array) -> jax.Array:
    """Compares images pair by pair.

    Args:
      images: [B, H, W, 3] floats in [-1, 1].
      others: the same.

    Returns:
      [B] float32 distances, 0 for equal images.

    Raises:
      ValueError: shapes that differ.
    """
    frozen_network.check_images(images, others)
    difference = self.network(images) - self.network(others)
    squares = jnp.square(difference.astype(jnp.float32))
    return jnp.mean(squares, axis=tuple(range(1, squares.ndim)))


def build_perceptual_loss(
    name: str,
    path: str | os.PathLike[str],
    *,
    dtype: jnp.dtype = jnp.float32,
) -> frozen_network.FrozenNetwork:
  """Loads the network of a perceptual loss.

  Args:
    name: 'lpips_vgg16', 'lpips_alexnet', 'convnext', 'resnet50' or 'vit'.
    path: of its weights: for 'vit' what `models.load_encoder` takes, for the
      others a safetensors file.
    dtype: of the network's activations; distances are float32.

  Returns:
    A module whose `__call__(images, others)` returns [B] distances, and its
    variables.

  Raises:
    ValueError: an unknown name, or weights that are missing, damaged, or of
      another network.
  """
  if name not in _LOSSES:
    raise ValueError(
        f'The perceptual loss is {name!r}; known: {sorted(_LOSSES)}.'
    )
  return _LOSSES[name](path, dtype=dtype)


def _load_lpips(path, network: str, dtype) -> frozen_network.FrozenNetwork:
  return lpips.load_lpips(path, network, precision=_PRECISION, dtype=dtype)


def _load_classifier(
    path, classifier: str, dtype
) -> frozen_network.FrozenNetwork:
  return _compare_outputs(
      *classifiers.load_classifier(
          path, classifier, precision=_PRECISION, dtype=dtype
      )
  )


def _load_vit(path, dtype) -> frozen_network.FrozenNetwork:
  # Without the last scale and bias every channel counts the same.
  module, variables = models.load_encoder(path, final_affine=False)
  return _compare_outputs(
      module.clone(dtype=dtype), variables, models.hash_weights(path)
  )


def _compare_outputs(
    network: nn.Module, variables: Mapping[str, Any], sha256: str
) -> frozen_network.FrozenNetwork:
  return frozen_network.FrozenNetwork(
      OutputDistance(network),
      {'params': {'network': variables['params']}},
      sha256,
  )


_LOSSES: dict[str, Callable[..., frozen_network.FrozenNetwork]] = {
    'lpips_vgg16': functools.partial(_load_lpips, network='vgg16'),
    'lpips_alexnet': functools.partial(_load_lpips, network='alexnet'),
    'convnext': functools.partial(
        _load_classifier, classifier='convnext_small'
    ),
    'resnet50': functools.partial(_load_classifier, classifier='resnet50'),
    'vit': _load_vit,
}
