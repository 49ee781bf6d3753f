"""What the fields of a config may hold, alone and together.

Those of quantizers are in `quantizer_rules`.
"""

from collections.abc import Collection, Iterator, Mapping
import math
import os

from fsq_jax.configuration import network_schema
from fsq_jax.configuration import quantizer_schema
from fsq_jax.configuration import rules

# Side in pixels of the window of SSIM, which has to fit into the images.
_SSIM_WINDOW = 11
_COUNT = rules.COUNT
_COUNT_OR_ZERO = rules.COUNT_OR_ZERO
_ANY_LENGTH = rules.ANY_LENGTH
_POSITIVE = rules.POSITIVE
_NOT_NEGATIVE = rules.NOT_NEGATIVE
_SHARE = rules.SHARE
_DECAY = rules.DECAY
_BOOL = rules.BOOL
_TEXT = rules.TEXT
# Config files that cannot do without them have None there.
_PRETRAINED_PATH = rules.Rule(
    "a path, or '' for random weights; set --config.model.encoder.checkpoint",
    _TEXT.fits,
)
_STAGE_1 = rules.Rule(
    "the workdir of stage 1, or '' for a run without one; set"
    ' --config.train.init_from',
    _TEXT.fits,
)
_MESH_SIZE = rules.Rule(
    'an integer >= 1, or -1 for all devices that are left',
    lambda x: (type(x) is int and x == -1) or _COUNT.fits(x),
)
_MESH = tuple(
    f'partitioning.mesh.{axis}' for axis in ('data', 'fsdp', 'tensor')
)
# Inputs that not every mode uses: 'images'; 'initialization', the weights and
# the run that a new run is initialized from; 'training', the networks of the
# losses and the size of training batches.
USES = frozenset({'images', 'initialization', 'training'})
# Fields that config files may leave as None, and the inputs that they name.
PLACEHOLDERS = {
    'data.data_dir': 'images',
    'model.encoder.checkpoint': 'initialization',
    'train.init_from': 'initialization',
}
_VIT = {
    'patch_size': _COUNT,
    'width': _COUNT,
    'depth': _COUNT,
    'num_heads': _COUNT,
    'mlp_dim': _COUNT,
    'position': rules.name('learned', 'sincos'),
}
_PRETRAINED = {
    'architecture': rules.NON_EMPTY,
    'checkpoint': _PRETRAINED_PATH,
    'image_size': rules.tuple_of(
        '() or (height, width) in pixels, integers >= 1', _COUNT, (0, 2)
    ),
    'resize': rules.name(
        'bicubic', 'bicubic_antialias', 'bilinear', 'bilinear_align_corners'
    ),
    'final_affine': _BOOL,
}
_MAE = {
    'checkpoint': _TEXT,
    'preset': rules.name('none', 'B', 'L', 'XL'),
    'input_width': _COUNT,
    'grid_size': rules.tuple_of(
        '() or (rows, columns), integers >= 1', _COUNT, (0, 2)
    ),
    'normalization': rules.name(
        'none', 'siglip', 'siglip_big_vision', 'dino', 'dinov2',
        'dinov2_with_registers', 'dinov3', 'mae',
    ),
}
_CONV = {
    'filters': _COUNT,
    'channel_multipliers': rules.tuple_of(
        'a tuple of at least one integer >= 1, one for each level',
        _COUNT,
        range(1, rules.MAX_INT32),
    ),
    'num_res_blocks': _COUNT,
    'latent_width': _COUNT_OR_ZERO,
}
# GroupNorm's.
_NUM_GROUPS = 32
_PROJECTOR_IN = {'width': _COUNT, 'bound': rules.name('none', 'tanh')}
_PROJECTORS = {
    'in.name': rules.name('linear', 'standardized', 'mlp', 'attention', 'none'),
    **{f'in.mlp.{name}': rule for name, rule in _PROJECTOR_IN.items()},
    **{f'in.attention.{name}': rule for name, rule in _PROJECTOR_IN.items()},
    'in.attention.depth': _COUNT,
    'in.attention.num_heads': _COUNT,
    'in.attention.mlp_dim': _COUNT,
    'out.name': rules.name('linear', 'mlp', 'fourier', 'levels', 'none'),
    'out.fourier.num_frequencies': _COUNT,
    'out.fourier.sigma': _POSITIVE,
}
# Every field of configs/default.py.
FIELDS: Mapping[str, rules.Rule] = {
    'seed': rules.integer(0, 2**32 - 1),
    'data.source': rules.name('photos', 'tfds', 'folder', 'synthetic'),
    'data.name': _TEXT,
    'data.data_dir': _TEXT,
    'data.train_split': rules.NON_EMPTY,
    'data.eval_split': rules.NON_EMPTY,
    'data.image_size': rules.tuple_of(
        f'(height, width) in pixels, integers >= {_SSIM_WINDOW}, the window of'
        ' SSIM',
        rules.integer(_SSIM_WINDOW),
        (2,),
    ),
    'data.batch_size': _COUNT,
    'data.eval_batch_size': _COUNT,
    'data.resize_shorter': _COUNT_OR_ZERO,
    'data.allow_upscaling': _BOOL,
    'data.crop_scale': rules.Rule(
        '(lowest, highest), finite numbers with 0 < lowest <= highest',
        lambda x: rules.tuple_of('', _POSITIVE, (2,)).fits(x) and x[0] <= x[1],
    ),
    'data.flip': _BOOL,
    'data.color_jitter': _SHARE,
    'data.label_names': rules.Rule(
        'a tuple of different names, strings',
        lambda x: (
            rules.tuple_of('', rules.NON_EMPTY, _ANY_LENGTH).fits(x)
            and len(set(x)) == len(x)
        ),
    ),
    'data.max_damaged_share': _SHARE,
    'data.cache_mib': _COUNT_OR_ZERO,
    'data.num_threads': _COUNT,
    'data.prefetch': _COUNT,
    'model.encoder.name': rules.name('conv', 'pretrained', 'vit'),
    **{f'model.encoder.{name}': rule for name, rule in _VIT.items()},
    **{f'model.encoder.{name}': rule for name, rule in _PRETRAINED.items()},
    **{f'model.encoder.conv.{name}': rule for name, rule in _CONV.items()},
    'model.latent_statistics': _TEXT,
    'model.latent_noise': _NOT_NEGATIVE,
    **{f'model.projector_{name}': rule for name, rule in _PROJECTORS.items()},
    'model.quantizer.name': rules.name(*quantizer_schema.FIELDS),
    **{
        f'model.quantizer.{quantizer}.{name}': rule
        for quantizer, fields in quantizer_schema.FIELDS.items()
        for name, rule in fields.items()
    },
    'model.decoder.name': rules.name('conv', 'mae', 'vit'),
    **{f'model.decoder.{name}': rule for name, rule in _VIT.items()},
    **{f'model.decoder.mae.{name}': rule for name, rule in _MAE.items()},
    **{f'model.decoder.conv.{name}': rule for name, rule in _CONV.items()},
    'model.dtype': rules.name('float32', 'bfloat16'),
    'model.remat': _BOOL,
    'model.scan_unroll': _COUNT,
    'losses.reconstruction': rules.name('l1', 'l2'),
    'losses.reconstruction_weight': _NOT_NEGATIVE,
    'losses.quantizer_weight': _NOT_NEGATIVE,
    'losses.distillation_weight': _NOT_NEGATIVE,
    **network_schema.FIELDS,
    'optim.name': rules.name('adamw', 'muon'),
    **{f'optim.{name}': rule for name, rule in network_schema.ADAMW.items()},
    'optim.accumulation_steps': _COUNT,
    'optim.ema_decay': _DECAY,
    'optim.frozen': rules.tuple_of(
        'a tuple of regular expressions',
        rules.Rule('', rules.is_expression),
        _ANY_LENGTH,
    ),
    'optim.learning_rate_factors': rules.tuple_of(
        'a tuple of (regular expression, finite number > 0)',
        rules.Rule('', rules.is_factor_rule),
        _ANY_LENGTH,
    ),
    'partitioning.mesh.data': _MESH_SIZE,
    'partitioning.mesh.fsdp': _MESH_SIZE,
    'partitioning.mesh.tensor': _MESH_SIZE,
    'partitioning.rules': rules.tuple_of(
        "a tuple of at least one (regular expression, strategy); strategies are"
        " 'column', 'fsdp', 'replicate', 'row' and tuples of 'data', 'fsdp',"
        " 'tensor' and None",
        rules.Rule('', rules.is_partition_rule),
        range(1, rules.MAX_INT32),
    ),
    'partitioning.fsdp_min_size': _COUNT_OR_ZERO,
    'train.num_steps': _COUNT,
    'train.init_from': _STAGE_1,
    'train.log_every_steps': _COUNT,
    'train.eval_every_steps': _COUNT_OR_ZERO,
    'train.checkpoint_every_steps': _COUNT,
    'train.keep_checkpoints': _COUNT,
    'train.max_bad_steps': _COUNT,
    'train.profile_steps': rules.tuple_of(
        '() or (first, last), integers >= 0', _COUNT_OR_ZERO, (0, 2)
    ),
    'train.compilation_cache': _TEXT,
    'eval.num_grid_images': _COUNT,
    'eval.native_size': _BOOL,
    'tokenize.split': rules.name('eval', 'train'),
    'tokenize.views': _COUNT,
    'tokenize.fit': rules.name('crop', 'pad'),
    'tokenize.storage': rules.name('array_record', 'npz'),
    'tokenize.images_per_shard': _COUNT,
}


