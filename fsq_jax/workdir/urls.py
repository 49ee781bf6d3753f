"""URLs given as paths: recognized, so that none is taken for a local folder."""

from collections.abc import Collection
import os
import pathlib
import re

# Schemes that the folder of a run may have.
STORES = ('gs',)
# pathlib writes gs://bucket as gs:/bucket.
_URL = re.compile(r'([a-z][a-z0-9+.-]+):/+', re.IGNORECASE)
_URL_TEXT = re.compile(r'([a-z][a-z0-9+.-]+)://+', re.IGNORECASE)


def _match(path: str | os.PathLike[str]) -> re.Match[str] | None:
  pattern = _URL_TEXT if isinstance(path, str) else _URL
  return pattern.match(os.fspath(path))


def find_scheme(path: str | os.PathLike[str]) -> str | None:
  """Returns the scheme of a URL, as 'gs' of gs://bucket/x; None for a path.

  A relative path whose first folder ends with a colon is a path: it is no URL
  as text, and as a `pathlib.Path` it may be given as absolute path.
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
  return (
      f'{name} is {normalize(path)}: URLs of {scheme}:// are not supported'
      f' there; allowed: {allowed}. Mount the bucket (Cloud Storage FUSE,'
      ' Mountpoint for Amazon S3), or copy the files.'
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
