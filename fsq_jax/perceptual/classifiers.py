"""ImageNet classifiers whose logits are compared: ConvNeXt and ResNet.

Liu et al., A ConvNet for the 2020s (arxiv.org/abs/2201.03545); He et al., Deep
Residual Learning (arxiv.org/abs/1512.03385), with the stride of a block in its
3 x 3 convolution. Structure and weights as in torchvision.
"""

import functools
import os
import re

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.models import resampling
from fsq_jax.models.pretrained import parameters
from fsq_jax.perceptual import frozen_network

_SIDE = 224
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_IGNORED = re.compile(r'.*\.num_batches_tracked$')
_layer_norm = functools.partial(
    # E[x^2] - E[x]^2 is inexact where the mean is large.
    nn.LayerNorm, epsilon=1e-6, use_fast_variance=False
)
_batch_norm = functools.partial(frozen_network.FrozenBatchNorm, 1e-5)


class ConvNext(nn.Module):
  """ConvNeXt: blocks of depthwise convolution and MLP.

  Attributes:
    widths: channels of each stage.
    depths: blocks of each stage.
    num_classes: number of logits.
    precision: of the matmuls, as in `jax.lax.Precision`.
    dtype: of the convolutions and blocks; norms and logits are in float32.
  """

  widths: tuple[int, ...]
  depths: tuple[int, ...]
  num_classes: int
  precision: str
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Classifies images.

    Args:
      images: [B, H, W, 3] floats in [-1, 1], of any size.

    Returns:
      [B, num_classes] float32 logits.
    """

    def shrink(x: jax.Array, name: str, width: int, factor: int) -> jax.Array:
      return nn.Conv(
          width, (factor, factor), strides=factor, padding='VALID',
          precision=self.precision, dtype=self.dtype, name=name,
      )(x)

    x = _layer_norm(name='stem_norm')(
        shrink(_preprocess(images), 'stem', self.widths[0], 4)
    )
    for i, (width, depth) in enumerate(
        zip(self.widths, self.depths, strict=True)
    ):
      if i > 0:
        x = _layer_norm(name=f'shrink{i}_norm')(x)
        x = shrink(x, f'shrink{i}_conv', width, 2)
      for j in range(depth):
        x = _ConvNextBlock(
            self.precision, self.dtype, name=f'stage{i}_block{j}'
        )(x)
    x = _layer_norm(name='head_norm')(jnp.mean(x, axis=(1, 2)))
    return nn.Dense(self.num_classes, precision=self.precision, name='head')(x)

  @staticmethod
  def find_place(name: str, shape: tuple[int, ...]) -> parameters.Place:
    """Returns the place of a parameter in torchvision's state dict."""
    module, leaf = name.rsplit('/', 1)
    # torchvision numbers stages and the layers between them as one list.
    block = re.match(r'stage(\d+)_block(\d+)/?(\w*)', module)
    between = re.match(r'shrink(\d+)_(norm|conv)', module)
    if block:
      key = f'features.{2 * int(block[1]) + 1}.{block[2]}'
      if leaf == 'layer_scale':
        return parameters.Place(f'{key}.layer_scale', 'c 1 1 -> c')
      layers = {'depthwise': 0, 'norm': 2, 'expand': 3, 'contract': 5}
      key = f'{key}.block.{layers[block[3]]}'
    elif between:
      layer = {'norm': 0, 'conv': 1}[between[2]]
      key = f'features.{2 * int(between[1])}.{layer}'
    else:
      key = {
          'stem': 'features.0.0', 'stem_norm': 'features.0.1',
          'head_norm': 'classifier.0', 'head': 'classifier.2',
      }[module]  # fmt: skip
    return frozen_network.pytorch_place(leaf, key, len(shape))


class ResNet(nn.Module):
  """ResNet with bottleneck blocks.

  Attributes:
    depths: blocks of each stage.
    num_classes: number of logits.
    precision: of the matmuls, as in `jax.lax.Precision`.
    dtype: of the convolutions and blocks; norms and logits are in float32.
  """

  depths: tuple[int, ...]
  num_classes: int
  precision: str
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Classifies images.

    Args:
      images: [B, H, W, 3] floats in [-1, 1], of any size.

    Returns:
      [B, num_classes] float32 logits.
    """
    x = nn.Conv(
        64, (7, 7), strides=2, padding=3, use_bias=False,
        precision=self.precision, dtype=self.dtype, name='conv1',
    )(_preprocess(images))
    x = nn.relu(_batch_norm(name='bn1')(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for i, depth in enumerate(self.depths, start=1):
      for j in range(depth):
        stride = 2 if i > 1 and j == 0 else 1
        x = _Bottleneck(
            32 * 2**i, stride, self.precision, self.dtype,
            name=f'layer{i}_{j}',
        )(x)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, precision=self.precision, name='fc')(x)

  @staticmethod
  def find_place(name: str, shape: tuple[int, ...]) -> parameters.Place:
    """Returns the place of a parameter in torchvision's state dict."""
    module, leaf = name.rsplit('/', 1)
    # The same names, with '.' before the index in a list.
    key = re.sub(r'_(\d+)', r'.\1', module).replace('/', '.')
    return frozen_network.pytorch_place(leaf, key, len(shape))


