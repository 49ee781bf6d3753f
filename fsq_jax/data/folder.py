"""Images in a folder: root/split/any/depth/name.jpg."""

import hashlib
import os

from fsq_jax.data import decoding
from fsq_jax.data import image_source

EXTENSIONS = (
    '.bmp', '.gif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'
)


class FolderSource(image_source.EncodedSource):
  """The image files below root/split, sorted by path.

  Extensions count in any case. Names that begin with a dot are passed over, as
  are other files, and pipes and sockets, of which reading might never end.
  Links are followed as long as they stay inside the root. Where every image
  lies in a sub-folder of root/split, these are the classes.
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
    sizes = _list_images(self._root, split)
    if not sizes:
      raise ValueError(
          f'{os.path.join(self._root, split)} holds no images; known '
          f'extensions: {EXTENSIONS}.'
      )
    self._paths = sorted(sizes)
    self._sizes = sizes
    # Paths are split/class/any/depth/name.jpg, or some are split/name.jpg.
    parts = [path.split('/') for path in self._paths]
    if min(map(len, parts)) > 2:
      self.label_names = tuple(sorted({part[1] for part in parts}))
    self._labels = {name: i for i, name in enumerate(self.label_names)}
    # Names and sizes, not pixels: one look at each file, no reading.
    listing = '\0'.join(f'{path}\0{sizes[path]}' for path in self._paths)
    super().__init__(
        '',
        split,
        hashlib.sha256(os.fsencode(listing)).hexdigest()[:16],
        resize_shorter=resize_shorter,
        max_damaged_share=max_damaged_share,
        cache_mib=cache_mib,
    )

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

  def stamp(self, index: int) -> tuple[int, int, int]:
    status = os.stat(self.describe(index))
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns

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


def _list_images(root: str, split: str) -> dict[str, int]:
  """Returns file sizes in bytes by path relative to root, '/'-separated."""
  real_root = os.path.realpath(root)
  sizes = {}
  # Each folder comes with the real paths of those that hold it.
  pending = [(split, (real_root,))]
  while pending:
    folder, above = pending.pop()
    real_folder = _resolve(os.path.join(root, folder), real_root)
    if real_folder in above:
      raise ValueError(f'{folder!r} is a link to a folder that holds it.')
    with os.scandir(os.path.join(root, folder)) as entries:
      for entry in entries:
        path = f'{folder}/{entry.name}'
        if entry.name.startswith('.'):
          continue
        if entry.is_dir():
          pending.append((path, (*above, real_folder)))
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
          if entry.is_symlink():
            _resolve(entry.path, real_root)
          if entry.is_file():
            sizes[path] = entry.stat().st_size
  return sizes


def _resolve(path: str, real_root: str) -> str:
  """Returns the real path, which must exist inside the root."""
  real_path = os.path.realpath(path)
  if os.path.commonpath([real_path, real_root]) != real_root:
    raise ValueError(
        f'{path!r} is a link to {real_path!r}, outside of {real_root!r}; set '
        'data.data_dir to a folder that holds the files themselves.'
    )
  if not os.path.exists(real_path):
    raise ValueError(f'{path!r} is a link to {real_path!r}, which is missing.')
  return real_path
