"""Tests of damaged checkpoints: found, passed over, never taken for whole."""

import errno
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import chex
import jax
from jax import numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from fsq_jax import checkpoints as checkpoints_lib
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import checkpointer as checkpointer_lib
from fsq_jax.checkpoints import integrity
from fsq_jax.runtime import processes as processes_lib


def _state(step):
  values = np.random.default_rng(step).normal(size=(40, 50))
  return {
      'kernel': jnp.asarray(values, jnp.float32),
      'scale': jnp.asarray(values[0], jnp.bfloat16),
      'step': jnp.int32(step),
  }


def _record(step):
  return {'config': {'seed': 3}, 'iterator': {'next_index': step}}


_Reader = ocp.CompositeCheckpointHandler

_ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    _state(0),
)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Folder of a run with the steps 1 and 2."""
  folder = tmp_path_factory.mktemp('saved')
  checkpointer = checkpoints_lib.Checkpointer(folder, keep=2)
  for step in (1, 2):
    checkpointer.save(step, _state(step), _record(step), {'psnr': 20.0 + step})
  checkpointer.wait()
  checkpointer.close()
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  """Copy of that folder, to be damaged."""
  return shutil.copytree(saved, tmp_path / 'run')


def _newest(folder):
  return folder / workdirs.CHECKPOINTS / '2'


def _files(folder):
  return sorted(x for x in folder.rglob('*') if x.is_file())


def _restore(folder):
  """Restores the newest step that can be, which must be what was saved."""
  checkpointer = checkpoints_lib.Checkpointer(folder, keep=2)
  try:
    restored = checkpointer.restore_newest(lambda record: _ABSTRACT)
  finally:
    checkpointer.close()
  chex.assert_trees_all_equal(restored.state, _state(restored.step))
  assert restored.record == _record(restored.step)
  return restored.step


@pytest.fixture(scope='module')
def names(saved):
  return [str(x.relative_to(_newest(saved))) for x in _files(_newest(saved))]


@pytest.mark.parametrize('how', ['deleted', 'empty', 'cut'])
def test_any_file_may_be_lost(saved, names, tmp_path, how):
  taken = {}
  for number, name in enumerate(names):
    folder = shutil.copytree(saved, tmp_path / str(number))
    path = _newest(folder) / name
    content = path.read_bytes()
    path.unlink()
    if how != 'deleted':
      path.write_bytes(b'' if how == 'empty' else content[: len(content) // 2])
    taken[name] = _restore(folder)
    assert (folder / workdirs.DAMAGED / '2').is_dir() == (taken[name] == 1)
  # What holds values must be missed; the rest is Orbax's affair.
  for part in ('state/d/', 'record/metadata', 'manifest/metadata'):
    assert {taken[x] for x in names if x.startswith(part)} == {1}


@pytest.mark.fast_limit(10)
def test_bits_that_flip_are_found(saved, names, tmp_path):
  rng = np.random.default_rng(0)
  sizes = np.array([(_newest(saved) / name).stat().st_size for name in names])
  taken = []
  for number in range(40):
    folder = shutil.copytree(saved, tmp_path / str(number))
    # Half of them where most bytes are, half in any file.
    shares = sizes / sizes.sum() if number % 2 else np.sign(sizes)
    name = rng.choice(names, p=shares / shares.sum())
    path = _newest(folder) / name
    _flip(path, rng)
    taken.append(_restore(folder))
    shutil.rmtree(folder)
  assert set(taken) == {1, 2}


def _flip(path, rng):
  content = bytearray(path.read_bytes())
  content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  path.write_bytes(content)


def _part(*names):
  return {name: _ABSTRACT[name] for name in names}


def test_a_part_of_a_state_is_held_to_its_hashes(saved, names, tmp_path):
  rng = np.random.default_rng(0)
  refused = 0
  for number, name in enumerate(x for x in names if x.startswith('state/')):
    folder = shutil.copytree(saved, tmp_path / str(number))
    for damage in (lambda path: _flip(path, rng), lambda path: path.unlink()):
      damage(_newest(folder) / name)
      checkpointer = checkpoints_lib.Checkpointer(folder, read_only=True)
      try:
        state = checkpointer.restore(2, _part('scale', 'step'), partial=True)
      except checkpoints_lib.CorruptedError:
        refused += 1
      else:
        assert state.keys() == {'scale', 'step'}
        chex.assert_trees_all_equal(
            state, {name: _state(2)[name] for name in state}
        )
      checkpointer.close()
  assert 0 < refused < 2 * number


def test_what_is_not_asked_for_is_not_read(saved, monkeypatch):
  checkpointer = checkpoints_lib.Checkpointer(saved, read_only=True)
  hash_arrays = integrity.hash_arrays
  hashed = []

  def hash_and_record(state):
    hashed.extend(state)
    return hash_arrays(state)

  monkeypatch.setattr(integrity, 'hash_arrays', hash_and_record)
  checkpointer.restore(2, _part('scale'), partial=True)
  assert hashed == ['scale']
  # In any order.
  chex.assert_trees_all_equal(checkpointer.restore(2, _ABSTRACT), _state(2))
  checkpointer.restore(2, _part('step'), partial=True)
  other = {'kernel': _ABSTRACT['scale']}
  with pytest.raises(ValueError, match='other arrays than this model'):
    checkpointer.restore(2, other, partial=True)
  checkpointer.close()


def test_a_number_is_free_again_once_its_step_is_set_aside(folder):
  for path in (_newest(folder) / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')
  for other in ('kept', None):
    checkpointer = checkpoints_lib.Checkpointer(folder, keep=2)
    assert checkpointer.restore_newest(lambda _: _ABSTRACT).step == 1
    assert checkpointer.steps == [1]
    assert checkpointer.best_step == 1
    checkpointer.save(2, _state(2), _record(2), {'psnr': 25.0})
    checkpointer.wait()
    assert checkpointer.best_step == 2
    checkpointer.close()
    if other:
      (_newest(folder) / 'manifest' / 'metadata').unlink()
  assert _restore(folder) == 2
  assert {x.name for x in (folder / workdirs.DAMAGED).iterdir()} == {'2', '2_2'}


@pytest.mark.parametrize('content', [None, 'notes.txt', 'state/_METADATA'])
def test_foreign_folders_are_passed_over(folder, content):
  foreign = folder / workdirs.CHECKPOINTS / '3'
  foreign.mkdir()
  if content:
    (foreign / content).parent.mkdir(exist_ok=True)
    (foreign / content).write_text('{}')
  assert _restore(folder) == 2


def test_a_step_under_another_number_is_passed_over(folder):
  shutil.copytree(_newest(folder), folder / workdirs.CHECKPOINTS / '3')
  assert _restore(folder) == 2


def test_nothing_is_changed_when_no_step_is_left(folder):
  for step in '12':
    for path in _files(folder / workdirs.CHECKPOINTS / step / 'state'):
      path.write_bytes(path.read_bytes()[:-1])
  before = {path: path.read_bytes() for path in _files(folder)}
  checkpointer = checkpoints_lib.Checkpointer(folder)
  with pytest.raises(ValueError, match='nothing was changed there') as e:
    checkpointer.restore_newest(lambda _: _ABSTRACT)
  checkpointer.close()
  assert 'Step 1: ' in str(e.value)
  assert 'Step 2: ' in str(e.value)
  assert {path: path.read_bytes() for path in _files(folder)} == before


def test_an_array_that_is_not_what_was_saved_is_named(saved, monkeypatch):
  checkpointer = checkpoints_lib.Checkpointer(saved, read_only=True)
  read = _Reader.restore

  def change(self, *args, **kwargs):
    result = read(self, *args, **kwargs)
    if 'state' in result:
      result['state']['kernel'] = result['state']['kernel'].at[3, 4].add(1e-6)
    return result

  monkeypatch.setattr(_Reader, 'restore', change)
  with pytest.raises(
      checkpoints_lib.CorruptedError,
      match=r'Step 2: arrays differ from .*\n  kernel: \w{16} -> \w{16}$',
  ):
    checkpointer.restore(2, _ABSTRACT)
  checkpointer.close()


def test_other_arrays_are_an_error_and_no_damage(folder):
  checkpointer = checkpoints_lib.Checkpointer(folder)
  wanted = dict(
      _ABSTRACT,
      kernel=jax.ShapeDtypeStruct((50, 40), jnp.float32),
      scale=jax.ShapeDtypeStruct((50,), jnp.float32),
      bias=jax.ShapeDtypeStruct((50,), jnp.float32),
  )
  with pytest.raises(ValueError, match='saved -> wanted') as error:
    checkpointer.restore_newest(lambda _: wanted)
  assert not isinstance(error.value, checkpoints_lib.CorruptedError)
  assert str(error.value).splitlines()[1:] == [
      '  bias: nothing -> float32[50]',
      '  kernel: float32[40, 50] -> float32[50, 40]',
      '  scale: bfloat16[50] -> float32[50]',
  ]
  checkpointer.close()
  assert not (folder / workdirs.DAMAGED).exists()


def test_what_an_interrupted_save_has_left_is_removed(folder):
  left = folder / workdirs.CHECKPOINTS / '3.orbax-checkpoint-tmp'
  shutil.copytree(_newest(folder), left)
  reader = checkpoints_lib.Checkpointer(folder, read_only=True)
  assert reader.steps == [1, 2]
  reader.close()
  assert left.is_dir()  # A run may be at it.
  assert _restore(folder) == 2
  # A thread removes it, which the next save waits for.
  deadline = time.monotonic() + 60
  while left.exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not left.exists()


def test_a_step_that_cannot_be_written_says_so(folder, monkeypatch):
  checkpointer = checkpoints_lib.Checkpointer(folder, keep=2)

  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(ocp.CheckpointManager, 'save', full)
  with pytest.raises(
      checkpoints_lib.SaveError,
      match=r'Step 3, or .*No space left on device.*on disk are \[1, 2\]',
  ):
    checkpointer.save(3, _state(3), _record(3))
  checkpointer.close()


def test_a_manifest_of_another_format_is_not_taken(folder):
  path = _newest(folder) / 'manifest' / 'metadata'
  manifest = json.loads(path.read_text())
  manifest.pop('sha256')
  manifest['format'] += 1
  sha256 = integrity.hash_json(manifest)
  path.write_text(json.dumps({**manifest, 'sha256': sha256}))
  checkpointer = checkpoints_lib.Checkpointer(folder, read_only=True)
  with pytest.raises(checkpoints_lib.CorruptedError, match='format 2, not 1'):
    checkpointer.restore_record(2)
  checkpointer.close()


def _assert_refused(folder, match):
  """Asserts that no step is taken or moved, for an error of that text."""
  with pytest.raises(checkpoints_lib.ReadError, match=match):
    _restore(folder)
  checkpoints = (folder / workdirs.CHECKPOINTS).iterdir()
  assert {x.name for x in checkpoints} == {'1', '2'}
  assert not (folder / workdirs.DAMAGED).exists()


def test_files_that_cannot_be_opened_are_no_damage(folder):
  paths = list((_newest(folder) / 'state' / 'd').iterdir())
  for path in paths:
    path.unlink()
    path.symlink_to(path.name)  # The superuser cannot open that either.
  _assert_refused(
      folder, r'checkpoints/2: the state cannot be read now .*/d/\w+": Too many'
  )
  for path in paths:
    path.unlink()
  assert _restore(folder) == 1


def test_the_manager_is_closed_if_a_manifest_cannot_be_read(
    folder, monkeypatch
):
  def fail(*args, **kwargs):
    raise _os_error(errno.EIO)

  monkeypatch.setattr(ocp.CompositeCheckpointHandler, 'restore', fail)
  closed = []
  close = ocp.CheckpointManager.close
  monkeypatch.setattr(
      ocp.CheckpointManager, 'close', lambda x: (closed.append(x), close(x))
  )
  with pytest.raises(checkpoints_lib.ReadError, match='the manifest cannot be'):
    checkpoints_lib.Checkpointer(folder)
  assert len(closed) == 1


def _os_error(number, *names):
  return OSError(number, os.strerror(number), *names)


_STORAGE_ERRORS = [
    _os_error(errno.EIO),
    *(
        _os_error(number, 'd/0')
        for number in (
            errno.ESTALE, errno.EMFILE, errno.EACCES, errno.ETIMEDOUT,
            errno.ENOSPC,
        )
    ),
    ValueError("UNKNOWN: Reading d/0: I/O error [os_error_code='5']"),
    ValueError('UNAVAILABLE: Reading d/0'),
    ValueError('PERMISSION_DENIED: Reading d/0'),
    ValueError('Error opening d/0: RESOURCE_EXHAUSTED: quota'),
    ValueError('DEADLINE_EXCEEDED: Reading d/0'),
]


def _open_where_reading_raises(folder, error, monkeypatch):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(_Reader, 'restore', fail)
  checkpoints_lib.Checkpointer(folder, read_only=True).close()


@pytest.mark.parametrize('link', ['', '__cause__', '__context__'])
def test_errors_of_the_system_are_no_damage(saved, monkeypatch, link):
  wrong = []
  for error in _STORAGE_ERRORS:
    raised = error
    if link:
      raised = RuntimeError('Encountered error while reading')
      setattr(raised, link, error)
    try:
      _open_where_reading_raises(saved, raised, monkeypatch)
    except checkpoints_lib.ReadError as refusal:
      message = str(refusal)
      if 'checkpoints/1: the manifest' in message and str(error) in message:
        continue
    wrong.append(error)
  assert not wrong


def test_errors_about_files_are_damage(saved, monkeypatch, caplog):
  for error in (_os_error(errno.ENOENT, 'd/0'), ValueError('a bad chunk')):
    _open_where_reading_raises(saved, error, monkeypatch)
    assert f'the manifest cannot be read ({type(error).__name__}' in caplog.text
    caplog.clear()


@pytest.mark.parametrize('part', ['manifest', 'record', 'state'])
def test_no_step_is_moved_when_one_cannot_be_read(folder, monkeypatch, part):
  (_newest(folder) / 'record' / 'metadata').write_text('')
  read = _Reader.restore

  def fail(self, path, args):
    if path.name == '1' and part in args:
      raise _os_error(errno.EIO)
    return read(self, path, args)

  monkeypatch.setattr(_Reader, 'restore', fail)
  _assert_refused(folder, f'checkpoints/1: the {part} cannot be read now')


def _as_one_of_two(monkeypatch, answers):
  """Has this process be joined by another, which says how its reads ended."""
  kinds = []

  def allgather(kind):
    kinds.append(int(kind))
    return np.stack([kind, np.int32(answers[len(kinds) - 1])])

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes_lib, 'gather', allgather)
  monkeypatch.setattr(
      checkpointer_lib.multihost_utils, 'sync_global_devices', lambda name: None
  )
  return kinds


# Two manifests; then manifest, record, manifest, state, hashes of each step.
@pytest.mark.parametrize('at', range(5))
def test_what_another_process_finds_damaged_is_passed_over(
    folder, monkeypatch, caplog, at
):
  checkpointer = checkpoints_lib.Checkpointer(folder, keep=2)
  answers = [0] * at + [1] + [0] * 5
  hashed = []
  hash_arrays = integrity.hash_arrays
  monkeypatch.setattr(
      integrity,
      'hash_arrays',
      lambda state: hashed.append(state) or hash_arrays(state),
  )
  kinds = _as_one_of_two(monkeypatch, answers)
  restored = checkpointer.restore_newest(lambda record: _ABSTRACT)
  assert restored.step == 1
  assert kinds == [0] * len(answers)
  assert 'process 1 found it corrupted' in caplog.text
  assert len(hashed) == 1 + (at == 4)
  assert (folder / workdirs.DAMAGED / '2').is_dir()
  monkeypatch.undo()
  checkpointer.close()


@pytest.mark.parametrize('own', ['well', 'damaged'])
def test_no_step_is_moved_when_another_process_cannot_read(
    folder, monkeypatch, own
):
  if own == 'damaged':
    (_newest(folder) / 'record' / 'metadata').unlink()
  checkpointer = checkpoints_lib.Checkpointer(folder, keep=2)
  _as_one_of_two(monkeypatch, [0, 2])
  with pytest.raises(
      checkpoints_lib.ReadError, match='process 1 cannot read'
  ):
    checkpointer.restore_newest(lambda record: _ABSTRACT)
  assert not (folder / workdirs.DAMAGED).exists()
  monkeypatch.undo()
  checkpointer.close()


# One of two processes, which save the steps 1 and 2, lose what the second has
# written of step 2, and restore.
_ONE_OF_TWO = """
import pathlib, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from fsq_jax import checkpoints
from fsq_jax.runtime import processes

