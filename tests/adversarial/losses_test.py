"""Adversarial losses against closed forms; shapes that would broadcast."""

import functools
import re

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.adversarial import losses as adversarial_losses
from fsq_jax.models import pixels


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


# By the definitions, in NumPy: relu as a maximum, softplus as a logarithm.
_DISCRIMINATOR = {
    'hinge': lambda real, fake: (
        np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()
    ) / 2,
    'vanilla': lambda real, fake: -(
        np.log(_sigmoid(real)).mean() + np.log(1 - _sigmoid(fake)).mean()
    ) / 2,
    'non_saturating': lambda real, fake: -(
        np.log(_sigmoid(real)).mean() + np.log(1 - _sigmoid(fake)).mean()
    ),
}
_GENERATOR = {
    'hinge': lambda fake: -fake.mean(),
    'vanilla': lambda fake: np.log(1 - _sigmoid(fake)).mean(),
    'non_saturating': lambda fake: -np.log(_sigmoid(fake)).mean(),
}
# Derivative of one logit's term by that logit.
_GENERATOR_GRADIENTS = {
    'hinge': lambda fake: -np.ones_like(fake),
    'vanilla': lambda fake: -_sigmoid(fake),
    'non_saturating': lambda fake: _sigmoid(fake) - 1,
}
_SHAPE = (3, 5)


@pytest.fixture(autouse=True)
def _no_rank_promotion():
  with jax.numpy_rank_promotion('raise'):
    yield


def _logits(seed, shape=_SHAPE):
  logits = 2 * np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(logits, jnp.float32)


def test_every_loss_of_the_builders_is_tested():
  for build, tested in (
      (adversarial_losses.build_discriminator_loss, _DISCRIMINATOR),
      (adversarial_losses.build_generator_loss, _GENERATOR),
  ):
    known = re.escape(f'known: {sorted(tested)}.')
    with pytest.raises(ValueError, match=known):
      build('none')


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', sorted(_DISCRIMINATOR))
def test_discriminator_losses_are_those_of_numpy(name, dtype):
  real, fake = _logits(0).astype(dtype), _logits(1).astype(dtype)
  loss = jax.jit(adversarial_losses.build_discriminator_loss(name))(real, fake)
  expected = _DISCRIMINATOR[name](np.float64(real), np.float64(fake))
  assert loss.shape == ()
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize('name', sorted(_GENERATOR))
def test_generator_losses_and_gradients_are_those_of_numpy(name):
  fake = _logits(1)
  loss, gradient = jax.jit(
      jax.value_and_grad(adversarial_losses.build_generator_loss(name))
  )(fake)
  assert loss.shape == ()
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, _GENERATOR[name](np.float64(fake)), 1e-6)
  expected = _GENERATOR_GRADIENTS[name](np.float64(fake)) / fake.size
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize('name', sorted(_GENERATOR))
def test_losses_of_large_logits_are_finite(name):
  logits = jnp.full(_SHAPE, 1e4)
  for sign in (-1, 1):
    generator = adversarial_losses.build_generator_loss(name)
    discriminator = adversarial_losses.build_discriminator_loss(name)
    assert np.isfinite(jax.jit(generator)(sign * logits))
    assert np.isfinite(jax.jit(discriminator)(sign * logits, -sign * logits))


def test_unknown_names_list_the_known_ones():
  known = r"known: \['hinge', 'non_saturating', 'vanilla'\]"
  with pytest.raises(ValueError, match=f"discriminator loss is 'x'; {known}"):
    adversarial_losses.build_discriminator_loss('x')
  with pytest.raises(ValueError, match=f"generator loss is 'x'; {known}"):
    adversarial_losses.build_generator_loss('x')


@pytest.mark.parametrize('shape', [(), (5,), (3,), (1, 5), (3, 1), (3, 5, 1)])
def test_logits_that_would_broadcast_are_refused(shape):
  logits, other = jnp.zeros(_SHAPE), jnp.zeros(shape)
  loss = adversarial_losses.build_discriminator_loss('hinge')
  penalty = functools.partial(
      adversarial_losses.lecam, real_average=0.0, fake_average=0.0
  )
  for function in (loss, penalty):
    for arguments in ((logits, other), (other, logits)):
      with pytest.raises(ValueError, match='must have the same shape') as error:
        jax.eval_shape(function, *arguments)
      assert str(shape) in str(error.value)


