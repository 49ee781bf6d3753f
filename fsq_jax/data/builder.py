"""Where images come from: the table of data.source."""

from collections.abc import Mapping
import math
from typing import Any

from absl import logging
import ml_collections

from fsq_jax.data import folder
from fsq_jax.data import image_source
from fsq_jax.data import photos
from fsq_jax.data import pipelines
from fsq_jax.data import synthetic
from fsq_jax.data import tfds_source

# Name: images of which split, and what is done with them.
_PIPELINES = {
    'train': ('train', pipelines.build_train),
    'eval': ('eval', pipelines.build_eval),
    'eval_native': ('eval', pipelines.build_native),
    'train_once': ('train_once', pipelines.build_eval),
}


def build_dataset(
    config: ml_collections.ConfigDict,
    *,
    split: str,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> pipelines.Dataset:
  """Builds a split from the `data` section of a config.

  Args:
    config: the `data` section; see configs/default.py.
    split: 'train': shuffled, augmented, endless; 'eval': every example once,
      in fixed order, centre crops; 'eval_native': the same, one by one at
      their own size; 'train_once': each training image once, as 'eval'.
    seed: of shuffling and augmentation, >= 0; only 'train' uses it.
    process_index: this process, in [0, process_count); see
      `partitioning.data_shard` for those that read the same.
    process_count: processes that share each batch.

  Returns:
    The data set.

  Raises:
    ValueError: the config is not valid or the images are not there.
  """
  if split not in _PIPELINES:
    raise ValueError(f'split is {split!r}; known: {sorted(_PIPELINES)}.')
  _check_config(config, process_index, process_count)
  images, build = _PIPELINES[split]
  source = build_source(config, images)
  return build(
      config, source, seed, slice(process_index, None, process_count)
  )


def open_source(
    config: ml_collections.ConfigDict, split: str
) -> image_source.ImageSource:
  """Opens the images of a split, for who takes them by number.

  Args:
    config: the `data` section.
    split: 'train' for random crops of images that may repeat, 'train_once'
      for a fixed crop of each, or 'eval'.

  Returns:
    The source.

  Raises:
    ValueError: the config is not valid or the images are not there.
  """
  _check_config(config, process_index=0, process_count=1)
  return build_source(config, split)


def check_fingerprint(
    saved: Mapping[str, Any], current: Mapping[str, Any]
) -> None:
  """Refuses to continue an iterator's state on other data.

  A state only counts batches, so on other data it would silently repeat some
  examples and pass over others.

  Args:
    saved: fingerprint stored with the state.
    current: fingerprint of the data set that is to continue.

  Raises:
    ValueError: they differ; one line for each difference. process_count may
      differ, since it does not change what a step sees.
  """
  keys = sorted((saved.keys() | current.keys()) - {'process_count'})
  differences = [
      f'  {key}: {saved.get(key)!r} -> {current.get(key)!r}'
      for key in keys
      if saved.get(key) != current.get(key)
  ]
  if differences:
    raise ValueError(
        'The training data are not those of the checkpoint (saved -> '
        'current):\n' + '\n'.join(differences) + '\nRestore these values to '
        'continue the run, or start a new one in another workdir.'
    )


def _check_config(
    config: ml_collections.ConfigDict, process_index: int, process_count: int
) -> None:
  """Raises a ValueError for values that cannot work, before any reading."""
  if not 0 <= process_index < process_count:
    raise ValueError(
        f'process_index is {process_index} of {process_count} processes; it '
        'counts from 0.'
    )
  size = tuple(config.image_size)
  if len(size) != 2 or min(size) < 1:
    raise ValueError(
        f'data.image_size is {size}; write (height, width) in pixels.'
    )
  scale = tuple(config.crop_scale)
  if len(scale) != 2 or not 0 < scale[0] <= scale[1] < math.inf:
    raise ValueError(
        f'data.crop_scale is {scale}; write (lowest, highest) with '
        '0 < lowest <= highest.'
    )
  for field in ('batch_size', 'eval_batch_size'):
    if config[field] < 1 or config[field] % process_count:
      raise ValueError(
          f'data.{field} is {config[field]}; use a positive multiple of the '
          f'number of processes that share a batch, {process_count}.'
      )
  lowest = {'num_threads': 1, 'prefetch': 1, 'resize_shorter': 0}
  for field, least in lowest.items():
    if config[field] < least:
      raise ValueError(
          f'data.{field} is {config[field]}; use at least {least}.'
      )
  for field in ('max_damaged_share', 'color_jitter'):
    if not 0 <= config[field] <= 1:
      raise ValueError(f'data.{field} is {config[field]}; use 0 to 1.')


def _build_photos(config, split):
  if split == 'train':
    return photos.TrainPhotos(resize_shorter=config.resize_shorter)
  crops = photos.ValidationTiles if split == 'eval' else photos.TrainGrid
  return crops(
      size=tuple(config.image_size), resize_shorter=config.resize_shorter
  )


def _build_prepared(config, split):
  return tfds_source.PreparedSource(
      config.name,
      config.data_dir,
      config.eval_split if split == 'eval' else config.train_split,
      resize_shorter=config.resize_shorter,
      max_damaged_share=config.max_damaged_share,
      cache_mib=config.cache_mib,
  )


def _build_folder(config, split):
  return folder.FolderSource(
      config.data_dir,
      config.eval_split if split == 'eval' else config.train_split,
      label_names=config.label_names,
      class_split=config.train_split,
      resize_shorter=config.resize_shorter,
      max_damaged_share=config.max_damaged_share,
      cache_mib=config.cache_mib,
  )


def _build_synthetic(config, split):
  return synthetic.SyntheticSource(
      'validation' if split == 'eval' else 'train',
      size=tuple(config.image_size),
  )


_SOURCES = {
    'photos': _build_photos,
    'tfds': _build_prepared,
    'folder': _build_folder,
    'synthetic': _build_synthetic,
}


def build_source(
    config: ml_collections.ConfigDict, split: str
) -> image_source.ImageSource:
  """Builds the images of a split from the `data` section.

  The split names of the config belong to data sets that have several: tfds
  and folder. The others have one training and one validation split.

  Args:
    config: the `data` section.
    split: 'train', 'eval', or 'train_once': the training images for a single
      pass that takes one fixed crop of each. They differ from those of 'train'
      where that repeats an image for the sake of random crops.

  Raises:
    ValueError: there is no such source, or its classes are not those of
      data.label_names.
  """
  if config.source not in _SOURCES:
    raise ValueError(
        f'data.source is {config.source!r}; known: {sorted(_SOURCES)}.'
    )
  source = _SOURCES[config.source](config, split)
  names = tuple(config.label_names)
  if names and names != source.label_names:
    raise ValueError(
        f'data.label_names is {names}, but the classes of data.source '
        f'{config.source!r} {source.identity["name"]} are '
        f'{source.label_names}; leave it at (), the classes of the source.'
    )
  return source


def prepare(config: ml_collections.ConfigDict) -> str | None:
  """Downloads what the `data` section of a config needs (mode `prepare`).

  Returns:
    The folder of the prepared data set; None where the source needs nothing.

  Raises:
    RuntimeError: it cannot be done here; the message says why.
  """
  if config.source != 'tfds':
    logging.info('data.source %r needs no preparation.', config.source)
    return None
  return tfds_source.prepare(config.name, config.data_dir)
