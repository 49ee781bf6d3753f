"""Handwritten digits: images and labels against scikit-learn, the split."""

import importlib.util

import ml_collections
import numpy as np
import pytest
import skimage.transform
from sklearn import datasets

from fsq_jax import data
from fsq_jax.data import builder
from fsq_jax.data import digits

_EXPECTED = datasets.load_digits()


def _config(**overrides) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict({
      'source': 'digits', 'name': '', 'data_dir': '',
      'eval_split': 'validation', 'image_size': (32, 32), 'resize_shorter': 0,
      'batch_size': 8, 'eval_batch_size': 100, 'label_names': (),
      'crop_scale': (1.0, 1.0), 'flip': False, 'color_jitter': 0.0,
      'num_threads': 1, 'prefetch': 8, **overrides,
  })  # fmt: skip


def _rows(source):
  """Rows of the images in scikit-learn's arrays, by name."""
  names = [source.metadata(index).name for index in range(len(source))]
  return [int(name.removeprefix('digit_')) for name in names]


@pytest.fixture(scope='module', params=['train', 'validation'])
def source(request):
  # The stored pixels and their margin, not resized.
  return digits.DigitsSource(request.param, size=10)


def test_pixels_and_labels_are_those_of_scikit_learn(source):
  rows = _rows(source)
  images = np.stack([source.load(index) for index in range(len(source))])
  assert images.dtype == np.uint8
  assert images.shape == (len(source), 10, 10, 3)
  expected = _EXPECTED.images[rows] / 16
  for channel in range(3):
    inner = images[:, 1:-1, 1:-1, channel] / 255
    np.testing.assert_allclose(inner, expected, atol=0.5 / 255 + 1e-9)
  images[:, 1:-1, 1:-1] = 0
  assert not images.any()
  labels = [source.metadata(index).label for index in range(len(source))]
  np.testing.assert_array_equal(labels, _EXPECTED.target[rows])
  assert all(type(label) is int for label in labels)
  assert source.label_names == tuple(map(str, _EXPECTED.target_names))
  assert source.describe(0) == f'digit_{rows[0]:04}, a {labels[0]}'


def test_the_split_is_disjoint_complete_and_fixed():
  train = _rows(digits.DigitsSource('train', size=10))
  validation = _rows(digits.DigitsSource('validation', size=10))
  assert (len(train), len(validation)) == (1437, 360)
  assert sorted(train + validation) == list(range(1797))
  assert _rows(digits.DigitsSource('train', size=32)) == train
  # A change would mix training and evaluation images of saved runs.
  assert validation[:5] == [11, 23, 24, 25, 28]
  counts = np.bincount(_EXPECTED.target[validation])
  assert len(counts) == 10
  assert counts.min() > 25


def test_images_are_enlarged_smoothly():
  source = digits.DigitsSource('validation', size=32)
  for index, row in enumerate(_rows(source)[:20]):
    image = source.load(index)
    assert image.shape == (32, 32, 3)
    # Kernels differ (Pillow has cubic convolution, scikit-image a spline) by
    # less than 0.02; nearest neighbours differ by more than 0.05.
    expected = skimage.transform.resize(
        np.pad(_EXPECTED.images[row] / 16, 1), (32, 32), order=3
    )
    assert abs(image[..., 0] / 255 - expected).mean() < 0.03
  assert not source.upscaled


def test_pipelines_enlarge_digits_to_the_crop_without_upscaling():
  for fields, crop in (
      ({}, (32, 32)), ({'image_size': (24, 16)}, (24, 16)),
      ({'resize_shorter': 40}, (32, 32)),
  ):  # fmt: skip
    config = _config(**fields)
    for split, num_images in (
        ('train', 1437), ('train_once', 1437), ('eval', 360)
    ):  # fmt: skip
      dataset = data.build_dataset(config, split=split, seed=0)
      assert dataset.num_examples == num_images
      batch = next(iter(dataset))
      assert batch['image'].shape[1:] == (*crop, 3)
      assert batch['image'].std() > 50
      assert not dataset.upscaled
  source = builder.open_source(_config(resize_shorter=40), 'eval')
  assert source.load(0).shape == (40, 40, 3)


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='pip install scikit-learn'):
    digits.DigitsSource('train', size=32)
