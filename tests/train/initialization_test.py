"""Tests of initial variables: published weights, statistics, other runs."""

import json
import pathlib
import re
import shutil

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from fsq_jax import checkpoints
from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import saved_model
from fsq_jax.data import builder as data_builder
from fsq_jax.evaluation import saved_run
from fsq_jax.models import resampling
from fsq_jax.report import report
from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import partitioning
from fsq_jax.train import initialization
from fsq_jax.train import latent_statistics
from fsq_jax.train import optim
from fsq_jax.train import state as train_state

_DEBUG = pathlib.Path(__file__).parents[2] / 'configs' / 'debug.py'
_TESTDATA = pathlib.Path(__file__).parents[1] / 'testdata'
_SIGLIP = _TESTDATA / 'encoders' / 'siglip'
_BIG_VISION = _TESTDATA / 'encoders' / 'big_vision_siglip' / 'unrolled.npz'
_MAE = _TESTDATA / 'encoders' / 'mae'
_DECODER = _TESTDATA / 'decoders' / 'rae_decoder'
_ARCHITECTURE = (
    'siglip(width=48, depth=3, num_heads=4, mlp_dim=160, patch_size=16)'
)


def _load_config(fields=None):
  """The debug config with a pretrained encoder, and dotted names set."""
  config = configuration.load_config(_DEBUG)
  config.data.image_size = (32, 32)
  config.data.eval_batch_size = 64
  config.model.encoder.name = 'pretrained'
  config.model.encoder.architecture = _ARCHITECTURE
  config.model.encoder.checkpoint = str(_SIGLIP)
  config.model.decoder.patch_size = 16
  config.train.num_steps = 2
  config.train.checkpoint_every_steps = 1
  config.train.eval_every_steps = 0
  config.optim.warmup_steps = 0
  config.partitioning.mesh.update(data=2, fsdp=4)
  config.partitioning.fsdp_min_size = 64
  config.update_from_flattened_dict(fields or {})
  return config


def _decoder_fields(**fields):
  """Of a config with the published decoder."""
  return {
      'data.image_size': (64, 64),
      'model.decoder.name': 'mae',
      'model.decoder.width': 40,
      'model.decoder.depth': 2,
      'model.decoder.num_heads': 4,
      'model.decoder.mlp_dim': 96,
      'model.decoder.mae.input_width': 48,
      'model.decoder.mae.checkpoint': str(_DECODER),
      **{f'model.decoder.{k.replace("__", ".")}': v for k, v in fields.items()},
  }


def _build(config):
  """(model, builder, mesh)."""
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  return model, builder, mesh


def _start(config):
  """The first state, and its builder."""
  config = configuration.resolve(config)
  model, builder, mesh = _build(config)
  loaded = initialization.Initializer(config, model).load(
      builder.abstract_variables, mesh
  )
  # Sharded from the start, not after a copy on every device.
  for path, x in _leaves(loaded).items():
    wanted = _leaves(builder.abstract_variables)[path].sharding
    assert x.sharding.is_equivalent_to(wanted, x.ndim), path
  return builder.create(loaded), builder


