"""Rules between fields of different sections, which no constructor checks."""

from collections.abc import Collection, Iterator
import math
import os

from fsq_jax.configuration import rules
from fsq_jax.workdir import trackers

# Inputs that not every mode uses: 'images'; 'initialization', the weights and
# the run that a new run is initialized from; 'training', the networks of the
# losses and the size of training batches.
INPUTS = frozenset({'images', 'initialization', 'training'})
# Fields that need RGB images, unless they have these values.
_RGB_ONLY = {
    'data.color_jitter': 0,
    'losses.perceptual.name': 'none',
    'eval.networks.lpips_alexnet': '',
    'eval.networks.lpips_vgg16': '',
    'eval.networks.rfid': '',
    'eval.networks.rfid_tf1': '',
    'eval.networks.fd_vgg16': '',
    'eval.networks.fd_encoder': '',
}
# Sources of images in the folder data.data_dir.
_FOLDERS = ('folder', 'webdataset', 'arrays')
_MESH = tuple(
    f'partitioning.mesh.{axis}' for axis in ('data', 'fsdp', 'tensor')
)


def cross_rules(
    num_devices: int | None, uses: Collection[str] = INPUTS
) -> Iterator[rules.CrossRule]:
  """Yields the rules between fields.

  Args:
    num_devices: devices of all processes; None omits the rules that depend on
      it.
    uses: the inputs in use; rules on other inputs are omitted.
  """
  yield from _data_rules()
  yield from _channel_rules()
  if 'images' in uses:
    yield rules.CrossRule(
        ('data.source', 'data.data_dir'),
        f'with {_FOLDERS} an existing folder as data_dir; set'
        ' --config.data.data_dir',
        lambda source, folder: (
            source not in _FOLDERS or os.path.isdir(os.path.expanduser(folder))
        ),
    )
    yield rules.CrossRule(
        ('data.source', 'data.name', 'data.data_dir'),
        "with 'parquet' an existing folder as data_dir, or 'owner/name' of a"
        ' data set on the Hugging Face Hub as name',
        lambda source, name, folder: (
            source != 'parquet'
            or '/' in name
            or (not name and os.path.isdir(os.path.expanduser(folder)))
        ),
    )
  yield from _optim_rules('optim')
  yield from _step_rules()
  yield from _discriminator_rules()
  if 'training' in uses:
    yield from _network_rules()
    yield from _tracker_rules()
  yield from _batch_rules(num_devices, 'data', 'training' in uses)


def generator_rules(
    num_devices: int | None, mode: str
) -> Iterator[rules.CrossRule]:
  """Yields the rules between fields of generator configs.

  Args:
    num_devices: as in `cross_rules`.
    mode: of launch.py.
  """
  yield from _optim_rules('optim')
  yield from _step_rules()
  yield rules.CrossRule(
      ('tokens.tokenizer', 'tokens.train', 'tokens.eval'),
      'a tokenizer, or the folders of training and held-out token files',
      lambda tokenizer, *folders: bool(tokenizer) or all(folders),
  )
  yield rules.CrossRule(
      ('tokens.tokenizer', 'eval.num_samples'),
      'num_samples 0 without a tokenizer, which decodes samples',
      lambda tokenizer, num_samples: bool(tokenizer) or not num_samples,
  )
  yield rules.CrossRule(
      (
          'eval.num_samples',
          'eval.networks.inception',
          'eval.networks.inception_tf1',
          'eval.networks.vgg16',
      ),
      'num_samples 0 without networks, else 4 or more, which precision and'
      ' recall need, and 10 or more with an Inception network for its score',
      lambda num_samples, *networks: (
          num_samples >= (10 if any(networks[:2]) else 4)
          or not (num_samples or any(networks))
      ),
  )
  yield rules.CrossRule(
      ('model.class_conditional', 'losses.class_dropout'),
      'a class_dropout > 0 only with class_conditional',
      lambda conditional, dropout: conditional or not dropout,
  )
  yield rules.CrossRule(
      (
          'sample.guidance.scale',
          'model.class_conditional',
          'losses.class_dropout',
      ),
      'a guidance.scale other than 1 only with class_conditional and a'
      ' class_dropout > 0, which trains the model without a class',
      lambda scale, conditional, dropout: (
          scale == 1 or (conditional and dropout > 0)
      ),
  )
  if mode == 'train':
    yield from _tracker_rules()
  if mode != 'generate':  # Its batches are filled up.
    yield from _batch_rules(num_devices, 'tokens', mode == 'train')


