"""Images of a data set to token files (mode tokenize)."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent import futures
import contextlib
import itertools
import os
import pathlib
import re
from typing import NamedTuple

from absl import logging
import grain
import jax
import ml_collections
import numpy as np

from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import tokenizer as tokenizers
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import saved_model
from fsq_jax.runtime import preemption
from fsq_jax.runtime import processes
from fsq_jax.tokens import image_states
from fsq_jax.tokens import manifest
from fsq_jax.tokens import shards
from fsq_jax.tokens import writer as writers
from fsq_jax.workdir import progress

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
    damaged: the others, each once, whatever the number of views.
    num_views: of all of them.
    states: of these and the damaged ones, by index, where they have any.
    num_upscaled: of the source's images that are scaled up, each once, too.
  """

  shard: int
  images: list[np.ndarray]
  examples: list[shards.Example]
  num_bytes: int | None
  damaged: list[writers.Damage]
  num_views: int
  states: dict[int, image_states.ImageState]
  num_upscaled: int


def tokenize_workdir(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    which: str = 'newest',
    folder: str | os.PathLike[str] | None = None,
    verify_images: bool = False,
) -> manifest.Manifest:
  """Writes the tokens of a data set, in the order of its images.

  Each image has one token grid, of the crop that evaluation takes, or one for
  each of tokenize.views random crops as in training.

  Resumes where a run of the same command was stopped; what it writes is to the
  byte what a run writes that was not. Several processes share the files. A
  folder that is complete is left as it is, if the images have not changed.

  Args:
    config: of the model; its data section may name any images, its tokenize
      section says which of them, and how they are written.
    workdir: the run's folder, or one of `Tokenizer.save_pretrained`.
    which: 'newest' checkpoint, the 'best' (of the highest PSNR), or the number
      of a step.
    folder: for the files; `default_folder` by default.
    verify_images: compare the hashes of all images that earlier runs have
      tokenized; otherwise of those whose files have another size or time.

  Returns:
    The manifest, also written to the folder.

  Raises:
    ValueError: a config that is not valid or not that of the model, images
      that are not there or have changed since earlier runs have tokenized
      them, or a folder of something else.
    Interrupted: by SIGTERM or SIGINT, of any process.
    PeerError: another of several processes has failed.
  """
  configuration.check_config(config, mode='tokenize')
  folder = pathlib.Path(folder or default_folder(config, workdir))
  folder = folder.expanduser().absolute()
  data_config = config.data.copy_and_resolve_references()
  data_config.cache_mib = 0  # Each image is read once.
  # Before the model, which takes long: they may be missing.
  with processes.fail_together():
    source = _open_source(data_config, config.tokenize)
  tokenizer = tokenizers.load_tokenizer(
      workdir, which, config.data.eval_batch_size
  )
  with contextlib.ExitStack() as stack:
    with processes.fail_together():
      saved_model.check_same_model(tokenizer.config, config)
      job = _make_job(config, tokenizer, source)
      writer = writers.TokenWriter(folder, job)
      if jax.process_index() == 0 and not writer.is_finished:
        unfinished = folder / manifest.UNFINISHED
        stack.enter_context(workdirs.lock(unfinished, '--tokens'))
        writer.start()
    run = _Run(data_config, tokenizer, source, job, writer, verify_images)
    if writer.is_finished:
      with processes.fail_together():
        run.check_images()
    else:
      request = stack.enter_context(preemption.catch_signals(together=False))
      with processes.fail_together():
        is_whole = run.write_shards(request)
      if processes.is_any(not is_whole):
        raise Interrupted
    with processes.fail_together():
      if jax.process_index() == 0:
        writer.finish(max_damaged_share=config.data.max_damaged_share)
    return manifest.read(folder)


def is_complete(folder: str | os.PathLike[str]) -> bool:
  """Returns whether a folder has all token files of an earlier run."""
  return (pathlib.Path(folder).expanduser() / manifest.FILE).is_file()


