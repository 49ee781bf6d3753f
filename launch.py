"""Trains and uses image tokenizers, and generators on their tokens.

  python launch.py --config=configs/fsq_888.py [--workdir=runs/fsq_888]
      [--mode=train|eval|report|reconstruct|tokenize|detokenize|export|
       prepare|latent_statistics|generate]
      [--config.SECTION.FIELD=VALUE ...]

configs/default.py documents the fields, and configs/default_generator.py those
of generators. The same command started again resumes from the newest
checkpoint. A config file is Python that is executed: run only files you trust.

Exit codes: 0 done; 1 failed; 2 bad config or input, named in the message;
75 interrupted after a save, run the same command again to continue.
"""

from collections.abc import Callable, Iterator
import contextlib
import pathlib
import sys
import traceback
import warnings

from absl import app
from absl import flags
from absl import logging
import ml_collections

from fsq_jax.configuration import command_line
from fsq_jax.configuration import loading as configuration
from fsq_jax.configuration import shipped

_CONFIG = flags.DEFINE_string(
    'config',
    None,
    'Path of a config file. --config.SECTION.FIELD=VALUE overrides a field;'
    " tuples are quoted: '(8,8,8)'. Modes that load a run can do without: they"
    ' use the config.json of the workdir.',
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Folder of the run, or gs://BUCKET/FOLDER. Default: runs/NAME_OF_CONFIG;'
    f' for reconstruct without a --config, the tokenizer {shipped.DEFAULT} that'
    ' ships with fsq_jax.',
)
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint',
    'newest',
    'Checkpoint to load: newest, best (highest PSNR, or fewest bits per token'
    ' of a generator) or a step number.',
)
_TOKENS = flags.DEFINE_string(
    'tokens', None, 'Token files, also gs://. Default: WORKDIR/tokens/NAME.'
)
_VERIFY_IMAGES = flags.DEFINE_bool(
    'verify_images',
    False,
    'Mode tokenize: compare the hashes of all tokenized images, not only of'
    ' those whose size or time has changed.',
)
_IMAGES = flags.DEFINE_string(
    'images',
    None,
    'Folder that detokenize, reconstruct and generate write images to, and'
    ' eval the evaluated crops and their reconstructions. Default of'
    ' detokenize: TOKENS_images, if that is a local folder.',
)
_IMAGES_IN = flags.DEFINE_string(
    'images_in', None, 'Image file, or folder of images, for reconstruct.'
)
_TILES = flags.DEFINE_enum(
    'tiles',
    'disjoint',
    ['disjoint', 'overlapping'],
    'Mode reconstruct: tiles of whole images for a ViT. overlapping: blended,'
    ' without seams, up to four times as many tokens.',
)
_NPZ = flags.DEFINE_string(
    'npz',
    None,
    'File NAME.npz that generate writes images to, shuffled, for the ADM suite;'
    ' eval writes NAME_originals.npz and NAME_reconstructions.npz, in order.',
)
_EXPORT = flags.DEFINE_string(
    'export', None, 'Folder that export writes to. Default: WORKDIR/export.'
)
_OUTPUT = flags.DEFINE_string(
    'output', None, 'Folder that eval and report write to. Default: WORKDIR.'
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    'allow_config_change', False, 'Resume although the config has changed.'
)
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed',
    False,
    'Initialize jax.distributed (multi-host). JAX detects Cloud TPU, SLURM,'
    ' Open MPI and Kubernetes; elsewhere, give the next three flags.',
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator_address', None, 'host:port of process 0, for all processes.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'Number of processes.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', None, 'Number of this process, from 0.', lower_bound=0
)
_DEBUG = flags.DEFINE_bool(
    'debug', False, 'Show the traceback of a bad config or input.'
)

# Flags that are local paths, and those that may also be gs://BUCKET/X.
_PATHS = 'config', 'images', 'images_in', 'npz'
_IN_STORES = 'workdir', 'tokens', 'output', 'export'
_ROOT = pathlib.Path(__file__).resolve().parent
_Config = ml_collections.ConfigDict
_Path = str | pathlib.Path

_FAILED = 1
_BAD_INPUT = 2
_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again.


class _Interrupted(Exception):  # noqa: N818  # Not an error: the run is intact.
  """The same command continues the run."""


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
  """Context that turns interruptions of the library into `_Interrupted`."""
  from fsq_jax.runtime import preemption
  from fsq_jax.train import loop

  try:
    yield
  except loop.Preempted as preempted:
    raise _Interrupted(f'; step {preempted.step} is saved') from preempted
  except preemption.Interrupted as interrupted:
    raise _Interrupted from interrupted


# By name: the function of a mode, and the flags that only some modes read.
_MODES, _READS = {}, {}


