"""Differentiable augmentation: NumPy, statistics, gradients, devices."""

import functools
import math
import re

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.adversarial import diffaug
from fsq_jax.runtime import partitioning

_SHAPE = (8, 16, 24, 3)
_KEY = jax.random.key(3)


def _images(shape=_SHAPE):
  images = np.random.default_rng(0).uniform(-1, 1, shape)
  return jnp.asarray(images, jnp.float32)


def _augment(key, images, **options):
  return jax.jit(functools.partial(diffaug.augment, **options))(key, images)


def _translated(image, draws):
  height, width = image.shape[:2]
  reach = round(height / 8), round(width / 8)
  down = math.floor(draws[0] * (2 * reach[0] + 1)) - reach[0]
  right = math.floor(draws[1] * (2 * reach[1] + 1)) - reach[1]
  moved = np.zeros_like(image)
  for y in range(height):
    for x in range(width):
      if 0 <= y - down < height and 0 <= x - right < width:
        moved[y, x] = image[y - down, x - right]
  return moved


def _coloured(image, draws):
  image = image + draws[2] - 0.5
  grey = image.mean(-1, keepdims=True)
  image = (image - grey) * (2 * draws[3]) + grey
  return (image - image.mean()) * (0.5 + draws[4]) + image.mean()


def _cut(image, draws, share):
  image = image.copy()
  spans = []
  for side, draw in zip(image.shape, draws[5:], strict=False):
    size = round(side * share)
    center = math.floor(draw * (side + 1 - size % 2))
    low, high = center - size // 2, center - size // 2 + size
    spans.append(slice(max(low, 0), max(high, 0)))
  image[tuple(spans)] = 0
  return image


def _expected(images, draws, probability, cutout):
  translate, colour, cut = np.asarray(draws.groups) < probability
  results = []
  for image, own in zip(
      np.float64(images), np.float64(draws.images), strict=True
  ):
    if translate:
      image = _translated(image, own)
    if colour:
      image = _coloured(image, own)
    if cut and cutout:
      image = _cut(image, own, cutout)
    results.append(image)
  return np.stack(results)


@pytest.mark.parametrize(
    'cutout',
    [0.2, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 0.5))],
)
@pytest.mark.parametrize('groups', [*np.ndindex(2, 2, 2)])
def test_images_are_those_of_numpy(groups, cutout):
  drawn = diffaug.draw(_KEY, len(_images()))
  # 0.6 is above the probability: that group is left out.
  draws = drawn._replace(groups=jnp.asarray(groups) * 0.6)
  apply = jax.jit(
      functools.partial(diffaug.apply, probability=0.5, cutout=cutout)
  )
  augmented = apply(draws, _images())
  assert augmented.dtype == jnp.float32
  expected = _expected(_images(), draws, 0.5, cutout)
  np.testing.assert_allclose(augmented, expected, atol=2e-6)
  if all(groups):
    np.testing.assert_array_equal(augmented, _images())


def test_the_extreme_draws_are_in_range():
  below_1 = np.nextafter(np.float32(1), np.float32(0))
  apply = jax.jit(
      functools.partial(diffaug.apply, probability=0.5, cutout=0.5)
  )
  for value in (0, below_1):
    draws = diffaug.Draws(
        groups=jnp.asarray([0, 0.9, 0]), images=jnp.full((8, 7), value)
    )
    expected = _expected(_images(), draws, 0.5, 0.5)
    np.testing.assert_allclose(apply(draws, _images()), expected, atol=2e-6)


def test_augment_applies_what_is_drawn():
  draws = diffaug.draw(_KEY, 8)
  np.testing.assert_allclose(
      _augment(_KEY, _images(), cutout=0.2),
      _expected(_images(), draws, 1.0, 0.2),
      atol=2e-6,
  )


@pytest.mark.slow
def test_a_probability_of_0_changes_nothing_and_1_all():
  for seed in range(5):
    key = jax.random.key(seed)
    np.testing.assert_array_equal(
        _augment(key, _images(), probability=0.0, cutout=0.2), _images()
    )
    assert np.all(diffaug.draw(key, 8).groups < 1)
  draws = diffaug.draw(_KEY, 8)._replace(groups=jnp.zeros(3))
  unchanged = diffaug.apply(draws, _images(), probability=0.0, cutout=0.2)
  np.testing.assert_array_equal(unchanged, _images())


def test_groups_are_chosen_with_the_probability_and_apart():
  keys = jax.random.split(_KEY, 2000)
  groups = jax.jit(jax.vmap(lambda key: diffaug.draw(key, 1).groups))(keys)
  chosen = np.asarray(groups) < 0.3
  # Four standard deviations of 2000 draws.
  np.testing.assert_allclose(chosen.mean(0), 0.3, atol=0.041)
  both = (chosen[:, 0] & chosen[:, 1]).mean()
  np.testing.assert_allclose(both, 0.09, atol=0.026)


