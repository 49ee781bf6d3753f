"""Tests of the train state: averages, skipped steps, loaded variables."""

import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state

_DEBUG = pathlib.Path(__file__).parents[2] / 'configs' / 'debug.py'


def _state(**fields):
  """A state of two parameters after 30 steps, two of them skipped."""
  values = {name: {} for name in train_state.TrainState.__annotations__}
  counters = {'step': 30, 'bad_steps': 1, 'skipped_steps': 2}
  values |= {name: jnp.int32(x) for name, x in counters.items()}
  values['params'] = {'x': jnp.array([1.0, 2.0])}
  values['ema_params'] = {'x': jnp.array([3.0, 4.0])}
  return train_state.TrainState(**(values | fields))


def test_the_average_follows_its_formula():
  params = {'x': jnp.array([5.0, 7.0])}
  for decay, used in ((0.5, 0.5), (0.999, 29 / 38)):
    average = _state().average(params, decay)['x']
    expected = used * np.array([3, 4]) + (1 - used) * np.array([5, 7])
    np.testing.assert_allclose(average, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ('is_good', 'value', 'counters'),
    [(True, 9, (31, 0, 2)), (False, 1, (31, 2, 3))],
)
def test_a_bad_step_changes_only_the_counters(is_good, value, counters):
  state = _state().after_step(
      jnp.bool_(is_good), params={'x': jnp.array([9.0, 9.0])}
  )
  assert state.params['x'][0] == value
  np.testing.assert_array_equal(state.ema_params['x'], [3, 4])
  assert (state.step, state.bad_steps, state.skipped_steps) == counters


@pytest.fixture(scope='module')
def builder():
  """That of the debug config."""
  config = configuration.load_config(_DEBUG)
  config.partitioning.mesh.update(data=2, fsdp=4)
  config.partitioning.fsdp_min_size = 64
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  return train_state.build_state_builder(config, model, optimizer, mesh)


def test_the_optimizer_state_is_sharded_as_its_parameters(builder):
  def specs(tree):
    return [x.sharding.spec for x in jax.tree.leaves(tree)]

  moments = optax.tree.get(builder.abstract.opt_state, 'mu')
  assert specs(moments) == specs(builder.abstract.params)
  assert any('fsdp' in spec for spec in specs(builder.abstract.params))


@pytest.mark.parametrize(
    ('path', 'shape', 'message'),
    [
        ('patches', (48, 16), None),
        ('patches', (48, 15), r"patches/kernel' is float32\[48, 15\]; .* has"
         r' float32\[48, 16\] there'),
        ('nothing', (1,), r"nothing/kernel' is .*; .* has nothing there"),
    ],
)
def test_variables_that_do_not_fit_are_refused(builder, path, shape, message):
  kernel = jnp.zeros(shape, jnp.float32)
  loaded = {'params': {'encoder': {path: {'kernel': kernel}}}}
  if message is None:
    jax.eval_shape(lambda: builder.create(loaded))
    return
  with pytest.raises(ValueError, match=message):
    builder.create(loaded)
