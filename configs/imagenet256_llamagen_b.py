"""LlamaGen-B: ImageNet, 256 x 256, 256 tokens of 16,384 codes in raster order.

What: the transformer of arXiv 2406.06525 (12 blocks, 768 channels, 111 million
  parameters: RMSNorm, SwiGLU, 2-D RoPE, a class prefix, no biases) on the
  tokens of configs/vqrae_fsq_siglip_l_stage2.py, as many codes as its VQ has,
  with its optimizer: 300 epochs of batches of 256 at a constant learning rate.
  --config.model.embedding=auto --config.model.head=auto replace table and flat
  softmax by exact level heads: 91.7 million parameters.
Command: python launch.py --config=configs/imagenet256_llamagen_b.py, after
  python launch.py --config=configs/vqrae_fsq_siglip_l_stage2.py
  tokens.tokenizer is the workdir of that run.
Hardware and time: for 8 accelerators; not trained here.
Numbers: not measured. LlamaGen reports FID 5.46 on its own tokens.

Differences from LlamaGen: the class prefix is rotated by the identity, not
zeroed; training images have the views of tokens.train_views, ten there. Its
script of FID samples has guidance 1.5 by default, its training no EMA. Weight
decay applies to kernels here, there to all arrays of two or more dimensions.
"""

import ml_collections

from configs import default_generator


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = default_generator.get_config()
  config.tokens.tokenizer = 'runs/vqrae_fsq_siglip_l_stage2'
  config.tokens.train_views = 10
  config.tokens.batch_size = 256
  config.tokens.eval_batch_size = 256

  config.model.kind = 'autoregressive'
  config.model.preset = 'B'
  config.model.qk_norm = False
  config.model.positions = 'rope'
  config.model.embedding = 'table'
  config.model.head = 'flat'
  config.model.dtype = 'bfloat16'

  config.optim.learning_rate = 1e-4
  config.optim.end_learning_rate = 1e-4
  config.optim.warmup_steps = 0
  config.optim.b1 = 0.9
  config.optim.b2 = 0.95
  config.optim.weight_decay = 0.05
  config.optim.ema_decay = 0.9999

  # FSDP: parameters, optimizer state and EMA are sharded over all devices.
  config.partitioning.mesh.update({'data': 1, 'fsdp': -1})

  config.train.num_steps = 300 * (1_281_167 // config.tokens.batch_size)
  config.train.log_every_steps = 100
  config.train.eval_every_steps = 50_000
  config.train.checkpoint_every_steps = 5000

  config.eval.num_images = 10_000
  config.eval.num_samples = 10_000

  config.sample.guidance.scale = 1.5
  return config
