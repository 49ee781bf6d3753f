"""Image metrics against scikit-image; means."""

import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import skimage.data
import skimage.metrics

from fsq_jax import quantizers
from fsq_jax.evaluation import codebook_statistics
from fsq_jax.evaluation import image_metrics
from fsq_jax.models import pixels

_IMAGE_METRICS = ('psnr', 'ssim', 'ssim_uniform', 'l1', 'mse')


@pytest.fixture(autouse=True)
def _no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield


def _jpeg(image, quality):
  file = io.BytesIO()
  PIL.Image.fromarray(image).save(file, 'jpeg', quality=quality)
  return np.asarray(PIL.Image.open(file))


@pytest.fixture(scope='module')
def pairs():
  """Photographs beside their JPEGs, and flat bright images: [6, 96, 80, 3]."""
  rng = np.random.default_rng(0)
  originals, others = [], []
  for name, quality in (('astronaut', 5), ('chelsea', 25), ('coffee', 90)):
    image = np.ascontiguousarray(getattr(skimage.data, name)()[60:156, 60:140])
    originals.append(image)
    others.append(_jpeg(image, quality))
  # Float32 loses most where the mean is large and the variance small.
  flat = np.full((96, 80, 3), 255, np.uint8)
  originals += [flat, flat - rng.integers(0, 9, flat.shape, np.uint8), flat]
  others += [flat - 1, flat - 4, rng.integers(0, 256, flat.shape, np.uint8)]
  return np.stack(originals), np.stack(others)


def _expected(name, x, y):
  """The metric of one pair in float64, by scikit-image or by definition."""
  difference = (x.astype(np.float64) - y) / 255
  return {
      'psnr': lambda: skimage.metrics.peak_signal_noise_ratio(x, y),
      'ssim': lambda: skimage.metrics.structural_similarity(
          x,
          y,
          channel_axis=-1,
          gaussian_weights=True,
          sigma=1.5,
          use_sample_covariance=False,
      ),
      'ssim_uniform': lambda: skimage.metrics.structural_similarity(
          x, y, channel_axis=-1
      ),
      'l1': lambda: np.abs(difference).mean(),
      'mse': lambda: (difference**2).mean(),
  }[name]()


@pytest.mark.parametrize('name', _IMAGE_METRICS)
def test_metric_equals_reference(name, pairs):
  values = jax.jit(getattr(image_metrics, name))(*pairs)
  expected = [_expected(name, x, y) for x, y in zip(*pairs, strict=True)]
  assert values.dtype == jnp.float32
  np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('size', [(11, 11), (12, 97), (61, 33)])
@pytest.mark.parametrize('name', _IMAGE_METRICS)
def test_metric_equals_reference_at_any_size(name, size):
  rng = np.random.default_rng(size)
  originals = rng.integers(0, 256, (3, *size, 3), np.uint8)
  noise = rng.normal(0, (2, 20, 90), (*size, 3, 3))
  noise = np.moveaxis(noise, -1, 0)  # One strength an image.
  others = np.uint8(np.clip(originals + noise, 0, 255))
  values = jax.jit(getattr(image_metrics, name))(originals, others)
  expected = [
      _expected(name, x, y) for x, y in zip(originals, others, strict=True)
  ]
  np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)


def test_metrics_of_identical_images(pairs):
  originals = pairs[0][:2]
  reconstructions = originals.astype(np.float32) / 127.5 - 1
  values = jax.jit(image_metrics.image_metrics)(originals, reconstructions)
  expected = {
      'psnr': image_metrics.PSNR_CAP,
      'ssim': 1,
      'ssim_uniform': 1,
      'l1': 0,
      'mse': 0,
      'identical': 1,
  }
  assert values.keys() == expected.keys()
  for name, value in values.items():
    np.testing.assert_array_equal(value, np.full(2, expected[name]), name)


