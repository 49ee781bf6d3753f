"""Tests of one training step: numbers, freezing, skipping, any devices."""

import contextlib
import functools
import pathlib
from typing import Any, NamedTuple

import chex
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from fsq_jax import checkpoints
from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as step_lib

_DEBUG = pathlib.Path(__file__).parents[2] / 'configs' / 'debug.py'

# The first two steps of configs/debug.py.
_GOLDEN = (
    {
        'loss': 0.266603,
        'reconstruction_loss': 0.192753,
        'quantizer_loss': 0.0738497,
        'gradient_norm': 1.38480,
        'learning_rate': 0.0005,
        'invalid_tokens': 0,
        'bad_steps': 0,
        'skipped_steps': 0,
    },
    {
        'loss': 0.311366,
        'reconstruction_loss': 0.235421,
        'quantizer_loss': 0.0759451,
        'gradient_norm': 1.26178,
        'learning_rate': 0.001,
        'invalid_tokens': 0,
        'bad_steps': 0,
        'skipped_steps': 0,
    },
)


# Parameters whose gradient is nothing but rounding: attention does not depend
# on the bias of its keys.
_WITHOUT_EFFECT = 'attention/qkv/bias'


class _Training(NamedTuple):
  """What a test trains with."""

  model: Any
  builder: train_state.StateBuilder
  mesh: jax.sharding.Mesh
  step: Any


def _load_config(**fields):
  """The debug config with fields, such as optim__frozen, set."""
  config = configuration.load_config(_DEBUG)
  for name, value in fields.items():
    section, _, field = name.partition('__')
    config[section][field] = value
  return config


def _build(
    config, *, mesh=(1, 1), wrap=lambda model: model, optimizer=None
) -> _Training:
  num_devices = mesh[0] * mesh[1]
  mesh = partitioning.create_mesh(
      {'data': mesh[0], 'fsdp': mesh[1]}, jax.devices()[:num_devices]
  )
  model = models.build_autoencoder(config.model, config.data.image_size)
  if optimizer is None:
    optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  step = jax.jit(
      step_lib.build_train_step(wrap(model), optimizer, config),
      in_shardings=(builder.shardings, partitioning.batch_sharding(mesh)),
      out_shardings=(builder.shardings, partitioning.replicated(mesh)),
  )
  return _Training(model, builder, mesh, step)


@functools.cache
def _images(num_batches, batch_size=8):
  """[num_batches, B, 16, 16, 3] uint8, in the order of training."""
  config = _load_config(data__batch_size=batch_size)
  iterator = data.build_dataset(config.data, split='train', seed=0).iterator()
  return np.stack([next(iterator)['image'] for _ in range(num_batches)])


def _take_steps(training, batches, state=None):
  """Returns the states, the first one included, and the scalars of steps."""
  states = [training.builder.create() if state is None else state]
  rows = []
  for batch in batches:
    images = partitioning.shard_batch(batch, training.mesh)
    state, scalars = training.step(states[-1], images)
    states.append(state)
    rows.append(jax.device_get(scalars))
  return [jax.device_get(state) for state in states], rows


def _leaves(tree):
  """Path to array."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
      for path, x in flat
  }


@pytest.fixture(scope='module')
def training():
  """The debug config's, on one device."""
  return _build(_load_config())


# Compiles the step for the tests of this file.
@pytest.mark.fast_limit(20)
def test_the_first_steps_give_the_golden_numbers(training):
  _, rows = _take_steps(training, _images(2))
  for step, (row, golden) in enumerate(zip(rows, _GOLDEN, strict=True)):
    actual = {name: float(x) for name, x in row.items()}
    assert actual == pytest.approx(golden, rel=1e-4), (
        f'Step {step + 1} of configs/debug.py gives other numbers. If the'
        ' change was meant, put these into _GOLDEN and say in the commit why'
        f' they moved:\n{actual}'
    )


def test_four_steps_are_resumed_bit_for_bit(training, tmp_path):
  config = _load_config()
  dataset = data.build_dataset(config.data, split='train', seed=0)

  def train(state, iterator):
    """Takes two steps."""
    for _ in range(2):
      images = partitioning.shard_batch(next(iterator)['image'], training.mesh)
      state, scalars = training.step(state, images)
    return state, scalars

  iterator = dataset.iterator()
  state, _ = train(training.builder.create(), iterator)
  with contextlib.closing(checkpoints.Checkpointer(tmp_path)) as checkpointer:
    checkpointer.save(2, state, {'iterator': iterator.get_state()})
  expected = train(state, iterator)
  with contextlib.closing(checkpoints.Checkpointer(tmp_path)) as checkpointer:
    restored = checkpointer.restore_newest(lambda _: training.builder.abstract)
  iterator = dataset.iterator()
  iterator.set_state(restored.record['iterator'])
  chex.assert_trees_all_equal(train(restored.state, iterator), expected)
  assert int(expected[0].step) == 4


