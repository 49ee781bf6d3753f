"""What a run records about how it was made."""

import datetime
import json
import platform
import shlex
import subprocess
import sys

import jax
import pytest

import fsq_jax
from fsq_jax.workdir import provenance


def _git(folder, *arguments):
  identity = ('-c', 'user.name=Test', '-c', 'user.email=test@example.com')
  command = ['git', '-C', str(folder), *identity, *arguments]
  return subprocess.run(
      command, check=True, capture_output=True, text=True
  ).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """A git checkout with one commit, which the package seems to lie in."""
  package = tmp_path / 'fsq_jax' / '__init__.py'
  package.parent.mkdir()
  package.write_text('')
  _git(tmp_path, 'init', '--quiet')
  _git(tmp_path, 'add', '.')
  _git(tmp_path, 'commit', '--quiet', '--message=First')
  monkeypatch.setattr(fsq_jax, '__file__', str(package))
  return tmp_path


def test_description_survives_json_and_names_versions_and_devices():
  facts = provenance.describe()
  assert json.loads(json.dumps(facts)) == facts
  assert facts['versions']['fsq_jax'] == fsq_jax.__version__
  assert facts['versions']['jax'] == jax.__version__
  assert facts['versions']['python'] == platform.python_version()
  assert len(facts['devices']) == jax.device_count()
  assert facts['devices'][0].startswith('cpu:0')
  assert facts['num_processes'] == 1


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('{"started_from": {"model.encoder.checkpoint": "a"}}',
         {'model.encoder.checkpoint': 'a'}),
        ('{}', {}),
    ],
)  # fmt: skip
def test_what_a_run_started_from_is_read_again(
    tmp_path, caplog, text, expected
):
  path = tmp_path / 'run.json'
  assert provenance.read_started_from(path) == {}
  path.write_text(text)
  assert provenance.read_started_from(path) == expected
  assert caplog.text == ''


@pytest.mark.parametrize('data', [b'', b'{"started', b'[1]', b'\xff{}'])
def test_a_damaged_description_is_warned_of(tmp_path, caplog, data):
  path = tmp_path / 'run.json'
  path.write_bytes(data)
  assert provenance.read_started_from(path) == {}
  assert f'{path} cannot be read' in caplog.text


def test_start_is_in_universal_time():
  started = datetime.datetime.fromisoformat(provenance.describe()['started'])
  now = datetime.datetime.now(datetime.UTC)
  assert started.utcoffset() == datetime.timedelta(0)
  assert abs(now - started) < datetime.timedelta(minutes=1)


def test_command_can_be_pasted_into_a_shell(monkeypatch):
  arguments = ['launch.py', '--config.model.quantizer.fsq.levels=(8,)', "it's"]
  monkeypatch.setattr(sys, 'argv', arguments)
  assert shlex.split(provenance.describe()['command']) == arguments


def test_revision_is_the_commit_and_tells_changes(checkout):
  commit = _git(checkout, 'rev-parse', 'HEAD')
  (checkout / 'untracked').write_text('')
  assert provenance.git_revision() == commit
  (checkout / 'fsq_jax' / '__init__.py').write_text('# Changed.')
  assert provenance.git_revision() == commit + '+'


def test_revision_of_a_surrounding_checkout_is_not_ours(checkout, monkeypatch):
  installed = checkout / 'site-packages' / 'fsq_jax' / '__init__.py'
  installed.parent.mkdir(parents=True)
  monkeypatch.setattr(fsq_jax, '__file__', str(installed))
  assert provenance.git_revision() is None


def test_revision_is_none_without_a_commit_or_without_git(
    checkout, monkeypatch
):
  _git(checkout, 'update-ref', '-d', 'HEAD')
  assert provenance.git_revision() is None
  monkeypatch.setenv('PATH', '')
  assert provenance.git_revision() is None
