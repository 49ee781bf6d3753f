"""RAE: a continuous autoencoder on a frozen DINOv2-B with registers, ImageNet.

What: DINOv2-B_decXL.yaml of github.com/bytetriper/RAE (arXiv 2510.11690): as
  vqrae_fsq_dinov2_b, without quantizer, tokens and projectors. The decoder
  trains on latents with noise. --mode=latent_statistics writes the file that
  normalizes the latents (model.latent_statistics, or a generator of latents).
Command: python launch.py --config=configs/rae_dinov2_b.py
  --config.model.encoder.checkpoint=DIR, with
  facebook/dinov2-with-registers-base; the files of the losses as in
  vqrae_fsq_siglip_l.
Hardware and time: as vqrae_fsq_siglip_l; not run at full size.
Numbers: not measured yet. VQRAE's paper has rFID 0.49, 19.23 dB PSNR and 0.620
  SSIM for RAE. A published decoder is loaded by
  --config.model.decoder.mae.checkpoint=DIR.
"""

import ml_collections

from configs import vqrae_fsq_dinov2_b


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = vqrae_fsq_dinov2_b.get_config()
  config.model.latent_noise = 0.8
  config.model.projector_in.name = 'none'
  config.model.quantizer.name = 'none'
  config.model.quantizer.none.code_dim = 768
  config.model.projector_out.name = 'none'
  return config
