"""Times training steps on real input against steps on one fixed batch.

Blocks of both kinds alternate in one process; medians of the blocks are
compared, so that a drift of the machine's speed falls on both.

  python experiments/input_speed/benchmark.py --config=configs/fsq_888.py
"""

import argparse
import json
import pathlib
import statistics
import time

import jax

from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax import optim
from fsq_jax import partitioning
from fsq_jax import runtime
from fsq_jax import train_state
from fsq_jax import train_step

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main() -> None:
  """Prints the figures and writes them beside this script if asked to."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', default='configs/fsq_888.py')
  parser.add_argument('--blocks', type=int, default=12)
  parser.add_argument('--steps', type=int, default=20, help='steps a block')
  parser.add_argument('--write', action='store_true', help='results.json')
  arguments = parser.parse_args()
  config = configuration.load_config(ROOT / arguments.config)
  configuration.check_config(config, num_devices=jax.device_count())

  runtime.keep_freed_memory()
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  state = train_state.StateBuilder(config, model, optimizer, mesh).create()
  step = jax.jit(
      train_step.build_train_step(model, optimizer, config), donate_argnums=0
  )
  iterator = data.build_dataset(
      config.data, split='train', seed=config.seed
  ).iterator()
  fixed = partitioning.shard_batch(next(iterator)['image'], mesh)

  def time_block(read_input: bool) -> float:
    nonlocal state
    started = time.perf_counter()
    for _ in range(arguments.steps):
      images = fixed
      if read_input:
        images = partitioning.shard_batch(next(iterator)['image'], mesh)
      state, _ = step(state, images)
    jax.block_until_ready(state)
    return (time.perf_counter() - started) / arguments.steps * 1e3

  time_block(True)  # compiles
  real, constant = [], []
  for _ in range(arguments.blocks):
    real.append(time_block(True))
    constant.append(time_block(False))
  figures = {
      'config': arguments.config,
      'real_input_ms': round(statistics.median(real), 2),
      'fixed_batch_ms': round(statistics.median(constant), 2),
      'ratio': round(
          statistics.median(
              r / c for r, c in zip(real, constant, strict=True)
          ),
          4,
      ),
      'device': jax.devices()[0].device_kind,
      'jax': jax.__version__,
  }
  print(json.dumps(figures))  # noqa: T201
  if arguments.write:
    path = pathlib.Path(__file__).with_name('results.json')
    path.write_text(json.dumps(figures, indent=2) + '\n')


if __name__ == '__main__':
  main()
