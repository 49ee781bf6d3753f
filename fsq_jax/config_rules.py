"""What the fields of a config may hold, alone and together."""

from collections.abc import Callable, Container, Iterator, Mapping
import math
import os
import re
from typing import Any, NamedTuple

_MAX_INT32 = 2**31 - 1
_MAX_FLOAT32 = 3.4e38
# Side in pixels of the window of SSIM, which has to fit into the images.
_SSIM_WINDOW = 11


class Rule(NamedTuple):
  """What one field may hold.

  Attributes:
    allowed: the allowed values in words, as messages print them.
    fits: whether a value is one of them; takes values of any type.
  """

  allowed: str
  fits: Callable[[Any], bool]


class CrossRule(NamedTuple):
  """What several fields may hold together, each being allowed by itself.

  Attributes:
    fields: dotted names.
    allowed: the allowed combinations in words.
    fits: whether the values of the fields, in their order, are one of them.
  """

  fields: tuple[str, ...]
  allowed: str
  fits: Callable[..., bool]


def _integer(low: int, high: int = _MAX_INT32) -> Rule:
  # The type itself, since a bool is an instance of int.
  return Rule(
      f'an integer from {low} to {high}',
      lambda x: type(x) is int and low <= x <= high,
  )


def _number(condition: str, fits: Callable[[float], bool]) -> Rule:
  # NaN and infinity fail the comparison too.
  return Rule(
      f'a finite number {condition}'.rstrip(),
      lambda x: type(x) in (int, float) and abs(x) <= _MAX_FLOAT32 and fits(x),
  )


def _optional(rule: Rule) -> Rule:
  return Rule(f'None or {rule.allowed}', lambda x: x is None or rule.fits(x))


def _name(*names: str) -> Rule:
  return Rule(
      f'one of {sorted(names)}', lambda x: isinstance(x, str) and x in names
  )


def _tuple(allowed: str, element: Rule, lengths: Container[int]) -> Rule:
  return Rule(
      allowed,
      lambda x: (
          isinstance(x, tuple)
          and len(x) in lengths
          and all(map(element.fits, x))
      ),
  )


def _is_expression(value: Any) -> bool:
  try:
    return isinstance(value, str) and bool(re.compile(value))
  except re.error:
    return False


def _is_partition_rule(value: Any) -> bool:
  if not isinstance(value, tuple) or len(value) != 2:
    return False
  pattern, strategy = value
  if isinstance(strategy, tuple):
    known = all(axis in ('data', 'fsdp', None) for axis in strategy)
  else:
    known = strategy in ('replicate', 'fsdp')
  return known and _is_expression(pattern)


_COUNT = _integer(1)
_COUNT_OR_ZERO = _integer(0)
_ANY_LENGTH = range(_MAX_INT32)
_POSITIVE = _number('> 0', lambda x: x > 0)
_NOT_NEGATIVE = _number('>= 0', lambda x: x >= 0)
_SHARE = _number('in [0, 1]', lambda x: 0 <= x <= 1)
_DECAY = _number('in [0, 1)', lambda x: 0 <= x < 1)
_BOOL = Rule('True or False', lambda x: isinstance(x, bool))
_TEXT = Rule('a string', lambda x: isinstance(x, str))
_NON_EMPTY = Rule(
    'a string that is not empty', lambda x: isinstance(x, str) and x != ''
)
_MESH_SIZE = Rule(
    'an integer >= 1, or -1 for all devices that are left',
    lambda x: (type(x) is int and x == -1) or _COUNT.fits(x),
)
_VIT = {
    'name': _name('vit'),
    'patch_size': _COUNT,
    'width': _COUNT,
    'depth': _COUNT,
    'num_heads': _COUNT,
    'mlp_dim': _COUNT,
    'position': _name('learned', 'sincos'),
}
_LEVELS = _tuple(
    'a tuple of integers >= 2, one for each dimension',
    _integer(2),
    _ANY_LENGTH,
)
_FSQ = {
    'levels': _LEVELS,
    'convention': _name('symmetric', 'paper', 'vqp', 'preserve_symmetry'),
    'bound': _name('tanh', 'ifsq', 'clip'),
    'eps': _optional(_number('', lambda x: True)),
    'commitment_weight': _optional(_NOT_NEGATIVE),
    'bins': _name('rounded', 'equal'),
    'noise': _NOT_NEGATIVE,
    'noise_per': _name('element', 'example'),
}
_LFQ = {
    'num_bits': _integer(1, 30),
    'bit_order': _name('msb_first', 'lsb_first'),
    'commitment_weight': _NOT_NEGATIVE,
    'entropy_weight': _NOT_NEGATIVE,
    'diversity_weight': _NOT_NEGATIVE,
    'temperature': _POSITIVE,
    'entropy_group_bits': _integer(1, 16),
}
_CODEBOOK = {
    # Usage and perplexity of a single code say nothing.
    'codebook_size': _integer(2),
    'code_dim': _COUNT,
    'metric': _name('euclidean', 'cosine'),
    'gradient': _name('straight_through', 'rotation'),
    'commitment_weight': _NOT_NEGATIVE,
}
_QUANTIZERS = {
    'fsq': _FSQ,
    'grouped_fsq': {**_FSQ, 'num_groups': _COUNT},
    'residual_fsq': {
        'levels': _LEVELS,
        'num_stages': _COUNT,
        'stage_dropout': _SHARE,
    },
    'lfq': _LFQ,
    'bsq': _LFQ,
    'vq': {
        **_CODEBOOK,
        'codebook_update': _name('ema', 'gradient'),
        'decay': _DECAY,
        'codebook_init': _name('normal', 'kmeans'),
        'restart': _name('none', 'batch', 'split'),
        'dead_share': _DECAY,
        'entropy_weight': _NOT_NEGATIVE,
    },
    'simvq': {
        **_CODEBOOK,
        'weighting': _name('standard', 'legacy'),
        'input_projection': _name('none', 'linear'),
    },
}

