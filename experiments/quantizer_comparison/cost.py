"""Measures step time and memory of quantizers in a training step."""

from collections.abc import Mapping
import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import sweep
from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.runtime import host
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step

STEPS_PER_BLOCK = 10
BLOCKS = 15


class _Training(NamedTuple):
  """A compiled training step, its state, and their memory."""

  step: Any
  state: Any
  quantizer_bytes: int
  temporary_bytes: int


def measure(
    config_path: str, variants: Mapping[str, sweep.Overrides], baseline: str
) -> dict[str, dict[str, float]]:
  """Times training steps on one batch, alternating between variants.

  Args:
    config_path: config, relative to the repository.
    variants: dotted config overrides of each variant, by name.
    baseline: the variant that step times are relative to.

  Returns:
    For each variant: step_ms, the median over all blocks; step_ratio, the
    median over rounds of its step time relative to the baseline in the same
    round; quantizer_bytes, parameters and codebook state; temporary_bytes, the
    temporary memory of the compiled step.
  """
  host.keep_freed_memory()
  trainings = {
      name: _prepare(sweep.make_config(config_path, overrides))
      for name, overrides in variants.items()
  }
  states = {name: training.state for name, training in trainings.items()}
  images = jax.device_put(_images(config_path))

  def time_block(name: str) -> float:
    state, step = states[name], trainings[name].step
    started = time.perf_counter()
    for _ in range(STEPS_PER_BLOCK):
      state, _ = step(state, images)
    jax.block_until_ready(state)
    states[name] = state
    return (time.perf_counter() - started) / STEPS_PER_BLOCK * 1e3

  for name in trainings:
    time_block(name)  # Warm-up.
  rounds = [
      {name: time_block(name) for name in trainings} for _ in range(BLOCKS)
  ]
  return {
      name: {
          'step_ms': statistics.median(times[name] for times in rounds),
          'step_ratio': statistics.median(
              times[name] / times[baseline] for times in rounds
          ),
          'quantizer_bytes': training.quantizer_bytes,
          'temporary_bytes': training.temporary_bytes,
      }
      for name, training in trainings.items()
  }


def _prepare(config: configuration.Config) -> _Training:
  configuration.check_config(config, num_devices=jax.device_count())
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  images = jax.ShapeDtypeStruct(
      (config.data.batch_size, *config.data.image_size, 3), np.uint8
  )
  step = jax.jit(
      train_step.build_train_step(model, optimizer, config), donate_argnums=0
  )
  compiled = step.lower(builder.abstract, images).compile()
  state = builder.create()
  own = [
      collection.get('quantizer', {})
      for collection in (state.params, *state.model_state.values())
  ]
  return _Training(
      compiled,
      state,
      quantizer_bytes=sum(x.nbytes for x in jax.tree.leaves(own)),
      temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
  )


def _images(config_path: str) -> np.ndarray:
  """Returns a batch of noise; step time does not depend on the images."""
  config = sweep.make_config(config_path, {})
  shape = (config.data.batch_size, *config.data.image_size, 3)
  return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