@pytest.mark.fast_limit(20)
def test_eight_devices_take_the_same_steps(training):
  config = _load_config(partitioning__fsdp_min_size=2**6)
  eight = _build(config, mesh=(2, 4))
  shards = eight.builder.create().params['encoder']['patches'][
      'kernel'
  ].addressable_shards
  assert shards[0].data.size * 4 == 16 * 48
  (states, rows), (expected, expected_rows) = (
      _take_steps(x, _images(2)) for x in (eight, training)
  )
  for row, expected_row in zip(rows, expected_rows, strict=True):
    for name, value in expected_row.items():
      np.testing.assert_allclose(row[name], value, rtol=1e-4, err_msg=name)
  for path, value in _leaves(expected[-1].params).items():
    if not path.endswith(_WITHOUT_EFFECT):
      np.testing.assert_allclose(
          _leaves(states[-1].params)[path], value, rtol=0, atol=1e-4,
          err_msg=path,
      )


@pytest.mark.slow
def test_every_parameter_moves_unless_it_is_frozen():
  config = _load_config(
      optim__frozen=('encoder/patches/.*', '.*/pixels/bias'),
      losses__distillation_weight=0.5,
  )
  (first, _, last), rows = _take_steps(_build(config), _images(2))
  # The teacher is the encoder at the start.
  assert rows[0]['distillation_loss'] < 1e-12
  assert rows[1]['distillation_loss'] > 1e-9
  before, after = _leaves(first.params), _leaves(last.params)
  average = _leaves(last.ema_params)
  for path, value in before.items():
    assert np.any(after[path] != value), path
    assert np.any(average[path] != value), path
  frozen = _leaves(first.frozen_params)
  assert set(frozen) == {
      'encoder/patches/kernel', 'encoder/patches/bias', 'decoder/pixels/bias',
  }
  for path, value in _leaves(last.frozen_params).items():
    assert value.tobytes() == frozen[path].tobytes(), path
  evaluated = _leaves(last.eval_variables['params'])
  assert set(evaluated) == set(before) | set(frozen)
  # Frozen parameters are there once: no moments, no average, no gradient.
  for tree in (last.opt_state, last.ema_params):
    assert not any('patches/' in path for path in _leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lfq', 'simvq', 'vq'])
def test_every_quantizer_trains_by_its_name(name):
  config = _load_config()
  config.model.quantizer.name = name
  (first, _, last), rows = _take_steps(_build(config), _images(2))
  assert all(row['invalid_tokens'] == 0 for row in rows)
  assert all(np.isfinite(row['loss']) for row in rows)
  before, after = _leaves(first.params), _leaves(last.params)
  for path, value in before.items():
    assert np.any(after[path] != value), path
  before, after = (_leaves(state.model_state) for state in (first, last))
  moving = {path for path in before if np.any(after[path] != before[path])}
  expected = {'entries', 'sums', 'counts', 'step'} if name == 'vq' else set()
  assert {path.split('/')[-1] for path in moving} == expected
  assert any('entries' in path for path in before) == (
      name in ('vq', 'simvq')
  )


@pytest.mark.slow
@pytest.mark.parametrize(
    ('projector_in', 'projector_out'),
    [
        ('mlp', 'fourier'),
        ('attention', 'levels'),
        ('none', 'none'),
    ],
)
def test_every_leaf_of_projectors_gets_a_gradient_and_moves(
    projector_in, projector_out
):
  config = _load_config()
  config.model.projector_in.name = projector_in
  config.model.projector_in.mlp.width = 16
  config.model.projector_in.attention.update(
      width=16, depth=2, num_heads=2, mlp_dim=20
  )
  config.model.projector_out.name = projector_out
  if projector_in == 'none':
    config.model.quantizer.name = 'lfq'
    config.model.quantizer.lfq.num_bits = config.model.encoder.width
  # Plain descent moves nothing that has no gradient, as weight decay would.
  training = _build(config, optimizer=optax.sgd(1.0))
  (first, last), (row,) = _take_steps(training, _images(1))
  assert np.isfinite(row['loss'])
  before, after = _leaves(first.params), _leaves(last.params)
  parts = {path.split('/')[0] for path in before}
  assert ('projector_in' in parts) == (projector_in != 'none')
  assert ('projector_out' in parts) == (projector_out != 'none')
  for path, value in before.items():
    if path.startswith('projector'):
      axes = tuple(range(1, value.ndim)) if '/blocks/' in path else None
      moved = np.max(np.abs(after[path] - value), axis=axes)
      assert np.all(moved > 1e-7), path
  # Frequencies are no parameters, and nothing moves them.
  constants = _leaves(first.model_state.get('constants', {}))
  assert bool(constants) == (projector_out == 'fourier')
  for path, value in _leaves(last.model_state.get('constants', {})).items():
    np.testing.assert_array_equal(value, constants[path])


@pytest.mark.slow
def test_what_quantizers_draw_follows_seed_and_step():
  config = _load_config()
  config.model.quantizer.fsq.noise = 0.5
  training = _build(config)
  state = training.builder.create()
  (batch,) = _images(1)

  def loss(**fields):
    _, (row,) = _take_steps(training, [batch], state.replace(**fields))
    return row['reconstruction_loss']

  assert loss() == loss()
  assert loss() != loss(step=state.step + 1)
  (batch,) = np.repeat(_images(1), 2, axis=1)  # Parts draw for themselves.
  config.optim.accumulation_steps = 2
  config.data.batch_size = 16
  training = _build(config)
  assert loss() != pytest.approx(loss(step=state.step + 1), rel=1e-6)


@pytest.mark.slow
def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
  # With plain gradient descent of rate 1 parameters move by the gradient.
  results = []
  for num_parts in (1, 4):
    config = _load_config(
        optim__accumulation_steps=num_parts, optim__clip_norm=0.0
    )
    training = _build(config, mesh=(2, 1), optimizer=optax.sgd(1.0))
    states, (row,) = _take_steps(training, _images(1))
    results.append((states, row))
  ((first, whole), row), ((_, parts), row_of_parts) = results
  chex.assert_trees_all_close(row_of_parts, row, rtol=1e-5)
  chex.assert_trees_all_close(parts.params, whole.params, rtol=0, atol=1e-6)
  moved = jax.tree.map(
      lambda x, y: np.max(np.abs(x - y)), first.params, whole.params
  )
  assert max(jax.tree.leaves(moved)) > 0.01


class _Poisoned:
  """A model that NaN comes out of, or its gradient, for white batches."""

  def __init__(self, model: nn.Module, quantity: str):
    self._model = model
    self._quantity = quantity

  def apply(self, variables, images, **kwargs):
    output, state = self._model.apply(variables, images, **kwargs)
    white = jnp.all(images > 0.999)
    total = jnp.sum(output.reconstructions)
    if self._quantity == 'loss':
      poison = jnp.where(white, jnp.nan, 0)
    else:  # The root of 0, which has an infinite slope.
      poison = jnp.where(white, jnp.sqrt(jnp.where(white, total * 0, 1)), 0)
    return (
        output._replace(reconstructions=output.reconstructions + poison),
        state,
    )


@pytest.mark.slow
@pytest.mark.parametrize('quantity', ['loss', 'gradient_norm'])
def test_a_step_that_is_not_finite_leaves_no_trace(quantity):
  config = _load_config()
  config.model.projector_in.name = 'standardized'  # With running averages.
  training = _build(config, wrap=lambda model: _Poisoned(model, quantity))
  batches = _images(2)
  white = np.full_like(batches[0], 255)
  good, good_rows = _take_steps(training, batches)
  states, rows = _take_steps(
      training, [batches[0], white, white, batches[1]]
  )
  assert [bool(np.isfinite(row[quantity])) for row in rows] == [
      True, False, False, True,
  ]
  for path, value in _leaves(states[1].model_state).items():
    assert np.all(value != _leaves(states[0].model_state)[path]), path
  if quantity == 'gradient_norm':
    assert np.isfinite([row['loss'] for row in rows]).all()
  for state in states[2:4]:
    chex.assert_trees_all_equal(
        state.replace(step=0, bad_steps=0, skipped_steps=0),
        states[1].replace(step=0, bad_steps=0, skipped_steps=0),
    )
  counters = [(int(s.step), int(s.bad_steps), int(s.skipped_steps))
              for s in states]
  assert counters == [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 0, 2)]
  assert [int(row['bad_steps']) for row in rows] == [0, 1, 2, 0]
  # What follows is as if the bad steps had not been, the averages, the count
  # of the optimizer and the learning rate included.
  chex.assert_trees_all_equal(
      states[-1].replace(step=0, skipped_steps=0),
      good[-1].replace(step=0, skipped_steps=0),
  )
  assert rows[-1]['learning_rate'] == good_rows[-1]['learning_rate']


