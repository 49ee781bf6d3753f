"""VQRAE's first stage with a VQ of 16,384 codes, for comparison with FSQ.

What: as vqrae_fsq_siglip_l, with a quantizer directly on the latents, of 1024
  dimensions, without projectors. VQRAE finds that learned codes of 256 or
  fewer dimensions do not train on such latents, and that the widest codes are
  best. Codes are updated by EMA as in hugoycj/RAE; initialization and dead-code
  reset as in experiments/quantizer_comparison. With a frozen encoder the
  commitment loss trains nothing.
Command: python launch.py --config=configs/vqrae_vq_siglip_l.py
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
  config.model.quantizer.name = 'vq'
  config.model.quantizer.vq.codebook_size = 16384
  config.model.quantizer.vq.code_dim = 1024
  config.model.quantizer.vq.codebook_init = 'kmeans'
  config.model.quantizer.vq.restart = 'batch'
  config.model.projector_out.name = 'none'
  return config
