"""Nearest neighbours by Euclidean distance: exact, float64, block by block.

Distances are computed as |a|^2 + |b|^2 - 2 ab, a matmul per block, so that the
memory does not depend on the numbers of vectors. Distances of integers, such as
pixels, are exact: all terms are integers below 2^53.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Rows of a block: 64 MiB of vectors in float64, 32 MiB of distances.
BLOCK_VALUES = 2**23
MAX_ROWS = 2048


class PrecisionRecall(NamedTuple):
  """Improved precision and recall.

  Attributes:
    precision: fraction of the samples inside the reference's manifold.
    recall: fraction of the reference inside the samples' manifold.
  """

  precision: float
  recall: float


def nearest(
    queries: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the nearest point of each query.

  Args:
    queries: [n, D] integers or floats.
    points: [m, D], the same dtype, m >= 1.

  Returns:
    Indices [n] int64 into `points`, the lowest of equally near ones; squared
    distances [n] float64.
  """
  indices = np.zeros(len(queries), np.int64)
  squares = np.full(len(queries), np.inf)
  for rows, columns, block in _blocks(queries, points):
    first = np.argmin(block, axis=1)
    smallest = np.min(block, axis=1)
    closer = smallest < squares[rows]
    indices[rows] = np.where(closer, columns.start + first, indices[rows])
    squares[rows] = np.minimum(smallest, squares[rows])
  return indices, squares


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, k: int
) -> PrecisionRecall:
  """Computes improved precision and recall (arXiv 1904.06991).

  The manifold of a set is the union of balls around its vectors; the radius is
  the distance to the k-th nearest other vector of the set, and the boundary is
  inside, as in the paper's code.

  Args:
    samples: [n, D] features of generated images.
    reference: [m, D] features of real images.
    k: neighbours, at least 1 and less than n and m; the paper uses 3.

  Raises:
    ValueError: k out of range.
  """
  smallest = min(len(samples), len(reference))
  if not 1 <= k < smallest:
    raise ValueError(
        f'k is {k} and the smaller set has {smallest} vectors; the k-th nearest'
        ' other vector needs 1 <= k < vectors. Use more images.'
    )
  return PrecisionRecall(
      precision=_covered(samples, reference, k),
      recall=_covered(reference, samples, k),
  )


def row_blocks(x: np.ndarray) -> Iterator[slice]:
  """Yields the slices of rows of x [n, ...] that fit into memory in float64."""
  values = max(x[0].size, 1)
  size = min(max(BLOCK_VALUES // values, 1), MAX_ROWS)
  for start in range(0, len(x), size):
    yield slice(start, min(start + size, len(x)))


def _covered(queries: np.ndarray, points: np.ndarray, k: int) -> float:
  """Returns the fraction of the queries inside the manifold of the points."""
  # Each point is its own nearest neighbour, at distance 0.
  smallest = np.full((len(points), k + 1), np.inf)
  for rows, _, block in _blocks(points, points):
    both = np.concatenate([smallest[rows], block], axis=1)
    smallest[rows] = np.partition(both, k, axis=1)[:, :k + 1]
  radii = smallest.max(axis=1)
  inside = np.zeros(len(queries), bool)
  for rows, columns, block in _blocks(queries, points):
    inside[rows] |= np.any(block <= radii[columns], axis=1)
  return float(np.mean(inside))


def _blocks(
    queries: np.ndarray, points: np.ndarray
) -> Iterator[tuple[slice, slice, np.ndarray]]:
  """Yields rows, columns and squared distances [rows, columns] of all pairs."""
  centre, tolerance = 0.0, 0.0
  if not np.issubdtype(points.dtype, np.integer):
    # Distances between equal vectors shall be 0 in spite of rounding, which is
    # small beside vectors without their mean.
    centre = points.mean(axis=0, dtype=np.float64)
    tolerance = points.shape[1] * np.finfo(np.float64).eps
  for rows in row_blocks(queries):
    a = queries[rows].astype(np.float64) - centre
    norms = np.einsum('id,id->i', a, a)[:, None]
    for columns in row_blocks(points):
      b = points[columns].astype(np.float64) - centre
      sums = norms + np.einsum('id,id->i', b, b)
      block = sums - 2 * np.einsum('id,jd->ij', a, b, optimize=True)
      yield rows, columns, np.where(block > tolerance * sums, block, 0.0)
