"""Datasets prepared by TensorFlow Datasets, read without TensorFlow.

Functions import `tensorflow_datasets` where they need it, since importing it
takes half a second.
"""

import bisect
from collections.abc import Mapping
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from fsq_jax.data import image_source

# 'name', 'name/config', either with ':1.2.3'.
_NAME = re.compile(
    r'(?P<path>\w+(/[\w-][\w.-]*)?)(:(?P<version>\d+\.\d+\.\d+))?'
)
_VERSION = re.compile(r'\d+\.\d+\.\d+')


class NotPreparedError(ValueError):
  """The dataset is not on this disk."""


class PreparedSource(image_source.EncodedSource):
  """A split of a dataset that TFDS has written as array_record files.

  The image is the feature of type Image (named 'image' if there are several);
  this package decodes it like any image file. The label is the feature 'label',
  if it is an integer.
  """

  def __init__(
      self,
      name: str,
      data_dir: str,
      split: str,
      **reading: Any,
  ):
    """Opens a prepared split.

    Args:
      name: data.name.
      data_dir: data.data_dir; see `find_prepared`.
      split: of the dataset, or a part of it such as 'train[:90%]'.
      **reading: resize_shorter, max_damaged_share, cache_mib and channels of
        EncodedSource.

    Raises:
      ValueError: no such dataset or split, or files of another format.
    """
    import tensorflow_datasets as tfds

    folder = find_prepared(name, data_dir)
    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
      raise ValueError(
          f'{folder} holds {builder.info.file_format.value} files, which have '
          f'no random access. {_how_to_prepare(name)}'
      )
    self._feature = find_image_feature(builder.info.features, folder)
    label = dict(builder.info.features.items()).get('label')
    self._has_labels = (
        label is not None
        and label.shape == ()
        and np.issubdtype(label.np_dtype, np.integer)
    )
    if isinstance(label, tfds.features.ClassLabel):
      self.label_names = tuple(label.names)
    try:
      self._records = builder.as_data_source(
          split, decoders={self._feature: tfds.decode.SkipDecoding()}
      )
      self._files = builder.info.splits[split].file_instructions
    except ValueError as error:
      raise ValueError(
          f'{builder.info.full_name} has no split {split!r}; it has '
          f'{sorted(builder.info.splits)}. Set data.train_split and '
          f"data.eval_split to one, or to a part such as 'train[:90%]'."
      ) from error
    for file in self._files:
      if not os.path.exists(file.filename):
        raise ValueError(
            f'{file.filename} is missing; prepare the dataset again.'
        )
    if not len(self._records):
      raise ValueError(f'{builder.info.full_name} {split} holds no examples.')
    self._ends = list(itertools.accumulate(file.take for file in self._files))
    info = pathlib.Path(folder, 'dataset_info.json').read_bytes()
    super().__init__(
        builder.info.full_name,
        split,
        hashlib.sha256(info).hexdigest()[:16],
        **reading,
    )

  def __len__(self) -> int:
    return len(self._records)

  def describe(self, index: int) -> str:
    shard = bisect.bisect_right(self._ends, index)
    file, end = self._files[shard], self._ends[shard]
    record = file.skip + file.take - (end - index)
    return f'{file.filename} record {record}'

  def metadata(self, index: int) -> image_source.ImageMetadata:
    record = self._read_record(index)
    return image_source.ImageMetadata(
        name=str(index),
        label=int(record['label']) if self._has_labels else -1,
        num_bytes=len(record[self._feature]),
    )

  def stamp(self, index: int) -> tuple[int, int, int]:
    # Of the file that holds the record.
    file = self._files[bisect.bisect_right(self._ends, index)]
    status = os.stat(file.filename)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns

  def read(self, index: int) -> bytes:
    return self._read_record(index)[self._feature]

  def _read_record(self, index: int) -> Mapping[str, Any]:
    try:
      return self._records[index]
    except Exception as error:  # array_record raises any type
      raise ValueError(
          f'{self.describe(index)} cannot be read: {error}. The file is '
          'corrupted or missing; prepare the dataset again.'
      ) from error


