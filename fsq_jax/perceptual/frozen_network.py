"""Frozen networks by which images are compared, and how they are loaded."""

from collections.abc import Callable, Mapping
import os
import pathlib
import re
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
from jax import numpy as jnp

from fsq_jax import models
from fsq_jax.models.pretrained import files as weight_files
from fsq_jax.models.pretrained import parameters

# einops patterns from PyTorch's arrays to ours.
_CONV = 'o i h w -> h w i o'
_DENSE = 'o i -> i o'


class FrozenNetwork(NamedTuple):
  """A trained network that no optimizer changes.

  Attributes:
    module: the unbound module; what it makes of images is its own to say.
    variables: {'params': float32 arrays}, on the default device. Give them to
      a jitted function as an argument: constants would be compiled into it.
    sha256: of the weights, by `models.hash_weights`; a number made with
      the network is quoted with it.
  """

  module: nn.Module
  variables: Mapping[str, Any]
  sha256: str


class FrozenBatchNorm(nn.Module):
  """Batch normalisation by given statistics, which are parameters here.

  Attributes:
    epsilon: added to the variance.
  """

  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises [..., C] floats; returns the same shape."""

    def vector(name: str, init: nn.initializers.Initializer) -> jax.Array:
      return self.param(name, init, x.shape[-1:], jnp.float32)

    scale = vector('scale', nn.initializers.ones)
    bias = vector('bias', nn.initializers.zeros)
    mean = vector('mean', nn.initializers.zeros)
    variance = vector('variance', nn.initializers.ones)
    return (x - mean) * (scale / jnp.sqrt(variance + self.epsilon)) + bias


def pytorch_place(name: str, key: str, num_axes: int) -> parameters.Place:
  """Says where a PyTorch state dict has a parameter.

  Args:
    name: the parameter's last name: 'kernel', 'bias', or one of a batch norm.
    key: of the PyTorch module.
    num_axes: of the parameter, which tells convolutions from dense layers.
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
  """Fills a module with the arrays of one safetensors file.

  Args:
    module: whose `__call__` takes arrays of images.
    path: of the file.
    num_images: how many arrays of images `__call__` takes.
    find_place: from the path ('block/conv/kernel') and the shape of a parameter
      to where the file has it.
    ignored: keys that may be in the file beside the parameters.
    instructions: how to get the file, for errors.
    unread: shapes by key of arrays that the file must have and that are not
      parameters.

  Returns:
    The network; there is no other way to get one, so that none is ever random.

  Raises:
    ValueError: a file that is missing, damaged, or of another network; the keys
      that are missing, unexpected, or of another shape are listed.
  """
  path = pathlib.Path(path).expanduser()
  if not os.path.isfile(path):
    raise ValueError(f'There is no file {path}. {instructions}')
  # Large enough for every network here; no parameter depends on it.
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
      module, {'params': params}, models.hash_weights(path)
  )


def check_images(images: jax.Array, others: jax.Array | None = None) -> None:
  """Raises ValueError unless these are images, of one shape if two arrays."""
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f'images have shape {images.shape}; give [B, H, W, 3].')
  if others is not None and images.shape != others.shape:
    raise ValueError(
        f'images have shape {images.shape} and others {others.shape}; a'
        ' distance compares arrays of one shape.'
    )
