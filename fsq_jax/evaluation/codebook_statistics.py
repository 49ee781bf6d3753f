"""Codebook statistics: usage, entropy, perplexity."""

from collections.abc import Callable, Sequence
import math
from typing import Any

from einops import rearrange
import numpy as np

from fsq_jax import quantizers

# (code, count) pairs buffered before they are merged into the sorted counts.
_BUFFERED_CODES = 2**20


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


_CODES_AT_ONCE = 4096


def count_codes(
    quantizer: quantizers.Quantizer,
) -> CodebookStatistics | None:
  """Returns what counts the codes of a quantizer; None without tokens."""
  if not quantizer.codebook_size:
    return None
  digits = {}
  if isinstance(quantizer, quantizers.DigitQuantizer):
    digits = {
        'levels': quantizer.levels,
        'digits_of': lambda indices: digits_of(quantizer, indices),
    }
  return CodebookStatistics(quantizer.codebook_size, **digits)


def digits_of(
    quantizer: quantizers.DigitQuantizer, indices: np.ndarray
) -> np.ndarray:
  """Returns the digits [U, d] of indices [U], in blocks of one shape.

  No two evaluations find the same number of codes, and JAX would compile for
  each.
  """
  num_blocks = -(-len(indices) // _CODES_AT_ONCE)
  padded = np.zeros(num_blocks * _CODES_AT_ONCE, np.int32)
  padded[: len(indices)] = indices
  blocks = [
      np.asarray(quantizer.indices_to_digits(block))
      for block in rearrange(padded, '(n u) -> n u', u=_CODES_AT_ONCE)
  ]
  blocks.append(np.zeros((0, len(quantizer.levels)), np.int32))
  return np.concatenate(blocks)[: len(indices)]
