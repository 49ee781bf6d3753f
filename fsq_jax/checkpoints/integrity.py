"""Hashes of arrays and JSON values, by which damage to them is found."""

from collections.abc import Mapping, Sequence
import hashlib
import json
import math
from typing import Any

import jax
import numpy as np

from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import processes

# Of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): its last step.
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
# Elements that are hashed at a time, so that they stay in the cache.
_BLOCK = 2**16


def describe_arrays(tree: Any) -> dict[str, dict[str, Any]]:
  """Returns path to shape and dtype of the arrays of a tree, JSON-able.

  Args:
    tree: of arrays or `jax.ShapeDtypeStruct`.
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
  """Hashes the bytes of every array of a tree.

  The hash does not depend on how an array is spread over devices: it is the
  sum, modulo 2^64, of a number for each element and its position. That number
  is a one-to-one function of the two (the last step of SplitMix64), so that a
  single changed element is always found; of any other damage one in 2^64 stays
  unseen. It is no defence against intent.

  Args:
    tree: of arrays with elements of 1, 2 or 4 bytes; of those of several
      processes, every process gets the hashes and has to call this.

  Returns:
    Path to 16 hexadecimal digits.
  """
  paths = jax.tree.leaves(parameter_paths.tree_paths(tree))
  leaves = jax.tree.leaves(tree)
  sums = [_hash_local(x) for x in leaves]
  # Of an array of this process alone, every other has its own whole copy.
  is_shared = [not x.is_fully_addressable for x in leaves]
  if any(is_shared):
    # As halves: JAX has no 64 bits unless it is told to.
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
  """Returns the sha256 of JSON values, whatever the order of their keys."""
  text = json.dumps(value, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()


def compare(
    given: Mapping[str, Any], wanted: Mapping[str, Any], most: int = 10
) -> list[str]:
  """Lists what differs between two results of one of the functions above.

  Args:
    given: by path.
    wanted: by path.
    most: lines to return at most; one more then counts the rest.

  Returns:
    Lines as 'params/x: given -> wanted'; empty if they are equal.
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
  """Hashes what this process has of an array and no other one counts."""
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
  """Hashes a part of an array.

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
  # Positions beyond 2^32 begin again.
  mixed = (positions << np.uint64(32)) | bits
  for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
    mixed ^= mixed >> np.uint64(shift)
    mixed *= np.uint64(multiplier)
  mixed ^= mixed >> np.uint64(_SHIFTS[-1])
  return int(mixed.sum(dtype=np.uint64))
