"""What fields of losses, discriminators and frozen networks may hold."""

from collections.abc import Iterator, Mapping

from fsq_jax.configuration import rules

# Of the `optim` sections of the model and of the discriminator.
ADAMW: Mapping[str, rules.Rule] = {
    'learning_rate': rules.POSITIVE,
    'end_learning_rate': rules.NOT_NEGATIVE,
    'warmup_steps': rules.COUNT_OR_ZERO,
    'b1': rules.DECAY,
    'b2': rules.DECAY,
    'eps': rules.POSITIVE,
    'weight_decay': rules.NOT_NEGATIVE,
    'clip_norm': rules.NOT_NEGATIVE,
}
_DISCRIMINATOR = {
    'name': rules.name('none', 'patch', 'stylegan', 'dino'),
    'loss': rules.name('hinge', 'non_saturating', 'vanilla'),
    'start_step': rules.COUNT_OR_ZERO,
    'r1_weight': rules.NOT_NEGATIVE,
    'r1_every_steps': rules.COUNT,
    'lecam_weight': rules.NOT_NEGATIVE,
    'lecam_decay': rules.DECAY,
    'augment_probability': rules.SHARE,
    'augment_cutout': rules.SHARE,
    'uint8_fakes': rules.BOOL,
    'patch.channels': rules.Rule(
        'a multiple of 32', lambda x: rules.COUNT.fits(x) and x % 32 == 0
    ),
    'patch.num_stages': rules.COUNT,
    'patch.downsampling': rules.name('average', 'blur'),
    'patch.grid_size': rules.COUNT,
    'stylegan.filters': rules.COUNT,
    'stylegan.multipliers': rules.tuple_of(
        'a tuple of integers >= 1, one for each block',
        rules.COUNT,
        rules.ANY_LENGTH,
    ),
    'stylegan.downsampling': rules.name('average', 'blur'),
    'dino.checkpoint': rules.TEXT,
    'dino.architecture': rules.NON_EMPTY,
    'dino.image_size': rules.tuple_of(
        '(height, width) in pixels, integers >= 1', rules.COUNT, (2,)
    ),
    'dino.blocks': rules.tuple_of(
        'a tuple of integers >= 0', rules.COUNT_OR_ZERO, rules.ANY_LENGTH
    ),
    'dino.dtype': rules.name('float32', 'bfloat16'),
    'dino.remat': rules.BOOL,
    'dino.kernel_size': rules.Rule(
        'an odd integer >= 1', lambda x: rules.COUNT.fits(x) and x % 2 == 1
    ),
    **{f'optim.{name}': rule for name, rule in ADAMW.items()},
}
_EVAL_NETWORKS = (
    'lpips_alexnet', 'lpips_vgg16', 'rfid', 'rfid_tf1', 'fd_vgg16',
    'fd_encoder',
)
# Every field of those sections of configs/default.py.
FIELDS: Mapping[str, rules.Rule] = {
    'losses.perceptual.name': rules.name(
        'none', 'lpips_vgg16', 'lpips_alexnet', 'convnext', 'resnet50',
        'vit',
    ),
    'losses.perceptual.weight': rules.NOT_NEGATIVE,
    'losses.perceptual.checkpoint': rules.TEXT,
    'losses.perceptual.dtype': rules.name('float32', 'bfloat16'),
    'losses.adversarial.loss': rules.name(
        'hinge', 'non_saturating', 'vanilla'
    ),
    'losses.adversarial.weight': rules.NOT_NEGATIVE,
    'losses.adversarial.weighting': rules.name('fixed', 'adaptive'),
    'losses.adversarial.start_step': rules.COUNT_OR_ZERO,
    'losses.adversarial.ramp_steps': rules.COUNT_OR_ZERO,
    **{f'discriminator.{name}': rule for name, rule in _DISCRIMINATOR.items()},
    **{f'eval.networks.{name}': rules.TEXT for name in _EVAL_NETWORKS},
}


def weight_rules() -> Iterator[rules.CrossRule]:
  """Yields the rules on files of the networks that training reads."""
  made = 'experiments/weights says how to get one'
  yield rules.CrossRule(
      ('losses.perceptual.name', 'losses.perceptual.checkpoint'),
      f"'none', or a file of the network's weights ({made}); set"
      ' --config.losses.perceptual.checkpoint',
      lambda name, path: name == 'none' or path != '',
  )
  yield rules.CrossRule(
      ('discriminator.name', 'discriminator.dino.checkpoint'),
      "with 'dino' the directory of a DINO ViT-S/8; set"
      ' --config.discriminator.dino.checkpoint',
      lambda name, path: name != 'dino' or path != '',
  )


def cross_rules() -> Iterator[rules.CrossRule]:
  """Yields the rules between steps at which losses and networks start."""
  yield rules.CrossRule(
      (
          'discriminator.name',
          'discriminator.start_step',
          'losses.adversarial.start_step',
          'train.num_steps',
      ),
      'an adversarial loss that starts no sooner than the discriminator, and'
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
