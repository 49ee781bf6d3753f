"""Tests of adversarial training: gradients apart, starts, devices, numbers."""

import functools
import pathlib
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from fsq_jax import adversarial as adversarial_lib
from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax.adversarial import adversary as adversaries
from fsq_jax.adversarial import builder as adversary_builder
from fsq_jax.models import layers
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step

_DEBUG = pathlib.Path(__file__).parents[2] / 'configs' / 'debug.py'
_DINO = pathlib.Path(__file__).parents[1] / 'testdata' / 'encoders' / 'dino'
# Small, with each kind of loss.
_ADVERSARIAL = {
    'discriminator.name': 'patch',
    # Of the hinge loss the last bias has no gradient at first.
    'discriminator.loss': 'non_saturating',
    'discriminator.patch.channels': 32,
    'discriminator.patch.num_stages': 1,
    'discriminator.optim.learning_rate': 1e-2,
    'losses.adversarial.weight': 2.0,
    # `_Distance` takes the place of its network.
    'losses.perceptual.name': 'vit',
    'losses.perceptual.checkpoint': 'nowhere',
    'losses.perceptual.weight': 0.5,
    'optim.clip_norm': 0.0,
}
_START = {
    'discriminator.start_step': 1,
    'losses.adversarial.start_step': 2,
    'losses.adversarial.ramp_steps': 2,
}
_EVERYTHING = {
    'discriminator.start_step': 1,
    'discriminator.r1_weight': 0.1,
    'discriminator.r1_every_steps': 2,
    'discriminator.lecam_weight': 0.1,
    'discriminator.augment_probability': 0.7,
    'discriminator.uint8_fakes': True,
    'losses.adversarial.start_step': 1,
    'losses.adversarial.weight': 0.1,
    'losses.adversarial.weighting': 'adaptive',
}


class _Distance(nn.Module):
  """Stands for a perceptual network: differences of neighbouring columns."""

  @nn.compact
  def __call__(self, images, others):
    scale = self.param('scale', nn.initializers.ones, ())
    x = scale * jnp.diff(images - others, axis=2)
    return jnp.mean(x**2, axis=(1, 2, 3))


_NETWORKS = {'perceptual': {'params': {'scale': jnp.float32(2)}}}


class _Training(NamedTuple):
  builder: train_state.StateBuilder
  mesh: jax.sharding.Mesh
  step: Any


def _load_config(**fields):
  config = configuration.load_config(_DEBUG)
  config.update_from_flattened_dict(_ADVERSARIAL | fields)
  configuration.check_config(config)
  return config


def _build(text, mesh=(1, 1), learning_rate=1.0):
  """What the config of that JSON trains with, all on those devices."""
  config = configuration.config_from_json(text)
  num_devices = mesh[0] * mesh[1]
  mesh = partitioning.create_mesh(
      {'data': mesh[0], 'fsdp': mesh[1]}, jax.devices()[:num_devices]
  )
  model = models.build_autoencoder(config.model, config.data.image_size)
  # Plain descent: what moves is what has a gradient, by as much.
  optimizer = optax.sgd(learning_rate)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  has_perceptual = config.losses.perceptual.name != 'none'
  whole = partitioning.replicated(mesh)
  step = jax.jit(
      train_step.build_train_step(
          model, optimizer, config, _Distance() if has_perceptual else None
      ),
      in_shardings=(
          builder.shardings, partitioning.batch_sharding(mesh), whole
      ),
      out_shardings=(builder.shardings, whole),
  )
  return _Training(builder, mesh, step)


_build_once = functools.cache(_build)


class _Blocks(nn.Module):
  """A discriminator with attention: logits [B, 6]."""

  frozen_parameters = ()

  @nn.compact
  def __call__(self, images, *, train=False):
    tokens = jnp.reshape(images, (len(images), 6, 16))
    blocks = layers.Transformer(1, 2, 16, jnp.bfloat16, 'blocks', 1)
    return jnp.sum(blocks(tokens).astype(jnp.float32), axis=-1)


