"""Frechet distances: closed forms, batches, files; against NumPy throughout."""

import logging

import numpy as np
import pytest
import safetensors.numpy

from fsq_jax.evaluation import frechet
from fsq_jax.workdir import files

_ORIGIN = frechet.Origin('toy pool3', 'ab12', 'cd34')


def _statistics(features, **kwargs):
  statistics = frechet.FeatureStatistics(features.shape[1])
  statistics.update(features, **kwargs)
  return statistics


def _with_moments(mean, covariance, num_images=1000):
  """Statistics that have exactly these moments."""
  return frechet.FeatureStatistics.from_moments(num_images, mean, covariance)


def _assert_same(actual, expected, rtol=1e-12):
  assert actual.num_images == expected.num_images
  scale = np.abs(expected.covariance).max()
  np.testing.assert_allclose(actual.mean, expected.mean, rtol=rtol, atol=rtol)
  np.testing.assert_allclose(
      actual.covariance, expected.covariance, rtol=rtol, atol=rtol * scale
  )


def _features(num_images, num_features, seed=0, mean=3.0):
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(num_features, num_features))
  return mean + rng.normal(size=(num_images, num_features)) @ mixing


# Statistics.


def test_mean_and_covariance_match_numpy():
  features = _features(50, 7)
  statistics = _statistics(features)
  assert statistics.num_images == 50
  assert statistics.covariance.dtype == np.float64
  np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-13)
  np.testing.assert_allclose(
      statistics.covariance, np.cov(features, rowvar=False), rtol=1e-12
  )


@pytest.mark.parametrize('sizes', [(50,), (1,) * 50, (3, 0, 40, 7)])
def test_statistics_do_not_depend_on_batch_size(sizes):
  features = _features(50, 7)
  statistics = frechet.FeatureStatistics(7)
  for part in np.split(features, np.cumsum(sizes)[:-1]):
    statistics.update(part)
  _assert_same(statistics, _statistics(features))


def test_masked_rows_are_ignored():
  features = _features(50, 7)
  mask = np.arange(50) % 3 > 0
  padded = np.where(mask[:, None], features, np.nan)
  _assert_same(_statistics(padded, mask=mask), _statistics(features[mask]))
  empty = _statistics(padded, mask=np.zeros(50))
  assert empty.num_images == 0


@pytest.mark.parametrize('dtype', [np.float32, np.float16])
def test_large_means_keep_precision(dtype):
  # At 1000 a float32 has steps of 6e-5, a float16 of 0.5; the squares of the
  # features less those of the mean would keep nothing of the variance.
  noise = {np.float32: 1e-3, np.float16: 2.0}[dtype]
  rng = np.random.default_rng(0)
  features = (1000 + noise * rng.normal(size=(400, 3))).astype(dtype)
  statistics = frechet.FeatureStatistics(3)
  for part in np.split(features, 8):
    statistics.update(part)
  exact = features.astype(np.longdouble)
  centred = exact - exact.mean(axis=0)
  expected = (centred[:, :, None] * centred[:, None]).sum(0) / 399
  np.testing.assert_allclose(
      statistics.covariance, np.float64(expected), rtol=1e-8, atol=1e-16
  )


@pytest.mark.parametrize(
    ('features', 'mask', 'message'),
    [
        (np.zeros((4, 6)), None, r'\[4, 6\]; these statistics take \[B, 7\]'),
        (np.zeros(7), None, r'Features are \[7\]'),
        (np.full((4, 7), np.nan), [1, 1, 1, 0], 'of 3 of 3 images hold NaN'),
        (np.full((4, 7), np.inf), None, 'of 4 of 4 images hold NaN or inf'),
    ],
)
def test_invalid_features_are_rejected(features, mask, message):
  statistics = _statistics(_features(20, 7))
  with pytest.raises(ValueError, match=message):
    statistics.update(features, mask)
  assert statistics.num_images == 20


def test_one_image_has_no_covariance():
  with pytest.raises(ValueError, match='two images, not 1'):
    _ = _statistics(np.ones((1, 3))).covariance
  with pytest.raises(ValueError, match='num_features is 0'):
    frechet.FeatureStatistics(0)


# The distance.


def test_distance_of_independent_features_is_a_sum():
  rng = np.random.default_rng(0)
  means = rng.normal(size=(2, 30))
  variances = rng.uniform(0, 4, (2, 30))
  variances[0, :3] = variances[1, 2:6] = 0
  a, b = (_with_moments(m, np.diag(v)) for m, v in zip(means, variances,
                                                       strict=True))
  deviations = np.sqrt(variances)
  expected = np.sum((means[0] - means[1]) ** 2) + np.sum(
      (deviations[0] - deviations[1]) ** 2
  )
  assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
  # Turned, features are not independent, and as far apart.
  turn, _ = np.linalg.qr(rng.normal(size=(30, 30)))
  a, b = (
      _with_moments(turn @ m, turn @ np.diag(v) @ turn.T)
      for m, v in zip(means, variances, strict=True)
  )
  assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_distance_of_two_features_has_a_closed_form():
  # tr (S1 S2)^(1/2) = (tr S1 S2 + 2 (det S1 S2)^(1/2))^(1/2) of 2 x 2.
  first = np.array([[2.0, 0.7], [0.7, 1.0]])
  second = np.array([[1.0, -0.4], [-0.4, 3.0]])
  product = first @ second
  root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
  expected = 5.0 + np.trace(first + second) - 2 * root
  a = _with_moments(np.array([1.0, 0.0]), first)
  b = _with_moments(np.array([0.0, 2.0]), second)
  assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
  assert frechet.frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('num_images', [2, 60, 1000])
