"""VQRAE's first stage with the FSQ paper's levels for 14 bits: 15,360 codes.

What: as vqrae_fsq_siglip_l, with other levels (arXiv 2309.15505, table 1).
Command: python launch.py --config=configs/vqrae_fsq_siglip_l_88865.py
  --config.model.encoder.checkpoint=DIR, with google/siglip-large-patch16-256;
  the files of the losses as there.
Hardware and time: as vqrae_fsq_siglip_l; not run at full size.
Numbers: not measured yet.
"""

import ml_collections

from configs import vqrae_fsq_siglip_l


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = vqrae_fsq_siglip_l.get_config()
  config.model.quantizer.fsq.levels = (8, 8, 8, 6, 5)
  return config
