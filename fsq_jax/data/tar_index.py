"""Index of a tar shard: its images, their places and labels, without unpacking.

The index is built once by reading the headers of all members, and the labels.
It is stored beside the shard as SHARD.fsq_index.npz, or in CACHE_FOLDER if that
folder is not writable, and rebuilt if size or modification time of the shard
have changed.
"""

import collections
from collections.abc import Iterator, Mapping
import functools
import json
import os
import pathlib
import re
import tarfile
from typing import Any, BinaryIO, NamedTuple

from absl import logging
import numpy as np

from fsq_jax.data import decoding
from fsq_jax.data import derived_files
from fsq_jax.data import image_errors
from fsq_jax.data import listing

CACHE_FOLDER = '~/.cache/fsq_jax/tar_index'
SUFFIX = '.fsq_index.npz'
# Part of the stamp of a stored index: to be raised when its content changes.
_VERSION = 1
# FOLDER/KEY.EXTENSION; the key ends at the first dot of the file name.
_MEMBER = re.compile(r'((?:.*/)?[^./]+)\.([^/]+)', re.DOTALL)
# Up to the longest that int() reads; the range is checked afterwards.
_INTEGER = re.compile(r'([+-]?[0-9]{1,4000})(\.0*)?')
_MAX_LABEL_BYTES = 2**20
# Parts of samples that are neither images nor labels; they are ignored.
_IGNORED = {
    'caption', 'cbor', 'id', 'index', 'inx', 'mp', 'msg', 'npy', 'npz',
    'pickle', 'pkl', 'pth', 'pyd', 'ten', 'tb', 'text', 'transcript', 'txt',
}  # fmt: skip


class Index(NamedTuple):
  """The n images of a shard in its order.

  Attributes:
    keys: [n] bytes, the member names up to the first dot of the file name.
    extensions: [n] bytes, the rest of the member names, without the dot.
    offsets: [n] int64, position of the encoded image in the shard, bytes.
    sizes: [n] int64, bytes of the encoded image.
    labels: [n] int64, >= 0, or -1 without a label.
    skipped: number of the other members by kind, see `listing.Listing`.
    num_unread: number of the skipped members that are images in an unsupported
      format or of an unknown kind.
    num_bad_labels: number of the images whose label is -1 since it is not an
      integer.
    bad_label: the first of these labels, for messages; '' without.
  """

  keys: np.ndarray
  extensions: np.ndarray
  offsets: np.ndarray
  sizes: np.ndarray
  labels: np.ndarray
  skipped: Mapping[str, int]
  num_unread: int
  num_bad_labels: int = 0
  bad_label: str = ''


class _Member(NamedTuple):
  """A member of a shard: its name, and position and size in bytes."""

  name: str
  offset: int
  size: int

  @classmethod
  def of(cls, name: str, member: tarfile.TarInfo) -> '_Member':
    return cls(name, member.offset_data, member.size)


def open_index(path: str) -> Index:
  """Returns the stored index of a shard, or builds and stores it.

  Args:
    path: of the shard, absolute.

  Raises:
    ValueError: the shard is truncated, compressed or no tar file, has two
      members of the same key, or labels below -1 or above 2^62.
    OSError: the shard cannot be read.
  """
  stamp = _stamp(path)
  places = derived_files.places(path, SUFFIX, CACHE_FOLDER)
  if (index := _load_any(places, stamp)) is not None:
    return index
  with derived_files.lock(places):
    # Of the process that had the lock.
    if (index := _load_any(places, stamp)) is not None:
      return index
    logging.log_every_n_seconds(logging.INFO, 'Indexing %s', 10, path)
    with open(path, 'rb') as file:
      index = _build(path, file)
    _store(index, stamp, path, places)
    return index


def _stamp(path: str) -> str:
  status = os.stat(path)
  # Members in formats that the installed Pillow cannot read are skipped.
  formats = sorted(decoding.readable_formats())
  return json.dumps([_VERSION, status.st_size, status.st_mtime_ns, formats])


def _load_any(places: list[pathlib.Path], stamp: str) -> Index | None:
  """Returns the index stored in the first place that has it; None without."""
  indexes = (_load(place, stamp) for place in places)
  return next((x for x in indexes if x is not None), None)


def _load(place: pathlib.Path, stamp: str) -> Index | None:
  """Returns a stored index; None if it is missing, outdated or corrupted."""
  try:
    with np.load(place, allow_pickle=False) as arrays:
      if str(arrays['stamp']) != stamp:
        return None
      columns = [arrays[name] for name in Index._fields[:5]]
      # Earlier versions have no bad labels, and two counts.
      counts = json.loads(str(arrays['counts']))
  except image_errors.UNREADABLE_NUMPY:
    return None
  return Index(*columns, *counts)


def _store(
    index: Index, stamp: str, path: str, places: list[pathlib.Path]
) -> None:
  """Stores an index, if it can be."""
  arrays = dict(
      zip(Index._fields[:5], index[:5], strict=True),
      stamp=np.array(stamp),
      counts=np.array(json.dumps(index[5:])),
  )
  try:
    derived_files.write(places, lambda file: np.savez(file, **arrays))
  except OSError as error:
    logging.warning(
        'The index of %s cannot be stored and is built again each time: %s',
        path, error,
    )