@pytest.mark.slow
def test_r1_differentiates_attention_twice(interpreted_kernels):
  config = _load_config(**{
      'discriminator.r1_weight': 0.5, 'discriminator.r1_every_steps': 1,
  })
  config.data.image_size = (4, 8)
  adversary = adversaries.Adversary(
      config, module=_Blocks(), optimizer=optax.sgd(1.0)
  )

  @jax.jit
  def penalize(state, images):
    return adversary.losses_and_gradients(
        state, {}, images, images, key=jax.random.key(2), step=jnp.int32(0)
    )

  images = jax.random.normal(jax.random.key(0), (4, 4, 8, 3))
  state = jax.jit(adversary.init)(jax.random.key(1))
  expected = penalize(state, images).scalars
  mesh = partitioning.create_mesh({'data': 2, 'fsdp': 1}, jax.devices()[:2])
  images = jax.device_put(images, partitioning.batch_sharding(mesh))
  assert 'forward_attention' in str(jax.make_jaxpr(penalize)(state, images))
  output = penalize(state, images)
  assert output.scalars['r1_penalty'] > 0
  np.testing.assert_allclose(
      output.scalars['r1_penalty'], expected['r1_penalty'], rtol=2**-6
  )
  np.testing.assert_allclose(
      output.scalars['real_logits'], expected['real_logits'], atol=0.1
  )
  assert any(np.any(x) for x in jax.tree.leaves(output.gradients))


@functools.cache
def _images(num_batches):
  config = _load_config()
  iterator = data.build_dataset(config.data, split='train', seed=0).iterator()
  return np.stack([next(iterator)['image'] for _ in range(num_batches)])


def _floats(num_batches):
  return jnp.asarray(np.float32(_images(num_batches)) / 127.5 - 1)


def _take_steps(config, num_steps, *options):
  """Returns the states, the first one included, and the scalars of steps."""
  training = _build_once(configuration.config_to_json(config), *options)
  state = training.builder.create()
  states, rows = [jax.device_get(state)], []
  for batch in _images(num_steps):
    images = partitioning.shard_batch(batch, training.mesh)
    state, scalars = training.step(state, images, _NETWORKS)
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


def _assert_close(tree, expected, *, rtol, atol):
  tree, expected = _leaves(tree), _leaves(expected)
  assert tree.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(
        tree[name], value, rtol=rtol, atol=atol, err_msg=name
    )


@functools.cache
def _plain():
  return _take_steps(_load_config(), 2)


@functools.cache
def _with_another_decoders_loss():
  """One step in which all that the decoder learns is something else."""
  config = _load_config(**{
      'losses.adversarial.weight': 5.0,
      'losses.adversarial.loss': 'non_saturating',
      'losses.adversarial.weighting': 'adaptive',
      'losses.quantizer_weight': 0.0,
  })
  return _take_steps(config, 1)


def _image_losses(params, state):
  """Those of the first batch: of pixels, of `_Distance`, and the quantizer's.

  The fourth are the logits of the reconstructions.
  """
  config = _load_config()
  model = models.build_autoencoder(config.model, config.data.image_size)
  images = _floats(1)[0]
  output = model.apply({'params': params, **state.model_state}, images)
  difference = output.reconstructions - images
  columns = difference[:, :, 1:] - difference[:, :, :-1]
  logits = adversarial_lib.build_discriminator(config.discriminator).apply(
      {'params': state.adversary.params}, output.reconstructions
  )
  return (
      jnp.mean(difference**2), 4 * jnp.mean(columns**2),
      output.quantizer_loss, logits,
  )


