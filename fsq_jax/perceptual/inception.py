"""Inception-v3 as FID uses it: that of TensorFlow's graph of 2015.

Szegedy et al., Rethinking the Inception Architecture for Computer Vision
(arxiv.org/abs/1512.00567). Structure, names and weights are those of
pytorch-fid (github.com/mseitzer/pytorch-fid), which is not torchvision's
network: averages leave padding out, the last block takes a maximum, and the
weights are others.
"""

from collections.abc import Callable
import os
import re
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.models import resampling
from fsq_jax.models.pretrained import parameters
from fsq_jax.perceptual import frozen_network

_SIDE = 299
_MIN_SIDE = 75
_IGNORED = re.compile(r'fc\.|.*\.num_batches_tracked$')
# TensorFlow's graph has 1008 classes, torchvision's 1000.
_CLASSIFIER = {'fc.weight': (1008, 2048)}
_INSTRUCTIONS = (
    'The weights by which FID is defined have 1008 classes, torchvision\'s have'
    ' 1000. Load pytorch-fid\'s pt_inception-2015-12-05-6726825d.pth with'
    ' torch.load(..., weights_only=True) where PyTorch is installed, and save'
    ' what it returns with safetensors.torch.save_file.'
)


class _Protocol(NamedTuple):
  """How images in [-1, 1] become inputs.

  Attributes:
    kernel: that resamples them, of `resampling.KERNELS`.
    scale: by which they are multiplied then.
    shift: that is added then.
  """

  kernel: str
  scale: float
  shift: float


PROTOCOLS = {
    'pytorch_fid': _Protocol('bilinear', 1.0, 0.0),
    # The graph itself, and so ADM's evaluator and torch-fidelity: it takes
    # (pixels - 128) / 128.
    'tf1': _Protocol('bilinear_tf1', 127.5 / 128, -0.5 / 128),
}


class InceptionV3(nn.Module):
  """Features for FID, with weights from `load_inception`.

  Numbers made with one protocol are not comparable with those of the other.

  Attributes:
    protocol: a key of `PROTOCOLS`.
  """

  protocol: str = 'pytorch_fid'

  def __call__(self, images: jax.Array) -> jax.Array:
    """Computes one vector per image.

    Args:
      images: [B, H, W, 3] floats in [-1, 1], of any size; for numbers that are
        quoted, of pixels rounded to 8 bits.

    Returns:
      [B, 2048] float32.
    """
    frozen_network.check_images(images)
    kernel, scale, shift = PROTOCOLS[self.protocol]
    images = resampling.resize_images(images, (_SIDE, _SIDE), kernel)
    return self.features(images * scale + shift)

  @nn.compact
  def features(self, x: jax.Array) -> jax.Array:
    """Computes the vectors of images that are not resampled.

    Args:
      x: [B, H, W, 3] float32 inputs as the protocol makes them.

    Returns:
      [B, 2048] float32: the spatial mean of the last block.

    Raises:
      ValueError: a side that leaves nothing to the last block.
    """
    if min(x.shape[1:3]) < _MIN_SIDE:
      raise ValueError(
          f'images are {x.shape[1]} x {x.shape[2]} pixels; Inception-v3 needs'
          f' {_MIN_SIDE}.'
      )
    x = _conv(x, 'Conv2d_1a_3x3', 32, 3, stride=2)
    x = _conv(x, 'Conv2d_2a_3x3', 32, 3, padding='VALID')
    x = _conv(x, 'Conv2d_2b_3x3', 64, 3)
    x = _max_pool(x, stride=2)
    x = _conv(x, 'Conv2d_3b_1x1', 80)
    x = _conv(x, 'Conv2d_4a_3x3', 192, 3, padding='VALID')
    x = _max_pool(x, stride=2)
    for name, pool_channels in (('b', 32), ('c', 64), ('d', 64)):
      x = _BlockA(pool_channels, name=f'Mixed_5{name}')(x)
    x = _BlockB(name='Mixed_6a')(x)
    for name, width in (('b', 128), ('c', 160), ('d', 160), ('e', 192)):
      x = _BlockC(width, name=f'Mixed_6{name}')(x)
    x = _BlockD(name='Mixed_7a')(x)
    x = _BlockE(_average_pool, name='Mixed_7b')(x)
    x = _BlockE(_max_pool, name='Mixed_7c')(x)
    return jnp.mean(x, axis=(1, 2))


def load_inception(
    path: str | os.PathLike[str], protocol: str = 'pytorch_fid'
) -> frozen_network.FrozenNetwork:
  """Loads pytorch-fid's weights.

  Args:
    path: its state dict as a safetensors file, with its classifier, by which
      it can be told from torchvision's.
    protocol: a key of `PROTOCOLS`.

  Raises:
    ValueError: an unknown protocol, or a file that is missing, damaged, or of
      another network.
  """
  if protocol not in PROTOCOLS:
    raise ValueError(
        f'The protocol of FID is {protocol!r}; known: {sorted(PROTOCOLS)}.'
    )
  return frozen_network.load_network(
      InceptionV3(protocol),
      path,
      num_images=1,
      find_place=_find_place,
      unread=_CLASSIFIER,
      ignored=_IGNORED,
      instructions=_INSTRUCTIONS,
  )


