"""Configs: loading, checking, JSON, and differences between two configs."""

from collections.abc import Collection, Iterable, Iterator, Mapping
import difflib
import functools
import json
import operator
import os
import pathlib
import runpy
import sys
from typing import Any

import ml_collections

from fsq_jax.configuration import cross_rules
from fsq_jax.configuration import errors
from fsq_jax.configuration import generator_schema
from fsq_jax.configuration import rules
from fsq_jax.configuration import schema
from fsq_jax.configuration import shipped
from fsq_jax.workdir import urls

Config = ml_collections.ConfigDict
PATHS = schema.PATHS
# Inputs that each mode of launch.py uses. A checkpoint of a run has all weights
# of its model, so modes that read one need no other weights.
USES = {
    'train': cross_rules.INPUTS,
    'eval': {'images'},
    'report': {'images'},
    'tokenize': {'images'},
    'detokenize': set(),
    'reconstruct': set(),
    'export': set(),
    'prepare': set(),
    'latent_statistics': {'images', 'initialization'},
}
# The modes for runs of generators.
_GENERATOR_MODES = ('train', 'eval', 'report', 'generate')
# Value of a field that a config does not have.
ABSENT = object()


def load_config(path: str | os.PathLike[str]) -> Config:
  """Returns the config that the `get_config()` of a file returns.

  The parent of the file's folder is importable meanwhile, so that a config can
  build on its neighbour: `from configs import default`.

  Args:
    path: a Python file. It is executed: load only files you trust.

  Returns:
    The config, locked against new fields, not checked.

  Raises:
    ValueError: the file is missing, raises an error, or returns no config.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_file():
    raise ValueError(f'There is no config file {path}.')
  if path.suffix == '.json':
    raise ValueError(
        f'{path} is JSON; a config file is Python. If it is the config.json of'
        ' a run, give its --workdir instead; only training needs a --config.'
    )
  root = str(path.parent.parent)
  sys.path.insert(0, root)
  try:
    get_config = runpy.run_path(str(path)).get('get_config')
    config = get_config() if callable(get_config) else None
  except Exception as error:
    raise ValueError(
        f'Config file {path} raises {type(error).__name__}: {error}'
    ) from error
  finally:
    sys.path.remove(root)
  if not callable(get_config):
    raise ValueError(
        f'Config file {path} has no function get_config(); define one that'
        ' returns an ml_collections.ConfigDict, as configs/debug.py does.'
    )
  if not isinstance(config, Config):
    raise ValueError(
        f'get_config() of {path} returns {type(config).__name__}; return an'
        ' ml_collections.ConfigDict.'
    )
  _upgrade(config)
  return config.lock()


def is_generator(config: Mapping[str, Any] | Config) -> bool:
  """Whether a config is of a generator (configs/default_generator.py)."""
  return 'tokens' in config


def fields_of(
    config: Mapping[str, Any] | Config,
) -> Mapping[str, schema.Field]:
  """Returns the schema that a config has: all fields by dotted name."""
  return generator_schema.FIELDS if is_generator(config) else schema.FIELDS


def check_config(
    config: Mapping[str, Any] | Config,
    num_devices: int | None = None,
    *,
    mode: str = 'train',
) -> None:
  """Raises one ValueError that lists all problems of a config.

  Uses no device, and of files only the folder data.data_dir and the description
  of an encoder with architecture 'checkpoint'.

  Args:
    config: see configs/default.py. Integers may stand for floats and lists
      for tuples.
    num_devices: devices of all processes; None omits checks that depend on it.
    mode: of launch.py. Inputs that it does not use may be missing: images,
      weights that initialize a new run, networks of the losses.

  Raises:
    ValueError: fields that are missing, unknown or wrong, and allowed values.
  """
  _check_mode(config, mode)
  uses = USES.get(mode, set())
  fields, known = dict(flatten(config)), fields_of(config)
  problems = describe_unknown(fields, known)
  for name, field in known.items():
    if name not in fields:
      # Saved configs lack the quantizers that were added since.
      if mode == 'train' or is_chosen(name, fields):
        problems.append(f'{name} is missing; allowed: {field.rule.allowed}.')
    elif fields[name] is None and not _is_used(name, uses):
      fields[name] = ''
    elif problem := _url_problem(name, fields[name], field):
      problems.append(problem)
      del fields[name]
    elif not field.rule.fits(fields[name]):
      given = fields.pop(name)
      problems.append(f'{name} is {given!r}; allowed: {field.rule.allowed}.')
  # Rules between fields are for values that are allowed by themselves.
  if is_generator(config):
    between = cross_rules.generator_rules(num_devices, mode)
  else:
    between = cross_rules.cross_rules(num_devices, uses)
  for rule in between:
    values = {name: fields[name] for name in rule.fields if name in fields}
    if len(values) == len(rule.fields) and not rule.fits(*values.values()):
      given = ', '.join(f'{name} is {x!r}' for name, x in values.items())
      problems.append(f'{given}; allowed: {rule.allowed}.')
  if not is_generator(config):
    names = list(schema.QUANTIZERS)
    if mode != 'train':
      # Other sections of a saved config may hold what earlier versions
      # allowed.
      names = [x for x in names if x == fields.get('model.quantizer.name')]
    problems.extend(_quantizer_problems(fields, names))
    parts = 'model.', 'data.image_size', 'data.channels'
    if not any(x.startswith(parts) for x in problems):
      problems.extend(_model_problems(config))
  if problems:
    raise ValueError('\n  '.join(['The config cannot be used:', *problems]))


def _url_problem(name: str, value: Any, field: schema.Field) -> str | None:
  """Returns why a value is a URL in place of a path; None for others."""
  if not field.rule.is_path or not isinstance(value, str):
    return None
  return urls.explain(value, name, field.rule.stores)


def is_chosen(name: str, fields: Mapping[str, Any]) -> bool:
  """Whether a field is outside of alternatives, or in the chosen alternative.

  The sections model.quantizer.NAME, for example, are alternatives;
  model.quantizer.name is the chosen one.

  Args:
    name: dotted name of a field.
    fields: values of a config by dotted name.
  """
  parent, _, alternative = name.rpartition('.')[0].rpartition('.')
  chosen = f'{parent}.name'
  return (
      chosen not in schema.FIELDS
      or not schema.FIELDS[chosen].rule.fits(alternative)
      or fields.get(chosen) == alternative
  )


def _check_mode(config: Mapping[str, Any] | Config, mode: str) -> None:
  """Checks that a mode is for the kind of a config."""
  if is_generator(config) and mode not in _GENERATOR_MODES:
    raise ValueError(
        f'--mode={mode} is for runs of tokenizers, but the config is of a'
        f' generator; allowed: {", ".join(_GENERATOR_MODES)}.'
    )
  if not is_generator(config) and mode not in USES:
    raise ValueError(
        f'--mode={mode} is for runs of generators, but the config is of a'
        f' tokenizer; allowed: {", ".join(USES)}.'
    )


def _is_used(name: str, uses: Collection[str]) -> bool:
  """Whether a mode with these inputs reads a field that may be None."""
  if name not in schema.FIELDS:
    return True
  if schema.FIELDS[name].role is schema.Role.START:
    return 'initialization' in uses
  return name != 'data.data_dir' or 'images' in uses


def _quantizer_problems(
    fields: Mapping[str, Any], names: Collection[str]
) -> Iterator[str]:
  """Yields the errors of the constructors of quantizers.

  Args:
    fields: values by dotted name.
    names: of the quantizers; those that lack a field are skipped.
  """
  # Imported here since it imports JAX, which the command line starts without.
  from fsq_jax.quantizers import builder as quantizers

  for name in names:
    prefix = f'model.quantizer.{name}.'
    rows = schema.QUANTIZERS[name]
    options = {x: fields[prefix + x] for x in rows if prefix + x in fields}
    if len(options) == len(rows):
      try:
        quantizers.build_quantizer({'name': name, **options})
      except ValueError as error:
        yield f'{prefix}{error}'


def _model_problems(config: Mapping[str, Any] | Config) -> Iterator[str]:
  """Yields the error of building the model, if there is one."""
  # Imported here for the same reason.
  from fsq_jax.models import builder as model_builder

  model, data = config['model'], config['data']
  try:
    architecture = _find_architecture(model['encoder'])
    encoder = {**model['encoder'], 'architecture': architecture}
    model = {**model, 'encoder': encoder}
    model_builder.build_autoencoder(
        model, data['image_size'], data['channels']
    )
    with errors.about('data.image_sizes'):
      model_builder.check_image_sizes(
          model, data.get('image_sizes', ()), data['channels']
      )
  except ValueError as error:
    yield str(error)


def _find_architecture(encoder: Mapping[str, Any] | Config) -> str:
  """Returns the architecture of an encoder, 'checkpoint' replaced.

  Raises:
    ValueError: there is no checkpoint, or it describes no known encoder.
  """
  if (encoder['name'], encoder['architecture']) != ('pretrained', 'checkpoint'):
    return encoder['architecture']
  if not encoder['checkpoint']:
    raise ValueError(
        "model.encoder.architecture is 'checkpoint' without a"
        ' model.encoder.checkpoint; set one, or name an architecture.'
    )
  from fsq_jax.models.pretrained import architectures
  from fsq_jax.models.pretrained import loading as pretrained

  try:
    module = pretrained.build_encoder(encoder['checkpoint'])
  except ValueError as error:
    raise ValueError(
        f'model.encoder.checkpoint: {error} A run that has started needs no'
        ' checkpoint, with the model.encoder.architecture of its config.json.'
    ) from error
  return architectures.describe_architecture(module.architecture)


def describe_unknown(
    names: Iterable[str], known: Mapping[str, schema.Field] = schema.FIELDS
) -> list[str]:
  """Returns a line for each dotted name that is no field, with the nearest."""
  problems = []
  for name in names:
    if name not in known:
      nearest = difflib.get_close_matches(name, known, n=3, cutoff=0)
      if not any(x.startswith(f'{name}.') for x in known):
        nearest = find_fields(name, known)[:3] or nearest
      problems.append(
          f'{name or repr(name)} is not a field of a config; nearest:'
          f' {", ".join(nearest)}.'
      )
  return problems


def find_fields(
    name: str, known: Mapping[str, schema.Field] = schema.FIELDS
) -> list[str]:
  """Returns the dotted names that end with a name, shortest first."""
  names = [x for x in known if f'.{x}'.endswith(f'.{name}')]
  return sorted(names, key=lambda x: (x.count('.'), x))


def config_to_json(config: Config) -> str:
  """Writes a config as plain JSON, references resolved, tuples as lists."""
  return json.dumps(config.to_dict(), indent=2, allow_nan=False) + '\n'


def config_from_json(text: str) -> Config:
  """Reads a config written by `config_to_json`; lists become tuples again.

  Fields that the version that wrote it did not have get the values it used;
  values that it wrote otherwise are replaced by values with the same effect.

  Args:
    text: a JSON object: a config, or a saved tokenizer's config.json.

  Returns:
    The config, locked against new fields, not checked.

  Raises:
    ValueError: other text.
  """
  try:
    values = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f'The saved config is not JSON: {error}.') from error
  if not isinstance(values, dict):
    raise ValueError(
        f'The saved config is JSON of a {type(values).__name__}; it must be an'
        ' object.'
    )
  if isinstance(values.get('config'), dict):
    values = values['config']
  config = Config(_with_tuples(values))
  for name, field in fields_of(config).items():
    if field.added is not None:
      *sections, key = name.split('.')
      section = config
      for part in sections:
        if isinstance(section, Config) and part not in section:
          section[part] = Config()
        section = section[part] if isinstance(section, Config) else None
      if isinstance(section, Config) and key not in section:
        section[key] = field.added(section)
  _upgrade(config)
  return config.lock()


def _upgrade(config: Config) -> None:
  """Replaces values of earlier versions by values with the same effect."""
  for name, field in fields_of(config).items():
    if field.upgrade is None:
      continue
    *sections, key = name.split('.')
    section = config
    for part in sections:
      section = section.get(part) if isinstance(section, Config) else None
    if isinstance(section, Config) and isinstance(section.get(key), bool):
      with section.ignore_type():
        section[key] = field.upgrade(section[key])


def find_differences(
    saved: Mapping[str, Any] | Config, current: Mapping[str, Any] | Config
) -> dict[str, tuple[Any, Any]]:
  """Returns the values, saved and current, of the fields that differ, by name.

  Paths are compared as absolute paths. The value of a field that a config
  lacks is `ABSENT`.
  """
  saved, current = (
      {
          name: _resolve_path(name, value, config)
          for name, value in flatten(config)
      }
      for config in (saved, current)
  )
  pairs = {
      name: (saved.get(name, ABSENT), current.get(name, ABSENT))
      for name in sorted(saved | current)
  }
  return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def diff_configs(
    saved: Mapping[str, Any] | Config, current: Mapping[str, Any] | Config
) -> list[str]:
  """Lists the fields that differ as 'field: saved -> current'.

  A relative path, as runs of earlier versions have saved it, equals the
  absolute path that it has in the current folder.
  """
  return format_differences(find_differences(saved, current))


def format_differences(
    differences: Mapping[str, tuple[Any, Any]]
) -> list[str]:
  """Returns a line 'field: saved -> current' for each difference."""
  return [
      f'{name}: '
      + ' -> '.join('absent' if x is ABSENT else repr(x) for x in pair)
      for name, pair in differences.items()
  ]


def resolve(config: Config) -> Config:
  """Returns a copy for use from another folder and without files.

  Paths become absolute. The architecture 'checkpoint' of a pretrained encoder
  becomes the architecture of its checkpoint.

  Args:
    config: a config that `check_config` accepts.
  """
  config = resolve_paths(config)
  if is_generator(config):
    return config
  config.model.encoder.architecture = _find_architecture(config.model.encoder)
  return config


def resolve_paths(config: Config) -> Config:
  """Returns a copy with absolute paths, `~` expanded; '' and None stay.

  So do 'owner/name' of the Hugging Face Hub, unless it is a folder, and the
  name of a shipped tokenizer.
  Runs of earlier versions have saved paths as they were given: relative paths
  are taken from the current folder.
  """
  # Not ConfigDict(config), which shares its sections.
  config = config.copy_and_resolve_references()
  for name, value in flatten(config):
    resolved = _resolve_path(name, value, config)
    if resolved != value:
      *sections, field = name.split('.')
      section = functools.reduce(operator.getitem, sections, config)
      section[field] = resolved
  return config


def _resolve_path(
    name: str, value: Any, config: Mapping[str, Any] | Config
) -> Any:
  """Returns the value of a field, absolute if it is a path."""
  known = fields_of(config)
  if name not in known or not isinstance(value, str) or not value:
    return value
  rule = known[name].rule
  is_name = value in shipped.NAMES or rules.is_hub_id(value)
  if not rule.is_path or (rule.takes_name and is_name):
    return value
  if urls.find_scheme(value):
    return value
  return os.path.abspath(os.path.expanduser(value))


def flatten(
    config: Mapping[str, Any] | Config, prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  """Yields dotted names and values; lists become tuples.

  An empty section is a value.
  """
  if isinstance(config, Config):
    config = config.to_dict()
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      yield from flatten(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', _with_tuples(value)


def _with_tuples(value: Any) -> Any:
  """Replaces lists by tuples at any depth."""
  if isinstance(value, Mapping):
    return {key: _with_tuples(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return tuple(map(_with_tuples, value))
  return value
