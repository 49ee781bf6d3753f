"""Tests of hashes: against plain Python, of every bit, on any devices."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.checkpoints import integrity
from fsq_jax.runtime import partitioning


def _reference(x):
  """The hash in Python's integers, element by element."""
  total = 0
  words = np.ascontiguousarray(x).view(f'u{x.dtype.itemsize}').ravel()
  for position, bits in enumerate(words.tolist()):
    value = (position << 32 | bits) % 2**64
    for shift, multiplier in (
        (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)
    ):
      value ^= value >> shift
      value = value * multiplier % 2**64
    total += value
  return f'{total % 2**64:016x}'


@pytest.mark.parametrize(
    'x',
    [
        np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32),
        np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        np.arange(7, dtype=np.int32).reshape(7, 1) - 3,
        np.array(5, np.int32),
        np.array([True, False, True]),
        np.zeros((0, 3), np.float32),
        np.arange(6, dtype=np.uint8),
        np.asarray(jnp.linspace(-1, 1, 9, dtype=jnp.bfloat16)),
        # Beyond what is hashed at a time, along either axis.
        np.random.default_rng(1).normal(size=(3, 2**15)).astype(np.float32),
        np.random.default_rng(2).normal(size=(2**15, 3)).astype(np.float32),
    ],
    ids=lambda x: f'{x.dtype}{x.shape}',
)
def test_a_hash_is_what_plain_python_gives(x):
  hashes = integrity.hash_arrays({'a': {'b': jnp.asarray(x)}})
  assert hashes == {'a/b': _reference(x)}


@pytest.mark.parametrize(
    'spec',
    [
        (), ('data',), ('fsdp',), (None, 'data'), ('fsdp', 'data'),
        (None, None, 'fsdp'), (('data', 'fsdp'),), (None, ('data', 'fsdp')),
    ],
)
def test_a_hash_does_not_depend_on_devices(spec):
  sizes = {axis: 1 for axis in partitioning.AXES} | {'data': 2, 'fsdp': 4}
  mesh = partitioning.create_mesh(sizes)
  x = np.random.default_rng(0).normal(size=(8, 16, 4)).astype(np.float32)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  hashes = integrity.hash_arrays([jax.device_put(x, sharding)])
  assert hashes == {'0': _reference(x)}


def test_what_a_process_adds_to_a_hash_has_64_bits(monkeypatch):
  # Those of other processes come as two halves of 32 bits.
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 8})
  spec = jax.sharding.PartitionSpec('fsdp')
  x = np.random.default_rng(0).normal(size=(64, 2**13)).astype(np.float32)
  x = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
  expected = _hash(x)
  monkeypatch.setattr(
      type(x), 'is_fully_addressable', property(lambda _: False)
  )
  assert integrity.hash_arrays([x])['0'] == expected


def test_every_bit_and_every_place_counts():
  x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
  seen = {_hash(x)}
  for element in range(x.size):
    for bit in range(32):
      changed = x.copy()
      changed.view(np.uint32).ravel()[element] ^= np.uint32(1 << bit)
      seen.add(_hash(changed))
  seen |= {_hash(x[::-1]), _hash(x[:, ::-1]), _hash(x * 0), _hash(x[:, :2])}
  assert len(seen) == 1 + 6 * 32 + 4


def _hash(x):
  return integrity.hash_arrays([jnp.asarray(x)])['0']


def test_json_is_hashed_by_its_values():
  value = {'a': [1, 2.5, None], 'b': {'c': 'ü'}}
  same = {'b': {'c': 'ü'}, 'a': [1, 2.5, None]}
  assert integrity.hash_json(value) == integrity.hash_json(same)
  for other in (
      {**value, 'a': [1, 2.5, 0]}, {**value, 'a': [2.5, 1, None]},
      {**value, 'd': None}, {**value, 'b': {'c': 'u'}},
  ):
    assert integrity.hash_json(value) != integrity.hash_json(other)


def test_differences_are_named_and_counted():
  arrays = {'x': jnp.zeros((2, 3)), 'y': [jnp.int32(0)]}
  given = integrity.describe_arrays(arrays)
  assert given == {
      'x': {'shape': [2, 3], 'dtype': 'float32'},
      'y/0': {'shape': [], 'dtype': 'int32'},
  }
  wanted = {'x': {'shape': [3, 2], 'dtype': 'float32'}, 'z': given['y/0']}
  assert integrity.compare(given, given) == []
  assert integrity.compare(given, wanted) == [
      'x: float32[2, 3] -> float32[3, 2]',
      'y/0: int32[] -> nothing',
      'z: nothing -> int32[]',
  ]
  assert integrity.compare(given, wanted, most=1) == [
      'x: float32[2, 3] -> float32[3, 2]', 'and 2 more',
  ]
