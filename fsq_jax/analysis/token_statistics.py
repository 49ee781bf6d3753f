"""Counts of pairs of level indices and of neighbouring codes, on the host.

Memory depends on the number of levels, or of classes of codes, but not on the
number of images.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

# (rows down, columns to the right) from a token to its neighbour.
NEIGHBOURS = {'right': (0, 1), 'below': (1, 0)}


class MutualInformation(NamedTuple):
  """Mutual information estimated from counts of pairs.

  Attributes:
    num_pairs: number of pairs.
    num_cells: number of distinct pairs.
    bits: plug-in estimate, biased upwards if pairs are few.
    bits_miller_madow: `bits` with Miller-Madow correction; may be negative.
  """

  num_pairs: int
  num_cells: int
  bits: float
  bits_miller_madow: float


def mutual_information(counts: np.ndarray) -> MutualInformation:
  """Computes the mutual information of rows and columns.

  Args:
    counts: [m, n] integers, number of pairs of row i and column j.

  Returns:
    The mutual information; NaN if all counts are zero.
  """
  total = int(counts.sum())
  if not total:
    return MutualInformation(0, 0, math.nan, math.nan)
  of_rows, of_columns = counts.sum(axis=1), counts.sum(axis=0)
  rows, columns = np.nonzero(counts)
  joint = counts[rows, columns] / total
  apart = (of_rows[rows] / total) * (of_columns[columns] / total)
  bits = max(float(np.sum(joint * np.log2(joint / apart))), 0.0)
  num_free = (
      len(rows) - np.count_nonzero(of_rows) - np.count_nonzero(of_columns) + 1
  )
  return MutualInformation(
      num_pairs=total,
      num_cells=len(rows),
      bits=bits,
      bits_miller_madow=bits - float(num_free) / (2 * math.log(2) * total),
  )


class DigitPairs:
  """Counts pairs of level indices in one token and in neighbouring tokens.

  Attributes:
    counts: 'token' (pairs in one token) and the names of `NEIGHBOURS` to int64
      [S, S], where S is the sum of all levels: row i is a level of the first
      dimension of a pair, column j a level of the second. `block` returns the
      counts of two dimensions.
  """

  def __init__(self, levels: Sequence[int]):
    """Starts with zero counts.

    Args:
      levels: number of levels per dimension.
    """
    self._levels = np.asarray(levels)
    self._starts = np.cumsum([0, *levels])
    shape = (self._starts[-1], self._starts[-1])
    self.counts = {
        name: np.zeros(shape, np.int64) for name in ('token', *NEIGHBOURS)
    }

  def update(self, digits: np.ndarray) -> None:
    """Adds level indices [B, h, w, len(levels)]; -1 is not counted."""
    # One-hot levels. float32, for BLAS, is exact up to 2^24 pairs per batch.
    ones = np.concatenate(
        [
            digits[..., [i]] == np.arange(level)
            for i, level in enumerate(self._levels)
        ],
        axis=-1,
    ).astype(np.float32)
    for name, counts in self.counts.items():
      first, second = _pairs(ones, NEIGHBOURS.get(name, (0, 0)))
      product = np.einsum('bhws,bhwt->st', first, second, optimize=True)
      counts += np.rint(product).astype(np.int64)

  def block(self, name: str, first: int, second: int) -> np.ndarray:
    """Returns counts [levels[first], levels[second]] of two dimensions."""
    starts = self._starts
    return self.counts[name][
        starts[first] : starts[first + 1], starts[second] : starts[second + 1]
    ]

  def histogram(self, dimension: int) -> np.ndarray:
    """Returns the number of tokens at each level of a dimension."""
    return np.diagonal(self.block('token', dimension, dimension))

  def mutual_information(self, name: str) -> list[list[float]]:
    """Returns the bits between all dimensions, rows the first of a pair.

    On the diagonal of 'token' it is the entropy of a dimension.
    """
    numbers = range(len(self._levels))
    return [
        [mutual_information(self.block(name, i, j)).bits for j in numbers]
        for i in numbers
    ]


class CodePairs:
  """Counts pairs of neighbouring codes.

  Attributes:
    counts: names of `NEIGHBOURS` to int64 [num_classes, num_classes].
  """

  def __init__(self, num_classes: int):
    """Starts with zero counts.

    Args:
      num_classes: number of classes of codes.
    """
    shape = (num_classes, num_classes)
    self.counts = {name: np.zeros(shape, np.int64) for name in NEIGHBOURS}

  def update(self, classes: np.ndarray) -> None:
    """Adds classes [B, h, w, ...] of codes; pairs with -1 are not counted.

    If a token has several indices, each is paired with the same one of the
    neighbour.
    """
    for name, counts in self.counts.items():
      first, second = _pairs(classes, NEIGHBOURS[name])
      valid = (first >= 0) & (second >= 0)
      np.add.at(counts, (first[valid], second[valid]), 1)


def _pairs(
    grid: np.ndarray, offset: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the tokens of [B, h, w, ...] with a neighbour, and the latter."""
  down, right = offset
  height, width = grid.shape[1:3]
  return grid[:, : height - down, : width - right], grid[:, down:, right:]
