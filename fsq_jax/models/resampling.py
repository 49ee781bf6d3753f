"""Resampling of grids and images by separable kernels, one matrix per axis."""

from collections.abc import Callable

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.runtime import partitioning


def _bicubic(size_in: int, size_out: int) -> np.ndarray:
  """PyTorch's bicubic without antialias, align_corners=False: a = -0.75."""
  centers = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
  first = np.floor(centers).astype(int) - 1
  matrix = np.zeros((size_out, size_in))
  for tap in range(4):
    # Beyond the edges, the values at the edges are repeated.
    position = np.clip(first + tap, 0, size_in - 1)
    weights = _cubic(first + tap - centers, -0.75)
    np.add.at(matrix, (np.arange(size_out), position), weights)
  return matrix


def _bicubic_antialias(size_in: int, size_out: int) -> np.ndarray:
  """Bicubic with antialias, of PyTorch, Pillow and JAX: a = -0.5."""
  # Downsampling widens the kernel, which is truncated at the edges.
  scale = size_in / size_out
  centers = (np.arange(size_out) + 0.5) * scale - 0.5
  distances = np.arange(size_in) - centers[:, None]
  matrix = _cubic(distances / max(scale, 1.0), -0.5)
  return matrix / matrix.sum(axis=1, keepdims=True)


def _bilinear(size_in: int, size_out: int) -> np.ndarray:
  """PyTorch's bilinear without antialias, align_corners=False."""
  centers = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
  # Beyond the outermost centers, the values at the edges are repeated.
  centers = np.clip(centers, 0, size_in - 1)
  distances = np.abs(np.arange(size_in) - centers[:, None])
  return np.maximum(1 - distances, 0)


def _bilinear_antialias(size_in: int, size_out: int) -> np.ndarray:
  """Bilinear with antialias, of PyTorch, Pillow and JAX."""
  # Downsampling widens the kernel, which is truncated at the edges.
  scale = size_in / size_out
  centers = (np.arange(size_out) + 0.5) * scale - 0.5
  distances = np.abs(np.arange(size_in) - centers[:, None])
  matrix = np.maximum(1 - distances / max(scale, 1.0), 0)
  return matrix / matrix.sum(axis=1, keepdims=True)


def _bilinear_tf1(size_in: int, size_out: int) -> np.ndarray:
  """Bilinear of TensorFlow 1, which aligns corners of pixels, not centers."""
  positions = np.arange(size_out) * size_in / size_out
  positions = np.minimum(positions, size_in - 1)
  distances = np.abs(np.arange(size_in) - positions[:, None])
  return np.maximum(1 - distances, 0)


def _bilinear_align_corners(size_in: int, size_out: int) -> np.ndarray:
  """Bilinear with align_corners=True: scipy's zoom of order 1."""
  centers = np.linspace(0, size_in - 1, size_out)
  distances = np.abs(np.arange(size_in) - centers[:, None])
  return np.maximum(1 - distances, 0)


KERNELS: dict[str, Callable[[int, int], np.ndarray]] = {
    'bicubic': _bicubic,
    'bicubic_antialias': _bicubic_antialias,
    'bilinear': _bilinear,
    'bilinear_align_corners': _bilinear_align_corners,
    'bilinear_antialias': _bilinear_antialias,
    'bilinear_tf1': _bilinear_tf1,
}


def check_kernel(kernel: str) -> None:
  """Raises ValueError unless the kernel is in `KERNELS`."""
  if kernel not in KERNELS:
    raise ValueError(f'The kernel is {kernel!r}; known: {sorted(KERNELS)}.')


def axis_matrix(kernel: str, size_in: int, size_out: int) -> np.ndarray:
  """Returns the resampling matrix of one axis.

  Args:
    kernel: a key of `KERNELS`.
    size_in: number of input values.
    size_out: number of output values.

  Returns:
    [size_out, size_in] float64, whose rows sum to 1.

  Raises:
    ValueError: an unknown kernel, or a size below 1.
  """
  check_kernel(kernel)
  if min(size_in, size_out) < 1:
    raise ValueError(
        f'Cannot resample {size_in} values to {size_out}; both sizes must be'
        ' at least 1.'
    )
  return KERNELS[kernel](size_in, size_out)


def resize_grid(
    grid: np.ndarray, size: tuple[int, int], kernel: str
) -> np.ndarray:
  """Resamples a grid of vectors, such as position embeddings, with NumPy.

  Args:
    grid: [h, w, C] floats.
    size: (rows, columns) of the result.
    kernel: a key of `KERNELS`.

  Returns:
    [*size, C] float32; the same values if the size is the same.
  """
  if grid.shape[:2] == tuple(size):
    return np.asarray(grid, np.float32)
  rows = axis_matrix(kernel, grid.shape[0], size[0])
  columns = axis_matrix(kernel, grid.shape[1], size[1])
  resized = np.einsum('yh,xw,hwc->yxc', rows, columns, grid, optimize=True)
  return resized.astype(np.float32)


def resize_images(
    images: jax.Array, size: tuple[int, int], kernel: str
) -> jax.Array:
  """Resamples images or latents with JAX, in float32; bicubic may overshoot.

  Args:
    images: [B, H, W, C] floats.
    size: (height, width) of the result.
    kernel: a key of `KERNELS`.

  Returns:
    [B, *size, C] float32; the same values if the size is the same.
  """
  check_kernel(kernel)
  images = images.astype(jnp.float32)
  height, width = images.shape[1:3]
  if (height, width) == tuple(size):
    return images
  rows = jnp.asarray(axis_matrix(kernel, height, size[0]), jnp.float32)
  columns = jnp.asarray(axis_matrix(kernel, width, size[1]), jnp.float32)
  # Matmuls in bfloat16 would add visible noise.
  highest = jax.lax.Precision.HIGHEST
  if partitioning.is_on_gpu(images):
    # The XLA of JAX 0.10 finds no tiles for the matmul below when it compiles
    # without a GPU.
    flat = rearrange(images, 'b h w c -> b h (w c)')
    flat = jnp.einsum('yh,bhk->byk', rows, flat, precision=highest)
    images = rearrange(flat, 'b y (w c) -> b y w c', w=width)
  else:
    images = jnp.einsum('yh,bhwc->bywc', rows, images, precision=highest)
  return jnp.einsum('xw,bywc->byxc', columns, images, precision=highest)


def average_pool(x: jax.Array, side: int, stride: int) -> jax.Array:
  """Average pooling with padding 'SAME' that ignores the padding.

  Equal to `nn.avg_pool` with count_include_pad=False, which divides by a
  float64 array under JAX_ENABLE_X64.

  Args:
    x: [B, H, W, C] floats.
    side: of the square windows, in pixels.
    stride: pixels between windows.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), C] of the same dtype.
  """

  def add(x: jax.Array) -> jax.Array:
    windows, strides = (side, side), (stride, stride)
    return nn.pooling.pool(x, 0.0, jax.lax.add, windows, strides, 'SAME')

  return add(x) / add(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
  """Returns the cubic convolution kernel of Keys (1981), 0 beyond 2."""
  x = np.abs(distance)
  near = ((a + 2) * x - (a + 3)) * x**2 + 1
  far = ((x - 5) * x + 8) * a * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
