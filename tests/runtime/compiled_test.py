"""Compiled functions: one for each shape, the last ones kept, memory asked."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.runtime import compiled


def _num_compiled(caplog, function, *arrays):
  caplog.clear()
  with jax.log_compiles():
    function({'w': np.float32(2)}, *arrays)
  return sum('Finished XLA compilation' in x for x in caplog.messages)


def test_the_shapes_used_last_are_kept(caplog):
  function = compiled.Compiled(
      lambda variables, x: variables['w'] * jnp.sum(x), max_shapes=2
  )
  sizes = (3, 4, 3, 5, 3, 4)
  counts = [_num_compiled(caplog, function, np.ones(x)) for x in sizes]
  # 5 takes the place of 4, which was used before 3.
  assert counts == [1, 1, 0, 1, 0, 1]
  assert function({'w': np.float32(2)}, np.ones(7)) == 14


def test_an_argument_that_is_left_out_is_a_shape_of_its_own(caplog):
  function = compiled.Compiled(
      lambda variables, x, y: x if y is None else x + y, max_shapes=2
  )
  x, y = np.ones(3), np.ones(3)
  counts = [
      _num_compiled(caplog, function, *arrays)
      for arrays in ((x, None), (x, y), (x, None))
  ]
  assert counts == [1, 1, 0]
  np.testing.assert_array_equal(function({}, x, None), x)
  np.testing.assert_array_equal(function({}, x, y), 2 * x)


def test_what_needs_more_memory_than_is_free_is_not_run(monkeypatch):
  function = compiled.Compiled(lambda w, x: w * jnp.outer(x, x).cumsum(0))
  np.testing.assert_allclose(
      function(np.float32(1), np.ones(4)), np.ones((4, 1)) * [1, 1, 1, 1]
      * np.arange(1, 5)[:, None]
  )
  monkeypatch.setattr(compiled, 'free_bytes', lambda: 10_000)
  with pytest.raises(compiled.TooLargeError, match=r'\[100\] need') as caught:
    function(np.float32(1), np.ones(100))
  assert compiled.is_out_of_memory(caught.value)
  # What has been compiled is not asked again.
  function(np.float32(1), np.ones(4))
  assert not compiled.is_out_of_memory(ValueError('no'))
  assert not compiled.is_out_of_memory(jax.errors.JaxRuntimeError('INTERNAL'))


def test_free_memory_is_read():
  assert compiled.free_bytes() > 2**20