@pytest.mark.parametrize('shape', [(), (5,), (3, 5, 1)])
def test_logits_of_another_rank_are_refused(shape):
  logits = jnp.zeros(shape)
  images = jnp.zeros((3, 2, 2, 3))
  for function in (
      adversarial_losses.build_generator_loss('hinge'),
      lambda x: adversarial_losses.build_discriminator_loss('hinge')(x, x),
      lambda x: adversarial_losses.update_average(0.0, x, 0.9),
      lambda x: adversarial_losses.r1_penalty(lambda _: x, images),
  ):
    with pytest.raises(ValueError, match=r'allowed: \[B, N\]'):
      jax.eval_shape(function, logits)


def test_r1_is_the_mean_squared_norm_of_the_gradient():
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (4, 3, 2, 3)).astype(np.float32)
  kernel = rng.standard_normal((3, 2, 3, 5)).astype(np.float32)

  def logits_fn(images):
    return jnp.einsum('bhwc,hwcn->bn', images**2, kernel)

  penalty = jax.jit(functools.partial(adversarial_losses.r1_penalty, logits_fn))
  gradient = 2 * np.float64(images) * kernel.sum(-1)
  expected = (gradient**2).sum((1, 2, 3)).mean()
  value = penalty(images)
  assert value.shape == ()
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_r1_can_be_minimized():
  images = jnp.ones((2, 2, 2, 3))

  def penalty(weight):
    return adversarial_losses.r1_penalty(
        lambda x: jnp.einsum('bhwc->b', weight * x)[:, None], images
    )

  # 12 pixels' channels, each with the gradient `weight`.
  value, gradient = jax.jit(jax.value_and_grad(penalty))(3.0)
  np.testing.assert_allclose((value, gradient), (12 * 9, 12 * 6), rtol=1e-6)


@pytest.mark.parametrize(
    ('real', 'fake', 'real_average', 'fake_average', 'expected'),
    [
        (1.0, -1.0, 0.5, -0.5, 1.5**2 + 1.5**2),
        (1.0, -1.0, -2.0, -0.5, 1.5**2),
        (1.0, -1.0, 0.5, 2.0, 1.5**2),
        (-1.0, 1.0, 0.0, 0.0, 0.0),
    ],
)
def test_lecam_by_hand(real, fake, real_average, fake_average, expected):
  # Means of what varies: the square is of the mean, not the mean of squares.
  spread = jnp.asarray([[-3.0, 1.0], [2.0, 0.0]])
  value = jax.jit(adversarial_losses.lecam)(
      real + spread, fake - spread, real_average, fake_average
  )
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_lecam_moves_logits_and_not_averages():
  gradients = jax.jit(jax.grad(adversarial_losses.lecam, argnums=(0, 1, 2, 3)))(
      jnp.ones(_SHAPE), -jnp.ones(_SHAPE), 0.5, -0.5
  )
  # d (real - fake_average)^2 = 2 * 1.5 of the mean over 15 logits.
  np.testing.assert_allclose(gradients[0], np.full(_SHAPE, 3 / 15), rtol=1e-6)
  np.testing.assert_allclose(gradients[1], np.full(_SHAPE, -3 / 15), rtol=1e-6)
  np.testing.assert_array_equal(gradients[2:], (0, 0))


@pytest.mark.parametrize('name', ['real_average', 'fake_average'])
def test_averages_are_scalars(name):
  averages = {'real_average': 0.0, 'fake_average': 0.0, name: jnp.zeros(3)}
  with pytest.raises(ValueError, match=rf'{name} has shape \(3,\)'):
    adversarial_losses.lecam(jnp.zeros(_SHAPE), jnp.zeros(_SHAPE), **averages)


def test_averages_move_towards_the_mean():
  update = jax.jit(
      functools.partial(adversarial_losses.update_average, decay=0.75)
  )
  average = update(2.0, jnp.asarray([[1.0, 3.0, 8.0]]))
  np.testing.assert_allclose(average, 0.75 * 2 + 0.25 * 4)
  assert average.dtype == jnp.float32


def _forward(first, last, inputs):
  return np.tanh(inputs @ first) @ last