@pytest.mark.slow
def test_both_networks_move_and_every_loss_is_reported():
  (first, _, last), rows = _plain()
  _assert_all_differ(first.params, last.params)
  _assert_all_differ(first.adversary.params, last.adversary.params)
  for row in rows:
    assert row['loss'] == pytest.approx(
        row['reconstruction_loss']
        + 0.5 * row['perceptual_loss']
        + row['quantizer_loss']
        + row['adversarial_weight'] * row['adversarial_loss'],
        rel=1e-6,
    )
    assert row['adversarial_loss'] == pytest.approx(-row['fake_logits'])
    assert row['adversarial_weight'] == 2
    assert row['discriminator_gradient_norm'] > 0
    assert row['skipped_steps'] == 0


@pytest.mark.slow
def test_the_autoencoders_gradient_is_that_of_all_its_losses():
  (first, second, _), (row, _) = _plain()

  def total(params):
    pixels, columns, quantizer, logits = _image_losses(params, first)
    return pixels + 0.5 * columns + quantizer - 2 * jnp.mean(logits)

  loss, gradients = jax.jit(jax.value_and_grad(total))(first.params)
  assert row['loss'] == pytest.approx(float(loss), rel=1e-5)
  moved = jax.tree.map(np.subtract, first.params, second.params)
  # Descent rounds what moves to digits of the parameters, about 1 large.
  _assert_close(moved, gradients, rtol=1e-3, atol=5e-7)


@pytest.mark.slow
def test_the_decoders_loss_moves_no_discriminator():
  (_, other), _ = _with_another_decoders_loss()
  (_, plain, _), _ = _plain()
  # Two programs, which may round differently.
  _assert_close(other.adversary, plain.adversary, rtol=1e-5, atol=1e-5)
  _assert_all_differ(other.params['decoder'], plain.params['decoder'])


@pytest.mark.slow
def test_the_discriminators_loss_moves_no_autoencoder():
  config = _load_config(**{
      'discriminator.loss': 'hinge',
      'discriminator.r1_weight': 10.0,
      'discriminator.r1_every_steps': 1,
      'discriminator.lecam_weight': 10.0,
  })
  (_, other), _ = _take_steps(config, 1)
  (_, plain, _), _ = _plain()
  _assert_close(other.params, plain.params, rtol=1e-5, atol=1e-6)
  first, second = (
      optax.tree.get(x.adversary.opt_state, 'mu') for x in (other, plain)
  )
  _assert_all_differ(first, second)


