"""Pure functions of one training step and of one evaluation batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp
import optax

from fsq_jax import losses
from fsq_jax import metrics
from fsq_jax import optim
from fsq_jax import train_state

TrainStep = Callable[
    [train_state.TrainState, jax.Array],
    tuple[train_state.TrainState, dict[str, jax.Array]],
]


class EvalOutput(NamedTuple):
  """What one evaluation batch gives.

  Attributes:
    metrics: name to [B] float32, one value an image.
    indices: [B, h, w, *index_shape] int32.
    reconstructions: [B, H, W, 3] uint8.
  """

  metrics: dict[str, jax.Array]
  indices: jax.Array
  reconstructions: jax.Array


class _Fixed(NamedTuple):
  """Parameters that the loss depends on and that do not train."""

  frozen: Any
  teacher: Any


def to_float(images: jax.Array) -> jax.Array:
  """Converts uint8 images to float32 in [-1, 1]."""
  if images.dtype != jnp.uint8:
    raise ValueError(f'Batches hold uint8 images, not {images.dtype}.')
  return images.astype(jnp.float32) / 127.5 - 1


def build_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Mapping[str, Any],
) -> TrainStep:
  """Builds the function of one training step.

  Args:
    model: the autoencoder.
    optimizer: from `optim.build_optimizer` of the same config.
    config: the whole config; seed, losses, optim and train are read.

  Returns:
    A pure function of the state and [B, H, W, 3] uint8 images to the next
    state and float32 scalars. Losses are means over the global batch; what
    the quantizer draws depends on seed and step alone. Where the loss or the
    gradient is not finite, everything but the counters stays as it was.
  """
  reconstruction_loss = losses.build_reconstruction_loss(
      config['losses']['reconstruction']
  )
  reconstruction_weight = config['losses']['reconstruction_weight']
  quantizer_weight = config['losses']['quantizer_weight']
  distillation_weight = config['losses']['distillation_weight']
  num_parts = config['optim']['accumulation_steps']
  ema_decay = config['optim']['ema_decay']
  seed = config['seed']
  schedule = optim.build_schedule(
      config['optim'], config['train']['num_steps']
  )

  def loss_fn(params, fixed, model_state, images, key):
    images = to_float(images)
    output, model_state = model.apply(
        {'params': optim.merge_frozen(params, fixed.frozen), **model_state},
        images,
        train=True,
        mutable=list(model_state),
        rngs={'quantizer': key},
    )
    reconstruction = reconstruction_loss(output.reconstructions, images)
    loss = (
        reconstruction_weight * reconstruction
        + quantizer_weight * output.quantizer_loss
    )
    scalars = {
        'loss': loss,
        'reconstruction_loss': reconstruction,
        'quantizer_loss': output.quantizer_loss,
        # 0, not the NaN of an empty mean, where latents have no tokens.
        'invalid_tokens': (
            jnp.sum(output.indices < 0, dtype=jnp.float32)
            / max(output.indices.size, 1)
        ),
    }
    if distillation_weight:
      distillation = losses.l2(output.latents, _teach(model, fixed, images))
      scalars['distillation_loss'] = distillation
      loss = scalars['loss'] = loss + distillation_weight * distillation
    return loss, (scalars, model_state)

  gradient_fn = jax.grad(loss_fn, has_aux=True)

  def accumulate(params, fixed, model_state, images, key):
    # Every device splits its own share, so that no image changes devices.
    parts = rearrange(images, '(b k) ... -> k b ...', k=num_parts)

    def add(carry, part):
      total, model_state = carry
      gradients, (scalars, model_state) = gradient_fn(
          params, fixed, model_state, *part
      )
      total = jax.tree.map(jnp.add, total, gradients)
      return (total, model_state), scalars

    zeros = jax.tree.map(jnp.zeros_like, params)
    (total, model_state), scalars = jax.lax.scan(
        add, (zeros, model_state), (parts, jax.random.split(key, num_parts))
    )
    gradients = jax.tree.map(lambda x: x / num_parts, total)
    return gradients, (jax.tree.map(jnp.mean, scalars), model_state)

  def step_fn(state, images):
    compute = gradient_fn if num_parts == 1 else accumulate
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradients, (scalars, model_state) = compute(
        state.params,
        _Fixed(state.frozen_params, state.teacher_params),
        state.model_state,
        images,
        key,
    )
    updates, opt_state = optimizer.update(
        gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    scalars |= {
        'gradient_norm': optax.tree.norm(gradients),
        'learning_rate': schedule(_num_updates(state)),
    }
    good = jnp.isfinite(scalars['loss']) & jnp.isfinite(
        scalars['gradient_norm']
    )
    candidate = state.replace(
        params=params,
        model_state=model_state,
        ema_params=_average(state, params, ema_decay),
        opt_state=opt_state,
    )
    state = jax.tree.map(lambda x, y: jnp.where(good, x, y), candidate, state)
    state = state.replace(
        step=state.step + 1,
        bad_steps=jnp.where(good, 0, state.bad_steps + 1),
        skipped_steps=state.skipped_steps + ~good,
    )
    scalars |= {
        'bad_steps': state.bad_steps,
        'skipped_steps': state.skipped_steps,
    }
    return state, scalars

  return step_fn


def _teach(model, fixed: _Fixed, images: jax.Array) -> jax.Array:
  """Returns the latents of the encoder as it was at the start."""
  params = optim.merge_frozen(fixed.teacher, fixed.frozen)['encoder']
  return model.encoder.apply({'params': params}, images)


def _num_updates(state: train_state.TrainState) -> jax.Array:
  """Updates made so far, which is what the optimizer has counted too."""
  return state.step - state.skipped_steps


def _average(state, params, decay: float) -> Any:
  """Moves the average towards the parameters."""
  count = _num_updates(state).astype(jnp.float32)
  decay = jnp.minimum(decay, (1 + count) / (10 + count))
  return optax.incremental_update(params, state.ema_params, 1 - decay)


def build_eval_step(
    model: nn.Module,
) -> Callable[[Any, jax.Array], EvalOutput]:
  """Builds the function that reconstructs and scores one batch.

  Args:
    model: the autoencoder.

  Returns:
    A pure function of the model's variables and [B, H, W, 3] uint8 images. The
    metrics compare the images with reconstructions rounded to uint8.
  """

  def step_fn(variables, images):
    output = model.apply(variables, to_float(images))
    return EvalOutput(
        metrics=metrics.image_metrics(images, output.reconstructions),
        indices=output.indices,
        reconstructions=metrics.to_uint8(output.reconstructions),
    )

  return step_fn
