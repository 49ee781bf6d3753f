"""Benchmarks the data pipeline, evaluation and start-up."""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from experiments.benchmarks import blocks
from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.evaluation import image_metrics
from fsq_jax.models import pixels
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = 'configs/fsq_888.py'

# Runs launch.py until its first step is done, then exits.
_FIRST_STEP = """
import os, runpy, sys, time
import jax
from fsq_jax.train import loop
class TakeOne(loop.Hook):
  def after_step(self, step, state, scalars, batch):
    jax.block_until_ready(state)
    times = os.times()
    print('first step', time.time(), times.user + times.system, flush=True)
    os._exit(0)
run = loop.run
loop.run = lambda *args, hooks, **kwargs: run(
    *args, hooks=[TakeOne(), *hooks], **kwargs
)
sys.argv = ['launch.py', *sys.argv[1:]]
runpy.run_path('launch.py', run_name='__main__')
"""


def input_figures(rounds: int) -> dict[str, Any]:
  """Times steps with the data pipeline relative to a cached batch."""
  config = configuration.load_config(ROOT / CONFIG)
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  state = builder.create()
  step = jax.jit(
      train_step.build_train_step(model, optimizer, config), donate_argnums=0
  )
  iterator = data.build_dataset(
      config.data, split='train', seed=config.seed
  ).iterator()
  fixed = partitioning.shard_batch(next(iterator)['image'], mesh)

  def block(read: bool) -> blocks.Block:
    def run(calls: int) -> tuple[float, float]:
      nonlocal state
      started = time.perf_counter(), time.process_time()
      for _ in range(calls):
        images = fixed
        if read:
          images = partitioning.shard_batch(next(iterator)['image'], mesh)
        state, _ = step(state, images)
      jax.block_until_ready(state)
      ended = time.perf_counter(), time.process_time()
      return ended[0] - started[0], ended[1] - started[1]

    return run

  return blocks.alternate(
      {'real_input': block(True), 'fixed_batch': block(False)},
      baseline='fixed_batch', calls=20, rounds=rounds,
  )


def evaluation_figures(rounds: int) -> dict[str, Any]:
  """Times the evaluation of a split relative to jitted forward passes."""
  config = configuration.load_config(ROOT / CONFIG)
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  variables = builder.create().eval_variables
  dataset = data.build_dataset(config.data, split='eval', seed=config.seed)
  evaluator = evaluators.Evaluator(
      model, dataset, mesh, num_grid_images=config.eval.num_grid_images
  )
  images = partitioning.shard_batch(next(iter(dataset))['image'], mesh)
  forward = jax.jit(
      lambda variables, images: model.apply(
          variables, pixels.to_float(images)
      )
  )
  scored = jax.jit(evaluators.build_eval_step(model))

  reconstructions = forward(variables, images).reconstructions
  metric_values = jax.jit(image_metrics.image_metrics)

  def over_batches(function) -> blocks.Block:
    def run() -> None:
      for _ in range(dataset.num_batches):
        output = function(variables, images)
      jax.block_until_ready(output)

    return blocks.block_of(run)

  figures = blocks.alternate(
      {
          'evaluation': blocks.block_of(lambda: evaluator.run(variables)),
          'forward_and_metrics': over_batches(scored),
          'forward': over_batches(forward),
          'metrics': over_batches(
              lambda _, images: metric_values(images, reconstructions)
          ),
          'read': blocks.block_of(lambda: list(dataset)),
      },
      baseline='forward_and_metrics', calls=1, rounds=rounds,
  )
  return figures | {'num_images': dataset.num_examples}


def start_figures(rounds: int) -> dict[str, Any]:
  """Times process start to first step with a warm compilation cache."""
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  walls, processors = [], []
  with tempfile.TemporaryDirectory() as folder:
    for i in range(rounds + 1):
      started = time.time()
      output = subprocess.run(
          [
              sys.executable, '-c', _FIRST_STEP, f'--config={CONFIG}',
              f'--workdir={folder}/run_{i}',
              f'--config.train.compilation_cache={folder}/cache',
          ],
          cwd=ROOT, env=environment, check=True, capture_output=True, text=True,
      ).stdout
      ended, processor = map(float, output.split('first step')[1].split())
      walls.append(ended - started)
      processors.append(processor)
  # The first run compiles.
  return {
      'seconds': statistics.median(walls[1:]),
      'cpu_seconds': statistics.median(processors[1:]),
      'cold_seconds': walls[0],
      'cold_cpu_seconds': processors[0],
  }