@pytest.mark.slow
def test_translations_are_even_over_their_range():
  # One bright pixel in the middle tells where its image went.
  images = np.zeros((4000, 16, 24, 1), np.float32)
  images[:, 8, 12] = 1
  draws = diffaug.draw(_KEY, 4000)
  draws = draws._replace(groups=jnp.asarray([0, 0.9, 0.9]))
  moved = jax.jit(
      functools.partial(diffaug.apply, probability=0.5, cutout=0.0)
  )(draws, jnp.asarray(images))
  _, rows, columns, _ = np.nonzero(np.asarray(moved))
  for places, center, reach in ((rows, 8, 2), (columns, 12, 3)):
    counts = np.bincount(places - center + reach)
    assert len(counts) == 2 * reach + 1
    share = 1 / len(counts)
    deviation = math.sqrt(share * (1 - share) / 4000)
    np.testing.assert_allclose(counts / 4000, share, atol=4 * deviation)
  assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.064


def test_draws_are_even_and_apart():
  draws = np.asarray(diffaug.draw(_KEY, 4000).images)
  np.testing.assert_allclose(draws.mean(0), 0.5, atol=4 * 0.289 / 63)
  np.testing.assert_allclose(draws.std(0), 1 / math.sqrt(12), atol=0.01)
  np.testing.assert_allclose(np.corrcoef(draws.T), np.eye(7), atol=0.064)
  assert len(np.unique(draws)) > 0.99 * draws.size


@pytest.mark.slow
def test_the_gradient_by_the_images_is_the_numerical_one():
  # Float64 of NumPy is the reference: its function is linear in the images.
  images = _images((2, 8, 8, 3))
  weights = np.random.default_rng(1).standard_normal(images.shape)
  draws = diffaug.draw(_KEY, 2)
  gradient = jax.jit(
      jax.grad(
          lambda x: jnp.sum(diffaug.augment(_KEY, x, cutout=0.3) * weights)
      )
  )(images)
  at_0 = _expected(np.zeros(images.shape), draws, 1.0, 0.3)
  expected = np.zeros(images.shape)
  for index in np.ndindex(images.shape):
    one = np.zeros(images.shape)
    one[index] = 1
    change = _expected(one, draws, 1.0, 0.3) - at_0
    expected[index] = (change * weights).sum()
  np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_what_an_image_gets_does_not_depend_on_the_others():
  few, many = diffaug.draw(_KEY, 3), diffaug.draw(_KEY, 8)
  np.testing.assert_array_equal(few.images, many.images[:3])
  np.testing.assert_array_equal(few.groups, many.groups)
  assert len(np.unique(many.images, axis=0)) == 8


def test_real_and_fake_images_have_their_own_draws():
  real, fake = (diffaug.draw(key, 8) for key in jax.random.split(_KEY))
  assert not np.any(np.asarray(real.images) == np.asarray(fake.images))


@pytest.mark.slow
def test_eight_devices_give_the_result_of_one_without_talking():
  mesh = partitioning.create_mesh({'data': 8, 'fsdp': 1})
  batch = partitioning.batch_sharding(mesh)

  def gradient(key, images):
    augmented = diffaug.augment(key, images, cutout=0.2)
    return augmented, jax.grad(
        lambda x: jnp.sin(diffaug.augment(key, x, cutout=0.2)).sum()
    )(images)

  sharded = jax.jit(
      gradient,
      in_shardings=(partitioning.replicated(mesh), batch),
      out_shardings=batch,
  )
  program = sharded.lower(_KEY, _images()).compile().as_text()
  assert not re.search(r'all-|collective-|reduce-scatter', program)
  for ours, expected in zip(
      sharded(_KEY, jax.device_put(_images(), batch)),
      jax.jit(gradient)(_KEY, _images()),
      strict=True,
  ):
    assert ours.sharding.is_equivalent_to(batch, 4)
    # The mean of an image is summed in another order.
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_draws_of_another_batch_are_refused():
  with pytest.raises(ValueError, match=r'\(4, 7\); 8 images need \(8, 7\)'):
    diffaug.apply(
        diffaug.draw(_KEY, 4), _images(), probability=1.0, cutout=0.0
    )


@pytest.mark.parametrize('cutout', [-0.1, 1.1])
def test_cutouts_that_are_no_share_are_refused(cutout):
  with pytest.raises(ValueError, match=f'cutout is {cutout}'):
    diffaug.augment(_KEY, _images(), cutout=cutout)
