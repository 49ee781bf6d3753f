"""Images of a data set to token files (mode tokenize)."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent import futures
import contextlib
import itertools
import os
import pathlib
import re
from typing import NamedTuple

import grain
import jax
import ml_collections
import numpy as np

from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import progress
from fsq_jax import runtime
from fsq_jax import tokenizer as tokenizers
from fsq_jax import trained
from fsq_jax import workdir as workdirs
from fsq_jax.tokens import manifest as manifests
from fsq_jax.tokens import shards
from fsq_jax.tokens import writer as writers

# Images that are in memory together where they are not cropped.
NUM_WHOLE = 8


class Interrupted(Exception):  # noqa: N818
  """A signal has stopped the run; the same command goes on."""


class _Chunk(NamedTuple):
  """Images of one shard that are encoded together.

  Attributes:
    shard: that they belong to.
    images: those that can be read, [H, W, 3] uint8, fitted to the model.
    examples: what is known of these; tokens are to come.
    num_bytes: of their files; None where they have none.
    damaged: the others.
  """

  shard: int
  images: list[np.ndarray]
  examples: list[shards.Example]
  num_bytes: int | None
  damaged: list[writers.Damage]


def tokenize_workdir(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    which: str = 'newest',
    folder: str | os.PathLike[str] | None = None,
) -> manifests.Manifest:
  """Writes the tokens of a data set, each image once, in order.

  Goes on where a run of the same command was stopped; what it writes is to the
  byte what a run writes that was not. Several processes share the files.

  Args:
    config: of the model; its data section may name any images, its tokenize
      section says which of them, and how they are written.
    workdir: the run's folder, or one of `Tokenizer.save_pretrained`.
    which: 'newest' checkpoint, the 'best' (of the highest PSNR), or the number
      of a step.
    folder: for the files; `default_folder` by default.

  Returns:
    The manifest, also written to the folder.

  Raises:
    ValueError: a config that is not valid or not that of the model, images
      that are not there, or a folder of something else.
    Interrupted: by SIGTERM or SIGINT, of any process.
    PeerError: another of several processes has failed.
  """
  runtime.keep_freed_memory()  # Before JAX has threads.
  configuration.check_config(config, mode='tokenize')
  folder = pathlib.Path(folder or default_folder(config, workdir))
  folder = folder.expanduser().absolute()
  data_config = config.data.copy_and_resolve_references()
  data_config.cache_mib = 0  # Each image is read once.
  # Before the model, which takes long: they may be missing.
  with runtime.fail_together():
    source = data.open_source(data_config, config.tokenize.split)
  tokenizer = load_tokenizer(workdir, which, config.data.eval_batch_size)
  with contextlib.ExitStack() as stack:
    with runtime.fail_together():
      trained.check_same_model(tokenizer.config, configuration.resolve(config))
      job = _make_job(config, tokenizer, source)
      writer = writers.TokenWriter(folder, job)
      if jax.process_index() == 0 and not writer.is_finished:
        unfinished = folder / manifests.UNFINISHED
        stack.enter_context(workdirs.lock(unfinished, '--tokens'))
        writer.start()
    if not writer.is_finished:
      run = _Run(data_config, tokenizer, source, job, writer)
      request = stack.enter_context(runtime.catch_signals(together=False))
      with runtime.fail_together():
        is_whole = run.write_shards(request)
      if runtime.is_any(not is_whole):
        raise Interrupted
    with runtime.fail_together():
      if jax.process_index() == 0:
        writer.finish(max_damaged_share=config.data.max_damaged_share)
    return manifests.read(folder)


def default_folder(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> pathlib.Path:
  """Returns WORKDIR/tokens/NAME, named for the images, as tfds_cifar10_test."""
  words = [config.data.source, config.data.name]
  if config.data.source in ('folder', 'tfds'):
    words.append(config.data[f'{config.tokenize.split}_split'])
  else:
    words.append(config.tokenize.split)
  name = '_'.join(re.findall(r'[\w-]+', ' '.join(words)))
  return pathlib.Path(workdir) / 'tokens' / name


def load_tokenizer(
    workdir: str | os.PathLike[str], which: str, batch_size: int = 64
) -> tokenizers.Tokenizer:
  """Loads the tokenizer of a run, or one that was saved as a folder.

  Args:
    workdir: folder of either.
    which: checkpoint of a run; a saved tokenizer has but one.
    batch_size: images that devices take together.

  Returns:
    The tokenizer, on the devices of this process.
  """
  if (pathlib.Path(workdir).expanduser() / 'model.safetensors').exists():
    return tokenizers.Tokenizer.from_pretrained(workdir, batch_size=batch_size)
  return tokenizers.Tokenizer.from_workdir(
      workdir, which, batch_size=batch_size
  )


def apply_filled(
    function: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    job: manifests.Job,
) -> np.ndarray:
  """Applies a function to at most a batch, which it gets whole under 'crop'.

  So what becomes of an image does not depend on how many are left of a shard.
  Under 'pad' sizes differ, and most batches would be nearly empty.

  Args:
    function: `Tokenizer.encode` or `Tokenizer.decode`, of their first argument.
    x: [n, ...], n at most job.batch_size.
    job: that is done.

  Returns:
    [n, ...], what the function makes of x.
  """
  num = len(x)
  if job.fit == 'crop':
    filling = np.zeros((job.batch_size - num, *x.shape[1:]), x.dtype)
    x = np.concatenate([x, filling])
  return function(x)[:num]


def group_equal(keys: Sequence[Hashable]) -> list[list[int]]:
  """Returns the positions of each of the keys that occur, in order."""
  rows = {}
  for i, key in enumerate(keys):
    rows.setdefault(key, []).append(i)
  return list(rows.values())


def _make_job(
    config: ml_collections.ConfigDict,
    tokenizer: tokenizers.Tokenizer,
    source: data.ImageSource,
) -> manifests.Job:
  quantizer = tokenizer.model.quantizer
  return manifests.Job(
      storage=config.tokenize.storage,
      quantizer=tokenizer.spec,
      codebook_size=quantizer.codebook_size,
      index_shape=tuple(quantizer.index_shape),
      model_hash=tokenizer.model_hash,
      fit=config.tokenize.fit,
      image_size=tuple(config.data.image_size),
      batch_size=config.data.eval_batch_size,
      images_per_shard=config.tokenize.images_per_shard,
      source=data.fingerprint(config.data, source),
      label_names=tuple(source.label_names),
  )


class _Run:
  """One run of this process."""

  def __init__(
      self,
      config: ml_collections.ConfigDict,
      tokenizer: tokenizers.Tokenizer,
      source: data.ImageSource,
      job: manifests.Job,
      writer: writers.TokenWriter,
  ):
    """Reads nothing yet; `config` is the data section."""
    self._config = config
    self._tokenizer = tokenizer
    self._source = source
    self._job = job
    self._writer = writer

  def write_shards(self, request: runtime.StopRequest) -> bool:
    """Writes those of this process's shards that are not there yet.

    Args:
      request: to stop, after the next batch, which stops other processes too.

    Returns:
      Whether all are there.
    """
    numbers = range(
        jax.process_index(), self._job.num_shards, jax.process_count()
    )
    done = [i for i in numbers if self._writer.is_done(i)]
    for shard in done:
      # They count towards data.max_damaged_share, as in a run without stops.
      for image in self._writer.damaged(shard):
        self._source.damaged[image.index] = image.reason
    missing = sorted(set(numbers) - set(done))
    bar = progress.ImageProgress(
        num_images=sum(len(self._indices(i)) for i in numbers),
        first=sum(len(self._indices(i)) for i in done),
        enabled=jax.process_index() == 0,
    )
    with contextlib.closing(bar):
      chunks = _ahead(self._read(missing), self._encode)
      for shard, parts in itertools.groupby(chunks, lambda x: x[0].shard):
        if not self._write_shard(shard, parts, bar, request):
          return False
    return True

  def _write_shard(self, shard, parts, bar, request) -> bool:
    examples, damaged, sizes = [], [], []
    for chunk, tokens in parts:
      examples += [
          example._replace(tokens=x)
          for example, x in zip(chunk.examples, tokens, strict=True)
      ]
      damaged += chunk.damaged
      sizes.append(chunk.num_bytes)
      bar.update(len(chunk.images) + len(chunk.damaged))
      if request.is_due():
        self._writer.stop()
      if self._writer.is_stopped:
        return False
    self._writer.write(
        shard,
        examples,
        damaged=damaged,
        source_bytes=None if None in sizes else sum(sizes),
    )
    bar.log()
    return True

  def _indices(self, shard: int) -> range:
    start = shard * self._job.images_per_shard
    stop = start + self._job.images_per_shard
    return range(start, min(stop, len(self._source)))

  def _read(self, missing: Sequence[int]) -> Iterator[_Chunk]:
    """Reads the images of shards, in batches that no shard shares."""
    num_images = self._job.batch_size
    if self._job.fit == 'pad':
      # They may be photographs, which wait here as a whole.
      num_images = min(num_images, NUM_WHOLE)
    plan = [
        (shard, indices[start : start + num_images])
        for shard in missing
        for indices in [self._indices(shard)]
        for start in range(0, len(indices), num_images)
    ]
    if not plan:
      return
    num_ahead = -(-self._config.prefetch // self._job.batch_size)
    yield from (
        grain.MapDataset.source(plan)
        .map(lambda part: self._load(*part))
        .to_iter_dataset(
            grain.ReadOptions(
                num_threads=self._config.num_threads,
                prefetch_buffer_size=max(num_ahead, self._config.num_threads),
            )
        )
    )

  def _load(self, shard: int, indices: range) -> _Chunk:
    images, examples, sizes, damaged = [], [], [], []
    for index in indices:
      facts = self._source.facts(index)
      try:
        image, original_size = self._source.load_with_size(index)
      except data.DamagedImageError as error:
        damaged.append(writers.Damage(index, facts.name, str(error)))
        continue
      size = image.shape[:2]
      if self._job.fit == 'crop':
        if data.is_smaller(image, self._job.image_size):
          self._source.record_upscaled(index)
        # A copy: a view would keep the whole image until it is encoded.
        image = np.array(data.centre_crop(image, self._job.image_size))
      images.append(image)
      examples.append(
          shards.Example(None, facts.name, facts.label, size, original_size)
      )
      sizes.append(facts.num_bytes)
    num_bytes = None if None in sizes else sum(sizes)
    return _Chunk(shard, images, examples, num_bytes, damaged)

  def _encode(self, chunk: _Chunk) -> list[np.ndarray]:
    """Returns the tokens of each image, those of one size taken together."""
    tokens = [None] * len(chunk.images)
    for rows in group_equal([image.shape for image in chunk.images]):
      images = np.stack([chunk.images[i] for i in rows])
      encoded = apply_filled(
          lambda x: self._tokenizer.encode(x, self._job.fit), images, self._job
      )
      for i, x in zip(rows, encoded, strict=True):
        tokens[i] = x
      if encoded.min() < 0:
        name = next(
            chunk.examples[i].name for i in rows if tokens[i].min() < 0
        )
        raise ValueError(
            f'Latents of image {name!r} are NaN, which has no token; leave it'
            ' out, or take another checkpoint.'
        )
    return tokens


def _ahead(
    chunks: Iterator[_Chunk], encode: Callable[[_Chunk], list[np.ndarray]]
) -> Iterator[tuple[_Chunk, list[np.ndarray]]]:
  """Yields chunks with their tokens while the next is being encoded."""
  with futures.ThreadPoolExecutor(1) as pool:
    pending = None
    for chunk in chunks:
      previous, pending = pending, (chunk, pool.submit(encode, chunk))
      if previous is not None:
        yield previous[0], previous[1].result()
    if pending is not None:
      yield pending[0], pending[1].result()
