"""VQRAE for two CPU cores: FSQ on frozen DINOv2-S latents, any folder.

What: the shorter side of every image resized to 128 pixels; random crops of
  112 x 112 pixels and horizontal flips for training, centre crops for
  evaluation; a frozen ViT-S/14, 8 x 8 latents, 64 tokens per image, 1000 codes,
  and a small ViT decoder. The recipe of vqrae_fsq_dinov2_b, which needs
  accelerators, on a laptop.
Command: python launch.py --config=configs/vqrae_fsq_dinov2_s.py
  --config.data.data_dir=DIR --config.model.encoder.checkpoint=ENCODER
  and --config.data.eval_split=val if the second folder is named val.
Hardware, time and numbers: experiments/vqrae_frozen_vit.
"""

import ml_collections
from ml_collections import config_dict

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; data_dir and the checkpoint have to be set."""
  config = default.get_config()
  config.data.source = 'folder'
  config.data.image_size = (112, 112)
  config.data.resize_shorter = default.refer_to_longer_side(config.data, 8 / 7)
  config.data.batch_size = 8
  config.data.eval_batch_size = 40
  config.data.num_threads = 1

  config.model.encoder.name = 'pretrained'
  config.model.encoder.architecture = 'dinov2_S/14'
  config.model.encoder.checkpoint = config_dict.placeholder(str)
  config.model.projector_in.name = 'standardized'
  config.model.quantizer.fsq.levels = (8, 5, 5, 5)
  config.model.quantizer.fsq.commitment_weight = 0.0
  config.model.projector_out.name = 'mlp'
  config.model.decoder.name = 'mae'
  config.model.decoder.patch_size = 14
  # Larger decoders are no better within so few steps.
  config.model.decoder.width = 192
  config.model.decoder.depth = 4
  config.model.decoder.num_heads = 4
  config.model.decoder.mlp_dim = 768
  config.model.decoder.mae.input_width = 192
  config.model.decoder.mae.normalization = 'dinov2'
  config.model.scan_unroll = 12

  config.optim.frozen = ('encoder/.*',)
  config.optim.name = 'muon'
  config.optim.learning_rate = 4e-3
  config.optim.ema_decay = 0.99
  config.train.num_steps = 2000
  config.train.log_every_steps = 50
  config.train.eval_every_steps = 400
  return config
