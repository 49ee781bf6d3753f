"""Discriminator training: state, losses, gradients, update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn
from flax import struct
import jax
from jax import numpy as jnp
import optax

from fsq_jax.adversarial import diffaug
from fsq_jax.adversarial import losses as adversarial_losses
from fsq_jax.models import fused_attention
from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import partitioning


class AdversaryState(struct.PyTreeNode):
  """State of the discriminator.

  Attributes:
    params: trainable parameters, float32.
    model_state: the module's other collections: vectors of spectral norms.
    opt_state: state of its optimizer.
    average_logits: 'real' and 'fake', float32 scalars: EMAs for LeCam.
  """

  params: Any
  model_state: Any
  opt_state: optax.OptState
  average_logits: Mapping[str, jax.Array]


class DiscriminatorOutput(NamedTuple):
  """Losses and gradients of one batch.

  Attributes:
    at_images: [B, H, W, C] gradient of the adversarial loss with respect to
      the reconstructions, without the loss's weight; zeros before
      losses.adversarial.start_step.
    gradients: of the discriminator's loss with respect to its parameters.
    state: with model_state and average_logits after the batch.
    scalars: float32; adversarial_loss is the autoencoder's.
  """

  at_images: jax.Array
  gradients: Any
  state: AdversaryState
  scalars: dict[str, jax.Array]


class Adversary:
  """Trains the discriminator of a config."""

  def __init__(
      self,
      config: Mapping[str, Any],
      module: nn.Module,
      optimizer: optax.GradientTransformation,
  ):
    """Builds the losses.

    Args:
      config: the whole config; discriminator, losses, data.image_size and
        data.channels are read.
      module: the discriminator.
      optimizer: of its parameters.
    """
    self._options = options = config['discriminator']
    self._generator = config['losses']['adversarial']
    self._module = module
    data = config['data']
    self._image_shape = *data['image_size'], data['channels']
    self._discriminator_loss = adversarial_losses.build_discriminator_loss(
        options['loss']
    )
    self._generator_loss = adversarial_losses.build_generator_loss(
        self._generator['loss']
    )
    self._optimizer = optimizer

  def init(self, key: jax.Array) -> AdversaryState:
    """Returns the state before the first step."""
    images = jnp.zeros((1, *self._image_shape), jnp.float32)
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

  def losses_and_gradients(
      self,
      state: AdversaryState,
      backbone: Any,
      images: jax.Array,
      reconstructions: jax.Array,
      *,
      key: jax.Array,
      step: jax.Array,
  ) -> DiscriminatorOutput:
    """Computes both sides' losses and gradients from one forward pass.

    Args:
      state: of the discriminator.
      backbone: its frozen parameters; {} without any.
      images: [B, H, W, C] in [-1, 1].
      reconstructions: the same shape.
      key: of the augmentations.
      step: int32 scalar, training steps taken.

    Returns:
      The losses and gradients; all zeros before discriminator.start_step.
    """

    def compute(state):
      gathered = state.replace(params=partitioning.gather(state.params))
      with partitioning.no_mesh():
        output = self._losses_and_gradients(
            gathered, backbone, images, reconstructions, key, step
        )
      # The parameters of the state remain sharded.
      return output._replace(state=output.state.replace(params=state.params))

    start = self._options['start_step']
    if not start:
      return compute(state)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, state)
    )
    return jax.lax.cond(
        step >= start, compute, lambda state: zeros._replace(state=state), state
    )

  def adversarial_weight(
      self,
      step: jax.Array,
      others_at_images: jax.Array,
      at_images: jax.Array,
      *,
      to_layer: Callable[[jax.Array], jax.Array],
  ) -> jax.Array:
    """Returns the weight of the adversarial loss: fixed, or VQGAN's adaptive.

    Args:
      step: int32 scalar, training steps taken.
      others_at_images: [B, H, W, C] gradient of the other losses with respect
        to the reconstructions.
      at_images: the same of the adversarial loss.
      to_layer: maps such a gradient to the gradient with respect to the kernel
        of the decoder's last layer.

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
    """Updates the parameters, from discriminator.start_step on."""
    updates, opt_state = self._optimizer.update(
        gradients, state.opt_state, state.params
    )
    updated = state.replace(
        params=optax.apply_updates(state.params, updates), opt_state=opt_state
    )
    active = step >= self._options['start_step']
    return jax.tree.map(lambda x, y: jnp.where(active, x, y), updated, state)

  def _losses_and_gradients(
      self, state, backbone, images, reconstructions, key, step
  ) -> DiscriminatorOutput:
    options = self._options
    real_key, fake_key = jax.random.split(key)
    real = self._augment(real_key, images)

    def apply(params, model_state, x, **kwargs):
      variables = {'params': parameter_paths.merge_frozen(params, backbone)}
      return self._module.apply({**variables, **model_state}, x, **kwargs)

    def both_losses(params, reconstructions):
      if options['uint8_fakes']:
        reconstructions = adversarial_losses.straight_through_uint8(
            reconstructions
        )
      fake = self._augment(fake_key, reconstructions)
      real_logits, model_state = apply(
          params, state.model_state, real,
          train=True, mutable=list(state.model_state),
      )
      logits = {'real': real_logits, 'fake': apply(params, model_state, fake)}
      losses, scalars = self._losses(logits, state.average_logits)
      return losses, (scalars, logits, model_state)

    _, back_propagate, (scalars, logits, model_state) = jax.vjp(
        both_losses, state.params, reconstructions, has_aux=True
    )
    one, zero = jnp.float32(1), jnp.float32(0)
    gradients, _ = back_propagate((zero, one))

    def to_images():
      return back_propagate((one, zero))[1]

    start = self._generator['start_step']
    if start <= options['start_step']:
      at_images = to_images()
    else:
      # The discriminator trains alone at first.
      at_images = jax.lax.cond(
          step >= start, to_images, lambda: jnp.zeros_like(reconstructions)
      )
    if options['r1_weight']:
      penalty, more = self._r1(
          lambda params, x: apply(params, model_state, x),
          state.params, real, step,
      )
      gradients = jax.tree.map(jnp.add, gradients, more)
      scalars['r1_penalty'] = penalty
    averages = {
        name: adversarial_losses.update_average(
            average, logits[name], options['lecam_decay']
        )
        for name, average in state.average_logits.items()
    }
    state = state.replace(model_state=model_state, average_logits=averages)
    return DiscriminatorOutput(at_images, gradients, state, scalars)

  def _losses(self, logits, averages):
    """Returns (adversarial loss, discriminator loss) and scalars."""
    discriminator_loss = self._discriminator_loss(
        logits['real'], logits['fake']
    )
    scalars = {
        'real_logits': jnp.mean(logits['real']),
        'fake_logits': jnp.mean(logits['fake']),
    }
    if weight := self._options['lecam_weight']:
      scalars['lecam_loss'] = adversarial_losses.lecam(
          logits['real'], logits['fake'], averages['real'], averages['fake']
      )
      discriminator_loss += weight * scalars['lecam_loss']
    adversarial_loss = self._generator_loss(logits['fake'])
    scalars |= {
        'adversarial_loss': adversarial_loss,
        'discriminator_loss': discriminator_loss,
    }
    return (adversarial_loss, discriminator_loss), scalars

  def _r1(self, apply, params, real, step):
    """Returns the lazy R1 penalty and its weighted gradient.

    Every r1_every_steps steps, scaled by r1_every_steps; else zeros.
    """
    every = self._options['r1_every_steps']

    def penalty(params):
      # Differentiated twice.
      with fused_attention.unfused():
        return adversarial_losses.r1_penalty(lambda x: apply(params, x), real)

    def compute(params):
      value, gradients = jax.value_and_grad(penalty)(params)
      scale = self._options['r1_weight'] * every
      return value, jax.tree.map(lambda x: scale * x, gradients)

    if every == 1:
      return compute(params)

    def skip(params):
      return jnp.float32(0), jax.tree.map(jnp.zeros_like, params)

    # Steps are logged by the number of steps taken, here step + 1.
    return jax.lax.cond((step + 1) % every == 0, compute, skip, params)

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
