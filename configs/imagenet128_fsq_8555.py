"""The FSQ paper's trade-off study at 2^10: ImageNet, 128 x 128, 1000 codes.

What: the autoencoder of MaskGIT (conv, 23.65 and 29.32 million parameters)
  with FSQ of 8 x 5 x 5 x 5 levels, as in section 5.1 and appendix A.4.1 of
  arXiv 2309.15505: 500,000 steps of 256 images, about 100 epochs. Everything
  else is as in MaskGIT's VQGAN config: L2, perceptual loss on logits of a
  ResNet-50, a StyleGAN discriminator with R1, Adam, a constant learning rate,
  EMA of the parameters; FSQ in the paper's convention. A stride of 16 pixels
  gives 64 tokens per image.
Command: python launch.py --config=configs/imagenet128_fsq_8555.py
  --config.losses.perceptual.checkpoint=FILE, torchvision's resnet50 as
  safetensors, with ImageNet as TFDS prepares it; --config.data.source=folder
  --config.data.data_dir=DIR for a folder. --config.losses.perceptual.name=none
  trains without the file.
Hardware and time: for 8 accelerators with 32 images each (15 GiB of
  activations for the autoencoder's backward pass); not run at full size.
Numbers: not measured yet. Read off figure 3 of the paper at 1000 codes:
  rFID about 7.6, all codes used, 8.1 bits per token.

The paper does not say how images are cropped; here the shorter side is resized
to 128 pixels, with random crops and flips for training. MaskGIT's ResNet-50 has
other weights than torchvision's. The code that its authors published for MAGVIT
has images in [0, 1], where errors are half and gradients with respect to pixels
twice as large as here: its weights 1 of L2 and 10 of R1 become 1/4 and 40. The
discriminator has the channels of MAGVIT's large model, as has
kvfrans/jax-vqvae-vqgan for MaskGIT at this size.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = default.get_config()
  config.data.source = 'tfds'
  config.data.name = 'imagenet2012'
  config.data.resize_shorter = default.refer_to_longer_side(config.data)
  config.data.image_size = (128, 128)
  config.data.batch_size = 256
  config.data.eval_batch_size = 256
  config.data.num_threads = 16
  config.data.prefetch = 512

  config.model.encoder.name = 'conv'
  config.model.encoder.conv.latent_width = 0
  config.model.projector_in.name = 'none'
  config.model.quantizer.fsq.levels = (8, 5, 5, 5)
  config.model.quantizer.fsq.convention = 'paper'
  config.model.projector_out.name = 'none'
  config.model.decoder.name = 'conv'
  config.model.dtype = 'bfloat16'

  config.losses.reconstruction = 'l2'
  config.losses.reconstruction_weight = 0.25
  config.losses.perceptual.name = 'resnet50'
  config.losses.perceptual.dtype = 'bfloat16'
  config.losses.perceptual.weight = 0.1
  config.losses.adversarial.loss = 'non_saturating'
  config.losses.adversarial.weight = 0.1

  config.discriminator.name = 'stylegan'
  config.discriminator.loss = 'non_saturating'
  config.discriminator.r1_weight = 40.0
  # As in MaskGIT. With lazy R1 every 16 steps its gradient would be 16 times as
  # large, and Adam without momentum divides it by an average over all steps.
  config.discriminator.r1_every_steps = 1
  config.discriminator.stylegan.filters = 128
  config.discriminator.stylegan.multipliers = (2, 4, 4, 4, 4)
  config.discriminator.stylegan.downsampling = 'blur'
  config.discriminator.optim.learning_rate = 1e-4
  config.discriminator.optim.end_learning_rate = 1e-4
  config.discriminator.optim.b1 = 0.0
  config.discriminator.optim.b2 = 0.99

  config.optim.learning_rate = 1e-4
  config.optim.end_learning_rate = 1e-4
  config.optim.warmup_steps = 0
  config.optim.b1 = 0.0
  config.optim.b2 = 0.99
  config.optim.weight_decay = 0.0
  config.optim.clip_norm = 0.0
  config.optim.ema_decay = 0.999

  config.train.num_steps = 500_000
  config.train.log_every_steps = 100
  config.train.eval_every_steps = 10_000
  config.train.checkpoint_every_steps = 2000
  return config
