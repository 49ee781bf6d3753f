"""Resampling kernels against slow formulas, scipy and JAX."""

import math

import jax
import numpy as np
import pytest
from scipy import ndimage

from fsq_jax.models import resampling

_SIZES = [(4, 6), (6, 4), (5, 5), (5, 7), (37, 16), (3, 11), (8, 1), (1, 3)]


def _cubic(x, a):
  """The weight of a value at distance x."""
  x = abs(x)
  if x < 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  if x < 2:
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
  return 0.0


def _bicubic(values, size):
  """PyTorch's kernel, value by value: upsample_bicubic2d."""
  resized = np.zeros(size)
  for i in range(size):
    source = (i + 0.5) * len(values) / size - 0.5
    for tap in range(math.floor(source) - 1, math.floor(source) + 3):
      nearest = min(max(tap, 0), len(values) - 1)
      resized[i] += _cubic(source - tap, -0.75) * values[nearest]
  return resized


def _antialias(values, size, kernel, radius):
  """PyTorch's kernels with antialias, value by value."""
  resized = np.zeros(size)
  scale = len(values) / size
  stretch = max(scale, 1.0)
  for i in range(size):
    center = scale * (i + 0.5)
    low = max(int(center - radius * stretch + 0.5), 0)
    high = min(int(center + radius * stretch + 0.5), len(values))
    weights = [kernel((n + 0.5 - center) / stretch) for n in range(low, high)]
    resized[i] = np.dot(weights, values[low:high]) / sum(weights)
  return resized


def _bicubic_antialias(values, size):
  """_upsample_bicubic2d_aa."""
  return _antialias(values, size, lambda x: _cubic(x, -0.5), 2)


def _bilinear_antialias(values, size):
  """_upsample_bilinear2d_aa."""
  return _antialias(values, size, lambda x: max(1 - abs(x), 0), 1)


def _bilinear(values, size):
  """PyTorch's kernel, value by value: upsample_bilinear2d."""
  resized = np.zeros(size)
  for i in range(size):
    source = max((i + 0.5) * len(values) / size - 0.5, 0)
    low = math.floor(source)
    high = low + (low < len(values) - 1)
    share = source - low
    resized[i] = (1 - share) * values[low] + share * values[high]
  return resized


def _bilinear_align_corners(values, size):
  resized = np.zeros(size)
  for i in range(size):
    source = i * (len(values) - 1) / max(size - 1, 1)
    low = min(math.floor(source), max(len(values) - 2, 0))
    high = min(low + 1, len(values) - 1)
    resized[i] = values[low] + (source - low) * (values[high] - values[low])
  return resized


def _bilinear_tf1(values, size):
  """TensorFlow's ResizeBilinear, half_pixel_centers=False, value by value."""
  resized = np.zeros(size)
  for i in range(size):
    source = i * (len(values) / size)
    low = math.floor(source)
    high = min(low + 1, len(values) - 1)
    resized[i] = values[low] + (source - low) * (values[high] - values[low])
  return resized


_SLOW = {
    'bicubic': _bicubic,
    'bicubic_antialias': _bicubic_antialias,
    'bilinear': _bilinear,
    'bilinear_align_corners': _bilinear_align_corners,
    'bilinear_antialias': _bilinear_antialias,
    'bilinear_tf1': _bilinear_tf1,
}


@pytest.mark.parametrize(('size_in', 'size_out'), _SIZES)
@pytest.mark.parametrize('kernel', resampling.KERNELS)
def test_matrix_is_the_slow_formula(kernel, size_in, size_out):
  values = np.random.default_rng(0).standard_normal(size_in)
  matrix = resampling.axis_matrix(kernel, size_in, size_out)
  assert matrix.shape == (size_out, size_in)
  expected = _SLOW[kernel](values, size_out)
  np.testing.assert_allclose(matrix @ values, expected, atol=1e-12)


@pytest.mark.parametrize('kernel', resampling.KERNELS)
def test_constants_stay(kernel):
  for size_in, size_out in _SIZES:
    matrix = resampling.axis_matrix(kernel, size_in, size_out)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize('kernel', resampling.KERNELS)
def test_the_same_size_is_the_same_grid(kernel):
  np.testing.assert_allclose(
      resampling.axis_matrix(kernel, 7, 7), np.eye(7), atol=1e-12
  )


@pytest.mark.parametrize('size', [(7, 9), (3, 2), (4, 10)])
def test_corners_stay_as_in_the_zoom_of_scipy(size):
  grid = np.random.default_rng(0).standard_normal((4, 5, 3))
  zoom = (size[0] / 4, size[1] / 5, 1)
  np.testing.assert_allclose(
      resampling.resize_grid(grid, size, 'bilinear_align_corners'),
      ndimage.zoom(grid, zoom, order=1),
      atol=1e-6,
  )


@pytest.mark.parametrize('size', [(7, 9), (3, 2), (4, 10)])
@pytest.mark.parametrize(
    ('kernel', 'method'),
    [('bicubic_antialias', 'cubic'), ('bilinear_antialias', 'bilinear')],
)
def test_antialias_is_that_of_jax(size, kernel, method):
  grid = np.random.default_rng(0).standard_normal((4, 5, 3)).astype(np.float32)
  np.testing.assert_allclose(
      resampling.resize_grid(grid, size, kernel),
      jax.image.resize(grid, (*size, 3), method, antialias=True),
      atol=2e-6,
  )


@pytest.mark.parametrize('size', [(7, 9), (3, 2), (4, 10)])
def test_bilinear_is_that_of_jax(size):
  grid = np.random.default_rng(0).standard_normal((4, 5, 3)).astype(np.float32)
  np.testing.assert_allclose(
      resampling.resize_grid(grid, size, 'bilinear'),
      jax.image.resize(grid, (*size, 3), 'bilinear', antialias=False),
      atol=2e-6,
  )


@pytest.mark.parametrize('kernel', resampling.KERNELS)
def test_images_are_resampled_like_grids(kernel):
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (2, 6, 9, 3)).astype(np.float32)
  resize = jax.jit(resampling.resize_images, static_argnums=(1, 2))
  resized = resize(images, (8, 5), kernel)
  assert resized.shape == (2, 8, 5, 3)
  for image, expected in zip(images, resized, strict=True):
    np.testing.assert_allclose(
        resampling.resize_grid(image, (8, 5), kernel), expected, atol=2e-6
    )
  np.testing.assert_array_equal(resize(images, (6, 9), kernel), images)


def test_unknown_kernels_and_empty_axes_are_refused():
  images = np.zeros((1, 2, 2, 3), np.float32)
  with pytest.raises(ValueError, match=r"'area'; known: \['bicubic'"):
    resampling.resize_images(images, (2, 2), 'area')
  with pytest.raises(ValueError, match='Cannot resample 4 values to'):
    resampling.axis_matrix('bicubic', 4, 0)
