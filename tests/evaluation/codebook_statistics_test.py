"""Codebook statistics against closed forms; level indices of all quantizers."""

import json
import math

import jax
import numpy as np
import pytest

from fsq_jax import quantizers
from fsq_jax.evaluation import codebook_statistics

_LEVELS = (4, 3, 2)


def _fsq_statistics():
  # The last dimension runs fastest.
  quantizer = quantizers.FSQ(_LEVELS, convention='symmetric')
  return codebook_statistics.CodebookStatistics(24, quantizer)


def test_codebook_statistics_equal_closed_forms():
  statistics = _fsq_statistics()
  # Codes (0, 0, 0) four times, (3, 1, 0) twice, (0, 1, 1) and (3, 0, 1) once.
  indices = np.array([[0, 0, 0, 0], [20, 20, 3, 19]], np.int32)
  statistics.update(indices, np.ones(2, bool))
  result = statistics.result()
  expected = {
      'codebook_size': 24,
      'num_tokens': 8,
      'num_invalid_tokens': 0,
      'num_used_codes': 4,
      'usage': 4 / 24,
      'tokens_per_code': 8 / 24,
      'entropy_bits': 1.75,
      'entropy_bits_miller_madow': 1.75 + 3 / (16 * math.log(2)),
      'entropy_share': 1.75 / math.log2(24),
      'perplexity': 2**1.75,
      'dead_levels': [2, 1, 0],
  }
  for name, value in expected.items():
    assert result[name] == pytest.approx(value, rel=1e-12), name
  assert result['level_histograms'] == [[5, 0, 0, 3], [5, 3, 0], [6, 2]]
  level_entropies = [0.954434002924965, 0.954434002924965, 0.811278124459133]
  assert result['level_entropy_bits'] == pytest.approx(level_entropies)
  assert result['total_correlation_bits'] == pytest.approx(
      sum(level_entropies) - 1.75
  )
  assert json.loads(json.dumps(result)) == result


def test_uniform_independent_digits_have_all_the_bits():
  statistics = _fsq_statistics()
  statistics.update(np.arange(24, dtype=np.int32).reshape(4, 6), np.full(4, 1))
  result = statistics.result()
  assert result['usage'] == 1
  assert result['perplexity'] == pytest.approx(24)
  assert result['entropy_share'] == pytest.approx(1)
  assert result['total_correlation_bits'] == pytest.approx(0, abs=1e-12)


def test_invalid_tokens_and_padding_are_left_out():
  statistics = codebook_statistics.CodebookStatistics(5)
  indices = np.array([[0, -1], [5, 4], [1, 2**31 - 1], [3, 3]], np.int32)
  statistics.update(indices, np.array([True, True, True, False]))
  codes, counts = statistics.histogram()
  assert (codes.tolist(), counts.tolist()) == ([0, 1, 4], [1, 1, 1])
  result = statistics.result()
  assert (result['num_tokens'], result['num_invalid_tokens']) == (3, 3)
  assert 'level_histograms' not in result


@pytest.mark.parametrize('batch_size', [1, 50, 400])
def test_codebook_statistics_do_not_depend_on_batches(batch_size, monkeypatch):
  monkeypatch.setattr(codebook_statistics, 'BUFFERED_CODES', 30)
  rng = np.random.default_rng(0)
  # -1 ... 23, where -1 is the most frequent.
  indices = np.minimum(rng.geometric(0.1, (400, 3, 2)), 25).astype(np.int32) - 2
  statistics = _fsq_statistics()
  for start in range(0, 400, batch_size):
    batch = indices[start : start + batch_size]
    statistics.update(batch, np.ones(len(batch), bool))
  codes, counts = statistics.histogram()
  valid = indices[indices >= 0]
  expected = np.unique(valid, return_counts=True)
  np.testing.assert_array_equal(codes, expected[0])
  np.testing.assert_array_equal(counts, expected[1])
  result = statistics.result()
  shares = expected[1] / valid.size
  entropy = -np.sum(shares * np.log2(shares))
  assert result['entropy_bits'] == pytest.approx(entropy, rel=1e-12)
  assert result['num_invalid_tokens'] == 2400 - valid.size


def test_largest_codebook_allocates_only_what_it_sees():
  statistics = codebook_statistics.CodebookStatistics(2**31)
  statistics.update(np.array([[0, 2**31 - 1]], np.int32), np.ones(1, bool))
  result = statistics.result()
  assert result['perplexity'] == 2
  assert result['usage'] == 2**-30
  assert result['num_invalid_tokens'] == 0


def test_codebook_without_tokens_has_no_entropy():
  result = _fsq_statistics().result()
  assert result['usage'] == 0
  assert math.isnan(result['entropy_bits'])
  assert math.isnan(result['perplexity'])


def test_codebook_statistics_refuse_what_does_not_fit():
  with pytest.raises(ValueError, match='2\\^31'):
    codebook_statistics.CodebookStatistics(2**31 + 1)
  statistics = _fsq_statistics()
  with pytest.raises(ValueError, match='int32'):
    statistics.update(np.zeros((2, 3)), np.ones(2, bool))
  with pytest.raises(ValueError, match='mask'):
    statistics.update(np.zeros((2, 3), np.int32), np.ones(3, bool))


@pytest.mark.parametrize(
    'quantizer',
    [
        quantizers.FSQ((5, 4, 3), convention='paper'),
        quantizers.FSQ((5, 4, 3), convention='symmetric'),
        quantizers.GroupedFSQ((5, 4), num_groups=2),
        quantizers.ResidualFSQ((5, 4, 3), num_stages=2),
        quantizers.LFQ(5),
        quantizers.LFQ(5, bit_order='lsb_first'),
    ],
    ids=lambda quantizer: quantizer.spec()['name'],
)
def test_level_indices_are_those_of_the_quantizer(quantizer):
  indices = np.arange(-2, quantizer.codebook_size + 2)
  slots = quantizer.index_shape or ()
  expected = np.asarray(
      quantizer.indices_to_digits(
          np.broadcast_to(
              indices.reshape(-1, *(1 for _ in slots)), (len(indices), *slots)
          )
      )
  ).reshape(len(indices), -1, len(quantizer.levels))[:, 0]
  actual = codebook_statistics.level_indices(quantizer, indices)
  assert actual.dtype == np.int32
  np.testing.assert_array_equal(actual, expected)


def test_level_indices_are_found_without_compiling(caplog):
  quantizer = quantizers.FSQ((8, 8, 8, 5, 5))
  codes = np.arange(0, 12_800, 7, dtype=np.int32)
  with jax.log_compiles():
    statistics = codebook_statistics.count_codes(quantizer)
    statistics.update(codes[None], np.array([True]))
    histograms = statistics.result()['level_histograms']
  assert not [x for x in caplog.messages if 'XLA compilation' in x]
  for column, level, histogram in zip(
      np.unravel_index(codes, quantizer.levels),
      quantizer.levels,
      histograms,
      strict=True,
  ):
    expected = np.bincount(column, minlength=level)
    np.testing.assert_array_equal(histogram, expected)


def test_codes_of_every_kind_of_quantizer_are_counted():
  assert codebook_statistics.count_codes(quantizers.NoQuantizer(4)) is None
  for quantizer, num_dimensions in (
      (quantizers.VectorQuantizer(16, 4), 0), (quantizers.LFQ(4), 4)
  ):
    statistics = codebook_statistics.count_codes(quantizer)
    statistics.update(np.full((1, 3), 15, np.int32), np.array([True]))
    result = statistics.result()
    assert result['codebook_size'] == 16
    assert len(result.get('level_histograms', ())) == num_dimensions
