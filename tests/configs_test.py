"""Tests of the files in configs/: each one parses, is valid, and builds."""

import pathlib

import jax
from jax import numpy as jnp
import pytest

from fsq_jax import configuration
from fsq_jax import models

_CONFIGS = sorted(
    (pathlib.Path(__file__).parents[1] / 'configs').glob('*.py')
)
_each_config = pytest.mark.parametrize(
    'path', _CONFIGS, ids=[path.stem for path in _CONFIGS]
)


def _load(path, tmp_path):
  config = configuration.load_config(path)
  if config.data.source == 'folder':
    config.data.data_dir = str(tmp_path)
  return config


@_each_config
def test_config_is_valid_and_locked(path, tmp_path):
  config = _load(path, tmp_path)
  configuration.check_config(config)
  configuration.check_config(config, num_devices=8)
  with pytest.raises(AttributeError):
    config.model.encoder.widht = 8


@_each_config
def test_config_builds_a_model_that_keeps_the_shape(path, tmp_path):
  config = _load(path, tmp_path)
  height, width = config.data.image_size
  patch = config.model.encoder.patch_size
  model = models.build_autoencoder(config.model, config.data.image_size)
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  output, variables = jax.eval_shape(
      lambda x: model.init_with_output(jax.random.key(0), x), images
  )
  assert 'params' in variables
  assert output.reconstructions.shape == images.shape
  assert output.indices.shape == (1, height // patch, width // patch)


@_each_config
def test_header_gives_the_command(path):
  if path.stem != 'default':
    assert f'python launch.py --config=configs/{path.name}' in path.read_text()


@_each_config
def test_config_survives_json(path, tmp_path):
  config = _load(path, tmp_path)
  loaded = configuration.config_from_json(configuration.config_to_json(config))
  assert loaded.to_dict() == config.to_dict()


def test_names_of_configs_tell_their_levels():
  for path in _CONFIGS:
    _, separator, digits = path.stem.partition('fsq_')
    if separator:
      levels = configuration.load_config(path).model.quantizer.fsq.levels
      assert ''.join(map(str, levels)) == digits


def test_config_loads_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for path in _CONFIGS:
    configuration.load_config(path)


def test_overrides_turn_a_config_to_a_folder_of_other_size(tmp_path):
  config = configuration.load_config(_CONFIGS[0].parent / 'fsq_888.py')
  config.data.source = 'folder'
  config.data.data_dir = str(tmp_path)
  config.data.image_size = (64, 64)
  config.data.eval_split = 'val'
  configuration.check_config(config)
