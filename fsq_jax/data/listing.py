"""Lists the images of a folder and counts its other files."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import os
import re

from absl import logging

from fsq_jax.data import decoding

# Images by name; their content is checked when they are decoded.
EXTENSIONS = (
    '.apng', '.avif', '.bmp', '.dib', '.gif', '.ico', '.j2c', '.j2k', '.jfif',
    '.jp2', '.jpe', '.jpeg', '.jpf', '.jpg', '.jpx', '.mpo', '.pbm', '.pfm',
    '.pgm', '.png', '.pnm', '.ppm', '.tif', '.tiff', '.webp',
)
_NEEDED_FORMATS = {
    '.avif': 'AVIF', '.j2c': 'JPEG2000', '.j2k': 'JPEG2000',
    '.jp2': 'JPEG2000', '.jpf': 'JPEG2000', '.jpx': 'JPEG2000',
    '.webp': 'WEBP',
}
# Images by name, in unsupported formats.
_UNREAD_EXTENSIONS = {
    '.ai', '.arw', '.bpg', '.cr2', '.cr3', '.cur', '.dcm', '.dds', '.dng',
    '.emf', '.eps', '.exr', '.fits', '.hdr', '.heic', '.heif', '.icns', '.jxl',
    '.jxr', '.nef', '.orf', '.pam', '.pcx', '.psd', '.qoi', '.raf', '.ras',
    '.raw', '.rw2', '.sgi', '.svg', '.tga', '.wmf', '.xbm', '.xcf', '.xpm',
}
# Files by name that are no images.
_OTHER_EXTENSIONS = {
    '.array_record', '.arrow', '.avi', '.bin', '.bz2', '.cfg', '.ckpt', '.csv',
    '.dat', '.db', '.doc', '.docx', '.flac', '.flo', '.gz', '.h5', '.hdf5',
    '.htm', '.html', '.ini', '.ipynb', '.json', '.jsonl', '.lock', '.log',
    '.mat', '.md', '.md5', '.mkv', '.mov', '.mp3', '.mp4', '.npy', '.npz',
    '.onnx', '.parquet', '.pb', '.pdf', '.pickle', '.pkl', '.pt', '.pth', '.py',
    '.pyc', '.rar', '.rst', '.safetensors', '.sh', '.sha256', '.sqlite', '.tar',
    '.tex', '.tfrecord', '.tgz', '.toml', '.tsv', '.txt', '.url', '.wav',
    '.webm', '.xlsx', '.xml', '.xmp', '.xz', '.yaml', '.yml', '.zip', '.zst',
    '.7z',
}  # fmt: skip
_NUM_LISTED = 10
_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
# NAME, NAME-003 or NAME-00003-of-00147, maybe with a hash of `datasets`.
_PART = re.compile(
    r'(?P<stem>.*?)(?P<number>[0-9a-f]{16}|\d+)?'
    r'(-of-(?P<total>\d+)(-[0-9a-f]{16})?)?',
    re.DOTALL,
)
# Length of the beginning of a file that shows its kind.
START_BYTES = 512


@dataclasses.dataclass(frozen=True)
class Listing:
  """The files of a split.

  Attributes:
    sizes: bytes of each image, by path relative to the root, '/'-separated.
    skipped: number of the other files by kind: the extension in lower case, or
      'no extension'. Names that begin with a dot are not counted.
    num_unread: number of the skipped files that are images in an unsupported
      format, or binary files of an unknown kind.
  """

  sizes: Mapping[str, int]
  skipped: Mapping[str, int]
  num_unread: int


def list_images(root: str, split: str) -> Listing:
  """Lists the images below root/split.

  Files with a known extension are classified by name, without opening them,
  and other files by their first bytes. Links are followed inside the root;
  pipes and sockets are ignored.

  Raises:
    ValueError: a link out of the root, to a missing file, or in a circle.
  """
  sizes, skipped, num_unread = {}, collections.Counter(), 0
  for path, kind, num_bytes in _walk(root, split):
    if kind == 'image':
      sizes[path] = num_bytes
    else:
      skipped[os.path.splitext(path)[1].lower() or 'no extension'] += 1
      num_unread += kind == 'unread'
  return Listing(sizes, order_skipped(skipped), num_unread)


def has_images(root: str, split: str) -> bool:
  """Whether there is an image below root/split; stops at the first."""
  return any(kind == 'image' for _, kind, _ in _walk(root, split))


def check_files(
    num_images: int,
    skipped: Mapping[str, int],
    num_unread: int,
    place: str,
    max_share: float,
) -> None:
  """Logs the skipped files of a split; raises ValueError if they are too many.

  Args:
    num_images: of the split.
    skipped: see `Listing`.
    num_unread: see `Listing`.
    place: folder or shards of the split, for messages.
    max_share: data.max_damaged_share, here of images and unsupported files.

  Raises:
    ValueError: no images, or too many unsupported image files.
  """
  if not num_images:
    raise ValueError(
        f'{place} holds no images; known extensions: {EXTENSIONS}'
        + (f'. Skipped: {_describe(skipped)}.' if skipped else '.')
    )
  if skipped:
    logging.warning('%s: skipped %s.', place, _describe(skipped))
  num_files = num_images + num_unread
  limit = math.ceil(max_share * num_files)
  if num_unread > limit:
    raise ValueError(
        f'{place}: {num_unread} of {num_files} files are images in an'
        ' unsupported format, or of an unknown kind, more than the'
        f' {limit} that data.max_damaged_share = {max_share} allows. Convert'
        ' them to PNG or JPEG, move them away, or raise the limit. Skipped:'
        f' {_describe(skipped)}.'
    )


def order_skipped(skipped: Mapping[str, int]) -> dict[str, int]:
  """Returns the counts of skipped files, the most frequent kind first."""
  return dict(sorted(skipped.items(), key=lambda item: (-item[1], item[0])))


def shorten(names: Sequence[str]) -> str:
  """Returns the first names, quoted: "'a', 'b', ..."."""
  more = ', ...' if len(names) > _NUM_LISTED else ''
  return ', '.join(map(repr, names[:_NUM_LISTED])) + more


def is_pattern(name: str) -> bool:
  """Whether the name of a split has '*' or a range such as {000..146}."""
  return '*' in name or bool(_RANGE.search(name))


def expand_ranges(pattern: str) -> list[str]:
  """Returns the names of a pattern with ranges such as {000..146}."""
  match = _RANGE.search(pattern)
  if not match:
    return [pattern]
  first, last = match.groups()
  return [
      name
      for number in range(int(first), int(last) + 1)
      for name in expand_ranges(
          f'{pattern[: match.start()]}{number:0{len(first)}}'
          f'{pattern[match.end() :]}'
      )
  ]


def check_parts(names: Sequence[str], split: str) -> None:
  """Raises ValueError if files of a split are missing or ambiguous.

  Args:
    names: of the files found by the name of a split, '/'-separated:
      SPLIT.tar, SPLIT-000.tar, SPLIT-00000-of-00147.tar and so on. In a folder
      SPLIT, where names are arbitrary, only names with -of- are checked.
    split: see above.

  Raises:
    ValueError: files with and without numbers, or with different separators or
      totals, which may hold the same images; a number that occurs twice; fewer
      files than the total.
  """
  groups = collections.defaultdict(list)
  first = os.path.dirname(names[0]) if names else ''
  for name in names:
    folder, file = os.path.split(name)
    if folder != first:
      raise ValueError(_describe_ambiguous(names[0], name, split))
    match = _PART.fullmatch(os.path.splitext(file)[0])
    stem, number, total = match['stem'], match['number'], match['total']
    if not f'/{folder}'.endswith(f'/{split}'):
      groups[''].append((name, (stem, total), number))
    elif total:
      groups[stem].append((name, (stem, total), number))
  for parts in groups.values():
    first, scheme, _ = parts[0]
    seen = {}
    for name, other_scheme, number in parts:
      other = seen.setdefault(number and number.lstrip('0'), name)
      if other_scheme != scheme:
        other = first
      if other != name:
        raise ValueError(_describe_ambiguous(other, name, split))
    total = int(scheme[1] or 0)
    if total > len(parts):
      raise ValueError(
          f'{total - len(parts)} of {total} files of the split {split!r} are'
          f' missing; there are {shorten([x[0] for x in parts])}.'
      )


def _describe_ambiguous(first: str, second: str, split: str) -> str:
  return (
      f'the files {first!r} and {second!r} of the split {split!r} are named by'
      ' different rules and may hold the same images. Choose files by a pattern'
      " with '*' or '{000..146}', or move the other files away."
  )


def _describe(skipped: Mapping[str, int]) -> str:
  """Returns the counts in words: '12 .heic, 3 .json'."""
  return ', '.join(f'{count} {kind}' for kind, count in skipped.items())


def _walk(root: str, split: str) -> Iterator[tuple[str, str, int]]:
  """Yields path relative to root, '/'-separated, kind and bytes of files."""
  real_root = os.path.realpath(root)
  # Each folder comes with the real paths of its parents.
  pending = [(split, (real_root,))]
  while pending:
    folder, above = pending.pop()
    real_folder = _resolve(os.path.join(root, folder), real_root)
    if real_folder in above:
      raise ValueError(f'{folder!r} is a link to a parent folder.')
    with os.scandir(os.path.join(root, folder)) as entries:
      for entry in entries:
        path = f'{folder}/{entry.name}'
        if entry.name.startswith('.'):
          continue
        if entry.is_dir():
          pending.append((path, (*above, real_folder)))
          continue
        extension = os.path.splitext(entry.name)[1].lower()
        if extension in EXTENSIONS and entry.is_symlink():
          _resolve(entry.path, real_root)
        if not entry.is_file():
          continue
        kind = classify(
            extension, functools.partial(_read_start, entry.path)
        )
        if kind == 'image' and entry.is_symlink():
          _resolve(entry.path, real_root)
        yield path, kind, entry.stat().st_size


def classify(extension: str, read_start: Callable[[], bytes]) -> str:
  """Returns 'image', 'unread' (unsupported or unknown) or 'other'.

  Args:
    extension: of the file's name, in lower case with the dot, or ''.
    read_start: reads the first START_BYTES bytes of the file; called if the
      extension is unknown.
  """
  readable = decoding.readable_formats()
  if extension in EXTENSIONS:
    is_read = _NEEDED_FORMATS.get(extension, 'JPEG') in readable
    return 'image' if is_read else 'unread'
  if extension in _UNREAD_EXTENSIONS:
    return 'unread'
  if extension in _OTHER_EXTENSIONS:
    return 'other'
  try:
    start = read_start()
  except PermissionError:
    return 'unread'
  name = decoding.identify(start[: decoding.PREFIX_BYTES])
  if name is not None:
    return 'image' if name in readable else 'unread'
  return 'other' if _is_text(start) else 'unread'


def _read_start(path: str) -> bytes:
  with open(path, 'rb') as file:
    return file.read(START_BYTES)


def _is_text(start: bytes) -> bool:
  """Whether the beginning of a file is UTF-8 or UTF-16 text, or empty."""
  if start.startswith((b'\xff\xfe', b'\xfe\xff')):
    return True
  try:
    start.decode()
  except UnicodeDecodeError as error:
    # The last character may be cut.
    if len(start) < START_BYTES or error.start < len(start) - 3:
      return False
  return b'\0' not in start


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
