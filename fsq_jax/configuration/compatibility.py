"""Changes of a config with which a run resumes, or a model stays the same."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from fsq_jax.configuration import loading
from fsq_jax.configuration import schema

_Role = schema.Role
_ARCHITECTURE = 'model.encoder.architecture'
_Config = Mapping[str, Any] | loading.Config


def diff_models(saved: _Config, current: _Config) -> list[str]:
  """Lists the differences that change a model's variables or their meaning.

  Args:
    saved: one config.
    current: another one.

  Returns:
    Lines of `diff_configs`.
  """
  return _diff(saved, current, _Role.MODEL)


def find_model_differences(
    saved: _Config, current: _Config
) -> dict[str, tuple[Any, Any]]:
  """Returns the differences of `diff_models` as `loading.find_differences`."""
  return _find(saved, current, _Role.MODEL)


def check_resumable(
    saved: _Config, current: _Config, *, allow_config_change: bool = False
) -> None:
  """Raises ValueError if a run cannot resume with another config.

  Args:
    saved: config of the run so far.
    current: config to resume with.
    allow_config_change: accept every difference except in the arrays of the
      train state: the model, the kind of optimizer, the discriminator.

  Raises:
    ValueError: the configs differ in more than evaluation, partitioning,
      logging, checkpoints, the speed of the input and initialization.
  """
  other_state = _diff(saved, current, _Role.MODEL, _Role.STATE)
  if other_state:
    raise ValueError(
        '\n  '.join([
            'The config has other parameters or another optimizer than this run'
            ' (saved -> current):',
            *other_state,
        ])
        + '\nUse another --workdir; a checkpoint cannot be resumed with these.'
    )
  differences = _diff(saved, current, _Role.TRAINING)
  if differences and not allow_config_change:
    raise ValueError(
        '\n  '.join([
            'The config differs from that of this run (saved -> current):',
            *differences,
        ])
        + '\nUse another --workdir, or resume with these values by'
        ' --allow_config_change.'
    )


def _diff(saved: _Config, current: _Config, *roles: _Role) -> list[str]:
  """Lists the differences that have one of the roles."""
  return loading.format_differences(_find(saved, current, *roles))


def _find(
    saved: _Config, current: _Config, *roles: _Role
) -> dict[str, tuple[Any, Any]]:
  known = loading.fields_of(current)
  configs = dict(loading.flatten(saved)), dict(loading.flatten(current))
  return {
      name: pair
      for name, pair in loading.find_differences(saved, current).items()
      if _role_of_change(name, known, *configs) in roles
  }


def _role_of_change(
    name: str,
    known: Mapping[str, schema.Field],
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
) -> _Role:
  """Returns the role of a difference between configs by dotted name."""
  if name not in known:  # A field of another version.
    return _Role.MODEL if name.startswith('model.') else _Role.TRAINING
  field = known[name]
  pair = saved.get(name), current.get(name)
  if field.presence and bool(pair[0]) != bool(pair[1]):
    return field.presence
  if not any(loading.is_chosen(name, config) for config in (saved, current)):
    return _Role.RUNTIME
  if name == _ARCHITECTURE and _is_same_architecture(*pair):
    return _Role.TRAINING
  return field.role


def _is_same_architecture(*texts: Any) -> bool:
  """Whether two texts describe one architecture of a pretrained encoder."""
  from fsq_jax.models.pretrained import architectures

  try:
    first, second = map(architectures.parse_architecture, texts)
  except (TypeError, ValueError):
    return False
  # Positions are resampled before they get into the model.
  kernel = second.position_kernel
  return dataclasses.replace(first, position_kernel=kernel) == second
