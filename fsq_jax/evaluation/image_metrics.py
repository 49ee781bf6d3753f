"""Image metrics (PSNR, SSIM, errors) and the definitions of all numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fsq_jax.models import pixels

# PSNR of identical images in dB. One value that differs by one grey level in a
# 256 x 256 image gives 101 dB.
PSNR_CAP = 100.0
DEFINITIONS = {
    'psnr': (
        'dB, higher is better: mean over images of 10 log10(1 / mse); images'
        f' above {PSNR_CAP:g} dB, identical ones too, count {PSNR_CAP:g}'
    ),
    'ssim': (
        'at most 1, higher is better: mean over channels, Gaussian window of 11'
        ' taps, sigma 1.5, population covariance, K 0.01 and 0.03, borders of 5'
        ' cropped'
    ),
    'ssim_uniform': (
        'at most 1, higher is better: mean over channels, uniform window of 7 x'
        ' 7, sample covariance, K 0.01 and 0.03, borders of 3 cropped'
    ),
    'l1': 'mean absolute error of uint8 images divided by 255, in [0, 1]',
    'mse': 'mean squared error of uint8 images divided by 255, in [0, 1]',
    'identical': 'share of images reproduced exactly, in [0, 1]',
    'codebook_size': 'K, the number of codes that exist',
    'num_tokens': (
        'valid indices counted, over the whole evaluation set; where a code has'
        ' several, of groups or stages, each is one'
    ),
    'num_invalid_tokens': 'indices outside 0 ... K - 1, left out of the rest',
    'num_used_codes': 'codes that occur at least once',
    'usage': 'num_used_codes / K; at most tokens_per_code',
    'tokens_per_code': 'num_tokens / K; below 10, usage and entropy are low',
    'entropy_bits': 'entropy of the histogram of all tokens, bits a token',
    'entropy_bits_miller_madow': (
        'entropy_bits + (num_used_codes - 1) / (2 ln(2) num_tokens)'
    ),
    'entropy_share': 'entropy_bits / log2(K), 1 where all codes are as likely',
    'perplexity': '2 ** entropy_bits, the number of codes in effective use',
    'level_histograms': 'for each dimension, the tokens at each of its levels',
    'dead_levels': 'for each dimension, the levels that never occur',
    'level_entropy_bits': 'for each dimension, the entropy of its level',
    'total_correlation_bits': 'sum of level_entropy_bits - entropy_bits',
}
# Windows per side that the filters of SSIM process together.
_FILTER_BLOCK = 128


def image_metrics(
    originals: jax.Array, reconstructions: jax.Array
) -> dict[str, jax.Array]:
  """Returns every image metric of a batch.

  Args:
    originals: [B, H, W, C] uint8.
    reconstructions: [B, H, W, C] floats in [-1, 1], before rounding.

  Returns:
    name -> [B] float32, for the names of `IMAGE_METRICS` that are defined for
    images of this size. All values of an image are NaN if its reconstruction
    holds NaN or infinity.
  """
  rounded = pixels.to_uint8(reconstructions)
  finite = jnp.all(jnp.isfinite(reconstructions), axis=(1, 2, 3))
  nan = jnp.float32(jnp.nan)
  return {
      name: jnp.where(
          finite, metric(originals, rounded).astype(jnp.float32), nan
      )
      for name, (metric, min_side) in IMAGE_METRICS.items()
      if min(rounded.shape[1:3]) >= min_side
  }


def mse(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """Mean squared error of [B, H, W, C] uint8 images / 255: [B] float32."""
  difference = _difference(originals, reconstructions)
  return _image_mean(difference * difference) / 255**2


def l1(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """Mean absolute error of [B, H, W, C] uint8 images / 255: [B] float32."""
  return _image_mean(jnp.abs(_difference(originals, reconstructions))) / 255


def psnr(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio of [B, H, W, C] uint8 images: [B] dB.

  The peak is 255; values are capped at `PSNR_CAP`.
  """
  floor = 10 ** (-PSNR_CAP / 10)
  error = jnp.maximum(mse(originals, reconstructions), floor)
  return -10 * jnp.log10(error)


