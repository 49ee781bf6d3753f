"""Tests of models out of runs, one of them of an earlier version."""

import pathlib

import jax
import numpy as np
import pytest

from fsq_jax import partitioning
from fsq_jax import train_step
from fsq_jax import trained

# What launch.py --config=configs/debug.py wrote at version 0.1.0, and the
# tokens of 64 images.
_RUN = pathlib.Path(__file__).parent / 'testdata' / 'run'


@pytest.mark.parametrize('which', ['newest', 'best', '8'])
def test_a_run_of_an_earlier_version_is_found(which):
  found = trained.find(_RUN, which)
  assert found.step == 8
  assert found.quantizer['levels'] == [8, 8, 8]
  assert found.config.model.quantizer.name == 'fsq'


@pytest.mark.slow
def test_a_run_of_an_earlier_version_gives_the_same_tokens():
  found = trained.find(_RUN)
  mesh = partitioning.create_mesh(
      found.config.partitioning.mesh, jax.devices()[:2]
  )
  model, variables = trained.restore(found, mesh)
  expected = np.load(_RUN / 'expected.npz')
  images = partitioning.shard_batch(expected['images'], mesh)
  output = jax.jit(train_step.build_eval_step(model))(variables, images)
  # Another processor may round a latent that lies between two levels.
  assert np.mean(output.indices != expected['tokens']) < 1e-2
  assert len(np.unique(expected['tokens'])) > 100
