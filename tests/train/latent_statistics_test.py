"""Mean and variance of latents: those of NumPy, over every readable image."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from fsq_jax import checkpoints
from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.report import report
from fsq_jax.runtime import partitioning
from fsq_jax.train import initialization
from fsq_jax.train import latent_statistics
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.workdir import files

_ROOT = pathlib.Path(__file__).parents[2]
_SIGLIP = _ROOT / 'tests' / 'testdata' / 'encoders' / 'siglip'
_NUM_IMAGES = 21  # Two whole batches and a part of one.
_CONFIG = """
from configs import debug

def get_config():
  config = debug.get_config()
  config.data.source = 'folder'
  config.data.data_dir = {data!r}
  config.data.image_size = (32, 32)
  config.data.max_damaged_share = 0.5
  config.model.encoder.name = 'pretrained'
  config.model.encoder.architecture = 'checkpoint'
  config.model.encoder.checkpoint = {encoder!r}
  config.model.decoder.patch_size = 16
  config.model.decoder.width = 48
  config.optim.frozen = ('encoder/.*',)
  config.optim.warmup_steps = 1
  config.partitioning.fsdp_min_size = 64
  config.train.num_steps = 2
  config.train.eval_every_steps = 0
  return config
"""


@pytest.fixture(scope='module')
def images():
  """[N, 32, 32, 3] uint8, each of a brightness of its own."""
  rng = np.random.default_rng(0)
  high = rng.integers(20, 256, (_NUM_IMAGES, 1, 1, 3))
  return rng.integers(0, high, (_NUM_IMAGES, 32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope='module')
def root(images, tmp_path_factory):
  """Folder of the images and of a config for them."""
  root = tmp_path_factory.mktemp('images')
  for split, some in (('train', images), ('validation', images[:8])):
    (root / 'data' / split).mkdir(parents=True)
    for i, image in enumerate(some):
      PIL.Image.fromarray(image).save(root / 'data' / split / f'{i:02}.png')
  shutil.copytree(_SIGLIP, root / 'encoder')
  (root / 'config.py').write_text(_CONFIG.format(
      data=str(root / 'data'), encoder=str(root / 'encoder')
  ))
  return root


@pytest.fixture
def config(root):
  """That config."""
  return configuration.load_config(root / 'config.py')


@pytest.fixture(scope='module')
def latents(images):
  """[N, 2, 2, 48] float64."""
  encoder = models.load_encoder(_SIGLIP, 32, final_affine=False)
  floats = images.astype(np.float32) / 127.5 - 1
  apply = jax.jit(encoder.module.apply)
  return np.float64(apply(encoder.variables, floats))


def _assert_are_of(statistics, latents):
  assert statistics.keys() == {'mean', 'variance'}
  for name, expected in (
      ('mean', latents.mean(axis=0)), ('variance', latents.var(axis=0))
  ):
    assert statistics[name].dtype == np.float32
    np.testing.assert_allclose(
        statistics[name], expected, rtol=2e-5, atol=2e-6, err_msg=name
    )


@pytest.mark.fast_limit(10)
@pytest.mark.parametrize(
    ('batch_size', 'num_devices'),
    [
        (16, 8),
        pytest.param(8, 8, marks=pytest.mark.slow),
        pytest.param(8, 1, marks=pytest.mark.slow),
    ],
)
def test_statistics_match_numpy(config, latents, batch_size, num_devices):
  if num_devices == 8:
    config.partitioning.mesh.update(data=2, fsdp=4)
  config.data.eval_batch_size = batch_size
  # Neither of these has a part in it.
  config.model.latent_statistics = 'not there yet'
  config.model.latent_noise = 0.5
  config.data.flip = True
  before = config.to_dict()
  statistics = latent_statistics.measure(config)
  assert config.to_dict() == before
  assert latents.std(axis=0).min() > 1e-3
  _assert_are_of(statistics, latents)


@pytest.mark.slow
def test_unreadable_images_are_skipped(
    config, root, latents, tmp_path
):
  shutil.copytree(root / 'data', tmp_path / 'data')
  damaged = [0, 9, _NUM_IMAGES - 1]
  for i in damaged:
    path = tmp_path / 'data' / 'train' / f'{i:02}.png'
    path.write_bytes(path.read_bytes()[:60])
  config.data.data_dir = str(tmp_path / 'data')
  statistics = latent_statistics.measure(config)
  _assert_are_of(statistics, np.delete(latents, damaged, axis=0))

  config.data.max_damaged_share = 1.0
  for path in (tmp_path / 'data' / 'train').iterdir():
    path.write_bytes(b'')
  with pytest.raises(ValueError, match='No image of the training split'):
    latent_statistics.measure(config)


@pytest.mark.parametrize(
    'fields',
    [
        {'checkpoint': '', 'architecture': 'siglip_B/16'},
        {'name': 'vit', 'width': 48},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_random_encoder_is_refused(config, fields):
  config.model.encoder.update(fields)
  config.model.encoder.patch_size = 16
  with pytest.raises(ValueError, match='need a trained encoder'):
    latent_statistics.measure(config)


@pytest.mark.slow
def test_the_encoder_may_be_that_of_a_run(config, latents, tmp_path):
  # Of a model with statistics of its own, which come along.
  config.model.latent_statistics = str(
      _write(config, tmp_path / 'statistics')
  )
  config = configuration.resolve(config)
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  initializer = initialization.Initializer(config, model)
  state = builder.create(initializer.load(builder.abstract_variables, mesh))
  checkpointer = checkpoints.Checkpointer(tmp_path / 'run')
  checkpointer.save(1, state, {
      'config': json.loads(configuration.config_to_json(config)),
      'quantizer': model.quantizer.spec(),
  })
  checkpointer.close()
  shutil.rmtree(tmp_path / 'statistics')
  config.train.init_from = str(tmp_path / 'run')
  config.model.encoder.checkpoint = ''
  _assert_are_of(latent_statistics.measure(config), latents)


def _write(config, folder, value=1.0):
  array = np.full((2, 2, 48), value, np.float32)
  return latent_statistics.write(
      {'mean': array, 'variance': array}, folder, config
  )


def test_the_workdir_is_tried_before_anything_is_read(
    config, tmp_path, monkeypatch
):
  (tmp_path / 'file').touch()
  monkeypatch.setattr(latent_statistics, 'measure', None)
  with pytest.raises(ValueError, match='is a file; give a folder'):
    latent_statistics.measure_to_workdir(config, tmp_path / 'file')


def test_statistics_are_written_atomically(config, tmp_path, monkeypatch):
  path = _write(config, tmp_path / 'new')
  assert path == tmp_path / 'new' / 'latent_statistics.safetensors'
  before = safetensors.numpy.load_file(path)
  assert {x.shape for x in before.values()} == {(2, 2, 48)}

  def fail(*args):
    raise OSError('no space left')

  with monkeypatch.context() as patch:
    patch.setattr(files.os, 'fsync', fail)
    with pytest.raises(OSError, match='no space'):
      _write(config, tmp_path / 'new', 2.0)
  assert [x.name for x in path.parent.iterdir()] == [path.name]
  np.testing.assert_array_equal(
      safetensors.numpy.load_file(path)['mean'], before['mean']
  )


def _launch(*args):
  result = subprocess.run(
      [sys.executable, 'launch.py', *args],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
  )
  assert result.returncode == 0, result.stderr
  return result.stdout


@pytest.mark.slow
def test_a_run_trains_and_evaluates_with_what_the_command_wrote(
    config, root, latents, tmp_path, monkeypatch
):
  statistics = tmp_path / 'statistics'
  written = _launch(
      f'--config={root / "config.py"}', '--mode=latent_statistics',
      f'--workdir={statistics}',
  )
  path = statistics / latent_statistics.FILE
  assert written == f'{path}\n'
  arrays = safetensors.numpy.load_file(path)
  _assert_are_of(arrays, latents)

  monkeypatch.setattr(report, 'write_report', lambda *_: None)
  # Of files that are gone afterwards.
  encoder = shutil.copytree(_SIGLIP, tmp_path / 'encoder')
  config.model.encoder.checkpoint = str(encoder)
  config.model.latent_statistics = str(path)
  run = tmp_path / 'run'
  state = train.train_and_evaluate(config, run)
  constants = state.model_state['constants']['statistics']
  for name, x in arrays.items():
    np.testing.assert_array_equal(constants[name], x)
  evaluation = (run / workdirs.EVALUATION).read_bytes()
  (run / workdirs.EVALUATION).unlink()
  shutil.rmtree(encoder)
  shutil.rmtree(statistics)
  printed = _launch('--mode=eval', f'--workdir={run}')
  assert 'psnr: ' in printed
  # Another process may round otherwise in the last digit.
  actual = json.loads((run / workdirs.EVALUATION).read_text())
  expected = json.loads(evaluation)
  assert actual.pop('metrics') == pytest.approx(
      expected.pop('metrics'), rel=1e-5, abs=1e-6
  )
  assert '--mode=eval' in actual['protocol'].pop('command')
  del expected['protocol']['command']
  assert actual['protocol'] == expected['protocol']
  assert (run / workdirs.REPORT).is_file()
