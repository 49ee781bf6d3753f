"""VQRAE's first stage with a SimVQ of 16,384 codes, for comparison with FSQ.

What: as vqrae_fsq_siglip_l, with a quantizer directly on the latents, of 1024
  dimensions, without projectors, see vqrae_vq_siglip_l. It is
  VQRAE's quantizer. Codes are drawn from N(0, 1/1024) and share one learned
  linear map.
Command: python launch.py --config=configs/vqrae_simvq_siglip_l.py
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
  config.model.projector_in.name = 'none'
  config.model.quantizer.name = 'simvq'
  config.model.quantizer.simvq.codebook_size = 16384
  config.model.quantizer.simvq.code_dim = 1024
  config.model.projector_out.name = 'none'
  return config
