"""Trains a tokenizer by its config, and uses what was trained.

  python launch.py --config=configs/fsq_888.py [--workdir=runs/fsq_888]
      [--mode=train|eval|report|tokenize|detokenize|export|prepare|
       latent_statistics]
      [--config.SECTION.FIELD=VALUE ...]

Fields and their meaning are in configs/default.py. The same command started
again continues from the newest checkpoint. A config file is Python that is
executed: run only files you trust.

Exit codes: 0 done; 1 failed; 2 bad config or input, named in the message;
75 interrupted after a save, run the same command again to continue.
"""

import ast
import contextlib
import difflib
import functools
import operator
import pathlib
import re
import sys
import traceback
from typing import Any
import warnings

from absl import app
from absl import flags
from absl import logging
import ml_collections
from ml_collections import config_flags

from fsq_jax import configuration

_CONFIG = flags.DEFINE_string(
    'config',
    None,
    'Path of a config file. --config.SECTION.FIELD=VALUE overrides a field; a'
    " tuple is quoted, as '(8,8,8)'. Modes that use a run do without: they find"
    ' the config in the workdir.',
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Folder of the run. Default: runs/ and the name of the config file.',
)
_MODE = flags.DEFINE_enum(
    'mode',
    'train',
    [
        'train', 'eval', 'report', 'tokenize', 'detokenize', 'export',
        'prepare', 'latent_statistics',
    ],
    'train a model; eval a checkpoint of the workdir; report: add its codebook,'
    ' and its best and worst images, to report.html; tokenize: write the tokens'
    ' of the data set to files; detokenize: make images of such files; export:'
    ' write the checkpoint as programs that need JAX alone; prepare: download'
    ' and convert the data set; latent_statistics: write mean and variance of'
    ' the latents, for model.latent_statistics, to the workdir.',
)
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint',
    'newest',
    'What modes that use a run take of it: newest, best (of the highest PSNR),'
    ' or the number of a step.',
)
_TOKENS = flags.DEFINE_string(
    'tokens',
    None,
    'Folder of token files. Default: WORKDIR/tokens/ and the name of the data.',
)
_VERIFY_IMAGES = flags.DEFINE_bool(
    'verify_images',
    False,
    'Mode tokenize: compare the hashes of all images that have been tokenized'
    ' before, not only of those whose size or time has changed.',
)
_IMAGES = flags.DEFINE_string(
    'images',
    None,
    'Folder for the images of mode detokenize. Default: that of the token files'
    ' with _images at the end.',
)
_EXPORT = flags.DEFINE_string(
    'export',
    None,
    'Folder that mode export writes to. Default: WORKDIR/export.',
)
_OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'Folder that modes eval and report write to. Default: WORKDIR, which then'
    ' must be writable.',
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    'allow_config_change',
    False,
    'Continue a run although its config has changed.',
)
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed',
    False,
    'This is one of several processes, which JAX finds in the environment of'
    ' Cloud TPU, SLURM, Open MPI or Kubernetes; elsewhere, give the next three'
    ' flags.',
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator_address', None, 'host:port of process 0, to all processes.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'How many processes there are.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', None, "This process's number, from 0.", lower_bound=0
)
_DEBUG = flags.DEFINE_bool(
    'debug', False, 'Show the traceback of a bad config or input.'
)

_ROOT = pathlib.Path(__file__).resolve().parent
_Path = str | pathlib.Path
# Modes that find the config in the workdir.
_OF_A_RUN = ('eval', 'report', 'tokenize', 'detokenize', 'export')

_FAILED = 1
_BAD_INPUT = 2
_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again.


class _IntegerParser(flags.IntegerParser):
  """Takes integers in the notation of floats too: 1e3 is 1000."""

  def convert(self, argument: int | str) -> int:
    try:
      return super().convert(argument)
    except ValueError:
      with contextlib.suppress(ValueError, OverflowError):
        if float(argument).is_integer():
          return int(float(argument))
      raise ValueError(f'{argument!r} is not an integer') from None


