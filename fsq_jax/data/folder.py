"""Images in a folder: root/split/any/depth/name.jpg."""

from collections.abc import Sequence
import functools
import hashlib
import os
from typing import Any

from absl import logging

from fsq_jax.data import image_errors
from fsq_jax.data import image_source
from fsq_jax.data import listing


class FolderSource(image_source.EncodedSource):
  """The image files below root/split, sorted by path.

  Files with an image extension, in any case, are images; files without a known
  extension are identified by their first bytes. Other files are counted in
  `skipped`; images in unsupported formats are an error above max_damaged_share.
  Names that begin with a dot are ignored, and so are pipes and sockets, since
  reading them may never end. Links are followed inside the root.

  Classes are the sub-folders of the training split that hold images, so that
  labels agree between splits. They are listed on first use. Images outside of
  the sub-folders have label -1.
  """

  def __init__(
      self,
      root: str,
      split: str,
      *,
      label_names: Sequence[str] = (),
      class_split: str | None = None,
      **reading: Any,
  ):
    """Lists the images of a split.

    Args:
      root: data.data_dir.
      split: sub-folder of root.
      label_names: names of all classes, by label; () takes the sub-folders of
        `class_split`.
      class_split: the training split; None is `split`.
      **reading: resize_shorter, max_damaged_share, cache_mib and channels of
        EncodedSource.

    Raises:
      ValueError: no such split, or no images in it.
    """
    self._root = os.path.abspath(os.path.expanduser(root))
    _check_split(self._root, split)
    files = listing.list_images(self._root, split)
    sizes = files.sizes
    self._paths = sorted(sizes)
    self._sizes = sizes
    self._given_names = tuple(label_names)
    self._class_split = class_split or split
    # Names and sizes, not pixels: one look at each file, no reading.
    names = '\0'.join(f'{path}\0{sizes[path]}' for path in self._paths)
    super().__init__(
        '',
        split,
        hashlib.sha256(os.fsencode(names)).hexdigest()[:16],
        **reading,
    )
    listing.check_files(
        len(sizes),
        files.skipped,
        files.num_unread,
        os.path.join(self._root, split),
        self._max_damaged_share,
    )
    self.skipped = files.skipped

  def __len__(self) -> int:
    return len(self._paths)

  def describe(self, index: int) -> str:
    return os.path.join(self._root, self._paths[index])

  @functools.cached_property
  def label_names(self) -> tuple[str, ...]:
    """Names of the classes, by label; () without sub-folders.

    Raises:
      ValueError: a sub-folder of this split is not one of the classes.
    """
    split = self.identity['split']
    classes = [_class_of(path) for path in self._paths]
    own = sorted({name for name in classes if name is not None})
    names = self._given_names or self._find_classes(own)
    unknown = [name for name in own if name not in names]
    if unknown and names:
      known_by = (
          'data.label_names'
          if self._given_names
          else f'the training split {self._class_split!r}'
      )
      raise ValueError(
          f'{split!r} has the classes {listing.shorten(unknown)}, which'
          f' {known_by} does not have; known classes:'
          f' {listing.shorten(names)}. Set data.label_names to the names of all'
          ' classes, in the order of their labels.'
      )
    if unknown:
      logging.warning(
          'The sub-folders of %r are not used as classes, since the training'
          ' split %r has no sub-folders: all labels are -1.',
          split, self._class_split,
      )
    stray = [
        path
        for path, name in zip(self._paths, classes, strict=True)
        if name is None
    ]
    if stray and names:
      logging.warning(
          '%d of %d images are outside of the class folders of %r and have'
          ' label -1: %s', len(stray), len(self), split, listing.shorten(stray)
      )
    return names

  @functools.cached_property
  def _labels(self) -> dict[str | None, int]:
    return {name: i for i, name in enumerate(self.label_names)}

  def _find_classes(self, own: Sequence[str]) -> tuple[str, ...]:
    """Returns the classes of the training split, or else `own`."""
    root, split = self._root, self._class_split
    if split == self.identity['split']:
      return tuple(own)
    names = []
    if split in _list_folders(root):
      # One image per sub-folder is enough; the training split may be large.
      names = [
          name
          for name in _list_folders(os.path.join(root, split))
          if listing.has_images(root, f'{split}/{name}')
      ]
      if names or listing.has_images(root, split):
        return tuple(names)
    if own:
      logging.warning(
          'Labels are indices of the %d sub-folders of %r, since %s has no'
          ' training images in %r. Set data.label_names if labels have to agree'
          ' with another split.', len(own), self.identity['split'], root, split
      )
    return tuple(own)

  def metadata(self, index: int) -> image_source.ImageMetadata:
    path = self._paths[index]
    return image_source.ImageMetadata(
        name=path.partition('/')[2],
        label=self._labels.get(_class_of(path), -1),
        num_bytes=self._sizes[path],
    )

  def stamp(self, index: int) -> tuple[int, int, int]:
    status = os.stat(self.describe(index))
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns

  def read(self, index: int) -> bytes:
    with open(self.describe(index), 'rb') as file:
      image_errors.check_num_bytes(os.fstat(file.fileno()).st_size)
      return file.read()


def _check_split(root: str, split: str) -> None:
  """Raises ValueError, which lists the splits, unless the split exists."""
  if not os.path.isdir(root):
    raise ValueError(f'data.data_dir is {root!r}, which is not a folder.')
  splits = _list_folders(root)
  if split not in splits:
    raise ValueError(
        f'{root} has no folder {split!r}; it has {splits}. Set '
        'data.train_split and data.eval_split to names of folders in '
        'data.data_dir.'
    )


def _class_of(path: str) -> str | None:
  """Returns CLASS of split/CLASS/any/depth/name.jpg, None of split/name.jpg."""
  parts = path.split('/')
  return parts[1] if len(parts) > 2 else None


def _list_folders(folder: str) -> list[str]:
  """Returns the names of the sub-folders that are not hidden, sorted."""
  with os.scandir(folder) as entries:
    return sorted(
        entry.name
        for entry in entries
        if entry.is_dir() and not entry.name.startswith('.')
    )
