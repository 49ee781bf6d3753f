"""FSQ of 8 x 6 x 5 levels, the paper's choice for 2^8 codes.

What: as fsq_888, with other levels of the quantizer; 240 codes.
Command: python launch.py --config=configs/fsq_865.py
Hardware and time: as fsq_888. Numbers: not measured yet.
"""

import ml_collections

from configs import fsq_888


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = fsq_888.get_config()
  config.model.quantizer.fsq.levels = (8, 6, 5)
  return config
