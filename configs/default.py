"""Every field of a config, with its meaning, unit and range.

The other files of this folder call `get_config()` and set only the fields that
differ. A config file is Python that is executed: run only files you trust.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  """Returns a small, complete config: synthetic images, FSQ of 512 codes."""
  config = ml_collections.ConfigDict()
  # Random seed of initialization, shuffling and augmentation, integer >= 0.
  config.seed = 0
  config.data = _data()
  config.model = _model()
  config.losses = _losses()
  config.discriminator = _discriminator()
  config.optim = _optim()
  config.partitioning = _partitioning()
  config.train = _train()
  config.eval = _eval()
  config.tokenize = _tokenize()
  return config


class _Operation(NamedTuple):
  """A function of the value of a reference and of other fields' values."""

  fn: Callable[..., Any]
  args: Sequence[Any]


def refer_to_longer_side(
    data: ml_collections.ConfigDict, ratio: float = 1.0
) -> config_dict.FieldReference:
  """Returns a reference to `ratio` times the longer side of data.image_size.

  As data.resize_shorter it follows image_size unless it is set itself.
  """

  def compute(_: int, size: Sequence[Any]) -> int:
    # Sides that are not integers are reported as errors of image_size.
    sides = [side for side in size if isinstance(side, int)]
    return round(ratio * max(sides, default=0))

  size = data.get_oneway_ref('image_size')
  return config_dict.FieldReference(0, op=_Operation(compute, [size]))


def _data() -> ml_collections.ConfigDict:
  data = ml_collections.ConfigDict()
  # Source of images: 'photos' (scikit-image wheel; 'public_domain_photos' is
  # without the pair that has no stated licence), 'digits' (scikit-learn wheel),
  # 'tfds', 'folder', 'webdataset', 'parquet', 'arrays', 'synthetic'.
  data.source = 'synthetic'
  # tfds: 'cifar10'; parquet: '', or 'owner/name' on the Hugging Face Hub.
  data.name = ''
  # Folder of the images (folder: one sub-folder per split) or of their files.
  # tfds: data_dir of TFDS or a prepared version; with a name '' is the default.
  data.data_dir = ''
  # Splits. folder: sub-folders; tfds: such as 'train[:90%]'; arrays: names of
  # files; webdataset, parquet: 'train', a sub-folder, or 'train-{00..46}.tar'.
  data.train_split = 'train'
  data.eval_split = 'validation'
  # Input size of the model, (height, width) in pixels.
  data.image_size = (32, 32)
  # Training at several sizes: image_size and others, one drawn for each batch;
  # each is evaluated (README.md; 'conv', and 'vit' with 'sincos'). () is one.
  data.image_sizes = ()
  # Channels of the images, of 8 bits: 1 (grey), 3 (RGB) or 4 (RGBA); files are
  # converted. Networks of losses and metrics, and pretrained parts, need 3.
  data.channels = 3
  # Global batch size (over all devices and processes), images per step.
  data.batch_size = 64
  # Global batch size of evaluation, images.
  data.eval_batch_size = 128
  # Length of the shorter side, pixels, to which images are first resized
  # (Pillow's antialiased bicubic); at least the longest side of image_size(s),
  # or 0 for the native size (with 'digits', the longer side of image_size).
  data.resize_shorter = 0
  # Allow a smaller resize_shorter; images are then scaled up to image_size.
  data.allow_upscaling = False
  # Random crops of training, (min, max) scale, 0 < min <= max: sides image_size
  # * s, s log-uniform, at most as large as the image, resized to image_size.
  data.crop_scale = (1.0, 1.0)
  # Random horizontal flips in training, probability 1/2; False with 'digits'.
  data.flip = True
  # Color jitter of training images, in [0, 1]: strength of random changes of
  # hue (at 1 by up to 180 degrees), saturation and brightness.
  data.color_jitter = 0.0
  # Class names in the order of the labels, which are stored in token files; ()
  # takes the classes of tfds and 'digits', or the sorted sub-folders of
  # train_split. webdataset, arrays and plain parquet: given here, or ().
  data.label_names = ()
  # Largest tolerated fraction of unreadable images of a split, in [0, 1]; also
  # of files of a folder or tar shards that are in an unsupported format.
  data.max_damaged_share = 0.01
  # Cache of decoded images of files (not 'photos', 'digits'), MiB >= 0;
  # images beyond it are read and decoded again each time.
  data.cache_mib = 1024
  # Threads that read and decode, >= 1; images that they prefetch, >= 1.
  data.num_threads = 2
  data.prefetch = 128
  return data


