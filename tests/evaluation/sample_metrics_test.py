"""Metrics of generated images against closed forms, SciPy and scikit-learn."""

import json
import logging

import jax
import numpy as np
import pytest
from scipy import linalg
from scipy import special
from sklearn import decomposition
from sklearn import neighbors

from fsq_jax.evaluation import frechet
from fsq_jax.evaluation import neighbours
from fsq_jax.evaluation import network_metrics
from fsq_jax.evaluation import pixel_pca
from fsq_jax.evaluation import sample_metrics
from fsq_jax.perceptual import inception
from fsq_jax.runtime import partitioning

_SIDE = 6
_NUM_CLASSES = 3


@pytest.fixture(scope='module')
def mesh():
  return partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])


def _set(n, seed, side=_SIDE, noise=40.0, shift=0.0):
  """Noisy images of three classes, which overlap."""
  rng = np.random.default_rng(seed)
  patterns = np.random.default_rng(99).uniform(80, 170, (_NUM_CLASSES, 2, 2, 3))
  labels = rng.integers(0, _NUM_CLASSES, n)
  pixels = patterns[labels].repeat(side // 2, 1).repeat(side // 2, 2) + shift
  pixels = pixels + noise * rng.normal(size=(n, 1, 1, 3))
  pixels += noise * rng.normal(size=pixels.shape)
  images = np.uint8(np.clip(np.rint(pixels), 0, 255))
  return sample_metrics.ImageSet(images, labels)


@pytest.fixture(scope='module')
def sets():
  """Samples, of which four are copies; reference; training images."""
  samples = _set(150, 1, shift=5.0)
  train = _set(170, 3)
  samples.images[[0, 9, 50, 149]] = train.images[[5, 6, 169, 5]]
  return samples, _set(160, 2), train


def _evaluate(samples, reference, train, *, networks=None, mesh=None):
  loaded = sample_metrics.load_networks(networks or {}, mesh)
  evaluator = sample_metrics.SampleEvaluator([reference], [train], loaded)
  return evaluator.run([samples])


def _find_nearest(samples, train):
  evaluator = sample_metrics.SampleEvaluator([train], [train])
  return evaluator.find_nearest(samples.images)


@pytest.fixture(scope='module')
def result(sets):
  return _evaluate(*sets)


def _flat(image_set):
  return image_set.images.reshape(len(image_set.images), -1).astype(np.float64)


def _features(sets):
  """Features of samples and of the reference, by scikit-learn."""
  pca = decomposition.PCA(16, svd_solver='full').fit(_flat(sets[2]))
  return [pca.transform(_flat(x)) / 255 for x in sets[:2]]


def _statistics(features):
  statistics = frechet.FeatureStatistics(features.shape[1])
  statistics.update(features)
  return statistics


def _frechet(a, b):
  """The distance by the square root of a matrix, as in pytorch-fid."""
  covariances = [np.cov(x, rowvar=False) for x in (a, b)]
  root = linalg.sqrtm(covariances[0] @ covariances[1])
  difference = a.mean(axis=0) - b.mean(axis=0)
  traces = [np.trace(x) for x in (*covariances, root)]
  return difference @ difference + traces[0] + traces[1] - 2 * traces[2].real


def test_frechet_distances_equal_scipy(sets, result):
  features = _features(sets)
  np.testing.assert_allclose(
      result.metrics['fd_pixel_pca'], _frechet(*features), rtol=1e-8
  )
  distances = [
      _frechet(*(
          x[y.labels == c] for x, y in zip(features, sets[:2], strict=True)
      ))
      for c in range(_NUM_CLASSES)
  ]
  np.testing.assert_allclose(
      result.metrics['fd_pixel_pca_within_class'], np.mean(distances), rtol=1e-8
  )
  assert min(distances) < 0.9 * max(distances)


def test_frechet_distance_of_gaussians_is_the_closed_form():
  rng = np.random.default_rng(0)
  # Images of one pixel have as many components as colours.
  moments = (
      ([100, 120, 140], [10, 20, 15]), ([106, 120, 132], [14, 12, 15])
  )
  images = [
      np.uint8(np.rint(rng.normal(*x, size=(40_000, 1, 1, 3)))) for x in moments
  ]
  pca = pixel_pca.fit_pixel_pca(images[1][:50])
  statistics = [frechet.FeatureStatistics(3) for _ in images]
  for x, y in zip(statistics, images, strict=True):
    x.update(255 * pca.project(y))
  # Differences of means and of deviations; standard errors give about 2.
  np.testing.assert_allclose(
      frechet.frechet_distance(*statistics), 6**2 + 8**2 + 4**2 + 8**2, atol=6
  )


def test_equal_sets_are_at_distance_zero(sets):
  _, reference, train = sets
  metrics, _ = _evaluate(reference, reference, train)
  assert metrics['fd_pixel_pca'] < 1e-6
  assert metrics['precision_pixel_pca'] == metrics['recall_pixel_pca'] == 1


def test_precision_and_recall_equal_scikit_learn(sets, result):
  samples, reference = _features(sets)

  def share(queries, points):
    radii = neighbors.NearestNeighbors(n_neighbors=3).fit(points).kneighbors()
    distances = neighbors.NearestNeighbors(n_neighbors=len(points)).fit(points)
    far, order = distances.kneighbors(queries)
    return np.mean((far <= radii[0][:, -1][order]).any(axis=1))

  assert result.metrics['precision_pixel_pca'] == share(samples, reference)
  assert result.metrics['recall_pixel_pca'] == share(reference, samples)
  assert 0 < result.metrics['precision_pixel_pca'] < 1


def test_nearest_neighbours_equal_scikit_learn(sets, result):
  samples, reference, train = sets
  classifier = neighbors.KNeighborsClassifier(1, algorithm='brute')
  classifier.fit(_flat(train), train.labels)
  accuracy = classifier.score(_flat(samples), samples.labels)
  assert result.metrics['nearest_neighbour_accuracy'] == accuracy
  assert 1 / _NUM_CLASSES < accuracy < 1
  index = neighbors.NearestNeighbors(n_neighbors=1).fit(_flat(train))
  indices, distances = _find_nearest(samples, train)
  for image_set, name in ((samples, ''), (reference, '_reference')):
    expected, order = index.kneighbors(_flat(image_set))
    expected = expected[:, 0] / np.sqrt(_SIDE * _SIDE * 3)
    if image_set is samples:
      np.testing.assert_array_equal(indices, order[:, 0])
      np.testing.assert_allclose(distances, expected, atol=1e-10)
    np.testing.assert_allclose(
        result.metrics[f'nearest_train_distance{name}'], expected.mean(),
        rtol=1e-10,
    )


def test_copies_are_counted(sets, result):
  assert result.metrics['copies'] == 4
  assert result.metrics['copies_share'] == 4 / 150
  # One level in one value of a sample is no copy.
  changed = sets[0].images.copy()
  changed[9, 3, 2, 1] ^= 1
  _, distances = _find_nearest(
      sets[0]._replace(images=changed), sets[2]
  )
  assert np.count_nonzero(distances == 0) == 3
  np.testing.assert_allclose(distances[9], (_SIDE * _SIDE * 3) ** -0.5)


def test_blocks_do_not_matter(sets, result, monkeypatch):
  monkeypatch.setattr(neighbours, 'MAX_ROWS', 17)
  metrics, _ = _evaluate(*sets)
  assert metrics.keys() == result.metrics.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(value, result.metrics[name], rtol=1e-9)


def test_the_protocol_describes_every_metric(result):
  metrics, protocol = result
  assert protocol['definitions'].keys() == metrics.keys()
  assert all(type(x) is float for x in metrics.values())
  assert json.loads(json.dumps(protocol)) == protocol
  assert protocol['num_images'] == {
      'samples': 150, 'reference': 160, 'train': 170,
  }
  assert protocol['precision_recall_k'] == 3
  assert protocol['pixel_pca']['components'] == 16
  assert protocol['networks'] == {}


def test_few_images_per_feature_are_warned_about(sets, caplog):
  with caplog.at_level(logging.WARNING, logger='absl'):
    _evaluate(*sets)
  # Once: the definition of the class-wise distance says so, too.
  messages = [x for x in caplog.messages if 'biased upwards' in x]
  assert messages == [
      'A Frechet distance of 16 features from 150 images is biased upwards;'
      ' take 160 images or more.'
  ]


def test_metrics_of_labels_are_left_out_without_labels(sets):
  samples, reference, train = sets
  none = [x._replace(labels=np.full(len(x.labels), -1)) for x in sets]
  metrics, _ = _evaluate(*none)
  assert not {
      'nearest_neighbour_accuracy', 'fd_pixel_pca_within_class'
  } & metrics.keys()
  # Of samples without a label nothing is expected.
  labels = np.where(np.arange(150) < 20, samples.labels, -1)
  some = samples._replace(labels=labels)
  metrics, _ = _evaluate(some, reference, train)
  indices, _ = _find_nearest(samples, train)
  matches = train.labels[indices[:20]] == labels[:20]
  assert metrics['nearest_neighbour_accuracy'] == np.mean(matches)
  # Fewer than two images per component.
  assert 'fd_pixel_pca_within_class' not in metrics


def _replaced(image_set, **changes):
  return image_set._replace(**changes)


@pytest.mark.parametrize(
    ('index', 'change', 'message'),
    [
        (0, lambda x: _replaced(x, images=x.images[:0], labels=x.labels[:0]),
         r'images of samples are uint8 \[0, 6, 6, 3\]; give'),
        (1, lambda x: _replaced(x, images=np.float32(x.images)),
         r'images of reference are float32 \[160, 6, 6, 3\]'),
        (2, lambda x: _replaced(x, images=x.images[..., 0]),
         r'images of train are uint8 \[170, 6, 6\]'),
        (0, lambda x: _replaced(x, images=list(x.images)),
         'images of samples are None'),
        (1, lambda x: _replaced(x, images=x.images[:, 1:]),
         r"sizes {'reference': \(5, 6, 3\), 'train': \(6, 6, 3\)"),
        (0, lambda x: _replaced(x, images=x.images[:, 1:]),
         r"sizes {'samples': \(5, 6, 3\), 'train': \(6, 6, 3\)"),
        (0, lambda x: _replaced(x, labels=None), 'labels of samples are None'),
        (0, lambda x: _replaced(x, labels=x.labels[1:]),
         'give an array of 150 integers'),
        (1, lambda x: _replaced(x, labels=x.labels / 2), 'labels of reference'),
        (2, lambda x: _replaced(x, labels=x.labels - 2), 'labels of train are'),
        (2, lambda x: _replaced(x, labels=np.full(170, -1)),
         '170 of 170 training images have none'),
        (1, lambda x: _replaced(x, images=x.images[:3], labels=x.labels[:3]),
         'k is 3 and the smaller set has 3'),
    ],
)
def test_wrong_sets_are_rejected(sets, index, change, message):
  sets = list(sets)
  sets[index] = change(sets[index])
  with pytest.raises(ValueError, match=message):
    _evaluate(*sets)


def test_unknown_networks_and_missing_files_are_rejected(mesh, tmp_path):
  for networks, message in (
      ({'resnet': 'x'}, r"'resnet'; known: \['inception', 'inception_tf1'"),
      ({'inception': str(tmp_path / 'no')}, r'There is no file .*/no'),
  ):
    with pytest.raises(ValueError, match=message):
      sample_metrics.load_networks(networks, mesh)


def test_batches_do_not_matter(sets, result):
  def split(image_set):
    for i in range(0, len(image_set.images), 64):
      yield sample_metrics.ImageSet(*(x[i : i + 64] for x in image_set))

  evaluator = sample_metrics.SampleEvaluator(*map(split, sets[1:]))
  # Nothing is left of a call in the next one.
  for _ in range(2):
    assert evaluator.run(split(sets[0])) == result


def test_batches_of_other_sizes_and_no_batches_are_rejected(sets):
  other = _set(3, 1, side=8)
  with pytest.raises(ValueError, match=r'reference have the sizes \(6, 6'):
    sample_metrics.SampleEvaluator([sets[1], other], [sets[2]])
  evaluator = sample_metrics.SampleEvaluator([sets[1]], [sets[2]])
  with pytest.raises(ValueError, match="The set 'samples' has no images; give"):
    evaluator.run([])


# The Inception score.


def _score(logits, num_splits=10, seed=0):
  return sample_metrics.inception_score(
      logits, np.eye(logits.shape[1]), num_splits=num_splits, seed=seed
  )


def test_uniform_classes_have_the_score_one():
  mean, deviation = _score(np.full((50, 7), 2.5, np.float32))
  np.testing.assert_allclose(mean, 1, rtol=1e-12)
  assert deviation < 1e-12


def test_certain_and_balanced_classes_score_their_number():
  logits = 1000 * np.eye(7)[np.arange(70) % 7]
  mean, deviation = _score(logits, num_splits=1)
  np.testing.assert_allclose(mean, 7, rtol=1e-12)
  assert deviation == 0


def test_the_order_of_the_file_does_not_matter():
  labels = np.arange(20_000) % 10
  balanced, deviation = _score(100 * np.eye(10)[labels])
  assert 9.9 < balanced <= 10
  assert 0 < deviation < 0.1
  # In order, each of the ten splits would have one class, and the score 1.
  ordered, _ = _score(100 * np.eye(10)[np.sort(labels)])
  np.testing.assert_allclose(ordered, balanced, atol=0.02)


def test_the_score_is_that_of_the_definition():
  rng = np.random.default_rng(0)
  features, classifier = rng.normal(size=(40, 6)), rng.normal(size=(9, 6))
  mean, _ = sample_metrics.inception_score(
      features, classifier, num_splits=1, seed=3
  )
  probabilities = special.softmax(features @ classifier.T, axis=1)
  divergences = special.rel_entr(probabilities, probabilities.mean(axis=0))
  np.testing.assert_allclose(
      mean, np.exp(divergences.sum(axis=1).mean()), rtol=1e-12
  )
  # Three splits: 14, 13 and 13 images, each with its own mean.
  scores = _score(features, num_splits=3, seed=3)
  order = np.random.default_rng(3).permutation(40)
  parts = [order[:14], order[14:27], order[27:]]
  single = [_score(features[part], num_splits=1)[0] for part in parts]
  np.testing.assert_allclose(scores, (np.mean(single), np.std(single)))


def test_the_score_needs_an_image_per_split():
  with pytest.raises(ValueError, match=r'score of 10 splits .* not 9'):
    _score(np.zeros((9, 2)))


# Networks.


class _Fake:
  """A network whose features are some of the pixels."""

  min_side = 1

  def __init__(self, metric, path, mesh):
    del mesh
    self.sha256 = f'{metric} {path}'
    self._channel = ('rfid', 'rfid_tf1', 'fd_vgg16').index(metric)

  def __call__(self, images):
    return np.float32(images[:, 1:3, 1:3, self._channel].reshape(-1, 4))


def test_each_network_has_its_metrics(sets, result, mesh, monkeypatch):
  monkeypatch.setattr(network_metrics, 'load_network', _Fake)
  classifiers = {
      name: np.random.default_rng(i).normal(size=(9, 4)) / 100
      for i, name in enumerate('ab')
  }
  monkeypatch.setattr(inception, 'read_classifier', classifiers.__getitem__)
  metrics, protocol = _evaluate(
      *sets,
      networks={'inception': 'a', 'inception_tf1': 'b', 'vgg16': 'c'},
      mesh=mesh,
  )
  for channel, (name, suffix, file) in enumerate((
      ('inception', '', 'a'), ('inception_tf1', '_tf1', 'b'), ('vgg16', '', '')
  )):
    features = [
        np.float64(x.images[:, 1:3, 1:3, channel].reshape(-1, 4))
        for x in sets[:2]
    ]
    distance = metrics['fd_vgg16' if name == 'vgg16' else f'fid{suffix}']
    np.testing.assert_allclose(distance, _frechet(*features), rtol=1e-6)
    expected = neighbours.precision_recall(*features, 3)
    assert metrics[f'precision_{name}'] == expected.precision
    assert metrics[f'recall_{name}'] == expected.recall
    if file:
      score = sample_metrics.inception_score(
          features[0], classifiers[file], num_splits=10, seed=0
      )
      names = [f'inception_score{suffix}{x}' for x in ('', '_std')]
      np.testing.assert_allclose([metrics[x] for x in names], score)
  assert result.metrics.items() <= metrics.items()
  assert len(metrics) == len(result.metrics) + 3 * 3 + 2 * 2
  assert protocol['definitions'].keys() == metrics.keys()
  assert protocol['networks'] == {
      'inception': 'rfid a', 'inception_tf1': 'rfid_tf1 b',
      'vgg16': 'fd_vgg16 c',
  }


def test_images_that_a_network_cannot_take_are_refused(mesh, monkeypatch):
  monkeypatch.setattr(_Fake, 'min_side', 16)
  monkeypatch.setattr(network_metrics, 'load_network', _Fake)
  small = [_set(n, n, side=8) for n in (10, 10, 10)]
  with pytest.raises(ValueError, match='vgg16 needs images of 16 pixels per'):
    _evaluate(*small, networks={'vgg16': 'c'}, mesh=mesh)
