"""MaskGIT with level heads: ImageNet, 256 x 256, 256 tokens of 64,000 codes.

What: as imagenet256_maskgit_8555, on the tokens of
  configs/imagenet256_fsq_888555.py. Embedding and head over the levels
  (8 + 8 + 8 + 5 + 5 + 5 logits) have 7.2 million parameters, where a tied flat
  softmax has 50 million (--config.model.embedding=table
  --config.model.head=flat_tied).
Command: python launch.py --config=configs/imagenet256_maskgit_64000.py, after
  python launch.py --config=configs/imagenet256_fsq_888555.py
Hardware and time: as imagenet256_maskgit_8555; not trained here.
Numbers: not measured. The paper trains MaskGIT on 2^10 codes alone.
"""

import ml_collections

from configs import imagenet256_maskgit_8555


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = imagenet256_maskgit_8555.get_config()
  config.tokens.tokenizer = 'runs/imagenet256_fsq_888555'
  config.model.embedding = 'levels'
  config.model.head = 'levels_autoregressive'
  return config
