"""Images in the tar shards of a WebDataset: train-{000..146}.tar."""

import bisect
import collections
from collections.abc import Sequence
import glob
import hashlib
import itertools
import os
import re
from typing import Any

from absl import logging
import numpy as np

from fsq_jax.data import image_errors
from fsq_jax.data import image_source
from fsq_jax.data import listing
from fsq_jax.data import tar_index

_NO_FILES = collections.Counter()


class WebDatasetSource(image_source.EncodedSource):
  """The images of the shards of a split, in the order of names and members.

  An image is a member KEY.EXTENSION with an image extension, and its label the
  text of KEY.cls, or 'label' or 'cls' in KEY.json; KEY is the member name up to
  the first dot of its file name. Other labels than integers are -1, with a
  warning. If keys repeat between shards, all names of images begin with the
  name of the shard. Other members are ignored or counted in `skipped`; images
  in unsupported formats are an error above max_damaged_share. Nothing is
  unpacked or unpickled: an index of each shard (`tar_index`) gives random
  access.
  """

  def __init__(
      self,
      root: str,
      split: str,
      *,
      label_names: Sequence[str] = (),
      **reading: Any,
  ):
    """Opens the shards of a split.

    Args:
      root: data.data_dir, the folder of the shards.
      split: see `find_shards`.
      label_names: names of all classes, by label.
      **reading: resize_shorter, max_damaged_share, cache_mib and channels of
        EncodedSource.

    Raises:
      ValueError: no shards or images, labels outside of label_names, or a
        shard that `tar_index.open_index` rejects.
    """
    self._root = os.path.abspath(os.path.expanduser(root))
    self._shards = find_shards(self._root, split)
    shards = [
        tar_index.open_index(os.path.join(self._root, name))
        for name in self._shards
    ]
    self._ends = list(itertools.accumulate(len(x.keys) for x in shards))
    self._keys, self._extensions, self._offsets, self._sizes, self._labels = (
        np.concatenate(columns)
        for columns in zip(*(x[:5] for x in shards), strict=True)
    )
    # Independent of the division into shards, as of the place of a folder.
    columns = self._keys, self._extensions, self._sizes, self._labels
    content = hashlib.sha256()
    for column in columns:
      content.update(f'{column.dtype.str}\0'.encode())
      content.update(column.tobytes())
    super().__init__('', split, content.hexdigest()[:16], **reading)
    self.skipped = listing.order_skipped(
        sum((collections.Counter(x.skipped) for x in shards), _NO_FILES)
    )
    listing.check_files(
        len(self),
        self.skipped,
        sum(x.num_unread for x in shards),
        os.path.join(self._root, split),
        self._max_damaged_share,
    )
    self._warn_of_labels(shards)
    self._repeats_keys = self._find_repeated_keys()
    self.label_names = tuple(label_names)
    image_source.check_labels(self._labels, self.label_names, self.describe)

  def __len__(self) -> int:
    return len(self._keys)

  def describe(self, index: int) -> str:
    return f'{self._path(index)} member {self._member(index)}'

  def metadata(self, index: int) -> image_source.ImageMetadata:
    name = self._member(index)
    if self._repeats_keys:
      name = f'{self._shard(index)}/{name}'
    return image_source.ImageMetadata(
        name=name,
        label=int(self._labels[index]),
        num_bytes=int(self._sizes[index]),
    )

  def stamp(self, index: int) -> tuple[int, int, int]:
    # Of the shard that holds the image.
    status = os.stat(self._path(index))
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns

  def read(self, index: int) -> bytes:
    size = int(self._sizes[index])
    image_errors.check_num_bytes(size)
    with open(self._path(index), 'rb', buffering=0) as file:
      file.seek(int(self._offsets[index]))
      encoded = file.read(size)
    if len(encoded) < size:
      raise OSError(
          f'{self.describe(index)}: {len(encoded)} of {size} bytes can be read.'
          ' The shard has changed since the start of this command, or its disk'
          ' fails.'
      )
    return encoded

  def _shard(self, index: int) -> str:
    return self._shards[bisect.bisect_right(self._ends, index)]

  def _path(self, index: int) -> str:
    return os.path.join(self._root, self._shard(index))

  def _member(self, index: int) -> str:
    name = self._keys[index] + b'.' + self._extensions[index]
    return name.decode('utf-8', 'surrogateescape')

  def _warn_of_labels(self, shards: Sequence[tar_index.Index]) -> None:
    """Warns of labels that are not integers."""
    if count := sum(x.num_bad_labels for x in shards):
      name, index = next(
          x for x in zip(self._shards, shards, strict=True) if x[1].bad_label
      )
      path = os.path.join(self._root, name)
      logging.warning(
          '%d of %d labels cannot be used and are -1, such as %s %s. Labels are'
          " integers >= 0: the text of KEY.cls, or 'label' or 'cls' in"
          ' KEY.json.',
          count, len(self), path, index.bad_label,
      )  # fmt: skip

  def _find_repeated_keys(self) -> bool:
    """Whether keys are in more than one shard, with a warning."""
    order = np.argsort(self._keys, kind='stable')
    keys = self._keys[order]
    repeated = np.flatnonzero(keys[1:] == keys[:-1])
    if len(repeated):
      first, second = order[repeated[0] : repeated[0] + 2]
      logging.warning(
          '%d images have the key of an image in another shard, such as %s and'
          ' %s. Names of images therefore begin with the shard. Check that no'
          ' shard is there twice.',
          len(repeated),
          image_source.printable(self.describe(first)),
          image_source.printable(self.describe(second)),
      )
    return bool(len(repeated))


