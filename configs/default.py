"""Every field that a config can have, with its unit, range and meaning.

The other files of this folder start from `get_config()` and set only what
differs. A config file is Python that is executed: run only files you trust.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  """Returns a small, complete config: synthetic images, FSQ of 512 codes."""
  config = ml_collections.ConfigDict()
  # Seed of initialisation, shuffling and augmentation; integer >= 0.
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
  """A function of a reference's own value and of the values of others."""

  fn: Callable[..., Any]
  args: Sequence[Any]


def refer_to_longer_side(
    data: ml_collections.ConfigDict, ratio: float = 1.0
) -> config_dict.FieldReference:
  """Returns a reference to `ratio` times the longer side of data.image_size.

  For data.resize_shorter, which then follows image_size unless it is set.
  """

  def compute(_: int, size: Sequence[Any]) -> int:
    # What is not an integer is reported as a fault of image_size.
    sides = [side for side in size if isinstance(side, int)]
    return round(ratio * max(sides, default=0))

  size = data.get_oneway_ref('image_size')
  return config_dict.FieldReference(0, op=_Operation(compute, [size]))


def _data() -> ml_collections.ConfigDict:
  data = ml_collections.ConfigDict()
  # 'photos' (in the scikit-image wheel), 'tfds', 'folder' or 'synthetic'.
  data.source = 'synthetic'
  # tfds: name of the data set, such as 'cifar10'.
  data.name = ''
  # folder: the root, with one sub-folder a split; tfds: its data_dir or the
  # folder of one prepared version; '' is the TFDS default.
  data.data_dir = ''
  # folder: name of the sub-folder; tfds: a split such as 'train[:90%]'.
  data.train_split = 'train'
  data.eval_split = 'validation'
  # (height, width) of the images that the model sees, pixels.
  data.image_size = (32, 32)
  # Images a step over all devices and processes.
  data.batch_size = 64
  # Images an evaluation batch over all devices and processes.
  data.eval_batch_size = 128
  # Length in pixels to which the shorter side is resized first (Pillow's
  # antialiased bicubic); 0 keeps the native size, else at least the longer side
  # of image_size.
  data.resize_shorter = 0
  # Allow a smaller resize_shorter, so that images are scaled up to image_size.
  data.allow_upscaling = False
  # Training crops have sides image_size * s with s log-uniform in this range,
  # limited to what fits the image, and are resized to image_size.
  data.crop_scale = (1.0, 1.0)
  # Mirror training images left to right with probability 1/2.
  data.flip = True
  # Strength in [0, 1] of random changes of hue (up to half a turn), saturation
  # and brightness of training images.
  data.color_jitter = 0.0
  # Class names in the order of their labels, which token files hold; () takes
  # those of tfds, or of a folder the sub-folders of train_split, sorted.
  data.label_names = ()
  # Share of unreadable images of a split, in [0, 1], above which it stops; the
  # same for files of a folder that are images of a kind that is not read.
  data.max_damaged_share = 0.01
  # Memory in MiB for decoded images of folder and tfds, which then are read
  # and decoded once; images beyond it are read each time. 0 keeps none.
  data.cache_mib = 1024
  # Threads that read and decode, >= 1; images that they read ahead.
  data.num_threads = 2
  data.prefetch = 128
  return data


