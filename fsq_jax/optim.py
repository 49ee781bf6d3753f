"""Optimizer over the whole parameter tree, its schedule, frozen parameters."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

import jax
from jax import numpy as jnp
import optax
import optax.contrib

from fsq_jax import partitioning


def warmup_cosine(
    peak: float, end: float, warmup_steps: int, num_steps: int
) -> optax.Schedule:
  """Learning rate of linear warm-up followed by a half cosine.

  Args:
    peak: value that warm-up reaches.
    end: value at num_steps and after.
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
  """Builds the optimizer of the `optim` section of a config.

  Frozen parameters get no update and have no optimizer state. Weight decay
  applies to kernels, not to biases, norms and position embeddings.

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
  if config['clip_norm']:
    clip = optax.clip_by_global_norm(config['clip_norm'])
    optimizer = optax.chain(clip, optimizer)
  patterns = tuple(config['frozen'])

  def label(params: Any) -> Any:
    frozen = frozen_mask(params, patterns)
    return jax.tree.map(lambda x: 'frozen' if x else 'trained', frozen)

  return optax.multi_transform(
      {'trained': optimizer, 'frozen': optax.set_to_zero()}, label
  )


def frozen_mask(params: Any, patterns: Sequence[str]) -> Any:
  """Marks the parameters whose path matches one of the patterns.

  Args:
    params: the parameter tree.
    patterns: regular expressions that match the whole of a path such as
      'encoder/patches/kernel'.

  Returns:
    A tree of bools, True where the parameter does not train.

  Raises:
    ValueError: a pattern that matches no parameter.
  """
  paths = partitioning.tree_paths(params)
  for pattern in patterns:
    if not any(re.fullmatch(pattern, p) for p in jax.tree.leaves(paths)):
      raise ValueError(
          f'optim.frozen has {pattern!r}, which matches no parameter; paths'
          f' look like {jax.tree.leaves(paths)[0]!r}.'
      )
  return jax.tree.map(
      lambda path: any(re.fullmatch(p, path) for p in patterns), paths
  )


def _adamw(
    config: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
  def is_kernel(params: Any) -> Any:
    paths = partitioning.tree_paths(params)
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
  """Muon for the kernels of transformer blocks, AdamW for all the rest."""
  muon = optax.contrib.muon(
      schedule,
      eps=config['eps'],
      weight_decay=config['weight_decay'],
      # The blocks' kernels are stacked: [depth, in, out].
      muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(
          reduction_axis=1, output_axis=2
      ),
      # Updates as large as AdamW's, so that one learning rate fits both.
      consistent_rms=0.2,
  )

  def label(params: Any) -> Any:
    return jax.tree.map(
        lambda path: 'muon' if re.search('blocks/.*kernel$', path) else 'adamw',
        partitioning.tree_paths(params),
    )

  # The AdamW that optax.contrib.muon itself brings is another one: with
  # Nesterov momentum, and weight decay on every parameter.
  return optax.multi_transform(
      {'muon': muon, 'adamw': _adamw(config, schedule)}, label
  )


_OPTIMIZERS = {'adamw': _adamw, 'muon': _muon}