def find_prepared(name: str, data_dir: str) -> str:
  """Finds the folder of one prepared version, without a network.

  Args:
    name: 'cifar10', 'name/config', or either with ':1.2.3'; may be '' where
      data_dir is the folder itself.
    data_dir: data_dir of TFDS ('' is $TFDS_DATA_DIR, or ~/tensorflow_datasets),
      or the folder of a prepared version.

  Returns:
    The folder with dataset_info.json, of the newest version.

  Raises:
    NotPreparedError: it is missing; the message has the path and what to do.
    ValueError: an invalid name, or not the name of the dataset in the folder.
  """
  root = pathlib.Path(_expand(data_dir))
  match = _NAME.fullmatch(name)
  if name and not match:
    raise ValueError(
        f"data.name is {name!r}; write 'name', 'name/config' or 'name:1.2.3'."
    )
  if _is_prepared(root):
    info = json.loads((root / 'dataset_info.json').read_bytes())
    if name and match['path'].split('/')[0] != info['name']:
      raise ValueError(
          f'data.data_dir {root} holds {info["name"]!r}, but data.name is '
          f'{name!r}; correct one of the two fields.'
      )
    return str(root)
  if not name:
    raise ValueError(
        f'data.name is empty, and data.data_dir {root} is not the folder of a'
        ' prepared dataset; set one of the two.'
    )
  base = root / match['path']
  versions = [
      path for path in base.glob('*')
      if _VERSION.fullmatch(path.name) and _is_prepared(path)
  ]
  if match['version']:
    versions = [path for path in versions if path.name == match['version']]
  if not versions:
    present = sorted(path.name for path in base.glob('*') if path.is_dir())
    raise NotPreparedError(
        f'Dataset {name!r} is not prepared: no dataset_info.json under '
        f'{base}/{match["version"] or "<version>"} (folders there: '
        f'{present}). {_how_to_prepare(name)}'
    )
  return str(max(versions, key=lambda path: _version_key(path.name)))


def prepare(name: str, data_dir: str) -> str:
  """Downloads and writes a dataset as array_record files, unless it exists.

  Args:
    name: as for find_prepared.
    data_dir: data_dir of TFDS; '' is its default.

  Returns:
    The folder of the prepared version.

  Raises:
    RuntimeError: TensorFlow, which TFDS needs to write, is not installed, or
      TFDS fails.
  """
  try:
    return find_prepared(name, data_dir)
  except NotPreparedError:
    pass
  if importlib.util.find_spec('tensorflow') is None:
    raise RuntimeError(
        f'Preparing {name!r} needs TensorFlow, which is not installed '
        '(training does not): pip install tensorflow-cpu, here or on any '
        'machine, and copy the prepared folder.'
    )
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(
        name, data_dir=_expand(data_dir), file_format='array_record'
    )
    builder.download_and_prepare()
  except Exception as error:  # network, disk, licence: TFDS raises any type
    raise RuntimeError(
        f'TFDS could not prepare {name!r} in {_expand(data_dir)}: '
        f'{type(error).__name__}: {error}'
    ) from error
  return find_prepared(name, data_dir)


def _expand(data_dir: str) -> str:
  default = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  return os.path.abspath(os.path.expanduser(data_dir or default))


def _is_prepared(folder: pathlib.Path) -> bool:
  return (folder / 'dataset_info.json').is_file()


def _version_key(version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in version.split('.'))


def _how_to_prepare(name: str) -> str:
  return (
      f'Prepare {name!r} once, with network access, by `python launch.py '
      '--config=... --mode=prepare` with the same config.'
  )


def find_image_feature(features, folder: str) -> str:
  """Returns the key of the feature of type Image."""
  import tensorflow_datasets as tfds

  keys = [
      key for key, feature in features.items()
      if isinstance(feature, tfds.features.Image)
  ]
  if 'image' in keys:
    keys = ['image']
  if len(keys) != 1:
    raise ValueError(
        f"{folder} has {len(keys)} image features {keys}; there must be one "
        f"image feature, or one named 'image'. All features: "
        f'{sorted(features)}.'
    )
  dtype = np.dtype(features[keys[0]].np_dtype).name
  if dtype not in ('uint8', 'uint16'):
    raise ValueError(
        f'{folder}: feature {keys[0]!r} holds {dtype} images; supported: uint8 '
        'and uint16.'
    )
  return keys[0]