def _model() -> ml_collections.ConfigDict:
  model = ml_collections.ConfigDict()

  encoder = model.encoder = ml_collections.ConfigDict()
  # 'vit' or 'conv', from scratch, or 'pretrained'. The fields of one do nothing
  # for the others.
  encoder.name = 'vit'
  # vit: side in pixels of the square patches; divides both sides of image_size.
  encoder.patch_size = 4
  # Channels, blocks, attention heads (they divide width), MLP channels.
  encoder.width = 64
  encoder.depth = 2
  encoder.num_heads = 2
  encoder.mlp_dim = 256
  # 'learned', or 'sincos': fixed two-dimensional sines (MAE's).
  encoder.position = 'learned'
  # pretrained: a published architecture, such as 'siglip_L/16' (all names are
  # in models.ARCHITECTURES), a family with its fields, such as
  # 'dinov2(width=48, depth=3, num_heads=4, mlp_dim=144, patch_size=14)', or
  # 'checkpoint', whatever that one has.
  encoder.architecture = 'siglip_B/16'
  # pretrained: Hugging Face directory, or big_vision's .npz of a SigLIP, that
  # a new run reads its weights from; '' starts from random ones. None, in
  # configs that a random encoder makes no sense of, has to be set.
  encoder.checkpoint = ''
  # pretrained: (height, width) in pixels that images are resampled to in the
  # model; () is data.image_size. Position embeddings are resampled to it once.
  encoder.image_size = ()
  # pretrained: kernel of the former: 'bicubic' (as in hugoycj/RAE),
  # 'bicubic_antialias', 'bilinear' or 'bilinear_align_corners'.
  encoder.resize = 'bicubic'
  # pretrained: keep scale and bias of the last LayerNorm, which RAE drops, so
  # that latents have mean 0 and variance 1.
  encoder.final_affine = False
  encoder.conv = _conv()

  # File of --mode=latent_statistics, read by a new run, by which latents are
  # normalized in front of projector_in, and back behind projector_out; '' does
  # not. Of latents with noise too.
  model.latent_statistics = ''
  # Size of the noise on latents in training, >= 0: standard deviation times a
  # random share of it for each image.
  model.latent_noise = 0.0

  projector_in = model.projector_in = ml_collections.ConfigDict()
  # Latents to the quantizer's dimensions: 'linear'; 'standardized', linear and
  # then brought to mean 0 and variance 1 over the batch, which keeps all levels
  # in use; 'mlp' and 'attention' as below; or 'none', for latents as they are.
  projector_in.name = 'linear'
  projector_in.mlp = _projector_in()
  projector_in.attention = _projector_in()
  # Transformer blocks, attention heads (they divide width), MLP channels.
  projector_in.attention.depth = 4
  projector_in.attention.num_heads = 8
  projector_in.attention.mlp_dim = 2048

  quantizer = model.quantizer = ml_collections.ConfigDict()
  # Which of the sections below is built; of the others only ranges matter.
  quantizer.name = 'fsq'
  quantizer.fsq = _fsq()
  quantizer.grouped_fsq = _fsq()
  # Groups of channels with one index each; `levels` are those of a group.
  quantizer.grouped_fsq.num_groups = 2
  quantizer.residual_fsq = _residual_fsq()
  quantizer.lfq = _lfq()
  quantizer.bsq = _lfq()
  quantizer.vq = _vq()
  quantizer.simvq = _simvq()
  # No quantizer: continuous latents, without tokens.
  quantizer.none = ml_collections.ConfigDict()
  # Channels of a latent.
  quantizer.none.code_dim = 8

  projector_out = model.projector_out = ml_collections.ConfigDict()
  # Codes to the decoder's width: 'linear'; 'mlp'; 'fourier', an MLP on random
  # Fourier features; 'levels', one embedding for each level of each dimension,
  # for quantizers with levels; or 'none', for codes as they are.
  projector_out.name = 'linear'
  projector_out.fourier = ml_collections.ConfigDict()
  # Number of frequencies, each with a sine and a cosine.
  projector_out.fourier.num_frequencies = 128
  # Their standard deviation, > 0, in periods a step between neighbouring codes
  # (a unit, where codes have no grid). At 0.187 neighbours are half similar.
  projector_out.fourier.sigma = 0.187

  decoder = model.decoder = ml_collections.ConfigDict()
  # 'vit', whose fields are the encoder's, or 'mae' or 'conv', which have a
  # section below.
  decoder.name = 'vit'
  decoder.patch_size = encoder.get_oneway_ref('patch_size')
  decoder.width = encoder.get_oneway_ref('width')
  decoder.depth = 2
  decoder.num_heads = encoder.get_oneway_ref('num_heads')
  decoder.mlp_dim = encoder.get_oneway_ref('mlp_dim')
  # vit: as the encoder's.
  decoder.position = encoder.get_oneway_ref('position')
  decoder.mae = _mae()
  # Channels that projector_out makes, >= 1.
  decoder.mae.input_width = encoder.get_oneway_ref('width')
  decoder.conv = ml_collections.ConfigDict()
  for name in encoder.conv:
    decoder.conv[name] = encoder.conv.get_oneway_ref(name)

  # Type of activations: 'float32' or 'bfloat16'. Parameters, norms, softmax,
  # quantizer and losses are float32 whatever it says.
  model.dtype = 'float32'
  # Recompute the activations of each block in the backward pass.
  model.remat = False
  # Transformer blocks laid out one after another in the compiled loop over
  # them: 1 compiles fastest, the depth runs fastest on CPU. Results are the
  # same.
  model.scan_unroll = 1
  return model


