"""Tests of files, lock and metrics of a run in an object store."""

import contextlib
import itertools
import threading
import time

import pytest

from fsq_jax.workdir import files
from fsq_jax.workdir import metric_log
from fsq_jax.workdir import object_lock
from fsq_jax.workdir import object_store


def test_objects_are_written_whole_and_on_condition(folder):
  path = folder / 'x'
  with pytest.raises(FileNotFoundError):
    files.read_bytes(path)
  assert object_store.read_version(path) == (b'', 0)
  first = object_store.write(path, b'1', 0)
  with pytest.raises(object_store.ConflictError, match='another process'):
    object_store.write(path, b'2', 0)
  # As if the answer to the first write had been lost.
  assert object_store.write(path, b'1', 0) == first
  second = object_store.write(path, b'2', first)
  assert object_store.read_version(path) == (b'2', second)
  with contextlib.suppress(KeyError), files.open_atomic(path) as file:
    file.write(b'3')
    raise KeyError
  assert files.read_bytes(path) == b'2'
  files.write_json(path, {'a': float('nan')})
  assert files.read_json(path) == {'a': None}
  assert files.read_json(folder / 'none.json') is None


def test_an_object_that_is_replaced_often_is_read(folder):
  path = folder / 'x'
  object_store.write(path, b'0')
  stop = threading.Event()

  def write():
    for i in itertools.count():
      if stop.is_set():
        return
      object_store.write(path, str(i).encode())

  writer = threading.Thread(target=write)
  writer.start()
  try:
    generations = [object_store.read_version(path)[1] for _ in range(10)]
  finally:
    stop.set()
    writer.join()
  assert generations[0] > 0
  assert generations == sorted(generations)


def test_folders(folder):
  assert not files.is_folder(folder)
  files.write_bytes(folder / 'a' / 'x', b'1')
  files.write_bytes(folder / 'a' / 'b' / 'y', b'22')
  files.write_bytes(folder / 'ab', b'3')
  assert files.is_folder(folder / 'a')
  assert not files.is_folder(folder / 'ab')
  assert files.unused(folder / 'a') == folder / 'a_2'
  files.move_folder(folder / 'a', folder / 'moved' / '8')
  assert not files.is_folder(folder / 'a')
  assert files.read_bytes(folder / 'moved' / '8' / 'b' / 'y') == b'22'
  assert files.size(folder / 'moved' / '8' / 'b' / 'y') == 2
  with files.local_copy(folder / 'ab') as copy:
    assert copy.read_bytes() == b'3'
  object_store.write(f'{folder}/', b'')  # As some tools make a folder.
  assert files.list_names(folder) == ['ab', 'moved']
  assert files.list_names(folder / 'none') == []
  files.delete(folder / 'ab')
  files.delete(folder / 'ab')
  assert files.list_names(folder) == ['moved']
  files.delete_folder(folder / 'moved')
  assert files.list_names(folder) == []


def test_a_file_appears_when_it_is_complete(folder, tmp_path):
  for place in (folder, tmp_path):
    path, incomplete = place / 'x', tmp_path / 'incomplete'
    incomplete.mkdir(exist_ok=True)
    with files.write_locally(path, incomplete) as temporary:
      temporary.write_bytes(b'1')
      assert not files.is_file(path)
    assert files.read_bytes(path) == b'1'
    with (
        contextlib.suppress(KeyError),
        files.write_locally(path, incomplete) as temporary,
    ):
      temporary.write_bytes(b'2')
      raise KeyError
    assert files.read_bytes(path) == b'1'


def test_bucket_must_exist(store):
  with pytest.raises(ValueError, match='gs://nowhere/x cannot be written'):
    files.create('gs://nowhere/x', stores=('gs',))
  with pytest.raises(ValueError, match='there is no bucket'):
    files.create('gs://', stores=('gs',))


@pytest.fixture
def quick_locks(monkeypatch):
  monkeypatch.setattr(object_lock, 'RENEWAL', 0.2)
  monkeypatch.setattr(object_lock, 'PATIENCE', 1.0)


def test_lock_excludes_a_second_run(folder, quick_locks):
  with files.lock(folder):
    with (
        pytest.raises(ValueError, match='is being written by process'),
        files.lock(folder),
    ):
      pass
    assert files.read_bytes(folder / files.LOCK)
  assert object_store.read_version(folder / files.LOCK) == (b'', 0)
  with files.lock(folder):
    pass


def test_lock_of_a_killed_process_is_taken_over(folder, quick_locks):
  object_store.write(folder / files.LOCK, b'process 1 on host\n')
  started = time.monotonic()
  with files.lock(folder):
    assert time.monotonic() - started > 1
    content = files.read_bytes(folder / files.LOCK)
    assert b'process 1 on host' not in content
    # Another process takes it over in turn: this one leaves it alone.
    object_store.write(folder / files.LOCK, b'process 2 on host\n')
    time.sleep(0.5)
  assert files.read_bytes(folder / files.LOCK) == b'process 2 on host\n'


def test_metrics_are_rewritten_and_fenced(folder):
  writer = metric_log.MetricWriter(folder, first_step=0)
  writer.write(1, 'train', {'loss': 1.0})
  assert metric_log.read_metrics(folder) == []
  writer.flush()
  writer.write(2, 'train', {'loss': float('inf')})
  writer.flush()
  rows = [
      {'step': 1, 'split': 'train', 'loss': 1.0},
      {'step': 2, 'split': 'train', 'loss': None},
  ]
  assert metric_log.read_metrics(folder) == rows
  resumed = metric_log.MetricWriter(folder, first_step=1)
  assert metric_log.read_metrics(folder) == rows[:1]
  writer.write(3, 'train', {'loss': 1.0})
  with pytest.raises(object_store.ConflictError):
    writer.flush()
  writer.close()
  resumed.write(2, 'eval', {'psnr': 20.0})
  resumed.close()
  rows[1:] = [{'step': 2, 'split': 'eval', 'psnr': 20.0}]
  assert metric_log.read_metrics(folder) == rows


def test_rows_are_stored_in_intervals(folder, monkeypatch):
  monkeypatch.setattr(metric_log.JsonObject, 'INTERVAL', 0.0)
  writer = metric_log.MetricWriter(folder, first_step=0)
  writer.write(1, 'train', {'loss': 1.0})
  assert len(metric_log.read_metrics(folder)) == 1


def test_a_store_that_fails_for_a_moment_loses_no_row(folder, monkeypatch):
  monkeypatch.setattr(metric_log.JsonObject, 'INTERVAL', 0.0)
  writer = metric_log.MetricWriter(folder, first_step=0)

  def fail(*args):
    raise object_store.StoreError(5, 'no network', str(folder))

  with monkeypatch.context() as patch:
    patch.setattr(object_store, 'write', fail)
    writer.write(1, 'train', {'loss': 1.0})
    with pytest.raises(object_store.StoreError, match='no network'):
      writer.flush()
  writer.write(2, 'train', {'loss': 2.0})
  assert [x['step'] for x in metric_log.read_metrics(folder)] == [1, 2]
