"""Pure functions of one training step and of one evaluation batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import optax

from fsq_jax.adversarial import adversary as adversaries
from fsq_jax.models import pixels
from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import partitioning
from fsq_jax.train import losses
from fsq_jax.train import optim
from fsq_jax.train import state as train_state

# The name of every decoder's last layer.
_LAST_KERNEL = ('decoder', 'pixels', 'kernel')
TrainStep = Callable[
    ..., tuple[train_state.TrainState, dict[str, jax.Array]]
]


class _Gradients(NamedTuple):
  """Gradients of the model's and of the discriminator's parameters."""

  model: Any
  adversary: Any


def build_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Mapping[str, Any],
    perceptual: nn.Module | None = None,
) -> TrainStep:
  """Builds the function of one training step.

  The autoencoder runs forward and backward once, whatever the losses are: each
  loss on images gives its gradient at the reconstructions, and their sum is
  pulled back through the model.

  Args:
    model: the autoencoder.
    optimizer: from `optim.build_optimizer` of the same config.
    config: the whole config; seed, losses, discriminator, optim and train are
      read.
    perceptual: the network of losses.perceptual, of images and others to their
      distances [B].

  Returns:
    A pure function of the state, [B, H, W, 3] uint8 images and the variables of
    frozen networks (`Networks.variables`; those of a config without them may be
    left out) to the next state and float32 scalars. Losses are
    means over the global batch; what is drawn depends on seed and step alone.
    Where a loss or a gradient is not finite, everything but the counters stays
    as it was.

  Raises:
    ValueError: the config asks for a network that is not given, or for an
      adaptive weight by a last layer that does not train.
  """
  options = config['losses']
  if (options['perceptual']['name'] == 'none') != (perceptual is None):
    raise ValueError(
        f"losses.perceptual.name is {options['perceptual']['name']!r}; give the"
        ' network of that name as perceptual, and none for none.'
    )
  num_parts = config['optim']['accumulation_steps']
  ema_decay = config['optim']['ema_decay']
  seed = config['seed']
  schedule = optim.build_schedule(
      config['optim'], config['train']['num_steps']
  )
  adversary = adversaries.build_adversary(
      config, optim.build_discriminator_optimizer(config)
  )
  gradient_fn = _build_gradient(model, options, adversary, perceptual)

  def accumulate(state, images, networks, key):
    # Every device splits its own share, so that no image changes devices.
    parts = rearrange(images, '(b k) ... -> k b ...', k=num_parts)

    def add(carry, part):
      total, model_state, adversary_state = carry
      gradients, scalars, model_state, adversary_state = gradient_fn(
          state.replace(model_state=model_state, adversary=adversary_state),
          part[0], networks, part[1],
      )
      total = jax.tree.map(jnp.add, total, gradients)
      return (total, model_state, adversary_state), scalars

    zeros = _Gradients(
        jax.tree.map(jnp.zeros_like, state.params),
        jax.tree.map(jnp.zeros_like, getattr(state.adversary, 'params', {})),
    )
    (total, *states), scalars = jax.lax.scan(
        add, (zeros, state.model_state, state.adversary),
        (parts, jax.random.split(key, num_parts)),
    )
    gradients = jax.tree.map(lambda x: x / num_parts, total)
    return gradients, jax.tree.map(jnp.mean, scalars), *states

  def step_fn(state, images, networks=None):
    return take_step(state, images, partitioning.gather(networks or {}))

  def take_step(state, images, networks):
    compute = gradient_fn if num_parts == 1 else accumulate
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradients, scalars, model_state, adversary_state = compute(
        state, images, networks, key
    )
    updates, opt_state = optimizer.update(
        gradients.model, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    scalars |= {
        'gradient_norm': optax.tree.norm(gradients.model),
        'learning_rate': schedule(_num_updates(state)),
    }
    judged = ['loss', 'gradient_norm']
    if adversary is not None:
      adversary_state = adversary.update(
          adversary_state, gradients.adversary, state.step
      )
      norm = optax.tree.norm(gradients.adversary)
      scalars['discriminator_gradient_norm'] = norm
      judged += ['discriminator_loss', 'discriminator_gradient_norm']
    good = jnp.all(jnp.isfinite(jnp.stack([scalars[x] for x in judged])))
    candidate = state.replace(
        params=params,
        model_state=model_state,
        ema_params=_average(state, params, ema_decay),
        opt_state=opt_state,
        adversary=adversary_state,
    )
    state = jax.tree.map(lambda x, y: jnp.where(good, x, y), candidate, state)
    state = state.replace(
        step=state.step + 1,
        bad_steps=jnp.where(good, 0, state.bad_steps + 1),
        skipped_steps=state.skipped_steps + (~good).astype(jnp.int32),
    )
    scalars |= {
        'bad_steps': state.bad_steps,
        'skipped_steps': state.skipped_steps,
    }
    return state, scalars

  return step_fn


def _build_gradient(
    model: nn.Module,
    options: Mapping[str, Any],
    adversary: adversaries.Adversary | None,
    perceptual: nn.Module | None,
) -> Callable[..., tuple[Any, ...]]:
  """Builds the gradients of all losses of one batch.

  Args:
    model: the autoencoder.
    options: the `losses` section.
    adversary: None without a discriminator.
    perceptual: None without a perceptual loss.

  Returns:
    A function of state, uint8 images, variables of networks and key to
    `_Gradients`, scalars, model_state and the adversary's state.
  """
  compare = jax.value_and_grad(
      _build_comparison(options, perceptual), has_aux=True
  )

  def gradient_fn(state, images, networks, key):
    images = pixels.to_float(images)

    def forward(params):
      output, model_state = model.apply(
          {
              'params': parameter_paths.merge_frozen(
                  params, state.frozen_params
              ),
              **state.model_state,
          },
          images,
          train=True,
          mutable=list(state.model_state),
          rngs={'quantizer': key},
      )
      scalars = {
          'quantizer_loss': output.quantizer_loss,
          # 0, not the NaN of an empty mean, where latents have no tokens.
          'invalid_tokens': (
              jnp.sum(output.indices < 0, dtype=jnp.float32)
              / max(output.indices.size, 1)
          ),
      }
      loss = options['quantizer_weight'] * output.quantizer_loss
      if options['distillation_weight']:
        scalars['distillation_loss'] = losses.l2(
            output.latents, _teach(model, state, images)
        )
        loss += options['distillation_weight'] * scalars['distillation_loss']
      return (output.reconstructions, loss), (scalars, model_state)

    (reconstructions, loss), pull_back, (scalars, model_state) = jax.vjp(
        forward, state.params, has_aux=True
    )
    images, reconstructions = map(
        partitioning.spread, (images, reconstructions)
    )
    with partitioning.no_mesh():
      (image_loss, image_scalars), at_images = compare(
          reconstructions, images, networks
      )
    scalars |= image_scalars
    loss += image_loss
    adversary_state, adversary_gradients = state.adversary, {}
    if adversary is not None:
      verdict = adversary.judge(
          state.adversary,
          networks.get('discriminator', {}),
          images,
          reconstructions,
          key=jax.random.fold_in(key, 1),
          step=state.step,
      )
      weight = adversary.weigh(
          state.step,
          at_images,
          verdict.at_images,
          # Nothing but the last layer is pulled back through then.
          to_layer=lambda x: _last_layer(pull_back((x, jnp.float32(0)))[0]),
      )
      at_images += weight * verdict.at_images
      loss += weight * verdict.scalars['adversarial_loss']
      scalars |= verdict.scalars | {'adversarial_weight': weight}
      adversary_state = verdict.state
      adversary_gradients = verdict.gradients
    scalars['loss'] = loss
    (gradients,) = pull_back((at_images, jnp.ones_like(loss)))
    gradients = _Gradients(gradients, adversary_gradients)
    return gradients, scalars, model_state, adversary_state

  return gradient_fn


def _build_comparison(
    options: Mapping[str, Any], perceptual: nn.Module | None
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Builds the losses on images that need no discriminator."""
  reconstruction_loss = losses.build_reconstruction_loss(
      options['reconstruction']
  )

  def compare(reconstructions, images, networks):
    value = reconstruction_loss(reconstructions, images)
    scalars = {'reconstruction_loss': value}
    loss = options['reconstruction_weight'] * value
    if perceptual is not None:
      distances = perceptual.apply(
          networks['perceptual'], reconstructions, images
      )
      scalars['perceptual_loss'] = jnp.mean(distances)
      loss += options['perceptual']['weight'] * scalars['perceptual_loss']
    return loss, scalars

  return compare


def _last_layer(gradients: Any) -> jax.Array:
  """Returns the gradient of the kernel that makes the decoder's pixels."""
  value = gradients
  for name in _LAST_KERNEL:
    value = value.get(name, {})
  if not isinstance(value, jax.Array):
    raise ValueError(
        f'optim.frozen keeps {"/".join(_LAST_KERNEL)!r} from training, by whose'
        " gradient losses.adversarial.weighting 'adaptive' goes; use 'fixed'."
    )
  return value


def _teach(
    model: nn.Module, state: train_state.TrainState, images: jax.Array
) -> jax.Array:
  """Returns the latents of the encoder as it was at the start."""
  params = parameter_paths.merge_frozen(
      state.teacher_params, state.frozen_params
  )
  params = params['encoder']
  return model.encoder.apply({'params': params}, images)


def _num_updates(state: train_state.TrainState) -> jax.Array:
  """Updates made so far, which is what the optimizer has counted too."""
  return state.step - state.skipped_steps


def _average(state, params, decay: float) -> Any:
  """Moves the average towards the parameters."""
  count = _num_updates(state).astype(jnp.float32)
  decay = jnp.minimum(decay, (1 + count) / (10 + count))
  return optax.incremental_update(params, state.ema_params, 1 - decay)
