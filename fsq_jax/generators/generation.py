"""--mode=generate: samples images into a folder and a file, resumably."""

from collections.abc import Iterator, Mapping
from concurrent import futures
import contextlib
import errno
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import ml_collections
import numpy as np
import PIL.Image

from fsq_jax.checkpoints import saved_model
from fsq_jax.configuration import errors
from fsq_jax.data import pixel_formats
from fsq_jax.evaluation import sample_files
from fsq_jax.generators import builder
from fsq_jax.generators import embeddings
from fsq_jax.generators import evaluation
from fsq_jax.generators import sampler as samplers
from fsq_jax.generators import saved_generator
from fsq_jax.generators import token_files
from fsq_jax.report import grid as grid_lib
from fsq_jax.runtime import preemption
from fsq_jax.runtime import processes
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import progress as progress_lib
from fsq_jax.workdir import provenance
from fsq_jax.workdir import urls

# Images in the contact sheet of a class.
_SHEET_IMAGES = 64
_SHEETS = 'contact_sheets'
_RECORD = 'samples.json'
# Folder of the partial results of an interrupted command.
_UNFINISHED = 'unfinished'
_PROGRESS = 'progress.json'
_PIXELS = 'pixels'


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
  are. An interrupted command resumes when it is given again.

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
      training, no checkpoint, outputs that cannot be written, or an interrupted
      command with other settings.
    Interrupted: by SIGTERM or SIGINT in any process.
  """
  if images is None and npz is None:
    raise ValueError('Give --images=FOLDER, --npz=FILE, or both.')
  found, config, mesh = saved_model.open_run(
      config, workdir, which, mode='generate'
  )
  outputs = _Outputs(images, npz)
  with processes.fail_together():
    if jax.process_index() == 0:
      outputs.check()
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
  settings = {
      'step': found.step,
      'generator_hash': saved_generator.hash_variables(saved.variables),
      'model_hash': saved.tokens.model_hash,
      'parameters': 'EMA',
      'sampler': builder.describe_sampling(sampling),
      'seed': config.seed,
      'num_images': len(labels),
      'classes': _choose_classes(config, saved.model.num_classes).tolist(),
  }
  with _writing(), contextlib.ExitStack() as stack:
    writer = None
    with processes.fail_together():
      if jax.process_index() == 0:
        writer = stack.enter_context(
            outputs.open(settings, labels, saved.tokens.label_names)
        )
    request = stack.enter_context(preemption.catch_signals(together=False))
    _sample_all(sampler, saved, tokenizer, config, labels, writer, request)
    with processes.fail_together():
      if writer is None:
        return []
      return writer.finish(
          {**settings, 'workdir': str(found.folder), **provenance.describe()}
      )


@contextlib.contextmanager
def _writing() -> Iterator[None]:
  try:
    yield
  except OSError as error:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = 'free some space' if is_full else 'correct this'
    raise RuntimeError(
        f'{error.filename or "The images"}: {error.strerror};'
        f' {advice} and run the same command again, or give another --images or'
        ' --npz.'
    ) from error


def choose_labels(
    config: ml_collections.ConfigDict, num_classes: int
) -> np.ndarray:
  """Returns the label of each image of --mode=generate, [n] int64.

  Raises:
    ValueError: sample.classes that the generator does not have.
  """
  classes = _choose_classes(config, num_classes)
  chosen = sample_files.balanced_labels(
      config.sample.num_images, len(classes), config.seed
  )
  return classes[chosen]


def _choose_classes(
    config: ml_collections.ConfigDict, num_classes: int
) -> np.ndarray:
  """Returns the classes of sample.classes, in order; -1 without classes."""
  classes = np.array(config.sample.classes or range(num_classes), np.int64)
  if not len(classes):
    classes = np.array([embeddings.NO_LABEL])
  with errors.about('sample.classes'):
    embeddings.check_labels(classes, num_classes)
  return classes


def _sample_all(
    sampler, saved, tokenizer, config, labels, writer, request
) -> None:
  """Samples batch by batch; the first process decodes and writes.

  Raises:
    Interrupted: after a batch.
  """
  size = config.sample.batch_size
  done = np.array(0 if writer is None else writer.num_done)
  first = int(processes.gather(done).max())
  bar = progress_lib.ImageProgress(
      num_images=len(labels), first=first, enabled=writer is not None
  )
  with contextlib.closing(bar):
    for start in range(first, len(labels), size):
      if processes.is_any(request.is_due()):
        raise preemption.Interrupted
      part = labels[start : start + size]
      tokens = sampler(
          saved.variables, part, config.seed,
          examples=np.arange(start, start + len(part)),
      ).tokens
      with processes.fail_together():
        if writer is not None:
          writer.add(evaluation.decode(tokenizer, tokens, saved.model.grid))
      bar.update(len(part))
    bar.log()


class _Outputs:
  """The folder and the file of --mode=generate."""

  def __init__(
      self,
      images: str | os.PathLike[str] | None,
      npz: str | os.PathLike[str] | None,
  ):
    self.folder, self.file = (
        None if x is None else urls.local_path(x, name).absolute()
        for x, name in ((images, '--images'), (npz, '--npz'))
    )
    if self.folder is not None:
      self.unfinished = self.folder / _UNFINISHED
    else:
      self.unfinished = self.file.with_suffix(f'.{_UNFINISHED}')

  def check(self) -> None:
    """Creates folders; raises ValueError for outputs that exist."""
    folder, file = self.folder, self.file
    if file is not None and file.suffix != '.npz':
      raise ValueError(f'--npz={file} does not end in .npz; add the ending.')
    if not self.unfinished.is_dir():
      if folder is not None and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f'--images={folder} is not empty; give a new folder.')
      for path in (file, file and file.with_suffix('.json')):
        if path is not None and path.exists():
          raise ValueError(f'--npz={file}: {path} exists; give another name.')
    if folder is not None:
      workdirs.create(folder, '--images')
    if file is not None:
      workdirs.create(file.parent, '--npz')

  @contextlib.contextmanager
  def open(
      self,
      settings: Mapping[str, Any],
      labels: np.ndarray,
      label_names: tuple[str, ...],
  ) -> Iterator['_Writer']:
    """Locks the outputs and yields their writer.

    Args:
      settings: of the images, JSON values.
      labels: of all images.
      label_names: names of the classes.

    Raises:
      ValueError: another command writes there, or was interrupted with other
        settings.
    """
    settings = {**settings, 'npz': self.file is not None}
    self.unfinished.mkdir(exist_ok=True)
    flag = '--npz' if self.folder is None else '--images'
    with workdirs.lock(self.unfinished, flag):
      progress = workdirs.read_json(self.unfinished / _PROGRESS) or {
          'settings': settings, 'num_done': 0, 'image_shape': None,
      }
      saved = progress['settings']
      if changed := [x for x in settings if saved.get(x) != settings[x]]:
        raise ValueError(
            f'{self.unfinished} has {progress["num_done"]} images of an'
            f' interrupted command with other settings ({", ".join(changed)});'
            f' give that command again, another {flag}, or delete'
            f' {self.folder or self.unfinished}.'
        )
      yield _Writer(self, progress, labels, label_names)


class _Writer:
  """Writes images in the order of their numbers.

  Attributes:
    num_done: images that are written.
  """

  def __init__(
      self,
      outputs: _Outputs,
      progress: dict[str, Any],
      labels: np.ndarray,
      label_names: tuple[str, ...],
  ):
    self._outputs, self._progress = outputs, progress
    self._names, self._labels = label_names, labels

  @property
  def num_done(self) -> int:
    return self._progress['num_done']

  def add(self, images: np.ndarray) -> None:
    """Writes the next images, [b, H, W, C] uint8."""
    start, end = self.num_done, self.num_done + len(images)
    if self._outputs.folder is not None:
      paths = [self._path(number) for number in range(start, end)]
      with futures.ThreadPoolExecutor() as pool:
        list(pool.map(grid_lib.save_png, paths, images))
    self._progress['image_shape'] = list(images.shape[1:])
    if self._outputs.file is not None:
      pixels = self._open_pixels()
      pixels[start:end] = images
      pixels.flush()
    self._progress['num_done'] = end
    workdirs.write_json(self._outputs.unfinished / _PROGRESS, self._progress)

  def finish(self, record: dict[str, Any]) -> list[pathlib.Path]:
    """Writes contact sheets, record and file; returns the paths."""
    folder, file = self._outputs.folder, self._outputs.file
    written = []
    if folder is not None:
      for label in np.unique(self._labels):
        numbers = np.flatnonzero(self._labels == label)[:_SHEET_IMAGES]
        images = [
            pixel_formats.to_array(PIL.Image.open(self._path(i)))
            for i in numbers
        ]
        grid_lib.save_png(
            folder / _SHEETS / f'{self._class_name(label)}.png',
            grid_lib.contact_sheet(
                np.stack(images), np.full(len(images), -1), ()
            ),
        )
      workdirs.write_json(folder / _RECORD, record)
      written.append(folder)
    if file is not None:
      sample_files.write_npz(
          file, self._open_pixels(), self._labels, record['seed']
      )
      path = file.with_suffix('.json')
      workdirs.write_json(path, record)
      written += [file, path]
    shutil.rmtree(self._outputs.unfinished)
    return written

  def _open_pixels(self) -> np.memmap:
    """Images of the file lie on disk: 50,000 of them may need 10 GB."""
    path = self._outputs.unfinished / _PIXELS
    shape = len(self._labels), *self._progress['image_shape']
    if not path.exists():
      with open(path, 'xb') as file:
        # A full disk is an error here; later it would kill the process.
        os.posix_fallocate(file.fileno(), 0, math.prod(shape))
    return np.memmap(path, np.uint8, 'r+', 0, shape)

  def _path(self, number: int) -> pathlib.Path:
    name = self._class_name(self._labels[number])
    return self._outputs.folder / 'images' / name / f'{number:06d}.png'

  def _class_name(self, label: int) -> str:
    """Returns the folder of a class: its number and name."""
    if label < 0:
      return 'unconditional'
    name = self._names[label] if label < len(self._names) else ''
    safe = ''.join(x if x.isalnum() or x in '-_' else '_' for x in name)[:80]
    return f'{label:04d}_{safe}'.rstrip('_')
