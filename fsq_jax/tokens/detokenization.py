"""Token files to images (mode detokenize)."""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import io
import os
import pathlib

import jax
import numpy as np
from PIL import Image

from fsq_jax import progress
from fsq_jax import runtime
from fsq_jax import tokenizer as tokenizers
from fsq_jax import workdir as workdirs
from fsq_jax.tokens import shards
from fsq_jax.tokens import source as sources
from fsq_jax.tokens import tokenization

_NUM_THREADS = 2


def detokenize_workdir(
    workdir: str | os.PathLike[str],
    tokens: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    which: str = 'newest',
) -> int:
  """Writes the images of token files as PNG, named as those they are of.

  They are what `Tokenizer.reconstruct` makes of the images.

  Args:
    workdir: folder of the run, or of the saved tokenizer, that made the tokens.
    tokens: folder of the token files.
    images: folder for the images, NAME.png for the one of each NAME; several
      processes share them.
    which: checkpoint of the run that made the tokens.

  Returns:
    Number of images written by this process.

  Raises:
    ValueError: token files that are damaged, or that another model made.
  """
  runtime.keep_freed_memory()  # Before JAX has threads.
  source = sources.TokenSource(tokens)
  tokenizer = tokenization.load_tokenizer(
      workdir, which, source.manifest.job.batch_size
  )
  source.check_decodable(tokenizer.spec, tokenizer.model_hash)
  folder = workdirs.create(images, '--images')
  share = range(jax.process_index(), len(source), jax.process_count())
  bar = progress.ImageProgress(
      num_images=len(share), first=0, enabled=jax.process_index() == 0
  )
  names = set()
  with (
      contextlib.closing(bar),
      futures.ThreadPoolExecutor(_NUM_THREADS) as pool,
  ):
    writing = []
    for batch in _batches(source, share):
      paths = [_path(folder, example.name, names) for example in batch]
      # The last batch is written while this one is decoded.
      decoded = _decode(tokenizer, batch, source.manifest.job.fit)
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
  return len(share)


def _batches(
    source: sources.TokenSource, share: range
) -> Iterator[list[shards.Example]]:
  size = source.manifest.job.batch_size
  for start in range(0, len(share), size):
    yield [source[i] for i in share[start : start + size]]


def _decode(
    tokenizer: tokenizers.Tokenizer, batch: list[shards.Example], fit: str
) -> list[np.ndarray]:
  """Returns the [H, W, 3] uint8 image of each example."""
  images = [None] * len(batch)
  sizes = [example.size if fit == 'pad' else None for example in batch]
  for rows in tokenization.group_equal([
      (example.tokens.shape, size)
      for example, size in zip(batch, sizes, strict=True)
  ]):
    decoded = tokenizer.decode(
        np.stack([batch[i].tokens for i in rows]), sizes[rows[0]]
    )
    for i, image in zip(rows, decoded, strict=True):
      images[i] = image
  return images


def _path(folder: pathlib.Path, name: str, names: set[str]) -> pathlib.Path:
  """Returns where an image goes; a foreign name may not lead out."""
  if '\0' in name or not name or name in names:
    raise ValueError(
        f'The token files have an image of the name {name!r}, which is empty,'
        ' no name of a file, or there twice.'
    )
  names.add(name)
  path = folder / f'{name}.png'
  if not pathlib.Path(os.path.realpath(path)).is_relative_to(
      os.path.realpath(folder)
  ):
    raise ValueError(
        f'The token files have an image of the name {name!r}, which is outside'
        f' of {folder}.'
    )
  return path


def _write(path: pathlib.Path, image: np.ndarray) -> None:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG')
  path.parent.mkdir(parents=True, exist_ok=True)
  workdirs.write_bytes(path, buffer.getvalue())
