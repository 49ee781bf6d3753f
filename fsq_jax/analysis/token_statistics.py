"""Which digits and which codes are neighbours, counted on the host.

Memory depends on the number of digits and levels, or of classes of codes, and
not on the number of images.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

# Rows down and columns to the right, from a token to its neighbour.
NEIGHBOURS = {'right': (0, 1), 'below': (1, 0)}


class MutualInformation(NamedTuple):
  """How much one thing says about another, from counts of pairs.

  Attributes:
    num_pairs: pairs counted.
    num_cells: different pairs among them.
    bits: of the shares as counted, which is too high where pairs are few.
    bits_miller_madow: `bits` less its first-order bias, may be below 0.
  """

  num_pairs: int
  num_cells: int
  bits: float
  bits_miller_madow: float


def mutual_information(counts: np.ndarray) -> MutualInformation:
  """Computes the mutual information of rows and columns.

  Args:
    counts: [m, n] integers, how often row i and column j were a pair.

  Returns:
    The mutual information; NaN where nothing was counted.
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
  """Counts pairs of levels: of digits of one token, and of neighbours.

  Attributes:
    counts: 'token' (one token) and the names of `NEIGHBOURS` to int64 [S, S],
      S the sum of all levels: row i is a level of the first, column j one of
      the second. `block` cuts out what is of two digits.
  """

  def __init__(self, levels: Sequence[int]):
    """Counts nothing yet.

    Args:
      levels: number of levels of each digit.
    """
    self._levels = np.asarray(levels)
    self._starts = np.cumsum([0, *levels])
    shape = (self._starts[-1], self._starts[-1])
    self.counts = {
        name: np.zeros(shape, np.int64) for name in ('token', *NEIGHBOURS)
    }

  def update(self, digits: np.ndarray) -> None:
    """Adds digits [B, h, w, len(levels)]; -1 counts nowhere."""
    # Ones where a digit has a level; float32, whose products BLAS computes,
    # counts exactly to 2^24, a batch at a time.
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
    """Counts [levels[first], levels[second]] of two digits by their numbers."""
    starts = self._starts
    return self.counts[name][
        starts[first] : starts[first + 1], starts[second] : starts[second + 1]
    ]

  def histogram(self, digit: int) -> np.ndarray:
    """Tokens at each level of a digit."""
    return np.diagonal(self.block('token', digit, digit))

  def mutual_information(self, name: str) -> list[list[float]]:
    """Bits that each digit says about each, rows the first of a pair.

    In one token a digit says its own entropy about itself.
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
    """Counts nothing yet.

    Args:
      num_classes: that codes fall into; the number of codes where each has its
        own.
    """
    shape = (num_classes, num_classes)
    self.counts = {name: np.zeros(shape, np.int64) for name in NEIGHBOURS}

  def update(self, classes: np.ndarray) -> None:
    """Adds classes [B, h, w, ...] of codes; pairs with -1 are left out.

    Where a token has several, each meets the same one of its neighbour.
    """
    for name, counts in self.counts.items():
      first, second = _pairs(classes, NEIGHBOURS[name])
      valid = (first >= 0) & (second >= 0)
      np.add.at(counts, (first[valid], second[valid]), 1)


def _pairs(
    grid: np.ndarray, offset: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns what has a neighbour in [B, h, w, ...], and these neighbours."""
  down, right = offset
  height, width = grid.shape[1:3]
  return grid[:, : height - down, : width - right], grid[:, down:, right:]
