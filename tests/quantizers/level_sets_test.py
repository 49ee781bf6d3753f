"""Levels: the recommended sets, and what the constructor refuses."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsq_jax.quantizers import FSQ
from fsq_jax.quantizers import conventions
from fsq_jax.quantizers import recommended_levels


def test_recommended_levels_are_those_of_the_paper():
  sizes = {
      4: 15, 6: 64, 8: 240, 9: 512, 10: 1000, 11: 1920, 12: 4375, 14: 15360,
      16: 64000,
  }  # fmt: skip
  assert sorted(conventions.LEVELS) == sorted(sizes)
  for bits, size in sizes.items():
    assert FSQ(levels=recommended_levels(bits)).codebook_size == size
  with pytest.raises(ValueError, match=r'7 bits; known: \[4, 6, 8'):
    recommended_levels(7)


def test_common_levels_can_be_built():
  quantizers = [FSQ(levels=levels) for levels in conventions.COMMON_LEVELS]
  assert [fsq.codebook_size for fsq in quantizers] == [512, 240, 875, 1000]


@pytest.mark.parametrize(
    ('levels', 'match'),
    [
        ((), r'levels is \(\)'),
        (8, 'levels is 8'),
        ('888', "levels is '888'"),
        ((8, 1), 'levels has 1; .* 2 to'),
        ((8, 0), 'levels has 0'),
        ((8, -5), 'levels has -5'),
        ((8, 5.0), 'levels has 5.0'),
        ((8, True), 'levels has True'),
        ((2**22 + 1,), 'levels has 4194305'),
        ((2**16, 2**15), '2147483648 codes.*groups'),
        ((4,) * 16, '4294967296 codes.*fewer or smaller'),
    ],
)
def test_levels_that_cannot_work_are_refused(levels, match):
  with pytest.raises(ValueError, match=match):
    FSQ(levels=levels)


def test_two_levels_are_for_the_symmetric_convention():
  fsq = FSQ(levels=(2, 2))
  codes = [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]
  np.testing.assert_array_equal(fsq.indices_to_codes(jnp.arange(4)), codes)
  with pytest.raises(ValueError, match=r'levels has 2; .* 3 to'):
    FSQ(levels=(2, 2), convention='paper')


@pytest.mark.parametrize('convention', ['symmetric', 'paper'])
def test_largest_codebook_works_to_its_last_index(convention):
  levels = (331, 302, 21483)
  size = math.prod(levels)
  assert size == 2**31 - 2  # 2**31 - 1 is prime
  fsq = FSQ(levels=levels, convention=convention, eps=0.0)
  indices = jnp.asarray([0, 1, size // 2, size - 2, size - 1])
  codes = fsq.indices_to_codes(indices)
  np.testing.assert_array_equal(fsq.codes_to_indices(codes), indices)
  outside = fsq.indices_to_codes(jnp.asarray([size, size + 1]))
  assert np.all(np.isnan(outside))


def test_codebook_is_never_made():
  start = time.perf_counter()
  fsq = FSQ(levels=(4,) * 15)
  assert fsq.codebook_size == 2**30
  assert fsq.code_dim == 15
  assert time.perf_counter() - start < 0.1
  assert jax.eval_shape(fsq.init, jax.random.key(0), jnp.zeros((2, 15))) == {}


def test_levels_become_a_tuple_of_ints():
  fsq = FSQ(levels=[np.int64(8), np.int32(5)])
  assert fsq == FSQ(levels=(8, 5))
  assert [type(level) for level in fsq.levels] == [int, int]