def _leaves(tree):
  """Path to array."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): x
      for path, x in flat
  }


def _assert_same(tree, expected):
  """Bit for bit."""
  tree, expected = _leaves(tree), _leaves(expected)
  assert tree.keys() == expected.keys()
  for path, x in expected.items():
    assert np.asarray(tree[path]).tobytes() == np.asarray(x).tobytes(), path


def _check(config):
  model = models.build_autoencoder(config.model, config.data.image_size)
  return initialization.Initializer(config, model)


# Published encoders and decoders.


@pytest.mark.slow
def test_a_frozen_encoder_starts_with_the_weights_of_its_checkpoint():
  state, builder = _start(_load_config({'optim.frozen': ('encoder/.*',)}))
  expected = models.load_encoder(_SIGLIP, 32, final_affine=False).variables
  _assert_same(state.frozen_params, {'encoder': expected['params']})
  for tree in (state.params, state.ema_params, state.opt_state):
    assert not any('encoder' in path for path in _leaves(tree))
  assert state.teacher_params == {}
  for path, x in _leaves(state).items():
    wanted = _leaves(builder.shardings)[path]
    assert x.sharding.is_equivalent_to(wanted, x.ndim), path
  kernel = state.frozen_params['encoder']['blocks']['mlp']['in']['kernel']
  assert {x.data.shape for x in kernel.addressable_shards} == {(3, 48, 40)}


@pytest.mark.slow
def test_an_encoder_that_trains_starts_with_them_too():
  rules = (('encoder/.*', 'fsdp'), ('.*', 'replicate'))
  state, _ = _start(_load_config({
      'model.encoder.architecture': 'checkpoint',
      'model.encoder.checkpoint': str(_MAE),
      'model.encoder.image_size': (48, 32),
      'model.encoder.final_affine': True,
      'model.decoder.name': 'mae',
      'model.decoder.mae.grid_size': (2, 2),
      'losses.distillation_weight': 1.0,
      'optim.frozen': ('encoder/norm/.*',),
      'partitioning.rules': rules,
  }))
  # Its positions are resampled.
  expected = models.load_encoder(_MAE, (48, 32)).variables['params']
  assert expected['positions'].shape == (3, 2, 48)
  norm = expected.pop('norm')
  _assert_same(state.frozen_params, {'encoder': {'norm': norm}})
  for tree in (state.params, state.ema_params, state.teacher_params):
    _assert_same(tree['encoder'], expected)
    # Moments, averages and the teacher are where the parameters are.
    kernel = tree['encoder']['blocks']['mlp']['in']['kernel']
    assert {x.data.shape for x in kernel.addressable_shards} == {(3, 48, 40)}
  for path, x in _leaves(state).items():
    assert 'encoder/' in path or x.sharding.is_fully_replicated, path


def test_without_a_checkpoint_the_encoder_is_random():
  config = _load_config({'model.encoder.checkpoint': ''})
  assert _check(config).load({}, None) == {}
  # A checkpoint of another kind of encoder is ignored.
  config = _load_config({
      'model.encoder.name': 'vit', 'model.encoder.patch_size': 16,
      'model.encoder.checkpoint': '/nowhere',
  })
  initializer = _check(config)
  assert initializer.load({}, None) == initializer.sources == {}


@pytest.mark.slow
def test_a_decoder_is_loaded_with_its_constants_beside_the_encoder():
  state, _ = _start(_load_config(_decoder_fields()))
  encoder = models.load_encoder(_SIGLIP, 64, final_affine=False).variables
  decoder = models.load_decoder(_DECODER).variables
  _assert_same(state.params['encoder'], encoder['params'])
  _assert_same(state.params['decoder'], decoder['params'])
  _assert_same(
      state.model_state, {'constants': {'decoder': decoder['constants']}}
  )
  # Not what the formula gives: the file's.
  positions = state.model_state['constants']['decoder']['class_position']
  assert np.any(np.asarray(positions) != 0)


def test_another_architecture_is_refused_with_the_fields_and_a_fix():
  config = _load_config({
      'model.encoder.architecture': (
          _ARCHITECTURE.replace('depth=3', 'depth=2').replace('160', '96')
      ),
  })
  with pytest.raises(ValueError, match='has another architecture') as error:
    _check(config)
  assert [x.strip() for x in str(error.value).splitlines()] == [
      'model.encoder.checkpoint has another architecture than the config'
      ' (config -> checkpoint):',
      'depth: 2 -> 3',
      'mlp_dim: 96 -> 160',
      'Use another checkpoint, or set --config.model.encoder.architecture='
      'checkpoint.',
  ]
  config.model.encoder.architecture = 'checkpoint'
  _check(configuration.resolve(config))
  assert config.model.encoder.architecture == 'checkpoint'  # A copy has it.


def test_the_kernel_of_positions_is_no_other_architecture():
  _check(_load_config({'model.encoder.checkpoint': str(_BIG_VISION)}))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'width': 48}, r'decoder\.mae\.checkpoint .*\n  width: 48 -> 40'),
        ({'depth': 3}, r'\n  depth: 3 -> 2\n.*change the fields of model.deco'),
        ({'mae__input_width': 16}, r'has input_width 48, the decoder .* 16; s'),
        (
            {'mae__grid_size': (2, 2), 'patch_size': 32},
            r'\n  patch_size: 32 -> 16',
        ),
        ({'mae__checkpoint': '/nowhere'}, '/nowhere'),
        ({'mae__checkpoint': str(_SIGLIP)}, 'model_type'),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    _check(_load_config(_decoder_fields(**fields)))


def test_a_decoder_of_another_grid_is_refused():
  config = _load_config({**_decoder_fields(), 'data.image_size': (32, 32)})
  with pytest.raises(ValueError, match=r'grid_size \(4, 4\), .* \(2, 2\); set'):
    _check(config)


def _damage(name, how):
  """A change of one file of a checkpoint."""
  def change(folder):
    path = folder / name
    if how == 'missing':
      path.unlink()
    else:
      content = path.read_bytes()
      path.write_bytes(content[:len(content) // 2])

  return change


def test_files_that_are_missing_or_damaged_are_refused(tmp_path):
  config = _load_config()
  _, builder, mesh = _build(config)
  failures = []
  for i, (damage, message) in enumerate((
      (shutil.rmtree, 'There is no .*encoder'),
      (_damage('config.json', 'missing'), r'has no config\.json'),
      (_damage('config.json', 'half'), r'config\.json is not a JSON file'),
      (_damage('model.safetensors', 'missing'), 'has neither model.safet'),
      (_damage('model.safetensors', 'half'), 'it is corrupted, or not saf'),
  )):
    folder = shutil.copytree(_SIGLIP, tmp_path / str(i) / 'encoder')
    damage(folder)
    config.model.encoder.checkpoint = str(folder)
    try:
      _check(config).load(builder.abstract_variables, mesh)
      failures.append((message, 'accepted'))
    except ValueError as error:
      if not re.match(rf'model\.encoder\.checkpoint: .*{message}', str(error)):
        failures.append((message, str(error)))
  assert not failures


# Statistics of latents.


def _write_statistics(folder, shape=(2, 2, 48), dtype=np.float32, **arrays):
  rng = np.random.default_rng(0)
  return str(latent_statistics.write(
      {
          'mean': rng.normal(size=shape).astype(dtype),
          'variance': rng.uniform(1, 2, shape).astype(dtype),
          **arrays,
      },
      folder,
      _statistics_config(''),
  ))


def _statistics_config(path):
  return _load_config({
      'model.latent_statistics': path,
      # The decoder takes latents as wide as the encoder's.
      'model.decoder.width': 48,
  })


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('resize', 'bilinear', 'resize: bicubic -> bilinear'),
        ('final_affine', True, 'final_affine: False -> True'),
    ],
)
def test_statistics_of_other_latents_are_refused(
    field, value, message, tmp_path
):
  config = _statistics_config(_write_statistics(tmp_path))
  config.model.encoder[field] = value
  with pytest.raises(ValueError, match=f'on other latents(.|\n)*{message}'):
    _check(config)


@pytest.mark.slow
def test_statistics_are_loaded_as_constants(tmp_path):
  path = _write_statistics(tmp_path)
  state, _ = _start(_statistics_config(path))
  _assert_same(
      state.model_state['constants']['statistics'],
      safetensors.numpy.load_file(path),
  )


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'shape': (2, 2, 47)}, r'\(2, 2, 47\).* float32 of shape \(2, 2, 48'),
        ({'shape': (1, 2, 48)}, r'float32 of shape \(2, 2, 48\)'),
        ({'dtype': np.float64}, 'float64'),
        ({'std': np.ones((2, 2, 48), np.float32)}, "'std'"),
    ],
)
def test_other_statistics_are_refused(changes, message, tmp_path):
  path = _write_statistics(tmp_path, **changes)
  with pytest.raises(ValueError, match=message) as error:
    _check(_statistics_config(path))
  error.match('--mode=latent_statistics')


def test_statistics_that_cannot_be_read_are_refused(tmp_path):
  path = pathlib.Path(_write_statistics(tmp_path))
  content = path.read_bytes()
  for damaged in (b'', content[:50], content[:-4]):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r'cannot be read .*; write it with'):
      _check(_statistics_config(str(path)))
  path.unlink()
  for absent in (path, tmp_path):
    with pytest.raises(ValueError, match='cannot be read'):
      _check(_statistics_config(str(absent)))


@pytest.mark.parametrize(
    ('name', 'value'),
    [('mean', np.nan), ('mean', -np.inf), ('variance', np.inf),
     ('variance', np.nan), ('variance', -1.0)],
)
def test_invalid_statistics_are_rejected(name, value, tmp_path):
  array = np.full((2, 2, 48), 1, np.float32)
  array[0, 1, 7] = value
  path = _write_statistics(tmp_path, **{name: array})
  with pytest.raises(ValueError, match='not finite, or negative var'):
    _check(_statistics_config(path))


# Other runs.


_RUN = {
    # A model with every kind of variable: codebook, averages, constants.
    'model.encoder.checkpoint': '',
    'model.quantizer.name': 'vq',
    'model.quantizer.vq.codebook_size': 16,
    'model.quantizer.vq.codebook_init': 'kmeans',
    'model.projector_in.name': 'standardized',
    'model.projector_out.name': 'fourier',
}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Folder of a run of two steps, with a frozen encoder."""
  folder = tmp_path_factory.mktemp('stage1')
  config = _load_config({**_RUN, 'optim.frozen': ('encoder/.*',)})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, 'write_report', lambda *_: None)
    state = train.train_and_evaluate(config, folder)
  return folder, jax.device_get(state.eval_variables)


