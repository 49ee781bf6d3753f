"""The config of a command line: a config file or a run's, and overrides."""

import ast
from collections.abc import Mapping, Sequence
import contextlib
import difflib
import functools
import itertools
import operator
import pathlib
import re

from absl import flags
from absl import logging

from fsq_jax.configuration import loading
from fsq_jax.configuration import schema
from fsq_jax.configuration import shipped
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import urls


class _IntegerParser(flags.IntegerParser):
  """Also accepts integers in float notation: 1e3 is 1000."""

  def convert(self, argument: int | str) -> int:
    try:
      return super().convert(argument)
    except ValueError:
      with contextlib.suppress(ValueError, OverflowError):
        if float(argument).is_integer():
          return int(float(argument))
      raise ValueError(f'{argument!r} is not an integer') from None


class _FloatParser(flags.FloatParser):
  """Also accepts None, which some fields may be."""

  def convert(self, argument: float | str) -> float | None:
    if argument == 'None':
      return None
    try:
      return super().convert(argument)
    except ValueError:
      raise ValueError(f'{argument!r} is not a number') from None


class _BoolParser(flags.BooleanParser):
  """Raises one sentence; absl's parser raises a tuple."""

  def parse(self, argument: bool | str) -> bool:
    try:
      return super().parse(argument)
    except (TypeError, ValueError):
      raise ValueError(f'{argument!r} is not a boolean') from None


class _TupleParser(flags.ArgumentParser):
  """Accepts Python tuples and lists, but no single value."""

  def parse(self, argument: tuple | str) -> tuple:
    try:
      value = ast.literal_eval(argument.strip())
    except (SyntaxError, ValueError):
      value = None
    if not isinstance(value, tuple | list):
      raise ValueError(f'{argument!r} is not a tuple')
    return tuple(value)


_PARSERS = {
    bool: _BoolParser(),
    float: _FloatParser(),
    int: _IntegerParser(),
    tuple: _TupleParser(),
}


def check_flags(
    mode: str,
    modes: Mapping[str, Sequence[str]],
    *,
    paths: Sequence[str],
    in_stores: Sequence[str],
) -> None:
  """Checks the parsed flags before any work.

  Args:
    mode: the chosen mode.
    modes: names of the flags that only some modes read, by mode.
    paths: names of the flags that are local paths.
    in_stores: names of the flags that are paths, local or in an object store.

  Raises:
    ValueError: a URL that is not supported, or a flag that the mode does not
      read.
  """
  for names, stores in ((paths, ()), (in_stores, urls.STORES)):
    for name in names:
      value = flags.FLAGS[name].value
      if value is not None and (
          problem := urls.explain(value, f'--{name}', stores)
      ):
        raise ValueError(problem)
  for name in sorted(set(itertools.chain(*modes.values())) - {*modes[mode]}):
    if flags.FLAGS[name].value != flags.FLAGS[name].default:
      readers = [x for x in modes if name in modes[x]]
      raise ValueError(
          f'--{name} has no effect with --mode={mode}, only with'
          f' --mode={" or ".join(readers)}; leave it out.'
      )


def load(
    path: str | None, workdir: str | None, root: pathlib.Path
) -> loading.Config:
  """Loads a config file, or without one the config.json of a run.

  Args:
    path: of the config file.
    workdir: of the run; used without a path.
    root: of the repository, whose configs are suggested.

  Returns:
    The config, not checked.

  Raises:
    ValueError: no such file, or neither is given.
  """
  if path is None and workdir is not None:
    saved = workdirs.run_folder(workdir, '--workdir') / workdirs.CONFIG
    missing = FileNotFoundError, NotADirectoryError, IsADirectoryError
    with contextlib.suppress(*missing):
      return loading.config_from_json(workdirs.read_bytes(saved).decode())
    raise ValueError(
        f'--workdir={workdir} has no config.json: {saved} is not a'
        ' file. Give the folder of a run, or a --config.'
        + shipped.explain_workdir(workdir)
    )
  problem = '--config is missing.'
  if path is not None:
    file = pathlib.Path(path).expanduser()
    if file.is_file():
      return loading.load_config(file)
    problem = f'--config={path}: {file.absolute()} is not a file.'
    if (root / file).is_file():
      problem += f' Did you mean --config={root / file}?'
  known = map(str, sorted(root.glob('configs/*.py')))
  raise ValueError(
      '\n  '.join([f'{problem} Configs of this repository:', *known])
  )


