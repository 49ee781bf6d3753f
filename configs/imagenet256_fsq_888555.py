"""The FSQ paper's tokenizer at 256 x 256 pixels with 64,000 codes.

What: as imagenet256_fsq_1024, with the levels of the paper's 2^16 codes; the
  tokens of configs/imagenet256_maskgit_64000.py.
Command: python launch.py --config=configs/imagenet256_fsq_888555.py
  --config.losses.perceptual.checkpoint=FILE, as there.
Hardware and time: as there; not run at full size.
Numbers: not measured yet. The paper has this number of codes at 128 x 128
  pixels alone, configs/imagenet128_fsq_888555.py.
"""

import ml_collections

from configs import imagenet256_fsq_1024


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = imagenet256_fsq_1024.get_config()
  config.model.quantizer.fsq.levels = (8, 8, 8, 5, 5, 5)
  return config
