"""One training step of the autoencoder and its discriminator."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import optax

from fsq_jax.adversarial import adversary as adversaries
from fsq_jax.adversarial import builder as adversary_builder
from fsq_jax.models import pixels
from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import partitioning
from fsq_jax.train import losses
from fsq_jax.train import optim
from fsq_jax.train import state as train_state

# Path of the last layer's kernel, the same in every decoder.
_LAST_KERNEL = ('decoder', 'pixels', 'kernel')


class _Gradients(NamedTuple):
  """Gradients with respect to the trainable parameters of both networks."""

  model: Any
  discriminator: Any  # None without a discriminator.


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
  """Takes training steps; `take_step` is a pure function.

  The autoencoder has one forward and one backward pass, whatever the losses:
  each loss on images gives its gradient with respect to the reconstructions,
  and their sum is back-propagated through the model.

  Attributes:
    model: the autoencoder.
    image_loss: the losses on images that need no discriminator.
    quantizer_weight: of the quantizer's loss.
    distillation_weight: of the distillation loss; 0 for none.
    adversary: discriminator training; None without a discriminator.
    update: of the model's parameters.
    seed: random numbers depend on seed and step only.
    accumulation_steps: parts of a batch, whose gradients are averaged.
  """

  model: nn.Module
  image_loss: losses.ImageLoss
  quantizer_weight: float
  distillation_weight: float
  adversary: adversaries.Adversary | None
  update: train_state.Update
  seed: int
  accumulation_steps: int

  def take_step(
      self,
      state: train_state.TrainState,
      images: jax.Array,
      networks: Mapping[str, Any] | None = None,
  ) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
    """Takes one step.

    Args:
      state: before the step.
      images: [B, H, W, C] uint8.
      networks: variables of the frozen networks (`Networks.variables`), if the
        config uses any.

    Returns:
      The next state and float32 scalars. Losses are means over the global
      batch. If a loss or a gradient is not finite, the step is skipped: only
      the counters of the state change.
    """
    single = self.accumulation_steps == 1
    differentiate = self._differentiate if single else self._accumulate
    networks = partitioning.gather(networks or {})
    key = jax.random.fold_in(jax.random.key(self.seed), state.step)
    return self._update(state, *differentiate(state, images, key, networks))

  def _accumulate(self, state, images, key, networks):
    """Does what `_differentiate` does, one part of the batch at a time."""
    num_parts = self.accumulation_steps
    # Strided, so that every device splits its own images.
    parts = rearrange(images, '(b k) ... -> k b ...', k=num_parts)
    discriminator = None
    if self.adversary is not None:
      discriminator = state.adversary.params

    def add(carry, part):
      total, changed = carry
      gradients, scalars, changed = self._differentiate(
          state.replace(**changed), *part, networks
      )
      return (jax.tree.map(jnp.add, total, gradients), changed), scalars

    zeros = jax.tree.map(
        jnp.zeros_like, _Gradients(state.params, discriminator)
    )
    changed = {'model_state': state.model_state, 'adversary': state.adversary}
    (total, changed), scalars = jax.lax.scan(
        add, (zeros, changed), (parts, jax.random.split(key, num_parts))
    )
    gradients = jax.tree.map(lambda x: x / num_parts, total)
    return gradients, jax.tree.map(jnp.mean, scalars), changed

  def _differentiate(self, state, images, key, networks):
    """Computes losses and gradients of one batch.

    Args:
      state: before the step.
      images: [B, H, W, C] uint8.
      key: of this batch.
      networks: variables of the frozen networks.

    Returns:
      `_Gradients`, scalars, and the fields of the state that the forward pass
      changes.
    """
    images = pixels.to_float(images)
    (reconstructions, loss), back_propagate, (scalars, model_state) = jax.vjp(
        lambda params: self._forward(params, state, images, key),
        state.params,
        has_aux=True,
    )
    images, reconstructions = map(
        partitioning.shard_over_all_axes, (images, reconstructions)
    )
    with partitioning.no_mesh():
      (image_loss, image_scalars), at_images = jax.value_and_grad(
          self.image_loss, has_aux=True
      )(reconstructions, images, networks.get('perceptual'))
    scalars |= image_scalars
    loss += image_loss
    if partitioning.is_on_gpu(reconstructions):
      # Else XLA keeps the activations of the perceptual loss while it trains
      # the discriminator.
      reconstructions, at_images = jax.lax.optimization_barrier(
          (reconstructions, at_images)
      )
    changed = {'model_state': model_state, 'adversary': state.adversary}
    discriminator_gradients = None
    if self.adversary is not None:
      output = self.adversary.losses_and_gradients(
          state.adversary,
          networks.get('discriminator', {}),
          images,
          reconstructions,
          key=jax.random.fold_in(key, 1),
          step=state.step,
      )
      weight = self.adversary.adversarial_weight(
          state.step,
          at_images,
          output.at_images,
          # XLA then back-propagates through the last layer only.
          to_layer=lambda x: _last_layer(*back_propagate((x, jnp.float32(0)))),
      )
      at_images += weight * output.at_images
      loss += weight * output.scalars['adversarial_loss']
      scalars |= output.scalars | {'adversarial_weight': weight}
      changed['adversary'] = output.state
      discriminator_gradients = output.gradients
    (gradients,) = back_propagate((at_images, jnp.ones_like(loss)))
    gradients = _Gradients(gradients, discriminator_gradients)
    return gradients, scalars | {'loss': loss}, changed

  def _forward(self, params, state, images, key):
    """Applies the model; returns (reconstructions, loss on latents), aux."""
    output, model_state = self.model.apply(
        {
            'params': parameter_paths.merge_frozen(params, state.frozen_params),
            **state.model_state,
        },
        images,
        train=True,
        mutable=list(state.model_state),
        rngs={'quantizer': key},
    )
    scalars = {
        'quantizer_loss': output.quantizer_loss,
        # 0, not the NaN of an empty mean, if latents have no tokens.
        'invalid_tokens': (
            jnp.sum(output.indices < 0, dtype=jnp.float32)
            / max(output.indices.size, 1)
        ),
    }
    loss = self.quantizer_weight * output.quantizer_loss
    if self.distillation_weight:
      params = parameter_paths.merge_frozen(
          state.teacher_params, state.frozen_params
      )
      teacher = self.model.encoder.apply({'params': params['encoder']}, images)
      scalars['distillation_loss'] = losses.l2(output.latents, teacher)
      loss += self.distillation_weight * scalars['distillation_loss']
    return (output.reconstructions, loss), (scalars, model_state)

  def _update(self, state, gradients, scalars, changed):
    """Returns the next state, unchanged if anything is not finite."""
    checked = ['loss', 'gradient_norm']
    if self.adversary is not None:
      changed['adversary'] = self.adversary.update(
          changed['adversary'], gradients.discriminator, state.step
      )
      norm = optax.tree.norm(gradients.discriminator)
      scalars['discriminator_gradient_norm'] = norm
      checked += ['discriminator_loss', 'discriminator_gradient_norm']
    return self.update.apply(
        state, gradients.model, scalars, checked=checked, changed=changed
    )


def build_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Mapping[str, Any],
    perceptual: nn.Module | None = None,
) -> Callable[..., tuple[train_state.TrainState, dict[str, jax.Array]]]:
  """Builds the training step of a config.

  Args:
    model: the autoencoder.
    optimizer: from `optim.build_optimizer` of the same config.
    config: the whole config; seed, losses, discriminator, optim and train are
      read.
    perceptual: the network of losses.perceptual; None without one.

  Returns:
    `TrainStep.take_step`.

  Raises:
    ValueError: perceptual does not match losses.perceptual.
  """
  options = config['losses']
  return TrainStep(
      model=model,
      image_loss=losses.build_image_loss(options, perceptual),
      quantizer_weight=options['quantizer_weight'],
      distillation_weight=options['distillation_weight'],
      adversary=adversary_builder.build_adversary(
          config, optim.build_discriminator_optimizer(config)
      ),
      update=train_state.build_update(
          optimizer, config['optim'], config['train']['num_steps']
      ),
      seed=config['seed'],
      accumulation_steps=config['optim']['accumulation_steps'],
  ).take_step


def _last_layer(gradients: Any) -> jax.Array:
  """Returns the gradient of the last kernel of the decoder."""
  value = gradients
  for name in _LAST_KERNEL:
    value = value.get(name, {})
  if not isinstance(value, jax.Array):
    raise ValueError(
        f'optim.frozen freezes {"/".join(_LAST_KERNEL)!r}, whose gradient'
        " losses.adversarial.weighting 'adaptive' needs; use 'fixed'."
    )
  return value
