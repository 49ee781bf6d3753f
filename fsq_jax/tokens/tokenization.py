"""Writes the tokens of a data set to token files (mode tokenize)."""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import itertools
import os
import pathlib
import re

from absl import logging
import jax
import ml_collections
import numpy as np

from fsq_jax.checkpoints import saved_model
from fsq_jax.configuration import loading as configuration
from fsq_jax.data import image_source
from fsq_jax.data import pipelines
from fsq_jax.runtime import preemption
from fsq_jax.runtime import processes
from fsq_jax.tokenizer import tokenizer as tokenizers
from fsq_jax.tokens import batches
from fsq_jax.tokens import image_states
from fsq_jax.tokens import manifest
from fsq_jax.tokens import writer as writers
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import progress


def tokenize_workdir(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    which: str = 'newest',
    folder: str | os.PathLike[str] | None = None,
    verify_images: bool = False,
) -> manifest.Manifest:
  """Writes the tokens of a data set, in the order of its images.

  Each image has one token grid, of the crop of evaluation, or one for each of
  tokenize.views random crops as in training.

  Resumes a stopped run of the same command; the files are the same, byte for
  byte, as without a stop. Several processes share the work by shards. A
  complete folder is not changed, but checked for changes of the images.

  Args:
    config: of the model, with any data section; the tokenize section selects
      the images and the format.
    workdir: the run's folder, or a folder of `Tokenizer.save_pretrained`.
    which: 'newest' checkpoint, 'best' (highest PSNR), or a step number.
    folder: for the files, or gs://BUCKET/X; `default_folder` by default.
    verify_images: compare the hashes of all images tokenized by earlier runs;
      by default only of images whose files changed in size or time.

  Returns:
    The manifest, also written to the folder.

  Raises:
    ValueError: an invalid config, a config of another model, images that are
      missing or changed since they were tokenized, or a folder of something
      else.
    Interrupted: by SIGTERM or SIGINT in any process.
    PeerError: another process has failed.
  """
  configuration.check_config(config, mode='tokenize')
  folder = folder or default_folder(config, workdir)
  folder = workdirs.run_folder(folder, '--tokens')
  data_config = config.data.copy_and_resolve_references()
  data_config.cache_mib = 0  # Each image is read once.
  # Before the model, which takes long to load: images may be missing.
  with processes.fail_together():
    source = batches.open_source(data_config, config.tokenize)
  tokenizer = tokenizers.load_tokenizer(
      workdir, which, config.data.eval_batch_size
  )
  with contextlib.ExitStack() as stack:
    with processes.fail_together():
      saved_model.check_same_model(tokenizer.config, config)
      job = _make_job(config, tokenizer, source)
      writer = writers.TokenWriter(folder, job)
      if jax.process_index() == 0 and not writer.is_finished:
        stack.enter_context(writer.locked())
    run = _Run(
        config=data_config, tokenizer=tokenizer, source=source, job=job,
        writer=writer, verify_images=verify_images,
    )
    if writer.is_finished:
      with processes.fail_together():
        run.check_images()
    else:
      request = stack.enter_context(preemption.catch_signals(together=False))
      with processes.fail_together():
        is_whole = run.write_shards(request)
      if processes.is_any(not is_whole):
        raise preemption.Interrupted
    with processes.fail_together():
      if jax.process_index() == 0:
        writer.finish(max_damaged_share=config.data.max_damaged_share)
    return manifest.read(folder)


def is_complete(folder: str | os.PathLike[str]) -> bool:
  """Returns whether a folder holds a complete set of token files."""
  return workdirs.is_file(
      workdirs.run_folder(folder, '--tokens') / manifest.FILE
  )