def _mode(*names: str) -> Callable[[Callable], Callable]:
  """Registers a function as the mode of its name that reads these flags."""

  def register(run):
    mode = run.__name__.removeprefix('_')
    _MODES[mode], _READS[mode] = run, names
    return run

  return register


# Modes, with their help texts as docstrings. Each imports its library function,
# since importing JAX takes seconds, and returns lines to print, if any.


@_mode('allow_config_change')
def _train(config: _Config, workdir: _Path) -> None:
  """Train a model."""
  if configuration.is_generator(config):
    from fsq_jax.generators import training
  else:
    from fsq_jax.train import autoencoder as training

  training.train_and_evaluate(
      config, workdir, allow_config_change=_ALLOW_CONFIG_CHANGE.value
  )


@_mode('checkpoint', 'output', 'images', 'npz')
def _eval(config: _Config, workdir: _Path) -> None:
  """Evaluate a checkpoint of the workdir."""
  options = {}
  if configuration.is_generator(config):
    if (_IMAGES.value, _NPZ.value) != (None, None):
      raise ValueError(
          '--images and --npz with --mode=eval are for tokenizers;'
          ' --mode=generate writes images of a generator.'
      )
    from fsq_jax.generators import commands
  else:
    from fsq_jax.evaluation import saved_run as commands

    options = {'images': _IMAGES.value, 'npz': _NPZ.value}

  commands.evaluate_workdir(
      config, workdir, which=_CHECKPOINT.value, output=_OUTPUT.value,
      show=_print,  # Before anything is written.
      **options,
  )


@_mode('checkpoint', 'output')
def _report(config: _Config, workdir: _Path) -> list[_Path]:
  """Write report.html again, with codebook, best and worst images."""
  if configuration.is_generator(config):
    from fsq_jax.generators import commands

    return [commands.report_workdir(workdir, output=_OUTPUT.value)]
  from fsq_jax.analysis import codebook

  path = codebook.analyze_workdir(
      config, workdir, which=_CHECKPOINT.value, output=_OUTPUT.value
  )
  return [path]


@_mode('checkpoint', 'images_in', 'images', 'tiles')
def _reconstruct(config: _Config, workdir: _Path) -> list[_Path]:
  """Reconstruct whole images, beside the originals."""
  from fsq_jax.analysis import reconstruction

  if _takes_shipped_tokenizer():
    _print([f'Tokenizer: {shipped.DEFAULT}, which ships with fsq_jax.'])
  return reconstruction.reconstruct_files(
      workdir, _IMAGES_IN.value, _IMAGES.value, which=_CHECKPOINT.value,
      tiles=_TILES.value, config=config,
  )


@_mode('checkpoint', 'tokens', 'verify_images')
def _tokenize(config: _Config, workdir: _Path) -> list[_Path]:
  """Write the tokens of the data set to files."""
  from fsq_jax.tokens import summary
  from fsq_jax.tokens import tokenization

  folder = _TOKENS.value or tokenization.default_folder(config, workdir)
  was_complete = tokenization.is_complete(folder)
  manifest = tokenization.tokenize_workdir(
      config, workdir, which=_CHECKPOINT.value, folder=folder,
      verify_images=_VERIFY_IMAGES.value,
  )
  notes = ['nothing written: the folder is already complete'] * was_complete
  return [folder, *notes, *summary.describe(manifest)]


@_mode('checkpoint', 'tokens', 'images')
def _detokenize(config: _Config, workdir: _Path) -> list[_Path]:
  """Decode token files to images."""
  from fsq_jax.tokens import detokenization
  from fsq_jax.tokens import tokenization

  folder = _TOKENS.value or tokenization.default_folder(config, workdir)
  images = _IMAGES.value or f'{folder}_images'
  detokenization.detokenize_workdir(
      workdir, folder, images, which=_CHECKPOINT.value, config=config
  )
  return [images]


@_mode('checkpoint', 'export')
def _export(config: _Config, workdir: _Path) -> list[_Path]:
  """Write a checkpoint as StableHLO functions."""
  from fsq_jax.tokenizer import export

  path = export.export_workdir(
      config, workdir, _EXPORT.value, which=_CHECKPOINT.value
  )
  return [path]


@_mode()
def _prepare(config: _Config, workdir: _Path) -> list[_Path]:
  """Download and convert the data set."""
  from fsq_jax.data import builder as data

  del workdir  # Data sets have their own folders.
  prepared = data.prepare(config.data) or []
  return [prepared] if isinstance(prepared, str) else prepared


@_mode()
def _latent_statistics(config: _Config, workdir: _Path) -> list[_Path]:
  """Write mean and variance of latents, for model.latent_statistics."""
  from fsq_jax.train import latent_statistics

  return [latent_statistics.measure_to_workdir(config, workdir)]


