"""Batches of images to tokenize, and of tokens to decode."""

from collections.abc import Callable, Hashable, Iterator, Sequence
import dataclasses
import itertools
from typing import NamedTuple

import grain
import ml_collections
import numpy as np

from fsq_jax.data import builder as data_builder
from fsq_jax.data import image_errors
from fsq_jax.data import image_source
from fsq_jax.data import transforms
from fsq_jax.runtime import batching
from fsq_jax.tokens import image_states
from fsq_jax.tokens import manifest
from fsq_jax.tokens import shards
from fsq_jax.tokens import writer as writers

# Images in memory at a time where they are not cropped.
NUM_WHOLE = 8


class Chunk(NamedTuple):
  """Images of one shard that are encoded together.

  Attributes:
    shard: number of the shard.
    images: readable images, [H, W, C] uint8, fitted to the model.
    examples: their metadata, without tokens.
    num_bytes: size of their files; None without files.
    damaged: unreadable images, each once for all views.
    num_views: number of views, readable or not.
    states: states of all images by index, if the source has files.
    num_upscaled: images that were scaled up, each once for all views.
  """

  shard: int
  images: list[np.ndarray]
  examples: list[shards.Example]
  num_bytes: int | None
  damaged: list[writers.Damage]
  num_views: int
  states: dict[int, image_states.ImageState]
  num_upscaled: int


def open_source(
    config: ml_collections.ConfigDict, tokenize: ml_collections.ConfigDict
) -> image_source.ImageSource:
  """Opens the images that are tokenized.

  Args:
    config: the data section of a config.
    tokenize: its tokenize section.
  """
  split = tokenize.split
  if split == 'train' and tokenize.views == 1:
    split = 'train_once'
  return data_builder.open_source(config, split)


@dataclasses.dataclass(frozen=True)
class ImageReader:
  """Reads images and fits them to the model.

  Attributes:
    config: the data section of a config.
    source: the images.
    job: the job.
  """

  config: ml_collections.ConfigDict
  source: image_source.ImageSource
  job: manifest.Job

  def read(self, missing: Sequence[int]) -> Iterator[Chunk]:
    """Reads the images of shards in batches of one shard each."""
    batch_size = self.job.batch_size
    if self.job.fit == 'pad':
      # Whole photographs may wait here.
      batch_size = min(batch_size, NUM_WHOLE)
    views = self.job.views
    plan = [
        (shard, range(start, min(start + batch_size, stop)))
        for shard in missing
        for indices in [self.job.indices(shard)]
        for stop in [indices.stop * views]
        for start in range(indices.start * views, stop, batch_size)
    ]
    if not plan:
      return
    num_ahead = -(-self.config.prefetch // self.job.batch_size)
    yield from (
        grain.MapDataset.source(plan)
        .map(lambda part: self.load(*part))
        .to_iter_dataset(
            grain.ReadOptions(
                num_threads=self.config.num_threads,
                prefetch_buffer_size=max(num_ahead, self.config.num_threads),
            )
        )
    )

  def load(self, shard: int, numbers: range) -> Chunk:
    """Loads views of one shard.

    Args:
      shard: number of the shard.
      numbers: of the views; image i has the numbers i * views to
        (i + 1) * views - 1.
    """
    images, examples, sizes, damaged, states = [], [], [], [], {}
    num_upscaled = 0
    by_image = itertools.groupby(numbers, lambda x: x // self.job.views)
    for index, group in by_image:
      views = [number % self.job.views for number in group]
      metadata = self.source.metadata(index)
      stamp = None
      if isinstance(self.source, image_source.EncodedSource):
        # Taken before reading, so that a later change is detected.
        stamp = image_states.take_stamp(self.source, index)
      try:
        image, original_size = self.source.load_with_size(index)
      except image_errors.DamagedImageError as error:
        if views[0] == 0:
          damaged.append(writers.Damage(index, metadata.name, str(error)))
        continue
      finally:
        if stamp is not None:
          digest = self.source.digests[index].tobytes()
          states[index] = image_states.ImageState(digest, stamp)
      if self.job.fit == 'crop' and transforms.is_smaller(
          image, self.job.image_size
      ):
        self.source.record_upscaled(index)
      num_upscaled += views[0] == 0 and index in self.source.upscaled
      for view in views:
        fitted, drawn = self._fit(image, index, view)
        images.append(fitted)
        size = image.shape[:2]
        examples.append(
            shards.Example(
                None, metadata.name, metadata.label, size, original_size, view,
                *drawn,
            )
        )
        sizes.append(metadata.num_bytes)
    num_bytes = None if None in sizes else sum(sizes)
    return Chunk(
        shard, images, examples, num_bytes, damaged, len(numbers), states,
        num_upscaled,
    )

  def _fit(
      self, image: np.ndarray, index: int, view: int
  ) -> tuple[np.ndarray, tuple]:
    """Returns an image fitted to the model, and crop and flip if random."""
    if self.job.fit == 'pad':
      return image, ()
    if self.job.views == 1:
      # A copy, since a view would keep the whole image in memory.
      return np.array(transforms.centre_crop(image, self.job.image_size)), ()
    options = dict(self.job.augmentation)
    seed = np.random.SeedSequence(
        options.pop('seed'), spawn_key=(index, view)
    )
    size = self.job.image_size
    drawn = transforms.draw_augmentation(
        image, np.random.default_rng(seed), size=size, color_jitter=0.0,
        **options,
    )
    crop = np.array(transforms.apply_augmentation(image, drawn, size))
    return crop, (drawn.crop, drawn.is_flipped)


def apply_filled(
    function: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    job: manifest.Job,
) -> np.ndarray:
  """Applies a function to a batch, filled up to job.batch_size under 'crop'.

  The result of an image then does not depend on the number of images left in
  its shard. Under 'pad' sizes differ, and most batches would be nearly empty.

  Args:
    function: `Tokenizer.encode` or `Tokenizer.decode`, of their first argument.
    x: [n, ...], n at most job.batch_size.
    job: the job.

  Returns:
    [n, ...], the results of x.
  """
  size = job.batch_size if job.fit == 'crop' else len(x)
  return function(batching.fill(x, size))[: len(x)]


def group_equal(keys: Sequence[Hashable]) -> list[list[int]]:
  """Returns the positions of each distinct key, in order of occurrence."""
  rows = {}
  for i, key in enumerate(keys):
    rows.setdefault(key, []).append(i)
  return list(rows.values())
