"""Training and evaluation pipelines: images to batches, in Grain."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
import pathlib
from typing import Any

from absl import logging
import grain
import ml_collections
import numpy as np

from fsq_jax.data import image_errors
from fsq_jax.data import image_source
from fsq_jax.data import transforms

# To be raised when a change gives a config other pixels than before.
_PIPELINE_VERSION = 1
# Length of the training order. Grain computes numbers of batches in float64,
# which is exact up to 2^53; at a million images per second it lasts 142 years.
_ENDLESS = 2**52


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
  """One split as batches of NumPy arrays, this process's data shard of each.

  Batches are dicts, with b = batch size / process_count:
    'image': [b, H, W, channels] uint8. In training with several
      data.image_sizes, H and W differ between batches.
    'index': [b] int64, the index of the image in its source, for `describe`.
      In training an unreadable image is replaced by the next readable image,
      whose index this is.
    'mask': [b] bool, in evaluation only: False for unreadable images and for
      padding of the last batch; their pixels are 0.
    'upscaled': [b] bool, in evaluation only: True for images that were scaled
      up, see `data.ImageSource.upscaled`.

  Attributes:
    num_examples: in the split, readable or not.
    num_batches: of one pass over an evaluation split; None for training,
      which never ends.
    fingerprint: everything that determines the pixels of each step, flat and
      JSON-able. Save it beside the iterator's state; see `check_fingerprint`.
    protocol: preprocessing of evaluation images (JSON-able), to be stored with
      every number computed from them; None for training.
  """

  num_examples: int
  num_batches: int | None
  fingerprint: Mapping[str, Any]
  protocol: Mapping[str, Any] | None
  _batches: grain.IterDataset = dataclasses.field(repr=False)
  _source: image_source.ImageSource = dataclasses.field(repr=False)

  def iterator(self) -> grain.DatasetIterator:
    """Returns a new iterator at the first batch.

    Its get_state() is a JSON-able dict that counts the batches taken, the
    same on every process; set_state() of it continues with the next batch.
    """
    return iter(self._batches)

  def __iter__(self) -> grain.DatasetIterator:
    return self.iterator()

  @property
  def damaged(self) -> int:
    """Number of images found unreadable so far, by this process."""
    return len(self._source.damaged)

  @property
  def upscaled(self) -> int:
    """Number of images scaled up so far, by this process."""
    return len(self._source.upscaled)

  @property
  def digests(self) -> np.ndarray:
    """`ImageSource.digests` of the images read so far by this process."""
    return self._source.digests

  @property
  def tiles(self) -> Sequence[image_source.Tile]:
    """`ImageSource.tiles`: places of the images in whole photographs."""
    return self._source.tiles

  def name(self, index: int) -> str:
    """Returns the name of the image with this 'index' in its split, or ''."""
    name = self._source.metadata(int(index)).name
    return '' if name == str(index) else name

  def describe(self, index: int) -> str:
    """Returns the place of the image with this 'index'."""
    return self._source.describe(int(index))


def build_train(
    config: ml_collections.ConfigDict,
    source: image_source.ImageSource,
    seed: int,
    shard: slice,
) -> Dataset:
  """Builds the endless pipeline of shuffled, augmented training images.

  Args:
    config: the `data` section.
    source: the images.
    seed: of shuffling and augmentation.
    shard: positions of this process in each batch.
  """
  if len(source) < config.batch_size:
    logging.warning(
        'data.batch_size is %d, but the training split has %d examples; each'
        ' batch repeats images, with other augmentation.',
        config.batch_size,
        len(source),
    )
  sizes, batch_size = image_sizes(config), config.batch_size
  augmentation = {
      'crop_scale': tuple(config.crop_scale),
      'flip': config.flip,
      'color_jitter': config.color_jitter,
  }

  # Grain shuffles epoch e with seed + e. With seeds that are far apart, runs
  # with neighbouring seeds do not share orders.
  shuffle_seed, augment_seed, size_seed = (
      int(x) for x in np.random.SeedSequence(seed).generate_state(3)
  )

  # Positions beyond the first epoch are in the next ones, in other orders.
  order = grain.MapDataset.range(len(source)).shuffle(seed=shuffle_seed)

  def load_image(
      index: int, rng: np.random.Generator, size: tuple[int, int]
  ) -> tuple[np.ndarray, int]:
    image, index = _load_readable(source, index)
    if transforms.is_smaller(image, size):
      source.record_upscaled(index)
    return transforms.augment(image, rng, size=size, **augmentation), index

  # For a whole batch: passing images through Grain one by one takes longer than
  # cropping them.
  def load(batch: int) -> dict[str, Any]:
    size = draw_size(sizes, size_seed, batch)
    first = batch * batch_size
    positions = range(first, first + batch_size)[shard]
    crops = np.empty((len(positions), *size, source.channels), np.uint8)
    indices = np.empty(len(positions), np.int64)
    for i, rng in enumerate(_generators(augment_seed, positions)):
      crops[i], indices[i] = load_image(order[positions[i]], rng, size)
    return {'image': crops, 'index': indices}

  return Dataset(
      num_examples=len(source),
      num_batches=None,
      fingerprint=fingerprint(
          config,
          source,
          batch_size=config.batch_size,
          process_count=shard.step,
          seed=seed,
          crop='random',
          crop_scale=list(config.crop_scale),
          flip=config.flip,
          color_jitter=config.color_jitter,
          # Absent in checkpoints from before there were several sizes.
          **({'image_sizes': [*map(list, sizes)]} if len(sizes) > 1 else {}),
      ),
      protocol=None,
      _batches=_prefetch(
          grain.MapDataset.range(_ENDLESS // config.batch_size).map(load),
          config,
          config.batch_size // shard.step,
      ),
      _source=source,
  )


def image_sizes(
    config: ml_collections.ConfigDict,
) -> tuple[tuple[int, int], ...]:
  """Returns the (height, width) of training images: one size, or several.

  Args:
    config: the `data` section; data.image_sizes may be missing.
  """
  sizes = config.get('image_sizes', ()) or (config.image_size,)
  return tuple(map(tuple, sizes))


def size_name(size: Sequence[int]) -> str:
  """Returns 'HxW' of (height, width), as in names of metrics."""
  return 'x'.join(map(str, size))


def draw_size(
    sizes: Sequence[tuple[int, int]], seed: int, batch: int
) -> tuple[int, int]:
  """Draws the image size of a batch, uniformly.

  A pure function of its arguments (a counter-based generator), so that resumed
  runs, all processes and all threads draw the same size.

  Args:
    sizes: (height, width) of each size in pixels.
    seed: an integer in [0, 2^128).
    batch: number of the batch, from 0.
  """
  if len(sizes) == 1:
    return sizes[0]
  number = np.random.Philox(key=seed, counter=batch).random_raw()
  return sizes[int(number) % len(sizes)]


def build_eval(
    config: ml_collections.ConfigDict,
    source: image_source.ImageSource,
    seed: int,
    shard: slice,
) -> Dataset:
  """Builds one pass over all examples, in order, with centre crops."""
  del seed  # Nothing is random.
  size = tuple(config.image_size)
  local_size = config.eval_batch_size // shard.step
  num_batches = math.ceil(len(source) / config.eval_batch_size)
  # Indices beyond the last image fill up the last batch.
  examples = grain.MapDataset.range(num_batches * config.eval_batch_size).map(
      functools.partial(_load_for_evaluation, source, size)
  )
  return Dataset(
      num_examples=len(source),
      num_batches=num_batches,
      fingerprint=fingerprint(
          config,
          source,
          batch_size=config.eval_batch_size,
          process_count=shard.step,
          crop='centre',
      ),
      protocol=_protocol(
          config,
          source,
          crop=f'{size[0]}x{size[1]}, {source.evaluation_crop}',
      ),
      _batches=_prefetch(examples[shard].batch(local_size), config, local_size),
      _source=source,
  )


def build_native(
    config: ml_collections.ConfigDict,
    source: image_source.ImageSource,
    seed: int,
    shard: slice,
) -> Dataset:
  """Builds the pass of `build_eval` in batches of one image at its own size."""
  del seed  # Nothing is random.

  def load(index: int) -> dict[str, Any]:
    example = _load_for_evaluation(source, None, index)
    return {name: np.asarray(x)[None] for name, x in example.items()}

  metadata = fingerprint(
      config, source, batch_size=1, process_count=shard.step, crop='none'
  )
  # Only the model has this size here.
  del metadata['image_size']
  return Dataset(
      num_examples=len(source),
      num_batches=len(source),
      fingerprint=metadata,
      protocol=_protocol(config, source, crop='none'),
      # Images may be large: read ahead no more of them than there are threads.
      _batches=grain.MapDataset.range(len(source)).map(load)[
          shard
      ].to_iter_dataset(
          grain.ReadOptions(
              num_threads=config.num_threads,
              prefetch_buffer_size=config.num_threads,
          )
      ),
      _source=source,
  )


def _load_for_evaluation(
    source: image_source.ImageSource, size: tuple[int, int] | None, index: int
) -> dict[str, Any]:
  """Returns an example of an evaluation, see `Dataset`.

  Args:
    source: the images.
    size: (height, width) of a centre crop; None takes the whole image.
    index: of the image; beyond the last image the example is blank.
  """
  shape = *(size or (1, 1)), source.channels
  image, readable = np.zeros(shape, np.uint8), False
  if index < len(source):
    with contextlib.suppress(image_errors.DamagedImageError):
      image, readable = _load(source, index), True
  if readable and size is not None:
    if transforms.is_smaller(image, size):
      source.record_upscaled(index)
    image = _copy_view(transforms.centre_crop(image, size), image)
  return {
      'image': image,
      'index': np.int64(index),
      'mask': np.bool_(readable),
      'upscaled': np.bool_(index in source.upscaled),
  }


def repeat_endlessly(examples: grain.MapDataset) -> grain.MapDataset:
  """Repeats examples for more epochs than any run has.

  `examples.repeat()` would have sys.maxsize elements, a length that Grain
  cannot divide into batches of one.
  """
  return examples.repeat(max(1, _ENDLESS // len(examples)))


def _load(source: image_source.ImageSource, index: int) -> np.ndarray:
  """Loads an image and checks that it is one.

  Losses and networks assume uint8 images in 0 ... 255; a float image in [0, 1]
  would give plausible but wrong numbers.
  """
  image = source.load(index)
  channels = source.channels
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != channels:
    raise ValueError(
        f'{source.describe(index)} is {image.dtype} of shape {image.shape};'
        f' images are uint8 [h, w, {channels}], in 0 ... 255.'
    )
  return image


def _copy_view(crop: np.ndarray, image: np.ndarray) -> np.ndarray:
  """Returns a crop, copied if it is a view that would keep the image alive."""
  return np.array(crop) if np.may_share_memory(crop, image) else crop


def _load_readable(
    source: image_source.ImageSource, index: int
) -> tuple[np.ndarray, int]:
  """Returns the first readable image from `index` on, and its index."""
  for offset in range(len(source)):
    candidate = (index + offset) % len(source)
    try:
      return _load(source, candidate), candidate
    except image_errors.DamagedImageError:
      continue
  raise ValueError(
      f'None of the {len(source)} images of the split can be read.'
  )


def _generators(
    seed: int, positions: Iterable[int]
) -> Iterator[np.random.Generator]:
  """Yields the generator of random numbers of each position in training.

  Philox with the position as its counter, as in Grain's `random_map`. It is one
  object that is set to each position in turn, valid until the next one: a new
  one would take longer than the numbers.
  """
  bits = np.random.Philox(seed)
  state = bits.state
  generator = np.random.Generator(bits)
  for position in positions:
    state['state']['counter'][-1] = position
    bits.state = state
    yield generator


def _prefetch(
    batches: grain.MapDataset, config: ml_collections.ConfigDict, size: int
) -> grain.IterDataset:
  """Prefetches batches of `size` images in threads.

  Each thread makes whole batches: passing single examples between threads costs
  more than cropping them.
  """
  num_ahead = max(math.ceil(config.prefetch / size), config.num_threads)
  return batches.to_iter_dataset(
      grain.ReadOptions(
          num_threads=config.num_threads, prefetch_buffer_size=num_ahead
      )
  )


def _protocol(
    config: ml_collections.ConfigDict,
    source: image_source.ImageSource,
    *,
    crop: str,
) -> dict[str, Any]:
  resize = config.resize_shorter
  place = {}
  if config.data_dir:
    path = pathlib.Path(config.data_dir).expanduser()
    place['data_dir'] = str(path.resolve())
  return {
      **place,
      'source': f"{config.source} {source.identity['name']}".strip(),
      'split': source.identity['split'],
      'count': len(source),
      'crop': crop,
      'resize': f'shorter side to {resize}' if resize else 'none',
      'kernel': transforms.KERNEL,
      **_describe_channels(source),
      # Other files in the folder of the images.
      **({'skipped_files': dict(source.skipped)} if source.skipped else {}),
  }


def fingerprint(
    config: ml_collections.ConfigDict,
    source: image_source.ImageSource,
    **pipeline: Any,
) -> dict[str, Any]:
  """Returns what determines the pixels of a pipeline, flat and JSON-able.

  Args:
    config: the `data` section.
    source: the images.
    **pipeline: parameters of the pipeline.
  """
  return {
      'pipeline_version': _PIPELINE_VERSION,
      'source': config.source,
      **source.identity,
      'num_examples': len(source),
      'image_size': list(config.image_size),
      'resize_shorter': config.resize_shorter,
      'kernel': transforms.KERNEL,
      **_describe_channels(source),
      **pipeline,
  }


def _describe_channels(source: image_source.ImageSource) -> dict[str, int]:
  """Returns the channels; {} is 3, as written before there were others."""
  return {} if source.channels == 3 else {'channels': source.channels}
