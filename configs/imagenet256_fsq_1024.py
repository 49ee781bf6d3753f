"""The FSQ paper's tokenizer for MaskGIT: ImageNet, 256 x 256, 2^10 codes.

What: as imagenet128_fsq_8555 at 256 x 256 pixels, 256 tokens per image, as in
  section 5.2 and appendix A.4.3 of arXiv 2309.15505: 1,000,000 steps of 512
  images. Its 1000 codes (8 x 5 x 5 x 5 levels) are the paper's recommendation
  in place of a VQ of 1024 codes. The discriminator has one more block and half
  the filters, so that it also ends with 4 x 4 pixels.
Command: python launch.py --config=configs/imagenet256_fsq_1024.py
  --config.losses.perceptual.checkpoint=FILE, as there, with ImageNet as TFDS
  prepares it.
Hardware and time: for 8 accelerators with 64 images each (20 GiB of activations
  for the autoencoder's backward pass, 137 without remat); not run at full size.
Numbers: not measured yet. The paper reports no rFID, but FID 4.53 of MaskGIT
  samples, and all codes used. MaskGIT's own VQ of this size has rFID 2.28.
"""

import ml_collections

from configs import imagenet128_fsq_8555


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = imagenet128_fsq_8555.get_config()
  config.data.image_size = (256, 256)
  config.data.batch_size = 512
  config.data.eval_batch_size = 512
  config.data.prefetch = 1024

  config.model.remat = 'blocks'

  config.discriminator.stylegan.filters = 64
  config.discriminator.stylegan.multipliers = (2, 4, 8, 8, 8, 8)

  config.train.num_steps = 1_000_000
  return config