# Every field of configs/default.py.
FIELDS: Mapping[str, Rule] = {
    'seed': _integer(0, 2**32 - 1),
    'data.source': _name('photos', 'tfds', 'folder', 'synthetic'),
    'data.name': _TEXT,
    'data.data_dir': _TEXT,
    'data.train_split': _NON_EMPTY,
    'data.eval_split': _NON_EMPTY,
    'data.image_size': _tuple(
        f'(height, width) in pixels, integers >= {_SSIM_WINDOW}, the window of'
        ' SSIM',
        _integer(_SSIM_WINDOW),
        (2,),
    ),
    'data.batch_size': _COUNT,
    'data.eval_batch_size': _COUNT,
    'data.resize_shorter': _COUNT_OR_ZERO,
    'data.crop_scale': Rule(
        '(lowest, highest), finite numbers with 0 < lowest <= highest',
        lambda x: _tuple('', _POSITIVE, (2,)).fits(x) and x[0] <= x[1],
    ),
    'data.flip': _BOOL,
    'data.color_jitter': _SHARE,
    'data.max_damaged_share': _SHARE,
    'data.cache_mib': _COUNT_OR_ZERO,
    'data.num_threads': _COUNT,
    'data.prefetch': _COUNT,
    **{f'model.encoder.{name}': rule for name, rule in _VIT.items()},
    'model.projector_in.name': _name('linear', 'standardized'),
    'model.quantizer.name': _name(*_QUANTIZERS),
    **{
        f'model.quantizer.{quantizer}.{name}': rule
        for quantizer, rules in _QUANTIZERS.items()
        for name, rule in rules.items()
    },
    'model.projector_out.name': _name('linear'),
    **{f'model.decoder.{name}': rule for name, rule in _VIT.items()},
    'model.dtype': _name('float32', 'bfloat16'),
    'model.remat': _BOOL,
    'model.scan_unroll': _COUNT,
    'losses.reconstruction': _name('l1', 'l2'),
    'losses.reconstruction_weight': _NOT_NEGATIVE,
    'losses.quantizer_weight': _NOT_NEGATIVE,
    'optim.name': _name('adamw', 'muon'),
    'optim.learning_rate': _POSITIVE,
    'optim.end_learning_rate': _NOT_NEGATIVE,
    'optim.warmup_steps': _COUNT_OR_ZERO,
    'optim.b1': _DECAY,
    'optim.b2': _DECAY,
    'optim.eps': _POSITIVE,
    'optim.weight_decay': _NOT_NEGATIVE,
    'optim.clip_norm': _NOT_NEGATIVE,
    'optim.accumulation_steps': _COUNT,
    'optim.ema_decay': _DECAY,
    'optim.frozen': _tuple(
        'a tuple of regular expressions', Rule('', _is_expression), _ANY_LENGTH
    ),
    'partitioning.mesh.data': _MESH_SIZE,
    'partitioning.mesh.fsdp': _MESH_SIZE,
    'partitioning.rules': _tuple(
        "a tuple of at least one (regular expression, strategy); strategies are"
        " 'fsdp', 'replicate' and tuples of 'data', 'fsdp' and None",
        Rule('', _is_partition_rule),
        range(1, _MAX_INT32),
    ),
    'partitioning.fsdp_min_size': _COUNT_OR_ZERO,
    'train.num_steps': _COUNT,
    'train.log_every_steps': _COUNT,
    'train.eval_every_steps': _COUNT_OR_ZERO,
    'train.checkpoint_every_steps': _COUNT,
    'train.keep_checkpoints': _COUNT,
    'train.max_bad_steps': _COUNT,
    'train.profile_steps': _tuple(
        '() or (first, last), integers >= 0', _COUNT_OR_ZERO, (0, 2)
    ),
    'train.compilation_cache': _TEXT,
    'eval.num_grid_images': _COUNT,
}


