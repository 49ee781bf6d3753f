"""Losses of a discriminator and against it, and how they are weighted.

Logits are [B, N], N of them an image, above 0 for what looks real. Every loss
is a float32 scalar, unweighted, and a mean over the global batch.
"""

from collections.abc import Callable

import jax
from jax import numpy as jnp

DiscriminatorLoss = Callable[[jax.Array, jax.Array], jax.Array]
GeneratorLoss = Callable[[jax.Array], jax.Array]


def _hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
  return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2


def _cross_entropy(real: jax.Array, fake: jax.Array) -> jax.Array:
  """Of 'is it real', the sum over both batches: MaskGIT's and MAGVIT's."""
  softplus = jax.nn.softplus
  return jnp.mean(softplus(-real)) + jnp.mean(softplus(fake))


# 'vanilla' and 'non_saturating' differ by a factor of 2 for a discriminator,
# as in the codebases that they come from, and in kind for a generator.
_DISCRIMINATOR_LOSSES: dict[str, DiscriminatorLoss] = {
    'hinge': _hinge,
    'vanilla': lambda real, fake: _cross_entropy(real, fake) / 2,
    'non_saturating': _cross_entropy,
}
_GENERATOR_LOSSES: dict[str, GeneratorLoss] = {
    'hinge': lambda fake: -jnp.mean(fake),
    # log(1 - sigmoid), of the minimax game; its gradient fades where the
    # discriminator is sure that images are fake.
    'vanilla': lambda fake: -jnp.mean(jax.nn.softplus(fake)),
    'non_saturating': lambda fake: jnp.mean(jax.nn.softplus(-fake)),
}


def build_discriminator_loss(name: str) -> DiscriminatorLoss:
  """Returns the loss that a discriminator minimizes.

  Args:
    name: 'hinge', 1/2 [E relu(1 - real) + E relu(1 + fake)]; 'non_saturating',
      E softplus(-real) + E softplus(fake); 'vanilla', half of that.

  Returns:
    A function of the logits of real and of fake images, [B, N] both.

  Raises:
    ValueError: an unknown name.
  """
  loss = _look_up('discriminator', _DISCRIMINATOR_LOSSES, name)

  def loss_fn(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    return loss(*_check_pair(real_logits, fake_logits))

  return loss_fn


def build_generator_loss(name: str) -> GeneratorLoss:
  """Returns the loss against a discriminator that a generator minimizes.

  Args:
    name: 'hinge', -E fake, which github.com/hugoycj/RAE calls vanilla;
      'non_saturating', E softplus(-fake); 'vanilla', -E softplus(fake), the
      original minimax loss (arxiv.org/abs/1406.2661).

  Returns:
    A function of the logits of fake images, [B, N].

  Raises:
    ValueError: an unknown name.
  """
  loss = _look_up('generator', _GENERATOR_LOSSES, name)
  return lambda fake_logits: loss(_check_logits('fake_logits', fake_logits))


def r1_penalty(
    logits_fn: Callable[[jax.Array], jax.Array], images: jax.Array
) -> jax.Array:
  """Mean squared norm of a discriminator's gradient by real images.

  E |d sum(logits) / d image|^2, R1 of arxiv.org/abs/1801.04406 without its
  1/2, as in MaskGIT and MAGVIT. Logits of an image must not depend on the
  others of the batch.

  Args:
    logits_fn: [B, H, W, 3] images to [B, N] logits.
    images: real ones.

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
  """Keeps mean logits from running away from what they were on average.

  relu(E real - fake_average)^2 + relu(real_average - E fake)^2, LeCam of
  arxiv.org/abs/2104.03310 on batch means, as in MAGVIT.

  Args:
    real_logits: [B, N] of real images.
    fake_logits: [B, N] of fake images.
    real_average: scalar, of earlier real logits; see `update_average`.
    fake_average: scalar, of earlier fake ones.

  Returns:
    float32 scalar; the averages get no gradient.
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
  """Moves one of LeCam's averages, a scalar, towards the mean of [B, N] logits.

  Args:
    average: float32 scalar, 0 at the start.
    logits: of this step.
    decay: share of the average that stays.

  Returns:
    float32 scalar without a gradient.
  """
  mean = jnp.mean(_check_logits('logits', logits))
  return jax.lax.stop_gradient(decay * average + (1 - decay) * mean)


def adaptive_weight(
    reconstruction_gradient: jax.Array,
    adversarial_gradient: jax.Array,
    epsilon: float = 1e-6,
    highest: float = 1e4,
) -> jax.Array:
  """Weight that makes two losses pull equally hard at a decoder's last layer.

  clip(|reconstruction_gradient| / (|adversarial_gradient| + epsilon), 0,
  highest), of VQGAN (arxiv.org/abs/2012.09841).

  Args:
    reconstruction_gradient: of the other losses by the kernel of that layer.
    adversarial_gradient: of the generator loss by the same kernel.
    epsilon: VQGAN has 1e-4.
    highest: weight at most.

  Returns:
    float32 scalar without a gradient.
  """
  shapes = reconstruction_gradient.shape, adversarial_gradient.shape
  if shapes[0] != shapes[1]:
    raise ValueError(
        f'The gradients have the shapes {shapes[0]} and {shapes[1]}; both must'
        ' be by the same kernel.'
    )

  def norm(gradient: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(gradient.astype(jnp.float32))))

  weight = norm(reconstruction_gradient) / (
      norm(adversarial_gradient) + epsilon
  )
  return jax.lax.stop_gradient(jnp.clip(weight, 0, highest))


def straight_through_uint8(images: jax.Array) -> jax.Array:
  """Clips and rounds to what a viewer gets; the gradient goes straight through.

  Args:
    images: [...] floats, about in [-1, 1].

  Returns:
    float32 of the same shape, one of 256 levels in [-1, 1]. The gradient is
    that of the identity, outside of [-1, 1] too.
  """
  images = images.astype(jnp.float32)
  levels = jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5)
  # In this order the value is exact for images of any size.
  return jax.lax.stop_gradient(levels / 127.5 - 1) + (
      images - jax.lax.stop_gradient(images)
  )


def ramp(step: jax.Array, start_step: int, ramp_steps: int) -> jax.Array:
  """Factor of a loss that starts late.

  Args:
    step: integer scalar, which may be traced.
    start_step: the factor is 0 before it.
    ramp_steps: over so many the factor grows to 1, in a line; with 0 it is 1
      from start_step on.

  Returns:
    float32 scalar in [0, 1].
  """
  if min(start_step, ramp_steps) < 0:
    raise ValueError(
        f'start_step is {start_step} and ramp_steps {ramp_steps}; neither may'
        ' be below 0.'
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
        f'{name} have shape {logits.shape}; a discriminator gives [B, N].'
    )
  return logits.astype(jnp.float32)


def _check_pair(
    real: jax.Array, fake: jax.Array
) -> tuple[jax.Array, jax.Array]:
  if real.shape != fake.shape:
    raise ValueError(
        f'real_logits have shape {real.shape} and fake_logits {fake.shape}; a'
        ' step has as many real as fake images.'
    )
  return _check_logits('real_logits', real), _check_logits('fake_logits', fake)