def _build(path: str, file: BinaryIO) -> Index:
  """Builds the index of an open shard."""
  images, labels, dotted = {}, {}, []
  skipped, num_unread = collections.Counter(), 0
  for member in _read_members(path, file):
    name = member.name.removeprefix('./')
    if member.isdir() or name.startswith('.') or '/.' in name:
      continue
    if not member.isreg() or member.issparse():
      skipped['link or special file'] += 1
      num_unread += 1
      continue
    match = _MEMBER.fullmatch(name)
    key, extension = (match[1], match[2].lower()) if match else (name, '')
    if extension in ('cls', 'json'):
      _add(labels, (key, extension), _Member.of(name, member), path)
      continue
    if extension in _IGNORED:
      continue
    kind = listing.classify(
        os.path.splitext(name)[1].lower(),
        functools.partial(
            _read, file, _Member.of(name, member), listing.START_BYTES
        ),
    )
    if kind == 'image' and match and '.' not in extension:
      _add(images, key, _Member.of(name, member), path)
      continue
    skipped[f'.{extension}' if extension else 'no extension'] += 1
    if kind == 'image' and match:
      dotted.append(key)  # another image of a sample, such as KEY.mask.png
    else:
      num_unread += kind != 'other'
  bad_labels = []
  values = [_read_label(path, file, labels, x, bad_labels) for x in images]
  return Index(
      _to_bytes(images),
      _to_bytes(x.name[len(key) + 1 :] for key, x in images.items()),
      np.array([x.offset for x in images.values()], np.int64),
      np.array([x.size for x in images.values()], np.int64),
      np.array(values, np.int64),
      dict(skipped),
      num_unread + sum(key not in images for key in dotted),
      len(bad_labels),
      bad_labels[0] if bad_labels else '',
  )


def _to_bytes(names: Any) -> np.ndarray:
  return np.array(
      [name.encode('utf-8', 'surrogateescape') for name in names], np.bytes_
  )


def _add(members: Any, key: Any, member: _Member, path: str) -> None:
  """Adds a member; raises ValueError if there is one of the same key."""
  if key in members:
    raise ValueError(
        f'{path} has two members for the same key: {members[key].name!r} and'
        f' {member.name!r}. Give each image a key of its own.'
    )
  members[key] = member


def _read_members(path: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
  """Yields the members of a shard; raises ValueError if it is truncated."""
  count = 0
  try:
    with tarfile.open(fileobj=file, mode='r:', encoding='utf-8') as tar:
      while (member := tar.next()) is not None:
        yield member
        count += 1
        tar.members.clear()  # They would take about 1 KB of memory each.
      end = tar.offset
  except (tarfile.TarError, ValueError, OverflowError) as error:
    raise ValueError(
        f'{path} is truncated, compressed or no tar file ({error}). Copy it'
        ' again, or unpack compression (gunzip).'
    ) from error
  # tarfile takes a header that is cut or corrupted for the end of the archive.
  file.seek(end)
  rest = file.read(2**20)
  if len(rest) < tarfile.BLOCKSIZE or rest.strip(b'\0'):
    raise ValueError(
        f'{path} is truncated or corrupted: byte {end}, after {count}'
        ' members, is not the end of an archive. Copy or write'
        ' the shard again.'
    )


def _read(file: BinaryIO, member: _Member, limit: int) -> bytes:
  file.seek(member.offset)
  return file.read(min(member.size, limit))


def _read_label(
    path: str, file: BinaryIO, labels: Any, key: str, bad_labels: list[str]
) -> int:
  """Returns the label of KEY.cls, or else of KEY.json; -1 without a label.

  Appends the member and the reason to bad_labels if the label is no integer.
  """
  member = labels.get((key, 'cls')) or labels.get((key, 'json'))
  if member is None:
    return -1
  try:
    value = _parse_label(file, member)
  except ValueError as error:
    bad_labels.append(f'member {member.name!r}: {error}')
    return -1
  if not -1 <= value < 2**62:
    raise ValueError(
        f'{path} member {member.name!r}: the label is {value!r:.100}. Labels'
        ' are integers >= 0, or -1 without a class: the text of KEY.cls, or'
        " 'label' or 'cls' in KEY.json."
    )
  return value


def _parse_label(file: BinaryIO, member: _Member) -> int:
  """Returns the label of a member; raises ValueError if it is no integer."""
  if member.size > _MAX_LABEL_BYTES:
    raise ValueError(
        f'its {member.size} bytes are more than the {_MAX_LABEL_BYTES} allowed'
    )
  text = _read(file, member, _MAX_LABEL_BYTES).decode()
  value: Any = text.strip()
  if member.name.lower().endswith('.json'):
    try:
      parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'it is not valid JSON ({error})') from error
    if not isinstance(parsed, dict):
      return -1
    value = parsed.get('label', parsed.get('cls'))
    if value is None:
      return -1
    if isinstance(value, float) and value.is_integer():
      value = int(value)
  elif match := _INTEGER.fullmatch(value):
    value = int(match[1])
  if type(value) is not int:
    raise ValueError(f'the label is {value!r:.100}')
  return value
