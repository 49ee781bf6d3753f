"""Checks of fields: messages with the name, and types of Python."""

import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from fsq_jax.quantizers import checks


def test_numbers_are_checked_by_name():
  for value in (
      None, '1', True, np.True_, math.nan, -1, [3], np.array(3.5),
  ):  # fmt: skip
    quantizer = types.SimpleNamespace(noise=value, stages=value)
    with pytest.raises(ValueError, match=r'^noise is .*; use a finite .*, 0'):
      checks.set_numbers(quantizer, 'noise')
    with pytest.raises(ValueError, match=r'^stages is .*, 1 to 4\.'):
      checks.set_integers(quantizer, 'stages', low=1, high=4)
    with pytest.raises(ValueError, match=r'^stages is .*, 1 or more\.'):
      checks.set_integers(quantizer, 'stages', low=1)


def test_numbers_become_those_of_python():
  for value in (np.float32(0.5), np.float64(0.5), 0.5):
    quantizer = types.SimpleNamespace(eps=value, weight=-1)
    checks.set_numbers(quantizer, 'eps', 'weight', low=-math.inf)
    assert repr(quantizer.eps) == '0.5'
    assert repr(quantizer.weight) == '-1.0'
  for value in (np.int64(4), np.uint8(4), 4):
    assert repr(checks.validated_integer('stages', value, 1, 4)) == '4'
  assert checks.validated_integer('axis', -7) == -7
  with pytest.raises(ValueError, match='use a finite number'):
    checks.set_numbers(types.SimpleNamespace(eps=10**400), 'eps')
  with pytest.raises(ValueError, match=r'use an integer\.$'):
    checks.validated_integer('axis', 1.0)


def test_wide_integers_never_wrap_into_the_range():
  indices = checks.as_integers(np.asarray([2**32 + 5, -1, 7, -(2**40)]), 'It')
  np.testing.assert_array_equal(indices, [-2, -1, 7, -2])
  assert checks.as_integers(jnp.int8([3]), 'It').dtype == jnp.int32
  with pytest.raises(ValueError, match='It are float32; use an integer'):
    checks.as_integers(jnp.zeros(2), 'It')
