"""Principal components of pixels against scikit-learn and scikit-image."""

import numpy as np
import pytest
from skimage import transform
from sklearn import decomposition

from fsq_jax.evaluation import neighbours
from fsq_jax.evaluation import pixel_pca


def _images(n, height=6, width=5, seed=0):
  """Images with a few strong directions of variation, and noise."""
  rng = np.random.default_rng(seed)
  patterns = rng.normal(size=(4, height, width, 3))
  mixing = rng.normal(size=(n, 4)) * [30, 20, 12, 8]
  noise = rng.normal(size=(n, height, width, 3)) * 4
  pixels = 128 + np.einsum('np,phwc->nhwc', mixing, patterns) + noise
  return np.uint8(np.clip(np.rint(pixels), 0, 255))


# More and fewer images than the 90 values of an image.
@pytest.mark.parametrize('n', [200, 60])
def test_projections_equal_scikit_learn(n, monkeypatch):
  train, others = _images(n), _images(30, seed=1)
  expected = decomposition.PCA(16, svd_solver='full').fit(
      train.reshape(n, -1).astype(np.float64)
  )
  monkeypatch.setattr(neighbours, 'MAX_ROWS', 7)
  pca = pixel_pca.fit_pixel_pca(train)
  actual = 255 * pca.project(others)
  assert actual.dtype == np.float64
  expected_projections = expected.transform(others.reshape(30, -1))
  # The sign of a component is arbitrary.
  signs = np.sign(np.sum(pca.components * expected.components_, axis=1))
  np.testing.assert_allclose(
      actual * signs, expected_projections, rtol=1e-8, atol=1e-8
  )
  np.testing.assert_allclose(
      pca.variance_share, expected.explained_variance_ratio_.sum(), rtol=1e-10
  )
  assert pca.protocol['components'] == 16
  assert pca.protocol['image_size'] == [6, 5]


def test_images_of_few_directions_have_few_components():
  rng = np.random.default_rng(0)
  pixels = np.zeros((50, 4, 4, 3), np.uint8)
  pixels[:, 0, 0, 0] = rng.integers(0, 256, 50)
  pixels[:, 1, 2, 1] = rng.integers(0, 256, 50)
  pca = pixel_pca.fit_pixel_pca(pixels)
  assert pca.components.shape == (2, 48)
  np.testing.assert_allclose(pca.variance_share, 1)
  # As many as images less one.
  assert pixel_pca.fit_pixel_pca(_images(5)).components.shape == (4, 90)
  pca = pixel_pca.fit_pixel_pca(pixels[:20])
  assert pca.components.shape == (2, 48)


def _reduced(images, size):
  """Area averages of uint8 images, by scikit-image and repeated pixels."""
  return np.stack([
      transform.downscale_local_mean(
          x.repeat(size[0], axis=0).repeat(size[1], axis=1).astype(np.float64),
          (*x.shape[:2], 1),
      )
      for x in images
  ]).reshape(len(images), -1)


@pytest.mark.parametrize(
    ('image_size', 'size'),
    [((50, 4), (32, 4)), ((3, 40), (3, 32)), ((64, 96), (32, 32))],
)
def test_large_images_are_reduced_by_area_averaging(image_size, size):
  images = _images(6, *image_size)
  pca = pixel_pca.fit_pixel_pca(images)
  assert pca.size == size
  reduced = _reduced(images, size)
  np.testing.assert_allclose(pca.mean, reduced.mean(axis=0), rtol=1e-12)
  np.testing.assert_allclose(
      255 * pca.project(images),
      (reduced - reduced.mean(axis=0)) @ pca.components.T,
      rtol=1e-9, atol=1e-9,
  )


@pytest.mark.parametrize('n', [1, 5])
def test_equal_images_are_rejected(n):
  with pytest.raises(ValueError, match=rf'The {n} training images are all eq'):
    pixel_pca.fit_pixel_pca(np.full((n, 4, 4, 3), 7, np.uint8))