@pytest.mark.slow
def test_gradients_are_those_of_losses_that_are_written_down():
  config = _load_config(**{
      'discriminator.lecam_weight': 0.5,
      'discriminator.r1_weight': 0.25,
      'discriminator.r1_every_steps': 2,
  })
  adversary = adversary_builder.build_adversary(
      config, optim.build_discriminator_optimizer(config)
  )
  discriminator = adversarial_lib.build_discriminator(config.discriminator)
  state = jax.jit(adversary.init)(jax.random.key(0))
  state = state.replace(
      average_logits={'real': jnp.float32(0.3), 'fake': jnp.float32(-0.2)}
  )
  images, fakes = _floats(2)
  compute = jax.jit(
      lambda step: adversary.losses_and_gradients(
          state, {}, images, fakes, key=jax.random.key(1), step=step
      )
  )

  def logits(params, x):
    return discriminator.apply({'params': params}, x)

  def discriminator_loss(params):
    real, fake = logits(params, images), logits(params, fakes)
    lecam = (
        jax.nn.relu(real.mean() + 0.2) ** 2
        + jax.nn.relu(0.3 - fake.mean()) ** 2
    )
    entropy = jnp.log1p(jnp.exp(-real)).mean() + jnp.log1p(jnp.exp(fake)).mean()
    return entropy + 0.5 * lecam

  def penalty(params):
    slope = jax.vmap(jax.grad(lambda x: logits(params, x[None]).sum()))(images)
    return jnp.mean(jnp.sum(slope**2, axis=(1, 2, 3)))

  @jax.jit
  def expect(params):
    return (
        jax.value_and_grad(discriminator_loss)(params),
        jax.value_and_grad(penalty)(params),
        jax.grad(lambda x: -logits(params, x).mean())(fakes),
        logits(params, images).mean(),
        logits(params, fakes).mean(),
    )

  (loss, gradients), (r1, r1_gradients), at_images, real, fake = expect(
      state.params
  )
  without, output = compute(jnp.int32(2)), compute(jnp.int32(3))
  _assert_close(without.gradients, gradients, rtol=1e-4, atol=1e-6)
  assert without.scalars['r1_penalty'] == 0
  # In one of two steps, twice as much.
  _assert_close(
      output.gradients,
      jax.tree.map(lambda x, y: x + 2 * 0.25 * y, gradients, r1_gradients),
      rtol=1e-4, atol=1e-6,
  )
  np.testing.assert_allclose(output.at_images, at_images, rtol=1e-4, atol=1e-8)
  scalars = {
      'real_logits': real, 'fake_logits': fake, 'discriminator_loss': loss,
      'adversarial_loss': -fake, 'r1_penalty': r1,
  }
  for name, value in scalars.items():
    np.testing.assert_allclose(
        output.scalars[name], value, rtol=1e-5, err_msg=name
    )
  averages = {
      'real': 0.999 * 0.3 + 0.001 * real, 'fake': -0.999 * 0.2 + 0.001 * fake
  }
  _assert_close(output.state.average_logits, averages, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_fakes_are_rounded_and_drawn_from_other_keys_than_images():
  config = _load_config(**{
      'discriminator.augment_probability': 1.0,
      'discriminator.uint8_fakes': True,
  })
  adversary = adversary_builder.build_adversary(
      config, optim.build_discriminator_optimizer(config)
  )
  state = jax.jit(adversary.init)(jax.random.key(0))
  images, fakes = _floats(2)
  fakes = 1.2 * fakes + 0.003  # Beyond [-1, 1] and between the levels.
  compute = jax.jit(
      lambda fakes, key: adversary.losses_and_gradients(
          state, {}, images, fakes, key=jax.random.key(key), step=jnp.int32(0)
      )
  )
  rounded = np.rint((np.clip(np.float64(fakes), -1, 1) + 1) * 127.5) / 127.5 - 1
  output, expected = compute(fakes, 0), compute(jnp.float32(rounded), 0)
  assert output.scalars['fake_logits'] == pytest.approx(
      float(expected.scalars['fake_logits']), rel=1e-6
  )
  # The gradient goes through rounding and clipping as if they were not there.
  np.testing.assert_allclose(
      output.at_images, expected.at_images, rtol=1e-4, atol=1e-9
  )
  same, again = compute(images, 0), compute(images, 1)
  assert same.scalars['real_logits'] != same.scalars['fake_logits']
  assert same.scalars['real_logits'] == output.scalars['real_logits']
  assert same.scalars['real_logits'] != again.scalars['real_logits']


@pytest.mark.slow
def test_spectral_norms_improve_once_a_step_and_a_backbone_stays_out():
  config = _load_config(**{
      'discriminator.name': 'dino',
      'discriminator.dino.checkpoint': str(_DINO),
      'discriminator.dino.architecture': (
          'dino(width=12, depth=2, num_heads=3, mlp_dim=20, patch_size=4)'
      ),
      'discriminator.dino.image_size': (12, 12),
      'discriminator.dino.blocks': (0,),
      'discriminator.dino.kernel_size': 3,
  })
  discriminator = adversarial_lib.build_discriminator(config.discriminator)
  backbone = adversarial_lib.load_discriminator_backbone(_DINO, discriminator)
  adversary = adversary_builder.build_adversary(
      config, optim.build_discriminator_optimizer(config)
  )
  state = jax.jit(adversary.init)(jax.random.key(0))
  assert not any('backbone' in name for name in _leaves(state))
  images, fakes = _floats(2)
  output = jax.jit(
      lambda state, backbone: adversary.losses_and_gradients(
          state, backbone, images, fakes, key=jax.random.key(1),
          step=jnp.int32(0),
      )
  )(state, {'backbone': backbone})
  assert jax.tree.structure(output.gradients) == jax.tree.structure(
      state.params
  )
  for name, kernel in _leaves(state.params).items():
    if not name.endswith('kernel'):
      continue
    head, layer, _ = name.split('/')
    u, v = (
        np.float64(output.state.model_state['spectral_norm'][head][layer][x])
        for x in 'uv'
    )
    before = state.model_state['spectral_norm'][head][layer]['u']
    matrix = np.float64(kernel).reshape(-1, kernel.shape[-1])
    product = matrix @ np.float64(before)
    np.testing.assert_allclose(v, product / np.linalg.norm(product), atol=1e-5)
    product = matrix.T @ v
    np.testing.assert_allclose(u, product / np.linalg.norm(product), atol=1e-5)
  # Both sides use the vectors after the step.
  variables = {
      'params': {**state.params, 'backbone': backbone},
      **output.state.model_state,
  }
  logits = jax.jit(discriminator.apply)
  for name, x in (('real_logits', images), ('fake_logits', fakes)):
    assert output.scalars[name] == pytest.approx(
        float(logits(variables, x).mean()), rel=1e-4, abs=1e-6
    )


@pytest.mark.slow
def test_nothing_is_adversarial_before_its_start():
  # Slowly, so that nothing is so large that steps are lost in its rounding.
  options = (1, 1), 0.1
  states, rows = _take_steps(_load_config(**_START), 5, *options)
  config = _load_config(**{'discriminator.name': 'none'})
  without, _ = _take_steps(config, 3, *options)
  # Not the count of its schedule either.
  _assert_same(states[0].adversary, states[1].adversary)
  _assert_all_differ(states[1].adversary.params, states[2].adversary.params)
  # The first step of the ramp has no weight yet.
  for state, other in zip(states[:4], without, strict=True):
    _assert_close(state.params, other.params, rtol=1e-5, atol=1e-6)
  _assert_all_differ(states[4].params['decoder'], states[3].params['decoder'])
  weights = [row['adversarial_weight'] for row in rows]
  assert weights == [0, 0, 0, 1, 2]
  assert rows[0]['discriminator_gradient_norm'] == 0
  assert rows[0]['adversarial_loss'] == rows[0]['discriminator_loss'] == 0
  assert rows[1]['discriminator_gradient_norm'] > 0


@pytest.mark.slow
def test_the_adaptive_weight_is_the_ratio_at_the_last_layer():
  (first, _), (row,) = _with_another_decoders_loss()

  def losses(kernel):
    decoder = first.params['decoder']
    pixels = {**decoder['pixels'], 'kernel': kernel}
    params = {**first.params, 'decoder': {**decoder, 'pixels': pixels}}
    pixels, columns, _, logits = _image_losses(params, first)
    adversarial = jnp.mean(jnp.log1p(jnp.exp(-logits)))
    return jnp.stack([pixels + 0.5 * columns, adversarial])

  kernel = first.params['decoder']['pixels']['kernel']
  by_images, by_logits = jax.jit(jax.jacrev(losses))(kernel)
  expected = jnp.linalg.norm(by_images) / (jnp.linalg.norm(by_logits) + 1e-6)
  assert row['adversarial_weight'] == pytest.approx(
      5 * float(expected), rel=1e-4
  )


@pytest.mark.slow
def test_the_adaptive_weight_costs_no_second_backward_pass():
  flops = []
  for weighting in ('fixed', 'adaptive'):
    training = _build_once(
        configuration.config_to_json(
            _load_config(**{'losses.adversarial.weighting': weighting})
        )
    )
    images = jax.ShapeDtypeStruct(_images(1)[0].shape, np.uint8)
    lowered = training.step.lower(training.builder.abstract, images, _NETWORKS)
    flops.append(lowered.cost_analysis()['flops'])
  assert 1 < flops[1] / flops[0] < 1.05


def test_the_adaptive_weight_needs_a_last_layer_that_trains():
  config = _load_config(**{
      'losses.adversarial.weighting': 'adaptive',
      'optim.frozen': ('decoder/pixels/.*',),
  })
  training = _build(configuration.config_to_json(config))
  images = jax.ShapeDtypeStruct((8, 16, 16, 3), np.uint8)
  with pytest.raises(ValueError, match='decoder/pixels/kernel'):
    training.step.lower(training.builder.abstract, images, _NETWORKS)


@pytest.mark.slow
def test_devices_do_not_change_what_is_learned():
  config = _load_config(**_EVERYTHING, **{'partitioning.fsdp_min_size': 16})
  # Little, since rounded pixels and codes jump.
  one, rows = _take_steps(config, 3, (1, 1), 0.1)
  many, other_rows = _take_steps(config, 3, (2, 4), 0.1)
  for row, other in zip(rows, other_rows, strict=True):
    assert row == pytest.approx(other, rel=1e-3, abs=1e-6)
  for tree, other in (
      (one[-1].params, many[-1].params),
      (one[-1].adversary.model_state, many[-1].adversary.model_state),
      (one[-1].adversary.average_logits, many[-1].adversary.average_logits),
  ):
    _assert_close(other, tree, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_every_step_draws_its_own_augmentations():
  config = _load_config(**_EVERYTHING, **{'partitioning.fsdp_min_size': 16})
  training = _build_once(configuration.config_to_json(config), (1, 1), 0.1)
  state = training.builder.create()
  images = partitioning.shard_batch(_images(1)[0], training.mesh)
  # Enough for one in which not all groups are left out.
  rows = [
      training.step(state.replace(step=jnp.int32(step)), images, _NETWORKS)[1]
      for step in (1, 2, 3, 4)
  ]
  assert len({float(row['real_logits']) for row in rows}) > 1
  assert float(rows[0]['r1_penalty']) > 0
  assert float(rows[1]['r1_penalty']) == 0


@pytest.mark.slow
def test_accumulated_parts_are_the_mean_of_both_gradients():
  config = _load_config(**{'optim.accumulation_steps': 2})
  (_, last), (row,) = _take_steps(config, 1)
  (_, whole, _), (whole_row, _) = _plain()
  for name in ('discriminator_loss', 'perceptual_loss', 'real_logits'):
    assert row[name] == pytest.approx(whole_row[name], rel=1e-5)
  _assert_close(last.params, whole.params, rtol=1e-3, atol=1e-5)
  moments, expected = (
      optax.tree.get(x.adversary.opt_state, 'mu') for x in (last, whole)
  )
  _assert_close(moments, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_bad_step_leaves_both_networks_as_they_were(monkeypatch):
  """Although the decoder's losses and gradients are finite."""
  compute = adversaries.Adversary.losses_and_gradients

  def compute_badly(self, *args, **options):
    output = compute(self, *args, **options)
    first, *others = jax.tree.leaves(output.gradients)
    gradients = jax.tree.unflatten(
        jax.tree.structure(output.gradients), [first * jnp.nan, *others]
    )
    return output._replace(gradients=gradients)

  monkeypatch.setattr(
      adversaries.Adversary, 'losses_and_gradients', compute_badly
  )
  training = _build(configuration.config_to_json(_load_config()))
  before = jax.device_get(training.builder.create())
  images = partitioning.shard_batch(_images(1)[0], training.mesh)
  after, scalars = training.step(before, images, _NETWORKS)
  assert np.isfinite(scalars['loss'])
  assert np.isfinite(scalars['gradient_norm'])
  assert np.isnan(scalars['discriminator_gradient_norm'])
  assert scalars['skipped_steps'] == 1
  after = jax.device_get(after)
  assert after.step == 1
  _assert_same(
      before.replace(step=0, bad_steps=0, skipped_steps=0),
      after.replace(step=0, bad_steps=0, skipped_steps=0),
  )
