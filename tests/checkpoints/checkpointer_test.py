"""Tests of checkpoints: bytes on other devices, steps kept, steps ignored."""

import math
import pathlib

import chex
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import checkpoints
from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import workdir as workdirs
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state

_DEBUG = pathlib.Path(__file__).parents[2] / 'configs' / 'debug.py'
_STATE = {'x': jnp.arange(4.0)}
_RECORD = {'config': {}, 'iterator': {'next_index': 3}}


@pytest.fixture
def checkpointer(tmp_path):
  checkpointer = checkpoints.Checkpointer(tmp_path, keep=2)
  yield checkpointer
  checkpointer.close()


def _steps(folder):
  """Names on disk, whatever they are."""
  return {path.name for path in (folder / workdirs.CHECKPOINTS).iterdir()}


def _builder(data, fsdp):
  """State of the debug config on the first data * fsdp devices."""
  config = configuration.load_config(_DEBUG)
  config.model.projector_in.name = 'standardized'
  config.partitioning.fsdp_min_size = 2**6
  mesh = partitioning.create_mesh(
      {'data': data, 'fsdp': fsdp}, jax.devices()[: data * fsdp]
  )
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  return train_state.build_state_builder(config, model, optimizer, mesh)


def _shard_shape(state):
  kernel = state.params['encoder']['patches']['kernel']
  return kernel.addressable_shards[0].data.shape


@pytest.mark.slow
def test_a_state_keeps_its_bytes_on_other_devices(tmp_path):
  first = _builder(1, 1)
  state = first.create().replace(step=jnp.int32(7))
  expected = jax.device_get(state)
  shapes = []
  for number, builder in enumerate(
      [_builder(8, 1), _builder(2, 4), _builder(1, 1), _builder(1, 8)]
  ):
    folder = tmp_path / str(number)
    folder.mkdir()
    checkpointer = checkpoints.Checkpointer(folder)
    checkpointer.save(7, state, _RECORD)
    state = checkpointer.restore(7, builder.abstract)
    checkpointer.close()
    chex.assert_trees_all_equal(jax.device_get(state), expected)
    chex.assert_trees_all_equal_dtypes(state, expected)
    assert jax.tree.map(lambda x: x.sharding, state) == builder.shardings
    shapes.append(_shard_shape(state))
  # [48, 16] kernels, whole and in parts.
  assert shapes == [(48, 16), (12, 16), (48, 16), (6, 16)]


def test_a_saved_state_may_be_donated_at_once(checkpointer):
  overwrite = jax.jit(
      lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0
  )
  state = {'x': jnp.arange(2.0**20)}
  expected = np.arange(2.0**20, dtype=np.float32)
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state,
  )
  checkpointer.save(1, state, _RECORD)
  for _ in range(20):
    state = overwrite(state)
  jax.block_until_ready(state)
  checkpointer.wait()
  np.testing.assert_array_equal(
      checkpointer.restore(1, abstract)['x'], expected
  )


def test_the_record_comes_back_as_it_was(checkpointer):
  record = {
      'config': {'data': {'image_size': [16, 16]}, 'eps': None, 'rate': 1e-3},
      'quantizer': {'name': 'fsq', 'levels': [8, 8, 8]},
      'fingerprint': {'split': 'Prüfung', 'flip': True, 'seed': 2**32 - 1},
      'iterator': {'next_index': 12},
  }
  checkpointer.save(3, _STATE, record)
  checkpointer.wait()
  assert checkpointer.restore_record(3) == record


@pytest.mark.parametrize(
    ('keep', 'kept'),
    [
        (1, ['1', '2', '2 3', '2 4', '2 5', '6', '6 7']),
        (2, ['1', '1 2', '2 3', '2 3 4', '2 4 5', '5 6', '6 7']),
        (3, ['1', '1 2', '1 2 3', '2 3 4', '2 3 4 5', '4 5 6', '5 6 7']),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, kept):
  psnr = {2: 20.0, 3: math.nan, 4: 19.5, 6: 20.5, 7: math.inf}
  best = [None, 2, 2, 2, 2, 6, 6]
  checkpointer = checkpoints.Checkpointer(tmp_path, keep=keep)
  for step in range(1, 8):
    metrics = {'psnr': psnr[step], 'ssim': 0.5} if step in psnr else None
    checkpointer.save(step, _STATE, _RECORD, metrics)
    checkpointer.wait()
    assert _steps(tmp_path) == set(kept[step - 1].split())
    assert checkpointer.latest_step == step
    assert checkpointer.best_step == best[step - 1]
    assert checkpointer.is_evaluated(step) == (step in psnr)
    if step == 4:  # What is best is known after a restart too.
      checkpointer.close()
      checkpointer = checkpoints.Checkpointer(tmp_path, keep=keep)
  checkpointer.close()


def test_a_step_saved_twice_stays_as_it_was(checkpointer):
  checkpointer.save(1, _STATE, _RECORD, {'psnr': 20.0})
  checkpointer.save(1, {'x': jnp.zeros(4)}, {'other': 1})
  checkpointer.wait()
  assert checkpointer.restore_record(1) == _RECORD
  abstract = {'x': jax.ShapeDtypeStruct((4,), jnp.float32)}
  chex.assert_trees_all_equal(checkpointer.restore(1, abstract), _STATE)
  assert checkpointer.best_step == 1


def test_a_run_without_checkpoints_has_no_step(checkpointer, tmp_path):
  assert checkpointer.latest_step is None
  assert checkpointer.best_step is None
  assert _steps(tmp_path) == set()


def test_a_step_that_is_not_finished_is_ignored(tmp_path):
  checkpointer = checkpoints.Checkpointer(tmp_path, keep=2)
  checkpointer.save(1, _STATE, _RECORD)
  checkpointer.save(2, _STATE, _RECORD)
  checkpointer.close()
  # What kill -9 leaves: the name under which Orbax writes, and some files.
  finished = tmp_path / workdirs.CHECKPOINTS / '2'
  finished.rename(finished.with_name('2.orbax-checkpoint-tmp'))
  checkpointer = checkpoints.Checkpointer(tmp_path, keep=2)
  assert checkpointer.latest_step == 1
  checkpointer.save(2, _STATE, {'again': True})
  checkpointer.wait()
  assert checkpointer.latest_step == 2
  assert checkpointer.restore_record(2) == {'again': True}
  checkpointer.close()


def test_opening_removes_no_step(tmp_path):
  checkpointer = checkpoints.Checkpointer(tmp_path, keep=3)
  for step in (1, 2, 3):
    checkpointer.save(step, _STATE, _RECORD)
  checkpointer.close()
  checkpoints.Checkpointer(tmp_path, keep=1).close()
  assert _steps(tmp_path) == {'1', '2', '3'}