def _model() -> ml_collections.ConfigDict:
  model = ml_collections.ConfigDict()

  encoder = model.encoder = ml_collections.ConfigDict()
  # Encoder: 'vit' or 'conv', trained from scratch, or 'pretrained'. Fields of
  # one encoder have no effect on another.
  encoder.name = 'vit'
  # vit: patch size, pixels; divides both sides of image_size.
  encoder.patch_size = 4
  # vit: channels, blocks, attention heads (width is a multiple), MLP channels.
  encoder.width = 64
  encoder.depth = 2
  encoder.num_heads = 2
  encoder.mlp_dim = 256
  # vit: positions, 'learned' or 'sincos' (as in MAE; width a multiple of 4).
  encoder.position = 'learned'
  # pretrained: architecture, by name, such as 'siglip_L/16' (names are in
  # models.ARCHITECTURES); or a family with explicit hyper-parameters, such as
  # 'dinov2(width=48, depth=3, num_heads=4, mlp_dim=144, patch_size=14)'; or
  # 'checkpoint', the architecture of the checkpoint.
  encoder.architecture = 'siglip_B/16'
  # pretrained: weights that initialize a new run, a Hugging Face directory or
  # big_vision's .npz of a SigLIP; '' is random initialization. Configs that
  # need weights have None, which must be set.
  encoder.checkpoint = ''
  # pretrained: input size of the encoder, (height, width) in pixels, to which
  # the model resizes images; () is data.image_size. Position embeddings are
  # resampled once, when the weights are loaded.
  encoder.image_size = ()
  # pretrained: interpolation of that resizing: 'bicubic' (as in hugoycj/RAE),
  # 'bicubic_antialias', 'bilinear' or 'bilinear_align_corners'.
  encoder.resize = 'bicubic'
  # pretrained: keep scale and bias of the last LayerNorm. RAE drops them, so
  # that latents have mean 0 and variance 1.
  encoder.final_affine = False
  encoder.conv = _conv()

  # Latent statistics, a file of --mode=latent_statistics read by a new run:
  # latents, noise included, are normalized before projector_in and
  # denormalized after projector_out. '' is no normalization.
  model.latent_statistics = ''
  # Noise on latents in training, >= 0: maximum standard deviation, multiplied
  # by a uniform number in [0, 1) drawn for each image.
  model.latent_noise = 0.0

  projector_in = model.projector_in = ml_collections.ConfigDict()
  # Projection of latents to the quantizer's dimensions: 'linear';
  # 'standardized', linear and BatchNorm without scale and bias, which keeps all
  # levels in use; 'mlp'; 'attention'; or 'none', the identity.
  projector_in.name = 'linear'
  projector_in.mlp = _projector_in()
  projector_in.attention = _projector_in()
  # Transformer blocks, attention heads (width is a multiple), MLP channels.
  projector_in.attention.depth = 4
  projector_in.attention.num_heads = 8
  projector_in.attention.mlp_dim = 2048

  quantizer = model.quantizer = ml_collections.ConfigDict()
  # Quantizer: the name of one of the sections below. The other sections must
  # have allowed values, too.
  quantizer.name = 'fsq'
  quantizer.fsq = _fsq()
  quantizer.grouped_fsq = _fsq()
  # Groups of channels, each with `levels` and an index of its own, >= 1.
  quantizer.grouped_fsq.num_groups = 2
  quantizer.residual_fsq = _residual_fsq()
  quantizer.lfq = _lfq()
  quantizer.bsq = _lfq()
  quantizer.vq = _vq()
  quantizer.simvq = _simvq()
  # No quantizer: continuous latents, no tokens.
  quantizer.none = ml_collections.ConfigDict()
  # Channels of the latents, >= 1.
  quantizer.none.code_dim = 8

  projector_out = model.projector_out = ml_collections.ConfigDict()
  # Projection of codes to the decoder's width: 'linear'; 'mlp'; 'fourier', an
  # MLP on random Fourier features; 'levels', an embedding of each level of each
  # dimension, for quantizers with levels; or 'none', the identity.
  projector_out.name = 'linear'
  projector_out.fourier = ml_collections.ConfigDict()
  # Number of frequencies, each with a sine and a cosine, >= 1.
  projector_out.fourier.num_frequencies = 128
  # Standard deviation of the frequencies, > 0, in periods per distance between
  # neighbouring codes (1 for codes that are not on a grid). At 0.187 the cosine
  # similarity of neighbours is 1/2.
  projector_out.fourier.sigma = 0.187

  decoder = model.decoder = ml_collections.ConfigDict()
  # Decoder: 'vit', with the encoder's fields by default, or 'mae' or 'conv',
  # which have sections below.
  decoder.name = 'vit'
  decoder.patch_size = encoder.get_oneway_ref('patch_size')
  decoder.width = encoder.get_oneway_ref('width')
  decoder.depth = 2
  decoder.num_heads = encoder.get_oneway_ref('num_heads')
  decoder.mlp_dim = encoder.get_oneway_ref('mlp_dim')
  # vit: position embedding, as the encoder's.
  decoder.position = encoder.get_oneway_ref('position')
  decoder.mae = _mae()
  # Channels of the output of projector_out, >= 1.
  decoder.mae.input_width = encoder.get_oneway_ref('width')
  decoder.conv = ml_collections.ConfigDict()
  for name in encoder.conv:
    decoder.conv[name] = encoder.conv.get_oneway_ref(name)

  # Dtype of activations: 'float32' or 'bfloat16'. Parameters, norms, softmax,
  # quantizer and losses are always float32.
  model.dtype = 'float32'
  # Rematerialization in the backward pass: 'none'; 'blocks' recomputes each
  # block from its input; 'qkv' recomputes all but the arguments of fused
  # attention, without it (CPU, float32) all; 'dots' recomputes all but the
  # results of dense layers, convolutions and fused attention. Earlier versions:
  # False and True for 'none' and 'blocks'.
  model.remat = config_dict.FieldReference('none', field_type=object)
  # Unroll factor of the scan over transformer blocks, >= 1: 1 compiles fastest,
  # the depth runs fastest on CPU. Results are the same.
  model.scan_unroll = 1
  return model


