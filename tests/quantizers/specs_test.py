"""Specs: what differs is listed, and how to convert."""

import json

import pytest

from fsq_jax import quantizers
from fsq_jax.quantizers import FSQ
from fsq_jax.quantizers import specs


def _spec(config):
  return quantizers.build_quantizer(config).spec()


def test_tokens_of_another_convention_are_refused_by_what_differs():
  fsq = FSQ((8, 6, 5))
  saved = json.loads(json.dumps(fsq.spec()))
  specs.check_same_spec(saved, fsq.spec())
  others = [
      ({'levels': (8, 5, 6)}, 'levels: .8, 5, 6. -> .8, 6, 5.'),
      ({'bound': 'clip'}, "bound: 'clip' -> 'tanh'"),
      ({'bins': 'equal'}, "bins: 'equal' -> 'rounded'"),
      ({'eps': 1e-3}, 'eps: 0.001 -> 0.0'),
      ({'convention': 'paper'}, "index_order: 'first .* -> 'last"),
      ({'convention': 'vqp'}, "shift: 'arctanh' -> 'none'"),
      ({'convention': 'preserve_symmetry'}, 'code: .2 . digit'),
  ]
  for fields, match in others:
    other = FSQ(**{'levels': (8, 6, 5), **fields}).spec()
    with pytest.raises(ValueError, match=match) as error:
      specs.check_same_spec(other, fsq.spec())
    # Tokens of other levels cannot be converted.
    convertible = 'levels' not in fields
    assert ('convert.convert_indices' in str(error.value)) == convertible
  specs.check_same_spec(saved | {'levels': (8, 6, 5)}, fsq.spec())
  vq = {'name': 'vq', 'codebook_size': 240, 'code_dim': 3}
  with pytest.raises(ValueError, match='Decode them with the') as error:
    specs.check_same_spec(_spec(vq), _spec(vq | {'metric': 'cosine'}))
  assert 'convert_indices' not in str(error.value)
  del saved['rounding']
  with pytest.raises(ValueError, match="rounding: absent -> 'half to even'"):
    specs.check_same_spec(saved, fsq.spec())


def test_layouts_are_equal_where_tokens_can_be_converted():
  bits = specs.layout(_spec({'name': 'lfq', 'num_bits': 3}))
  assert bits == specs.layout(FSQ((2, 2, 2)).spec())
  grouped = {'name': 'grouped_fsq', 'levels': (8, 5), 'num_groups': 2}
  residual = {'name': 'residual_fsq', 'levels': (8, 5), 'num_stages': 2}
  layouts = [
      specs.layout(_spec(config))
      for config in (grouped, residual, {'name': 'fsq', 'levels': [8, 5]})
  ]
  assert all(layouts.count(layout) == 1 for layout in layouts)
  assert specs.layout(_spec({'name': 'none', 'code_dim': 3})) is None