def test_adaptive_weight_is_the_ratio_of_numerical_gradients():
  rng = np.random.default_rng(0)
  first, last = rng.standard_normal((3, 4)), rng.standard_normal((4, 6))
  inputs, targets = rng.standard_normal((5, 3)), rng.standard_normal((5, 6))
  judge = rng.standard_normal(6)

  def reconstruction(last):
    return ((_forward(first, last, inputs) - targets) ** 2).mean()

  def adversary(last):
    return -np.cos(_forward(first, last, inputs) @ judge).mean()

  def numerical(loss):
    gradient = np.zeros_like(last)
    for index in np.ndindex(last.shape):
      step = np.zeros_like(last)
      step[index] = 1e-5
      gradient[index] = (loss(last + step) - loss(last - step)) / 2e-5
    return gradient

  expected = np.linalg.norm(numerical(reconstruction)) / np.linalg.norm(
      numerical(adversary)
  )
  arrays = [jnp.asarray(x, jnp.float32) for x in (first, inputs, targets)]
  weights = jnp.asarray(judge, jnp.float32)

  def output(last):
    return jnp.tanh(arrays[1] @ arrays[0]) @ last

  @jax.jit
  def weight(last):
    return adversarial_losses.adaptive_weight(
        jax.grad(lambda w: jnp.mean((output(w) - arrays[2]) ** 2))(last),
        jax.grad(lambda w: -jnp.mean(jnp.cos(output(w) @ weights)))(last),
    )

  value = weight(jnp.asarray(last, jnp.float32))
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_adaptive_weight_is_bounded_and_has_no_gradient():
  ones = jnp.ones((2, 2))
  weight = jax.jit(adversarial_losses.adaptive_weight)
  assert weight(ones, jnp.zeros((2, 2))) == 1e4
  assert weight(jnp.zeros((2, 2)), ones) == 0
  # 1e-6 is added to the divisor; the norm of `ones` is 2.
  np.testing.assert_allclose(weight(1e-6 * ones, 5e-7 * ones), 1, rtol=1e-5)
  assert weight(ones, 1e-5 * ones) == 1e4
  gradient = jax.jit(jax.grad(lambda x: weight(x, ones)))(3 * ones)
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('shape', [(), (2,), (1, 2), (2, 2, 1)])
def test_gradients_of_other_kernels_are_refused(shape):
  with pytest.raises(ValueError, match='with respect to the same kernel'):
    adversarial_losses.adaptive_weight(jnp.ones((2, 2)), jnp.ones(shape))


def test_rounded_images_are_those_of_files():
  images = np.random.default_rng(0).uniform(-1.5, 1.5, (2, 50, 50, 3))
  images = jnp.asarray(images, jnp.float32).at[0, 0, 0].set(1e8)
  rounded = jax.jit(adversarial_losses.straight_through_uint8)(images)
  in_file = pixels.to_uint8(images)
  np.testing.assert_array_equal(rounded, pixels.to_float(in_file))
  assert len(np.unique(rounded)) == 256


def test_gradient_of_rounded_images_is_that_of_the_identity():
  images = jnp.asarray([-7.0, -1.0, -0.3, 0.001, 1.0, 1.4])
  weights = jnp.arange(6.0)
  gradient = jax.jit(
      jax.grad(
          lambda x: jnp.sum(
              adversarial_losses.straight_through_uint8(x) * weights
          )
      )
  )(images)
  np.testing.assert_array_equal(gradient, weights)


@pytest.mark.parametrize(
    ('start_step', 'ramp_steps', 'expected'),
    [
        (3, 4, [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]),
        (3, 0, [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
        (0, 0, [1] * 10),
        (0, 2, [0, 0.5] + [1] * 8),
    ],
)
def test_a_ramp_starts_late_and_ends_at_1(start_step, ramp_steps, expected):
  ramp = jax.jit(adversarial_losses.ramp, static_argnums=(1, 2))
  values = [ramp(step, start_step, ramp_steps) for step in range(10)]
  assert values[0].dtype == jnp.float32
  np.testing.assert_allclose(values, expected)


@pytest.mark.parametrize(('start_step', 'ramp_steps'), [(-1, 0), (0, -1)])
def test_ramps_before_the_first_step_are_refused(start_step, ramp_steps):
  with pytest.raises(ValueError, match=f'ramp_steps is {ramp_steps}; allowed'):
    adversarial_losses.ramp(0, start_step, ramp_steps)
