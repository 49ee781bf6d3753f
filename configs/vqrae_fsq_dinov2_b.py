"""VQRAE's first stage on a frozen DINOv2-B with registers, FSQ of 16,384 codes.

What: as vqrae_fsq_siglip_l, with another encoder: 768 channels. As in RAE it
  resizes images of 256 x 256 pixels to 224 x 224, 256 patches of 14 x 14
  pixels, which is the decoder's grid.
Command: python launch.py --config=configs/vqrae_fsq_dinov2_b.py
  --config.model.encoder.checkpoint=DIR, with
  facebook/dinov2-with-registers-base; the files of the losses as there.
Hardware and time: as vqrae_fsq_siglip_l; not run at full size.
Numbers: not measured yet.
"""

import ml_collections

from configs import vqrae_fsq_siglip_l


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = vqrae_fsq_siglip_l.get_config()
  config.model.encoder.architecture = 'dinov2_with_registers_B/14'
  config.model.encoder.image_size = (224, 224)
  config.model.decoder.mae.input_width = 768
  config.model.decoder.mae.normalization = 'dinov2_with_registers'
  return config
