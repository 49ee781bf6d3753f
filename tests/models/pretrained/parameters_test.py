"""Parameters in the arrays of a checkpoint: layouts, misfits."""

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fsq_jax.models.pretrained import files
from fsq_jax.models.pretrained import parameters

_POSITIONS = '1 n d -> n d'
_PLACES = {
    'plain': parameters.Place('plain'),
    'kernel': parameters.Place('conv', 'o i h w -> h w i o'),
    'blocks': parameters.Place('b.{i}', 'o i -> i o'),
    'first': parameters.Place('tokens', _POSITIONS, 0, {'n': 7}),
    'grid': parameters.Place('tokens', _POSITIONS, slice(1, None), {'n': 7}),
    'gate': parameters.Place('mlp', '(s m) d -> s d m', 0, {'s': 2}),
    'heads': parameters.Place('q', 'd h k -> d (h k)', None, {'h': 2}),
}
_SHAPES = {
    'plain': (3,), 'kernel': (1, 2, 3, 4), 'blocks': (2, 4, 3), 'first': (5,),
    'grid': (2, 3, 5), 'gate': (4, 3), 'heads': (3, 10),
}  # fmt: skip


def _arrays():
  rng = np.random.default_rng(0)
  shapes = {
      'plain': (3,), 'conv': (4, 3, 1, 2), 'b.0': (3, 4), 'b.1': (3, 4),
      'tokens': (1, 7, 5), 'mlp': (6, 4), 'q': (3, 2, 5),
  }  # fmt: skip
  return {k: rng.normal(size=x).astype(np.float32) for k, x in shapes.items()}


def _check(weights):
  parameters.check_arrays(
      weights, _PLACES, _SHAPES, part='toy', is_unexpected=lambda key: True,
      advice='Ask for another.',
  )


def test_every_layout_is_read(tmp_path):
  path = tmp_path / 'x.safetensors'
  arrays = _arrays()
  safetensors_numpy.save_file(arrays, path)
  with files.open_file(path) as weights:
    _check(weights)
    found = {
        name: parameters.read_parameter(weights, place, _SHAPES[name])
        for name, place in _PLACES.items()
    }
  expected = {
      'plain': arrays['plain'],
      'kernel': arrays['conv'].transpose(2, 3, 1, 0),
      'blocks': np.stack([arrays['b.0'].T, arrays['b.1'].T]),
      'first': arrays['tokens'][0, 0],
      'grid': arrays['tokens'][0, 1:].reshape(2, 3, 5),
      'gate': arrays['mlp'][:3].T,
      'heads': arrays['q'].reshape(3, 10),
  }
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, name)


def test_all_misfits_are_listed(tmp_path):
  path = tmp_path / 'x.safetensors'
  arrays = _arrays()
  del arrays['b.1']
  arrays['tokens'] = np.zeros((1, 6, 5), np.float32)
  arrays['mlp'] = np.zeros((6, 4), np.int32)
  arrays['more'] = np.zeros(1, np.float32)
  safetensors_numpy.save_file(arrays, path)
  with (
      files.open_file(path) as weights,
      pytest.raises(ValueError, match='not those of the toy') as error,
  ):
    _check(weights)
  assert str(error.value) == (
      f'The arrays of {path} are not those of the toy: 1 missing: b.1; 1'
      ' unexpected: more; 1 of another shape: tokens is (1, 6, 5) instead of'
      ' (1, 7, 5); 1 of another dtype: mlp is I32 instead of one of'
      " ['bfloat16', 'float16', 'float32']. Ask for another."
  )
