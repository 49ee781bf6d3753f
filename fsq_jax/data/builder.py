"""Builds datasets and image sources from the `data` section of a config."""

from collections.abc import Mapping
import functools
from typing import Any

from absl import logging
import ml_collections

from fsq_jax.data import array_source
from fsq_jax.data import digits
from fsq_jax.data import folder
from fsq_jax.data import image_source
from fsq_jax.data import parquet_files
from fsq_jax.data import parquet_source
from fsq_jax.data import photos
from fsq_jax.data import pipelines
from fsq_jax.data import synthetic
from fsq_jax.data import tfds_source
from fsq_jax.data import webdataset_source

# By name: split of the source, and pipeline.
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
  """Builds the pipeline of a split.

  Args:
    config: the `data` section; see configs/default.py.
    split: 'train': shuffled, augmented, endless; 'eval': every example once,
      in fixed order, centre crops; 'eval_native': every example once, one by
      one at its own size; 'train_once': training images as by 'eval'.
    seed: of shuffling and augmentation, >= 0; only 'train' uses it.
    process_index: index of the data shard of this process, in
      [0, process_count); see `partitioning.data_shard`.
    process_count: data shards of each batch.

  Returns:
    The dataset.

  Raises:
    ValueError: the config is not valid or the images are not there.
  """
  if split not in _PIPELINES:
    raise ValueError(f'split is {split!r}; known: {sorted(_PIPELINES)}.')
  _check_process(config, process_index, process_count)
  images, build = _PIPELINES[split]
  source = open_source(config, images)
  shard = slice(process_index, None, process_count)
  return build(config, source, seed, shard)


def check_fingerprint(
    saved: Mapping[str, Any], current: Mapping[str, Any]
) -> None:
  """Raises ValueError if an iterator's state belongs to other data.

  A state only counts batches: with other data it would silently repeat some
  examples and skip others.

  Args:
    saved: fingerprint stored with the state.
    current: fingerprint of the dataset that the state is to resume.

  Raises:
    ValueError: they differ; one line per difference. process_count may differ,
      since it does not change the examples of a step.
  """
  keys = sorted((saved.keys() | current.keys()) - {'process_count'})
  differences = [
      f'  {key}: {saved.get(key)!r} -> {current.get(key)!r}'
      for key in keys
      if saved.get(key) != current.get(key)
  ]
  if differences:
    raise ValueError(
        'The training data differ from the data of the checkpoint (saved ->'
        ' current):\n' + '\n'.join(differences) + '\nRestore these values to'
        ' resume the run, or start a new run in another workdir.'
    )


def _check_process(
    config: ml_collections.ConfigDict, process_index: int, process_count: int
) -> None:
  """Raises ValueError unless the processes can share batches."""
  if not 0 <= process_index < process_count:
    raise ValueError(
        f'process_index is {process_index} of {process_count} processes; it'
        ' counts from 0.'
    )
  for field in ('batch_size', 'eval_batch_size'):
    if config[field] % process_count:
      raise ValueError(
          f'data.{field} is {config[field]}; use a multiple of the number of'
          f' processes that share a batch, {process_count}.'
      )


def _channels(config) -> int:
  # Sections written by hand for earlier versions lack the field.
  return config.get('channels', 3)


def _build_photos(config, split, names=photos.TRAIN_PHOTOS):
  options = {
      'resize_shorter': config.resize_shorter,
      'channels': _channels(config),
  }
  if split == 'train':
    return photos.TrainPhotos(names, **options)
  size = tuple(config.image_size)
  if split == 'eval':
    return photos.ValidationTiles(size=size, **options)
  return photos.TrainGrid(names, size=size, **options)


def _encoded_options(config, split):
  """Returns the arguments that sources of encoded images share."""
  return {
      'split': config.eval_split if split == 'eval' else config.train_split,
      'resize_shorter': config.resize_shorter,
      'max_damaged_share': config.max_damaged_share,
      'cache_mib': config.cache_mib,
      'channels': _channels(config),
  }


def _build_tfds(config, split):
  return tfds_source.PreparedSource(
      config.name, config.data_dir, **_encoded_options(config, split)
  )


def _build_folder(config, split):
  return folder.FolderSource(
      config.data_dir,
      label_names=config.label_names,
      class_split=config.train_split,
      **_encoded_options(config, split),
  )


def _build_arrays(config, split):
  return array_source.ArraySource(
      config.data_dir,
      label_names=config.label_names,
      **_encoded_options(config, split),
  )


def _build_webdataset(config, split):
  return webdataset_source.WebDatasetSource(
      config.data_dir,
      label_names=config.label_names,
      **_encoded_options(config, split),
  )


def _build_parquet(config, split):
  return parquet_source.ParquetSource(
      config.name,
      config.data_dir,
      label_names=config.label_names,
      **_encoded_options(config, split),
  )


def _build_digits(config, split):
  return digits.DigitsSource(
      'validation' if split == 'eval' else 'train',
      size=config.resize_shorter or max(config.image_size),
      channels=_channels(config),
  )


def _build_synthetic(config, split):
  size = tuple(config.image_size)
  if split == 'train':  # Batches have crops of it.
    size = tuple(map(max, *pipelines.image_sizes(config), size))
  return synthetic.SyntheticSource(
      'validation' if split == 'eval' else 'train',
      size=size,
      channels=_channels(config),
  )


_SOURCES = {
    'photos': _build_photos,
    'public_domain_photos': functools.partial(
        _build_photos, names=photos.PUBLIC_DOMAIN_PHOTOS
    ),
    'tfds': _build_tfds,
    'folder': _build_folder,
    'webdataset': _build_webdataset,
    'parquet': _build_parquet,
    'arrays': _build_arrays,
    'digits': _build_digits,
    'synthetic': _build_synthetic,
}


def open_source(
    config: ml_collections.ConfigDict, split: str
) -> image_source.ImageSource:
  """Opens the images of a split, for random access by index.

  data.train_split and data.eval_split are for tfds, folder, webdataset,
  parquet and arrays; the other sources have one training and one validation
  split.

  Args:
    config: the `data` section.
    split: 'train', 'eval', or 'train_once': the training images for a single
      pass with one fixed crop of each. They differ from the images of 'train'
      where 'train' repeats an image for the sake of random crops.

  Raises:
    ValueError: there is no such source, the images are not there, or their
      classes are not data.label_names.
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
        f'{source.label_names}; use (), the classes of the source.'
    )
  return source


def prepare(config: ml_collections.ConfigDict) -> list[str]:
  """Downloads and prepares the dataset of a config (mode `prepare`).

  Tar shards are indexed, and images of Parquet files copied for random access,
  so that several processes need not do it at the start of training.

  Returns:
    Lines for people: the folder of the images, and their number by split.

  Raises:
    RuntimeError: TensorFlow or huggingface_hub is not installed, or preparing
      fails.
    ValueError: as for `open_source`.
  """
  if config.source == 'tfds':
    return [f'Images: {tfds_source.prepare(config.name, config.data_dir)}']
  if config.source not in ('parquet', 'webdataset'):
    line = f'data.source {config.source!r} needs no preparation.'
    logging.info('%s', line)
    return [line]
  root = config.data_dir
  if config.source == 'parquet' and config.name:
    splits = config.train_split, config.eval_split
    root = parquet_files.prepare(config.name, config.data_dir, splits)
  lines = [f'Images: {root}']
  for split in ('train', 'eval'):
    source = open_source(config, split)
    name = source.identity['split']
    lines.append(f'Split {name!r}: {len(source)} images')
  return lines
