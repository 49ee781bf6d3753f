"""Losses of discriminator and generator, regularizers, and their weights.

Logits are [B, N], N per image, positive for images classified as real. Every
loss is an unweighted float32 scalar, a mean over the global batch.
"""

from collections.abc import Callable

import jax
from jax import numpy as jnp

DiscriminatorLoss = Callable[[jax.Array, jax.Array], jax.Array]
GeneratorLoss = Callable[[jax.Array], jax.Array]

# Of the adaptive weight: added to the norm that it divides by (1e-4 in VQGAN),
# and its upper bound.
_EPSILON = 1e-6
_MAX_WEIGHT = 1e4


def _hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
  return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2


def _cross_entropy(real: jax.Array, fake: jax.Array) -> jax.Array:
  """Binary cross-entropy, the sum over both batches as in MaskGIT, MAGVIT."""
  softplus = jax.nn.softplus
  return jnp.mean(softplus(-real)) + jnp.mean(softplus(fake))


# Of a discriminator 'non_saturating' is 2 x 'vanilla', as in the original code;
# of a generator the two losses differ.
_DISCRIMINATOR_LOSSES: dict[str, DiscriminatorLoss] = {
    'hinge': _hinge,
    'vanilla': lambda real, fake: _cross_entropy(real, fake) / 2,
    'non_saturating': _cross_entropy,
}
_GENERATOR_LOSSES: dict[str, GeneratorLoss] = {
    'hinge': lambda fake: -jnp.mean(fake),
    # log(1 - sigmoid) of the minimax game; its gradient vanishes for images
    # that are confidently classified as fake.
    'vanilla': lambda fake: -jnp.mean(jax.nn.softplus(fake)),
    'non_saturating': lambda fake: jnp.mean(jax.nn.softplus(-fake)),
}


def build_discriminator_loss(name: str) -> DiscriminatorLoss:
  """Returns the loss of a discriminator.

  Args:
    name: 'hinge', 1/2 [E relu(1 - real) + E relu(1 + fake)]; 'non_saturating',
      E softplus(-real) + E softplus(fake); 'vanilla', half of 'non_saturating'.

  Returns:
    A function of the [B, N] logits of real and of fake images.

  Raises:
    ValueError: an unknown name.
  """
  loss = _look_up('discriminator', _DISCRIMINATOR_LOSSES, name)

  def loss_fn(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    return loss(*_check_pair(real_logits, fake_logits))

  return loss_fn


def build_generator_loss(name: str) -> GeneratorLoss:
  """Returns the adversarial loss of a generator.

  Args:
    name: 'hinge', -E fake, called vanilla by github.com/hugoycj/RAE;
      'non_saturating', E softplus(-fake); 'vanilla', -E softplus(fake), the
      original minimax loss (arxiv.org/abs/1406.2661).

  Returns:
    A function of the [B, N] logits of fake images.

  Raises:
    ValueError: an unknown name.
  """
  loss = _look_up('generator', _GENERATOR_LOSSES, name)
  return lambda fake_logits: loss(_check_logits('fake_logits', fake_logits))


def r1_penalty(
    logits_fn: Callable[[jax.Array], jax.Array], images: jax.Array
) -> jax.Array:
  """Returns R1, the mean squared gradient norm with respect to real images.

  E |d sum(logits) / d image|^2 of arxiv.org/abs/1801.04406 without its factor
  1/2, as in MaskGIT and MAGVIT. The logits of an image must not depend on other
  images of the batch.

  Args:
    logits_fn: [B, H, W, C] images to [B, N] logits.
    images: real images.

  Returns:
    float32 scalar.
  """

  def total(images: jax.Array) -> jax.Array:
    return jnp.sum(_check_logits('logits', logits_fn(images)))

  gradient = jax.grad(total)(images.astype(jnp.float32))
  return jnp.sum(jnp.square(gradient)) / len(images)


def lecam(
    real_logits: jax.Array,
    fake_logits: jax.Array,
    real_average: jax.Array,
    fake_average: jax.Array,
) -> jax.Array:
  """Returns LeCam regularization, which keeps logits near their EMA.

  relu(E real - fake_average)^2 + relu(real_average - E fake)^2 of
  arxiv.org/abs/2104.03310 on batch means, as in MAGVIT.

  Args:
    real_logits: [B, N] of real images.
    fake_logits: [B, N] of fake images.
    real_average: scalar EMA of real logits; see `update_average`.
    fake_average: scalar EMA of fake logits.

  Returns:
    float32 scalar; the averages have no gradient.
  """
  real, fake = _check_pair(real_logits, fake_logits)
  averages = []
  for name, average in (
      ('real_average', real_average), ('fake_average', fake_average)
  ):
    if jnp.shape(average):
      raise ValueError(
          f'{name} has shape {jnp.shape(average)}; it must be a scalar.'
      )
    averages.append(jax.lax.stop_gradient(jnp.asarray(average, jnp.float32)))
  relu = jax.nn.relu
  return jnp.square(relu(jnp.mean(real) - averages[1])) + jnp.square(
      relu(averages[0] - jnp.mean(fake))
  )


def update_average(
    average: jax.Array, logits: jax.Array, decay: float
) -> jax.Array:
  """Updates an EMA of LeCam.

  Args:
    average: float32 scalar, 0 at the start.
    logits: [B, N] of this step.
    decay: of the EMA.

  Returns:
    float32 scalar without a gradient.
  """
  mean = jnp.mean(_check_logits('logits', logits))
  return jax.lax.stop_gradient(decay * average + (1 - decay) * mean)


def adaptive_weight(
    reconstruction_gradient: jax.Array, adversarial_gradient: jax.Array
) -> jax.Array:
  """Returns VQGAN's adaptive weight of the adversarial loss.

  clip(|reconstruction_gradient| / (|adversarial_gradient| + 1e-6), 0, 1e4),
  with gradients with respect to the decoder's last kernel
  (arxiv.org/abs/2012.09841).

  Args:
    reconstruction_gradient: of the other losses.
    adversarial_gradient: of the adversarial loss.

  Returns:
    float32 scalar without a gradient.
  """
  shapes = reconstruction_gradient.shape, adversarial_gradient.shape
  if shapes[0] != shapes[1]:
    raise ValueError(
        f'The gradients have shapes {shapes[0]} and {shapes[1]}; both must be'
        ' with respect to the same kernel.'
    )

  def norm(gradient: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(gradient.astype(jnp.float32))))

  weight = norm(reconstruction_gradient) / (
      norm(adversarial_gradient) + _EPSILON
  )
  return jax.lax.stop_gradient(jnp.clip(weight, 0, _MAX_WEIGHT))


