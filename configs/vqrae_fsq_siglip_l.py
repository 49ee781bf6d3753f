"""VQRAE's first stage: FSQ of 16,384 codes on a frozen SigLIP-L, ImageNet.

What: VQRAE-FSQ-SigLIP-L.yaml of github.com/hugoycj/RAE (after arXiv
  2511.23386). The encoder is frozen; projectors and a ViT-XL decoder learn to
  reconstruct crops of 256 x 256 pixels from 256 tokens.
Command: python launch.py --config=configs/vqrae_fsq_siglip_l.py
  --config.model.encoder.checkpoint=DIR, with google/siglip-large-patch16-256
  of Hugging Face or big_vision's .npz of it; ImageNet as TFDS prepares it.
  --config.losses.perceptual.checkpoint=FILE, VGG16 of LPIPS as
  experiments/weights makes it; --config.discriminator.dino.checkpoint=DIR,
  with facebook/dino-vits8. --config.losses.perceptual.name=none and
  --config.discriminator.name=none train without them.
Hardware and time: for 8 accelerators of 80 GB with 64 images each; by its
  compiled step, 1024 images fit 16 TPU v5e chips of 16 GB
  (experiments/accelerators). For more than 100 devices add
  --config.partitioning.mesh.fsdp=16 and --config.partitioning.mesh.data=-1:
  some parameter dimensions are not divisible by larger meshes. Not run at full
  size.
Numbers: not measured yet. The paper reports rFID 1.31, 22.23 dB PSNR and 0.762
  SSIM, with a SigLIP 2, 16,384 learned codes and both stages.

Differences from the original, which has these errors:
* Its "SigLIP-L" loads a base model; its XL decoder has not "the same depth".
* Its learning rate of 2e-3 is ten times the rate of its siblings and of RAE,
  for 32 images per process, whose gradients were never averaged.
* Its projectors are in no optimizer and stay random. It encodes under no_grad
  although freeze_encoder is false; here optim.frozen decides.
* vq_epsilon has no effect there: levels are exact, fsq.eps stays None.
* 3 tanh(z) into a clip fills the outermost levels, and Fourier features of
  sigma 10 make neighbouring codes unrelated; see MlpProjectorIn and
  FourierProjectorOut.
* 224 x 224 pixels in 16 x 16 patches are 196 tokens; here there are 256.
"""

import ml_collections
from ml_collections import config_dict

from configs import default

_BATCH_SIZE = 512
_STEPS_PER_EPOCH = 1_281_167 // _BATCH_SIZE


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = default.get_config()
  config.data.source = 'tfds'
  config.data.name = 'imagenet2012'
  config.data.resize_shorter = default.refer_to_longer_side(config.data, 1.5)
  config.data.image_size = (256, 256)
  config.data.flip = False
  config.data.batch_size = _BATCH_SIZE
  config.data.eval_batch_size = _BATCH_SIZE
  config.data.num_threads = 16
  config.data.prefetch = 2 * _BATCH_SIZE

  config.model.encoder.name = 'pretrained'
  config.model.encoder.architecture = 'siglip_L/16'
  config.model.encoder.checkpoint = config_dict.placeholder(str)
  config.model.projector_in.name = 'mlp'
  config.model.quantizer.fsq.levels = (8, 8, 8, 8, 4)
  # The commitment loss is for bound='clip'; tanh needs none.
  config.model.quantizer.fsq.commitment_weight = 0.0
  # As in the original: the levels of 5 channels become 256 features.
  config.model.projector_out.name = 'fourier'
  config.model.decoder.name = 'mae'
  config.model.decoder.patch_size = 16
  config.model.decoder.mae.preset = 'XL'
  config.model.decoder.mae.input_width = 1024
  config.model.decoder.mae.normalization = 'siglip'
  config.model.dtype = 'bfloat16'
  config.model.remat = 'blocks'

  config.losses.reconstruction = 'l1'
  config.losses.perceptual.name = 'lpips_vgg16'
  config.losses.perceptual.dtype = 'bfloat16'
  config.losses.adversarial.weight = 0.75
  config.losses.adversarial.weighting = 'adaptive'
  config.losses.adversarial.start_step = 8 * _STEPS_PER_EPOCH

  config.discriminator.name = 'dino'
  config.discriminator.dino.dtype = 'bfloat16'
  config.discriminator.dino.remat = 'blocks'
  config.discriminator.start_step = 6 * _STEPS_PER_EPOCH
  config.discriminator.augment_probability = 1.0
  config.discriminator.uint8_fakes = True
  config.discriminator.optim.learning_rate = 2e-4
  config.discriminator.optim.end_learning_rate = 2e-5
  config.discriminator.optim.warmup_steps = _STEPS_PER_EPOCH
  config.discriminator.optim.b1 = 0.9
  config.discriminator.optim.b2 = 0.95

  config.optim.frozen = ('encoder/.*',)
  config.optim.learning_rate = 2e-4
  config.optim.end_learning_rate = 2e-5
  config.optim.warmup_steps = _STEPS_PER_EPOCH
  config.optim.b2 = 0.95
  config.optim.weight_decay = 0.0
  config.optim.clip_norm = 0.0
  config.optim.ema_decay = 0.9978

  # FSDP: parameters, optimizer state and EMA are sharded over all devices.
  config.partitioning.mesh.update({'data': 1, 'fsdp': -1})

  config.train.num_steps = 16 * _STEPS_PER_EPOCH
  config.train.log_every_steps = 100
  config.train.eval_every_steps = 2 * _STEPS_PER_EPOCH
  config.train.checkpoint_every_steps = 1000
  return config