class _ConvNorm(nn.Module):
  """Convolution without bias, batch norm, ReLU."""

  channels: int
  kernel: tuple[int, int]
  stride: int
  padding: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(
        self.channels, self.kernel, strides=self.stride, padding=self.padding,
        use_bias=False, precision=jax.lax.Precision.HIGHEST, name='conv',
    )(x)
    return nn.relu(frozen_network.FrozenBatchNorm(1e-3, name='bn')(x))


class _BlockA(nn.Module):
  """5 x 5 and two 3 x 3 beside each other."""

  pool_channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    five = _conv(x, 'branch5x5_1', 48)
    three = _conv(x, 'branch3x3dbl_1', 64)
    three = _conv(three, 'branch3x3dbl_2', 96, 3)
    return _concatenate(
        _conv(x, 'branch1x1', 64),
        _conv(five, 'branch5x5_2', 64, 5),
        _conv(three, 'branch3x3dbl_3', 96, 3),
        _conv(_average_pool(x), 'branch_pool', self.pool_channels),
    )


class _BlockB(nn.Module):
  """Halves the grid of 3 x 3 convolutions."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    three = _conv(x, 'branch3x3dbl_1', 64)
    three = _conv(three, 'branch3x3dbl_2', 96, 3)
    return _concatenate(
        _conv(x, 'branch3x3', 384, 3, stride=2),
        _conv(three, 'branch3x3dbl_3', 96, 3, stride=2),
        _max_pool(x, stride=2),
    )


class _BlockC(nn.Module):
  """7 x 7 as 1 x 7 and 7 x 1, once and twice."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = self.width
    once = _conv(x, 'branch7x7_1', width)
    once = _conv(once, 'branch7x7_2', width, (1, 7))
    twice = _conv(x, 'branch7x7dbl_1', width)
    twice = _conv(twice, 'branch7x7dbl_2', width, (7, 1))
    twice = _conv(twice, 'branch7x7dbl_3', width, (1, 7))
    twice = _conv(twice, 'branch7x7dbl_4', width, (7, 1))
    return _concatenate(
        _conv(x, 'branch1x1', 192),
        _conv(once, 'branch7x7_3', 192, (7, 1)),
        _conv(twice, 'branch7x7dbl_5', 192, (1, 7)),
        _conv(_average_pool(x), 'branch_pool', 192),
    )


class _BlockD(nn.Module):
  """Halves the grid of 7 x 7 convolutions."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    three = _conv(x, 'branch3x3_1', 192)
    seven = _conv(x, 'branch7x7x3_1', 192)
    seven = _conv(seven, 'branch7x7x3_2', 192, (1, 7))
    seven = _conv(seven, 'branch7x7x3_3', 192, (7, 1))
    return _concatenate(
        _conv(three, 'branch3x3_2', 320, 3, stride=2),
        _conv(seven, 'branch7x7x3_4', 192, 3, stride=2),
        _max_pool(x, stride=2),
    )


class _BlockE(nn.Module):
  """3 x 3 as 1 x 3 beside 3 x 1."""

  pool: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    once = _conv(x, 'branch3x3_1', 384)
    twice = _conv(x, 'branch3x3dbl_1', 448)
    twice = _conv(twice, 'branch3x3dbl_2', 384, 3)
    return _concatenate(
        _conv(x, 'branch1x1', 320),
        _conv(once, 'branch3x3_2a', 384, (1, 3)),
        _conv(once, 'branch3x3_2b', 384, (3, 1)),
        _conv(twice, 'branch3x3dbl_3a', 384, (1, 3)),
        _conv(twice, 'branch3x3dbl_3b', 384, (3, 1)),
        _conv(self.pool(x), 'branch_pool', 192),
    )


def _conv(
    x: jax.Array,
    name: str,
    channels: int,
    kernel: int | tuple[int, int] = 1,
    *,
    stride: int = 1,
    padding: str = 'SAME',
) -> jax.Array:
  """A `_ConvNorm` of the module whose method calls; none pads with a stride."""
  if isinstance(kernel, int):
    kernel = (kernel, kernel)
  padding = 'VALID' if stride > 1 else padding
  return _ConvNorm(channels, kernel, stride, padding, name=name)(x)


def _average_pool(x: jax.Array) -> jax.Array:
  """Mean of those of 3 x 3 neighbours that exist."""
  return resampling.average_pool(x, 3, 1)


def _max_pool(x: jax.Array, stride: int = 1) -> jax.Array:
  """Maximum of 3 x 3 neighbours."""
  padding = 'SAME' if stride == 1 else 'VALID'
  return nn.max_pool(x, (3, 3), strides=(stride, stride), padding=padding)


def _concatenate(*branches: jax.Array) -> jax.Array:
  return jnp.concatenate(branches, axis=-1)


def _find_place(name: str, shape: tuple[int, ...]) -> parameters.Place:
  module, leaf = name.rsplit('/', 1)
  key = module.replace('/', '.')
  return frozen_network.pytorch_place(leaf, key, len(shape))