# By torchvision's names. TiTok and VQRAE use the first in their losses; MaskGIT
# the second, with its own weights.
CLASSIFIERS = {
    'convnext_small': functools.partial(
        ConvNext, widths=(96, 192, 384, 768), depths=(3, 3, 27, 3),
        num_classes=1000,
    ),
    'resnet50': functools.partial(
        ResNet, depths=(3, 4, 6, 3), num_classes=1000
    ),
}


def load_classifier(
    path: str | os.PathLike[str],
    name: str,
    *,
    precision: str = 'highest',
    dtype: jnp.dtype = jnp.float32,
) -> frozen_network.FrozenNetwork:
  """Loads a classifier of torchvision.

  Args:
    path: its state dict as a safetensors file.
    name: a key of `CLASSIFIERS`.
    precision: of the matmuls, as in `jax.lax.Precision`.
    dtype: as in `ConvNext`.

  Raises:
    ValueError: an unknown name, or a file that is missing, corrupted, or of
      another network.
  """
  if name not in CLASSIFIERS:
    raise ValueError(
        f'The classifier is {name!r}; known: {sorted(CLASSIFIERS)}.'
    )
  module = CLASSIFIERS[name](precision=precision, dtype=dtype)
  return frozen_network.load_network(
      module,
      path,
      num_images=1,
      find_place=module.find_place,
      ignored=_IGNORED,
      instructions=(
          "Where PyTorch is installed, save torchvision's"
          f" {name}(weights='IMAGENET1K_V1').state_dict() with"
          ' safetensors.torch.save_file.'
      ),
  )


class _ConvNextBlock(nn.Module):
  """Depthwise convolution, LayerNorm, MLP."""

  precision: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    y = nn.Conv(
        width, (7, 7), feature_group_count=width, precision=self.precision,
        dtype=self.dtype, name='depthwise',
    )(x)
    y = _layer_norm(name='norm')(y)

    def dense(y: jax.Array, features: int, name: str) -> jax.Array:
      return nn.Dense(
          features, precision=self.precision, dtype=self.dtype, name=name
      )(y)

    y = nn.gelu(dense(y, 4 * width, 'expand'), approximate=False)
    y = dense(y, width, 'contract')
    scale = self.param(
        'layer_scale', nn.initializers.ones, (width,), jnp.float32
    )
    return x + scale * y


class _Bottleneck(nn.Module):
  """1 x 1, 3 x 3 and 1 x 1 convolution; the output has 4 times the channels."""

  channels: int
  stride: int
  precision: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:

    def conv(
        y: jax.Array, names: tuple[str, str], channels: int, side: int,
        stride: int = 1,
    ) -> jax.Array:
      y = nn.Conv(
          channels, (side, side), strides=stride, padding=side // 2,
          use_bias=False, precision=self.precision, dtype=self.dtype,
          name=names[0],
      )(y)
      return _batch_norm(name=names[1])(y)

    y = nn.relu(conv(x, ('conv1', 'bn1'), self.channels, 1))
    y = nn.relu(conv(y, ('conv2', 'bn2'), self.channels, 3, self.stride))
    y = conv(y, ('conv3', 'bn3'), 4 * self.channels, 1)
    if x.shape != y.shape:
      names = ('downsample_0', 'downsample_1')
      x = conv(x, names, 4 * self.channels, 1, self.stride)
    return nn.relu(x + y)


def _preprocess(images: jax.Array) -> jax.Array:
  """Resamples images as TiTok does and normalizes them by mean and std."""
  frozen_network.check_images(images)
  images = resampling.resize_images(
      images, (_SIDE, _SIDE), 'bilinear_antialias'
  )
  mean, std = (jnp.array(x, jnp.float32) for x in (_MEAN, _STD))
  return ((images + 1) / 2 - mean) / std
