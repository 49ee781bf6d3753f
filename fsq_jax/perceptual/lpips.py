"""LPIPS v0.1: distances between images in VGG16's or AlexNet's activations.

Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric (arxiv.org/abs/1801.03924). Equal to version='0.1' of the package lpips
(github.com/richzhang/PerceptualSimilarity).
"""

import os
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.models.pretrained import parameters
from fsq_jax.perceptual import frozen_network

# LPIPS's mean and standard deviation of pixels in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class _Stage(NamedTuple):
  """Convolutions with ReLU; LPIPS compares the activations of the last one.

  Attributes:
    channels: of each convolution.
    kernel: side of the windows.
    stride: of the windows.
    pool: window side of the max pooling before them, stride 2; 0 without.
  """

  channels: tuple[int, ...]
  kernel: int = 3
  stride: int = 1
  pool: int = 0


class _Network(NamedTuple):
  """The stages of a network, and the smallest side of images it takes."""

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
  """The convolutions of a network.

  Attributes:
    network: a key of `NETWORKS`.
    precision: of the matmuls, as in `jax.lax.Precision`.
    dtype: of the convolutions.
  """

  network: str
  precision: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """Maps normalized [B, H, W, 3] images to one [B, h, w, C] per stage."""
    taps = []
    for i, stage in enumerate(NETWORKS[self.network].stages, start=1):
      if stage.pool:
        x = nn.max_pool(x, (stage.pool,) * 2, strides=(2, 2))
      # torchvision pads AlexNet's first convolution by 2, not by half.
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
    precision: of the matmuls, as in `jax.lax.Precision`: 'highest' for reported
      numbers; 'default' is faster where float32 is not native.
    dtype: of the convolutions; activations are compared in float32.
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
    """Smallest side of images, in pixels."""
    return NETWORKS[self.network].min_side

  def __call__(self, images: jax.Array, others: jax.Array) -> jax.Array:
    """Returns the distance of each pair of images; it is symmetric.

    Args:
      images: [B, H, W, 3] floats in [-1, 1]. With [0, 1] distances would be 14
        to 43 % smaller (JPEG, VGG16) without an error.
      others: like `images`.

    Returns:
      [B] float32 distances, 0 for equal images.

    Raises:
      ValueError: different shapes, or a side too small for the network.
    """
    frozen_network.check_images(images, others)
    # Not as one batch: if only one side is differentiated, activations of the
    # other side need not be kept.
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
    """Returns the activations that are compared, before normalization.

    Args:
      images: [B, H, W, 3] floats in [-1, 1].

    Returns:
      [B, h, w, C] float32 of each of five stages: relu1_2, relu2_2, relu3_3,
      relu4_3 and relu5_3 of VGG16, relu1 to relu5 of AlexNet.

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
    """Returns one vector per image, for a Frechet distance.

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
  """Loads LPIPS.

  Args:
    path: a safetensors file from experiments/weights/convert_lpips.py, whose
      keys are the paths of the parameters.
    network: a key of `NETWORKS`.
    precision: as in `Lpips`.
    dtype: as in `Lpips`.

  Raises:
    ValueError: an unknown network, or a file that is missing, corrupted, or of
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
          'experiments/weights/convert_lpips.py makes such a file with'
          f' --network={network}; its docstring names the sources.'
      ),
  )


def _normalize(x: jax.Array) -> jax.Array:
  """Scales channels to length 1; zeros stay zero."""
  # The slope of the square root is infinite at 0, but a length is 0 only where
  # ReLU has cut off all channels and passes no gradient.
  norms = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
  return x / (norms + 1e-10)
