"""LlamaGen-L: as imagenet256_llamagen_b, with 343 million parameters.

What: 24 blocks of 1024 channels; otherwise as imagenet256_llamagen_b.
Command: python launch.py --config=configs/imagenet256_llamagen_l.py, after
  python launch.py --config=configs/vqrae_fsq_siglip_l_stage2.py
Hardware and time: for 8 accelerators; not trained here.
Numbers: not measured. LlamaGen reports FID 3.80 on its own tokens.
"""

import ml_collections

from configs import imagenet256_llamagen_b


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = imagenet256_llamagen_b.get_config()
  config.model.preset = 'L'
  return config
