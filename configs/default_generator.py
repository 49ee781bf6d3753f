"""The config of generators: every field with its default.

Configs of generators start from a copy of this config and change fields.
Unknown fields and invalid values are rejected before anything is built
(`fsq_jax.configuration.check_config`).
"""

import ml_collections
from ml_collections import config_dict

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = ml_collections.ConfigDict()
  # Random seed of initialization, data order, masks, dropout and samples.
  config.seed = 0
  config.tokens = _tokens()
  config.model = _model()
  config.losses = _losses()
  config.optim = _optim()
  config.partitioning = default.get_config().partitioning
  config.train = _train()
  config.eval = _eval()
  config.sample = _sample()
  return config


def _tokens() -> ml_collections.ConfigDict:
  tokens = ml_collections.ConfigDict()
  # Tokenizer that made the tokens and decodes samples: workdir of its run, or
  # folder of Tokenizer.save_pretrained; also gs://BUCKET/X. '' trains on
  # existing token files alone and decodes nothing.
  tokens.tokenizer = ''
  # Checkpoint of the tokenizer's run: 'newest', 'best' or a step number.
  tokens.checkpoint = 'newest'
  # Folders of token files, training and held-out; also gs://BUCKET/X. '' is
  # TOKENIZER/tokens/NAME of the tokenizer's own data set, which is tokenized
  # first if the files are missing.
  tokens.train = ''
  tokens.eval = ''
  # Views (crops) of each training image, >= 1, where training files are made:
  # as tokenize.views of configs/default.py.
  tokens.train_views = 1
  # Global batch sizes: images per step of all processes.
  tokens.batch_size = 64
  tokens.eval_batch_size = 64
  return tokens


def _model() -> ml_collections.ConfigDict:
  model = ml_collections.ConfigDict()
  # Kind: 'masked' (masked token modelling, MaskGIT) or 'autoregressive' (raster
  # order, causal attention).
  model.kind = 'masked'
  # Class conditioning with the labels of the token files.
  model.class_conditional = True
  # Size: 'tiny', 'S', 'B', 'L' or 'XL' of generators/architecture.py; depth,
  # width, attention heads and hidden channels of the MLP; 0 is the preset's.
  model.preset = 'tiny'
  model.depth = 0
  model.width = 0
  model.num_heads = 0
  model.mlp_dim = 0
  # Pre-norm blocks. MLP: 'swiglu' or 'gelu'; norm: 'rms' or 'layer'; biases of
  # dense layers; RMSNorm of queries and keys per head.
  model.mlp = 'swiglu'
  model.norm = 'rms'
  model.use_bias = False
  model.qk_norm = True
  # Positions: 'learned', or 'rope', 2-D rotary embedding.
  model.positions = 'learned'
  # Class conditioning by a 'prefix' token or by 'adaln' (adaLN-zero).
  model.conditioning = 'prefix'
  # Token embedding: 'levels' (sum of one embedding per dimension) or 'table';
  # 'auto' is 'levels' where the quantizer has levels.
  model.embedding = 'auto'
  # Output head: 'levels_autoregressive' (exact p(token) as a product over
  # dimensions), 'levels_independent', 'flat' (softmax over all codes),
  # 'flat_tied' (its kernel is the embedding 'table'); 'auto' is
  # 'levels_autoregressive' where the quantizer has levels, else 'flat'.
  model.head = 'auto'
  # Dropout of embeddings and residual branches, in [0, 1).
  model.dropout = 0.1
  # Dtype of activations and matmuls: 'float32' or 'bfloat16'. Parameters,
  # norms, softmax and logits are float32.
  model.dtype = 'float32'
  # Rematerialization, as model.remat in default.py.
  model.remat = config_dict.FieldReference('none', field_type=object)
  # Unroll factor of the scan over blocks, >= 1; changes speed only.
  model.scan_unroll = 1
  return model


def _losses() -> ml_collections.ConfigDict:
  losses = ml_collections.ConfigDict()
  # Class dropout: probability of training an image without its label, which
  # classifier-free guidance needs.
  losses.class_dropout = 0.1
  # Label smoothing, in [0, 0.99]; of each level with heads over levels. The NLL
  # is reported without it.
  losses.label_smoothing = 0.0
  # Masked models: schedule of the masked fraction, 'cosine', 'arccos' or
  # 'linear', and its smallest value (0.45 in the FSQ paper).
  losses.mask_schedule = 'cosine'
  losses.mask_floor = 0.0
  # Mean of the loss over all masked tokens ('token') or over the means of the
  # images ('example').
  losses.normalization = 'token'
  return losses


def _optim() -> ml_collections.ConfigDict:
  # Fields as in configs/default.py. Weight decay applies to kernels, not to
  # embeddings, norms and biases.
  optim = default.get_config().optim
  with optim.unlocked():
    del optim.frozen
  optim.learning_rate = 1e-4
  optim.end_learning_rate = 1e-6
  optim.warmup_steps = 100
  optim.b1 = 0.9
  optim.b2 = 0.96
  optim.weight_decay = 0.045
  optim.clip_norm = 1.0
  optim.ema_decay = 0.999
  return optim


def _train() -> ml_collections.ConfigDict:
  # Fields as in configs/default.py. The best checkpoint, which is kept, is the
  # one with the fewest held-out bits per token.
  train = default.get_config().train
  with train.unlocked():
    del train.init_from
  return train


def _eval() -> ml_collections.ConfigDict:
  evaluation = ml_collections.ConfigDict()
  # Held-out images, and as many training images for the generalization gap; 0
  # is all held-out images.
  evaluation.num_images = 0
  # Masked models: masks per image for the bound of the NLL.
  evaluation.num_draws = 8
  # Samples for Frechet distance, precision, recall and copies; 0 is none.
  evaluation.num_samples = 0
  # Images that samples are compared with: the same held-out images, 'decoded'
  # from their tokens or 'original'.
  evaluation.reference = 'decoded'
  # Samples of each class in the contact sheet (unconditional: in all).
  evaluation.samples_per_class = 8
  # Weights of optional feature networks; '' is off: Inception-v3 as of
  # eval.networks.rfid (also in the resizing of TF 1), VGG16 as of fd_vgg16.
  # Without, the features are principal components of pixels.
  networks = evaluation.networks = ml_collections.ConfigDict()
  networks.inception = ''
  networks.inception_tf1 = ''
  networks.vgg16 = ''
  return evaluation


def _sample() -> ml_collections.ConfigDict:
  sample = ml_collections.ConfigDict()
  # --mode=generate: number of images, balanced over the classes; classes by
  # number, () for all, -1 for no class.
  sample.num_images = 64
  sample.classes = ()
  # Images per batch.
  sample.batch_size = 64
  # Masked models: steps, 1 to the number of tokens; schedule of the masked
  # fraction; order: 'halton', 'random', or 'confidence' with Gumbel noise of
  # this temperature (MaskGIT).
  sample.num_steps = 12
  sample.mask_schedule = 'cosine'
  sample.order = 'halton'
  sample.choice_temperature = 4.5
  # Temperature of the logits (0 is the most probable token), the k most
  # probable (0 is all) and nucleus of mass p (1 is all), in this order; of each
  # level with heads over levels.
  sample.temperature = 1.0
  sample.top_k = 0
  sample.top_p = 1.0
  # Classifier-free guidance u + s (c - u): scale s (1 is off), and its schedule
  # over the steps: 'constant', 'linear', or 'power_cosine' with this power.
  guidance = sample.guidance = ml_collections.ConfigDict()
  guidance.scale = 1.0
  guidance.schedule = 'constant'
  guidance.power = 1.0
  return sample
