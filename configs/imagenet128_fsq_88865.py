"""The FSQ paper's trade-off study at 2^14: ImageNet, 128 x 128, 15,360 codes.

What: as imagenet128_fsq_8555, with other levels of the quantizer.
Command: python launch.py --config=configs/imagenet128_fsq_88865.py
  --config.losses.perceptual.checkpoint=FILE, as there.
Hardware and time: as there; not run at full size.
Numbers: not measured yet. Read off figure 3 of the paper: 2^13.8 codes used.
"""

import ml_collections

from configs import imagenet128_fsq_8555


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = imagenet128_fsq_8555.get_config()
  config.model.quantizer.fsq.levels = (8, 8, 8, 6, 5)
  return config
