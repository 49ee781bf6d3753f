"""Perceptual losses: distances between images in features of frozen networks.

RAE, LlamaGen and SEED-Voken use 'lpips_vgg16', TiTok and VQRAE 'convnext'.
'resnet50' is like MaskGIT's loss, with torchvision's weights. 'vit' compares
latents of any encoder of `models.load_encoder`.
"""

from collections.abc import Callable, Mapping
import functools
import os
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.models.pretrained import files as weight_files
from fsq_jax.models.pretrained import loading as pretrained
from fsq_jax.perceptual import classifiers
from fsq_jax.perceptual import frozen_network
from fsq_jax.perceptual import lpips

# Enough for gradients; reported LPIPS numbers have precision 'highest'.
_PRECISION = 'default'


class OutputDistance(nn.Module):
  """Mean squared difference of a network's outputs.

  Attributes:
    network: maps [B, H, W, 3] images in [-1, 1] to [B, ...] floats.
  """

  network: nn.Module

  def __call__(self, images: jax.Array, others: jax.Array) -> jax.Array:
    """Returns the distance of each pair of images.

    Args:
      images: [B, H, W, 3] floats in [-1, 1].
      others: like `images`.

    Returns:
      [B] float32 distances, 0 for equal images.

    Raises:
      ValueError: different shapes.
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
    path: of the weights: for 'vit' as in `models.load_encoder`, otherwise a
      safetensors file.
    dtype: of the network's activations; distances are float32.

  Returns:
    The network; its module maps images and others to [B] distances.

  Raises:
    ValueError: an unknown name, or weights that are missing, corrupted, or of
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
  # Without the last scale and bias all channels have the same weight.
  module, variables = pretrained.load_encoder(path, final_affine=False)
  return _compare_outputs(
      module.clone(dtype=dtype), variables, weight_files.hash_weights(path)
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
