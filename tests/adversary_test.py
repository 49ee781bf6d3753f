"""Tests of adversarial training: gradients apart, starts, devices, numbers."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from fsq_jax import adversarial_losses
from fsq_jax import adversary as adversaries
from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax import optim
from fsq_jax import partitioning
from fsq_jax import train_state
from fsq_jax import train_step

_DEBUG = pathlib.Path(__file__).parents[1] / 'configs' / 'debug.py'
# Small, and all of it at once.
_ADVERSARIAL = {
    'discriminator.name': 'patch',
    # Of the hinge loss the last bias has no gradient at first.
    'discriminator.loss': 'non_saturating',
    'discriminator.patch.channels': 32,
    'discriminator.patch.num_stages': 1,
    'discriminator.optim.learning_rate': 1e-2,
    'optim.clip_norm': 0.0,
}
_EVERYTHING = {
    'discriminator.r1_weight': 0.1,
    'discriminator.r1_every_steps': 2,
    'discriminator.lecam_weight': 0.1,
    'discriminator.augment_probability': 0.7,
    'discriminator.uint8_fakes': True,
    'losses.adversarial.weighting': 'adaptive',
}


class _Training(NamedTuple):
  builder: train_state.StateBuilder
  mesh: jax.sharding.Mesh
  step: Any


def _load_config(**fields):
  config = configuration.load_config(_DEBUG)
  config.update_from_flattened_dict(_ADVERSARIAL | fields)
  configuration.check_config(config)
  return config


def _build(config, *, mesh=(1, 1), learning_rate=1.0):
  num_devices = mesh[0] * mesh[1]
  mesh = partitioning.create_mesh(
      {'data': mesh[0], 'fsdp': mesh[1]}, jax.devices()[:num_devices]
  )
  model = models.build_autoencoder(config.model, config.data.image_size)
  # Plain descent: what moves is what has a gradient, by as much.
  optimizer = optax.sgd(learning_rate)
  builder = train_state.StateBuilder(config, model, optimizer, mesh)
  step = jax.jit(
      train_step.build_train_step(model, optimizer, config),
      in_shardings=(builder.shardings, partitioning.batch_sharding(mesh)),
      out_shardings=(builder.shardings, partitioning.replicated(mesh)),
  )
  return _Training(builder, mesh, step)


@functools.cache
def _images(num_batches):
  config = _load_config()
  iterator = data.build_dataset(config.data, split='train', seed=0).iterator()
  return np.stack([next(iterator)['image'] for _ in range(num_batches)])


def _take_steps(config, num_steps, **options):
  """Returns the states, the first one included, and the scalars of steps."""
  training = _build(config, **options)
  state = training.builder.create()
  states, rows = [jax.device_get(state)], []
  for batch in _images(num_steps):
    images = partitioning.shard_batch(batch, training.mesh)
    state, scalars = training.step(state, images)
    states.append(jax.device_get(state))
    rows.append({name: float(x) for name, x in scalars.items()})
  return states, rows


def _leaves(tree):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
      for path, x in flat
  }


def _assert_same(first, second):
  first, second = _leaves(first), _leaves(second)
  assert first.keys() == second.keys()
  for name, value in first.items():
    assert value.tobytes() == second[name].tobytes(), name


def _assert_all_differ(first, second):
  second = _leaves(second)
  for name, value in _leaves(first).items():
    assert np.any(value != second[name]), name


@functools.cache
def _plain(num_steps=2):
  return _take_steps(_load_config(), num_steps)


def test_both_networks_move_and_every_loss_is_reported():
  (first, _, last), rows = _plain()
  _assert_all_differ(first.params, last.params)
  _assert_all_differ(first.adversary.params, last.adversary.params)
  for row in rows:
    assert row['loss'] == pytest.approx(
        row['reconstruction_loss']
        + row['quantizer_loss']
        + row['adversarial_weight'] * row['adversarial_loss'],
        rel=1e-6,
    )
    assert row['adversarial_loss'] == pytest.approx(-row['fake_logits'])
    assert row['discriminator_gradient_norm'] > 0
    assert row['skipped_steps'] == 0


def test_the_decoders_loss_moves_no_discriminator():
  for fields in (
      {'losses.adversarial.weight': 5.0},
      {'losses.adversarial.loss': 'non_saturating'},
      {'losses.adversarial.weighting': 'adaptive'},
  ):
    (_, other), _ = _take_steps(_load_config(**fields), 1)
    (_, plain, _), _ = _plain()
    _assert_same(other.adversary, plain.adversary)
    _assert_all_differ(
        other.params['decoder'], plain.params['decoder']
    )


def test_the_discriminators_loss_moves_no_autoencoder():
  for fields in (
      {'discriminator.loss': 'hinge'},
      {'discriminator.r1_weight': 10.0, 'discriminator.r1_every_steps': 1},
      {'discriminator.lecam_weight': 10.0},
  ):
    (_, other), _ = _take_steps(_load_config(**fields), 1)
    (_, plain, _), _ = _plain()
    _assert_same(other.params, plain.params)
    assert any(
        np.any(a != b)
        for a, b in zip(
            jax.tree.leaves(other.adversary.params),
            jax.tree.leaves(plain.adversary.params),
            strict=True,
        )
    ), fields


def test_gradients_are_those_of_losses_that_are_written_down():
  config = _load_config()
  config.discriminator.lecam_weight = 0.5
  adversary = adversaries.build_adversary(config)
  discriminator = models.build_discriminator(config.discriminator)
  state = jax.jit(adversary.init)(jax.random.key(0))
  state = state.replace(
      average_logits={'real': jnp.float32(0.3), 'fake': jnp.float32(-0.2)}
  )
  images, fakes = (
      jnp.asarray(train_step.to_float(jnp.asarray(x))) for x in _images(2)
  )
  verdict = jax.jit(
      lambda state, fakes: adversary.judge(
          state, {}, images, fakes, key=jax.random.key(1),
          step=jnp.int32(0),
      )
  )(state, fakes)

  def logits(params, x):
    return discriminator.apply({'params': params, **state.model_state}, x)

  def discriminator_loss(params):
    real, fake = logits(params, images), logits(params, fakes)
    lecam = (
        jax.nn.relu(real.mean() + 0.2) ** 2
        + jax.nn.relu(0.3 - fake.mean()) ** 2
    )
    entropy = jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()
    return entropy + 0.5 * lecam

  expected = jax.jit(jax.grad(discriminator_loss))(state.params)
  for name, value in _leaves(expected).items():
    np.testing.assert_allclose(
        _leaves(verdict.gradients)[name], value, rtol=1e-4, atol=1e-6
    )
  expected = jax.jit(jax.grad(lambda x: -logits(state.params, x).mean()))(fakes)
  np.testing.assert_allclose(verdict.at_images, expected, rtol=1e-4, atol=1e-8)
  np.testing.assert_allclose(
      verdict.state.average_logits['real'],
      0.999 * 0.3 + 0.001 * logits(state.params, images).mean(),
      rtol=1e-6,
  )


def test_r1_comes_every_few_steps_and_as_many_times():
  fields = {
      'discriminator.r1_weight': 0.5, 'discriminator.r1_every_steps': 2
  }
  states, rows = _take_steps(_load_config(**fields), 2)
  assert rows[0]['r1_penalty'] > 0
  assert rows[1]['r1_penalty'] == 0
  fields = {
      'discriminator.r1_weight': 1.0, 'discriminator.r1_every_steps': 1
  }
  others, _ = _take_steps(_load_config(**fields), 1)
  for name, value in _leaves(states[1].adversary.opt_state).items():
    np.testing.assert_allclose(
        value, _leaves(others[1].adversary.opt_state)[name], rtol=1e-3,
        atol=1e-6,
    )


def test_nothing_is_adversarial_before_its_start():
  config = _load_config(**{
      'discriminator.start_step': 1, 'losses.adversarial.start_step': 2,
      'losses.adversarial.ramp_steps': 2,
      'losses.adversarial.weighting': 'adaptive',
  })
  states, rows = _take_steps(config, 5)
  without, _ = _take_steps(_load_config(**{'discriminator.name': 'none'}), 2)
  _assert_same(states[0].adversary, states[1].adversary)
  _assert_all_differ(states[1].adversary.params, states[2].adversary.params)
  for state, other in zip(states[:3], without, strict=True):
    _assert_same(state.params, other.params)
  assert [row['adversarial_weight'] > 0 for row in rows] == (
      [False, False, False, True, True]
  )
  assert rows[0]['discriminator_gradient_norm'] == 0
  assert rows[1]['discriminator_gradient_norm'] > 0


def test_the_adaptive_weight_is_the_ratio_at_the_last_layer():
  config = _load_config(**{'losses.adversarial.weighting': 'adaptive'})
  config.losses.quantizer_weight = 0.0
  _, (row,) = _take_steps(config, 1)
  training = _build(config)
  state = training.builder.create()
  model = models.build_autoencoder(config.model, config.data.image_size)
  discriminator = models.build_discriminator(config.discriminator)
  images = train_step.to_float(jnp.asarray(_images(1)[0]))
  key = jax.random.fold_in(jax.random.key(config.seed), 0)

  def losses(kernel):
    params = jax.tree.map(lambda x: x, state.params)
    params['decoder']['pixels']['kernel'] = kernel
    output, _ = model.apply(
        {'params': params, **state.model_state}, images, train=True,
        mutable=list(state.model_state), rngs={'quantizer': key},
    )
    logits = discriminator.apply(
        {'params': state.adversary.params, **state.adversary.model_state},
        output.reconstructions,
    )
    mse = jnp.mean((output.reconstructions - images) ** 2)
    return jnp.stack([mse, -jnp.mean(logits)])

  kernel = state.params['decoder']['pixels']['kernel']
  by_mse, by_logits = jax.jit(jax.jacrev(losses))(kernel)
  expected = jnp.linalg.norm(by_mse) / (jnp.linalg.norm(by_logits) + 1e-6)
  assert row['adversarial_weight'] == pytest.approx(
      0.1 * float(expected), rel=1e-4
  )


def test_the_adaptive_weight_needs_a_last_layer_that_trains():
  config = _load_config(**{
      'losses.adversarial.weighting': 'adaptive',
      'optim.frozen': ('decoder/pixels/.*',),
  })
  with pytest.raises(ValueError, match='decoder/pixels/kernel'):
    _take_steps(config, 1)


@pytest.mark.parametrize('mesh', [(8, 1), (2, 4)])
def test_devices_do_not_change_what_is_learned(mesh):
  config = _load_config(**_EVERYTHING, **{'partitioning.fsdp_min_size': 16})
  # Little, since rounded pixels and codes jump.
  one, rows = _take_steps(config, 3, learning_rate=0.1)
  many, other_rows = _take_steps(config, 3, mesh=mesh, learning_rate=0.1)
  for row, other in zip(rows, other_rows, strict=True):
    assert row == pytest.approx(other, rel=1e-3, abs=1e-6)
  for tree, other in (
      (one[-1].params, many[-1].params),
      (one[-1].adversary.model_state, many[-1].adversary.model_state),
      (one[-1].adversary.average_logits, many[-1].adversary.average_logits),
  ):
    for name, value in _leaves(tree).items():
      np.testing.assert_allclose(
          value, _leaves(other)[name], rtol=1e-3, atol=1e-4, err_msg=name
      )


def test_accumulated_parts_are_the_mean_of_both_gradients():
  config = _load_config(**{'optim.accumulation_steps': 2})
  config.model.projector_in.name = 'linear'
  (first, last), (row,) = _take_steps(config, 1)
  (_, whole, _), (whole_row, _) = _plain()
  assert row['discriminator_loss'] == pytest.approx(
      whole_row['discriminator_loss'], rel=1e-5
  )
  for name, value in _leaves(whole.params).items():
    np.testing.assert_allclose(
        _leaves(last.params)[name], value, rtol=1e-3, atol=1e-5, err_msg=name
    )
  _assert_all_differ(first.adversary.params, last.adversary.params)


def test_a_bad_step_leaves_the_discriminator_as_it_was():
  config = _load_config()
  training = _build(config)
  state = training.builder.create()
  broken = jax.tree.map(lambda x: x, state.adversary.params)
  name = next(iter(broken))
  broken[name] = jax.tree.map(lambda x: x * jnp.nan, broken[name])
  state = state.replace(adversary=state.adversary.replace(params=broken))
  before = jax.device_get(state)
  images = partitioning.shard_batch(_images(1)[0], training.mesh)
  state, scalars = training.step(state, images)
  assert scalars['skipped_steps'] == 1
  _assert_same(before.params, jax.device_get(state).params)
  _assert_same(before.adversary, jax.device_get(state).adversary)


@pytest.fixture
def optimized():
  """Many steps are worth being compiled well."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.mark.usefixtures('optimized')
