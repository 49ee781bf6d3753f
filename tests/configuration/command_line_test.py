"""Tests of the overrides of a command line; launch_test has the messages."""

import pathlib

from fsq_jax.configuration import command_line

_ROOT = pathlib.Path(__file__).parents[2]


def _load(*overrides):
  config = command_line.load(
      str(_ROOT / 'configs' / 'fsq_888.py'), None, _ROOT
  )
  config.optim.warmup_steps = 500
  command_line.override(config, ['launch.py', *overrides])
  return config


def test_warmup_is_shortened_with_a_warning(caplog):
  config = _load('--config.train.num_steps=60')
  assert config.optim.warmup_steps == 59
  assert 'optim.warmup_steps is 500 with train.num_steps 60' in caplog.text


def test_warmup_that_fits_or_is_given_stays(caplog):
  assert _load('--config.train.num_steps=501').optim.warmup_steps == 500
  overrides = '--config.train.num_steps=60', '--config.optim.warmup_steps=70'
  assert _load(*overrides).optim.warmup_steps == 70
  assert not caplog.records


def test_warmup_of_a_config_or_of_an_invalid_number_stays(caplog):
  assert _load().optim.warmup_steps == 500
  assert _load('--config.train.num_steps=-1').optim.warmup_steps == 500
  config = command_line.load(
      str(_ROOT / 'configs' / 'fsq_888.py'), None, _ROOT
  )
  config.optim = {'learning_rate': 1.0}
  command_line.override(config, ['launch.py', '--config.train.num_steps=60'])
  assert config.train.num_steps == 60
  assert not caplog.records
