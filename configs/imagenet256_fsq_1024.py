"""The FSQ paper's tokenizer for MaskGIT: ImageNet, 256 x 256, 2^10 codes.

What: as imagenet128_fsq_8555 at 256 x 256 pixels, 256 tokens an image, as in
  section 5.2 and appendix A.4.3 of arXiv 2309.15505: 1,000,000 steps of 512
  images. Its levels, 8 x 5 x 5 x 5, are those that the paper recommends in
  place of a VQ of 1024 codes; they make 1000. The discriminator has one more
  block and half the filters, 4 x 4 pixels at its end again.
Command: python launch.py --config=configs/imagenet256_fsq_1024.py
  --config.losses.perceptual.checkpoint=FILE, as there, with ImageNet as TFDS
  prepares it.
Hardware and time: meant for 8 accelerators, 64 images each, of which the
  autoencoder's backward pass keeps 20 GiB (137 without remat); not run here at
  full size.
Numbers: none of its own yet, and no rFID of it in the paper, which has FID 4.53
  of images that MaskGIT samples, and all codes used. MaskGIT's own VQ of this
  size has rFID 2.28.
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

  config.model.remat = True

  config.discriminator.stylegan.filters = 64
  config.discriminator.stylegan.multipliers = (2, 4, 8, 8, 8, 8)

  config.train.num_steps = 1_000_000
  return config