def _conv() -> ml_collections.ConfigDict:
  conv = ml_collections.ConfigDict()
  # Channels of the first level, before multipliers, >= 1.
  conv.filters = 128
  # Multipliers of filters, one per level, from pixels to latents. Both sides
  # halve between levels: n levels have a stride of 2^(n-1) pixels. Each
  # multiplier times filters is a multiple of 32, the groups of GroupNorm.
  conv.channel_multipliers = (1, 1, 2, 2, 4)
  # Residual blocks per level, and as many more next to the latents, >= 1.
  conv.num_res_blocks = 2
  # Channels of the latents; 0 is the code dimension, for a projector 'none'.
  conv.latent_width = 256
  # Range of pixels, (low, high), to which the encoder maps images in [-1, 1],
  # and from which the decoder maps back; (0, 1) in MaskGIT.
  conv.pixel_range = (-1.0, 1.0)
  return conv


def _projector_in() -> ml_collections.ConfigDict:
  projector = ml_collections.ConfigDict()
  # Channels of the hidden layers, >= 1.
  projector.width = 512
  # Bounding function of the outputs: 'none', or 'tanh' for a quantizer without
  # a bound, such as FSQ with bound 'clip'.
  projector.bound = 'none'
  return projector


def _mae() -> ml_collections.ConfigDict:
  mae = ml_collections.ConfigDict()
  # Preset of width, depth, num_heads and mlp_dim: 'B', 'L' or 'XL' (86, 304 or
  # 415 million parameters); 'none' uses the fields of the decoder.
  mae.preset = 'none'
  # Token grid, (rows, columns), to which latents are resized; () is the
  # encoder's grid. Times decoder.patch_size it must equal data.image_size.
  mae.grid_size = ()
  # Normalization of the output pixels, by mean and deviation of an encoder
  # family, such as 'siglip' or 'dinov2'; 'none' is [-1, 1].
  mae.normalization = 'none'
  # Weights that initialize a new run: directory of a decoder published with
  # RAE, in the Hugging Face layout; '' is random initialization.
  mae.checkpoint = ''
  return mae