def _batch_rules(
    num_devices: int | None, section: str, trains: bool
) -> Iterator[rules.CrossRule]:
  """Yields the rules on the mesh, and on the batch sizes of a section."""
  yield rules.CrossRule(
      _MESH, 'at most one -1', lambda *sizes: sizes.count(-1) <= 1
  )
  if num_devices is not None:
    yield from _device_rules(num_devices, section, trains)
  else:
    yield rules.CrossRule(
        (f'{section}.batch_size', 'optim.accumulation_steps'),
        'a batch_size that is a multiple of accumulation_steps',
        lambda size, parts: size % parts == 0,
    )


def _data_rules() -> Iterator[rules.CrossRule]:
  yield rules.CrossRule(
      ('data.source', 'data.name', 'data.data_dir'),
      "with 'tfds' a name, or the folder of a prepared version as data_dir",
      lambda source, name, folder: source != 'tfds' or bool(name or folder),
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
      ('data.image_sizes', 'data.image_size'),
      '() or a tuple with image_size, the size of the main evaluation and of'
      ' token files',
      lambda sizes, size: not sizes or size in sizes,
  )
  yield rules.CrossRule(
      ('data.resize_shorter', 'data.image_sizes', 'data.allow_upscaling'),
      'a resize_shorter of 0 or of at least the longest side of image_sizes;'
      ' --config.data.allow_upscaling allows less',
      lambda length, sizes, allowed: (
          not length or allowed or length >= max(map(max, sizes), default=0)
      ),
  )
  yield rules.CrossRule(
      ('data.image_sizes', 'data.source'),
      "() with 'digits', whose images are one handwritten digit each: smaller"
      ' crops would cut it',
      lambda sizes, source: not sizes or source != 'digits',
  )
  yield rules.CrossRule(
      ('eval.native_size', 'data.source'),
      f"native_size only with data.source 'tfds', 'parquet' or {_FOLDERS}",
      lambda native, source: (
          not native or source in (*_FOLDERS, 'tfds', 'parquet')
      ),
  )
  yield rules.CrossRule(
      ('data.source', 'data.flip'),
      "with 'digits' flip False, since a mirrored 2 is no 2; set"
      ' --config.data.flip=False',
      lambda source, flip: source != 'digits' or not flip,
  )
  yield rules.CrossRule(
      ('tokenize.views', 'tokenize.fit'),
      "more than one view (random crops) only with fit 'crop'",
      lambda views, fit: views == 1 or fit == 'crop',
  )


def _channel_rules() -> Iterator[rules.CrossRule]:
  """Yields the rules on images that are grey or RGBA."""
  for name, off in _RGB_ONLY.items():
    yield rules.CrossRule(
        (name, 'data.channels'),
        f'{off!r}, or with RGB images, data.channels 3',
        lambda value, channels, off=off: channels == 3 or value == off,
    )
  yield rules.CrossRule(
      ('discriminator.name', 'data.channels'),
      "'dino' only with RGB images, data.channels 3; 'patch' and 'stylegan'"
      ' take any',
      lambda name, channels: channels == 3 or name != 'dino',
  )
  yield rules.CrossRule(
      (
          'discriminator.augment_probability',
          'discriminator.name',
          'data.channels',
      ),
      '0 with data.channels 4: DiffAugment would change alpha as a colour',
      lambda probability, name, channels: (
          channels != 4 or name == 'none' or not probability
      ),
  )


def _optim_rules(section: str) -> Iterator[rules.CrossRule]:
  yield rules.CrossRule(
      (f'{section}.end_learning_rate', f'{section}.learning_rate'),
      'end_learning_rate <= learning_rate',
      lambda end, peak: end <= peak,
  )


def _step_rules() -> Iterator[rules.CrossRule]:
  """Yields the rules between numbers of steps."""
  yield rules.CrossRule(
      ('optim.warmup_steps', 'train.num_steps'),
      'warmup_steps < num_steps',
      lambda warmup_steps, num_steps: warmup_steps < num_steps,
  )
  yield rules.CrossRule(
      ('train.profile_steps', 'train.num_steps'),
      '() or first <= last <= num_steps',
      lambda steps, num_steps: (
          not steps or steps[0] <= steps[1] <= num_steps
      ),
  )


