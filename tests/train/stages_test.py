"""Stage 1 trains around a frozen encoder, stage 2 the encoder by distillation.

The encoder of stage 2 is held to the latents that it had at its start.
"""

import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.models import pixels
from fsq_jax.report import report
from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import partitioning
from fsq_jax.train import initialization
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step

_DEBUG = pathlib.Path(__file__).parents[2] / 'configs' / 'debug.py'
_SIGLIP = pathlib.Path(__file__).parents[1] / 'testdata' / 'encoders' / 'siglip'
_FROZEN = {'optim.frozen': ('encoder/.*',)}
_DISTILLATION = {'losses.distillation_weight': 0.5}
# The loss is the distillation alone.
_NOTHING_ELSE = {
    'losses.reconstruction_weight': 0.0, 'losses.quantizer_weight': 0.0
}


class _Training(NamedTuple):
  """What a test trains with."""

  model: Any
  builder: train_state.StateBuilder
  mesh: jax.sharding.Mesh
  step: Any
  start: train_state.TrainState


def _load_config(*overrides):
  config = configuration.load_config(_DEBUG)
  config.data.image_size = (32, 32)
  config.data.eval_batch_size = 128
  config.model.encoder.name = 'pretrained'
  config.model.encoder.architecture = (
      'siglip(width=48, depth=3, num_heads=4, mlp_dim=160, patch_size=16)'
  )
  config.model.encoder.checkpoint = str(_SIGLIP)
  config.model.decoder.patch_size = 16
  config.partitioning.fsdp_min_size = 64
  config.optim.warmup_steps = 0
  config.optim.weight_decay = 0.0
  config.train.num_steps = 20
  config.train.log_every_steps = 1
  config.train.checkpoint_every_steps = 1
  config.train.eval_every_steps = 0
  for fields in overrides:
    config.update_from_flattened_dict(fields)
  return config


def _build(*overrides, mesh=(1, 1), optimizer=None):
  config = _load_config(*overrides)
  num_devices = mesh[0] * mesh[1]
  mesh = partitioning.create_mesh(
      {'data': mesh[0], 'fsdp': mesh[1]}, jax.devices()[:num_devices]
  )
  model = models.build_autoencoder(config.model, config.data.image_size)
  if optimizer is None:
    optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  step = jax.jit(
      train_step.build_train_step(model, optimizer, config),
      in_shardings=(builder.shardings, partitioning.batch_sharding(mesh)),
      out_shardings=(builder.shardings, partitioning.replicated(mesh)),
  )
  loaded = initialization.Initializer(config, model).load(
      builder.abstract_variables, mesh
  )
  return _Training(model, builder, mesh, step, builder.create(loaded))


def _images():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (8, 32, 32, 3), np.uint8)


def _take_step(training, state):
  images = partitioning.shard_batch(_images(), training.mesh)
  state, scalars = training.step(state, images)
  return state, jax.device_get(scalars)


def _perturb(state):
  """The state with another encoder, which has something to go back to."""
  rng = np.random.default_rng(1)

  def perturb(path, x):
    if not path.startswith('encoder/'):
      return x
    noise = rng.normal(0, 0.05, x.shape)
    return jax.device_put(np.float32(np.asarray(x) + noise), x.sharding)

  paths = parameter_paths.tree_paths(state.params)
  return state.replace(params=jax.tree.map(perturb, paths, state.params))


