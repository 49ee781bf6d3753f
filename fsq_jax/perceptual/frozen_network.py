"""Loads frozen networks that compare images."""

from collections.abc import Callable, Mapping
import os
import pathlib
import re
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
from jax import numpy as jnp

from fsq_jax.models.pretrained import files as weight_files
from fsq_jax.models.pretrained import parameters

# einops patterns from PyTorch's arrays to ours.
_CONV = 'o i h w -> h w i o'
_DENSE = 'o i -> i o'


class FrozenNetwork(NamedTuple):
  """A trained network that no optimizer changes.

  Attributes:
    module: the unbound module.
    variables: {'params': float32 arrays}, on the default device. Pass them to
      jitted functions as an argument: constants are compiled into the function.
    sha256: of the weights, from `models.hash_weights`; reported with every
      number that the network computes.
  """

  module: nn.Module
  variables: Mapping[str, Any]
  sha256: str


class FrozenBatchNorm(nn.Module):
  """Batch normalization whose statistics are parameters.

  Attributes:
    epsilon: added to the variance.
  """

  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes [..., C] floats; returns the same shape."""

    def vector(name: str, init: nn.initializers.Initializer) -> jax.Array:
      return self.param(name, init, x.shape[-1:], jnp.float32)

    scale = vector('scale', nn.initializers.ones)
    bias = vector('bias', nn.initializers.zeros)
    mean = vector('mean', nn.initializers.zeros)
    variance = vector('variance', nn.initializers.ones)
    return (x - mean) * (scale / jnp.sqrt(variance + self.epsilon)) + bias


def pytorch_place(name: str, key: str, num_axes: int) -> parameters.Place:
  """Returns the place of a parameter in a PyTorch state dict.

  Args:
    name: last part of the parameter's path: 'kernel', 'bias', or a parameter of
      `FrozenBatchNorm`.
    key: of the PyTorch module.
    num_axes: of the parameter; distinguishes convolutions from dense layers.
  """
  if name == 'kernel':
    return parameters.Place(f'{key}.weight', _CONV if num_axes == 4 else _DENSE)
  names = {
      'scale': 'weight', 'mean': 'running_mean', 'variance': 'running_var'
  }
  return parameters.Place(f'{key}.{names.get(name, name)}')


def load_network(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    num_images: int,
    find_place: Callable[[str, tuple[int, ...]], parameters.Place],
    ignored: re.Pattern[str] | None,
    instructions: str,
    unread: Mapping[str, tuple[int, ...]] = {},
) -> FrozenNetwork:
  """Loads a network from one safetensors file.

  All frozen networks are made here, so that none has random weights.

  Args:
    module: its `__call__` takes arrays of images.
    path: of the file.
    num_images: number of arrays that `__call__` takes.
    find_place: maps the path ('block/conv/kernel') and the shape of a parameter
      to its place in the file.
    ignored: keys that the file may have besides the parameters.
    instructions: how to get the file, for messages.
    unread: shapes by key of further arrays that the file must have.

  Raises:
    ValueError: a file that is missing, corrupted, or of another network; keys
      that are missing, unexpected, or of another shape are listed.
  """
  path = pathlib.Path(path).expanduser()
  if not os.path.isfile(path):
    raise ValueError(f'There is no file {path}. {instructions}')
  # Large enough for every network; no parameter depends on the size.
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  abstract = jax.eval_shape(
      module.init, jax.random.key(0), *[images] * num_images
  )
  shapes = {
      name: leaf.shape
      for name, leaf in traverse_util.flatten_dict(
          abstract['params'], sep='/'
      ).items()
  }
  places = {name: find_place(name, shape) for name, shape in shapes.items()}
  with weight_files.open_file(path) as weights:
    parameters.check_arrays(
        weights,
        places | {key: parameters.Place(key) for key in unread},
        shapes | unread,
        part='network',
        advice=instructions,
        is_unexpected=lambda key: not (ignored and ignored.match(key)),
    )
    params = {
        name: jnp.asarray(
            parameters.read_parameter(weights, places[name], shape)
        )
        for name, shape in shapes.items()
    }
  params = traverse_util.unflatten_dict(params, sep='/')
  return FrozenNetwork(
      module, {'params': params}, weight_files.hash_weights(path)
  )


def check_images(images: jax.Array, others: jax.Array | None = None) -> None:
  """Raises ValueError unless these are images, all of the same shape."""
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f'images have shape {images.shape}; give [B, H, W, 3].')
  if others is not None and images.shape != others.shape:
    raise ValueError(
        f'images have shape {images.shape} and others {others.shape}; a'
        ' distance compares arrays of one shape.'
    )
