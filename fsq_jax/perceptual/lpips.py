"""LPIPS v0.1: distances of images in the activations of VGG16 or AlexNet.

Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric (arxiv.org/abs/1801.03924). Numbers are those of the package lpips
(github.com/richzhang/PerceptualSimilarity), version='0.1'.
"""

import os
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.models.pretrained import parameters
from fsq_jax.perceptual import frozen_network

# LPIPS's own mean and deviation of pixels in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class _Stage(NamedTuple):
  """Convolutions with ReLU, the last of which is compared.

  Attributes:
    channels: of each convolution.
    kernel: its side.
    stride: between windows.
    pool: side of the maximum before them, of stride 2; 0 for none.
  """

  channels: tuple[int, ...]
  kernel: int = 3
  stride: int = 1
  pool: int = 0


class _Network(NamedTuple):
  """The stages of a network and the smallest side that leaves a pixel."""

  stages: tuple[_Stage, ...]
  min_side: int


NETWORKS = {
    'vgg16': _Network(
        stages=(
            _Stage((64, 64)),
            _Stage((128, 128), pool=2),
            _Stage((256, 256, 256), pool=2),
            _Stage((512, 512, 512), pool=2),
            _Stage((512, 512, 512), pool=2),
        ),
        min_side=16,
    ),
    'alexnet': _Network(
        stages=(
            _Stage((64,), kernel=11, stride=4),
            _Stage((192,), kernel=5, pool=3),
            _Stage((384,), pool=3),
            _Stage((256,)),
            _Stage((256,)),
        ),
        min_side=31,
    ),
}


class Backbone(nn.Module):
  """The convolutions of a network, up to the last activation compared.

  Attributes:
    network: a key of `NETWORKS`.
    precision: of the products, as in `jax.lax.Precision`.
    dtype: of the convolutions.
  """

  network: str
  precision: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """Maps normalised [B, H, W, 3] images to one [B, h, w, C] per stage."""
    taps = []
    for i, stage in enumerate(NETWORKS[self.network].stages, start=1):
      if stage.pool:
        x = nn.max_pool(x, (stage.pool,) * 2, strides=(2, 2))
      # torchvision pads AlexNet's first convolution by 2 and not by half.
      padding = 2 if stage.kernel == 11 else stage.kernel // 2
      for j, channels in enumerate(stage.channels, start=1):
        x = nn.relu(
            nn.Conv(
                channels, (stage.kernel,) * 2, strides=stage.stride,
                padding=padding, precision=self.precision, dtype=self.dtype,
                name=f'conv{i}_{j}',
            )(x)
        )
      taps.append(x)

    return tuple(taps)


class Lpips(nn.Module):
  """Perceptual distances and features, with weights from `load_lpips`.

  Attributes:
    network: a key of `NETWORKS`.
    precision: of the products, as in `jax.lax.Precision`: 'highest' for
      numbers that are quoted; 'default' is faster where float32 is not native.
    dtype: of the convolutions; what they make is compared in float32.
  """

  network: str
  precision: str = 'highest'
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    stages = NETWORKS[self.network].stages
    self.backbone = Backbone(self.network, self.precision, self.dtype)
    self.heads = [
        self.param(
            f'head{i}', nn.initializers.ones, stage.channels[-1:], jnp.float32
        )
        for i, stage in enumerate(stages, start=1)
    ]

  @property
  def min_side(self) -> int:
    """Least pixels a side of images."""
    return NETWORKS[self.network].min_side

  def __call__(self, images: jax.Array, others: jax.Array) -> jax.Array:
    """Compares images pair by pair; the order of the two does not matter.

    Args:
      images: [B, H, W, 3] floats in [-1, 1]. In [0, 1] photographs would seem
        14 to 43 % more alike (JPEG, VGG16), and nothing would tell.
      others: the same.

    Returns:
      [B] float32 distances, 0 for equal images.

    Raises:
      ValueError: shapes that differ, or a side too small for the network.
    """
    frozen_network.check_images(images, others)
    # One after the other: where only one side is differentiated, the other's
    # activations need not be kept.
    pairs = zip(self.features(images), self.features(others), strict=True)
    distances = [
        jnp.einsum(
            'bhwc,c->b', jnp.square(_normalize(a) - _normalize(b)), head,
            precision=self.precision,
        )
        / (a.shape[1] * a.shape[2])
        for (a, b), head in zip(pairs, self.heads, strict=True)
    ]
    return sum(distances)

  def features(self, images: jax.Array) -> tuple[jax.Array, ...]:
    """Computes the activations that are compared, before they are normalised.

    Args:
      images: [B, H, W, 3] floats in [-1, 1].

    Returns:
      [B, h, w, C] float32 for each of five stages; of VGG16 relu1_2, relu2_2,
      relu3_3, relu4_3, relu5_3, of AlexNet relu1 to relu5.

    Raises:
      ValueError: a side too small for the network.
    """
    frozen_network.check_images(images)
    if min(images.shape[1:3]) < self.min_side:
      raise ValueError(
          f'images are {images.shape[1]} x {images.shape[2]} pixels, less than'
          f' the {self.min_side} that {self.network} needs; use larger images'
          + (", or 'vgg16'." if self.network != 'vgg16' else '.')
      )
    images = images.astype(jnp.float32)
    shift, scale = (jnp.array(x, jnp.float32) for x in (_SHIFT, _SCALE))
    taps = self.backbone((images - shift) / scale)
    return tuple(x.astype(jnp.float32) for x in taps)

  def pooled(self, images: jax.Array) -> jax.Array:
    """Computes one vector per image, for a Frechet distance.

    Args:
      images: [B, H, W, 3] floats in [-1, 1].

    Returns:
      [B, C] float32: the spatial mean of the last of `features`; 512 channels
      of VGG16, 256 of AlexNet.
    """
    return jnp.mean(self.features(images)[-1], axis=(1, 2))


def load_lpips(
    path: str | os.PathLike[str],
    network: str,
    *,
    precision: str = 'highest',
    dtype: jnp.dtype = jnp.float32,
) -> frozen_network.FrozenNetwork:
  """Loads what experiments/weights/convert_lpips.py has written.

  Args:
    path: a safetensors file whose keys are the paths of our parameters.
    network: a key of `NETWORKS`.
    precision: as in `Lpips`.
    dtype: as there.

  Raises:
    ValueError: an unknown network, or a file that is missing, damaged, or of
      another network.
  """
  if network not in NETWORKS:
    raise ValueError(
        f'The LPIPS network is {network!r}; known: {sorted(NETWORKS)}.'
    )
  return frozen_network.load_network(
      Lpips(network, precision, dtype),
      path,
      num_images=2,
      find_place=lambda name, shape: parameters.Place(name),
      ignored=None,
      instructions=(
          'experiments/weights/convert_lpips.py makes such a file for'
          f' --network={network} and says from what.'
      ),
  )


def _normalize(x: jax.Array) -> jax.Array:
  """Scales channels to length 1; what is zero stays so."""
  # The root's slope at 0 is infinite, but there is no length 0 except where
  # ReLU has cut off all channels, and it lets no gradient through there.
  norms = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
  return x / (norms + 1e-10)