@pytest.mark.slow
def test_a_run_starts_from_all_variables_of_another_one(finished):
  folder, variables = finished
  config = _load_config({
      **_RUN,
      'train.init_from': str(folder),
      'seed': 1,
      # What trains there is frozen here, and the other way round.
      'optim.frozen': ('decoder/.*',),
      # These do not change what variables mean.
      'model.latent_noise': 0.5,
      'model.dtype': 'bfloat16',
      'optim.name': 'muon',
      'optim.learning_rate': 1e-4,
      'losses.distillation_weight': 0.5,
      'data.batch_size': 16,
      'partitioning.rules': (('encoder/.*', 'fsdp'), ('.*', 'replicate')),
  })
  configuration.check_config(config, num_devices=8)
  state, _ = _start(config)
  assert set(variables) == {'params', 'batch_stats', 'codebook', 'constants'}
  _assert_same(state.eval_variables, variables)
  _assert_same(
      parameter_paths.merge_frozen(state.params, state.frozen_params),
      variables['params'],
  )
  assert set(state.frozen_params) == {'decoder'}
  _assert_same(
      state.teacher_params, {'encoder': variables['params']['encoder']}
  )
  # The steps begin anew; the codebook has been started.
  assert int(state.step) == 0
  assert np.asarray(state.model_state['codebook']['quantizer']['step']) == 2
  _, restored = saved_model.restore(
      saved_model.find_run(folder),
      partitioning.create_mesh(config.partitioning.mesh),
  )
  _assert_same(restored, variables)