def _fsq() -> ml_collections.ConfigDict:
  fsq = ml_collections.ConfigDict()
  # Levels of each dimension, integers >= 2; their product is the codebook size.
  fsq.levels = (8, 8, 8)
  # Convention of codes and indices: 'symmetric' (levels -(L-1)/2 ... (L-1)/2),
  # 'paper' (arXiv 2309.15505), or 'vqp' and 'preserve_symmetry' of
  # vector-quantize-pytorch.
  fsq.convention = 'symmetric'
  # Bounding function: 'tanh'; with 'symmetric' also 'ifsq', 2 sigmoid(1.6 z) -
  # 1, and 'clip' for inputs that are already in [-1, 1].
  fsq.bound = 'tanh'
  # Relative range reduction; None: 1e-3 for paper, -1e-3 for vqp, else 0.
  fsq.eps = config_dict.placeholder(float)
  # Commitment loss weight, >= 0; None: 1 for symmetric, else 0.
  fsq.commitment_weight = config_dict.placeholder(float)
  # Bins: 'rounded', or 'equal' (symmetric), outermost bins as wide as others.
  fsq.bins = 'rounded'
  # Amplitude of uniform noise on codes in training, in steps between codes, >=
  # 0: per 'element', or per 'example' times a uniform number in [0, 1).
  fsq.noise = 0.0
  fsq.noise_per = 'element'
  # Diversity loss weight, >= 0: evens out the use of the levels of a batch.
  fsq.diversity_weight = 0.0
  return fsq


def _residual_fsq() -> ml_collections.ConfigDict:
  residual = ml_collections.ConfigDict()
  # Levels of each dimension in every stage, >= 2; stages (indices per code).
  residual.levels = (8, 8, 8)
  residual.num_stages = 2
  # Quantizer dropout: probability that a training image loses its last stages.
  residual.stage_dropout = 0.0
  return residual


def _lfq() -> ml_collections.ConfigDict:
  lfq = ml_collections.ConfigDict()
  # Number of dimensions, and of bits of an index, 1 to 30.
  lfq.num_bits = 9
  # Bit order of an index: 'msb_first' (vector-quantize-pytorch) or 'lsb_first'
  # (SEED-Voken).
  lfq.bit_order = 'msb_first'
  # Weights, >= 0, of the commitment loss, of the entropy loss (low entropy per
  # token, high codebook entropy), and in it of the codebook entropy.
  lfq.commitment_weight = 0.25
  lfq.entropy_weight = 0.1
  lfq.diversity_weight = 1.0
  # Softmax temperature of the entropy loss, over squared distances, >= 1e-6.
  lfq.temperature = 0.01
  # Bits of a group within which the codebook entropy is exact, 1 to 16.
  lfq.entropy_group_bits = 9
  return lfq


def _codebook() -> ml_collections.ConfigDict:
  codebook = ml_collections.ConfigDict()
  # Number of codes, >= 2, and dimensions of each, >= 1.
  codebook.codebook_size = 512
  codebook.code_dim = 8
  # Metric: 'euclidean', or 'cosine', latents and codes of unit length.
  codebook.metric = 'euclidean'
  # Gradient estimator: 'straight_through' or 'rotation' (arXiv 2410.06424).
  codebook.gradient = 'straight_through'
  # Commitment loss weight, >= 0.
  codebook.commitment_weight = 0.25
  return codebook