def _vit_rules(part: str) -> Iterator[CrossRule]:
  part = f'model.{part}'
  yield CrossRule(
      ('data.image_size', f'{part}.patch_size'),
      'a patch_size that divides both sides of image_size',
      lambda size, patch: not any(side % patch for side in size),
  )
  yield CrossRule(
      (f'{part}.width', f'{part}.num_heads'),
      'a width that is a multiple of num_heads',
      lambda width, num_heads: width % num_heads == 0,
  )
  yield CrossRule(
      (f'{part}.width', f'{part}.position'),
      "a width that is a multiple of 4 with position 'sincos'",
      lambda width, position: position != 'sincos' or width % 4 == 0,
  )


def cross_rules(num_devices: int | None) -> Iterator[CrossRule]:
  """Yields the rules between fields, those on devices if these are known."""
  yield from _vit_rules('encoder')
  yield from _vit_rules('decoder')
  yield CrossRule(
      ('model.encoder.patch_size', 'model.decoder.patch_size'),
      'the same patch_size in both',
      lambda encoder, decoder: encoder == decoder,
  )
  yield CrossRule(
      ('data.source', 'data.name', 'data.data_dir'),
      "with 'tfds' a name, or the folder of a prepared version as data_dir",
      lambda source, name, folder: source != 'tfds' or bool(name or folder),
  )
  yield CrossRule(
      ('data.source', 'data.data_dir'),
      "with 'folder' an existing folder as data_dir; set"
      ' --config.data.data_dir',
      lambda source, folder: (
          source != 'folder' or os.path.isdir(os.path.expanduser(folder))
      ),
  )
  yield CrossRule(
      ('optim.warmup_steps', 'train.num_steps'),
      'warmup_steps < num_steps',
      lambda warmup_steps, num_steps: warmup_steps < num_steps,
  )
  yield CrossRule(
      ('optim.end_learning_rate', 'optim.learning_rate'),
      'end_learning_rate <= learning_rate',
      lambda end, peak: end <= peak,
  )
  yield CrossRule(
      ('train.profile_steps', 'train.num_steps'),
      '() or first <= last <= num_steps',
      lambda steps, num_steps: (
          not steps or steps[0] <= steps[1] <= num_steps
      ),
  )
  yield CrossRule(
      ('partitioning.mesh.data', 'partitioning.mesh.fsdp'),
      'at most one -1',
      lambda data, fsdp: (data, fsdp) != (-1, -1),
  )
  if num_devices is not None:
    yield from _device_rules(num_devices)
    return
  yield CrossRule(
      ('data.batch_size', 'optim.accumulation_steps'),
      'a batch_size that is a multiple of accumulation_steps',
      lambda size, parts: size % parts == 0,
  )


def _device_rules(num_devices: int) -> Iterator[CrossRule]:
  yield CrossRule(
      ('data.batch_size', 'optim.accumulation_steps'),
      f'a batch_size that is a multiple of {num_devices} devices times'
      ' accumulation_steps',
      lambda size, parts: size % (num_devices * parts) == 0,
  )
  yield CrossRule(
      ('data.eval_batch_size',),
      f'a multiple of {num_devices} devices',
      lambda size: size % num_devices == 0,
  )
  yield CrossRule(
      ('partitioning.mesh.data', 'partitioning.mesh.fsdp'),
      f'sizes that multiply to {num_devices} devices, -1 taking what is left',
      lambda *sizes: (
          num_devices % abs(math.prod(sizes)) == 0
          if -1 in sizes
          else num_devices == math.prod(sizes)
      ),
  )