def override(config: loading.Config, argv: Sequence[str]) -> None:
  """Sets the fields that a command line names, converted to their types.

  Args:
    config: changed in place.
    argv: the program's name and arguments such as --config.seed=3; other flags
      have been removed.

  Raises:
    ValueError: unknown fields or flags, wrong values, other arguments.
  """
  matches = [re.match(r'--?(?:no)?config\.([^=]*)', arg) for arg in argv]
  known = loading.fields_of(config)
  unknown = loading.describe_unknown((m[1] for m in matches if m), known)
  if unknown:
    raise ValueError('\n  '.join(['Invalid config overrides:', *unknown]))
  fields = flags.FlagValues()
  for name, _ in loading.flatten(config):
    section, field = _find(config, name)
    field_type = section.get_type(field)
    fields[f'config.{name}'] = flags.Flag(
        _PARSERS.get(field_type, flags.ArgumentParser()),
        serializer=None,
        name=f'config.{name}',
        default=None,
        help_string=None,
        boolean=field_type is bool,
    )
  try:
    _, *rest = fields(argv)
  except flags.UnrecognizedFlagError as error:
    raise ValueError(
        _describe_unknown_flag(error.flagname, argv, known)
    ) from error
  except flags.IllegalFlagValueError as error:
    raise ValueError(_describe_wrong_value(str(error), config)) from error
  except flags.Error as error:  # The last flag lacks its value.
    raise ValueError(f'{error}. See --help.') from error
  if rest:
    raise ValueError(
        f'{rest} cannot be used; every argument is a --flag=value, a config is'
        ' given as --config=PATH. See --help.'
    )
  for name in fields:
    if fields[name].present:
      section, field = _find(config, name.removeprefix('config.'))
      section[field] = fields[name].value
  given = {name for name in fields if fields[name].present}
  if (
      'config.train.num_steps' in given
      and 'config.optim.warmup_steps' not in given
  ):
    _shorten_warmup(config)


def _shorten_warmup(config: loading.Config) -> None:
  """Makes the warm-up of a run shortened by --config.train.num_steps fit."""
  num_steps = config.train.num_steps
  warmup_steps = config.get('optim', {}).get('warmup_steps')
  # Other values are rejected by the check of the config.
  if type(warmup_steps) is int and 1 <= num_steps <= warmup_steps:
    logging.warning(
        'optim.warmup_steps is %d with train.num_steps %d; it is set to %d.',
        warmup_steps, num_steps, num_steps - 1,
    )
    config.optim.warmup_steps = num_steps - 1


def _find(config: loading.Config, name: str) -> tuple[loading.Config, str]:
  """Returns the section and the name in it of a dotted name."""
  *sections, field = name.split('.')
  return functools.reduce(operator.getitem, sections, config), field


def _describe_unknown_flag(
    name: str, argv: Sequence[str], known: Mapping[str, schema.Field]
) -> str:
  """Returns the message about an unknown flag, with suggestions."""
  pairs = [arg.lstrip('-').partition('=') for arg in argv]
  value = next((f'={x}' for flag, _, x in pairs if flag == name and x), '')
  fields = loading.find_fields(name, known)
  meant = [f'--config.{field}{value}' for field in fields[:4]]
  if not meant:
    nearest = difflib.get_close_matches(name, flags.FLAGS)
    meant = [f'--{flag}{value}' for flag in nearest]
  hint = f'; did you mean {" or ".join(meant)}?' if meant else '.'
  return f'--{name} is not a flag{hint} See --help.'


def _describe_wrong_value(problem: str, config: loading.Config) -> str:
  """Returns the message about a value of a wrong type, with the right form.

  Args:
    problem: absl's message: the flag, its value, and the error of its parser.
    config: has another value of the field, as an example.
  """
  name, given = re.match(
      r'flag --config\.([\w.]+)=(.*?): ', problem, re.DOTALL
  ).groups()
  rule = loading.fields_of(config)[name].rule
  problem = f'{problem}; allowed: {rule.allowed}.'
  section, field = _find(config, name)
  value = section[field]
  if not isinstance(value, tuple):
    return problem
  example = repr(value)
  if re.fullmatch(r'\d+([\s,;x]+\d+)+', given):  # '8 8 8' and '8x8x8'.
    example = f'({",".join(re.findall("[0-9]+", given))})'
  elif not value:
    # One number in place of several does not say which others are meant.
    example = repr((given,)) if rule.fits((given,)) else '(A,B)'
  quote = '"' if "'" in example else "'"
  return (
      f'{problem} Write a tuple in parentheses and quotes:'
      f' --config.{name}={quote}{example.replace(" ", "")}{quote}'
  )
