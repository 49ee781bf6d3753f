"""Conversion of tokens: every code of every named set of levels."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsq_jax import quantizers
from fsq_jax.quantizers import FSQ
from fsq_jax.quantizers import conventions
from fsq_jax.quantizers import convert

_NAMED_LEVELS = sorted({*conventions.LEVELS.values(), (7, 5, 5, 5)})
_CONVENTIONS = {
    'symmetric': ('C', lambda k, levels: k - (levels - 1) / 2),
    'paper': ('F', lambda k, levels: (k - levels // 2) / (levels // 2)),
    'vqp': ('F', lambda k, levels: (k - levels // 2) / (levels // 2)),
    'preserve_symmetry': ('F', lambda k, levels: 2 * k / (levels - 1) - 1),
}


def _spec(config):
  return quantizers.build_quantizer(config).spec()


def _digits(indices, levels, order):
  digits = np.unravel_index(indices, levels, order=order)
  return np.stack(digits, axis=-1)


@pytest.mark.fast_variants('(8, 6, 5)')
@pytest.mark.parametrize('levels', _NAMED_LEVELS, ids=str)
def test_every_code_between_all_conventions(levels):
  indices = np.arange(np.prod(levels), dtype=np.int32)
  specs = {name: FSQ(levels, name).spec() for name in _CONVENTIONS}
  for source, (order, scale) in _CONVENTIONS.items():
    digits = _digits(indices, levels, order)
    for target, (order, _) in _CONVENTIONS.items():
      np.testing.assert_array_equal(
          convert.convert_indices(indices, specs[source], specs[target]),
          np.ravel_multi_index(digits.T, levels, order=order),
      )
    # Decoded codes follow from the level indices.
    codes = jax.jit(FSQ(levels, source).indices_to_codes)(indices)
    expected = scale(digits, np.asarray(levels))
    np.testing.assert_allclose(codes, expected, atol=3e-7)


@pytest.mark.slow
@pytest.mark.parametrize('source', [
    'paper',
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in _CONVENTIONS
        if name != 'paper'
    ),
])  # fmt: skip
def test_codes_are_scaled_by_their_digits(source):
  indices = np.arange(240).reshape(2, 120)
  source = FSQ((8, 6, 5), source)
  codes = jax.jit(source.indices_to_codes)(indices).astype(jnp.bfloat16)
  for name in _CONVENTIONS:
    target = FSQ((8, 6, 5), name)
    specs = source.spec(), target.spec()
    # The two ways to the target's codes meet.
    np.testing.assert_array_equal(
        convert.convert_codes(codes, *specs),
        target.indices_to_codes(convert.convert_indices(indices, *specs)),
    )


@pytest.mark.parametrize('name', ['lfq', 'bsq'])
def test_orders_of_bits(name):
  msb = _spec({'name': name, 'num_bits': 4})
  lsb = _spec({'name': name, 'num_bits': 4, 'bit_order': 'lsb_first'})
  five = convert.convert_indices(np.int32(10), msb, lsb)
  assert five.dtype == np.int32
  assert five == 5
  every = np.arange(16)
  there = convert.convert_indices(every, msb, lsb)
  np.testing.assert_array_equal(
      there, [int(f'{i:04b}'[::-1], 2) for i in every]
  )
  np.testing.assert_array_equal(
      convert.convert_indices(there, lsb, msb), every
  )
  # Bits are level indices of two levels.
  fsq = FSQ((2,) * 4).spec()
  np.testing.assert_array_equal(
      convert.convert_indices(every, msb, fsq), every
  )


def test_groups_are_converted_each():
  options = {'name': 'grouped_fsq', 'levels': (8, 5), 'num_groups': 2}
  source = _spec(options)
  target = _spec(options | {'convention': 'paper'})
  indices = np.asarray([[0, 39], [1, 5], [-1, 2]])
  np.testing.assert_array_equal(
      convert.convert_indices(indices, source, target),
      [[0, 39], [8, 1], [-1, 16]],
  )


def test_marks_of_no_token_stay_and_false_tokens_are_refused():
  source, target = FSQ((8, 5)).spec(), FSQ((8, 5), 'paper').spec()
  np.testing.assert_array_equal(
      convert.convert_indices(np.asarray([-1, 1]), source, target), [-1, 8]
  )
  for wrong in (40, -2, 2**32 + 1):
    with pytest.raises(ValueError, match=f'hold {wrong}; .* 0 to 39, and -1'):
      convert.convert_indices(np.asarray([0, wrong]), source, target)
  with pytest.raises(ValueError, match='float64'):
    convert.convert_indices(np.asarray([0.0]), source, target)


def test_indices_of_another_number_of_groups_are_refused():
  config = {'name': 'grouped_fsq', 'levels': (8, 5), 'num_groups': 3}
  specs = _spec(config), _spec(config | {'convention': 'paper'})
  convert.convert_indices(np.zeros((4, 3), int), *specs)
  for shape in ((4, 2), (3, 4), (4,), ()):
    with pytest.raises(ValueError, match='hold the 3 indices of a code'):
      convert.convert_indices(np.zeros(shape, int), *specs)
  spec = _spec({'name': 'residual_fsq', 'levels': (8, 5), 'num_stages': 3})
  convert.convert_indices(np.zeros((4, 2), int), spec, spec)
  with pytest.raises(ValueError, match='hold 1 to 3 stages'):
    convert.convert_indices(np.zeros((3, 4), int), spec, spec)


@pytest.mark.parametrize(
    'config',
    [
        {'name': 'fsq', 'levels': (8, 6, 5)},
        {'name': 'fsq', 'levels': (8, 6), 'convention': 'paper', 'eps': 0.01},
        {'name': 'fsq', 'levels': (8, 2), 'convention': 'preserve_symmetry'},
        {'name': 'fsq', 'levels': (8, 2), 'bound': 'ifsq', 'bins': 'equal'},
        {'name': 'grouped_fsq', 'levels': (8, 5), 'num_groups': 3},
        {'name': 'residual_fsq', 'levels': (8, 5), 'num_stages': 3},
        {'name': 'lfq', 'num_bits': 6, 'bit_order': 'lsb_first'},
        {'name': 'bsq', 'num_bits': 6},
    ],
    ids=str,
)
def test_specs_name_their_convention_completely(config):
  quantizer = quantizers.build_quantizer(config)
  spec = json.loads(json.dumps(quantizer.spec()))
  again = convert.quantizer_from_spec(spec)
  assert type(again) is type(quantizer)
  assert again.spec() == spec


def test_specs_of_no_convention_are_refused():
  spec = FSQ((8, 6, 5)).spec()
  with pytest.raises(ValueError, match="shift: 'arctanh' -> 'none'"):
    convert.quantizer_from_spec(spec | {'shift': 'arctanh'})
  with pytest.raises(ValueError, match='dither: 1 -> absent'):
    convert.quantizer_from_spec(spec | {'dither': 1})
  with pytest.raises(ValueError, match="convention is 'seed'"):
    convert.quantizer_from_spec(spec | {'convention': 'seed'})
  with pytest.raises(ValueError, match=r'levels\[1\] is 1'):
    convert.quantizer_from_spec(spec | {'levels': [8, 1]})
  with pytest.raises(ValueError, match=r'Invalid quantizer spec .*levels'):
    convert.quantizer_from_spec({'name': 'fsq', 'index_order': ''})
  with pytest.raises(ValueError, match="'fsk'; known"):
    convert.quantizer_from_spec(spec | {'name': 'fsk'})
  with pytest.raises(ValueError, match="Tokens of 'vq' have no level"):
    convert.quantizer_from_spec({'name': 'vq', 'codebook_size': 8})


def test_conventions_without_common_digits_are_refused():
  fsq = FSQ((8, 5)).spec()
  for config in (
      {'name': 'fsq', 'levels': (5, 8)},
      {'name': 'grouped_fsq', 'levels': (8, 5), 'num_groups': 2},
      {'name': 'residual_fsq', 'levels': (8, 5), 'num_stages': 2},
      {'name': 'lfq', 'num_bits': 2},
  ):
    with pytest.raises(ValueError, match='have different level indices'):
      convert.convert_indices(np.asarray([0]), fsq, _spec(config))
  grouped = {'name': 'grouped_fsq', 'levels': (8, 5), 'num_groups': 2}
  residual = {'name': 'residual_fsq', 'levels': (8, 5), 'num_stages': 2}
  with pytest.raises(ValueError, match='have different level indices'):
    convert.convert_indices(np.zeros(2, int), _spec(grouped), _spec(residual))
