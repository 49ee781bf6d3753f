"""A convolution over tokens with spectral normalization."""

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

_EPSILON = 1e-12


class SpectralConv(nn.Module):
  """Circular convolution over a sequence with spectral normalization.

  The kernel, as a matrix from [kernel_size * inputs] to features, is divided by
  an estimate of its largest singular value. In training each call improves the
  estimate by one power iteration (arxiv.org/abs/1802.05957), as PyTorch's
  `spectral_norm`. flax.linen.SpectralNorm stores only one of the two singular
  vectors, so that in evaluation it iterates once more and divides by another
  number than the last training step.

  The vectors `u` and `v`, which have no gradient, are in the collection
  `spectral_norm`, which must be mutable in training.

  Attributes:
    features: output channels.
    kernel_size: in tokens, an odd number.
    dtype: of the convolution's operands and result; the kernel is normalized
      in float32.
  """

  features: int
  kernel_size: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Convolves [B, N, C] tokens with circular padding.

    Args:
      x: tokens, cast to dtype.
      train: whether to improve the estimate.

    Returns:
      [B, N, features] float32.

    Raises:
      ValueError: an even kernel_size.
    """
    if self.kernel_size % 2 == 0:
      raise ValueError(
          f'kernel_size is {self.kernel_size}; it must be an odd number.'
      )
    kernel = self.param(
        'kernel',
        # PyTorch's; the normalization cancels the scale.
        nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
        (self.kernel_size, x.shape[-1], self.features),
        jnp.float32,
    )
    bias = self.param(
        'bias', nn.initializers.zeros, (self.features,), jnp.float32
    )
    kernel = kernel / self._estimate(kernel, train)
    width = self.kernel_size // 2
    x = x.astype(self.dtype)
    x = jnp.pad(x, ((0, 0), (width, width), (0, 0)), mode='wrap')
    y = jax.lax.conv_general_dilated(
        x, kernel.astype(self.dtype), (1,), 'VALID',
        dimension_numbers=('NWC', 'WIO', 'NWC'),
    )
    return bias + y.astype(jnp.float32)

  def _estimate(self, kernel: jax.Array, train: bool) -> jax.Array:
    """Estimates the largest singular value of a kernel."""
    matrix = rearrange(kernel, 'k i o -> (k i) o')
    u = self.variable(
        'spectral_norm', 'u',
        lambda: jax.random.normal(
            self.make_rng('params'), (self.features,), jnp.float32
        ),
    )
    v = self.variable(
        'spectral_norm', 'v', jnp.zeros, matrix.shape[:1], jnp.float32
    )
    # So that evaluation without training has an estimate.
    if train or self.is_initializing():
      u.value, v.value = _iterate(matrix, u.value)
    vectors = jax.lax.stop_gradient((v.value, u.value))
    return _einsum('i,io,o->', vectors[0], matrix, vectors[1])


def _iterate(matrix: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Takes one power iteration.

  Args:
    matrix: [I, O].
    u: [O] estimate of the right singular vector.

  Returns:
    The next estimates of both singular vectors, [O] and [I], of norm 1.
  """
  v = _normalize(_einsum('io,o->i', matrix, u))
  return _normalize(_einsum('io,i->o', matrix, v)), v


def _normalize(x: jax.Array) -> jax.Array:
  return x / jnp.maximum(jnp.linalg.norm(x), _EPSILON)


def _einsum(pattern: str, *arrays: jax.Array) -> jax.Array:
  # In bfloat16 the error would be as large as the change of a step.
  return jnp.einsum(pattern, *arrays, precision=jax.lax.Precision.HIGHEST)
