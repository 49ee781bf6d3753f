"""The schema of configs: allowed values and role of every field.

A new field is a row here, and a line with its default in configs/default.py.
Rows have the type of a field, and its range unless a constructor checks it:
`loading.check_config` calls the constructors of quantizers and models.
"""

from collections.abc import Callable, Mapping
import enum
from typing import Any, NamedTuple

from fsq_jax.configuration import rules
from fsq_jax.workdir import trackers
from fsq_jax.workdir import urls

# Side in pixels of the window of SSIM, which has to fit into the images.
_SSIM_WINDOW = 11


class Role(enum.Enum):
  """Effect of a field, and whether a run may resume with another value.

  Attributes:
    MODEL: variables of the model, or the meaning of its codes. Never.
    STATE: other arrays of the train state. Never.
    TRAINING: result of training. With --allow_config_change.
    START: initialization of a new run. Always.
    RUNTIME: evaluation, devices, logging, checkpoints, speed of the input,
      none of which changes the result of training. Always.
  """

  MODEL = enum.auto()
  STATE = enum.auto()
  TRAINING = enum.auto()
  START = enum.auto()
  RUNTIME = enum.auto()


class Field(NamedTuple):
  """A row of the schema.

  Attributes:
    rule: the allowed values.
    role: effect of the value.
    presence: effect of whether the value is set (not '' or 0), if it differs.
    added: for a field that earlier versions did not have, a function from its
      section to the value that they used.
    upgrade: for a field that was a bool in earlier versions, a function from
      the bool to the value that has the same effect.
  """

  rule: rules.Rule
  role: Role
  presence: Role | None = None
  added: Callable[[Mapping[str, Any]], Any] | None = None
  upgrade: Callable[[bool], Any] | None = None


_Rows = Mapping[str, rules.Rule | Field]


def section(prefix: str, role: Role, rows: _Rows) -> dict[str, Field]:
  """Returns rows by dotted name; a plain rule gets the role of the section."""
  return {
      f'{prefix}.{name}': row if isinstance(row, Field) else Field(row, role)
      for name, row in rows.items()
  }


def training(rule: rules.Rule) -> Field:
  """Returns a row with the role TRAINING."""
  return Field(rule, Role.TRAINING)


def runtime(rule: rules.Rule) -> Field:
  """Returns a row with the role RUNTIME."""
  return Field(rule, Role.RUNTIME)