def default_folder(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> pathlib.Path:
  """Returns WORKDIR/tokens/NAME, named for the images.

  Args:
    config: its sections data and tokenize determine the name.
    workdir: of the run.

  Returns:
    For example tokens/tfds_cifar10_test or tokens/photos_train_4_views.
  """
  words = [config.data.source, config.data.name]
  if config.data.source in (
      'folder', 'tfds', 'webdataset', 'parquet', 'arrays'
  ):
    words.append(config.data[f'{config.tokenize.split}_split'])
  else:
    words.append(config.tokenize.split)
  if config.tokenize.views > 1:
    words.append(f'{config.tokenize.views}_views')
  name = '_'.join(re.findall(r'[\w-]+', ' '.join(words)))
  root = workdirs.run_folder(workdir)
  if not workdirs.is_remote(root):
    root = pathlib.Path(workdir)  # Shown as given.
  return root / 'tokens' / name


def _make_job(
    config: ml_collections.ConfigDict,
    tokenizer: tokenizers.Tokenizer,
    source: image_source.ImageSource,
) -> manifest.Job:
  quantizer = tokenizer.model.quantizer
  augmentation = None
  if config.tokenize.views > 1:
    augmentation = {
        'seed': config.seed,
        'crop_scale': list(config.data.crop_scale),
        'flip': config.data.flip,
    }
  return manifest.Job(
      storage=config.tokenize.storage,
      quantizer=tokenizer.spec,
      codebook_size=quantizer.codebook_size,
      index_shape=tuple(quantizer.index_shape),
      model_hash=tokenizer.model_hash,
      fit=config.tokenize.fit,
      image_size=tuple(config.data.image_size),
      batch_size=config.data.eval_batch_size,
      images_per_shard=config.tokenize.images_per_shard,
      source=pipelines.fingerprint(config.data, source),
      label_names=tuple(source.label_names),
      views=config.tokenize.views,
      augmentation=augmentation,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
  """Tokenizes the shards of this process; `config` is the data section."""

  config: ml_collections.ConfigDict
  tokenizer: tokenizers.Tokenizer
  source: image_source.ImageSource
  job: manifest.Job
  writer: writers.TokenWriter
  verify_images: bool

  def check_images(self) -> None:
    """Checks that no image has changed since the folder was completed.

    Each process checks the images of its shards.

    Raises:
      ValueError: images have changed; lists the first of them.
    """
    if not isinstance(self.source, image_source.EncodedSource):
      return  # The job determines these images.
    folder = self.writer.folder
    content = manifest.read(folder).content_sha256
    if content is None:
      logging.warning(
          '%s was written by an earlier version without hashes of the images;'
          ' changes of the images since then cannot be detected.', folder,
      )
      return
    states = image_states.read(folder, len(self.source), content)
    for shard in self._shards():
      indices = self.job.indices(shard)
      rows = slice(indices.start, indices.stop)
      part = image_states.ImageStates(*(x[rows] for x in states))
      self._check_unchanged(shard, part)

  def _check_unchanged(
      self, shard: int, states: image_states.ImageStates | None
  ) -> None:
    if states is None:
      return
    image_states.check_unchanged(
        self.source,
        states,
        self.job.indices(shard),
        verify=self.verify_images,
        folder=self.writer.folder,
        num_threads=self.config.num_threads,
    )

  def write_shards(self, request: preemption.StopRequest) -> bool:
    """Writes the missing shards of this process.

    Args:
      request: stops this and other processes after the next batch.

    Returns:
      Whether all shards of this process are written.

    Raises:
      ValueError: images of finished shards have changed, or too many images
        cannot be read.
    """
    numbers = self._shards()
    done = [i for i in numbers if self.writer.is_done(i)]
    for shard in done:
      self._check_unchanged(shard, self.writer.states(shard))
      # Counted towards data.max_damaged_share, as in a run without stops.
      for image in self.writer.damaged(shard):
        self.source.damaged[image.index] = image.reason
    missing = sorted(set(numbers) - set(done))
    views = self.job.views
    bar = progress.ImageProgress(
        num_images=views * sum(len(self.job.indices(i)) for i in numbers),
        first=views * sum(len(self.job.indices(i)) for i in done),
        enabled=jax.process_index() == 0,
    )
    with contextlib.closing(bar):
      reader = batches.ImageReader(self.config, self.source, self.job)
      chunks = _ahead(reader.read(missing), self._encode)
      for shard, parts in itertools.groupby(chunks, lambda x: x[0].shard):
        if not self._write_shard(shard, parts, bar, request):
          return False
    return True

  def _write_shard(self, shard, parts, bar, request) -> bool:
    examples, damaged, sizes, states = [], [], [], {}
    num_upscaled = 0
    for chunk, tokens in parts:
      examples += [
          example._replace(tokens=x)
          for example, x in zip(chunk.examples, tokens, strict=True)
      ]
      damaged += chunk.damaged
      sizes.append(chunk.num_bytes)
      states |= chunk.states
      num_upscaled += chunk.num_upscaled
      bar.update(chunk.num_views)
      if request.is_due():
        self.writer.stop()
      if self.writer.is_stopped:
        return False
    self.writer.write(
        shard,
        examples,
        damaged=damaged,
        source_bytes=None if None in sizes else sum(sizes),
        states=image_states.stack(list(states.values())) if states else None,
        num_upscaled=num_upscaled,
    )
    bar.log()
    return True

  def _shards(self) -> range:
    """Shard numbers of this process."""
    return range(
        jax.process_index(), self.job.num_shards, jax.process_count()
    )

  def _encode(self, chunk: batches.Chunk) -> list[np.ndarray]:
    """Returns the tokens of each image, encoding images of a size together."""
    tokens = [None] * len(chunk.images)
    for rows in batches.group_equal([image.shape for image in chunk.images]):
      images = np.stack([chunk.images[i] for i in rows])
      encoded = batches.apply_filled(
          lambda x: self.tokenizer.encode(x, self.job.fit), images, self.job
      )
      for i, x in zip(rows, encoded, strict=True):
        tokens[i] = x
      if encoded.min() < 0:
        name = next(
            chunk.examples[i].name for i in rows if tokens[i].min() < 0
        )
        raise ValueError(
            f'Latents of image {name!r} are NaN and have no tokens; remove the'
            ' image, or use another checkpoint.'
        )
    return tokens


def _ahead(
    chunks: Iterator[batches.Chunk],
    encode: Callable[[batches.Chunk], list[np.ndarray]],
) -> Iterator[tuple[batches.Chunk, list[np.ndarray]]]:
  """Yields chunks with their tokens while the next chunk is encoded."""
  with futures.ThreadPoolExecutor(1) as pool:
    pending = None
    for chunk in chunks:
      previous, pending = pending, (chunk, pool.submit(encode, chunk))
      if previous is not None:
        yield previous[0], previous[1].result()
    if pending is not None:
      yield pending[0], pending[1].result()
