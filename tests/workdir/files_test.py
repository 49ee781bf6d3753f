"""Tests of the files of a run: whole or not there, locked, read back."""

import errno
import fcntl
import json
import math
import os
import pathlib

import pytest

from fsq_jax import workdir as workdirs
from fsq_jax.workdir import files


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_create_makes_the_folder_and_its_parents(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = workdirs.create('runs/first')
  assert folder == tmp_path / 'runs' / 'first'
  assert folder.is_dir()
  (folder / 'kept').touch()
  assert workdirs.create(folder) == folder
  assert _names(folder) == ['kept']


def test_create_expands_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert workdirs.create('~/run') == tmp_path / 'run'


@pytest.mark.parametrize('below', ['', 'run'])
def test_create_refuses_a_file(tmp_path, below):
  path = tmp_path / 'file'
  path.write_text('kept')
  with pytest.raises(ValueError, match=r'is a file|cannot be written') as error:
    workdirs.create(path / below)
  assert str(path / below) in str(error.value)
  assert '--workdir' in str(error.value)
  assert path.read_text() == 'kept'


@pytest.mark.skipif(os.geteuid() == 0, reason='root writes everywhere')
@pytest.mark.parametrize('below', ['', 'run'])
def test_create_refuses_a_read_only_folder(tmp_path, below):
  tmp_path.chmod(0o500)
  with pytest.raises(ValueError, match='Permission denied'):
    workdirs.create(tmp_path / below)


def test_create_refuses_a_folder_where_no_file_can_be_made(
    tmp_path, monkeypatch
):
  def touch(path):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

  monkeypatch.setattr(pathlib.Path, 'touch', touch)
  with pytest.raises(ValueError, match='Read-only file system'):
    workdirs.create(tmp_path)


def test_create_allows_a_process_of_the_same_id_on_another_host(
    tmp_path, monkeypatch
):
  touch = pathlib.Path.touch

  def touch_and_lose(path):
    touch(path)
    os.unlink(path)

  monkeypatch.setattr(pathlib.Path, 'touch', touch_and_lose)
  assert workdirs.create(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ('text', 'holder'),
    [('', 'another process'), ('process 1 on a\n', 'process 1 on a')],
)
def test_a_folder_that_is_being_written_is_refused(tmp_path, text, holder):
  (tmp_path / workdirs.LOCK).write_text(text)
  with open(tmp_path / workdirs.LOCK, 'a') as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    with (
        pytest.raises(ValueError, match=f'being written by {holder}; wait'),
        workdirs.lock(tmp_path),
    ):
      pass


def test_writing_replaces_the_file(tmp_path):
  path = tmp_path / 'file'
  for data in (b'a longer text', b'short', b''):
    workdirs.write_bytes(path, data)
    assert path.read_bytes() == data
  assert _names(tmp_path) == ['file']


@pytest.mark.parametrize('failing', ['fsync', 'replace'])
def test_failure_leaves_the_old_file_and_no_temporary(
    tmp_path, monkeypatch, failing
):
  path = tmp_path / 'file'
  workdirs.write_bytes(path, b'old')

  def fail(*_):
    # What is on disk by now is not under the file's own name.
    assert path.read_bytes() == b'old'
    assert len(_names(tmp_path)) == 2
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(files.os, failing, fail)
    with pytest.raises(OSError, match='No space left'):
      workdirs.write_bytes(path, b'new')
  assert path.read_bytes() == b'old'
  assert _names(tmp_path) == ['file']


def test_json_has_null_for_what_is_not_finite(tmp_path):
  path = tmp_path / 'value.json'
  value = {
      'a': math.nan,
      'b': [1, -math.inf, {'c': (math.inf, 0.5)}],
      7: 'text',
      'd': None,
      'e': True,
  }
  workdirs.write_json(path, value)
  text = path.read_text()
  assert text.endswith('}\n')
  assert 'NaN' not in text
  assert 'Infinity' not in text
  assert json.loads(text) == {
      'a': None,
      'b': [1, None, {'c': [None, 0.5]}],
      '7': 'text',
      'd': None,
      'e': True,
  }


def test_json_is_read_back_or_named(tmp_path):
  path = tmp_path / 'run.json'
  assert workdirs.read_json(path) is None
  workdirs.write_json(path, {'a': [1, 2]})
  assert workdirs.read_json(path) == {'a': [1, 2]}
  for data in (b'', b'{"a"', b'[1]', b'3', b'\xff{}', b'[' * 10**5):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r'run\.json cannot be read: '):
      workdirs.read_json(path)
  path.unlink()
  path.mkdir()
  with pytest.raises(ValueError, match=r'cannot be read: .*directory'):
    workdirs.read_json(path)