def _discriminator_rules() -> Iterator[rules.CrossRule]:
  yield from _optim_rules('discriminator.optim')
  yield rules.CrossRule(
      (
          'discriminator.name',
          'discriminator.start_step',
          'losses.adversarial.start_step',
          'train.num_steps',
      ),
      'an adversarial loss that starts with the discriminator or later, and'
      ' before num_steps',
      lambda name, discriminator, decoder, num_steps: (
          name == 'none' or discriminator <= decoder < num_steps
      ),
  )
  yield rules.CrossRule(
      (
          'discriminator.name',
          'discriminator.start_step',
          'discriminator.optim.warmup_steps',
          'train.num_steps',
      ),
      'start_step + warmup_steps < num_steps',
      lambda name, start, warmup_steps, num_steps: (
          name == 'none' or start + warmup_steps < num_steps
      ),
  )


def _network_rules() -> Iterator[rules.CrossRule]:
  """Yields the rules on the networks of losses; frozen ones are not random."""
  yield rules.CrossRule(
      ('losses.perceptual.name', 'losses.perceptual.checkpoint'),
      "'none', or a file of the network's weights (see experiments/weights);"
      ' set --config.losses.perceptual.checkpoint',
      lambda name, path: name == 'none' or path != '',
  )
  yield rules.CrossRule(
      ('discriminator.name', 'discriminator.dino.checkpoint'),
      "with 'dino' the directory of a DINO ViT-S/8; set"
      ' --config.discriminator.dino.checkpoint',
      lambda name, path: name != 'dino' or path != '',
  )
  yield rules.CrossRule(
      ('data.image_sizes', 'discriminator.name'),
      "() with 'stylegan', whose parameters fix the size of images; 'patch' and"
      " 'dino' take several sizes",
      lambda sizes, name: not sizes or name != 'stylegan',
  )
  yield rules.CrossRule(
      (
          'losses.distillation_weight',
          'model.encoder.name',
          'model.encoder.checkpoint',
          'train.init_from',
      ),
      'distillation_weight 0, or a teacher: a model.encoder.checkpoint of an'
      " encoder 'pretrained', or a stage 1 in train.init_from",
      lambda weight, name, checkpoint, run: (
          not weight or run or (name == 'pretrained' and checkpoint)
      ),
  )


def _tracker_rules() -> Iterator[rules.CrossRule]:
  """Yields the rules on the packages of trackers."""
  for name, package in trackers.PACKAGES.items():
    yield rules.CrossRule(
        ('train.trackers',),
        f'{name!r} only where it is installed; run: pip install {package}',
        lambda names, name=name: (
            name not in names or trackers.is_installed(name)
        ),
    )


def _device_rules(
    num_devices: int, section: str, trains: bool
) -> Iterator[rules.CrossRule]:

  def fills(*sizes: int) -> bool:
    return (
        num_devices % abs(math.prod(sizes)) == 0
        if -1 in sizes
        else num_devices == math.prod(sizes)
    )

  def divides(num_images: int, *sizes: int) -> bool:
    if not fills(*sizes):
      return True  # The rule on the mesh reports it.
    *others, tensor = sizes
    if tensor == -1:
      tensor = num_devices // math.prod(others)
    return num_images % (num_devices // tensor) == 0

  if trains:
    yield rules.CrossRule(
        (f'{section}.batch_size', 'optim.accumulation_steps', *_MESH),
        f'a batch_size that is a multiple of {num_devices} devices times'
        ' accumulation_steps, over partitioning.mesh.tensor',
        lambda size, parts, *sizes: (
            size % parts == 0 and divides(size // parts, *sizes)
        ),
    )
  yield rules.CrossRule(
      (f'{section}.eval_batch_size', *_MESH),
      f'a multiple of {num_devices} devices, over partitioning.mesh.tensor',
      divides,
  )
  yield rules.CrossRule(
      _MESH,
      f'sizes that multiply to {num_devices} devices; -1 is all remaining'
      ' devices',
      fills,
  )