def test_a_discriminators_start_hardly_disturbs_the_reconstructions():
  """Reliability of GAN training: at most 20 % worse, within 200 steps."""
  start, num_steps = 60, 200
  config = _load_config(**{
      'discriminator.start_step': start,
      'losses.adversarial.start_step': start,
      'losses.adversarial.ramp_steps': 50,
      'losses.adversarial.weighting': 'adaptive',
      'train.num_steps': num_steps,
      'discriminator.optim.learning_rate': 1e-3,
  })
  config.data.batch_size = 8
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, num_steps)
  builder = train_state.StateBuilder(config, model, optimizer, mesh)
  step = jax.jit(
      train_step.build_train_step(model, optimizer, config), donate_argnums=0
  )
  iterator = data.build_dataset(config.data, split='train', seed=0).iterator()
  state, rows = builder.create(), []
  for _ in range(num_steps):
    images = partitioning.shard_batch(next(iterator)['image'], mesh)
    state, scalars = step(state, images)
    rows.append(scalars)
  losses = [float(row['reconstruction_loss']) for row in rows]
  before = np.mean(losses[start - 20 : start])
  after = np.convolve(losses[start:], np.ones(20) / 20, mode='valid')
  assert after.max() <= 1.2 * before
  assert float(rows[-1]['adversarial_weight']) > 0
  assert float(rows[-1]['skipped_steps']) == 0


def test_ramps_and_weights_are_those_of_the_config():
  config = _load_config(**{
      'losses.adversarial.weight': 0.3, 'losses.adversarial.ramp_steps': 4,
  })
  _, rows = _take_steps(config, 3)
  expected = [
      0.3 * float(adversarial_losses.ramp(step, 0, 4)) for step in range(3)
  ]
  assert [row['adversarial_weight'] for row in rows] == pytest.approx(expected)
