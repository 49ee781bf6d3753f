"""The discriminator's side of training: its state, gradients and update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import struct
import jax
from jax import numpy as jnp
import optax

from fsq_jax.adversarial import builder
from fsq_jax.adversarial import diffaug
from fsq_jax.adversarial import losses as adversarial_losses
from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import partitioning


class AdversaryState(struct.PyTreeNode):
  """What the discriminator carries from one step to the next.

  Attributes:
    params: parameters that train, float32.
    model_state: the module's other collections: vectors of spectral norms.
    opt_state: state of its optimizer.
    average_logits: 'real' and 'fake', float32 scalars, for LeCam.
  """

  params: Any
  model_state: Any
  opt_state: optax.OptState
  average_logits: Mapping[str, jax.Array]


class Verdict(NamedTuple):
  """What the discriminator says of one batch.

  Attributes:
    at_images: [B, H, W, 3] gradient of the decoder's loss at its images,
      without its weight; zeros before losses.adversarial.start_step.
    gradients: of the discriminator's loss at its parameters.
    state: with model_state and average_logits after the batch.
    scalars: float32; adversarial_loss is the decoder's.
  """

  at_images: jax.Array
  gradients: Any
  state: AdversaryState
  scalars: dict[str, jax.Array]


class Adversary:
  """A discriminator, its losses and its optimizer, as a config names them."""

  def __init__(
      self, config: Mapping[str, Any], optimizer: optax.GradientTransformation
  ):
    """Builds the parts.

    Args:
      config: the whole config; discriminator, losses and data.image_size are
        read.
      optimizer: of the discriminator.
    """
    self._options = options = config['discriminator']
    self._generator = config['losses']['adversarial']
    self._module = builder.build_discriminator(options)
    self._image_size = tuple(config['data']['image_size'])
    self._discriminator_loss = adversarial_losses.build_discriminator_loss(
        options['loss']
    )
    self._generator_loss = adversarial_losses.build_generator_loss(
        self._generator['loss']
    )
    self._optimizer = optimizer

  def init(self, key: jax.Array) -> AdversaryState:
    """Returns the state before the first step."""
    images = jnp.zeros((1, *self._image_size, 3), jnp.float32)
    variables = dict(self._module.init(key, images))
    params, _ = parameter_paths.split_frozen(
        variables.pop('params'), self._module.frozen_parameters
    )
    return AdversaryState(
        params=params,
        model_state=variables,
        opt_state=self._optimizer.init(params),
        average_logits={
            name: jnp.zeros((), jnp.float32) for name in ('real', 'fake')
        },
    )

  def judge(
      self,
      state: AdversaryState,
      backbone: Any,
      images: jax.Array,
      reconstructions: jax.Array,
      *,
      key: jax.Array,
      step: jax.Array,
  ) -> Verdict:
    """Computes both sides' gradients from one forward pass.

    Args:
      state: the discriminator's.
      backbone: its frozen parameters, {} where it has none.
      images: [B, H, W, 3] in [-1, 1].
      reconstructions: the same shape.
      key: of the augmentations.
      step: int32 scalar, training steps taken.

    Returns:
      The verdict; all zeros before discriminator.start_step.
    """
    def judge(state):
      whole = state.replace(params=partitioning.gather(state.params))
      with partitioning.no_mesh():
        verdict = self._judge(
            whole, backbone, images, reconstructions, key, step
        )
      # What is kept of the parameters remains spread.
      return verdict._replace(state=verdict.state.replace(params=state.params))

    start = self._options['start_step']
    if not start:
      return judge(state)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(judge, state)
    )
    return jax.lax.cond(
        step >= start, judge, lambda state: zeros._replace(state=state), state
    )

  def weigh(
      self,
      step: jax.Array,
      others_at_images: jax.Array,
      at_images: jax.Array,
      *,
      to_layer: Callable[[jax.Array], jax.Array],
  ) -> jax.Array:
    """Weighs the decoder's loss against the other losses on images.

    Args:
      step: int32 scalar, training steps taken.
      others_at_images: [B, H, W, 3] gradient of the other losses.
      at_images: of this one, from `judge`.
      to_layer: from such a gradient to that at the decoder's last kernel.

    Returns:
      float32 scalar, 0 before losses.adversarial.start_step.
    """
    options = self._generator
    weight = options['weight'] * adversarial_losses.ramp(
        step, options['start_step'], options['ramp_steps']
    )
    if options['weighting'] == 'adaptive':
      weight *= adversarial_losses.adaptive_weight(
          to_layer(others_at_images), to_layer(at_images)
      )
    return weight

  def update(
      self, state: AdversaryState, gradients: Any, step: jax.Array
  ) -> AdversaryState:
    """Takes the optimizer's step, or none before discriminator.start_step."""
    updates, opt_state = self._optimizer.update(
        gradients, state.opt_state, state.params
    )
    updated = state.replace(
        params=optax.apply_updates(state.params, updates), opt_state=opt_state
    )
    active = step >= self._options['start_step']
    return jax.tree.map(lambda x, y: jnp.where(active, x, y), updated, state)

  def _judge(
      self, state, backbone, images, reconstructions, key, step
  ) -> Verdict:
    options = self._options
    real_key, fake_key = jax.random.split(key)
    real = self._augment(real_key, images)

    def apply(params, model_state, x):
      variables = {'params': parameter_paths.merge_frozen(params, backbone)}
      return self._module.apply({**variables, **model_state}, x)

    def both_losses(params, reconstructions):
      if options['uint8_fakes']:
        reconstructions = adversarial_losses.straight_through_uint8(
            reconstructions
        )
      fake = self._augment(fake_key, reconstructions)
      real_logits, model_state = self._module.apply(
          {
              'params': parameter_paths.merge_frozen(params, backbone),
              **state.model_state,
          },
          real,
          train=True,
          mutable=list(state.model_state),
      )
      fake_logits = apply(params, model_state, fake)
      discriminator_loss = self._discriminator_loss(real_logits, fake_logits)
      scalars = {
          'real_logits': jnp.mean(real_logits),
          'fake_logits': jnp.mean(fake_logits),
      }
      if options['lecam_weight']:
        scalars['lecam_loss'] = adversarial_losses.lecam(
            real_logits,
            fake_logits,
            state.average_logits['real'],
            state.average_logits['fake'],
        )
        discriminator_loss += options['lecam_weight'] * scalars['lecam_loss']
      generator_loss = self._generator_loss(fake_logits)
      scalars |= {
          'adversarial_loss': generator_loss,
          'discriminator_loss': discriminator_loss,
      }
      logits = {'real': real_logits, 'fake': fake_logits}
      more = scalars, logits, model_state
      return (generator_loss, discriminator_loss), more

    _, pull_back, (scalars, logits, model_state) = jax.vjp(
        both_losses, state.params, reconstructions, has_aux=True
    )
    one, zero = jnp.float32(1), jnp.float32(0)
    gradients, _ = pull_back((zero, one))

    def pull_back_to_images():
      return pull_back((one, zero))[1]

    start = self._generator['start_step']
    if start <= options['start_step']:
      at_images = pull_back_to_images()
    else:
      # The discriminator learns alone for a while.
      at_images = jax.lax.cond(
          step >= start,
          pull_back_to_images,
          lambda: jnp.zeros_like(reconstructions),
      )
    if options['r1_weight']:
      penalty, more = self._penalize(apply, state, model_state, real, step)
      gradients = jax.tree.map(jnp.add, gradients, more)
      scalars['r1_penalty'] = penalty
    averages = {
        name: adversarial_losses.update_average(
            average, logits[name], options['lecam_decay']
        )
        for name, average in state.average_logits.items()
    }
    state = state.replace(model_state=model_state, average_logits=averages)
    return Verdict(at_images, gradients, state, scalars)

  def _penalize(self, apply, state, model_state, real, step):
    """R1 and its gradient in one step of every few, else 0."""
    every = self._options['r1_every_steps']

    def penalty(params):
      return adversarial_losses.r1_penalty(
          lambda x: apply(params, model_state, x), real
      )

    def compute(params):
      value, gradients = jax.value_and_grad(penalty)(params)
      scale = self._options['r1_weight'] * every
      return value, jax.tree.map(lambda x: scale * x, gradients)

    if every == 1:
      return compute(state.params)

    def skip(params):
      return jnp.float32(0), jax.tree.map(jnp.zeros_like, params)

    # A step is logged by the number of steps taken: those that have it are
    # multiples of `every`.
    due = (step + 1) % every == 0
    return jax.lax.cond(due, compute, skip, state.params)

  def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
    probability = self._options['augment_probability']
    if not probability:
      return images
    return diffaug.augment(
        key,
        images,
        probability=probability,
        cutout=self._options['augment_cutout'],
    )


def build_adversary(
    config: Mapping[str, Any], optimizer: optax.GradientTransformation
) -> Adversary | None:
  """Builds the discriminator's side; None if discriminator.name is 'none'."""
  if config['discriminator']['name'] == 'none':
    return None
  return Adversary(config, optimizer)
