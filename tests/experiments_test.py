"""Tests of the experiments: sweeps go on, READMEs show what was measured."""

import json
import pathlib
import subprocess
import types

import pytest

from experiments import sweep
from experiments.codebook_size import codebook_size
from experiments.quantizer_comparison import compare
from experiments.quantizer_comparison import settings
from fsq_jax import configuration

_ROOT = pathlib.Path(__file__).parents[1]
_DEBUG = 'configs/debug.py'
_SCRIPTS = {
    'codebook_size': codebook_size,
    'quantizer_comparison': compare,
}


def _results(name):
  path = _ROOT / 'experiments' / name / 'results.json'
  return json.loads(path.read_text(encoding='utf-8'))


@pytest.mark.slow
def test_a_sweep_trains_what_is_not_trained_yet(tmp_path, monkeypatch):
  runs = {
      'levels': {'model.quantizer.fsq.levels': (5, 5), 'train.num_steps': 3},
      'vq': {'model.quantizer.name': 'vq', 'train.num_steps': 3},
  }
  sweep.train(_DEBUG, {'levels': runs['levels']}, tmp_path)
  assert sweep.read_numbers(tmp_path / 'levels')['codebook_size'] == 25
  started = []

  def run(command, **_):
    started.append(command)
    return types.SimpleNamespace(returncode=75)

  monkeypatch.setattr(subprocess, 'run', run)
  with pytest.raises(SystemExit) as stopped:
    sweep.train(_DEBUG, runs, tmp_path)
  assert stopped.value.code == 75
  (command,) = started
  assert f'--workdir={tmp_path / "vq"}' in command
  assert '--config.model.quantizer.name=vq' in command
  # A run of other steps is not the one that is asked for.
  runs['levels']['train.num_steps'] = 4
  started.clear()
  with pytest.raises(SystemExit):
    sweep.train(_DEBUG, runs, tmp_path)
  assert '--config.train.num_steps=4' in started[0]
  collected = sweep.collect(tmp_path, ['levels'])
  assert set(collected) == {'made_with', 'runs'}
  assert collected['made_with']['devices']


def test_every_run_has_a_config_that_can_be_used():
  runs = settings.tuning_runs('')
  for bits in (4, 6, 8, 9, 10, 11, 12, 14, 16):
    for quantizer in settings.LABELS:
      name = settings.run_name(quantizer, bits, 0)
      runs[name] = settings.final_run(quantizer, bits, 0, '')
  for fields in runs.values():
    configuration.check_config(sweep.make_config(settings.CONFIG, fields))


def test_the_settings_are_those_that_tuning_chose():
  for quantizer, rows in _results('quantizer_comparison')['tuning'].items():
    best = max(rows, key=lambda name: rows[name]['psnr'])
    assert settings.CHOSEN[quantizer] == best


@pytest.mark.parametrize('name', _SCRIPTS)
def test_readmes_show_the_tables_of_the_results(name, capsys):
  _SCRIPTS[name].print_tables(_results(name))
  tables = capsys.readouterr().out.strip().split('\n\n')
  readme = (_ROOT / 'experiments' / name / 'README.md').read_text()
  for table in tables:
    assert table in readme
  assert tables[0] in (_ROOT / 'README.md').read_text()


@pytest.mark.parametrize('name', _SCRIPTS)
def test_plots_are_drawn_from_the_results(name, tmp_path):
  _SCRIPTS[name].plot(_results(name), tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')
