"""Where images come from: the table of data.source."""

from collections.abc import Mapping
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
      `partitioning.process_share` for those that read the same.
    process_count: processes that share each batch.

  Returns:
    The data set.

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


def _build_photos(config, split):
  if split == 'train':
    return photos.TrainPhotos(resize_shorter=config.resize_shorter)
  crops = photos.ValidationTiles if split == 'eval' else photos.TrainGrid
  return crops(
      size=tuple(config.image_size), resize_shorter=config.resize_shorter
  )


def _encoded_options(config, split):
  """Returns the arguments that sources of encoded images share."""
  return {
      'split': config.eval_split if split == 'eval' else config.train_split,
      'resize_shorter': config.resize_shorter,
      'max_damaged_share': config.max_damaged_share,
      'cache_mib': config.cache_mib,
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


def _build_synthetic(config, split):
  return synthetic.SyntheticSource(
      'validation' if split == 'eval' else 'train',
      size=tuple(config.image_size),
  )


_SOURCES = {
    'photos': _build_photos,
    'tfds': _build_tfds,
    'folder': _build_folder,
    'synthetic': _build_synthetic,
}


def open_source(
    config: ml_collections.ConfigDict, split: str
) -> image_source.ImageSource:
  """Opens the images of a split, for random access by index.

  The split names of the config belong to data sets that have several: tfds
  and folder. The others have one training and one validation split.

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