def test_distance_of_a_set_to_itself_is_zero(num_images):
  # Features of scales from 10 to 1e-4, with more of them than images or fewer.
  features = _features(num_images, 100) * np.logspace(1, -4, 100)
  a = _statistics(features)
  b = _statistics(features[::-1])
  assert 0 <= frechet.frechet_distance(a, b) < 1e-6
  # Moved, it is as far as it has moved.
  moved = _statistics(features + 0.1)
  assert frechet.frechet_distance(a, moved) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize('sizes', [(20, 30), (20, 500), (200, 500)])
def test_distance_is_that_of_the_images_themselves(sizes):
  # tr (S1 S2)^(1/2) is the nuclear norm of X1 X2^T, centred rows of features,
  # and needs neither covariances nor their roots.
  sets = [
      _features(n, 100, seed=n) * np.logspace(1, -2, 100) + n for n in sizes
  ]
  x, y = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in sets)
  expected = (
      np.sum((sets[0].mean(0) - sets[1].mean(0)) ** 2)
      + np.sum(x**2) + np.sum(y**2)
      - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum()
  )
  a, b = map(_statistics, sets)
  assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_few_images_log_a_warning(caplog):
  caplog.set_level(logging.WARNING)
  enough, few = (_statistics(_features(n, 4)) for n in (40, 39))
  frechet.frechet_distance(enough, enough)
  assert not caplog.messages
  frechet.frechet_distance(enough, few)
  (message,) = caplog.messages
  assert 'of 4 features from 39 images' in message
  assert 'take 40 images or more' in message


def test_other_numbers_of_features_are_refused():
  a, b = (_statistics(_features(40, n)) for n in (4, 1))
  with pytest.raises(ValueError, match='has 4 features, the other 1'):
    frechet.frechet_distance(a, b)


# Files.


def test_statistics_round_trip_through_a_file(tmp_path):
  features = _features(50, 7)
  statistics = _statistics(features[:30])
  statistics.pixels = 'ef'
  frechet.write_statistics(tmp_path / 'x.safetensors', statistics, _ORIGIN)
  read = frechet.read_statistics(tmp_path / 'x.safetensors', _ORIGIN)
  assert read.pixels == 'ef'
  _assert_same(read, statistics, rtol=1e-15)
  read.update(features[30:])
  _assert_same(read, _statistics(features))


@pytest.mark.parametrize('field', frechet.Origin._fields)
def test_statistics_of_another_origin_are_rejected(tmp_path, field):
  path = tmp_path / 'x.safetensors'
  frechet.write_statistics(path, _statistics(_features(50, 7)), _ORIGIN)
  given = getattr(_ORIGIN, field)
  with pytest.raises(ValueError, match=f"of {field} '{given}', not 'other'"):
    frechet.read_statistics(path, _ORIGIN._replace(**{field: 'other'}))


def test_files_that_have_changed_are_refused(tmp_path):
  path = tmp_path / 'x.safetensors'
  frechet.write_statistics(path, _statistics(_features(50, 7)), _ORIGIN)
  arrays = safetensors.numpy.load_file(path)
  with safetensors.safe_open(path, framework='numpy') as file:
    metadata = file.metadata()
  assert frechet.read_statistics(path, _ORIGIN).num_images == 50
  covariance = arrays['covariance'].copy()
  covariance[2, 5] = np.nextafter(covariance[2, 5], 1)
  for name, value in (
      ('covariance', covariance), ('covariance', np.eye(4)),
      ('mean', np.zeros(7)), ('num_images', '51'), ('pixels', 'other'),
      ('format', 'other'), ('weights_sha256', 'other'), ('sha256', ''),
  ):  # fmt: skip
    changed = arrays | ({name: value} if name in arrays else {})
    words = metadata | ({} if name in arrays else {name: value})
    safetensors.numpy.save_file(changed, path, metadata=words)
    with pytest.raises(ValueError, match=f'{path} is corrupted'):
      frechet.read_statistics(path, _ORIGIN)


@pytest.mark.parametrize('content', [None, b'', b'{}', bytes(100)])
def test_files_that_cannot_be_read_are_refused(tmp_path, content):
  path = tmp_path / 'x.safetensors'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=r'x\.safetensors'):
    frechet.read_statistics(path, _ORIGIN)


def test_statistics_are_written_atomically(tmp_path, monkeypatch):
  path = tmp_path / 'x.safetensors'
  frechet.write_statistics(path, _statistics(_features(50, 7)), _ORIGIN)
  before = path.read_bytes()

  def fail(*args):
    raise OSError('no space left')

  monkeypatch.setattr(files.os, 'fsync', fail)
  with pytest.raises(OSError, match='no space'):
    frechet.write_statistics(path, _statistics(_features(60, 7)), _ORIGIN)
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]