def test_image_metrics_are_those_of_the_rounded_images(pairs):
  originals, others = pairs
  # A third of a grey level away from each integer, below and above.
  shift = np.where(np.arange(80)[:, None] % 2, 1 / 3, -1 / 3)
  reconstructions = ((others + shift) / 127.5 - 1).astype(np.float32)
  values = jax.jit(image_metrics.image_metrics)(originals, reconstructions)
  for name in _IMAGE_METRICS:
    expected = jax.jit(getattr(image_metrics, name))(originals, others)
    np.testing.assert_allclose(values[name], expected, rtol=1e-6, atol=1e-7)
  np.testing.assert_array_equal(values['identical'], np.zeros(6))


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_non_finite_image_is_reported(pairs, bad):
  originals, others = pairs
  reconstructions = others.astype(np.float32) / 127.5 - 1
  reconstructions[1, 5, 7, 2] = bad
  values = jax.jit(image_metrics.image_metrics)(originals, reconstructions)
  for name, value in values.items():
    assert np.isnan(value).tolist() == [False, True] + 4 * [False], name
    mean = image_metrics.Mean()
    mean.update(value, np.ones(6, bool))
    assert math.isnan(mean.result())
    assert (mean.num_nonfinite, mean.num_values) == (1, 6)


@pytest.mark.parametrize('name', _IMAGE_METRICS)
def test_metrics_refuse_what_would_broadcast(name):
  metric = getattr(image_metrics, name)
  images = jnp.zeros((2, 16, 16, 3), jnp.uint8)
  with pytest.raises(ValueError, match='equal shapes'):
    metric(images, images[:1])
  with pytest.raises(ValueError, match='equal shapes'):
    metric(images[0], images[0])
  with pytest.raises(ValueError, match='to_uint8'):
    metric(images, images.astype(jnp.float32))


@pytest.mark.parametrize(
    ('metric', 'size'),
    [(image_metrics.ssim, 11), (image_metrics.ssim_uniform, 7)],
)
def test_ssim_refuses_images_below_its_window(metric, size):
  jax.eval_shape(metric, *2 * [jnp.zeros((1, size, size, 3), jnp.uint8)])
  with pytest.raises(ValueError, match=f'window of {size}'):
    metric(*2 * [jnp.zeros((1, size, size - 1, 3), jnp.uint8)])


def test_to_uint8_inverts_the_scaling_and_rounds_to_nearest():
  levels = np.arange(256)
  images = (levels / 127.5 - 1).astype(np.float32)
  np.testing.assert_array_equal(pixels.to_uint8(images), levels)
  np.testing.assert_array_equal(pixels.to_uint8(images + 0.003), levels)
  np.testing.assert_array_equal(pixels.to_uint8(images - 0.003), levels)
  outside = jnp.array([-np.inf, -1.5, 1.5, np.inf, np.nan])
  np.testing.assert_array_equal(
      jax.jit(pixels.to_uint8)(outside), [0, 0, 255, 255, 0]
  )
  with pytest.raises(ValueError, match='uint8'):
    pixels.to_uint8(levels)


@pytest.mark.parametrize('batch_size', [1, 7, 64])
def test_mean_does_not_depend_on_batches(batch_size):
  values = np.random.default_rng(0).normal(20, 9, 64).astype(np.float32)
  mean = image_metrics.Mean()
  for start in range(0, 64, batch_size):
    batch = values[start : start + batch_size]
    padding = batch_size - len(batch)
    batch = np.concatenate([batch, np.full(padding, np.nan, np.float32)])
    mask = np.arange(batch_size) < batch_size - padding
    mean.update(batch, mask)
  expected = values.astype(np.float64).mean()
  np.testing.assert_allclose(mean.result(), expected, rtol=1e-12)
  assert (mean.num_values, mean.num_nonfinite) == (64, 0)


def test_mean_of_nothing_is_nan_and_shapes_are_checked():
  mean = image_metrics.Mean()
  assert math.isnan(mean.result())
  with pytest.raises(ValueError, match='give'):
    mean.update(np.zeros(4), np.ones(1, bool))


def test_every_number_has_a_definition(pairs):
  codebook = codebook_statistics.CodebookStatistics(
      24, quantizers.FSQ((4, 3, 2))
  )
  codebook.update(np.zeros((1, 1), np.int32), np.ones(1, bool))
  metrics = jax.eval_shape(
      image_metrics.image_metrics, pairs[0], jnp.zeros((6, 96, 80, 3))
  )
  assert {*metrics, *codebook.result()} == set(image_metrics.DEFINITIONS)