def straight_through_uint8(images: jax.Array) -> jax.Array:
  """Rounds images to uint8 levels, with a straight-through gradient.

  Args:
    images: [...] floats, about in [-1, 1].

  Returns:
    float32 of the same shape, clipped and rounded to 256 levels in [-1, 1]. The
    gradient is the identity's, also outside of [-1, 1].
  """
  images = images.astype(jnp.float32)
  levels = jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5)
  # In this order the value is exact for images of any size.
  return jax.lax.stop_gradient(levels / 127.5 - 1) + (
      images - jax.lax.stop_gradient(images)
  )


def ramp(step: jax.Array, start_step: int, ramp_steps: int) -> jax.Array:
  """Returns the factor of a loss with a start step and a linear ramp.

  Args:
    step: integer scalar, possibly traced.
    start_step: the factor is 0 before this step.
    ramp_steps: number of steps in which the factor grows to 1; 0 for none.

  Returns:
    float32 scalar in [0, 1].
  """
  if min(start_step, ramp_steps) < 0:
    raise ValueError(
        f'start_step is {start_step} and ramp_steps is {ramp_steps}; allowed:'
        ' numbers >= 0.'
    )
  steps = jnp.asarray(step) - start_step
  if not ramp_steps:
    return (steps >= 0).astype(jnp.float32)
  return jnp.clip(steps.astype(jnp.float32) / ramp_steps, 0, 1)


def _look_up(side: str, table: dict[str, Callable], name: str) -> Callable:
  if name not in table:
    raise ValueError(
        f'The {side} loss is {name!r}; known: {sorted(table)}.'
    )
  return table[name]


def _check_logits(name: str, logits: jax.Array) -> jax.Array:
  if logits.ndim != 2:
    raise ValueError(
        f'{name} have shape {logits.shape}; allowed: [B, N].'
    )
  return logits.astype(jnp.float32)


def _check_pair(
    real: jax.Array, fake: jax.Array
) -> tuple[jax.Array, jax.Array]:
  if real.shape != fake.shape:
    raise ValueError(
        f'real_logits have shape {real.shape} and fake_logits {fake.shape};'
        ' both must have the same shape.'
    )
  return _check_logits('real_logits', real), _check_logits('fake_logits', fake)