def _vit_rules(part: str) -> Iterator[rules.CrossRule]:
  part = f'model.{part}'
  yield rules.CrossRule(
      ('data.image_size', f'{part}.patch_size', f'{part}.name'),
      'a patch_size that divides both sides of image_size',
      lambda size, patch, name: (
          name in ('conv', 'pretrained')
          or not any(side % patch for side in size)
      ),
  )
  yield rules.CrossRule(
      (f'{part}.width', f'{part}.num_heads'),
      'a width that is a multiple of num_heads',
      lambda width, num_heads: width % num_heads == 0,
  )
  yield rules.CrossRule(
      (f'{part}.width', f'{part}.position'),
      "a width that is a multiple of 4 with position 'sincos'",
      lambda width, position: position != 'sincos' or width % 4 == 0,
  )


def _conv_rules(part: str, projector: str) -> Iterator[rules.CrossRule]:
  multipliers = f'model.{part}.conv.channel_multipliers'
  yield rules.CrossRule(
      ('data.image_size', multipliers, f'model.{part}.name'),
      'an image_size whose sides halve once less than there are'
      ' channel_multipliers',
      lambda size, levels, name: (
          name != 'conv'
          or not any(side % 2 ** (len(levels) - 1) for side in size)
      ),
  )
  yield rules.CrossRule(
      (f'model.{part}.conv.filters', multipliers),
      'filters that times each of channel_multipliers are a multiple of'
      f' {_NUM_GROUPS}, the groups of GroupNorm',
      lambda filters, levels: not any(
          filters * level % _NUM_GROUPS for level in levels
      ),
  )
  yield rules.CrossRule(
      (
          f'model.{part}.name',
          f'model.{part}.conv.latent_width',
          f'model.{projector}.name',
      ),
      f"with 'conv' a latent_width >= 1, unless {projector} is 'none'",
      lambda name, width, projector: (
          name != 'conv' or width or projector == 'none'
      ),
  )