@pytest.mark.slow
def test_a_run_starts_from_parts_of_another_model(finished):
  folder, variables = finished
  config = _load_config({
      **_RUN,
      'train.init_from': str(folder),
      'data.image_size': (64, 64),
      'model.encoder.architecture': _ARCHITECTURE[:-1]
      + ", position_kernel='bilinear')",
      'model.quantizer.vq.codebook_size': 32,
      # Not read, since the run has an encoder.
      'model.encoder.checkpoint': '/nowhere',
  })
  state, _ = _start(config)
  started, before = _leaves(state.eval_variables), _leaves(variables)
  path = 'params/encoder/positions'
  np.testing.assert_allclose(
      started.pop(path),
      resampling.resize_grid(before[path], (4, 4), 'bilinear'),
      atol=1e-6,
  )
  fresh = {
      'params/decoder/positions/embedding', path,
      *(x for x in before if x.split('/')[1] == 'quantizer'),
  }
  assert len(fresh) > 3
  _assert_same(
      {x: y for x, y in started.items() if x not in fresh},
      {x: y for x, y in before.items() if x not in fresh},
  )
  assert started['codebook/quantizer/entries'].shape == (32, 8)
  assert started['params/decoder/positions/embedding'].shape == (4, 4, 16)
  config = _load_config({**_RUN, 'train.init_from': f'{folder}/no'})
  with pytest.raises(ValueError, match=r'^train\.init_from: .*no is not a fol'):
    _check(config)


