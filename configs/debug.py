"""A complete run in seconds, for tests and first tries.

What: synthetic 16 x 16 images, a model of width 16 and one block, 8 steps with
  an evaluation and a checkpoint after 4.
Command: python launch.py --config=configs/debug.py
Hardware: any CPU; needs no data and no network.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = default.get_config()
  config.data.image_size = (16, 16)
  config.data.batch_size = 8
  config.data.eval_batch_size = 8
  config.data.num_threads = 1
  config.data.prefetch = 8

  config.model.encoder.width = 16
  config.model.encoder.depth = 1
  config.model.encoder.mlp_dim = 32
  config.model.decoder.depth = 1

  config.optim.warmup_steps = 2

  config.train.num_steps = 8
  config.train.log_every_steps = 2
  config.train.eval_every_steps = 4
  config.train.checkpoint_every_steps = 4
  config.train.compilation_cache = ''

  config.eval.num_grid_images = 8
  return config
