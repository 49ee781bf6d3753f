"""Autoregressive generator on the tokens of configs/cifar10_fsq_888.py.

What: as cifar10_maskgit, in raster order.
Command: python launch.py --config=configs/cifar10_autoregressive.py, after
  python launch.py --config=configs/cifar10_fsq_888.py
  For two CPU cores with the same overrides.
Hardware and time: as there. Numbers: not measured yet.
"""

import ml_collections

from configs import cifar10_maskgit


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = cifar10_maskgit.get_config()
  config.model.kind = 'autoregressive'
  config.losses.label_smoothing = 0.0
  config.optim.b2 = 0.95
  return config
