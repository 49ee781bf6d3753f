"""Image metrics, their averages, and the statistics of a codebook.

The image metrics compare uint8 images, so that what is measured is what a
viewer gets, and return one float32 number an image. Averages and codebook
statistics live on the host in float64 and int64. `DEFINITIONS` says in one
line what each number is; evaluation files carry it beside the numbers.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# PSNR of identical images, dB. One value of a 256 x 256 image that is off by
# one grey level makes 101 dB.
PSNR_CAP = 100.0

DEFINITIONS = {
    'psnr': (
        'dB, higher is better: mean over images of 10 log10(1 / mse); images'
        f' above {PSNR_CAP:g} dB, identical ones too, count {PSNR_CAP:g}'
    ),
    'ssim': (
        'at most 1, higher is better: RGB, Gaussian window of 11 taps, sigma'
        ' 1.5, population covariance, K 0.01 and 0.03, borders of 5 cropped'
    ),
    'ssim_uniform': (
        'at most 1, higher is better: RGB, uniform window of 7 x 7, sample'
        ' covariance, K 0.01 and 0.03, borders of 3 cropped'
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

# Windows a side that the filters of SSIM take together.
_FILTER_BLOCK = 128

# (code, count) pairs buffered before they are merged into the sorted counts.
_BUFFERED_CODES = 2**20


def to_uint8(images: jax.Array) -> jax.Array:
  """Clips and rounds images in [-1, 1] to the nearest of 256 grey levels.

  Args:
    images: [...], any float dtype; NaN becomes 0 (`image_metrics` reports it).

  Returns:
    The same shape, uint8.
  """
  images = jnp.asarray(images)
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
        f'to_uint8 got {images.dtype}; it takes floats in [-1, 1], and'
        ' uint8 images need no conversion.'
    )
  levels = (images.astype(jnp.float32) + 1) * 127.5
  levels = jnp.where(jnp.isnan(levels), 0, levels)
  return jnp.round(jnp.clip(levels, 0, 255)).astype(jnp.uint8)


def image_metrics(
    originals: jax.Array, reconstructions: jax.Array
) -> dict[str, jax.Array]:
  """Computes every image metric from what the model returns.

  Args:
    originals: [B, H, W, 3] uint8.
    reconstructions: [B, H, W, 3] floats in [-1, 1], before any rounding.

  Returns:
    name -> [B] float32, for the names of `IMAGE_METRICS` that images of this
    size have. All values of an image whose reconstruction holds a NaN or an
    infinity are NaN, which `Mean` counts.
  """
  rounded = to_uint8(reconstructions)
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
  """Mean squared error of [B, H, W, 3] uint8 images / 255: [B] float32."""
  difference = _difference(originals, reconstructions)
  return _image_mean(difference * difference) / 255**2


def l1(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """Mean absolute error of [B, H, W, 3] uint8 images / 255: [B] float32."""
  return _image_mean(jnp.abs(_difference(originals, reconstructions))) / 255


def psnr(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio of [B, H, W, 3] uint8 images: [B] dB.

  The peak is 255; nothing exceeds `PSNR_CAP`, which identical images get.
  """
  floor = 10 ** (-PSNR_CAP / 10)
  error = jnp.maximum(mse(originals, reconstructions), floor)
  return -10 * jnp.log10(error)


