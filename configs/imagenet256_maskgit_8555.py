"""MaskGIT of the FSQ paper: ImageNet, 256 x 256, 256 tokens of 1000 codes.

What: the second stage of section 5.2 of arXiv 2309.15505 on the tokens of
  configs/imagenet256_fsq_1024.py: MaskGIT's transformer (24 blocks, 768
  channels, 173 million parameters), output tied to the embedding table, label
  smoothing, at least 45 % of the tokens masked (appendix A.4.2), 2,500,000
  steps of 256 images; samples by 12 steps in the order of confidence.
  --config.model.embedding=auto --config.model.head=auto replace table and flat
  softmax by exact level heads, 3.4 million parameters more.
Command: python launch.py --config=configs/imagenet256_maskgit_8555.py, after
  python launch.py --config=configs/imagenet256_fsq_1024.py
  tokens.tokenizer is the workdir of that run.
Hardware and time: by its compiled step it takes 10.6 GiB and at least 78 ms on
  each of 16 TPU v5e chips (experiments/accelerators); not trained here.
Numbers: not measured. The paper reports FID 4.53, precision 0.864 and recall
  0.453 with guidance alpha = 0.2, which is the scale 1.2 here.

Differences from MaskGIT: blocks are pre-norm, and the image tokens predict the
image tokens alone, not the class and the mask. The 16 attention heads are those
of MaskGIT's released config; its paper has 8. It publishes no EMA.
"""

import ml_collections

from configs import default_generator


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = default_generator.get_config()
  config.tokens.tokenizer = 'runs/imagenet256_fsq_1024'
  config.tokens.batch_size = 256
  config.tokens.eval_batch_size = 256

  config.model.preset = 'B'
  config.model.depth = 24
  config.model.num_heads = 16
  config.model.mlp = 'gelu'
  config.model.norm = 'layer'
  config.model.use_bias = True
  config.model.qk_norm = False
  config.model.embedding = 'table'
  config.model.head = 'flat_tied'
  config.model.dtype = 'bfloat16'

  config.losses.label_smoothing = 0.1
  config.losses.mask_floor = 0.45

  config.optim.learning_rate = 1e-4
  config.optim.end_learning_rate = 1e-4
  config.optim.warmup_steps = 5000
  config.optim.b1 = 0.9
  config.optim.b2 = 0.96
  config.optim.weight_decay = 0.045
  config.optim.ema_decay = 0.9999

  # FSDP: parameters, optimizer state and EMA are sharded over all devices.
  config.partitioning.mesh.update({'data': 1, 'fsdp': -1})

  config.train.num_steps = 2_500_000
  config.train.log_every_steps = 100
  config.train.eval_every_steps = 50_000
  config.train.checkpoint_every_steps = 5000

  config.eval.num_images = 10_000
  config.eval.num_samples = 10_000

  config.sample.num_steps = 12
  config.sample.order = 'confidence'
  config.sample.choice_temperature = 4.5
  config.sample.guidance.scale = 1.2
  return config
