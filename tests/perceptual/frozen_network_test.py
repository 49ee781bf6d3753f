"""Loading of frozen networks: layouts, hashes, files that are off."""

import hashlib
import json
import pickle
import re

from flax import linen as nn
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fsq_jax import models
from fsq_jax.perceptual import frozen_network

_INSTRUCTIONS = 'The shop next door has one.'


class _Network(nn.Module):
  """One of each kind of layer."""

  @nn.compact
  def __call__(self, images):
    x = nn.Conv(2, (1, 2), padding='VALID', name='conv')(images)
    x = frozen_network.FrozenBatchNorm(1e-3, name='norm')(x)
    return nn.Dense(4, name='dense')(x)


def _arrays():
  rng = np.random.default_rng(0)
  shapes = {
      'conv.weight': (2, 3, 1, 2), 'conv.bias': (2,),
      'norm.weight': (2,), 'norm.bias': (2,), 'norm.running_mean': (2,),
      'norm.running_var': (2,), 'dense.weight': (4, 2), 'dense.bias': (4,),
  }  # fmt: skip
  return {
      key: np.float32(rng.uniform(0.5, 1.5, shape))
      for key, shape in shapes.items()
  }


def _find_place(name, shape):
  key, leaf = name.split('/')
  return frozen_network.pytorch_place(leaf, key, len(shape))


def _load(path, ignored=None):
  return frozen_network.load_network(
      _Network(), path, num_images=1, find_place=_find_place,
      ignored=ignored, instructions=_INSTRUCTIONS,
  )


def _save(path, **changes):
  arrays = {**_arrays(), **changes}
  arrays = {key: x for key, x in arrays.items() if x is not None}
  safetensors_numpy.save_file(arrays, path)
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'network.safetensors'


def test_every_layer_of_pytorch_is_put_in_its_place(path):
  module, variables, _ = _load(_save(path))
  images = np.float32(np.random.default_rng(1).uniform(-1, 1, (2, 3, 4, 3)))
  a = {key: np.float64(x) for key, x in _arrays().items()}
  x = a['conv.bias'] + sum(
      images[:, :, i : i + 3] @ a['conv.weight'][:, :, 0, i].T for i in (0, 1)
  )
  x = (x - a['norm.running_mean']) / np.sqrt(a['norm.running_var'] + 1e-3)
  x = x * a['norm.weight'] + a['norm.bias']
  x = x @ a['dense.weight'].T + a['dense.bias']
  found = jax.jit(module.apply)(variables, images)
  np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-6)


def test_files_in_half_precision_become_float32(path):
  half = {key: x.astype(np.float16) for key, x in _arrays().items()}
  _, variables, _ = _load(_save(path, **half))
  assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype('float32')}
  np.testing.assert_array_equal(
      variables['params']['conv']['bias'], half['conv.bias']
  )


def test_all_that_is_off_is_listed(path):
  _save(path, **{
      'conv.bias': None,
      'dense.weight': np.zeros((2, 4), np.float32),
      'norm.bias': np.zeros(2, np.int32),
      'extra': np.zeros(1, np.float32),
  })
  with pytest.raises(ValueError, match='not those of the network') as error:
    _load(path)
  for part in (
      '1 missing: conv.bias',
      '1 unexpected: extra',
      'dense.weight is (2, 4) instead of (4, 2)',
      'norm.bias is I32 instead of',
      _INSTRUCTIONS,
  ):
    assert part in str(error.value)


def test_only_what_is_ignored_by_name_may_be_there_too(path):
  _save(path, fc=np.zeros(1, np.int64))
  assert _load(path, re.compile('fc'))
  with pytest.raises(ValueError, match='1 unexpected: fc'):
    _load(path, re.compile('c'))


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_not_finite_is_refused(path, value):
  bias = np.array([0, value], np.float32)
  with pytest.raises(ValueError, match=r"'conv\.bias' of .* NaN or inf"):
    _load(_save(path, **{'conv.bias': bias}))


def test_a_missing_file_says_how_to_get_it(path):
  with pytest.raises(ValueError, match=f'no file {path}. {_INSTRUCTIONS}'):
    _load(path)
  path.mkdir()
  with pytest.raises(ValueError, match=f'no file {path}. {_INSTRUCTIONS}'):
    _load(path)


def _never_called():
  raise AssertionError('A pickle was read.')


class _Trap:
  """What runs code when it is unpickled."""

  def __reduce__(self):
    return _never_called, ()


@pytest.mark.parametrize('damage', ['pickle', 'empty', 'truncated'])
def test_damaged_files_and_pickles_are_refused(path, damage):
  whole = _save(path).read_bytes()
  path.write_bytes({
      'pickle': pickle.dumps({'conv.weight': _Trap()}),
      'empty': b'',
      'truncated': whole[:-4],
  }[damage])
  with pytest.raises(ValueError, match='cannot be read'):
    _load(path)


# Hashes.


def test_the_hash_of_a_network_is_that_of_its_file(path):
  sha256 = _load(_save(path)).sha256
  assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
  _save(path, **{'conv.bias': np.zeros(2, np.float32)})
  assert _load(path).sha256 != sha256


def test_the_hash_of_a_directory_is_that_of_its_weights(tmp_path):
  names = ['b.safetensors', 'a.safetensors']
  for i, name in enumerate(names):
    _save(tmp_path / name, extra=np.full(1, i, np.float32))
  index = {'weight_map': {'x': names[0], 'y': names[1], 'z': names[0]}}
  index_path = tmp_path / 'model.safetensors.index.json'
  index_path.write_text(json.dumps(index))
  (tmp_path / 'config.json').write_text('{}')
  whole = b''.join((tmp_path / name).read_bytes() for name in sorted(names))
  expected = hashlib.sha256(whole).hexdigest()
  assert models.hash_weights(tmp_path) == expected
  # A whole file is read before parts, as by open_weights.
  only = _save(tmp_path / 'model.safetensors')
  expected = hashlib.sha256(only.read_bytes()).hexdigest()
  assert models.hash_weights(str(tmp_path)) == expected


def test_what_has_no_weights_has_no_hash(tmp_path):
  with pytest.raises(ValueError, match=r'neither model\.safetensors'):
    models.hash_weights(tmp_path)
  with pytest.raises(ValueError, match=r'none\.npz cannot be read'):
    models.hash_weights(tmp_path / 'none.npz')
