"""A convolution over tokens whose kernel has a largest singular value of 1."""

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

_EPSILON = 1e-12


class SpectralConv(nn.Module):
  """Circular convolution over a sequence, under spectral normalisation.

  The kernel, as a matrix from [kernel_size * inputs] to features, is divided by
  an estimate of its largest singular value, that one power iteration a call in
  training makes better (arxiv.org/abs/1802.05957; the vectors of PyTorch's
  `spectral_norm`, which get no gradient). flax.linen.SpectralNorm keeps one of
  the two vectors, so that outside of training it iterates once more and divides
  by another number than the training step before it.

  The vectors `u` and `v` are in the collection `spectral_norm`, which must be
  mutable in training.

  Attributes:
    features: channels of what it returns.
    kernel_size: tokens, an odd number.
  """

  features: int
  kernel_size: int

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Convolves [B, N, C] tokens, whose end is followed by their start.

    Args:
      x: float32 tokens.
      train: whether to make the estimate better.

    Returns:
      [B, N, features] float32.

    Raises:
      ValueError: an even kernel, which has no middle.
    """
    if self.kernel_size % 2 == 0:
      raise ValueError(
          f'kernel_size is {self.kernel_size}; it must be an odd number.'
      )
    kernel = self.param(
        'kernel',
        # PyTorch's. The scale makes no difference.
        nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
        (self.kernel_size, x.shape[-1], self.features),
        jnp.float32,
    )
    bias = self.param(
        'bias', nn.initializers.zeros, (self.features,), jnp.float32
    )
    kernel = kernel / self._estimate(kernel, train)
    reach = self.kernel_size // 2
    x = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)), mode='wrap')
    return bias + jax.lax.conv_general_dilated(
        x, kernel, (1,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC')
    )

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
    # So that the first estimate is one, whatever the first call is for.
    if train or self.is_initializing():
      u.value, v.value = _iterate(matrix, u.value)
    vectors = jax.lax.stop_gradient((v.value, u.value))
    return _product('i,io,o->', vectors[0], matrix, vectors[1])


def _iterate(matrix: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
  """One power iteration, from one right singular vector to the next.

  Args:
    matrix: [I, O].
    u: [O] the vector so far.

  Returns:
    The next ones, [O] and [I], of length 1.
  """
  v = _normalize(_product('io,o->i', matrix, u))
  return _normalize(_product('io,i->o', matrix, v)), v


def _normalize(x: jax.Array) -> jax.Array:
  return x / jnp.maximum(jnp.linalg.norm(x), _EPSILON)


def _product(pattern: str, *arrays: jax.Array) -> jax.Array:
  # In fewer bits the estimate would be off by as much as a step changes it.
  return jnp.einsum(pattern, *arrays, precision=jax.lax.Precision.HIGHEST)