def _conv() -> ml_collections.ConfigDict:
  conv = ml_collections.ConfigDict()
  # Channels of the first level, before multipliers.
  conv.filters = 128
  # Factor of filters in each level, from pixels to latents. Both sides halve
  # from level to level: n levels make latents of 2^(n-1) pixels a side. Times
  # filters, multiples of 32, the groups of GroupNorm.
  conv.channel_multipliers = (1, 1, 2, 2, 4)
  # Residual blocks of each level, and as many again next to the latents.
  conv.num_res_blocks = 2
  # Channels of the latents, that the encoder ends and the decoder begins with;
  # 0 is those of a code, for a projector 'none'.
  conv.latent_width = 256
  return conv


def _projector_in() -> ml_collections.ConfigDict:
  projector = ml_collections.ConfigDict()
  # Channels of the hidden layers.
  projector.width = 512
  # What its outputs pass: 'none', or 'tanh' for a quantizer without a bound of
  # its own, such as FSQ with bound 'clip'.
  projector.bound = 'none'
  return projector


def _mae() -> ml_collections.ConfigDict:
  mae = ml_collections.ConfigDict()
  # 'B', 'L' or 'XL' (86, 304, 415 million parameters) in place of the decoder's
  # width, depth, num_heads and mlp_dim, which 'none' reads.
  mae.preset = 'none'
  # (rows, columns) of its tokens, to which latents are resized; () is the
  # encoder's grid. Times decoder.patch_size it must be data.image_size.
  mae.grid_size = ()
  # Family of encoders by whose mean and deviation its pixels are normalised,
  # such as 'siglip' or 'dinov2'; 'none' is [-1, 1].
  mae.normalization = 'none'
  # Directory of a decoder published with RAE, in the layout of Hugging Face,
  # that a new run reads its weights from; '' starts from random ones.
  mae.checkpoint = ''
  return mae


def _fsq() -> ml_collections.ConfigDict:
  fsq = ml_collections.ConfigDict()
  # Levels of each dimension, integers >= 2; their product is the codebook.
  fsq.levels = (8, 8, 8)
  # 'symmetric' (levels -(L-1)/2 ... (L-1)/2), 'paper' (arXiv 2309.15505), or
  # those of vector-quantize-pytorch: 'vqp' and 'preserve_symmetry'.
  fsq.convention = 'symmetric'
  # 'tanh' for any real input; symmetric also: 'ifsq', 2 sigmoid(1.6 z) - 1, and
  # 'clip' where it is bounded to [-1, 1] before.
  fsq.bound = 'tanh'
  # Share by which the range is narrowed; None: 1e-3 for paper, -1e-3 for vqp,
  # else 0.
  fsq.eps = config_dict.placeholder(float)
  # Weight of the commitment loss; None: 1 for symmetric, else 0.
  fsq.commitment_weight = config_dict.placeholder(float)
  # 'rounded', or 'equal' (symmetric): the outermost bins as wide as the others.
  fsq.bins = 'rounded'
  # Half the width of the uniform noise added to codes in training, in steps
  # between codes, >= 0; every 'element' has this one, or every 'example' a
  # random share of it.
  fsq.noise = 0.0
  fsq.noise_per = 'element'
  return fsq


def _residual_fsq() -> ml_collections.ConfigDict:
  residual = ml_collections.ConfigDict()
  # Levels of each dimension in every stage; indices a code.
  residual.levels = (8, 8, 8)
  residual.num_stages = 2
  # Probability in [0, 1] that a training image loses its last stages.
  residual.stage_dropout = 0.0
  return residual


