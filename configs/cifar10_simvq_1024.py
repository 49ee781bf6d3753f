"""SimVQ of 1024 codes on CIFAR-10, a baseline for FSQ.

What: as cifar10_fsq_888, with another quantizer: a frozen codebook under one
  learned linear map.
Command: python launch.py --config=configs/cifar10_simvq_1024.py
  after --mode=prepare, as cifar10_fsq_888 says.
Hardware and time: 2 CPU cores, as cifar10_fsq_888.
Numbers, with --config.train.num_steps=4000: 25.69 dB PSNR, 0.860
  SSIM, 99.9 % of the codes used, perplexity 709 (means of three seeds).
"""

import ml_collections

from configs import cifar10_fsq_888


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = cifar10_fsq_888.get_config()
  config.model.projector_out.name = 'linear'
  config.model.quantizer.name = 'simvq'
  config.model.quantizer.simvq.codebook_size = 1024
  return config
