"""Vocabularies: levels of tokens, integer dtypes, specs of quantizers."""

import numpy as np
import pytest

from fsq_jax import quantizers
from fsq_jax.generators import vocabulary


@pytest.mark.parametrize('first_fastest', [False, True])
def test_levels_are_the_mixed_radix_numbers_of_numpy(first_fastest):
  levels = (3, 4, 2)
  tokens = np.arange(24)
  expected = np.stack(
      np.unravel_index(tokens, levels, order='F' if first_fastest else 'C'), -1
  )
  v = vocabulary.from_levels(levels, first_fastest=first_fastest)
  np.testing.assert_array_equal(v.to_levels(tokens), expected)
  np.testing.assert_array_equal(v.to_tokens(expected), tokens)


@pytest.mark.parametrize(
    'quantizer',
    [
        quantizers.FSQ((3, 4, 2)),
        quantizers.FSQ((3, 4, 5), convention='paper'),
        quantizers.LFQ(num_bits=4),
    ],
    ids=['symmetric', 'paper', 'lfq'],
)
def test_spec_gives_the_levels_of_the_quantizer(quantizer):
  size = quantizer.codebook_size
  v = vocabulary.from_spec(quantizer.spec(), size)
  tokens = np.arange(size)
  # The values that a dimension takes, in order of its level index.
  codes = np.asarray(quantizer.indices_to_codes(tokens))
  levels = np.asarray(v.to_levels(tokens))
  for i, level in enumerate(v.levels):
    values = np.unique(codes[:, i])
    assert len(values) == level
    np.testing.assert_array_equal(codes[:, i], values[levels[:, i]])


def test_spec_without_levels_and_with_several_indices():
  assert vocabulary.from_spec({'name': 'vq'}, 16).levels == ()
  grouped = quantizers.GroupedFSQ((3, 3), num_groups=2)
  with pytest.raises(ValueError, match='several indices per code'):
    vocabulary.from_spec(grouped.spec(), 9)


def test_tokens_of_16_bits_do_not_overflow():
  v = vocabulary.from_levels((8, 8, 8, 5, 5, 5))
  tokens = np.asarray([63999, 0, 40000], np.uint16)
  np.testing.assert_array_equal(v.to_tokens(v.to_levels(tokens)), tokens)
  assert vocabulary.as_int32(tokens, 'tokens').dtype == np.int32
  # A 64-bit token whose low 32 bits are a valid one.
  np.testing.assert_array_equal(v.to_levels(np.asarray([2**32])), [[-1] * 6])


def test_tokens_outside_are_rejected_on_the_host():
  v = vocabulary.from_levels((3, 2))
  v.check(np.asarray([0, 5], np.uint16))
  with pytest.raises(ValueError, match=r'contain 6 \(1 of 2'):
    v.check(np.asarray([0, 6]))
  with pytest.raises(ValueError, match='contain -1'):
    v.check(np.asarray([-1]))
  with pytest.raises(ValueError, match='use an integer dtype'):
    v.to_levels(np.asarray([1.0]))
  with pytest.raises(ValueError, match='have 6 codes'):
    vocabulary.Vocabulary(codebook_size=7, levels=(3, 2), strides=(2, 1))
