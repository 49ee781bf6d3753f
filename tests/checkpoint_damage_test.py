"""Tests of damaged checkpoints: found, passed over, never taken for whole."""

import json
import shutil

import chex
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import checkpoint
from fsq_jax import workdir


def _state(step):
  values = np.random.default_rng(step).normal(size=(40, 50))
  return {
      'kernel': jnp.asarray(values, jnp.float32),
      'scale': jnp.asarray(values[0], jnp.bfloat16),
      'step': jnp.int32(step),
  }


def _record(step):
  return {'config': {'seed': 3}, 'iterator': {'next_index': step}}


_ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    _state(0),
)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Folder of a run with the steps 1 and 2."""
  folder = tmp_path_factory.mktemp('saved')
  checkpointer = checkpoint.Checkpointer(folder, keep=2)
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
  return folder / workdir.CHECKPOINTS / '2'


def _files(folder):
  return sorted(x for x in folder.rglob('*') if x.is_file())


def _restore(folder):
  """Restores the newest step that can be, which must be what was saved."""
  checkpointer = checkpoint.Checkpointer(folder, keep=2)
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
    assert (folder / workdir.DAMAGED / '2').is_dir() == (taken[name] == 1)
  # What holds values must be missed; the rest is Orbax's affair.
  for part in ('state/d/', 'record/metadata', 'manifest/metadata'):
    assert {taken[x] for x in names if x.startswith(part)} == {1}


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
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)
    taken.append(_restore(folder))
    shutil.rmtree(folder)
  assert set(taken) == {1, 2}


def test_a_number_is_free_again_once_its_step_is_set_aside(folder):
  for path in (_newest(folder) / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')
  for other in ('kept', None):
    checkpointer = checkpoint.Checkpointer(folder, keep=2)
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
  assert {x.name for x in (folder / workdir.DAMAGED).iterdir()} == {'2', '2_2'}


@pytest.mark.parametrize('content', [None, 'notes.txt', 'state/_METADATA'])
def test_foreign_folders_are_passed_over(folder, content):
  foreign = folder / workdir.CHECKPOINTS / '3'
  foreign.mkdir()
  if content:
    (foreign / content).parent.mkdir(exist_ok=True)
    (foreign / content).write_text('{}')
  assert _restore(folder) == 2


def test_a_step_under_another_number_is_passed_over(folder):
  shutil.copytree(_newest(folder), folder / workdir.CHECKPOINTS / '3')
  assert _restore(folder) == 2


def test_nothing_is_changed_when_no_step_is_left(folder):
  for step in '12':
    for path in _files(folder / workdir.CHECKPOINTS / step / 'state'):
      path.write_bytes(path.read_bytes()[:-1])
  before = {path: path.read_bytes() for path in _files(folder)}
  checkpointer = checkpoint.Checkpointer(folder)
  with pytest.raises(ValueError, match='nothing was changed there') as e:
    checkpointer.restore_newest(lambda _: _ABSTRACT)
  checkpointer.close()
  assert 'Step 1: ' in str(e.value)
  assert 'Step 2: ' in str(e.value)
  assert {path: path.read_bytes() for path in _files(folder)} == before


def test_an_array_that_is_not_what_was_saved_is_named(saved, monkeypatch):
  checkpointer = checkpoint.Checkpointer(saved, read_only=True)
  read = checkpointer._manager.restore

  def change(*args, **kwargs):
    result = read(*args, **kwargs)
    if 'state' in result:
      result['state']['kernel'] = result['state']['kernel'].at[3, 4].add(1e-6)
    return result

  monkeypatch.setattr(checkpointer._manager, 'restore', change)
  with pytest.raises(
      checkpoint.DamagedError,
      match=r'Step 2: arrays are not .*\n  kernel: \w{16} -> \w{16}$',
  ):
    checkpointer.restore(2, _ABSTRACT)
  checkpointer.close()


def test_other_arrays_are_an_error_and_no_damage(folder):
  checkpointer = checkpoint.Checkpointer(folder)
  wanted = dict(
      _ABSTRACT,
      kernel=jax.ShapeDtypeStruct((50, 40), jnp.float32),
      scale=jax.ShapeDtypeStruct((50,), jnp.float32),
      bias=jax.ShapeDtypeStruct((50,), jnp.float32),
  )
  with pytest.raises(ValueError, match='saved -> wanted') as error:
    checkpointer.restore_newest(lambda _: wanted)
  assert not isinstance(error.value, checkpoint.DamagedError)
  assert str(error.value).splitlines()[1:] == [
      '  bias: nothing -> float32[50]',
      '  kernel: float32[40, 50] -> float32[50, 40]',
      '  scale: bfloat16[50] -> float32[50]',
  ]
  checkpointer.close()
  assert not (folder / workdir.DAMAGED).exists()


def test_what_an_interrupted_save_has_left_is_removed(folder):
  left = folder / workdir.CHECKPOINTS / '3.orbax-checkpoint-tmp'
  shutil.copytree(_newest(folder), left)
  reader = checkpoint.Checkpointer(folder, read_only=True)
  assert reader.steps == [1, 2]
  reader.close()
  assert left.is_dir()  # A run may be at it.
  assert _restore(folder) == 2
  assert not left.exists()


def test_a_step_that_cannot_be_written_says_so(folder, monkeypatch):
  checkpointer = checkpoint.Checkpointer(folder, keep=2)

  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpointer._manager, 'save', full)
  with pytest.raises(
      checkpoint.SaveError,
      match=r'Step 3, or .*No space left on device.*on disk are \[1, 2\]',
  ):
    checkpointer.save(3, _state(3), _record(3))
  checkpointer.close()


def test_a_manifest_of_another_format_is_not_taken(folder):
  path = _newest(folder) / 'manifest' / 'metadata'
  manifest = json.loads(path.read_text())
  manifest.pop('sha256')
  manifest['format'] += 1
  sha256 = checkpoint.integrity.hash_json(manifest)
  path.write_text(json.dumps({**manifest, 'sha256': sha256}))
  checkpointer = checkpoint.Checkpointer(folder, read_only=True)
  with pytest.raises(checkpoint.DamagedError, match='format 2, not 1'):
    checkpointer.restore_record(2)
  checkpointer.close()
