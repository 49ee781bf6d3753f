"""The tokenizer that ships with the package: photographs, 64,000 codes.

What: the model and the images of fsq_888 with FSQ of 8 x 8 x 8 x 5 x 5 x 5
  levels, 1 bit per pixel instead of 0.56, and a smaller diversity loss, which
  favours reconstruction over codebook usage. Only photographs whose licences
  allow it (data.source 'public_domain_photos').
Command: python launch.py --config=configs/photos.py
Hardware and time: 15 minutes on 2 cores of an AMD EPYC shared with other work.
Numbers: 31.62 dB PSNR, 0.858 SSIM, 7,104 codes used on the validation images,
  perplexity 2928; whole photographs: see the card in
  fsq_jax/tokenizer/pretrained/photos.
"""

import ml_collections

from configs import fsq_888


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = fsq_888.get_config()
  config.data.source = 'public_domain_photos'
  config.model.quantizer.fsq.levels = (8, 8, 8, 5, 5, 5)
  config.model.quantizer.fsq.diversity_weight = 0.01

  config.train.num_steps = 12000
  config.train.eval_every_steps = 4000
  return config