# In a run.


@pytest.mark.parametrize(
    'fields',
    [
        {'train.init_from': '/nowhere'},
        {'model.encoder.checkpoint': '/nowhere'},
        {'model.latent_statistics': '/nowhere', 'model.decoder.width': 48},
        _decoder_fields(mae__checkpoint='/nowhere'),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_missing_files_are_found_before_long_work(
    fields, tmp_path, monkeypatch
):
  def refuse(*args, **kwargs):
    raise AssertionError('something was built')

  monkeypatch.setattr(data_builder, 'build_dataset', refuse)
  monkeypatch.setattr(train_state, 'StateBuilder', refuse)
  config = _load_config(fields)
  config.partitioning.mesh.update(data=8, fsdp=1)
  with pytest.raises(ValueError, match='nowhere'):
    train.train_and_evaluate(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_run_resumes_without_its_initialization_files(
    tmp_path, monkeypatch
):
  monkeypatch.setattr(report, 'write_report', lambda *_: None)
  encoder = shutil.copytree(_SIGLIP, tmp_path / 'encoder')
  statistics = _write_statistics(tmp_path / 'statistics')
  folder = tmp_path / 'run'
  config = _statistics_config(statistics)
  config.model.encoder.checkpoint = str(encoder)
  config.model.encoder.architecture = 'checkpoint'
  state = jax.device_get(train.train_and_evaluate(config, folder))
  evaluation = (folder / workdirs.EVALUATION).read_bytes()

  # The run says itself what the checkpoint was.
  text = (folder / workdirs.CONFIG).read_text()
  checkpointer = checkpoints.Checkpointer(folder)
  record = checkpointer.restore_record(2)
  checkpointer.close()
  for saved in (json.loads(text), record['config']):
    assert saved['model']['encoder']['architecture'] == _ARCHITECTURE
    assert saved['model']['encoder']['checkpoint'] == str(encoder)

  shutil.rmtree(encoder)
  shutil.rmtree(tmp_path / 'statistics')
  saved_run.evaluate_workdir(configuration.config_from_json(text), folder)
  assert (folder / workdirs.EVALUATION).read_bytes() == evaluation

  shutil.rmtree(folder / workdirs.CHECKPOINTS / '2')
  with pytest.raises(ValueError, match=r'There is no .*encoder'):
    train.train_and_evaluate(config, folder)
  config.model.encoder.architecture = _ARCHITECTURE
  again = jax.device_get(train.train_and_evaluate(config, folder))
  assert json.loads((folder / workdirs.RUN).read_text())['first_step'] == 1
  chex.assert_trees_all_equal(again, state)