class _FloatParser(flags.FloatParser):
  """Takes None too, which some fields may be."""

  def convert(self, argument: float | str) -> float | None:
    if argument == 'None':
      return None
    try:
      return super().convert(argument)
    except ValueError:
      raise ValueError(f'{argument!r} is not a number') from None


class _BoolParser(flags.BooleanParser):
  """Raises one sentence, where the parser of absl raises a tuple."""

  def parse(self, argument: bool | str) -> bool:
    try:
      return super().parse(argument)
    except (TypeError, ValueError):
      raise ValueError(f'{argument!r} is not a boolean') from None


class _TupleParser(flags.ArgumentParser):
  """Takes what Python reads as a tuple or a list, and no single value.

  The parser of ml_collections makes a tuple of whatever it gets, 512 as well,
  and joins the values of a flag that is given twice.
  """

  def parse(self, argument: tuple | str) -> tuple:
    if isinstance(argument, tuple):
      return argument
    try:
      value = ast.literal_eval(argument.strip())
    except (SyntaxError, ValueError):
      value = None
    if not isinstance(value, tuple | list):
      raise ValueError(f'{argument!r} is not a tuple')
    return tuple(value)

  def flag_type(self) -> str:
    return 'tuple'


_PARSERS = {
    bool: _BoolParser(),
    float: _FloatParser(),
    int: _IntegerParser(),
    tuple: _TupleParser(),
}


def main(argv: list[str]) -> int:
  """Runs the mode that the flags name.

  Args:
    argv: what is left of the command line: the program, overrides of fields.

  Returns:
    The exit code.
  """
  if not flags.FLAGS['verbosity'].present:
    # Orbax and JAX say much at INFO; --verbosity=0 shows it.
    logging.set_verbosity(logging.WARNING)
  try:
    config = _load_config()
    _override(config, argv)
    config = configuration.resolve_paths(config)
    configuration.check_config(config, mode=_MODE.value)
    return _run(config)
  except (ValueError, RuntimeError, flags.Error) as error:
    if not _is_ours(error):
      raise
    if _DEBUG.value:
      traceback.print_exc()
    return _refuse(error)


def _is_ours(error: Exception) -> bool:
  """Whether this code raised the error, to say what is wrong with its input.

  An error from inside a library is a fault to be looked into: it keeps its
  traceback.
  """
  raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
  ours = (_ROOT / 'fsq_jax', _ROOT / 'configs', _ROOT / 'launch.py')
  return isinstance(error, flags.Error) or any(
      pathlib.Path(raised_in).resolve().is_relative_to(path) for path in ours
  )


def _load_config() -> ml_collections.ConfigDict:
  if _CONFIG.value is not None:
    path = pathlib.Path(_CONFIG.value).expanduser()
    if path.is_file():
      return configuration.load_config(path)
    problem = f'--config={_CONFIG.value}: {path.absolute()} is not a file.'
    if (_ROOT / path).is_file():
      problem += f' Did you mean --config={_ROOT / path}?'
  elif _MODE.value in _OF_A_RUN and _WORKDIR.value is not None:
    path = pathlib.Path(_WORKDIR.value).expanduser() / 'config.json'
    if path.is_file():
      return configuration.config_from_json(path.read_text(encoding='utf-8'))
    raise ValueError(
        f'--workdir={_WORKDIR.value} holds no config.json: {path.absolute()} is'
        ' not a file. Give the folder of a run, or a --config.'
    )
  else:
    problem = '--config is missing.'
  known = map(str, sorted(_ROOT.glob('configs/*.py')))
  raise ValueError(
      '\n  '.join([f'{problem} Configs of this repository:', *known])
  )