def _leaves(tree):
  """Path to array on the host."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
      for path, x in flat
  }


def _assert_same(tree, expected):
  """Bit for bit."""
  tree, expected = _leaves(tree), _leaves(expected)
  assert tree.keys() == expected.keys()
  for path, x in expected.items():
    assert tree[path].tobytes() == x.tobytes(), path


def _num_bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _encode(model, params):
  encode = jax.jit(lambda params, images: model.encoder.apply(
      {'params': params}, pixels.to_float(images)
  ))
  return np.float64(encode(params, _images()))


# One step.


@pytest.fixture(scope='module')
def stage2():
  """One device, all of the encoder trains."""
  return _build(_DISTILLATION, {
      'optim.learning_rate_factors': (('encoder/.*', 0.1),),
      'optim.ema_decay': 0.0,
  })


@pytest.mark.slow
def test_a_frozen_encoder_costs_its_parameters_and_nothing_else():
  frozen, trained = (_build(fields) for fields in (_FROZEN, {}))
  encoder = _num_bytes(trained.start.params['encoder'])
  state = frozen.start
  rest = _num_bytes(state.params)
  assert _num_bytes(trained.start.params) == encoder + rest
  assert _num_bytes(state.frozen_params) == encoder
  assert _num_bytes(state.ema_params) == rest
  assert _num_bytes(state.teacher_params) == 0
  # Two moments, and the counts of the optimizer and of its schedule.
  assert _num_bytes(state.opt_state) == 2 * rest + 2 * 4

  def measure(training):
    # Donated, as in training: outputs that need new memory could hide what
    # is temporary.
    step = jax.jit(training.step.__wrapped__, donate_argnums=0)
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8)
    compiled = step.lower(training.builder.abstract, images).compile()
    return compiled.memory_analysis()

  memory, memory_of_trained = measure(frozen), measure(trained)
  arguments = (
      memory_of_trained.argument_size_in_bytes - memory.argument_size_in_bytes
  )
  # Its average and two moments; aligned, each array by less than 64 bytes.
  num_arrays = len(jax.tree.leaves(state))
  assert arguments == pytest.approx(3 * encoder, abs=64 * num_arrays)
  # Its gradient, and what that needs of the forward pass.
  temporary = memory_of_trained.temp_size_in_bytes - memory.temp_size_in_bytes
  assert temporary > encoder


@pytest.mark.slow
def test_distillation_starts_at_zero(stage2):
  state, scalars = _take_step(stage2, stage2.start)
  assert scalars['distillation_loss'] < 1e-12
  _, scalars = _take_step(stage2, state)
  assert scalars['distillation_loss'] > 1e-8
  assert scalars['loss'] == pytest.approx(
      scalars['reconstruction_loss']
      + scalars['quantizer_loss']
      + 0.5 * scalars['distillation_loss'],
      rel=1e-6,
  )


@pytest.mark.slow
def test_distillation_is_the_distance_of_the_latents(stage2):
  state = _perturb(stage2.start)
  student, teacher = (
      _encode(stage2.model, x['encoder'])
      for x in (state.params, state.teacher_params)
  )
  _, scalars = _take_step(stage2, state)
  expected = np.mean(np.square(student - teacher))
  assert expected > 1e-3
  assert scalars['distillation_loss'] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_first_update_of_the_encoder_is_scaled(stage2):
  state, scalars = _take_step(stage2, stage2.start)
  before = _leaves(stage2.start.params)
  moved = {
      path: np.median(np.abs(x - before[path]))
      for path, x in _leaves(state.params).items()
      if path.endswith('kernel')
  }
  # Of Adam the first update is the learning rate, whatever the gradient.
  assert scalars['learning_rate'] == pytest.approx(1e-3)
  for path, x in moved.items():
    rate = 1e-4 if path.startswith('encoder/') else 1e-3
    assert x == pytest.approx(rate, rel=0.02), path
  assert 'encoder/blocks/mlp/in/kernel' in moved
  _assert_same(state.teacher_params, stage2.start.teacher_params)


@pytest.mark.parametrize('factor', [0.5, 1.0])
@pytest.mark.slow
def test_nonfinite_step_changes_only_the_counters(stage2, factor):
  scale = np.float32(np.nan if factor < 1 else 1)
  teacher = jax.tree.map(lambda x: x * scale, stage2.start.teacher_params)
  start = stage2.start.replace(teacher_params=teacher)
  state, scalars = _take_step(stage2, start)
  assert np.isnan(scalars['distillation_loss']) == (factor < 1)
  counters = {'step': 0, 'bad_steps': 0, 'skipped_steps': 0}
  if factor < 1:
    assert (int(state.step), int(state.bad_steps)) == (1, 1)
    _assert_same(state.replace(**counters), start.replace(**counters))
  else:
    before = _leaves(start.params)
    assert all(np.any(x != before[p]) for p, x in _leaves(state.params).items())


@pytest.mark.slow
def test_a_perturbed_encoder_goes_back_to_its_teacher():
  training = _build(
      _DISTILLATION, _NOTHING_ELSE, {'optim.learning_rate': 3e-3}
  )
  state = _perturb(training.start)
  losses = []
  for _ in range(20):
    state, scalars = _take_step(training, state)
    losses.append(scalars['distillation_loss'])
  assert losses[-1] < 0.2 * losses[0]
  _assert_same(state.teacher_params, training.start.teacher_params)
  # Nothing else has a gradient.
  before, after = _leaves(training.start.params), _leaves(state.params)
  moved = {p.split('/')[0] for p, x in after.items() if np.any(x != before[p])}
  assert moved == {'encoder'}


def _gradients(accumulation_steps=1, mesh=(1, 1)):
  """What plain descent of rate 1 moves a perturbed encoder's model by."""
  training = _build(
      _DISTILLATION,
      {
          'optim.clip_norm': 0.0,
          'optim.accumulation_steps': accumulation_steps,
      },
      mesh=mesh,
      optimizer=optax.sgd(1.0),
  )
  start = _perturb(training.start)
  state, scalars = _take_step(training, start)
  before = _leaves(start.params)
  gradients = {p: before[p] - x for p, x in _leaves(state.params).items()}
  return gradients, scalars


@pytest.mark.slow
def test_parts_and_devices_give_the_gradient_of_the_whole_batch():
  expected, expected_scalars = _gradients()
  gradients, scalars = _gradients(accumulation_steps=2, mesh=(2, 2))
  assert scalars['distillation_loss'] > 1e-3
  for name, x in expected_scalars.items():
    assert scalars[name] == pytest.approx(x, rel=1e-5), name
  for path, x in expected.items():
    np.testing.assert_allclose(
        gradients[path], x, rtol=1e-4, atol=2e-6, err_msg=path
    )


