"""Masked generator on the tokens of configs/cifar10_fsq_888.py (second stage).

What: class-conditional masked token modelling (MaskGIT) of 64 tokens of 512
  codes, 10 classes, with exact level heads, 23 million parameters; each
  training image has two views with random flips.
Command: python launch.py --config=configs/cifar10_maskgit.py, after
  python launch.py --config=configs/cifar10_fsq_888.py
  For two CPU cores add --config.model.preset=tiny
  --config.optim.learning_rate=2e-3 --config.train.num_steps=5000.
Hardware and time: for one GPU; neither size was run.
Numbers: experiments/generation has smaller models on ten tokenizers.
"""

import ml_collections

from configs import default_generator


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = default_generator.get_config()
  config.tokens.tokenizer = 'runs/cifar10_fsq_888'
  config.tokens.train_views = 2
  config.tokens.batch_size = 256
  config.tokens.eval_batch_size = 256

  config.model.preset = 'S'
  config.model.dtype = 'bfloat16'

  config.losses.label_smoothing = 0.1

  config.optim.learning_rate = 4e-4
  config.optim.warmup_steps = 1000

  config.train.num_steps = 50_000
  config.train.log_every_steps = 100
  config.train.eval_every_steps = 5000
  config.train.checkpoint_every_steps = 1000

  config.eval.num_images = 5000
  config.eval.num_samples = 5000
  return config