folder, address, number = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
processes.join_processes(address, 2, int(number))
mesh = jax.make_mesh((2,), ('fsdp',))
sharding = NamedSharding(mesh, PartitionSpec('fsdp'))
values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
make = lambda step: {
    'x': jax.make_array_from_callback(
        values.shape, sharding, lambda i: values[i] + step
    )
}
checkpointer = checkpoints.Checkpointer(folder, keep=2)
for step in (1, 2):
  checkpointer.save(step, make(step), {'at': step}, {'psnr': step})
checkpointer.wait()
checkpointer.close()
multihost_utils.sync_global_devices('saved')
if jax.process_index() == 1:
  for path in folder.glob('checkpoints/2/state/ocdbt.process_1/d/*'):
    path.write_bytes(b'')
multihost_utils.sync_global_devices('damaged')
checkpointer = checkpoints.Checkpointer(folder, keep=2)
abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    make(0),
)
restored = checkpointer.restore_newest(lambda record: abstract)
assert restored.step == 1, restored
for shard in restored.state['x'].addressable_shards:
  np.testing.assert_array_equal(shard.data, values[shard.index] + 1)
checkpointer.save(2, restored.state, restored.record)
checkpointer.wait()
assert checkpointer.steps == [1, 2]
checkpointer.close()
"""


@pytest.mark.slow
def test_two_processes_pass_over_what_one_finds_damaged(tmp_path):
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{listener.getsockname()[1]}'
  folder = tmp_path / 'run'
  folder.mkdir()
  processes = [
      subprocess.Popen(
          [sys.executable, '-c', _ONE_OF_TWO, folder, address, str(number)],
          cwd=pathlib.Path(__file__).parents[2],
          env={**os.environ, 'XLA_FLAGS': ''},
          stderr=subprocess.PIPE,
          text=True,
      )
      for number in range(2)
  ]
  try:
    logs = [process.communicate(timeout=300)[1] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], logs
  assert 'Step 2: the state cannot be read' in logs[1]
  assert 'Step 2: process 1 found it corrupted' in logs[0]
  assert [x.name for x in (folder / workdirs.DAMAGED).iterdir()] == ['2']
