"""FSQ of 8 x 5 x 5 x 5 levels on any folder of images, at 64 x 64 pixels.

What: the shorter side of every image resized to 64 pixels; random crops and
  horizontal flips for training, centre crops for evaluation; 4 x 4 patches, 256
  tokens per image, 1000 codes. Folder layout, CLASS being optional:
    DIR/train/CLASS/NAME.JPEG
    DIR/validation/CLASS/NAME.JPEG
Command: python launch.py --config=configs/folder_fsq_8555.py
  --config.data.data_dir=DIR
  and --config.data.eval_split=val if the second folder is named val.
Hardware and time: any; 4500 steps of 16 images. Numbers: not measured yet.
"""

import ml_collections

from configs import default
from configs import fsq_888


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; data.data_dir has to be set."""
  config = fsq_888.get_config()
  config.data.source = 'folder'
  config.data.image_size = (64, 64)
  config.data.resize_shorter = default.refer_to_longer_side(config.data)
  config.data.crop_scale = (1.0, 1.0)
  config.data.color_jitter = 0.0
  config.data.num_threads = 2

  config.model.quantizer.fsq.levels = (8, 5, 5, 5)
  return config
