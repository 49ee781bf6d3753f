"""Images in a folder: root/split/any/depth/name.jpg."""

from collections.abc import Mapping
import hashlib
import os

from absl import logging

from fsq_jax.data import decoding
from fsq_jax.data import image_source
from fsq_jax.data import listing


class FolderSource(image_source.EncodedSource):
  """The image files below root/split, sorted by path.

  Files with an image extension, in any case, are images; the first bytes decide
  about those without a known extension. Other files are counted in `skipped`;
  images that are not read are an error above max_damaged_share. Names that
  begin with a dot are ignored, as are pipes and sockets, of which reading might
  never end. Links are followed as long as they stay inside the root. Where
  every image lies in a sub-folder of root/split, these are the classes.
  """

  def __init__(
      self,
      root: str,
      split: str,
      *,
      resize_shorter: int = 0,
      max_damaged_share: float = 0.01,
      cache_mib: int = 0,
  ):
    self._root = os.path.abspath(os.path.expanduser(root))
    _check_split(self._root, split)
    sizes, skipped = _list_images(self._root, split, max_damaged_share)
    self._paths = sorted(sizes)
    self._sizes = sizes
    # Paths are split/class/any/depth/name.jpg, or some are split/name.jpg.
    parts = [path.split('/') for path in self._paths]
    if min(map(len, parts)) > 2:
      self.label_names = tuple(sorted({part[1] for part in parts}))
    self._labels = {name: i for i, name in enumerate(self.label_names)}
    # Names and sizes, not pixels: one look at each file, no reading.
    files = '\0'.join(f'{path}\0{sizes[path]}' for path in self._paths)
    super().__init__(
        '',
        split,
        hashlib.sha256(os.fsencode(files)).hexdigest()[:16],
        resize_shorter=resize_shorter,
        max_damaged_share=max_damaged_share,
        cache_mib=cache_mib,
    )
    self.skipped = skipped

  def __len__(self) -> int:
    return len(self._paths)

  def describe(self, index: int) -> str:
    return os.path.join(self._root, self._paths[index])

  def facts(self, index: int) -> image_source.Facts:
    path = self._paths[index]
    return image_source.Facts(
        name=path.partition('/')[2],
        label=self._labels.get(path.split('/')[1], -1),
        num_bytes=self._sizes[path],
    )

  def read(self, index: int) -> bytes:
    with open(self.describe(index), 'rb') as file:
      decoding.check_num_bytes(os.fstat(file.fileno()).st_size)
      return file.read()


def _check_split(root: str, split: str) -> None:
  """Raises a ValueError that says which splits there are."""
  if not os.path.isdir(root):
    raise ValueError(f'data.data_dir is {root!r}, which is not a folder.')
  splits = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
  if split not in splits:
    raise ValueError(
        f'{root} has no folder {split!r}; it has {splits}. Set '
        'data.train_split and data.eval_split to names of folders in '
        'data.data_dir.'
    )


def _list_images(
    root: str, split: str, max_damaged_share: float
) -> tuple[Mapping[str, int], Mapping[str, int]]:
  """Returns bytes by path relative to root, and skipped files by kind.

  Raises:
    ValueError: no images, or too many of a kind that is not read.
  """
  files = listing.list_images(root, split)
  folder = os.path.join(root, split)
  skipped = listing.describe_skipped(files.skipped)
  if not files.sizes:
    raise ValueError(
        f'{folder} holds no images; known extensions: {listing.EXTENSIONS}'
        + (f'. Skipped: {skipped}.' if skipped else '.')
    )
  if skipped:
    logging.warning('%s: skipped %s.', folder, skipped)
  listing.check_unread_share(files, folder, max_damaged_share)
  return files.sizes, files.skipped
