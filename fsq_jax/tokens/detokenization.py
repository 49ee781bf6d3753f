"""Decodes token files to images (mode detokenize)."""

from concurrent import futures
import contextlib
import io
import os
import pathlib

import jax
import ml_collections
import numpy as np

from fsq_jax.checkpoints import saved_model
from fsq_jax.data import pixel_formats
from fsq_jax.runtime import processes
from fsq_jax.tokenizer import tokenizer as tokenizers
from fsq_jax.tokens import batches
from fsq_jax.tokens import manifest
from fsq_jax.tokens import shards
from fsq_jax.tokens import source as sources
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import progress
from fsq_jax.workdir import urls

_NUM_THREADS = 2
# Bytes of a file name, on most file systems.
_MAX_NAME = 255


def detokenize_workdir(
    workdir: str | os.PathLike[str],
    tokens: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    which: str = 'newest',
    config: ml_collections.ConfigDict | None = None,
) -> int:
  """Writes the decoded images of token files as PNG.

  They equal `Tokenizer.reconstruct` of the original images.

  Args:
    workdir: folder of the run, or of the saved tokenizer, that made the tokens.
    tokens: folder of the token files, or gs://BUCKET/X.
    images: output folder; image NAME becomes NAME.png, or NAME.viewN.png if
      there are several views. Several processes share the images batch by
      batch.
    which: checkpoint of the run that made the tokens.
    config: checked to have the model of the checkpoint, if given.

  Returns:
    Number of images written by this process.

  Raises:
    ValueError: corrupted token files, or token files or a config of another
      model.
  """
  with processes.fail_together():
    folder = urls.local_path(images, '--images').absolute()
    source = sources.TokenSource(tokens)
    _check_names(source, folder)
  job = source.manifest.job
  tokenizer = tokenizers.load_tokenizer(workdir, which, job.batch_size)
  # Batches are the same for any number of processes.
  size = job.batch_size
  if job.fit == 'pad':
    size = min(size, batches.NUM_WHOLE)
  starts = range(
      jax.process_index() * size, len(source), jax.process_count() * size
  )
  parts = [range(i, min(i + size, len(source))) for i in starts]
  with processes.fail_together():
    if config is not None:
      saved_model.check_same_model(tokenizer.config, config)
    source.check_decodable(tokenizer.spec, tokenizer.model_hash)
    workdirs.create(folder, '--images')
    _write_images(source, tokenizer, parts, folder)
  return sum(map(len, parts))


def _write_images(
    source: sources.TokenSource,
    tokenizer: tokenizers.Tokenizer,
    parts: list[range],
    folder: pathlib.Path,
) -> None:
  job = source.manifest.job
  bar = progress.ImageProgress(
      num_images=sum(map(len, parts)), first=0,
      enabled=jax.process_index() == 0,
  )
  with (
      contextlib.closing(bar),
      futures.ThreadPoolExecutor(_NUM_THREADS) as pool,
  ):
    writing = []
    for indices in parts:
      batch = [source[i] for i in indices]
      paths = [folder / _file(example, job) for example in batch]
      # The previous batch is written while this batch is decoded.
      decoded = _decode(tokenizer, batch, job)
      for written in writing:
        written.result()
      writing = [
          pool.submit(_write, path, image)
          for path, image in zip(paths, decoded, strict=True)
      ]
      bar.update(len(batch))
    for written in writing:
      written.result()
    bar.log()


def _decode(
    tokenizer: tokenizers.Tokenizer,
    batch: list[shards.Example],
    job: manifest.Job,
) -> list[np.ndarray]:
  """Returns the [H, W, C] uint8 image of each example."""
  images = [None] * len(batch)
  sizes = [example.size if job.fit == 'pad' else None for example in batch]
  for rows in batches.group_equal([
      (example.tokens.shape, size)
      for example, size in zip(batch, sizes, strict=True)
  ]):
    decoded = batches.apply_filled(
        lambda x, size=sizes[rows[0]]: tokenizer.decode(x, size),
        np.stack([batch[i].tokens for i in rows]),
        job,
    )
    for i, image in zip(rows, decoded, strict=True):
      images[i] = image
  return images


def _file(example: shards.Example, job: manifest.Job) -> str:
  view = f'.view{example.view}' if job.views > 1 else ''
  return os.path.normpath(f'{example.name}{view}.png')


def _check_names(source: sources.TokenSource, folder: pathlib.Path) -> None:
  """Checks that each name gives a file of its own inside the folder."""
  files, folders = set(), set()
  root = os.path.realpath(folder)
  for i in range(len(source)):
    example = source[i]
    name = example.name
    file = _file(example, source.manifest.job)
    problem = None
    if not name or '\0' in name:
      problem = 'is not a file name'
    elif file in files:
      problem = 'is also the name of another image'
    elif file in folders or not files.isdisjoint(_parents(file)):
      problem = 'is a folder in the name of another image, or vice versa'
    elif max(len(os.fsencode(part)) for part in file.split('/')) > _MAX_NAME:
      problem = f'has more than {_MAX_NAME} bytes, the limit of a file name'
    elif not pathlib.Path(os.path.realpath(folder / file)).is_relative_to(root):
      problem = f'is outside of {folder}'
    if problem is not None:
      raise ValueError(
          f'The token files have an image named {name[:99]!r}, which {problem};'
          ' nothing was written.'
      )
    files.add(file)
    folders.update(_parents(file))


def _parents(file: str) -> list[str]:
  return [str(parent) for parent in pathlib.PurePath(file).parents]


def _write(path: pathlib.Path, image: np.ndarray) -> None:
  buffer = io.BytesIO()
  pixel_formats.to_pillow(image).save(buffer, 'PNG')
  path.parent.mkdir(parents=True, exist_ok=True)
  workdirs.write_bytes(path, buffer.getvalue())