def _override(config: ml_collections.ConfigDict, argv: list[str]) -> None:
  """Sets the fields that the command line names, converted to their types."""
  matches = [re.match(r'--?(?:no)?config\.([^=]*)', arg) for arg in argv]
  unknown = configuration.describe_unknown(m[1] for m in matches if m)
  if unknown:
    raise ValueError('\n  '.join(['Overrides cannot be used:', *unknown]))
  for field_type, parser in _PARSERS.items():
    config_flags.register_flag_parser_for_type(field_type, parser)
  overrides = flags.FlagValues()
  config_flags.DEFINE_config_dict(
      'config', config, flag_values=overrides, sys_argv=argv
  )
  try:
    _, *rest = overrides(argv)
  except flags.UnrecognizedFlagError as error:
    raise ValueError(_describe_unknown_flag(error.flagname, argv)) from error
  except flags.IllegalFlagValueError as error:
    raise ValueError(_describe_wrong_value(str(error), config)) from error
  if rest:
    raise ValueError(
        f'{rest} cannot be used; every argument is a --flag=value, a config is'
        ' given as --config=PATH. See --help.'
    )


def _describe_unknown_flag(name: str, argv: list[str]) -> str:
  """Returns the message about an unknown flag, with what may be meant."""
  pairs = [arg.lstrip('-').partition('=') for arg in argv]
  value = next((f'={x}' for flag, _, x in pairs if flag == name and x), '')
  fields = configuration.find_fields(name)
  meant = [f'--config.{field}{value}' for field in fields[:4]]
  if not meant:
    nearest = difflib.get_close_matches(name, flags.FLAGS)
    meant = [f'--{flag}{value}' for flag in nearest]
  hint = f'; did you mean {" or ".join(meant)}?' if meant else '.'
  return f'--{name} is not a flag{hint} See --help.'


def _describe_wrong_value(
    problem: str, config: ml_collections.ConfigDict
) -> str:
  """Returns the message about a value of a wrong type, with the right form.

  Args:
    problem: what absl says: the flag, its value, and what its parser raised.
    config: has another value of the field, as an example.
  """
  match = re.match(r'flag --config\.([\w.]+)=(.*?): ', problem, re.DOTALL)
  if not match:
    return problem
  name, given = match.groups()
  rule = configuration.find_rule(name)
  problem = f'{problem}; allowed: {rule.allowed}.'
  value = functools.reduce(operator.getitem, name.split('.'), config)
  if not isinstance(value, tuple):
    return problem
  example = repr(value)
  if re.fullmatch(r'\d+([\s,;x]+\d+)+', given):  # '8 8 8' and '8x8x8'.
    example = f'({",".join(re.findall("[0-9]+", given))})'
  elif not value:
    # Of one number in place of several, nobody knows what was meant.
    example = repr((given,)) if rule.fits((given,)) else '(A,B)'
  quote = '"' if "'" in example else "'"
  return (
      f'{problem} Write a tuple in parentheses and quotes:'
      f' --config.{name}={quote}{example.replace(" ", "")}{quote}'
  )


def _run(config: ml_collections.ConfigDict) -> int:
  """Runs the mode; only then is JAX imported."""
  workdir = _WORKDIR.value
  if workdir is None:
    workdir = pathlib.Path('runs', pathlib.Path(_CONFIG.value).stem)
  processes = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  if _DISTRIBUTED.value or any(x is not None for x in processes):
    from fsq_jax.runtime import processes as processes_lib

    processes_lib.join_processes(*processes)
  if _MODE.value != 'prepare':
    from fsq_jax.runtime import host

    host.keep_freed_memory()  # Before JAX has threads.
  return _MODES[_MODE.value](config, workdir)