def _vq() -> ml_collections.ConfigDict:
  vq = _codebook()
  # Codebook update: 'ema', the EMA of the assigned latents, or 'gradient'.
  vq.codebook_update = 'ema'
  # ema: EMA decay of the codebook statistics, in [0, 1).
  vq.decay = 0.99
  # ema: initialization, 'normal' or 'kmeans' (of the first batch's latents).
  vq.codebook_init = 'normal'
  # ema: dead-code reset: 'none', 'batch' (to random latents) or 'split' (to
  # halves of the most used codes).
  vq.restart = 'none'
  # ema: dead-code threshold, as a fraction of the mean usage, in [0, 1).
  vq.dead_share = 0.01
  # Entropy loss weight (low entropy per token, high codebook entropy), >= 0.
  vq.entropy_weight = 0.0
  return vq


def _simvq() -> ml_collections.ConfigDict:
  simvq = _codebook()
  # Loss that commitment_weight multiplies: 'standard', the commitment loss, or
  # 'legacy', the codebook loss.
  simvq.weighting = 'standard'
  # Further projection of the latents: 'linear' or 'none'.
  simvq.input_projection = 'none'
  return simvq


def _losses() -> ml_collections.ConfigDict:
  losses = ml_collections.ConfigDict()
  # Reconstruction loss, 'l1' or 'l2', mean over pixels in [-1, 1]; weight >= 0.
  losses.reconstruction = 'l2'
  losses.reconstruction_weight = 1.0
  # Weight of the quantizer's loss, >= 0; its section has the weights of terms.
  losses.quantizer_weight = 1.0
  # Distillation weight, >= 0: of the mean squared error between the encoder's
  # latents, before noise and quantizer, and the latents of a teacher, a frozen
  # copy of the encoder at the start of the run.
  losses.distillation_weight = 0.0

  perceptual = losses.perceptual = ml_collections.ConfigDict()
  # Perceptual loss: 'none', 'lpips_vgg16', 'lpips_alexnet', 'convnext' or
  # 'resnet50' (logits of ConvNeXt-S or ResNet-50), or 'vit' (latents of a
  # pretrained encoder); weight >= 0.
  perceptual.name = 'none'
  perceptual.weight = 1.0
  # Weights of its frozen network, a file (see experiments/weights) or, for
  # 'vit', the directory of an encoder. Required: it is never random.
  perceptual.checkpoint = ''
  # Dtype of its activations: 'float32' or 'bfloat16'. Distances are float32.
  perceptual.dtype = 'float32'

  adversarial = losses.adversarial = ml_collections.ConfigDict()
  # Generator loss on the logits of the discriminator below: 'hinge' (minus the
  # mean logit), 'non_saturating' or 'vanilla' (the original GAN); weight >= 0.
  adversarial.loss = 'hinge'
  adversarial.weight = 0.1
  # Weighting: 'fixed', or 'adaptive' (VQGAN): the weight times the ratio of
  # gradient norms of the image losses and of this loss at the decoder's last
  # layer, at most 1e4.
  adversarial.weighting = 'fixed'
  # Start step, not before the discriminator's; length of the linear ramp of the
  # weight from 0, steps >= 0.
  adversarial.start_step = 0
  adversarial.ramp_steps = 0
  return losses