# Earlier versions had a bool: whether to recompute blocks.
REMAT = Field(
    rules.REMAT,
    Role.TRAINING,
    upgrade=lambda x: {False: 'none', True: 'blocks'}[x],
)
_INTEGERS = rules.tuple_of('a tuple of integers', rules.INTEGER)
_OPTIONAL_NUMBER = rules.optional(rules.NUMBER)
_FSQ = {
    'levels': _INTEGERS,
    'convention': rules.TEXT,
    'bound': rules.TEXT,
    'eps': _OPTIONAL_NUMBER,
    'commitment_weight': training(_OPTIONAL_NUMBER),
    'bins': rules.TEXT,
    'noise': training(rules.NUMBER),
    'noise_per': training(rules.TEXT),
    'diversity_weight': Field(
        rules.NUMBER, Role.TRAINING, added=lambda _: 0.0
    ),
}
_LFQ = {
    'num_bits': rules.INTEGER,
    'bit_order': rules.TEXT,
    'commitment_weight': training(rules.NUMBER),
    'entropy_weight': training(rules.NUMBER),
    'diversity_weight': training(rules.NUMBER),
    'temperature': training(rules.NUMBER),
    'entropy_group_bits': training(rules.INTEGER),
}
_CODEBOOK = {
    # Usage and perplexity of a single code are meaningless.
    'codebook_size': rules.integer(2),
    'code_dim': rules.INTEGER,
    'metric': rules.TEXT,
    'gradient': training(rules.TEXT),
    'commitment_weight': training(rules.NUMBER),
}
# The sections model.quantizer.NAME. Constructors check ranges.
QUANTIZERS: Mapping[str, _Rows] = {
    'fsq': _FSQ,
    'grouped_fsq': {**_FSQ, 'num_groups': rules.INTEGER},
    'residual_fsq': {
        'levels': _INTEGERS,
        'num_stages': rules.INTEGER,
        'stage_dropout': training(rules.NUMBER),
    },
    'lfq': _LFQ,
    'bsq': _LFQ,
    'vq': {
        **_CODEBOOK,
        'codebook_update': rules.TEXT,
        'decay': training(rules.NUMBER),
        'codebook_init': rules.TEXT,
        'restart': training(rules.TEXT),
        'dead_share': training(rules.NUMBER),
        'entropy_weight': training(rules.NUMBER),
    },
    'simvq': {
        **_CODEBOOK,
        'weighting': training(rules.TEXT),
        'input_projection': rules.TEXT,
    },
    'none': {'code_dim': rules.INTEGER},
}
_IMAGE_SIZE = rules.tuple_of(
    f'(height, width) in pixels, integers >= {_SSIM_WINDOW}, the window of'
    ' SSIM',
    rules.integer(_SSIM_WINDOW),
    (2,),
)
_DATA = {
    'source': rules.name(
        'photos', 'public_domain_photos', 'digits', 'tfds', 'folder',
        'webdataset', 'parquet', 'arrays', 'synthetic',
    ),
    'name': rules.TEXT,
    'data_dir': rules.PATH,
    'train_split': rules.NON_EMPTY,
    'eval_split': rules.NON_EMPTY,
    'image_size': Field(_IMAGE_SIZE, Role.MODEL),
    'image_sizes': Field(
        rules.Rule(
            '() or a tuple of two or more different (height, width) in pixels,'
            f' integers >= {_SSIM_WINDOW}',
            lambda x: (
                rules.tuple_of('', _IMAGE_SIZE).fits(x)
                and len(set(x)) == len(x) != 1
            ),
        ),
        Role.TRAINING,
        added=lambda _: (),
    ),
    'channels': Field(
        rules.Rule(
            '1 (grey), 3 (RGB) or 4 (RGBA)',
            lambda x: type(x) is int and x in (1, 3, 4),
        ),
        Role.MODEL,
        added=lambda _: 3,
    ),
    'batch_size': rules.COUNT,
    'eval_batch_size': runtime(rules.COUNT),
    'resize_shorter': rules.COUNT_OR_ZERO,
    'allow_upscaling': Field(
        rules.BOOL,
        Role.RUNTIME,
        added=lambda data: (
            0
            < data.get('resize_shorter', 0)
            < max(data.get('image_size', (0,)))
        ),
    ),
    'crop_scale': rules.Rule(
        '(min, max), finite numbers with 0 < min <= max',
        lambda x: (
            rules.tuple_of('', rules.POSITIVE, (2,)).fits(x) and x[0] <= x[1]
        ),
    ),
    'flip': rules.BOOL,
    'color_jitter': rules.FRACTION,
    'label_names': Field(
        rules.Rule(
            'a tuple of different names, strings',
            lambda x: (
                rules.tuple_of('', rules.NON_EMPTY).fits(x)
                and len(set(x)) == len(x)
            ),
        ),
        Role.RUNTIME,
        added=lambda _: (),
    ),
    'max_damaged_share': rules.FRACTION,
    'cache_mib': runtime(rules.COUNT_OR_ZERO),
    'num_threads': runtime(rules.COUNT),
    'prefetch': runtime(rules.COUNT),
}
_VIT = {
    'patch_size': rules.COUNT,
    'width': rules.COUNT,
    'depth': rules.COUNT,
    'num_heads': rules.COUNT,
    'mlp_dim': rules.COUNT,
    'position': rules.name('learned', 'sincos'),
}
_CONV = {
    'conv.filters': rules.COUNT,
    'conv.channel_multipliers': rules.tuple_of(
        'a tuple of at least one integer >= 1, one for each level',
        rules.COUNT,
        range(1, rules.MAX_INT32),
    ),
    'conv.num_res_blocks': rules.COUNT,
    'conv.latent_width': rules.COUNT_OR_ZERO,
    'conv.pixel_range': Field(
        rules.Rule(
            '(low, high), finite numbers with low < high',
            lambda x: (
                rules.tuple_of('', rules.NUMBER, (2,)).fits(x) and x[0] < x[1]
            ),
        ),
        Role.MODEL,
        added=lambda _: (-1.0, 1.0),
    ),
}
_ENCODER = {
    'name': rules.name('conv', 'pretrained', 'vit'),
    **_VIT,
    **_CONV,
    'architecture': rules.NON_EMPTY,
    # None in config files that need this path, as is train.init_from.
    'checkpoint': Field(
        rules.path(
            "a path, or '' for random weights; set"
            ' --config.model.encoder.checkpoint'
        ),
        Role.START,
    ),
    'image_size': rules.tuple_of(
        '() or (height, width) in pixels, integers >= 1', rules.COUNT, (0, 2)
    ),
    'resize': rules.name(
        'bicubic', 'bicubic_antialias', 'bilinear', 'bilinear_align_corners'
    ),
    'final_affine': rules.BOOL,
}
_DECODER = {
    'name': rules.name('conv', 'mae', 'vit'),
    **_VIT,
    **_CONV,
    'mae.checkpoint': Field(rules.PATH, Role.START),
    'mae.preset': rules.name('none', 'B', 'L', 'XL'),
    'mae.input_width': rules.COUNT,
    'mae.grid_size': rules.tuple_of(
        '() or (rows, columns), integers >= 1', rules.COUNT, (0, 2)
    ),
    'mae.normalization': rules.name(
        'none', 'siglip', 'siglip_big_vision', 'dino', 'dinov2',
        'dinov2_with_registers', 'dinov3', 'mae',
    ),
}
_BOUND = rules.name('none', 'tanh')
_MODEL = {
    **{f'encoder.{name}': row for name, row in _ENCODER.items()},
    'latent_statistics': Field(rules.PATH, Role.START, presence=Role.MODEL),
    'latent_noise': training(rules.NOT_NEGATIVE),
    'projector_in.name': rules.name(
        'linear', 'standardized', 'mlp', 'attention', 'none'
    ),
    'projector_in.mlp.width': rules.COUNT,
    'projector_in.mlp.bound': _BOUND,
    'projector_in.attention.width': rules.COUNT,
    'projector_in.attention.bound': _BOUND,
    'projector_in.attention.depth': rules.COUNT,
    'projector_in.attention.num_heads': rules.COUNT,
    'projector_in.attention.mlp_dim': rules.COUNT,
    'quantizer.name': rules.name(*QUANTIZERS),
    **{
        f'quantizer.{quantizer}.{name}': row
        for quantizer, rows in QUANTIZERS.items()
        for name, row in rows.items()
    },
    'projector_out.name': rules.name(
        'linear', 'mlp', 'fourier', 'levels', 'none'
    ),
    'projector_out.fourier.num_frequencies': rules.COUNT,
    'projector_out.fourier.sigma': rules.POSITIVE,
    **{f'decoder.{name}': row for name, row in _DECODER.items()},
    'dtype': training(rules.DTYPE),
    'remat': REMAT,
    'scan_unroll': training(rules.COUNT),
}
_GAN_LOSS = rules.name('hinge', 'non_saturating', 'vanilla')
_LOSSES = {
    'reconstruction': rules.name('l1', 'l2'),
    'reconstruction_weight': rules.NOT_NEGATIVE,
    'quantizer_weight': rules.NOT_NEGATIVE,
    # A weight > 0 adds the parameters of the teacher to the state.
    'distillation_weight': Field(
        rules.NOT_NEGATIVE, Role.TRAINING, presence=Role.STATE
    ),
    'perceptual.name': rules.name(
        'none', 'lpips_vgg16', 'lpips_alexnet', 'convnext', 'resnet50', 'vit'
    ),
    'perceptual.weight': rules.NOT_NEGATIVE,
    # A resumed run compares the weights, not the path.
    'perceptual.checkpoint': runtime(rules.PATH),
    'perceptual.dtype': Field(
        rules.DTYPE, Role.TRAINING, added=lambda _: 'float32'
    ),
    'adversarial.loss': _GAN_LOSS,
    'adversarial.weight': rules.NOT_NEGATIVE,
    'adversarial.weighting': rules.name('fixed', 'adaptive'),
    'adversarial.start_step': rules.COUNT_OR_ZERO,
    'adversarial.ramp_steps': rules.COUNT_OR_ZERO,
}
_ADAMW = {
    'learning_rate': rules.POSITIVE,
    'end_learning_rate': rules.NOT_NEGATIVE,
    'warmup_steps': rules.COUNT_OR_ZERO,
    'b1': rules.DECAY,
    'b2': rules.DECAY,
    'eps': rules.POSITIVE,
    'weight_decay': rules.NOT_NEGATIVE,
    'clip_norm': rules.NOT_NEGATIVE,
}
_DOWNSAMPLING = rules.name('average', 'blur')
# The networks of discriminators are part of the train state.
_DISCRIMINATOR_NETWORK = {
    'name': rules.name('none', 'patch', 'stylegan', 'dino'),
    'patch.channels': rules.Rule(
        'a multiple of 32', lambda x: rules.COUNT.fits(x) and x % 32 == 0
    ),
    'patch.num_stages': rules.COUNT,
    'patch.downsampling': _DOWNSAMPLING,
    'patch.grid_size': rules.COUNT,
    'stylegan.filters': rules.COUNT,
    'stylegan.multipliers': rules.tuple_of(
        'a tuple of integers >= 1, one for each block', rules.COUNT
    ),
    'stylegan.downsampling': _DOWNSAMPLING,
    'dino.checkpoint': runtime(rules.PATH),
    'dino.architecture': rules.NON_EMPTY,
    'dino.image_size': rules.tuple_of(
        '(height, width) in pixels, integers >= 1', rules.COUNT, (2,)
    ),
    'dino.blocks': rules.tuple_of(
        'a tuple of integers >= 0', rules.COUNT_OR_ZERO
    ),
    'dino.kernel_size': rules.Rule(
        'an odd integer >= 1', lambda x: rules.COUNT.fits(x) and x % 2 == 1
    ),
    'dino.dtype': Field(rules.DTYPE, Role.TRAINING, added=lambda _: 'float32'),
    'dino.remat': REMAT,
}
_DISCRIMINATOR_TRAINING = {
    'loss': _GAN_LOSS,
    'start_step': rules.COUNT_OR_ZERO,
    'r1_weight': rules.NOT_NEGATIVE,
    'r1_every_steps': rules.COUNT,
    'lecam_weight': rules.NOT_NEGATIVE,
    'lecam_decay': rules.DECAY,
    'augment_probability': rules.FRACTION,
    'augment_cutout': rules.FRACTION,
    'uint8_fakes': rules.BOOL,
    **{f'optim.{name}': rule for name, rule in _ADAMW.items()},
}
OPTIM = {
    'name': Field(rules.name('adamw', 'muon'), Role.STATE),
    **_ADAMW,
    'accumulation_steps': rules.COUNT,
    'ema_decay': rules.DECAY,
    'learning_rate_factors': rules.tuple_of(
        'a tuple of (regular expression, finite number > 0)',
        rules.Rule('', rules.is_factor_rule),
    ),
}
_FROZEN = Field(
    rules.tuple_of(
        'a tuple of regular expressions', rules.Rule('', rules.is_expression)
    ),
    Role.STATE,
)
_MESH_SIZE = rules.Rule(
    'an integer >= 1, or -1 for all remaining devices',
    lambda x: (type(x) is int and x == -1) or rules.COUNT.fits(x),
)
PARTITIONING = {
    'mesh.data': _MESH_SIZE,
    'mesh.fsdp': _MESH_SIZE,
    'mesh.tensor': Field(_MESH_SIZE, Role.RUNTIME, added=lambda _: 1),
    'rules': rules.tuple_of(
        "a tuple of at least one (regular expression, strategy); strategies are"
        " 'column', 'fsdp', 'replicate', 'row' and tuples of 'data', 'fsdp',"
        " 'tensor' and None",
        rules.Rule('', rules.is_partition_rule),
        range(1, rules.MAX_INT32),
    ),
    'fsdp_min_size': rules.COUNT_OR_ZERO,
}
TRAIN = {
    'num_steps': rules.COUNT,
    'max_bad_steps': rules.COUNT,
    'log_every_steps': runtime(rules.COUNT),
    'eval_every_steps': runtime(rules.COUNT_OR_ZERO),
    'checkpoint_every_steps': runtime(rules.COUNT),
    'keep_checkpoints': runtime(rules.COUNT),
    'profile_steps': runtime(
        rules.tuple_of(
            '() or (first, last), integers >= 0', rules.COUNT_OR_ZERO, (0, 2)
        )
    ),
    'trackers': Field(
        rules.Rule(
            f'a tuple of names of {sorted(trackers.PACKAGES)}, each once',
            lambda x: (
                rules.tuple_of('', rules.name(*trackers.PACKAGES)).fits(x)
                and len(set(x)) == len(x)
            ),
        ),
        Role.RUNTIME,
        added=lambda _: (),
    ),
    # Not a PATH: it belongs to a machine, not to a run.
    'compilation_cache': runtime(
        rules.Rule(
            'a local folder, not a URL',
            lambda x: rules.TEXT.fits(x) and urls.find_scheme(x) is None,
        )
    ),
}
_INIT_FROM = Field(
    rules.path(
        "the workdir of stage 1 or of another run, a saved tokenizer,"
        " 'owner/name' of one on the Hugging Face Hub, the name of one that"
        " ships with fsq_jax, such as 'photos', or '' for a run without one;"
        ' set --config.train.init_from',
        takes_name=True,
        stores=urls.STORES,
    ),
    Role.START,
)
_EVAL = {
    'num_grid_images': rules.COUNT,
    'native_size': rules.BOOL,
    'networks.lpips_alexnet': rules.PATH,
    'networks.lpips_vgg16': rules.PATH,
    'networks.rfid': rules.PATH,
    'networks.rfid_tf1': rules.PATH,
    'networks.fd_vgg16': rules.PATH,
    'networks.fd_encoder': rules.PATH,
}


