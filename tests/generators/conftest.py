"""Fixtures of the tests of generators."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope='session')
def draw_variables():
  """Returns random variables of a module, none at its initial value.

  Nothing is compiled. Arguments: the module, then the arguments of init.
  """

  def draw(module, *inputs, scale=0.4):
    rng = np.random.default_rng(1)

    def draw_array(path, x):
      around = 1.0 if path[-1].key == 'scale' else 0.0
      return np.asarray(around + rng.uniform(-scale, scale, x.shape), x.dtype)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree_util.tree_map_with_path(draw_array, shapes)

  return draw
