"""Evaluates a checkpoint of a run (--mode=eval)."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import ml_collections

from fsq_jax.checkpoints import saved_model
from fsq_jax.data import builder as data
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.evaluation import image_arrays
from fsq_jax.evaluation import image_folders
from fsq_jax.evaluation import native_evaluation
from fsq_jax.evaluation import results as results_lib
from fsq_jax.report import report as reports
from fsq_jax.runtime import partitioning
from fsq_jax.runtime import processes
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import urls

# Fields of the data section that select and preprocess evaluation images.
_EVALUATION_IMAGES = (
    'source', 'name', 'data_dir', 'eval_split', 'resize_shorter',
)
# Characters of a hash in a file name.
_SHORT_HASH = 8


def evaluate_workdir(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    which: str = 'newest',
    output: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    npz: str | os.PathLike[str] | None = None,
    show: Callable[[Iterable[Any]], None] = lambda lines: None,
) -> results_lib.Evaluation:
  """Evaluates a checkpoint of a run.

  The newest checkpoint on the run's own split rewrites evaluation.json and the
  report. Other evaluations have separate files, with the step in their names:
  evaluation_best_step_00004000.json for the best checkpoint,
  evaluation_native_step_00008000.json for images at their native size
  (eval.native_size), and, for other images, a name with a hash of the fields
  that select them: evaluation_photos_test_1f0c2d3e_step_00008000.json.

  Args:
    config: of the run; its data section may name other evaluation images.
    workdir: the run's folder.
    which: checkpoint: 'newest', 'best' (highest PSNR), or a step number.
    output: folder for the files; by default the run's.
    images: new or empty folder for all evaluated images as PNG files, in
      originals/ and reconstructions/ (`image_folders`); None writes none.
    npz: NAME.npz, to write the same images as NAME_originals.npz and
      NAME_reconstructions.npz (`image_arrays`); None writes none.
    show: called with lines to print: the results before they are written, then
      the path of the file.

  Returns:
    The evaluation, also written to the folder.

  Raises:
    ValueError: an invalid config or another model than the checkpoint's, no
      checkpoint, a folder that cannot be written or, of `images`, is not empty,
      or a file of `npz` that exists.
    RuntimeError: images cannot be written, or the results cannot be written;
      they have been shown.
  """
  found, config, mesh = saved_model.open_run(
      config, workdir, which, mode='eval'
  )
  folder = prepare_output(found.folder, output)
  native = config.eval.native_size
  outputs = _open_outputs(images, npz, native)

  def write(batch: Any, output: results_lib.EvalOutput) -> None:
    for writer, path, flag in outputs:
      with writing_to(path, flag):
        writer.write(batch, output)

  options = {'after_batch': write} if outputs else {}
  # At native size every process evaluates all images.
  shard = partitioning.DataShard(0, 1)
  if not native:
    shard = partitioning.data_shard(mesh)
  dataset = data.build_dataset(
      config.data,
      split='eval_native' if native else 'eval',
      seed=config.seed,
      **shard._asdict(),
  )
  # Early, since files may be missing.
  networks = evaluators.build_networks(config, dataset, mesh, folder)
  other_sizes = {}
  if not native:
    other_sizes = evaluators.open_other_sizes(config, mesh, folder)
  model, variables = saved_model.restore(found, mesh)
  kwargs = {
      'num_grid_images': config.eval.num_grid_images, 'networks': networks
  }
  if native:
    evaluator = native_evaluation.NativeEvaluator(
        model, dataset, mesh, tuple(config.data.image_size), **kwargs
    )
  else:
    evaluator = evaluators.Evaluator(
        model, dataset, mesh, **kwargs, other_sizes=other_sizes
    )
  result = evaluator.run(variables, **options)
  show([*result.lines(), f'Step {found.step}: {result.summary()}'])
  if jax.process_index() == 0:
    label = evaluation_label(config, found.config, which)
    with writing_to(folder):
      path = results_lib.write_evaluation(folder, found.step, result, label)
      if not label:
        reports.write_report(found.folder, folder)
    show([path])
  for writer, path, flag in outputs:
    with writing_to(path, flag):
      writer.finish()
  return result


def prepare_output(
    folder: pathlib.Path, output: str | os.PathLike[str] | None
) -> pathlib.Path:
  """Returns the folder for results about a run, after a check of writing.

  Args:
    folder: of the run.
    output: folder to use instead, created if missing; None for the run's.

  Raises:
    ValueError: the folder cannot be written.
  """
  path = folder
  if output is not None:
    path = workdirs.run_folder(output, '--output')
  # Only the first process writes.
  with processes.fail_together():
    if jax.process_index() == 0:
      workdirs.create(path, '--output', urls.STORES)
  return path


class _Output(NamedTuple):
  """Where evaluated images are written, and the flag that names it."""

  writer: image_folders.ImageFolders | image_arrays.ImageArrays
  path: pathlib.Path
  flag: str


def _open_outputs(
    images: str | os.PathLike[str] | None,
    npz: str | os.PathLike[str] | None,
    native: bool,
) -> list[_Output]:
  """Opens the outputs of the evaluated images, before any work."""
  if native and (images, npz) != (None, None):
    raise ValueError(
        'eval.native_size is True, but --images and --npz take evaluated images'
        ' of one size; leave them out, or use --mode=reconstruct for whole'
        ' images.'
    )
  outputs = []
  if images is not None:
    folder = new_folder(images, '--images')
    writer = image_folders.ImageFolders(folder)
    outputs.append(_Output(writer, folder, '--images'))
  if npz is not None:
    writer = image_arrays.ImageArrays(npz)
    outputs.append(_Output(writer, writer.paths[0], '--npz'))
  return outputs


def new_folder(path: str | os.PathLike[str], flag: str) -> pathlib.Path:
  """Returns an empty folder for files that process 0 writes.

  Collective.

  Args:
    path: the folder, created if missing.
    flag: flag of the folder, for messages.

  Raises:
    ValueError: the folder is not empty or cannot be written.
  """
  folder = check_new_folder(path, flag)
  with processes.fail_together():
    if jax.process_index() == 0:
      workdirs.create(folder, flag)
  return folder


def check_new_folder(path: str | os.PathLike[str], flag: str) -> pathlib.Path:
  """Returns the path of a folder that is missing or empty; creates nothing.

  Collective.

  Args:
    path: the folder.
    flag: flag of the folder, for messages.

  Raises:
    ValueError: the path is a file, or a folder that is not empty.
  """
  folder = urls.local_path(path, flag).absolute()
  with processes.fail_together():
    if jax.process_index() == 0:
      if folder.is_file():
        raise ValueError(f'{folder} is a file; give a folder with {flag}.')
      if not workdirs.is_empty(folder):
        raise ValueError(f'{flag}={folder} is not empty; give a new folder.')
  return folder


@contextlib.contextmanager
def writing_to(
    folder: pathlib.Path, flag: str = '--output'
) -> Iterator[None]:
  """Context for writing results; errors name the flag for another folder.

  Raises:
    RuntimeError: an OSError of the body.
  """
  try:
    yield
  except OSError as error:
    raise RuntimeError(
        f'{error.filename or folder} cannot be written ({error.strerror}); give'
        f' another folder with {flag}.'
    ) from error


def evaluation_label(
    config: ml_collections.ConfigDict,
    own: ml_collections.ConfigDict,
    which: str,
) -> str:
  """Returns the label of an evaluation; '' for the run's own."""
  words = [] if which == 'newest' else [which]
  if which.isdecimal():
    words = ['checkpoint']  # File names contain the step.
  if config.eval.native_size:
    words.append('native')
  images, own_images = _images(config), _images(own)
  if images != own_images:
    text = json.dumps(images, sort_keys=True)
    words += [
        config.data.name or config.data.source,
        pathlib.Path(images['data_dir']).name,
        config.data.eval_split,
        hashlib.sha256(text.encode()).hexdigest()[:_SHORT_HASH],
    ]
  return '_'.join(re.findall(r'\w+', ' '.join(words)))


def _images(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the fields that select and preprocess evaluation images."""
  fields = {name: config.data[name] for name in _EVALUATION_IMAGES}
  if config.data.data_dir:
    path = pathlib.Path(config.data.data_dir).expanduser()
    # Equal for all spellings of the same path.
    fields['data_dir'] = str(path.resolve())
  if sizes := config.data.get('image_sizes'):
    fields['image_sizes'] = sorted(map(list, sizes))
  return fields