def _train(config: ml_collections.ConfigDict, workdir: _Path) -> int:
  from fsq_jax import train

  try:
    train.train_and_evaluate(
        config, workdir, allow_config_change=_ALLOW_CONFIG_CHANGE.value
    )
  except train.Preempted as preempted:
    sys.stderr.write(
        f'Interrupted; step {preempted.step} is saved. Run the same command'
        ' again to continue.\n'
    )
    return _INTERRUPTED
  except train.RunError as error:
    if _DEBUG.value:
      traceback.print_exc()
    # The last line: of all else that Orbax could not write, asyncio and Python
    # would have their say when the interpreter ends.
    logging.set_verbosity(logging.FATAL)
    warnings.simplefilter('ignore')
    sys.unraisablehook = lambda _: None
    sys.stderr.write(f'launch.py: {error}\n')
    return _FAILED
  return 0


def _eval(config: ml_collections.ConfigDict, workdir: _Path) -> int:
  from fsq_jax.evaluation import saved_run

  saved_run.evaluate_workdir(
      config,
      workdir,
      which=_CHECKPOINT.value,
      output=_OUTPUT.value,
      # Numbers are printed before they are written.
      show=lambda lines: _print(*lines),
  )
  return 0


def _report(config: ml_collections.ConfigDict, workdir: _Path) -> int:
  from fsq_jax.analysis import codebook

  return _print(
      codebook.analyze_workdir(
          config, workdir, which=_CHECKPOINT.value, output=_OUTPUT.value
      )
  )


def _tokenize(config: ml_collections.ConfigDict, workdir: _Path) -> int:
  from fsq_jax import tokens

  folder = _TOKENS.value or tokens.default_folder(config, workdir)
  was_complete = tokens.is_complete(folder)
  try:
    manifest = tokens.tokenize_workdir(
        config, workdir, which=_CHECKPOINT.value, folder=folder,
        verify_images=_VERIFY_IMAGES.value,
    )
  except tokens.Interrupted:
    sys.stderr.write('Interrupted. Run the same command again to continue.\n')
    return _INTERRUPTED
  notes = ['nothing written: the folder is already complete'] * was_complete
  return _print(folder, *notes, *tokens.describe(manifest))


def _detokenize(config: ml_collections.ConfigDict, workdir: _Path) -> int:
  from fsq_jax import tokens

  folder = _TOKENS.value or tokens.default_folder(config, workdir)
  images = _IMAGES.value or f'{folder}_images'
  tokens.detokenize_workdir(workdir, folder, images, which=_CHECKPOINT.value)
  return _print(images)


def _export(config: ml_collections.ConfigDict, workdir: _Path) -> int:
  from fsq_jax.tokenizer import export

  return _print(
      export.export_workdir(
          config, workdir, _EXPORT.value, which=_CHECKPOINT.value
      )
  )


def _prepare(config: ml_collections.ConfigDict, workdir: _Path) -> int:
  from fsq_jax import data

  del workdir  # Data sets have folders of their own.
  data.prepare(config.data)
  return 0


def _latent_statistics(
    config: ml_collections.ConfigDict, workdir: _Path
) -> int:
  from fsq_jax.train import latent_statistics

  return _print(latent_statistics.measure_to_workdir(config, workdir))


_MODES = {
    'train': _train,
    'eval': _eval,
    'report': _report,
    'tokenize': _tokenize,
    'detokenize': _detokenize,
    'export': _export,
    'prepare': _prepare,
    'latent_statistics': _latent_statistics,
}


def _print(*lines: Any) -> int:
  sys.stdout.write(''.join(f'{line}\n' for line in lines))
  sys.stdout.flush()
  return 0


def _refuse(error: Exception) -> int:
  sys.stderr.write(f'launch.py: {error}\n')
  # A RuntimeError says that what was asked for is right and was not possible.
  return _FAILED if isinstance(error, RuntimeError) else _BAD_INPUT


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags of this file and returns the other arguments."""
  flags.FLAGS.set_gnu_getopt()
  try:
    return flags.FLAGS(argv, known_only=True)
  except flags.Error as error:
    sys.exit(_refuse(error))
  except SystemExit:
    # absl leaves --help with 1, as if something had failed.
    sys.exit(0)


if __name__ == '__main__':
  app.run(main, flags_parser=_parse_flags)
