"""Which changes of a config a run or a model allows."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from fsq_jax.configuration import loading

# Fields, beside those of `eval`, `partitioning` and `tokenize`, that a run may
# change when it continues: they do not change what is trained, but for the
# rounding of sums over other devices. train.num_steps does, through the
# schedule.
_RESUMABLE = frozenset({
    'data.allow_upscaling',
    'data.eval_batch_size',
    'data.cache_mib',
    'data.label_names',
    'data.num_threads',
    'data.prefetch',
    # Their weights are held to the run's by what they are, not where.
    'discriminator.dino.checkpoint',
    'losses.perceptual.checkpoint',
    'train.checkpoint_every_steps',
    'train.compilation_cache',
    'train.eval_every_steps',
    # What a run that goes on has long read.
    'train.init_from',
    'model.decoder.mae.checkpoint',
    'model.encoder.checkpoint',
    'model.latent_statistics',
    'train.keep_checkpoints',
    'train.log_every_steps',
    'train.profile_steps',
})
# Fields that decide of which arrays the train state consists and what they
# mean: a checkpoint cannot be continued with others.
_OF_MODEL = ('model.', 'data.image_size')
_OF_TRAINING = (
    'optim.name', 'optim.frozen', 'losses.distillation_weight',
    'discriminator.name', 'discriminator.dino', 'discriminator.patch',
    'discriminator.stylegan',
)
# Sections of which one is built, the one that `name` says.
_ALTERNATIVES = (
    'discriminator', 'model.projector_in', 'model.projector_out',
    'model.quantizer',
)
_NOT_OF_STATE = frozenset({
    'discriminator.dino.checkpoint', 'discriminator.dino.dtype',
    'model.decoder.mae.checkpoint', 'model.dtype', 'model.encoder.checkpoint',
    'model.latent_noise', 'model.remat', 'model.scan_unroll',
})
# Fields of quantizers that act on training only, as their specs say.
_OF_QUANTIZER_TRAINING = (
    '.commitment_weight', '.dead_share', '.decay', '.diversity_weight',
    '.entropy_group_bits', '.entropy_weight', '.gradient', '.noise',
    '.noise_per', '.restart', '.stage_dropout', '.temperature', '.weighting',
)


def diff_models(
    saved: Mapping[str, Any] | loading.Config,
    current: Mapping[str, Any] | loading.Config,
    *,
    and_of: tuple[str, ...] = (),
) -> list[str]:
  """Lists the differences that give a model other variables or other meaning.

  Args:
    saved: one config.
    current: another one.
    and_of: beginnings of further fields that count.

  Returns:
    Lines of `diff_configs`.
  """
  fields = dict(loading.flatten(saved)), dict(loading.flatten(current))
  lines = {
      line.partition(':')[0]: line
      for line in loading.diff_configs(saved, current)
  }
  return [
      line
      for name, line in lines.items()
      if name.startswith(_OF_MODEL + and_of)
      and _is_built(name, *fields)
      and not _is_of_no_variable(name, *(x.get(name) for x in fields))
  ]


def _is_built(name: str, *configs: Mapping[str, Any]) -> bool:
  """Whether a field is not of a section that neither config has built."""
  for section in _ALTERNATIVES:
    part, _, rest = name.removeprefix(f'{section}.').partition('.')
    if name.startswith(f'{section}.') and rest:
      return any(fields.get(f'{section}.name') == part for fields in configs)
  return True


def _is_of_no_variable(name: str, saved: Any, current: Any) -> bool:
  """Whether a field may differ without another state or other codes."""
  if name in ('losses.distillation_weight', 'model.latent_statistics'):
    # There is a teacher or there is none; a checkpoint has the statistics.
    return bool(saved) == bool(current)
  if name == 'model.encoder.architecture':
    return _is_same_architecture(saved, current)
  return name in _NOT_OF_STATE or (
      name.startswith('model.quantizer.')
      and name.endswith(_OF_QUANTIZER_TRAINING)
  )


def _is_same_architecture(*texts: Any) -> bool:
  from fsq_jax import models

  try:
    first, second = map(models.parse_architecture, texts)
  except (TypeError, ValueError):
    return False
  # Positions are resampled before they get into the model.
  kernel = second.position_kernel
  return dataclasses.replace(first, position_kernel=kernel) == second


def check_resumable(
    saved: Mapping[str, Any] | loading.Config,
    current: Mapping[str, Any] | loading.Config,
    *,
    allow_config_change: bool = False,
) -> None:
  """Refuses to continue a run with a config that would train something else.

  Args:
    saved: config of the run so far.
    current: config to continue with.
    allow_config_change: accept every difference but those that change what
      the state consists of, the model and the kind of optimizer.

  Raises:
    ValueError: they differ in more than evaluation, partitioning, logging,
      checkpointing and the speed of the input.
  """
  lines = loading.diff_configs(saved, current)
  lines = {line.partition(':')[0]: line for line in lines}
  differences = [
      line
      for name, line in lines.items()
      if not name.startswith(('eval.', 'partitioning.', 'tokenize.'))
      and name not in _RESUMABLE
  ]
  other_state = diff_models(saved, current, and_of=_OF_TRAINING)
  if other_state:
    raise ValueError(
        '\n  '.join([
            'The config has other parameters or another optimizer than this run'
            ' (saved -> current):',
            *other_state,
        ])
        + '\nUse another --workdir; a checkpoint cannot be continued so.'
    )
  if differences and not allow_config_change:
    raise ValueError(
        '\n  '.join([
            'The config is not the one of this run (saved -> current):',
            *differences,
        ])
        + '\nUse another --workdir, or continue with these values by'
        ' --allow_config_change.'
    )
