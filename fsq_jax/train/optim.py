"""Optimizers of the model and the discriminator, and their schedule."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

import jax
from jax import numpy as jnp
import optax
import optax.contrib

from fsq_jax.runtime import parameter_paths


def warmup_cosine(
    peak: float, end: float, warmup_steps: int, num_steps: int
) -> optax.Schedule:
  """Returns linear warm-up followed by a half cosine.

  Args:
    peak: learning rate after warm-up.
    end: learning rate at num_steps and after.
    warmup_steps: step s < warmup_steps has peak * (s + 1) / warmup_steps.
    num_steps: step at which the cosine ends, > warmup_steps.

  Returns:
    A function of the step (int scalar) to a float32 scalar.
  """

  def schedule(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    warm = peak * (step + 1) / max(warmup_steps, 1)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    return jnp.where(step < warmup_steps, warm, end + (peak - end) * cosine)

  return schedule


def build_schedule(config: Mapping[str, Any], num_steps: int) -> optax.Schedule:
  """Builds the learning-rate schedule of the `optim` section of a config."""
  return warmup_cosine(
      config['learning_rate'],
      config['end_learning_rate'],
      config['warmup_steps'],
      num_steps,
  )


def build_optimizer(
    config: Mapping[str, Any], num_steps: int
) -> optax.GradientTransformation:
  """Builds the optimizer of the trainable parameters.

  Weight decay applies to kernels, not to biases, norms and position embeddings.

  Args:
    config: the `optim` section; see configs/default.py.
    num_steps: steps of the whole run, the length of the schedule.

  Returns:
    A transformation whose updates are added to the parameters.

  Raises:
    ValueError: an unknown name.
  """
  if config['name'] not in _OPTIMIZERS:
    raise ValueError(
        f'optim.name is {config["name"]!r}; known: {sorted(_OPTIMIZERS)}.'
    )
  optimizer = _OPTIMIZERS[config['name']](
      config, build_schedule(config, num_steps)
  )
  factors = tuple(config['learning_rate_factors'])
  return _chain(_clip(config), optimizer, _scale_by_path(factors))


def build_discriminator_optimizer(
    config: Mapping[str, Any],
) -> optax.GradientTransformation:
  """Builds the discriminator's AdamW, whose schedule ends with the run.

  Args:
    config: the whole config; discriminator and train.num_steps are read.

  Returns:
    A transformation whose updates are added to the parameters.
  """
  options = config['discriminator']
  num_updates = config['train']['num_steps'] - options['start_step']
  schedule = build_schedule(options['optim'], num_updates)
  return _chain(_clip(options['optim']), _adamw(options['optim'], schedule))


def _chain(
    *transforms: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Returns optax.chain, independent of JAX's flags for dtypes.

  Optax raises float scalars to integer powers, which strict dtype promotion
  forbids, and makes float64 constants under JAX_ENABLE_X64.
  """
  chain = optax.chain(*transforms)

  def init(params: Any) -> optax.OptState:
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x,
        chain.init(params),
    )

  def update(updates: Any, state: optax.OptState, params: Any = None) -> Any:
    with jax.numpy_dtype_promotion('standard'):
      return chain.update(updates, state, params)

  return optax.GradientTransformation(init, update)


def _clip(config: Mapping[str, Any]) -> optax.GradientTransformation:
  # The same state with and without, so that a resumed run may change it.
  if config['clip_norm']:
    return optax.clip_by_global_norm(config['clip_norm'])
  return optax.identity()


def _scale_by_path(
    factors: Sequence[tuple[str, float]],
) -> optax.GradientTransformation:
  """Multiplies updates, and so learning rates, by a factor for their path."""

  def init(params: Any) -> optax.OptState:
    paths = jax.tree.leaves(parameter_paths.tree_paths(params))
    parameter_paths.check_patterns(
        'learning_rate_factors', [p for p, _ in factors], paths
    )
    return optax.EmptyState()

  def update(updates: Any, state: optax.OptState, params: Any = None) -> Any:
    del params  # Updates have the same paths.

    def scale(path: str, value: jax.Array) -> jax.Array:
      matching = (x for p, x in factors if re.fullmatch(p, path))
      return value * next(matching, 1.0)

    paths = parameter_paths.tree_paths(updates)
    return jax.tree.map(scale, paths, updates), state

  return optax.GradientTransformation(init, update)


def _adamw(
    config: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
  def is_kernel(params: Any) -> Any:
    paths = parameter_paths.tree_paths(params)
    return jax.tree.map(lambda path: path.endswith('kernel'), paths)

  return optax.adamw(
      schedule,
      b1=config['b1'],
      b2=config['b2'],
      eps=config['eps'],
      weight_decay=config['weight_decay'],
      mask=is_kernel,
  )


def _muon(
    config: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Muon for the kernels of transformer blocks, AdamW for everything else."""
  muon = optax.contrib.muon(
      schedule,
      eps=config['eps'],
      weight_decay=config['weight_decay'],
      # The blocks' kernels are stacked: [depth, in, out].
      muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(
          reduction_axis=1, output_axis=2
      ),
      # Updates as large as AdamW's, so that both share a learning rate.
      consistent_rms=0.2,
  )

  def label(params: Any) -> Any:
    return jax.tree.map(
        lambda path: 'muon' if re.search('blocks/.*kernel$', path) else 'adamw',
        parameter_paths.tree_paths(params),
    )

  # The AdamW inside optax.contrib.muon has Nesterov momentum, and weight decay
  # on every parameter.
  return optax.multi_transform(
      {'muon': muon, 'adamw': _adamw(config, schedule)}, label
  )


_OPTIMIZERS = {'adamw': _adamw, 'muon': _muon}
