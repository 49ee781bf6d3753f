"""VQRAE's first stage on SigLIP 2 So400m with a VQ of 16,384 codes.

What: as vqrae_vq_siglip_l, with another encoder and codes of 1536
  dimensions, the width that VQRAE's ablation finds best (rFID 2.65; 3.51 with
  1152).
Command: python launch.py --config=configs/vqrae_vq_siglip2_so400m.py
  --config.model.encoder.checkpoint=DIR, with
  google/siglip2-so400m-patch16-256; the files of the losses as there.
Hardware and time: as vqrae_fsq_siglip_l; not run at full size.
Numbers: not measured yet.
"""

import ml_collections

from configs import vqrae_vq_siglip_l


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = vqrae_vq_siglip_l.get_config()
  config.model.encoder.architecture = 'siglip_So400m/16'
  # Codes are wider than latents, hence the linear projections.
  config.model.projector_in.name = 'linear'
  config.model.quantizer.vq.code_dim = 1536
  config.model.projector_out.name = 'linear'
  config.model.decoder.mae.input_width = 1152
  return config
