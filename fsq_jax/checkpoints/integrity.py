"""Hashes of arrays and JSON values, to detect corruption."""

from collections.abc import Mapping, Sequence
import hashlib
import json
import math
from typing import Any

import jax
import numpy as np

from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import processes

# The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
# Elements hashed at a time, few enough for the CPU cache.
_BLOCK = 2**16


def describe_arrays(tree: Any) -> dict[str, dict[str, Any]]:
  """Returns path to shape and dtype of the arrays of a tree, as JSON values.

  Args:
    tree: tree of arrays or `jax.ShapeDtypeStruct`.
  """
  return {
      path: {'shape': list(x.shape), 'dtype': str(x.dtype)}
      for path, x in zip(
          jax.tree.leaves(parameter_paths.tree_paths(tree)),
          jax.tree.leaves(tree),
          strict=True,
      )
  }


def hash_arrays(tree: Any) -> dict[str, str]:
  """Hashes the bytes of every array of a tree; collective.

  The hash does not depend on the sharding of an array: it is the sum, modulo
  2^64, of a number per element. That number is a bijective function of value
  and position (the finalizer of SplitMix64), so that a single changed element
  is always detected; other corruption is missed with probability 2^-64. It does
  not protect against deliberate changes.

  Args:
    tree: tree of arrays with elements of 1, 2 or 4 bytes. Every process calls
      this if some of them are sharded over processes, and gets all hashes.

  Returns:
    Path to 16 hexadecimal characters.
  """
  paths = jax.tree.leaves(parameter_paths.tree_paths(tree))
  leaves = jax.tree.leaves(tree)
  sums = [_hash_local(x) for x in leaves]
  # Other arrays are replicated: each process has its own copy.
  is_shared = [not x.is_fully_addressable for x in leaves]
  if any(is_shared):
    # In two halves, since JAX has no 64-bit types by default.
    halves = np.array([divmod(x, 2**32) for x in sums], np.uint32)
    halves = processes.gather(halves).astype(object)
    totals = [high * 2**32 + low for high, low in halves.sum(axis=0)]
    sums = [
        total if shared else own
        for total, own, shared in zip(totals, sums, is_shared, strict=True)
    ]
  return {
      path: f'{value % 2**64:016x}'
      for path, value in zip(paths, sums, strict=True)
  }


def hash_json(value: Any) -> str:
  """Returns the sha256 of JSON values, independent of the order of keys."""
  text = json.dumps(value, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()


def compare(
    given: Mapping[str, Any], wanted: Mapping[str, Any], most: int = 10
) -> list[str]:
  """Lists differences of two results of `describe_arrays` or `hash_arrays`.

  Args:
    given: values by path.
    wanted: values by path.
    most: largest number of differences listed; another line counts the rest.

  Returns:
    Lines such as 'params/x: given -> wanted'; [] if there is no difference.
  """
  lines = [
      f'{path}: {_show(given.get(path))} -> {_show(wanted.get(path))}'
      for path in sorted(given.keys() | wanted.keys())
      if given.get(path) != wanted.get(path)
  ]
  if len(lines) > most:
    lines[most:] = [f'and {len(lines) - most} more']
  return lines


def _show(value: Any) -> str:
  if isinstance(value, Mapping):
    return f'{value["dtype"]}{value["shape"]}'
  return 'nothing' if value is None else str(value)


def _hash_local(x: jax.Array) -> int:
  """Returns the sum over the shards of which this process has replica 0."""
  strides = [math.prod(x.shape[i + 1 :]) for i in range(x.ndim)]
  total = 0
  for shard in x.addressable_shards:
    if shard.replica_id == 0:
      first = sum(
          part.indices(size)[0] * stride
          for part, size, stride in zip(
              shard.index, x.shape, strides, strict=True
          )
      )
      total += _hash_part(np.asarray(shard.data), first, strides)
  return total % 2**64


def _hash_part(x: np.ndarray, first: int, strides: Sequence[int]) -> int:
  """Returns the sum over a part of an array.

  Args:
    x: the part.
    first: position of its first element in the whole array, in C order.
    strides: distances of neighbours along each axis in the whole array.
  """
  if x.size > _BLOCK:
    axis = int(np.argmax(x.shape))
    middle = x.shape[axis] // 2
    lower, upper = np.split(x, [middle], axis=axis)
    return _hash_part(lower, first, strides) + _hash_part(
        upper, first + middle * strides[axis], strides
    )
  positions = np.array(first, np.uint64)
  for size, stride in zip(x.shape, strides, strict=True):
    along = np.arange(size, dtype=np.uint64) * np.uint64(stride)
    positions = positions[..., None] + along
  bits = np.ascontiguousarray(x).view(f'u{x.dtype.itemsize}')
  # Positions wrap around at 2^32.
  mixed = (positions << np.uint64(32)) | bits
  for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
    mixed ^= mixed >> np.uint64(shift)
    mixed *= np.uint64(multiplier)
  mixed ^= mixed >> np.uint64(_SHIFTS[-1])
  return int(mixed.sum(dtype=np.uint64))