def _lfq() -> ml_collections.ConfigDict:
  lfq = ml_collections.ConfigDict()
  # Dimensions, and bits of an index, 1 to 30.
  lfq.num_bits = 9
  # 'msb_first' (vector-quantize-pytorch) or 'lsb_first' (SEED-Voken).
  lfq.bit_order = 'msb_first'
  # Weights of the commitment loss, of the entropy loss, and in it of the
  # entropy of the mean, which spreads tokens over all codes.
  lfq.commitment_weight = 0.25
  lfq.entropy_weight = 0.1
  lfq.diversity_weight = 1.0
  # Squared distance at which a code is e times less probable, >= 1e-6.
  lfq.temperature = 0.01
  # Most bits over which the entropy of the mean is exact, 1 to 16.
  lfq.entropy_group_bits = 9
  return lfq


def _codebook() -> ml_collections.ConfigDict:
  codebook = ml_collections.ConfigDict()
  # Number of codes, and dimensions of each.
  codebook.codebook_size = 512
  codebook.code_dim = 8
  # 'euclidean', or 'cosine': latents and codes of length 1.
  codebook.metric = 'euclidean'
  # 'straight_through' or 'rotation' (arXiv 2410.06424).
  codebook.gradient = 'straight_through'
  # Weight of the loss that draws latents to codes, >= 0.
  codebook.commitment_weight = 0.25
  return codebook


def _vq() -> ml_collections.ConfigDict:
  vq = _codebook()
  # How codes learn: 'ema', moving averages of latents; or 'gradient'.
  vq.codebook_update = 'ema'
  # ema: weight of the past in the averages, in [0, 1).
  vq.decay = 0.99
  # ema: 'normal', or 'kmeans' of the latents of the first batch.
  vq.codebook_init = 'normal'
  # ema: dead codes stay ('none'), become latents ('batch') or halves of the
  # most used codes ('split').
  vq.restart = 'none'
  # ema: share of the mean use below which a code is dead, in [0, 1).
  vq.dead_share = 0.01
  # Weight of the loss for sure choices and an even use of the codes, >= 0.
  vq.entropy_weight = 0.0
  return vq


def _simvq() -> ml_collections.ConfigDict:
  simvq = _codebook()
  # Where commitment_weight goes: 'standard', to the loss that moves latents; or
  # 'legacy', to the one that moves codes.
  simvq.weighting = 'standard'
  # 'linear': one more linear map of the latents; or 'none'.
  simvq.input_projection = 'none'
  return simvq


def _losses() -> ml_collections.ConfigDict:
  losses = ml_collections.ConfigDict()
  # 'l1' or 'l2', mean over pixels in [-1, 1].
  losses.reconstruction = 'l2'
  losses.reconstruction_weight = 1.0
  # Multiplies the quantizer's own loss, whose parts its section weighs.
  losses.quantizer_weight = 1.0
  # Weight of the mean squared difference between the encoder's latents, before
  # noise and quantizer, and those of a frozen copy of it as the run starts.
  losses.distillation_weight = 0.0

  perceptual = losses.perceptual = ml_collections.ConfigDict()
  # 'none', or a frozen network by which reconstructions are compared with
  # images: 'lpips_vgg16', 'lpips_alexnet'; 'convnext' or 'resnet50', logits of
  # ConvNeXt-S or ResNet-50; or 'vit', latents of a pretrained encoder.
  perceptual.name = 'none'
  perceptual.weight = 1.0
  # File of its weights, see experiments/weights; vit: directory of an encoder.
  # '' is refused where there is a network: none has random weights.
  perceptual.checkpoint = ''
  # Type of its activations: 'float32' or 'bfloat16'. Distances are float32.
  perceptual.dtype = 'float32'

  adversarial = losses.adversarial = ml_collections.ConfigDict()
  # What the decoder learns from the discriminator below: 'hinge', minus the
  # mean logit; 'non_saturating'; or 'vanilla', the first paper's.
  adversarial.loss = 'hinge'
  adversarial.weight = 0.1
  # 'fixed', or 'adaptive': times the ratio of the gradients of the losses on
  # images and of this one at the decoder's last layer, at most 1e4 (VQGAN's).
  adversarial.weighting = 'fixed'
  # Step from which it counts, not before the discriminator's; steps in which
  # its weight then rises from 0, 0 for at once.
  adversarial.start_step = 0
  adversarial.ramp_steps = 0
  return losses


