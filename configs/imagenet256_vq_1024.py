"""MaskGIT's own VQGAN: ImageNet, 256 x 256, a VQ of 1024 codes.

What: as imagenet256_fsq_1024, with the quantizer that FSQ replaces in the FSQ
  paper: 1024 codes of 256 channels, trained by gradient with the losses of
  github.com/google-research/maskgit, and pixels in [0, 1]. It is the model of
  the published weights: `Tokenizer.from_maskgit` (fsq_jax/tokenizer/README.md).
Command: python launch.py --config=configs/imagenet256_vq_1024.py
  --config.losses.perceptual.checkpoint=FILE, as imagenet128_fsq_8555, with
  ImageNet as TFDS prepares it; for the published weights at 512 x 512,
  --config.data.image_size='(512,512)'.
Hardware and time: as imagenet256_fsq_1024, with float32 activations, as the
  published weights were trained; not run at full size.
Numbers: not measured yet. Published: rFID 2.28 at 256 x 256, 1.97 at 512 x 512.
"""

import ml_collections

from configs import imagenet256_fsq_1024


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = imagenet256_fsq_1024.get_config()
  config.model.encoder.conv.pixel_range = (0.0, 1.0)
  config.model.quantizer.name = 'vq'
  config.model.quantizer.vq.codebook_size = 1024
  config.model.quantizer.vq.code_dim = 256
  config.model.quantizer.vq.codebook_update = 'gradient'
  config.model.quantizer.vq.entropy_weight = 0.1
  config.model.dtype = 'float32'
  return config
