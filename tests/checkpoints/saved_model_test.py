"""Tests of models out of runs, one of them of an earlier version."""

import contextlib
import pathlib
import shutil

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import checkpoints
from fsq_jax import configuration
from fsq_jax.checkpoints import saved_model
from fsq_jax.configuration import loading
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.runtime import partitioning

# What launch.py --config=configs/debug.py wrote at version 0.1.0, and the
# tokens of 64 images.
_RUN = pathlib.Path(__file__).parents[1] / 'testdata' / 'run'


@pytest.mark.parametrize('which', ['newest', 'best', '8'])
def test_a_run_of_an_earlier_version_is_found(which):
  found = saved_model.find_run(_RUN, which)
  assert found.step == 8
  assert found.quantizer['levels'] == [8, 8, 8]
  assert found.config.model.quantizer.name == 'fsq'


@pytest.mark.parametrize(
    ('make', 'problem'),
    [
        (lambda folder: None, 'run is not a folder; give the workdir'),
        (lambda folder: folder.mkdir(), 'run has no checkpoint: nothing was'),
        (
            lambda folder: (folder / 'checkpoints').mkdir(parents=True),
            r'run has no checkpoint: (.|\n)*--config=CONFIG --workdir=.*run$',
        ),
        (
            lambda folder: (folder / 'a' / 'checkpoints').mkdir(parents=True),
            r"run is not a run; give one of \['.*/run/a'\]",
        ),
        (
            lambda folder: (
                folder.mkdir(), (folder / 'model.safetensors').touch()
            ),
            'run holds weights, not a run .* A saved tokenizer works with',
        ),
    ],
)
def test_a_folder_without_checkpoints_says_why(make, problem, tmp_path):
  make(tmp_path / 'run')
  for which in ('newest', 'best', '8'):
    with pytest.raises(ValueError, match=problem):
      saved_model.find_run(tmp_path / 'run', which)


def test_the_newest_the_best_and_a_numbered_step_are_found(tmp_path):
  run = checkpoints.Checkpointer(_RUN, read_only=True)
  with contextlib.closing(run):
    record = run.restore_record(8)
  with contextlib.closing(checkpoints.Checkpointer(tmp_path, keep=3)) as run:
    for step, psnr in ((1, 20.0), (2, 25.0), (3, 21.0)):
      run.save(step, {'x': jnp.arange(4.0)}, record, {'psnr': psnr})

  def find(*names):
    return [saved_model.find_run(tmp_path, name).step for name in names]

  assert find('newest', 'best', '1', '3') == [3, 2, 1, 3]
  (tmp_path / 'checkpoints' / '3' / 'record' / 'metadata').unlink()
  assert find('newest', 'best') == [2, 2]


def test_steps_that_are_not_there_are_told_from_the_others():
  with pytest.raises(ValueError, match=(
      r"no checkpoint 7; allowed: 'newest', 'best' and the steps \[8\]"
  )):
    saved_model.find_run(_RUN, '7')


def test_without_an_evaluation_none_is_best(monkeypatch):
  monkeypatch.setattr(checkpoints.Checkpointer, 'best_step', None)
  with pytest.raises(ValueError, match=(
      r"no best checkpoint: none of the steps \[8\] .* Use 'newest' or one"
  )):
    saved_model.find_run(_RUN, 'best')


def test_the_steps_that_are_damaged_are_told_why(tmp_path):
  run = shutil.copytree(_RUN, tmp_path / 'run')
  (run / 'checkpoints' / '8' / 'record' / 'metadata').unlink()
  with pytest.raises(ValueError, match=(
      r"no intact checkpoint 'newest' among the steps \[8\]"
      r'(.|\n)*the record cannot be read'
  )):
    saved_model.find_run(run)


def test_a_path_of_an_earlier_version_is_looked_for_from_here(
    tmp_path, monkeypatch
):
  """Runs have had data.data_dir as it was given."""
  monkeypatch.chdir(tmp_path)
  read = configuration.config_from_json

  def read_relative(text):
    config = read(text)
    config.data.data_dir = 'images'
    return config

  monkeypatch.setattr(loading, 'config_from_json', read_relative)
  assert saved_model.find_run(_RUN).config.data.data_dir == f'{tmp_path}/images'


@pytest.mark.parametrize(
    ('fields', 'same'),
    [
        ({'model.encoder.checkpoint': 'b'}, True),
        ({'model.latent_statistics': '/b'}, True),
        ({'model.latent_statistics': ''}, False),
        ({'model.remat': 'blocks'}, True),
        ({'model.quantizer.fsq.noise': 0.5}, True),
        ({'model.quantizer.vq.codebook_size': 99}, True),
        ({'model.encoder.width': 8}, False),
        ({'model.dtype': 'bfloat16'}, False),
    ],
)
def test_a_config_may_differ_in_what_leaves_the_model_the_same(fields, same):
  saved = saved_model.find_run(_RUN).config
  saved.model.latent_statistics = '/a'
  given = saved.copy_and_resolve_references()
  given.update_from_flattened_dict(fields)
  if same:
    saved_model.check_same_model(saved, given)
  else:
    with pytest.raises(ValueError, match='another model'):
      saved_model.check_same_model(saved, given)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_gives_the_same_tokens():
  found = saved_model.find_run(_RUN)
  mesh = partitioning.create_mesh(
      found.config.partitioning.mesh, jax.devices()[:2]
  )
  model, variables = saved_model.restore(found, mesh)
  expected = np.load(_RUN / 'expected.npz')
  images = partitioning.shard_batch(expected['images'], mesh)
  output = jax.jit(evaluators.build_eval_step(model))(variables, images)
  # Another processor may round a latent that lies between two levels.
  assert np.mean(output.indices != expected['tokens']) < 1e-2
  assert len(np.unique(expected['tokens'])) > 100
