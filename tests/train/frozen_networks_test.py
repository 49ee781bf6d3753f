"""Tests of frozen networks in training: refused, held to, in no checkpoint."""

import json
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import train
from fsq_jax.data import builder as data_builder
from fsq_jax.evaluation import saved_run
from fsq_jax.perceptual import lpips
from fsq_jax.runtime import partitioning
from fsq_jax.train import frozen_networks

_DEBUG = pathlib.Path(__file__).parents[2] / 'configs' / 'debug.py'
_DINO = pathlib.Path(__file__).parents[1] / 'testdata' / 'encoders' / 'dino'
_FIELD = 'losses.perceptual.checkpoint'
_NAME = 'losses.perceptual.lpips_vgg16'
_TWO_STEPS = {'train.num_steps': 2, 'optim.warmup_steps': 0}


def _write_weights(path, seed):
  """Random weights of LPIPS's VGG16 in a file as the converter writes it."""
  module = lpips.Lpips('vgg16')
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), images, images)
  rng = np.random.default_rng(seed)
  arrays = {
      name: np.abs(rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape))
      .astype(np.float32)
      for name, x in _leaves(params['params']).items()
  }
  safetensors.numpy.save_file(arrays, path)
  return str(path)


def _leaves(tree):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): x
      for path, x in flat
  }


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """Two files of different weights."""
  folder = tmp_path_factory.mktemp('weights')
  return [_write_weights(folder / f'{i}.safetensors', i) for i in range(2)]


def _load_config(path, **fields):
  config = configuration.load_config(_DEBUG)
  config.losses.perceptual.name = 'lpips_vgg16'
  config.losses.perceptual.checkpoint = path
  config.update_from_flattened_dict(fields)
  return config


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        (None, 'There is no file'),
        (b'\x80\x04\x95\x00', 'corrupted'),
        (safetensors.numpy.save({'x': np.zeros(3)}), 'not those of'),
    ],
    ids=['missing', 'pickle', 'another_network'],
)
def test_a_file_that_is_no_network_is_refused_before_images_are_read(
    content, problem, tmp_path, monkeypatch
):
  path = tmp_path / 'weights.safetensors'
  if content is not None:
    path.write_bytes(content)

  def build_dataset(*_, **__):
    pytest.fail('Images were read.')

  monkeypatch.setattr(data_builder, 'build_dataset', build_dataset)
  with pytest.raises(ValueError, match=problem) as error:
    train.train_and_evaluate(_load_config(str(path)), tmp_path / 'run')
  assert str(error.value).startswith(f'{_FIELD}: ')


def test_a_backbone_that_is_missing_is_refused_by_its_field(tmp_path):
  config = configuration.load_config(_DEBUG)
  config.discriminator.name = 'dino'
  config.discriminator.dino.checkpoint = str(tmp_path / 'nothing')
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  with pytest.raises(ValueError, match=r'^discriminator\.dino\.checkpoint: '):
    frozen_networks.load_networks(config, mesh)


def test_without_networks_nothing_is_loaded():
  config = configuration.load_config(_DEBUG)
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  assert frozen_networks.load_networks(config, mesh) == (None, {}, {})


@pytest.mark.slow
def test_large_weights_are_spread_over_devices(weights):
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 8})
  loaded = frozen_networks.load_networks(_load_config(weights[0]), mesh)
  kernel = loaded.variables['perceptual']['params']['backbone']['conv5_3'][
      'kernel'
  ]
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(
      None, None, None, 'fsdp'
  )
  assert kernel.addressable_shards[0].data.size * 8 == kernel.size
  assert loaded.hashes == {_NAME: models.hash_weights(weights[0])}


def test_a_backbone_is_loaded_sharded_and_hashed():
  config = configuration.load_config(_DEBUG)
  config.discriminator.name = 'dino'
  config.discriminator.dino.update(
      checkpoint=str(_DINO), image_size=(12, 12), blocks=(0,), kernel_size=3,
      architecture=(
          'dino(width=12, depth=2, num_heads=3, mlp_dim=20, patch_size=4)'
      ),
  )
  config.partitioning.fsdp_min_size = 16
  mesh = partitioning.create_mesh({'data': 2, 'fsdp': 4})
  loaded = frozen_networks.load_networks(config, mesh)
  assert loaded.perceptual is None
  assert loaded.hashes == {'discriminator.dino': models.hash_weights(_DINO)}
  backbone = loaded.variables['discriminator']['backbone']
  kernel = backbone['blocks']['mlp']['in']['kernel']
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
  loaded.check_same(loaded.hashes | {'another': 'x'})
  with pytest.raises(ValueError, match=r'discriminator\.dino: other -> '):
    loaded.check_same({'discriminator.dino': 'other'})


@pytest.fixture
def small_weights(tmp_path, monkeypatch):
  """Two files of a VGG16 of few channels."""
  vgg16 = lpips.NETWORKS['vgg16']
  stages = tuple(
      stage._replace(channels=(8,) * len(stage.channels))
      for stage in vgg16.stages
  )
  monkeypatch.setitem(lpips.NETWORKS, 'vgg16', vgg16._replace(stages=stages))
  return [_write_weights(tmp_path / f'{i}.safetensors', i) for i in range(2)]


@pytest.mark.slow
def test_a_run_is_held_to_its_weights(small_weights, tmp_path):
  weights, tmp_path = small_weights, tmp_path / 'run'
  config = _load_config(weights[0], **_TWO_STEPS)
  state = train.train_and_evaluate(config, tmp_path)
  run = json.loads((tmp_path / 'run.json').read_text())
  assert run['networks'] == {_NAME: models.hash_weights(weights[0])}
  rows = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(rows.splitlines()[0])['perceptual_loss'] > 0
  # The network is no part of what is saved.
  kernel = safetensors.numpy.load_file(weights[0])['backbone/conv1_2/kernel']
  assert all(x.shape != kernel.shape for x in jax.tree.leaves(state))
  with pytest.raises(ValueError, match='other weights') as error:
    train.train_and_evaluate(_load_config(weights[1], **_TWO_STEPS), tmp_path)
  assert models.hash_weights(weights[1]) in str(error.value)
  moved = tmp_path / 'moved.safetensors'
  moved.write_bytes(pathlib.Path(weights[0]).read_bytes())
  config = _load_config(str(moved), **_TWO_STEPS)
  assert int(train.train_and_evaluate(config, tmp_path).step) == 2
  # What the run has learned is evaluated without them.
  moved.unlink()
  assert saved_run.evaluate_workdir(config, tmp_path).metrics['psnr'] > 0