def _projector_rules() -> Iterator[rules.CrossRule]:
  yield rules.CrossRule(
      (
          'model.projector_in.name',
          'model.projector_in.attention.width',
          'model.projector_in.attention.num_heads',
      ),
      "with 'attention' a width that is a multiple of num_heads",
      lambda name, width, heads: name != 'attention' or width % heads == 0,
  )
  levels = sorted(
      quantizer_schema.FIELDS.keys() - quantizer_schema.WITHOUT_LEVELS
  )
  yield rules.CrossRule(
      ('model.projector_out.name', 'model.quantizer.name'),
      f"with 'levels' a quantizer whose codes have levels: {levels}",
      lambda name, quantizer: name != 'levels' or quantizer in levels,
  )


def cross_rules(
    num_devices: int | None, uses: Collection[str] = USES
) -> Iterator[rules.CrossRule]:
  """Yields the rules between fields.

  Args:
    num_devices: devices of all processes; None leaves out what depends on it.
    uses: those of `USES` that are used; rules on the others are left out.
  """
  yield from _vit_rules('encoder')
  yield from _vit_rules('decoder')
  yield from _conv_rules('encoder', 'projector_in')
  yield from _conv_rules('decoder', 'projector_out')
  yield from _projector_rules()
  yield from network_schema.cross_rules()
  if 'training' in uses:
    yield from _training_rules()
  yield rules.CrossRule(
      ('data.source', 'data.name', 'data.data_dir'),
      "with 'tfds' a name, or the folder of a prepared version as data_dir",
      lambda source, name, folder: source != 'tfds' or bool(name or folder),
  )
  if 'images' in uses:
    yield rules.CrossRule(
        ('data.source', 'data.data_dir'),
        "with 'folder' an existing folder as data_dir; set"
        ' --config.data.data_dir',
        lambda source, folder: (
            source != 'folder' or os.path.isdir(os.path.expanduser(folder))
        ),
    )
  yield rules.CrossRule(
      ('data.resize_shorter', 'data.image_size', 'data.allow_upscaling'),
      'a resize_shorter of 0 or of at least the longer side of image_size,'
      ' since smaller images are scaled up to image_size;'
      ' --config.data.allow_upscaling allows that',
      lambda length, size, allowed: (
          not length or allowed or length >= max(size)
      ),
  )
  yield rules.CrossRule(
      ('eval.native_size', 'data.source'),
      "with native_size 'folder' or 'tfds', whose images have a size",
      lambda native, source: not native or source in ('folder', 'tfds'),
  )
  yield rules.CrossRule(
      ('tokenize.views', 'tokenize.fit'),
      "more than one view, which is a random crop, with fit 'crop' alone",
      lambda views, fit: views == 1 or fit == 'crop',
  )
  yield rules.CrossRule(
      ('optim.warmup_steps', 'train.num_steps'),
      'warmup_steps < num_steps',
      lambda warmup_steps, num_steps: warmup_steps < num_steps,
  )
  for section in ('optim', 'discriminator.optim'):
    yield rules.CrossRule(
        (f'{section}.end_learning_rate', f'{section}.learning_rate'),
        'end_learning_rate <= learning_rate',
        lambda end, peak: end <= peak,
    )
  yield rules.CrossRule(
      ('train.profile_steps', 'train.num_steps'),
      '() or first <= last <= num_steps',
      lambda steps, num_steps: (
          not steps or steps[0] <= steps[1] <= num_steps
      ),
  )
  yield rules.CrossRule(
      _MESH, 'at most one -1', lambda *sizes: sizes.count(-1) <= 1
  )
  if num_devices is not None:
    yield from _device_rules(num_devices, uses)
    return
  yield rules.CrossRule(
      ('data.batch_size', 'optim.accumulation_steps'),
      'a batch_size that is a multiple of accumulation_steps',
      lambda size, parts: size % parts == 0,
  )


