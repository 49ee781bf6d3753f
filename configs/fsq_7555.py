"""FSQ of 7 x 5 x 5 x 5 levels: all odd, so that every dimension has level 0.

What: as fsq_888, with other levels of the quantizer; 875 codes.
Command: python launch.py --config=configs/fsq_7555.py
Hardware and time: as fsq_888. Numbers: not measured yet.
"""

import ml_collections

from configs import fsq_888


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = fsq_888.get_config()
  config.model.quantizer.fsq.levels = (7, 5, 5, 5)
  return config
