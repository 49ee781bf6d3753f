"""Reads token files: images by number, and batches for training."""

import bisect
from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import itertools
import math
import os
import pathlib
import threading
from typing import Any

from absl import logging
import grain
import numpy as np

from fsq_jax.data import pipelines
from fsq_jax.quantizers import specs
from fsq_jax.tokens import manifest as manifests
from fsq_jax.tokens import shards
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import object_store

# Copies of files in object stores, by hash.
CACHE_FOLDER = '~/.cache/fsq_jax/tokens'
_HASH_THREADS = 8
# Files open at a time; the limit of a process is often 1,024.
MAX_OPEN = 256


class TokenSource(Sequence[shards.Example]):
  """Random access to the tokens of a folder, from several threads at once.

  A random access source of Grain: `grain.MapDataset.source(tokens)`. Files in
  an object store are copied to `CACHE_FOLDER`, unless it has them.

  Attributes:
    folder: of the token files, local or in a store.
    manifest: of the folder.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    """Checks size and hash of all files against the manifest.

    Args:
      folder: written by --mode=tokenize; a local path or gs://BUCKET/X.

    Raises:
      ValueError: files that are missing or differ from the manifest; lists
        each of them.
      OSError: the store cannot be read.
    """
    self.folder = workdirs.run_folder(folder, 'folder')
    self.manifest = manifests.read(self.folder)
    self._local = self.folder
    if workdirs.is_remote(self.folder):
      cache = pathlib.Path(CACHE_FOLDER).expanduser()
      self._local = cache / self.manifest.shards_sha256
    with futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
      problems = list(pool.map(self._fetch, self.manifest.shards))
    if any(problems):
      raise ValueError(
          '\n  '.join([
              f'{self.folder} cannot be used; copy these files anew, or delete'
              ' the folder and run --mode=tokenize again:',
              *filter(None, problems),
          ])
      )
    counts = [shard.num_images for shard in self.manifest.shards]
    self._ends = list(itertools.accumulate(counts))
    # Open files, the last used last; an npz file is held in memory.
    self._shards: dict[int, Sequence[shards.Example]] = {}
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    # Grain's worker processes get a copy, which opens its own files and does
    # not check them again.
    return self.__dict__ | {'_shards': {}, '_lock': None}

  def __setstate__(self, state: Mapping[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def __len__(self) -> int:
    return self.manifest.num_images

  def __getitem__(self, index: int) -> shards.Example:
    """Returns the tokens of an image.

    Raises:
      ValueError: a corrupted file, or tokens that contradict the manifest.
      IndexError: no such image.
    """
    if not -len(self) <= index < len(self):
      raise IndexError(f'{self.folder} has {len(self)} images, not {index}.')
    index %= len(self)
    number = bisect.bisect_right(self._ends, index)
    try:
      shard = self._open(number)
      example = shard[index - self._ends[number] + len(shard)]
    except ValueError as error:
      if self._local == self.folder:
        raise
      file = self.folder / self.manifest.shards[number].file
      raise ValueError(f'{error} It is a copy of {file}.') from error
    grid = self.manifest.grid
    if grid is not None and example.tokens.shape[:2] != grid:
      raise ValueError(
          f'{self.folder} image {index} has a grid of'
          f' {example.tokens.shape[:2]} tokens; its manifest says {grid}.'
      )
    return example

  def check_decodable(self, spec: Mapping[str, Any], model_hash: str) -> None:
    """Checks that a model made these tokens and can decode them.

    Args:
      spec: of the model's quantizer.
      model_hash: of the model.

    Raises:
      ValueError: tokens of another convention or of another model.
    """
    specs.check_same_spec(self.manifest.job.quantizer, spec)
    made_by = self.manifest.job.model_hash
    if made_by != model_hash:
      raise ValueError(
          f'The tokens in {self.folder} were made by the model with hash'
          f' {made_by}, not by {model_hash}; decode them with the checkpoint'
          ' that made them (--workdir, --checkpoint).'
      )

  def _open(self, number: int) -> Sequence[shards.Example]:
    with self._lock:
      opened = self._shards.pop(number, None)
      if opened is None:
        shard = self.manifest.shards[number]
        path = self._local / shard.file
        opened = shards.open_shard(path, self.manifest.job)
        if len(opened) != shard.num_images:
          raise ValueError(
              f'{path} has {len(opened)} images; its manifest says'
              f' {shard.num_images}.'
          )
        if len(self._shards) >= MAX_OPEN:
          # The file is closed when no thread uses it any more.
          del self._shards[next(iter(self._shards))]
      self._shards[number] = opened
      return opened

  def _fetch(self, shard: manifests.Shard) -> str | None:
    """Copies a file unless it is local; returns why it cannot be used."""
    path = self._local / shard.file
    problem = _describe_damage(path, shard)
    if problem is None or self._local == self.folder:
      return problem
    workdirs.create(self._local, 'the variable HOME')
    try:
      with workdirs.open_atomic(path) as file:
        object_store.read_into(self.folder / shard.file, file)
        file.flush()
        if problem := _describe_damage(pathlib.Path(file.name), shard):
          raise _DamageError(problem)
    except FileNotFoundError:
      return f'{shard.file} is missing.'
    except _DamageError as error:
      return str(error)
    return None


class _DamageError(ValueError):
  """A file is not that of the manifest."""


def _describe_damage(
    path: pathlib.Path, shard: manifests.Shard
) -> str | None:
  """Returns how a local file differs from the manifest; None if it does not."""
  if not path.is_file():
    return f'{shard.file} is missing.'
  if (size := path.stat().st_size) != shard.num_bytes:
    return f'{shard.file} has {size} bytes, not {shard.num_bytes}.'
  if (digest := shards.hash_file(path)) != shard.sha256:
    return f'{shard.file} has sha256 {digest}, not {shard.sha256}.'
  return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenDataset:
  """Infinite batches of tokens, this process's data shard of each.

  Batches are dicts, with b = batch size / process_count:
    'tokens': [b, h, w, *index_shape] int32.
    'label': [b] int64, -1 for no label.
    'index': [b] int64, the number of the image in the source, counting views.

  Attributes:
    num_examples: images in the source.
    fingerprint: flat and JSON-able; determines the tokens of every step. Save
      it next to the iterator's state; see `data.check_fingerprint`.
  """

  num_examples: int
  fingerprint: Mapping[str, Any]
  _batches: grain.IterDataset = dataclasses.field(repr=False)

  def iterator(self) -> grain.DatasetIterator:
    """Returns a new iterator at the first batch.

    get_state() returns a JSON-able dict with the number of batches taken, the
    same on every process; set_state() resumes with the next batch.
    """
    return iter(self._batches)

  def __iter__(self) -> grain.DatasetIterator:
    return self.iterator()


def build_dataset(
    source: TokenSource,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    prefetch: int = 128,
) -> TokenDataset:
  """Builds infinite shuffled batches of tokens, to train a generator.

  Each epoch is a new seeded permutation; batches may span two epochs. The
  global batch of a step does not depend on the number of processes or threads.

  Args:
    source: tokens of images of one size.
    batch_size: global batch size (images per step over all processes).
    seed: of shuffling, >= 0.
    process_index: this process, in [0, process_count).
    process_count: processes that share each batch.
    num_threads: reader threads.
    prefetch: images to read ahead.

  Returns:
    The data set.

  Raises:
    ValueError: an invalid batch size, or images with different token grids.
  """
  _check_batches(source, batch_size, process_index, process_count)

  def load(index: int) -> dict[str, Any]:
    example = source[index]
    return {
        'tokens': example.tokens,
        'label': np.int64(example.label),
        'index': np.int64(index),
    }

  # As in `data`: Grain shuffles epoch e with seed + e.
  (shuffle_seed,) = np.random.SeedSequence(seed).generate_state(1)
  examples = pipelines.repeat_endlessly(
      grain.MapDataset.range(len(source)).shuffle(seed=int(shuffle_seed))
  ).map(load)
  local_size = batch_size // process_count
  batches = (
      examples[process_index::process_count]
      .batch(local_size)
      .to_iter_dataset(
          grain.ReadOptions(
              num_threads=num_threads,
              prefetch_buffer_size=max(
                  math.ceil(prefetch / local_size), num_threads
              ),
          )
      )
  )
  return TokenDataset(
      num_examples=len(source),
      fingerprint={
          'model_hash': source.manifest.job.model_hash,
          'shards': source.manifest.shards_sha256[:16],
          'num_examples': len(source),
          'batch_size': batch_size,
          'process_count': process_count,
          'seed': seed,
      },
      _batches=batches,
  )


def _check_batches(
    source: TokenSource,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> None:
  """Checks the arguments of `build_dataset`."""
  if not 0 <= process_index < process_count:
    raise ValueError(
        f'process_index is {process_index} of {process_count} processes; it'
        ' counts from 0.'
    )
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
        f'batch_size is {batch_size}; use a positive multiple of the'
        f' {process_count} processes.'
    )
  if batch_size > len(source):
    logging.warning(
        'batch_size is %d, but there are %d images; each batch repeats images.',
        batch_size,
        len(source),
    )
  if source.manifest.grid is None:
    raise ValueError(
        f'{source.folder} holds images of several sizes, which cannot be'
        " batched; tokenize them with tokenize.fit 'crop'."
    )