@pytest.mark.slow
def test_a_part_of_the_encoder_may_be_frozen():
  training = _build(
      _DISTILLATION, {'optim.frozen': ('encoder/(patches|positions).*',)}
  )
  start = training.start
  fixed = {'encoder/patches/kernel', 'encoder/patches/bias',
           'encoder/positions'}
  assert set(_leaves(start.frozen_params)) == fixed
  assert not fixed & set(_leaves(start.teacher_params))
  state, scalars = _take_step(training, start)
  assert scalars['distillation_loss'] < 1e-12
  state = _perturb(state)
  latents = [
      _encode(
          training.model,
          parameter_paths.merge_frozen(tree, start.frozen_params)['encoder'],
      )
      for tree in (state.params, start.teacher_params)
  ]
  state, scalars = _take_step(training, state)
  assert scalars['distillation_loss'] == pytest.approx(
      np.mean(np.square(latents[0] - latents[1])), rel=1e-4
  )
  _assert_same(state.frozen_params, start.frozen_params)
  _assert_same(state.teacher_params, start.teacher_params)


def test_distillation_to_a_frozen_encoder_is_refused():
  with pytest.raises(ValueError, match=r'distillation_weight .*optim\.frozen'):
    _build(_DISTILLATION, _FROZEN)


# Whole runs.


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Folders and last states of stage 1 and of stage 2, by their number."""
  folder = tmp_path_factory.mktemp('stages')
  configs = {
      1: _load_config(_FROZEN, {'train.num_steps': 3}),
      2: _load_config(_DISTILLATION, {
          'train.num_steps': 3,
          'train.init_from': str(folder / '1'),
          'model.encoder.checkpoint': '',
          'optim.learning_rate_factors': (('encoder/.*', 0.1),),
      }),
  }
  states = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, 'write_report', lambda *_: None)
    for number, config in configs.items():
      state = train.train_and_evaluate(config, folder / str(number))
      states[number] = jax.device_get(state)
  return folder, configs, states


@pytest.mark.slow
def test_stage_1_leaves_the_encoder_as_it_was_published(runs):
  folder, _, states = runs
  state = states[1]
  published = models.load_encoder(_SIGLIP, 32, final_affine=False).variables
  _assert_same(state.frozen_params, {'encoder': published['params']})
  assert state.teacher_params == {}
  for tree in (state.params, state.ema_params, state.opt_state):
    assert not any('encoder' in path for path in _leaves(tree))
  facts = json.loads((folder / '1' / workdirs.RUN).read_text())
  assert facts['num_frozen_parameters'] == sum(
      x.size for x in jax.tree.leaves(published)
  )
  rows = workdirs.read_metrics(folder / '1')
  assert not any('distillation_loss' in row for row in rows)


@pytest.mark.slow
def test_stage_2_trains_the_encoder_and_keeps_its_start(runs):
  folder, _, states = runs
  stage1, stage2 = states[1], states[2]
  _assert_same(stage2.teacher_params, stage1.frozen_params)
  assert stage2.frozen_params == {}
  before, after = (
      _leaves(x.eval_variables['params']) for x in (stage1, stage2)
  )
  assert before.keys() == after.keys()
  for path, x in before.items():
    assert np.any(after[path] != x), path
  rows = [
      row for row in workdirs.read_metrics(folder / '2')
      if row['split'] == 'train'
  ]
  losses = [row['distillation_loss'] for row in rows]
  assert len(losses) == 3
  assert losses[0] < 1e-12 < losses[1] < losses[2]
  facts = json.loads((folder / '2' / workdirs.RUN).read_text())
  assert facts['started_from'] == {
      'train.init_from': str(folder / '1'), 'step': 3
  }


@pytest.mark.slow
def test_stage_2_resumes_bit_for_bit_without_stage_1(
    runs, tmp_path, monkeypatch
):
  monkeypatch.setattr(report, 'write_report', lambda *_: None)
  folder, configs, states = runs
  shutil.copytree(folder, tmp_path / 'copy')
  steps = tmp_path / 'copy' / '2' / workdirs.CHECKPOINTS
  shutil.rmtree(steps / '3')
  shutil.move(folder / '1', folder / 'elsewhere')
  try:
    state = train.train_and_evaluate(configs[2], tmp_path / 'copy' / '2')
  finally:
    shutil.move(folder / 'elsewhere', folder / '1')
  run = json.loads((tmp_path / 'copy' / '2' / workdirs.RUN).read_text())
  assert run['first_step'] == 2
  assert run['started_from']['step'] == 3
  _assert_same(state, states[2])
  # Nothing of it is empty.
  assert _leaves(state.teacher_params)


@pytest.mark.slow
def test_distillation_cannot_be_enabled_on_resume(runs, tmp_path):
  folder, configs, _ = runs
  shutil.copytree(folder / '1', tmp_path / '1')
  config = configs[1].copy_and_resolve_references()
  config.losses.distillation_weight = 0.5
  config.optim.frozen = ()
  with pytest.raises(ValueError, match='other parameters') as error:
    train.train_and_evaluate(config, tmp_path / '1', allow_config_change=True)
  error.match('losses.distillation_weight: 0.0 -> 0.5')
  error.match(r"optim.frozen: \('encoder/\.\*',\) -> \(\)")