def _training_rules() -> Iterator[rules.CrossRule]:
  yield from network_schema.weight_rules()
  yield rules.CrossRule(
      (
          'losses.distillation_weight',
          'model.encoder.name',
          'model.encoder.checkpoint',
          'train.init_from',
      ),
      'for distillation something to stay close to, a model.encoder.checkpoint'
      " of an encoder 'pretrained' or a stage 1 in train.init_from",
      lambda weight, name, checkpoint, run: (
          not weight or run or (name == 'pretrained' and checkpoint)
      ),
  )


def _device_rules(
    num_devices: int, uses: Collection[str]
) -> Iterator[rules.CrossRule]:

  def fills(*sizes: int) -> bool:
    return (
        num_devices % abs(math.prod(sizes)) == 0
        if -1 in sizes
        else num_devices == math.prod(sizes)
    )

  def divides(num_images: int, *sizes: int) -> bool:
    if not fills(*sizes):
      return True  # Which is said of the mesh.
    *others, tensor = sizes
    if tensor == -1:
      tensor = num_devices // math.prod(others)
    return num_images % (num_devices // tensor) == 0

  if 'training' in uses:
    yield rules.CrossRule(
        ('data.batch_size', 'optim.accumulation_steps', *_MESH),
        f'a batch_size that is a multiple of {num_devices} devices times'
        ' accumulation_steps, over partitioning.mesh.tensor',
        lambda size, parts, *sizes: (
            size % parts == 0 and divides(size // parts, *sizes)
        ),
    )
  yield rules.CrossRule(
      ('data.eval_batch_size', *_MESH),
      f'a multiple of {num_devices} devices, over partitioning.mesh.tensor',
      divides,
  )
  yield rules.CrossRule(
      _MESH,
      f'sizes that multiply to {num_devices} devices, -1 taking what is left',
      fills,
  )