def _discriminator() -> ml_collections.ConfigDict:
  discriminator = ml_collections.ConfigDict()
  # 'none' trains without; 'patch', 'stylegan', or 'dino', five heads on a
  # frozen ViT-S/8.
  discriminator.name = 'none'
  # Its loss: 'hinge', 'vanilla' or 'non_saturating', twice that.
  discriminator.loss = 'hinge'
  # Step from which it trains.
  discriminator.start_step = 0
  # Weight of R1, the mean squared norm of the gradient of the logits at real
  # images, and the steps between two of which one has it, that many times.
  discriminator.r1_weight = 0.0
  discriminator.r1_every_steps = 16
  # Weight of LeCam (arXiv 2104.03310), decay of the logits' averages in it,
  # once for each of optim.accumulation_steps.
  discriminator.lecam_weight = 0.0
  discriminator.lecam_decay = 0.999
  # Probability in [0, 1] of each differentiable augmentation (arXiv
  # 2006.10738) of what it sees: translation, then color.
  discriminator.augment_probability = 0.0
  # Side of a square that is cut out with that probability, as a share of the
  # image's; 0 cuts nothing.
  discriminator.augment_cutout = 0.0
  # Show it reconstructions as they are stored: clipped, rounded to 256 levels.
  discriminator.uint8_fakes = False
  patch = discriminator.patch = ml_collections.ConfigDict()
  # Channels of the first stage, a multiple of 32, which double in each; stages,
  # each halving the sides; 'blur' or 'average' for halving; rows and columns of
  # logits at most.
  patch.channels = 128
  patch.num_stages = 3
  patch.downsampling = 'blur'
  patch.grid_size = 16
  stylegan = discriminator.stylegan = ml_collections.ConfigDict()
  # Channels of the first layer; of these, those of each residual block, which
  # halves the sides; 'blur' or 'average' for halving.
  stylegan.filters = 64
  stylegan.multipliers = (2, 4, 4, 4, 4)
  stylegan.downsampling = 'blur'
  dino = discriminator.dino = ml_collections.ConfigDict()
  # Directory of Hugging Face with DINO's ViT-S/8, such as facebook/dino-vits8.
  dino.checkpoint = ''
  # An architecture as of a pretrained encoder; (height, width) in pixels that
  # images are resampled to; blocks that are judged next to the last one; tokens
  # that a head's convolution sees, odd.
  dino.architecture = 'dino_S/8'
  dino.image_size = (224, 224)
  dino.blocks = (2, 5, 8, 11)
  dino.kernel_size = 9
  # Type of the transformer's activations: 'float32' or 'bfloat16'.
  dino.dtype = 'float32'
  # Recompute the activations of each block in the backward pass.
  dino.remat = False
  # Its own AdamW, whose fields are those of `optim`; the schedule ends with the
  # run.
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
  # 'adamw', or 'muon': orthogonalised momentum (github.com/KellerJordan/Muon)
  # for the kernels of transformer blocks and AdamW for the rest.
  optim.name = 'adamw'
  # Peak and last value of the cosine schedule.
  optim.learning_rate = 1e-3
  optim.end_learning_rate = 1e-5
  # Steps of linear warm-up from learning_rate / warmup_steps, >= 0.
  optim.warmup_steps = 100
  optim.b1 = 0.9
  optim.b2 = 0.99
  optim.eps = 1e-8
  # Decoupled weight decay of the kernels (not of biases, norms, positions).
  optim.weight_decay = 1e-4
  # Largest global norm of the gradient; 0 does not clip.
  optim.clip_norm = 1.0
  # Steps whose gradients are averaged into one update, >= 1.
  optim.accumulation_steps = 1
  # Decay of the parameter average that is evaluated, in [0, 1); 0 averages
  # nothing. It is min(ema_decay, (1 + n) / (10 + n)) at update n.
  optim.ema_decay = 0.999
  # Regular expressions of parameter paths ('encoder/.*') that do not train.
  optim.frozen = ()
  # (regular expression of parameter paths, factor > 0 of the learning rate)
  # pairs; the first that matches counts, 1 where none does.
  optim.learning_rate_factors = ()
  return optim


