"""Dense layers of generators and their initializer."""

import functools

from flax import linen as nn

from fsq_jax.generators import architecture as architectures
from fsq_jax.models import layers

# Standard deviation of kernels at the width of the 'L' preset; it scales with
# 1 / sqrt(width), so that narrow models start with activations of equal size.
_KERNEL_STDDEV = 0.02
_KERNEL_WIDTH = 1024


def kernel_init(width: int, scale: float = 1.0) -> nn.initializers.Initializer:
  """Truncated normal initializer (at 2 sigma) of a dense kernel.

  Args:
    width: input channels.
    scale: factor of the standard deviation.
  """
  stddev = scale * _KERNEL_STDDEV * (_KERNEL_WIDTH / width) ** 0.5
  return nn.initializers.truncated_normal(stddev)


def block_dense(
    architecture: architectures.Architecture,
    features: int,
    name: str,
    *,
    tensor_axis: int,
    scale: float = 1.0,
    width: int | None = None,
) -> nn.Dense:
  """Returns a dense layer of a block.

  Args:
    architecture: of the block.
    features: output channels.
    name: of the module.
    tensor_axis: axis of the kernel that the mesh axis 'tensor' shards.
    scale: factor of the initial standard deviation.
    width: input channels; by default the width of the residual stream.
  """
  return nn.Dense(
      features,
      dtype=architecture.dtype,
      name=name,
      use_bias=architecture.use_bias,
      kernel_init=kernel_init(width or architecture.width, scale),
      dot_general=functools.partial(
          layers.dot_rows, tensor_axis=tensor_axis
      ),
  )
