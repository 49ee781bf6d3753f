"""Inception-v3 of FID: TensorFlow's graph of 2015.

Szegedy et al., Rethinking the Inception Architecture for Computer Vision
(arxiv.org/abs/1512.00567). Structure, names and weights as in pytorch-fid
(github.com/mseitzer/pytorch-fid). Unlike torchvision's network, average pooling
excludes padding, the last block has max pooling, and the weights differ.
"""

from collections.abc import Callable
import os
import pathlib
import re
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.models import resampling
from fsq_jax.models.pretrained import files as weight_files
from fsq_jax.models.pretrained import parameters
from fsq_jax.perceptual import frozen_network

_SIDE = 299
_MIN_SIDE = 75
_IGNORED = re.compile(r'fc\.|.*\.num_batches_tracked$')
# TensorFlow's graph has 1008 classes, torchvision's 1000.
_CLASSIFIER_KEY = 'fc.weight'
_CLASSIFIER = {_CLASSIFIER_KEY: (1008, 2048)}
_INSTRUCTIONS = (
    'The weights by which FID is defined have 1008 classes, torchvision\'s have'
    ' 1000. Load pytorch-fid\'s pt_inception-2015-12-05-6726825d.pth with'
    ' torch.load(..., weights_only=True) where PyTorch is installed, and save'
    ' what it returns with safetensors.torch.save_file.'
)


class _Protocol(NamedTuple):
  """Preprocessing of images in [-1, 1].

  Attributes:
    kernel: resampling kernel, a key of `resampling.KERNELS`.
    scale: factor of the resampled images.
    shift: added to the scaled images.
  """

  kernel: str
  scale: float
  shift: float


PROTOCOLS = {
    'pytorch_fid': _Protocol('bilinear', 1.0, 0.0),
    # The graph itself, ADM's evaluator and torch-fidelity: the input is
    # (pixels - 128) / 128.
    'tf1': _Protocol('bilinear_tf1', 127.5 / 128, -0.5 / 128),
}


class InceptionV3(nn.Module):
  """Features for FID, with weights from `load_inception`.

  Distances of different protocols are not comparable.

  Attributes:
    protocol: a key of `PROTOCOLS`.
  """

  protocol: str = 'pytorch_fid'

  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns one vector per image.

    Args:
      images: [B, H, W, 3] floats in [-1, 1], of any size; from pixels rounded
        to 8 bits for reported numbers.

    Returns:
      [B, 2048] float32.
    """
    frozen_network.check_images(images)
    kernel, scale, shift = PROTOCOLS[self.protocol]
    images = resampling.resize_images(images, (_SIDE, _SIDE), kernel)
    return self.features(images * scale + shift)

  @nn.compact
  def features(self, x: jax.Array) -> jax.Array:
    """Returns one vector per preprocessed image.

    Args:
      x: [B, H, W, 3] float32 images, preprocessed by the protocol.

    Returns:
      [B, 2048] float32: the spatial mean of the last block.

    Raises:
      ValueError: images smaller than 75 pixels.
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
  """Loads Inception-v3 with pytorch-fid's weights.

  Args:
    path: pytorch-fid's state dict as a safetensors file, with the classifier,
      which distinguishes it from torchvision's.
    protocol: a key of `PROTOCOLS`.

  Raises:
    ValueError: an unknown protocol, or a file that is missing, corrupted, or of
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


def read_classifier(path: str | os.PathLike[str]) -> np.ndarray:
  """Reads the class weights for the Inception score, which uses no bias.

  Args:
    path: a file that `load_inception` has accepted.

  Returns:
    [1008, 2048] float32; logits are its product with the features.
  """
  path = pathlib.Path(path).expanduser()
  with weight_files.open_file(path) as weights:
    return weights.read(_CLASSIFIER_KEY)


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
  """Branches with a 5 x 5 and with two 3 x 3 convolutions."""

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
  """Halves the grid, with 3 x 3 convolutions."""

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
  """Branches with one and with two 7 x 7, factored into 1 x 7 and 7 x 1."""

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
  """Halves the grid, with factored 7 x 7 convolutions."""

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
  """Branches that end in 1 x 3 and 3 x 1 convolutions side by side."""

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
  """Applies a `_ConvNorm` of the calling module; strided ones do not pad."""
  if isinstance(kernel, int):
    kernel = (kernel, kernel)
  padding = 'VALID' if stride > 1 else padding
  return _ConvNorm(channels, kernel, stride, padding, name=name)(x)


def _average_pool(x: jax.Array) -> jax.Array:
  """Mean over 3 x 3 windows, excluding padding."""
  return resampling.average_pool(x, 3, 1)


def _max_pool(x: jax.Array, stride: int = 1) -> jax.Array:
  """Maximum over 3 x 3 windows."""
  padding = 'SAME' if stride == 1 else 'VALID'
  return nn.max_pool(x, (3, 3), strides=(stride, stride), padding=padding)


def _concatenate(*branches: jax.Array) -> jax.Array:
  return jnp.concatenate(branches, axis=-1)


def _find_place(name: str, shape: tuple[int, ...]) -> parameters.Place:
  module, leaf = name.rsplit('/', 1)
  key = module.replace('/', '.')
  return frozen_network.pytorch_place(leaf, key, len(shape))
