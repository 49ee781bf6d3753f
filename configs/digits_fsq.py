"""Handwritten digits as 16 tokens of 625 codes: a first stage with labels.

What: the 1,437 training images of data.source 'digits' (8 x 8 pixels of
  scikit-learn), rendered at 32 x 32 and not augmented; 8 x 8 patches; evaluated
  on the 360 held-out images. Token files have the labels 0 to 9, for
  class-conditional generators.
Commands:
  python launch.py --config=configs/digits_fsq.py
  python launch.py --config=configs/digits_fsq.py --mode=tokenize
Hardware and time: 129 s of processor time, from process start to report, on 2
  cores of an AMD EPYC shared with other work; 85 s with a filled compilation
  cache.
Numbers: 29.18 dB PSNR, 0.949 SSIM, 94.1 % of the codes used, perplexity 289.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = default.get_config()
  config.data.source = 'digits'
  config.data.flip = False
  config.data.batch_size = 32
  config.data.num_threads = 1

  config.model.encoder.patch_size = 8
  config.model.quantizer.fsq.levels = (5, 5, 5, 5)
  config.model.quantizer.fsq.commitment_weight = 0.0
  config.model.projector_in.name = 'standardized'
  config.model.encoder.width = 64
  config.model.encoder.depth = 1
  config.model.decoder.depth = 2
  config.model.encoder.num_heads = 4
  config.model.encoder.mlp_dim = 128
  config.model.encoder.position = 'sincos'
  config.model.scan_unroll = 2

  config.optim.name = 'muon'
  config.optim.learning_rate = 4e-3
  config.optim.ema_decay = 0.99

  config.train.num_steps = 1500
  config.train.log_every_steps = 100
  config.train.eval_every_steps = 500
  config.train.checkpoint_every_steps = 500
  return config