@_mode('checkpoint', 'images', 'npz')
def _generate(config: _Config, workdir: _Path) -> list[_Path]:
  """Sample images from a generator."""
  from fsq_jax.generators import generation

  return generation.generate_workdir(
      config, workdir, which=_CHECKPOINT.value, images=_IMAGES.value,
      npz=_NPZ.value,
  )


_MODE = flags.DEFINE_enum(
    'mode',
    'train',
    list(_MODES),
    ' '.join(f'{name}: {run.__doc__}' for name, run in _MODES.items()),
)


def main(argv: list[str]) -> int:
  """Runs the mode that the flags name.

  Args:
    argv: the rest of the command line: the program, overrides of fields.

  Returns:
    The exit code.
  """
  if not flags.FLAGS['verbosity'].present:
    # Orbax and JAX log much at INFO; --verbosity=0 shows it.
    logging.set_verbosity(logging.WARNING)
  try:
    command_line.check_flags(
        _MODE.value, _READS, paths=_PATHS, in_stores=_IN_STORES
    )
    config = configuration.resolve_paths(_load_config(argv))
    configuration.check_config(config, mode=_MODE.value)
    default = pathlib.Path('runs', pathlib.Path(_CONFIG.value or '').stem)
    workdir = _find_workdir() or default
    _set_up_process()
    with _resumable():
      lines = _MODES[_MODE.value](config, workdir)
    _print(lines or [])
    return 0
  except _Interrupted as interrupted:
    sys.stderr.write(
        f'Interrupted{interrupted}. Run the same command again to continue.\n'
    )
    return _INTERRUPTED
  except (ValueError, RuntimeError) as error:
    if not _is_ours(error):
      raise
    if _DEBUG.value:
      traceback.print_exc()
    return _refuse(error)


def _load_config(argv: list[str]) -> _Config:
  """Loads the config that the flags name, with the overrides of argv."""
  # Modes that load a checkpoint find the config in the workdir.
  workdir = _find_workdir() if 'checkpoint' in _READS[_MODE.value] else None
  config = command_line.load(_CONFIG.value, workdir, _ROOT)
  command_line.override(config, argv)
  return config


def _find_workdir() -> _Path | None:
  """Returns --workdir, or the folder of the shipped tokenizer."""
  if _takes_shipped_tokenizer():
    return shipped.folder_of(shipped.DEFAULT)
  return _WORKDIR.value


def _takes_shipped_tokenizer() -> bool:
  names_run = _WORKDIR.value is not None or _CONFIG.value is not None
  return _MODE.value == 'reconstruct' and not names_run


def _set_up_process() -> None:
  """Joins the other processes and sets up memory, before JAX has threads."""
  processes = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  if _DISTRIBUTED.value or any(x is not None for x in processes):
    from fsq_jax.runtime import processes as processes_lib

    processes_lib.join_processes(*processes)
  if _MODE.value != 'prepare':
    from fsq_jax.runtime import host

    host.keep_freed_memory()


def _print(lines: list[_Path]) -> None:
  sys.stdout.write(''.join(f'{line}\n' for line in lines))
  sys.stdout.flush()


def _is_ours(error: Exception) -> bool:
  """Whether this code raised the error, about its input.

  An error raised inside a library is a bug: it keeps its traceback.
  """
  raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
  ours = (_ROOT / 'fsq_jax', _ROOT / 'configs', _ROOT / 'launch.py')
  return any(
      pathlib.Path(raised_in).resolve().is_relative_to(path) for path in ours
  )


def _refuse(error: Exception) -> int:
  sys.stderr.write(f'launch.py: {error}\n')
  # A RuntimeError: the input is right, but its run was not possible.
  return _FAILED if isinstance(error, RuntimeError) else _BAD_INPUT


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags of this file.

  Args:
    argv: the command line, program first.

  Returns:
    The other arguments, for `main`: the program and overrides of fields.
  """
  flags.FLAGS.set_gnu_getopt()
  try:
    return flags.FLAGS(argv, known_only=True)
  except flags.Error as error:
    sys.exit(_refuse(error))
  except SystemExit:
    # absl exits with 1 after --help, as if something had failed.
    sys.exit(0)


def run_main(argv: list[str]) -> int:
  """Runs `main`; the message of a failed run is the last thing printed."""
  code = main(argv)
  if code in (_FAILED, _BAD_INPUT):
    # Otherwise Orbax, asyncio and Python report failed writes at exit.
    logging.set_verbosity(logging.FATAL)
    warnings.simplefilter('ignore')
    sys.unraisablehook = lambda _: None
  return code


if __name__ == '__main__':
  app.run(run_main, flags_parser=parse_flags)
