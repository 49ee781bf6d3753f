"""URLs given as paths: recognized, so that none is taken for a local folder."""

from collections.abc import Collection
import os
import pathlib
import re

# Schemes that the folder of a run may have.
STORES = ('gs',)
_URL = re.compile(r'([a-z][a-z0-9+.-]+)://', re.IGNORECASE)
# pathlib writes gs://bucket as gs:/bucket.
_COLLAPSED = re.compile(r'([a-z][a-z0-9+.-]+):/', re.IGNORECASE)
_COLLAPSED_TEXT = re.compile(
    r'(gs|gcs|s3[an]?|oss|az|abfss?|wasbs?|dbfs|hdfs|https?|file):/',
    re.IGNORECASE,
)
_MOUNT = (
    'Mount the bucket (Cloud Storage FUSE, Mountpoint for Amazon S3), or copy'
    ' the files.'
)
_ADVICE = {
    'file': 'Give the path without file://.',
    **dict.fromkeys(('gs', 'gcs', 's3', 's3a', 's3n'), _MOUNT),
}


def _match(path: str | os.PathLike[str]) -> re.Match[str] | None:
  text = os.fspath(path)
  collapsed = _COLLAPSED_TEXT if isinstance(path, str) else _COLLAPSED
  return _URL.match(text) or collapsed.match(text)


def find_scheme(path: str | os.PathLike[str]) -> str | None:
  """Returns the scheme of a URL, as 'gs' of gs://bucket/x; None for a path.

  gs:/bucket/x, as pathlib writes it, is one, too; ./gs:/bucket/x is a path.
  """
  match = _match(path)
  return match and match[1].lower()


def normalize(url: str | os.PathLike[str]) -> str:
  """Returns a URL as scheme://rest, without the change of pathlib."""
  match = _match(url)
  rest = os.fspath(url)[match.end() :].rstrip('/')
  return f'{match[1].lower()}://{rest}'


def explain(
    path: str | os.PathLike[str], name: str, stores: Collection[str] = ()
) -> str | None:
  """Returns why a URL cannot be used in place of a path.

  Args:
    path: as given.
    name: flag, config field or argument that has it.
    stores: schemes that are supported there.

  Returns:
    The message; None for a local path, and for a URL that is supported.
  """
  scheme = find_scheme(path)
  if scheme is None or scheme in stores:
    return None
  allowed = ' or '.join(['a local path', *(f'{x}://BUCKET/X' for x in stores)])
  advice = _ADVICE.get(scheme, 'Copy the files.')
  if scheme == 'gcs' and 'gs' in stores:
    advice = f'Write {normalize(path).replace("gcs", "gs", 1)}.'
  return (
      f'{name} is {normalize(path)}: URLs of {scheme}:// are not supported'
      f' there; allowed: {allowed}. {advice}'
  )


def local_path(path: str | os.PathLike[str], name: str) -> pathlib.Path:
  """Returns a path with `~` expanded.

  Args:
    path: as given by a user.
    name: flag, config field or argument that has it, for messages.

  Raises:
    ValueError: the path is a URL.
  """
  if problem := explain(path, name):
    raise ValueError(problem)
  return pathlib.Path(path).expanduser()