def _added(rule: rules.Rule, value: Any) -> Field:
  return Field(rule, Role.RUNTIME, added=lambda _: value)


_TOKENIZE = {
    'split': _added(rules.name('eval', 'train'), 'eval'),
    'views': _added(rules.COUNT, 1),
    'fit': _added(rules.name('crop', 'pad'), 'crop'),
    'storage': _added(rules.name('array_record', 'npz'), 'array_record'),
    'images_per_shard': _added(rules.COUNT, 4096),
}
# Every field of configs/default.py.
FIELDS: dict[str, Field] = {
    'seed': Field(rules.integer(0, 2**32 - 1), Role.TRAINING),
    **section('data', Role.TRAINING, _DATA),
    **section('model', Role.MODEL, _MODEL),
    **section('losses', Role.TRAINING, _LOSSES),
    **section('discriminator', Role.STATE, _DISCRIMINATOR_NETWORK),
    **section('discriminator', Role.TRAINING, _DISCRIMINATOR_TRAINING),
    **section('optim', Role.TRAINING, {**OPTIM, 'frozen': _FROZEN}),
    **section('partitioning', Role.RUNTIME, PARTITIONING),
    **section('train', Role.TRAINING, {**TRAIN, 'init_from': _INIT_FROM}),
    **section('eval', Role.RUNTIME, _EVAL),
    **section('tokenize', Role.RUNTIME, _TOKENIZE),
}
# Paths are absolute in the config of a run, which later commands use from other
# folders.
PATHS = tuple(name for name, field in FIELDS.items() if field.rule.is_path)
