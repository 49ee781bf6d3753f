"""VQ-EMA of 1024 codes on CIFAR-10, a baseline for FSQ.

What: as cifar10_fsq_888, with another quantizer and the settings that
  experiments/quantizer_comparison found best: initialized by k-means of the
  first batch, dead codes reset to latents.
Command: python launch.py --config=configs/cifar10_vq_1024.py
  after --mode=prepare, as cifar10_fsq_888 says.
Hardware and time: 2 CPU cores, as cifar10_fsq_888.
Numbers, with --config.train.num_steps=4000: 25.98 dB PSNR, 0.865
  SSIM, 100 % of the codes used, perplexity 792 (means of three seeds).
"""

import ml_collections

from configs import cifar10_fsq_888


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = cifar10_fsq_888.get_config()
  config.model.projector_out.name = 'linear'
  config.model.quantizer.name = 'vq'
  config.model.quantizer.vq.codebook_size = 1024
  config.model.quantizer.vq.codebook_init = 'kmeans'
  config.model.quantizer.vq.restart = 'batch'
  return config