def ssim(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """Structural similarity of [B, H, W, C] uint8 images: [B], at most 1.

  Equal to scikit-image with gaussian_weights=True, sigma=1.5 and
  use_sample_covariance=False. Both sides must be at least 11 pixels.
  """
  return _image_mean(ssim_map(originals, reconstructions))


def ssim_uniform(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """Like `ssim`, with a 7 x 7 window and sample covariance: skimage's default.

  Both sides must be at least 7 pixels.
  """
  return _image_mean(ssim_uniform_map(originals, reconstructions))


def ssim_map(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """Returns the SSIM of each window; `ssim` is their mean.

  Args:
    originals: [B, H, W, C] uint8.
    reconstructions: like `originals`.

  Returns:
    [B, H - 10, W - 10, C] float32, one value per 11 x 11 window.
  """
  taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
  return _ssim(originals, reconstructions, taps, 1.0)


def ssim_uniform_map(
    originals: jax.Array, reconstructions: jax.Array
) -> jax.Array:
  """Returns the windows of `ssim_uniform`: [B, H - 6, W - 6, C]."""
  return _ssim(originals, reconstructions, np.ones(7), 49 / 48)


def _ssim(originals, reconstructions, taps, covariance_scale) -> jax.Array:
  """Computes SSIM from the sum s and the difference d of the two images.

  With x = (s + d) / 2 and y = (s - d) / 2 the two factors of SSIM become
    1 - mean(d)^2 / ((mean(s)^2 + mean(d)^2) / 2 + C1)
    1 - var(d) / ((var(s) + var(d)) / 2 + C2).
  Similar images have small d, so var(d) is accurate in float32, unlike
  var(x) + var(y) - 2 cov(x, y); and this takes four filters instead of five.
  """
  d = _difference(originals, reconstructions)
  if min(d.shape[1:3]) < len(taps):
    raise ValueError(
        f'Images of {d.shape[1]} x {d.shape[2]} pixels are smaller than the'
        f' SSIM window of {len(taps)}; use larger images.'
    )
  # Centred at 0: var(s) is more accurate for small s.
  s = 2.0 * originals.astype(jnp.float32) - d - 255
  mean_s, mean_d = _filter(s, taps), _filter(d, taps)
  var_s = covariance_scale * (_filter(s * s, taps) - mean_s**2)
  var_d = covariance_scale * (_filter(d * d, taps) - mean_d**2)
  mean_s = mean_s + 255
  c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
  luminance = 1 - mean_d**2 / ((mean_s**2 + mean_d**2) / 2 + c1)
  structure = 1 - var_d / ((var_s + var_d) / 2 + c2)
  return luminance * structure


def _filter(images: jax.Array, taps: np.ndarray) -> jax.Array:
  """Weighted mean over each n x n window: [B, H - n + 1, W - n + 1, C].

  Each axis is multiplied by a banded matrix, since XLA convolves slowly on CPU,
  in blocks, so that time and memory are O(pixels).
  """
  sums = _filter_axis(_filter_axis(images, taps, 1), taps, 2)
  # Dividing last keeps the sums of the uniform window exact integers.
  return sums / np.float32(taps.sum() ** 2)


def _filter_axis(images: jax.Array, taps: np.ndarray, axis: int) -> jax.Array:
  """Weighted sums over n neighbours along axis 1 or 2 of the images."""
  num = images.shape[axis] - len(taps) + 1
  subscripts = 'yh,bhwc->bywc' if axis == 1 else 'xw,bhwc->bhxc'
  blocks = []
  for start in range(0, num, _FILTER_BLOCK):
    stop = min(start + _FILTER_BLOCK, num) + len(taps) - 1
    block = jax.lax.slice_in_dim(images, start, stop, axis=axis)
    band = _banded(stop - start, taps)
    # By default GPU and TPU round the factors to 10 or 7 bits.
    blocks.append(jnp.einsum(subscripts, band, block, precision='highest'))
  return jnp.concatenate(blocks, axis=axis)


def _banded(size: int, taps: np.ndarray) -> np.ndarray:
  """Returns the [size - n + 1, size] matrix of a filter with n taps."""
  matrix = np.zeros((size - len(taps) + 1, size), np.float32)
  for row in range(len(matrix)):
    matrix[row, row : row + len(taps)] = taps
  return matrix


def _difference(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """Returns the difference in float32; checks shapes and dtypes."""
  shapes = jnp.shape(originals), jnp.shape(reconstructions)
  dtypes = jnp.result_type(originals), jnp.result_type(reconstructions)
  if shapes[0] != shapes[1] or len(shapes[0]) != 4:
    raise ValueError(
        f'Image metrics got shapes {shapes[0]} and {shapes[1]}; give two'
        ' equal shapes [B, H, W, C].'
    )
  if dtypes != (jnp.uint8, jnp.uint8):
    raise ValueError(
        f'Image metrics got {dtypes[0]} and {dtypes[1]}; give uint8 images'
        ' (`to_uint8` makes them from floats in [-1, 1]).'
    )
  return originals.astype(jnp.float32) - reconstructions.astype(jnp.float32)


def _image_mean(values: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B]; by axis: rounding grows with the side, not area."""
  return values.mean(axis=3).mean(axis=2).mean(axis=1)


# Name: the metric, and the smallest side in pixels of images that have it.
IMAGE_METRICS = {
    'psnr': (psnr, 1), 'ssim': (ssim, 11), 'ssim_uniform': (ssim_uniform, 7),
    'l1': (l1, 1), 'mse': (mse, 1),
    'identical': (lambda x, y: jnp.all(x == y, axis=(1, 2, 3)), 1),
}


class Mean:
  """Mean over images in float64 on the host, accumulated by batches.

  Attributes:
    num_values: number of images, including non-finite values.
    num_nonfinite: number of images with a value that is NaN or infinite.
  """

  def __init__(self):
    self.num_values = 0
    self.num_nonfinite = 0
    self._total = 0.0

  def update(self, values: np.ndarray, mask: np.ndarray) -> None:
    """Adds the values [B] where mask [B] is true, False for padding."""
    values, mask = np.asarray(values, np.float64), np.asarray(mask, bool)
    if values.ndim != 1 or values.shape != mask.shape:
      raise ValueError(
          f'Mean got values {values.shape}, mask {mask.shape}; give [B], [B].'
      )
    values = values[mask]
    finite = values[np.isfinite(values)]
    self.num_values += len(values)
    self.num_nonfinite += len(values) - len(finite)
    self._total += float(np.sum(finite))

  def result(self) -> float:
    """Returns the mean; NaN if there are no values or one is not finite."""
    if self.num_nonfinite or not self.num_values:
      return math.nan
    return self._total / self.num_values
