"""VQRAE's second stage: the encoder trains too, distilled from SigLIP-L.

What: initialized from a run of vqrae_fsq_siglip_l; the encoder trains too, with
  a tenth of the learning rate, and its latents are regularized towards its
  initial latents. Losses, optimizer and schedule as in VQRAE (arXiv
  2511.23386).
Command: python launch.py --config=configs/vqrae_fsq_siglip_l_stage2.py
  --config.train.init_from=runs/vqrae_fsq_siglip_l
  --config.losses.perceptual.checkpoint=FILE, torchvision's convnext_small as
  safetensors; --config.discriminator.dino.checkpoint=DIR, as there.
Hardware and time: as vqrae_fsq_siglip_l; not run at full size.
Numbers: not measured yet; vqrae_fsq_siglip_l has the paper's numbers.

The paper names neither a discriminator nor a batch size; both, and the EMA, are
as in stage 1. The stage 2 of hugoycj/RAE encodes under no_grad and compares
quantized latents with their own continuous latents: nothing trains the encoder
there.
"""

import ml_collections
from ml_collections import config_dict

from configs import vqrae_fsq_siglip_l


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = vqrae_fsq_siglip_l.get_config()
  # The encoder's weights come from stage 1.
  config.model.encoder.checkpoint = ''
  config.train.init_from = config_dict.placeholder(str)
  config.train.num_steps = 70_000
  config.train.eval_every_steps = 5000
  # Takes 5 GiB more per chip than 'blocks' with 64 images, and fewer FLOPs.
  config.model.remat = 'qkv'

  config.losses.reconstruction = 'l2'
  config.losses.perceptual.name = 'convnext'
  config.losses.perceptual.weight = 1.1
  config.losses.adversarial.weight = 0.1
  config.losses.adversarial.weighting = 'fixed'
  config.losses.adversarial.start_step = 50_000
  config.losses.distillation_weight = 1.0

  config.discriminator.start_step = 50_000
  config.discriminator.optim.learning_rate = 4e-5
  config.discriminator.optim.end_learning_rate = 4e-5
  config.discriminator.optim.warmup_steps = 2000
  config.discriminator.optim.b2 = 0.999
  config.discriminator.optim.weight_decay = 1e-4
  config.discriminator.optim.clip_norm = 1.0

  config.optim.frozen = ()
  config.optim.learning_rate = 1e-4
  config.optim.end_learning_rate = 1e-5
  config.optim.learning_rate_factors = (('encoder/.*', 0.1),)
  config.optim.warmup_steps = 2000
  config.optim.b2 = 0.999
  config.optim.weight_decay = 1e-4
  config.optim.clip_norm = 1.0
  return config
