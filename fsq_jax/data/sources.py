"""Where images come from: the table of data.source."""

from absl import logging
import ml_collections

from fsq_jax.data import folder
from fsq_jax.data import image_source
from fsq_jax.data import photos
from fsq_jax.data import prepared
from fsq_jax.data import synthetic


def _build_photos(config, split):
  if split == 'train':
    return photos.TrainPhotos(resize_shorter=config.resize_shorter)
  crops = photos.ValidationTiles if split == 'eval' else photos.TrainGrid
  return crops(
      size=tuple(config.image_size), resize_shorter=config.resize_shorter
  )


def _build_prepared(config, split):
  return prepared.PreparedSource(
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
  return prepared.prepare(config.name, config.data_dir)