def default_folder(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> pathlib.Path:
  """Returns WORKDIR/tokens/NAME, named for the images.

  Args:
    config: of which the sections data and tokenize count.
    workdir: of the run.

  Returns:
    Such as tokens/tfds_cifar10_test, or tokens/photos_train_4_views.
  """
  words = [config.data.source, config.data.name]
  if config.data.source in ('folder', 'tfds'):
    words.append(config.data[f'{config.tokenize.split}_split'])
  else:
    words.append(config.tokenize.split)
  if config.tokenize.views > 1:
    words.append(f'{config.tokenize.views}_views')
  name = '_'.join(re.findall(r'[\w-]+', ' '.join(words)))
  return pathlib.Path(workdir) / 'tokens' / name


def apply_filled(
    function: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    job: manifest.Job,
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


def _open_source(
    config: ml_collections.ConfigDict, tokenize: ml_collections.ConfigDict
) -> data.ImageSource:
  split = tokenize.split
  if split == 'train' and tokenize.views == 1:
    split = 'train_once'
  return data.open_source(config, split)


def _make_job(
    config: ml_collections.ConfigDict,
    tokenizer: tokenizers.Tokenizer,
    source: data.ImageSource,
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
      source=data.fingerprint(config.data, source),
      label_names=tuple(source.label_names),
      views=config.tokenize.views,
      augmentation=augmentation,
  )


class _Run:
  """One run of this process."""

  def __init__(
      self,
      config: ml_collections.ConfigDict,
      tokenizer: tokenizers.Tokenizer,
      source: data.ImageSource,
      job: manifest.Job,
      writer: writers.TokenWriter,
      verify_images: bool = False,
  ):
    """Reads nothing yet; `config` is the data section."""
    self._config = config
    self._tokenizer = tokenizer
    self._source = source
    self._job = job
    self._writer = writer
    self._verify_images = verify_images

  def check_images(self) -> None:
    """Refuses images that have changed since the folder was completed.

    Several processes look at those of their shards.

    Raises:
      ValueError: they have; the message lists the first.
    """
    if not isinstance(self._source, data.EncodedSource):
      return  # What they are is in the job.
    folder = self._writer.folder
    content = manifest.read(folder).content_sha256
    if content is None:
      logging.warning(
          '%s was written by an earlier version, without hashes of the images:'
          ' whether they have changed since then is not known.', folder,
      )
      return
    states = image_states.read(folder, len(self._source), content)
    for shard in self._shards():
      indices = self._indices(shard)
      rows = slice(indices.start, indices.stop)
      part = image_states.ImageStates(*(x[rows] for x in states))
      self._check_unchanged(shard, part)

  def _check_unchanged(
      self, shard: int, states: image_states.ImageStates | None
  ) -> None:
    if states is None:
      return
    image_states.check_unchanged(
        self._source,
        states,
        self._indices(shard),
        verify=self._verify_images,
        folder=self._writer.folder,
        num_threads=self._config.num_threads,
    )

  def write_shards(self, request: preemption.StopRequest) -> bool:
    """Writes those of this process's shards that are not there yet.

    Args:
      request: to stop, after the next batch, which stops other processes too.

    Returns:
      Whether all are there.

    Raises:
      ValueError: images of shards that are there have changed, or too many
        cannot be read.
    """
    numbers = self._shards()
    done = [i for i in numbers if self._writer.is_done(i)]
    for shard in done:
      self._check_unchanged(shard, self._writer.states(shard))
      # They count towards data.max_damaged_share, as in a run without stops.
      for image in self._writer.damaged(shard):
        self._source.damaged[image.index] = image.reason
    missing = sorted(set(numbers) - set(done))
    views = self._job.views
    bar = progress.ImageProgress(
        num_images=views * sum(len(self._indices(i)) for i in numbers),
        first=views * sum(len(self._indices(i)) for i in done),
        enabled=jax.process_index() == 0,
    )
    with contextlib.closing(bar):
      chunks = _ahead(self._read(missing), self._encode)
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
        self._writer.stop()
      if self._writer.is_stopped:
        return False
    self._writer.write(
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
    """Numbers of this process's shards."""
    return range(
        jax.process_index(), self._job.num_shards, jax.process_count()
    )

  def _indices(self, shard: int) -> range:
    """Indices of the images of a shard."""
    start = shard * self._job.images_per_shard
    stop = start + self._job.images_per_shard
    return range(start, min(stop, len(self._source)))

  def _read(self, missing: Sequence[int]) -> Iterator[_Chunk]:
    """Reads the images of shards, in batches that no shard shares."""
    batch_size = self._job.batch_size
    if self._job.fit == 'pad':
      # They may be photographs, which wait here as a whole.
      batch_size = min(batch_size, NUM_WHOLE)
    views = self._job.views
    plan = [
        (shard, range(start, min(start + batch_size, stop)))
        for shard in missing
        for indices in [self._indices(shard)]
        for stop in [indices.stop * views]
        for start in range(indices.start * views, stop, batch_size)
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

  def _load(self, shard: int, numbers: range) -> _Chunk:
    """Loads views by number: all those of an image follow each other."""
    images, examples, sizes, damaged, states = [], [], [], [], {}
    num_upscaled = 0
    by_image = itertools.groupby(numbers, lambda x: x // self._job.views)
    for index, group in by_image:
      views = [number % self._job.views for number in group]
      facts = self._source.facts(index)
      stamp = None
      if isinstance(self._source, data.EncodedSource):
        # Of before it is read, so that a later change shows.
        stamp = image_states.take_stamp(self._source, index)
      try:
        image, original_size = self._source.load_with_size(index)
      except data.DamagedImageError as error:
        if views[0] == 0:
          damaged.append(writers.Damage(index, facts.name, str(error)))
        continue
      finally:
        if stamp is not None:
          digest = self._source.digests[index].tobytes()
          states[index] = image_states.ImageState(digest, stamp)
      if self._job.fit == 'crop' and data.is_smaller(
          image, self._job.image_size
      ):
        self._source.record_upscaled(index)
      num_upscaled += views[0] == 0 and index in self._source.upscaled
      for view in views:
        fitted, drawn = self._fit(image, index, view)
        images.append(fitted)
        size = image.shape[:2]
        examples.append(
            shards.Example(
                None, facts.name, facts.label, size, original_size, view, *drawn
            )
        )
        sizes.append(facts.num_bytes)
    num_bytes = None if None in sizes else sum(sizes)
    return _Chunk(
        shard, images, examples, num_bytes, damaged, len(numbers), states,
        num_upscaled,
    )

  def _fit(
      self, image: np.ndarray, index: int, view: int
  ) -> tuple[np.ndarray, tuple]:
    """Returns what the model gets of an image, and crop and flip if random."""
    if self._job.fit == 'pad':
      return image, ()
    if self._job.views == 1:
      # A copy: a view would keep the whole image until it is encoded.
      return np.array(data.centre_crop(image, self._job.image_size)), ()
    options = dict(self._job.augmentation)
    seed = np.random.SeedSequence(
        options.pop('seed'), spawn_key=(index, view)
    )
    size = self._job.image_size
    drawn = data.draw_augmentation(
        image, np.random.default_rng(seed), size=size, color_jitter=0.0,
        **options,
    )
    crop = np.array(data.apply_augmentation(image, drawn, size))
    return crop, (drawn.crop, drawn.is_flipped)

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
