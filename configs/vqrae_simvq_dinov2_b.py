"""VQRAE's first stage on DINOv2-B with a SimVQ of 16,384 codes.

What: as vqrae_simvq_siglip_l, with the encoder of vqrae_fsq_dinov2_b and codes
  of its 768 dimensions.
Command: python launch.py --config=configs/vqrae_simvq_dinov2_b.py
  --config.model.encoder.checkpoint=DIR, with
  facebook/dinov2-with-registers-base; the files of the losses as there.
Hardware and time: as vqrae_fsq_siglip_l; not run at full size.
Numbers: not measured yet.
"""

import ml_collections

from configs import vqrae_simvq_siglip_l


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = vqrae_simvq_siglip_l.get_config()
  config.model.encoder.architecture = 'dinov2_with_registers_B/14'
  config.model.encoder.image_size = (224, 224)
  config.model.quantizer.simvq.code_dim = 768
  config.model.decoder.mae.input_width = 768
  config.model.decoder.mae.normalization = 'dinov2_with_registers'
  return config