def _partitioning() -> ml_collections.ConfigDict:
  partitioning = ml_collections.ConfigDict()
  # Devices along each axis; one of them may be -1 (all that are left). The
  # batch is split over 'data' and 'fsdp', the heads and the MLP channels of
  # transformer blocks over 'tensor'; rules split parameters over the last two.
  partitioning.mesh = ml_collections.ConfigDict(
      {'data': -1, 'fsdp': 1, 'tensor': 1}
  )
  # (regular expression, strategy), first match wins. A strategy is
  # 'replicate'; 'fsdp' (largest axis that divides); 'column' or 'row', the last
  # axis or the one before over 'tensor' and another one as under 'fsdp'; or a
  # tuple with an axis name or None for each axis of the parameter.
  partitioning.rules = (
      ('blocks/.*/(query|key|value|in|gate)/(kernel|bias)$', 'column'),
      # A fused qkv is one of rows only where it is kept, see models/vit.py.
      ('blocks/.*/(qkv|out)/kernel$', 'row'),
      ('.*', 'fsdp'),
  )
  # Parameters with fewer elements than this stay whole under 'fsdp'.
  partitioning.fsdp_min_size = 2**14
  return partitioning


def _train() -> ml_collections.ConfigDict:
  train = ml_collections.ConfigDict()
  train.num_steps = 1000
  # Workdir of a run of the same model, whose newest averaged parameters a new
  # run starts from: stage 1 of a stage 2. '' starts from random and pretrained
  # ones.
  train.init_from = ''
  train.log_every_steps = 20
  # 0 evaluates only at the end.
  train.eval_every_steps = 500
  train.checkpoint_every_steps = 250
  # Newest checkpoints kept, >= 1, beside the one with the best eval PSNR.
  train.keep_checkpoints = 2
  # Steps in a row with a non-finite loss or gradient after which it stops.
  train.max_bad_steps = 10
  # (first, last) step of a profiler trace under workdir/profile; () is none.
  train.profile_steps = ()
  # Folder of compiled programs, reused by later runs; '' switches it off.
  train.compilation_cache = '~/.cache/fsq_jax'
  return train


def _eval() -> ml_collections.ConfigDict:
  evaluation = ml_collections.ConfigDict()
  # Images in the reconstruction grid.
  evaluation.num_grid_images = 24
  # --mode=eval alone: take images of a folder or tfds whole, at the size that
  # data.resize_shorter gives them, in place of crops of data.image_size.
  evaluation.native_size = False
  # Files of weights by which reconstructions are measured too, each under its
  # name; '' measures nothing. LPIPS and fd_vgg16: experiments/weights. rfid:
  # Inception-v3 of pytorch-fid as safetensors; rfid_tf1: the same file, images
  # resized as by torch-fidelity and the ADM suite. fd_encoder: a directory as
  # for a pretrained encoder.
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
  # --mode=tokenize: split of `data`, 'train' or 'eval'.
  tokenize.split = 'eval'
  # Views of each image, >= 1. 1 is the crop that evaluation takes, for 'photos'
  # of split 'train' a regular grid of crops; N >= 2 are N random ones, with
  # crop_scale and flip of `data` as in training, drawn by `seed`.
  tokenize.views = 1
  # 'crop' to data.image_size, as evaluation does, or 'pad', which keeps all
  # pixels, for one view: grids then differ in size as images do.
  tokenize.fit = 'crop'
  # Files: 'array_record', for random access, or 'npz', for any program.
  tokenize.storage = 'array_record'
  # Images of the source a file, >= 1. A run that is stopped loses the files
  # that it was at.
  tokenize.images_per_shard = 4096
  return tokenize