def ssim(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """Structural similarity of [B, H, W, 3] uint8 images: [B], at most 1.

  Equal to scikit-image with gaussian_weights=True, sigma=1.5 and
  use_sample_covariance=False. Both sides must be at least 11 pixels.
  """
  return _image_mean(ssim_map(originals, reconstructions))


def ssim_uniform(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """As `ssim`, with a 7 x 7 window and sample covariance: skimage's default.

  Both sides must be at least 7 pixels.
  """
  return _image_mean(ssim_uniform_map(originals, reconstructions))


def ssim_map(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """The SSIM of each window, of which `ssim` is the mean.

  Args:
    originals: [B, H, W, C] uint8.
    reconstructions: as originals.

  Returns:
    [B, H - 10, W - 10, C] float32, one value for each 11 x 11 window.
  """
  taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
  return _ssim(originals, reconstructions, taps, 1.0)


def ssim_uniform_map(
    originals: jax.Array, reconstructions: jax.Array
) -> jax.Array:
  """As `ssim_map`, of `ssim_uniform`: [B, H - 6, W - 6, C]."""
  return _ssim(originals, reconstructions, np.ones(7), 49 / 48)


def _ssim(originals, reconstructions, taps, covariance_scale) -> jax.Array:
  """SSIM from the sum s and the difference d of the two images.

  With x = (s + d) / 2 and y = (s - d) / 2 the two factors of SSIM become
    1 - mean(d)^2 / ((mean(s)^2 + mean(d)^2) / 2 + C1)
    1 - var(d) / ((var(s) + var(d)) / 2 + C2).
  Similar images have small d, so that float32 loses little in var(d), where
  it would lose much in var(x) + var(y) - 2 cov(x, y); four filters, not five.
  """
  d = _difference(originals, reconstructions)
  if min(d.shape[1:3]) < len(taps):
    raise ValueError(
        f'Images of {d.shape[1]} x {d.shape[2]} pixels are smaller than the'
        f' SSIM window of {len(taps)}; use larger images.'
    )
  # Centred at 0: the smaller s is, the less var(s) loses.
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

  Each axis is multiplied by a banded matrix, because XLA convolves slowly on
  CPU, in blocks, so that time and memory are O(pixels).
  """
  sums = _filter_axis(_filter_axis(images, taps, 1), taps, 2)
  # Dividing last keeps the sums of the uniform window exact integers.
  return sums / np.float32(taps.sum() ** 2)


def _filter_axis(images: jax.Array, taps: np.ndarray, axis: int) -> jax.Array:
  """Weighted sums over n neighbours along one axis, 1 or 2, of the images."""
  num = images.shape[axis] - len(taps) + 1
  subscripts = 'yh,bhwc->bywc' if axis == 1 else 'xw,bhwc->bhxc'
  blocks = []
  for start in range(0, num, _FILTER_BLOCK):
    stop = min(start + _FILTER_BLOCK, num) + len(taps) - 1
    block = jax.lax.slice_in_dim(images, start, stop, axis=axis)
    band = _banded(stop - start, taps)
    # GPU and TPU otherwise round the factors to 10 or 7 bits.
    blocks.append(jnp.einsum(subscripts, band, block, precision='highest'))
  return jnp.concatenate(blocks, axis=axis)


def _banded(size: int, taps: np.ndarray) -> np.ndarray:
  """The [size - n + 1, size] matrix that applies n taps at each place."""
  matrix = np.zeros((size - len(taps) + 1, size), np.float32)
  for row in range(len(matrix)):
    matrix[row, row : row + len(taps)] = taps
  return matrix


def _difference(originals: jax.Array, reconstructions: jax.Array) -> jax.Array:
  """The difference of the two in float32, after checks of both."""
  shapes = jnp.shape(originals), jnp.shape(reconstructions)
  dtypes = jnp.result_type(originals), jnp.result_type(reconstructions)
  if shapes[0] != shapes[1] or len(shapes[0]) != 4:
    raise ValueError(
        f'Image metrics got shapes {shapes[0]} and {shapes[1]}; give two'
        ' equal shapes [B, H, W, 3].'
    )
  if dtypes != (jnp.uint8, jnp.uint8):
    raise ValueError(
        f'Image metrics got {dtypes[0]} and {dtypes[1]}; give uint8 images'
        ' (`to_uint8` makes them from floats in [-1, 1]).'
    )
  return originals.astype(jnp.float32) - reconstructions.astype(jnp.float32)


def _image_mean(values: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B], axis by axis: rounding grows with sides, not area."""
  return values.mean(axis=3).mean(axis=2).mean(axis=1)


# Name: the metric, and the least side in pixels of images that have it.
IMAGE_METRICS = {
    'psnr': (psnr, 1), 'ssim': (ssim, 11), 'ssim_uniform': (ssim_uniform, 7),
    'l1': (l1, 1), 'mse': (mse, 1),
    'identical': (lambda x, y: jnp.all(x == y, axis=(1, 2, 3)), 1),
}  # fmt: skip


class Mean:
  """Mean over images in float64 on the host, however they were batched.

  Attributes:
    num_values: images counted, non-finite ones included.
    num_nonfinite: images whose value is NaN or infinite.
  """

  def __init__(self):
    self.num_values = 0
    self.num_nonfinite = 0
    self._total = 0.0

  def update(self, values: np.ndarray, mask: np.ndarray) -> None:
    """Adds the values [B] where mask [B] is true; the others are padding."""
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

  def merge(self, other: 'Mean') -> None:
    """Adds what another process or shard has counted."""
    self.num_values += other.num_values
    self.num_nonfinite += other.num_nonfinite
    self._total += other._total

  def result(self) -> float:
    """The mean; NaN if there are no values or any of them is not finite."""
    if self.num_nonfinite or not self.num_values:
      return math.nan
    return self._total / self.num_values


class CodebookStatistics:
  """Counts codes on the host; memory grows with the used codes, not with K.

  Indices outside 0 ... K - 1 (-1 marks a NaN latent) are counted apart.
  """

  def __init__(
      self,
      codebook_size: int,
      *,
      levels: Sequence[int] = (),
      digits_of: Callable[[np.ndarray], np.ndarray] | None = None,
  ):
    """Counts nothing yet.

    Args:
      codebook_size: K, in 2 ... 2^31.
      levels: levels of each dimension, product K; () if codes have none.
      digits_of: maps indices [U] int32 to digits [U, d], 0 ... levels[i] - 1;
        needed with levels. NumPy is best: U varies.
    """
    if not 2 <= codebook_size <= 2**31:
      raise ValueError(f'codebook_size is {codebook_size}; use 2 ... 2^31.')
    if levels and math.prod(levels) != codebook_size:
      raise ValueError(
          f'levels {tuple(levels)} have product {math.prod(levels)}, not'
          f' codebook_size {codebook_size}; give the levels of this codebook.'
      )
    if bool(levels) != (digits_of is not None):
      raise ValueError('Give both levels and digits_of, or neither.')
    self._codebook_size = codebook_size
    self._num_invalid = 0
    self._levels = tuple(levels)
    self._digits_of = digits_of
    self._codes = np.zeros(0, np.int32)
    self._counts = np.zeros(0, np.int64)
    # (codes, counts) of batches, to be merged into the two above.
    self._buffer = []
    self._num_buffered = 0

  def update(self, indices: np.ndarray, mask: np.ndarray) -> None:
    """Adds indices [B, ...] int32 of images where mask [B] is true."""
    indices, mask = np.asarray(indices), np.asarray(mask, bool)
    if indices.dtype != np.int32 or indices.shape[:1] != mask.shape:
      raise ValueError(
          f'CodebookStatistics.update got {indices.dtype} indices'
          f' {indices.shape} and mask {mask.shape}; give int32 [B, ...], [B].'
      )
    indices = indices[mask]
    valid = (indices >= 0) & (indices < self._codebook_size)
    self._num_invalid += int(indices.size - np.count_nonzero(valid))
    self.add(*np.unique(indices[valid], return_counts=True))

  def merge(self, other: 'CodebookStatistics') -> None:
    """Adds what another process or shard has counted."""
    if other._codebook_size != self._codebook_size:
      raise ValueError(
          f'Codebooks of {self._codebook_size} and {other._codebook_size} codes'
          ' cannot be merged; count each alone.'
      )
    self._num_invalid += other._num_invalid
    self.add(*other.histogram())

  def histogram(self) -> tuple[np.ndarray, np.ndarray]:
    """The codes that occur, ascending [U] int32, and how often [U] int64."""
    if self._buffer:
      pairs = [(self._codes, self._counts), *self._buffer]
      codes = np.concatenate([codes for codes, _ in pairs])
      counts = np.concatenate([counts for _, counts in pairs])
      order = np.argsort(codes, kind='stable')
      self._codes, starts = np.unique(codes[order], return_index=True)
      self._counts = np.add.reduceat(counts[order], starts)
      self._buffer, self._num_buffered = [], 0
    return self._codes, self._counts

  def add(self, codes: np.ndarray, counts: np.ndarray) -> None:
    """Adds codes [U] int32, without repeats, that occur counts [U] times."""
    self._buffer.append((codes, counts))
    self._num_buffered += len(codes)
    # Merging costs as much as there is to merge: wait until that has doubled.
    if self._num_buffered > max(_BUFFERED_CODES, len(self._codes)):
      self.histogram()

  def result(self) -> dict[str, Any]:
    """Plain numbers and lists under the names of `DEFINITIONS`."""
    codes, counts = self.histogram()
    num_tokens, num_used = int(counts.sum()), len(codes)
    entropy = entropy_bits(counts)
    statistics = {
        'codebook_size': self._codebook_size,
        'num_tokens': num_tokens,
        'num_invalid_tokens': self._num_invalid,
        'num_used_codes': num_used,
        'usage': num_used / self._codebook_size,
        'tokens_per_code': num_tokens / self._codebook_size,
        'entropy_bits': entropy,
        'entropy_bits_miller_madow': entropy
        + (num_used - 1) / (2 * math.log(2) * max(num_tokens, 1)),
        'entropy_share': entropy / math.log2(self._codebook_size),
        'perplexity': 2**entropy,
    }
    if not self._levels:
      return statistics
    histograms = self._level_histograms(codes, counts)
    entropies = [entropy_bits(histogram) for histogram in histograms]
    return statistics | {
        'level_histograms': [histogram.tolist() for histogram in histograms],
        'dead_levels': [int(np.sum(h == 0)) for h in histograms],
        'level_entropy_bits': entropies,
        'total_correlation_bits': sum(entropies) - entropy,
    }

  def _level_histograms(self, codes, counts) -> list[np.ndarray]:
    """Tokens at each level, one int64 array [levels[i]] a dimension."""
    digits = np.asarray(self._digits_of(codes))
    shape = (len(codes), len(self._levels))
    if digits.shape != shape or np.any(
        (digits < 0) | (digits >= np.asarray([self._levels]))
    ):
      raise ValueError(
          f'digits_of returned {digits.shape} for levels {self._levels}; it'
          f' must return {shape}, digit i in 0 ... levels[i] - 1.'
      )
    histograms = [np.zeros(num, np.int64) for num in self._levels]
    for histogram, column in zip(histograms, digits.T, strict=True):
      np.add.at(histogram, column, counts)
    return histograms


def entropy_bits(counts: np.ndarray) -> float:
  """Entropy of a histogram in bits; NaN if it counts nothing."""
  counts = counts[counts > 0]
  if not len(counts):
    return math.nan
  shares = counts / counts.sum()
  # The entropy of a single code is 0, not -0.
  return abs(float(np.sum(shares * np.log2(shares))))
