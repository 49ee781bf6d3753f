"""Commands on the run of a generator: --mode=eval, report and generate."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import math
import os
import pathlib
import tempfile
from typing import Any

import jax
import ml_collections
import numpy as np
import PIL.Image

from fsq_jax.checkpoints import saved_model
from fsq_jax.configuration import errors
from fsq_jax.evaluation import sample_files
from fsq_jax.evaluation import saved_run
from fsq_jax.generators import builder
from fsq_jax.generators import embeddings
from fsq_jax.generators import evaluation
from fsq_jax.generators import sampler as samplers
from fsq_jax.generators import saved_generator
from fsq_jax.generators import token_files
from fsq_jax.report import grid as grid_lib
from fsq_jax.report import report as reports
from fsq_jax.runtime import processes
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import progress as progress_lib
from fsq_jax.workdir import provenance

# Images in the contact sheet of a class.
_SHEET_IMAGES = 64
_SHEETS = 'contact_sheets'
_RECORD = 'samples.json'


def evaluate_workdir(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    which: str = 'newest',
    output: str | os.PathLike[str] | None = None,
    show: Callable[[Iterable[Any]], None] = lambda lines: None,
) -> evaluation.Evaluation:
  """Evaluates a checkpoint of a generator's run.

  The newest checkpoint rewrites evaluation.json and the report; another one has
  a file with its step in the name.

  Args:
    config: of the run; its sections tokens, eval and sample may differ.
    workdir: the run's folder.
    which: checkpoint: 'newest', 'best' (fewest bits per token), or a step
      number.
    output: folder for the files; by default the run's.
    show: called with lines to print.

  Returns:
    The evaluation, also written to the folder.

  Raises:
    ValueError: an invalid config, other tokens than those of the training, no
      checkpoint, or a folder that cannot be written.
    RuntimeError: the results cannot be written; they have been shown.
  """
  found, config, mesh = saved_model.open_run(
      config, workdir, which, mode='eval'
  )
  folder = saved_run.prepare_output(found.folder, output)
  tokens = token_files.open_files(config)
  token_files.check_same(found.record['tokens'], tokens.format)
  saved = saved_generator.restore(found, mesh)
  evaluator = evaluation.Evaluator(
      config,
      saved.model,
      builder.build_sampling(
          config.sample, config.model.kind, saved.model.num_tokens
      ),
      tokens,
      mesh,
  )
  result = evaluator.run(saved.variables)
  show([*result.lines(), f'Step {found.step}: {result.summary()}'])
  if jax.process_index() == 0:
    label = {'newest': '', 'best': 'best'}.get(which, 'checkpoint')
    with saved_run.writing_to(folder):
      path = result.write(folder, found.step, label)
      if not label:
        reports.write_report(found.folder, folder)
    show([path])
  return result


def report_workdir(
    workdir: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
) -> str:
  """Writes report.html again from the files of a generator's run.

  Args:
    workdir: the run's folder.
    output: folder for the page; by default the run's.

  Returns:
    The path of the page.

  Raises:
    ValueError: no run of a generator, or a folder that cannot be written.
    RuntimeError: the page cannot be written.
  """
  found = saved_model.find_run(workdir)
  saved_model.check_same_kind(found, is_generator=True)
  folder = saved_run.prepare_output(found.folder, output)
  with saved_run.writing_to(folder):
    return reports.write_report(found.folder, folder)


def generate_workdir(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    which: str = 'newest',
    images: str | os.PathLike[str] | None = None,
    npz: str | os.PathLike[str] | None = None,
) -> list[pathlib.Path]:
  """Samples images from a checkpoint of a generator's run.

  Images are balanced over the classes. An image depends on its number, its
  label and the seed; the labels of the numbers depend on how many images there
  are.

  Args:
    config: of the run; its section sample may differ.
    workdir: the run's folder.
    which: checkpoint: 'newest', 'best' (fewest bits per token), or a step
      number.
    images: new or empty folder for images/CLASS/NUMBER.png,
      contact_sheets/CLASS.png and samples.json, the settings.
    npz: file for the images in the format of ADM's evaluation, shuffled.

  Returns:
    The paths that were written.

  Raises:
    ValueError: an invalid config, another tokenizer than the one of the
      training, no checkpoint, or outputs that cannot be written.
  """
  if images is None and npz is None:
    raise ValueError('Give --images=FOLDER, --npz=FILE, or both.')
  found, config, mesh = saved_model.open_run(
      config, workdir, which, mode='generate'
  )
  with processes.fail_together():
    folder = None if images is None else _prepare_folder(images)
    file = None if npz is None else _prepare_file(npz)
  saved = saved_generator.restore(found, mesh)
  sampling = builder.build_sampling(
      config.sample, config.model.kind, saved.model.num_tokens
  )
  labels = choose_labels(config, saved.model.num_classes)
  tokenizer = token_files.load_tokenizer(config)
  if tokenizer is None:
    raise ValueError(
        'tokens.tokenizer is empty, and images need the tokenizer that made the'
        ' tokens; set --config.tokens.tokenizer.'
    )
  saved_generator.check_tokenizer(saved.tokens, tokenizer)
  sampler = samplers.Sampler(
      saved.model, sampling, mesh,
      batch_size=config.sample.batch_size, shared=True,
  )
  record = {
      'step': found.step,
      'workdir': str(found.folder),
      'generator_hash': saved_generator.hash_variables(saved.variables),
      'model_hash': saved.tokens.model_hash,
      'parameters': 'EMA',
      'sampler': builder.describe_sampling(sampling),
      'seed': config.seed,
      'num_images': len(labels),
      'classes': sorted(set(labels.tolist())),
      **provenance.describe(),
  }
  with _writing(), contextlib.ExitStack() as stack:
    writer = None
    with processes.fail_together():
      if jax.process_index() == 0:
        writer = _Writer(folder, file, saved.tokens.label_names, labels, stack)
    _sample_all(sampler, saved, tokenizer, config, labels, writer)
    with processes.fail_together():
      return [] if writer is None else writer.finish(record, config.seed)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise RuntimeError(
        f'{error.filename or "The images"} cannot be written'
        f' ({error.strerror}); free some space, or give another --images or'
        ' --npz.'
    ) from error


def choose_labels(
    config: ml_collections.ConfigDict, num_classes: int
) -> np.ndarray:
  """Returns the label of each image of --mode=generate, [n] int64.

  Raises:
    ValueError: sample.classes that the generator does not have.
  """
  options = config.sample
  classes = np.array(options.classes or range(num_classes), np.int64)
  if not len(classes):
    classes = np.array([embeddings.NO_LABEL])
  with errors.about('sample.classes'):
    embeddings.check_labels(classes, num_classes)
  chosen = sample_files.balanced_labels(
      options.num_images, len(classes), config.seed
  )
  return classes[chosen]


def _sample_all(sampler, saved, tokenizer, config, labels, writer) -> None:
  """Samples batch by batch; the first process decodes and writes."""
  size = config.sample.batch_size
  bar = progress_lib.ImageProgress(
      num_images=len(labels), first=0, enabled=writer is not None
  )
  with contextlib.closing(bar):
    for start in range(0, len(labels), size):
      part = labels[start : start + size]
      tokens = sampler(
          saved.variables, part, config.seed,
          examples=np.arange(start, start + len(part)),
      ).tokens
      with processes.fail_together():
        if writer is not None:
          grid = saved.model.grid
          writer.add(start, evaluation.decode(tokenizer, tokens, grid))
      bar.update(len(part))
    bar.log()


def _prepare_folder(images: str | os.PathLike[str]) -> pathlib.Path:
  folder = pathlib.Path(images).expanduser().absolute()
  if jax.process_index() == 0:
    if folder.is_dir() and any(folder.iterdir()):
      raise ValueError(f'--images={folder} is not empty; give a new folder.')
    workdirs.create(folder, '--images')
  return folder


def _prepare_file(npz: str | os.PathLike[str]) -> pathlib.Path:
  path = pathlib.Path(npz).expanduser().absolute()
  if path.suffix != '.npz':
    raise ValueError(f'--npz={path} does not end in .npz; add the ending.')
  for written in (path, path.with_suffix('.json')):
    if written.exists():
      raise ValueError(f'--npz={path}: {written} exists; give another name.')
  if jax.process_index() == 0:
    workdirs.create(path.parent, '--npz')
  return path


class _Writer:
  """Writes images as they are sampled, in the first process."""

  def __init__(
      self,
      folder: pathlib.Path | None,
      file: pathlib.Path | None,
      label_names: tuple[str, ...],
      labels: np.ndarray,
      stack: contextlib.ExitStack,
  ):
    self._folder, self._file = folder, file
    self._names, self._labels = label_names, labels
    # Images of the file lie on disk: 50,000 of them may need 10 GB. The file
    # has no name and vanishes with the process, however it ends.
    self._scratch = None
    if file is not None:
      self._scratch = stack.enter_context(
          tempfile.TemporaryFile(dir=file.parent)  # noqa: SIM115
      )
    self._images = None

  def add(self, start: int, images: np.ndarray) -> None:
    """Adds [b, H, W, 3] uint8 images, the first of which has number start."""
    if self._folder is not None:
      for number, image in enumerate(images, start):
        grid_lib.save_png(self._path(number), image)
    if self._scratch is not None:
      if self._images is None:
        shape = len(self._labels), *images.shape[1:]
        # A full disk is an error here; later it would kill the process.
        os.posix_fallocate(self._scratch.fileno(), 0, math.prod(shape))
        self._images = np.memmap(self._scratch, np.uint8, 'w+', 0, shape)
      self._images[start : start + len(images)] = images

  def finish(self, record: dict[str, Any], seed: int) -> list[pathlib.Path]:
    """Writes contact sheet, record and file; returns the paths."""
    written = []
    if self._folder is not None:
      for label in np.unique(self._labels):
        numbers = np.flatnonzero(self._labels == label)[:_SHEET_IMAGES]
        images = [np.asarray(PIL.Image.open(self._path(i))) for i in numbers]
        grid_lib.save_png(
            self._folder / _SHEETS / f'{self._class_name(label)}.png',
            grid_lib.contact_sheet(
                np.stack(images), np.full(len(images), -1), ()
            ),
        )
      workdirs.write_json(self._folder / _RECORD, record)
      written.append(self._folder)
    if self._file is not None:
      sample_files.write_npz(self._file, self._images, self._labels, seed)
      path = self._file.with_suffix('.json')
      workdirs.write_json(path, record)
      written += [self._file, path]
    return written

  def _path(self, number: int) -> pathlib.Path:
    name = self._class_name(self._labels[number])
    return self._folder / 'images' / name / f'{number:06d}.png'

  def _class_name(self, label: int) -> str:
    """Returns the folder of a class: its number and name."""
    if label < 0:
      return 'unconditional'
    name = self._names[label] if label < len(self._names) else ''
    safe = ''.join(x if x.isalnum() or x in '-_' else '_' for x in name)[:80]
    return f'{label:04d}_{safe}'.rstrip('_')