def _discriminator() -> ml_collections.ConfigDict:
  discriminator = ml_collections.ConfigDict()
  # Discriminator: 'none', 'patch' (PatchGAN), 'stylegan', or 'dino' (5 heads on
  # a frozen DINO ViT-S/8).
  discriminator.name = 'none'
  # Discriminator loss: 'hinge', 'vanilla', 'non_saturating' (= 2 x 'vanilla').
  discriminator.loss = 'hinge'
  # Start step, from which it trains, >= 0.
  discriminator.start_step = 0
  # R1 weight, >= 0: of the mean squared norm of the gradient of the logits at
  # real images. Lazy R1: every r1_every_steps steps, scaled by that number.
  discriminator.r1_weight = 0.0
  discriminator.r1_every_steps = 16
  # LeCam (arXiv 2104.03310): weight, >= 0, and EMA decay of the logits, in
  # [0, 1), updated once per micro-batch of optim.accumulation_steps.
  discriminator.lecam_weight = 0.0
  discriminator.lecam_decay = 0.999
  # DiffAugment (arXiv 2006.10738) of real and fake images: probability of
  # translation and of color, each in [0, 1].
  discriminator.augment_probability = 0.0
  # Cutout of DiffAugment, with the same probability: side of the square as a
  # fraction of the image's side, in [0, 1]; 0 is no cutout.
  discriminator.augment_cutout = 0.0
  # Round fake images to uint8, as they are stored, before the discriminator.
  discriminator.uint8_fakes = False
  patch = discriminator.patch = ml_collections.ConfigDict()
  # Channels of the first stage, a multiple of 32, doubled in each stage; number
  # of stages, each halving the sides; downsampling by 'blur' or 'average';
  # largest number of rows and columns of logits.
  patch.channels = 128
  patch.num_stages = 3
  patch.downsampling = 'blur'
  patch.grid_size = 16
  stylegan = discriminator.stylegan = ml_collections.ConfigDict()
  # Channels of the first layer; their multipliers, one per residual block,
  # each of which halves the sides; downsampling by 'blur' or 'average'.
  stylegan.filters = 64
  stylegan.multipliers = (2, 4, 4, 4, 4)
  stylegan.downsampling = 'blur'
  dino = discriminator.dino = ml_collections.ConfigDict()
  # Weights: Hugging Face directory of a DINO ViT-S/8 (facebook/dino-vits8).
  dino.checkpoint = ''
  # Architecture, as of a pretrained encoder; input size, (height, width) in
  # pixels; blocks with a head, beside the last block; kernel size of the heads'
  # convolutions over tokens, odd.
  dino.architecture = 'dino_S/8'
  dino.image_size = (224, 224)
  dino.blocks = (2, 5, 8, 11)
  dino.kernel_size = 9
  # Dtype of matmuls and convolutions: 'float32' or 'bfloat16'.
  dino.dtype = 'float32'
  # Rematerialization, as model.remat; of the heads' norms too, unless 'none'.
  dino.remat = config_dict.FieldReference('none', field_type=object)
  # AdamW of the discriminator, with the fields of `optim`; its schedule ends
  # with the run.
  adamw = discriminator.optim = ml_collections.ConfigDict()
  adamw.learning_rate = 1e-4
  adamw.end_learning_rate = 1e-5
  adamw.warmup_steps = 0
  adamw.b1 = 0.5
  adamw.b2 = 0.99
  adamw.eps = 1e-8
  adamw.weight_decay = 0.0
  adamw.clip_norm = 0.0
  return discriminator


def _optim() -> ml_collections.ConfigDict:
  optim = ml_collections.ConfigDict()
  # Optimizer: 'adamw', or 'muon', Muon (github.com/KellerJordan/Muon) for the
  # kernels of transformer blocks and AdamW for all other parameters.
  optim.name = 'adamw'
  # Learning rate: peak, > 0, and final value of the cosine schedule.
  optim.learning_rate = 1e-3
  optim.end_learning_rate = 1e-5
  # Linear warm-up from learning_rate / warmup_steps, steps >= 0.
  optim.warmup_steps = 100
  # AdamW: decay of first and second moments, in [0, 1), and epsilon, > 0.
  optim.b1 = 0.9
  optim.b2 = 0.99
  optim.eps = 1e-8
  # Decoupled weight decay, >= 0, of kernels (not biases, norms, positions).
  optim.weight_decay = 1e-4
  # Gradient clipping: maximum global norm; 0 is no clipping.
  optim.clip_norm = 1.0
  # Gradient accumulation: micro-batches per step, >= 1, which divide
  # data.batch_size.
  optim.accumulation_steps = 1
  # EMA decay of the parameters, in [0, 1); the EMA is evaluated. At update n
  # the decay is min(ema_decay, (1 + n) / (10 + n)); 0 is no EMA.
  optim.ema_decay = 0.999
  # Frozen parameters: regular expressions of their paths, such as 'encoder/.*'.
  optim.frozen = ()
  # Learning rate multipliers: (regular expression of parameter paths, factor >
  # 0) pairs; the first match applies, otherwise 1.
  optim.learning_rate_factors = ()
  return optim


