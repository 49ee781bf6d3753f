"""VQRAE's first stage on the encoder of the paper: SigLIP 2 So400m, FSQ.

What: as vqrae_fsq_siglip_l, with another encoder: 1152 channels. Its 16 x 16
  patches of 256 x 256 pixels are the decoder's grid; So400m/14 would cut off 4
  pixels. The SigLIP 2 file of hugoycj/RAE runs 160 epochs with a schedule that
  ends after 16; this config runs 16.
Command: python launch.py --config=configs/vqrae_fsq_siglip2_so400m.py
  --config.model.encoder.checkpoint=DIR, with
  google/siglip2-so400m-patch16-256; the files of the losses as there.
Hardware and time: as vqrae_fsq_siglip_l; not run at full size.
Numbers: not measured yet.
"""

import ml_collections

from configs import vqrae_fsq_siglip_l


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = vqrae_fsq_siglip_l.get_config()
  config.model.encoder.architecture = 'siglip_So400m/16'
  config.model.decoder.mae.input_width = 1152
  return config