def find_shards(root: str, split: str) -> list[str]:
  """Returns the shards of a split, relative to the root.

  Args:
    root: an absolute folder.
    split: 'train' takes train.tar, or train-000.tar, train_1.tar,
      train-00000-of-00147.tar and so on, sorted, or else train/*.tar. A name
      with '*' or '{000..146}', or that ends with '.tar', is a pattern of files
      relative to the root.

  Raises:
    ValueError: no shards, a shard of the pattern is missing, or
      `listing.check_parts` rejects the shards of the split.
  """
  if not os.path.isdir(root):
    raise ValueError(f'data.data_dir is {root!r}, which is not a folder.')
  if split.endswith('.tar') or listing.is_pattern(split):
    shards = []
    for pattern in listing.expand_ranges(split):
      shards += ('*' in pattern and _glob(root, pattern)) or [pattern]
    shards = list(dict.fromkeys(shards))  # '{1..10}*' has 10 twice.
  else:
    name = re.compile(re.escape(split) + r'([-_.]?\d+(-of-\d+)?)?\.tar')
    shards = sorted(filter(name.fullmatch, os.listdir(root))) or _glob(
        root, f'{glob.escape(split)}/*.tar'
    )
    try:
      listing.check_parts(shards, split)
    except ValueError as error:
      raise ValueError(f'{root}: {error}') from error
  missing = [x for x in shards if not os.path.isfile(os.path.join(root, x))]
  if len(missing) == len(shards):
    raise ValueError(
        f'{root} has no tar shards of the split {split!r}; files there:'
        f' {listing.shorten(sorted(os.listdir(root)))}. Set data.train_split'
        " and data.eval_split to the beginning of names such as 'train' of"
        " train-000.tar, or to a pattern such as 'train-{000..146}.tar'."
        ' Compressed shards (.tar.gz) have no random access.'
    )
  if missing:
    raise ValueError(
        f'{len(missing)} of {len(shards)} shards {split!r} are missing in'
        f' {root}: {listing.shorten(missing)}.'
    )
  return shards


def _glob(root: str, pattern: str) -> list[str]:
  """Returns the shards of a pattern relative to the root, sorted."""
  names = glob.glob(pattern, root_dir=root)
  return sorted(x for x in names if x.endswith('.tar'))  # Not their indexes.