def _partitioning() -> ml_collections.ConfigDict:
  partitioning = ml_collections.ConfigDict()
  # Device mesh: sizes of its axes; one may be -1 (all remaining devices). The
  # batch is sharded over 'data' and 'fsdp', heads and MLP channels of
  # transformer blocks over 'tensor', parameters over 'fsdp' and 'tensor' by the
  # rules below.
  partitioning.mesh = config_dict.create(data=-1, fsdp=1, tensor=1)
  # Partitioning rules: (regular expression of parameter paths, strategy), first
  # match wins. Strategies: 'replicate'; 'fsdp', the largest divisible dimension
  # over 'fsdp'; 'column' or 'row', the last dimension or the one before over
  # 'tensor' and another dimension as under 'fsdp'; or a tuple with a mesh axis
  # or None for each dimension of the parameter.
  partitioning.rules = (
      ('blocks/.*/(query|key|value|in|gate)/(kernel|bias)$', 'column'),
      # A fused qkv kernel is sharded by rows only in storage, see
      # models/layers.py.
      ('blocks/.*/(qkv|out)/kernel$', 'row'),
      ('.*', 'fsdp'),
  )
  # Parameters with fewer elements are replicated over 'fsdp'.
  partitioning.fsdp_min_size = 2**14
  return partitioning


def _train() -> ml_collections.ConfigDict:
  train = ml_collections.ConfigDict()
  # Number of training steps, >= 1.
  train.num_steps = 1000
  # Initialization from a trained model's EMA (stage 2, fine-tuning: README.md):
  # workdir, saved tokenizer or Hub id. '' is random or pretrained.
  train.init_from = ''
  # Intervals of logging, evaluation (0 evaluates only at the end) and
  # checkpoints, steps.
  train.log_every_steps = 20
  train.eval_every_steps = 500
  train.checkpoint_every_steps = 250
  # Trackers besides TensorBoard: names of 'mlflow' and 'wandb' (W&B).
  train.trackers = ()
  # Newest checkpoints to keep, >= 1, beside the checkpoint of the best PSNR.
  train.keep_checkpoints = 2
  # Consecutive steps with a non-finite loss or gradient that end a run, >= 1.
  train.max_bad_steps = 10
  # Profiler trace under workdir/profile: (first, last) step; () is no trace.
  train.profile_steps = ()
  # JAX persistent compilation cache directory; '' is no cache.
  train.compilation_cache = '~/.cache/fsq_jax'
  return train


def _eval() -> ml_collections.ConfigDict:
  evaluation = ml_collections.ConfigDict()
  # Number of images in the reconstruction grid, >= 1.
  evaluation.num_grid_images = 24
  # Native-size evaluation, --mode=eval only, of all sources that are files:
  # whole images, resized by data.resize_shorter, not crops of data.image_size.
  evaluation.native_size = False
  # Weights of optional evaluation networks, each a metric of its name; '' is
  # off. LPIPS and fd_vgg16: see experiments/weights. rfid: Inception-v3 of
  # pytorch-fid as safetensors; rfid_tf1: the same file, with images resized as
  # in torch-fidelity and the ADM suite. fd_encoder: a directory, as for a
  # pretrained encoder.
  networks = evaluation.networks = ml_collections.ConfigDict()
  networks.lpips_alexnet = ''
  networks.lpips_vgg16 = ''
  networks.rfid = ''
  networks.rfid_tf1 = ''
  networks.fd_vgg16 = ''
  networks.fd_encoder = ''
  return evaluation


def _tokenize() -> ml_collections.ConfigDict:
  tokenize = ml_collections.ConfigDict()
  # Fields of --mode=tokenize. Split of `data`: 'train' or 'eval'.
  tokenize.split = 'eval'
  # Views (crops) of each image, >= 1. One view is the crop of evaluation; for
  # the split 'train' of 'photos', crops on a regular grid. N >= 2 views are
  # random crops and flips as in training, drawn from `seed`.
  tokenize.views = 1
  # Fit to the model: 'crop' to data.image_size, as in evaluation, or 'pad' of
  # whole images, for one view; token grids then differ in size.
  tokenize.fit = 'crop'
  # File format: 'array_record' (random access) or 'npz' (NumPy).
  tokenize.storage = 'array_record'
  # Source images per file, >= 1. An interrupted run loses its unfinished files.
  tokenize.images_per_shard = 4096
  return tokenize
