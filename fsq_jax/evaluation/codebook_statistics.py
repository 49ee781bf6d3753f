"""Codebook statistics: usage, entropy, perplexity."""

import math
from typing import Any

import numpy as np

from fsq_jax.quantizers import base as quantizer_base
from fsq_jax.quantizers import digits

# (code, count) pairs buffered before they are merged into the sorted counts.
BUFFERED_CODES = 2**20


class CodebookStatistics:
  """Histogram of codes on the host; memory grows with the used codes, not K.

  Indices outside 0 ... K - 1 (-1 marks a NaN latent) are counted separately.
  """

  def __init__(
      self,
      codebook_size: int,
      quantizer: digits.DigitQuantizer | None = None,
  ):
    """Statistics of no tokens.

    Args:
      codebook_size: K, in 2 ... 2^31.
      quantizer: of the tokens, for statistics of each dimension; None without.
    """
    if not 2 <= codebook_size <= 2**31:
      raise ValueError(f'codebook_size is {codebook_size}; use 2 ... 2^31.')
    self._codebook_size = codebook_size
    self._quantizer = quantizer
    self._num_invalid = 0
    self._codes = np.zeros(0, np.int32)
    self._counts = np.zeros(0, np.int64)
    # (codes, counts) of batches, to be merged into the two above.
    self._buffer = []
    self._num_buffered = 0

  def update(self, indices: np.ndarray, mask: np.ndarray) -> None:
    """Adds indices [B, ...] int32 of the images where mask [B] is true."""
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

  def histogram(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the used codes, ascending [U] int32, and counts [U] int64."""
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
    """Adds counts [U] of distinct codes [U] int32."""
    self._buffer.append((codes, counts))
    self._num_buffered += len(codes)
    # Merging costs time in proportion to the codes: not before they double.
    if self._num_buffered > max(BUFFERED_CODES, len(self._codes)):
      self.histogram()

  def result(self) -> dict[str, Any]:
    """Returns numbers and lists under the names of `DEFINITIONS`."""
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
    if self._quantizer is None:
      return statistics
    histograms = self._level_histograms(codes, counts)
    entropies = [entropy_bits(histogram) for histogram in histograms]
    return statistics | {
        'level_histograms': [histogram.tolist() for histogram in histograms],
        'dead_levels': [int(np.sum(h == 0)) for h in histograms],
        'level_entropy_bits': entropies,
        'total_correlation_bits': sum(entropies) - entropy,
    }

  def _level_histograms(
      self, codes: np.ndarray, counts: np.ndarray
  ) -> list[np.ndarray]:
    """Returns the tokens at each level, int64 [levels[i]] per dimension."""
    histograms = [np.zeros(num, np.int64) for num in self._quantizer.levels]
    columns = level_indices(self._quantizer, codes).T
    for histogram, column in zip(histograms, columns, strict=True):
      np.add.at(histogram, column, counts)
    return histograms


def entropy_bits(counts: np.ndarray) -> float:
  """Returns the entropy of a histogram in bits; NaN if it is empty."""
  counts = counts[counts > 0]
  if not len(counts):
    return math.nan
  shares = counts / counts.sum()
  # The entropy of a single code is 0, not -0.
  return abs(float(np.sum(shares * np.log2(shares))))


def count_codes(
    quantizer: quantizer_base.Quantizer,
) -> CodebookStatistics | None:
  """Returns the statistics of a quantizer's tokens; None without tokens."""
  if not quantizer.codebook_size:
    return None
  has_levels = isinstance(quantizer, digits.DigitQuantizer)
  return CodebookStatistics(
      quantizer.codebook_size, quantizer if has_levels else None
  )


def level_indices(
    quantizer: digits.DigitQuantizer, indices: np.ndarray
) -> np.ndarray:
  """Returns the level index of each dimension, by NumPy.

  Args:
    quantizer: of the indices.
    indices: [U] integers on the host.

  Returns:
    [U, d] int32; -1 for an index outside 0 ... K - 1.
  """
  valid = (indices >= 0) & (indices < quantizer.codebook_size)
  columns = np.unravel_index(
      np.where(valid, indices, 0),
      quantizer.levels,
      order='F' if quantizer.first_fastest else 'C',
  )
  return np.where(valid[:, None], np.stack(columns, axis=-1), -1).astype(
      np.int32
  )