@pytest.mark.slow
def test_the_average_follows_its_formula():
  decay = 0.15  # Below (1 + n) / (10 + n) from the second update on.
  training = _build(_load_config(optim__ema_decay=decay))
  states, _ = _take_steps(training, _images(3))
  average = _leaves(states[0].params)
  for n, state in enumerate(states[1:]):
    d = min(decay, (1 + n) / (10 + n))
    params = _leaves(state.params)
    average = {
        path: d * value.astype(np.float64) + (1 - d) * params[path]
        for path, value in average.items()
    }
    chex.assert_trees_all_close(
        _leaves(state.ema_params), average, rtol=0, atol=1e-6
    )


def test_the_learning_rate_is_reported(training):
  config = _load_config()
  _, rows = _take_steps(training, _images(4))
  schedule = optim.build_schedule(config.optim, config.train.num_steps)
  expected = [float(schedule(step)) for step in range(4)]
  np.testing.assert_allclose(
      [row['learning_rate'] for row in rows], expected, rtol=1e-6
  )
  assert len(set(expected)) >= 3


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_images_that_are_not_uint8_are_refused(training, dtype):
  with pytest.raises(ValueError, match=f'uint8 images, not {dtype.__name__}'):
    training.step(training.builder.abstract, _images(1)[0].astype(dtype))
