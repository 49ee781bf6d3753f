"""Nearest neighbours, precision and recall against scikit-learn and NumPy."""

import numpy as np
import pytest
from sklearn import neighbors

from fsq_jax.evaluation import neighbours


def _vectors(n, num_features=5, seed=0, shift=0.0):
  rng = np.random.default_rng(seed)
  return shift + rng.normal(size=(n, num_features))


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of seven rows, which divide none of the sets."""
  monkeypatch.setattr(neighbours, 'MAX_ROWS', 7)


def _brute_force(samples, reference, k):
  """Precision and recall by loops, from direct differences."""

  def share(queries, points):
    radii = []
    for i, point in enumerate(points):
      others = np.delete(points, i, axis=0)
      radii.append(sorted(np.linalg.norm(others - point, axis=1))[k - 1])
    return np.mean([
        any(
            np.linalg.norm(query - point) <= radius
            for point, radius in zip(points, radii, strict=True)
        )
        for query in queries
    ])

  return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize('k', [1, 3])
@pytest.mark.parametrize('shift', [0.0, 0.7, 1e7])
def test_precision_and_recall_equal_brute_force(k, shift, small_blocks):
  # Squares of 1e7 in float64 have steps of 0.02, as large as distances.
  reference = _vectors(60, seed=1, shift=shift)
  samples = 0.8 * _vectors(45, seed=2) + 0.5 + shift
  actual = neighbours.precision_recall(samples, reference, k)
  assert actual == _brute_force(samples, reference, k)
  assert 0 < actual.precision < 1
  assert actual.precision != actual.recall


def test_precision_and_recall_equal_scikit_learn():
  samples = _vectors(300, seed=1) * 1.2
  reference = _vectors(400, seed=2)

  def share(queries, points):
    index = neighbors.NearestNeighbors(n_neighbors=3).fit(points)
    radii = index.kneighbors()[0][:, -1]  # Of the points, without themselves.
    distances = neighbors.NearestNeighbors(n_neighbors=len(points)).fit(points)
    far, order = distances.kneighbors(queries)
    return np.mean((far <= radii[order]).any(axis=1))

  actual = neighbours.precision_recall(samples, reference, 3)
  assert actual == (share(samples, reference), share(reference, samples))


def test_precision_and_recall_of_known_sets():
  reference = _vectors(50)
  assert neighbours.precision_recall(reference, reference, 3) == (1, 1)
  assert neighbours.precision_recall(reference + 100, reference, 3) == (0, 0)
  # All samples in one place: precise, and they cover nothing but that place.
  collapsed = np.repeat(reference[:1], 20, axis=0)
  actual = neighbours.precision_recall(collapsed, reference, 3)
  assert actual == (1, 1 / 50)


def test_equal_vectors_far_from_zero_are_at_distance_zero():
  vectors = np.repeat(_vectors(10, 300, shift=50.0), 4, axis=0)
  # Balls of radius 0, since each vector has three copies.
  assert neighbours.precision_recall(vectors, vectors, 3) == (1, 1)
  _, squares = neighbours.nearest(vectors, vectors)
  assert (squares == 0).all()


@pytest.mark.parametrize(
    ('dtype', 'shift', 'rtol'),
    [(np.float32, 3.0, 1e-12), (np.float64, 1e5, 1e-9)],
)
def test_nearest_equals_scikit_learn(dtype, shift, rtol, small_blocks):
  queries, points = (
      _vectors(n, seed=n, shift=shift).astype(dtype) for n in (40, 90)
  )
  distances, indices = neighbors.NearestNeighbors(n_neighbors=1).fit(
      points.astype(np.float64)
  ).kneighbors(queries.astype(np.float64))
  actual = neighbours.nearest(queries, points)
  np.testing.assert_array_equal(actual[0], indices[:, 0])
  np.testing.assert_allclose(np.sqrt(actual[1]), distances[:, 0], rtol=rtol)


def test_distances_of_pixels_are_exact(small_blocks):
  rng = np.random.default_rng(0)
  points = rng.integers(250, 256, (30, 3000), np.uint8)
  queries = points[rng.permutation(30)[:20]].copy()
  queries[::2, 17] -= 1  # By one level in one of 3,000 pixels.
  indices, squares = neighbours.nearest(queries, points)
  expected = np.square(
      queries[:, None].astype(np.int64) - points.astype(np.int64)
  ).sum(axis=-1)
  np.testing.assert_array_equal(indices, expected.argmin(axis=1))
  np.testing.assert_array_equal(squares, expected.min(axis=1))
  assert (squares[::2] == 1).all()
  assert (squares[1::2] == 0).all()


def test_the_first_of_equally_near_points_is_taken(small_blocks):
  points = np.zeros((20, 3), np.uint8)
  points[:9] = 5
  indices, _ = neighbours.nearest(np.zeros((2, 3), np.uint8), points)
  np.testing.assert_array_equal(indices, [9, 9])


def test_results_do_not_depend_on_block_size(monkeypatch):
  samples, reference = _vectors(50, seed=1), _vectors(70, seed=2)
  whole = neighbours.precision_recall(samples, reference, 3)
  nearest = neighbours.nearest(samples, reference)
  # The memory limit, too: 4 rows of 5 values.
  monkeypatch.setattr(neighbours, 'BLOCK_VALUES', 20)
  parts = list(neighbours.row_blocks(reference))
  assert [x.stop - x.start for x in parts] == [4] * 17 + [2]
  assert neighbours.precision_recall(samples, reference, 3) == whole
  blocked = neighbours.nearest(samples, reference)
  np.testing.assert_array_equal(blocked[0], nearest[0])
  np.testing.assert_allclose(blocked[1], nearest[1], rtol=1e-12)
  monkeypatch.setattr(neighbours, 'BLOCK_VALUES', 2)
  assert next(neighbours.row_blocks(reference)) == slice(0, 1)


@pytest.mark.parametrize('k', [0, 10, 11])
def test_k_must_be_less_than_the_number_of_vectors(k):
  with pytest.raises(ValueError, match=rf'k is {k} and the smaller set has 10'):
    neighbours.precision_recall(_vectors(10), _vectors(20), k)
