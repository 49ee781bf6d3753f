"""URLs given as paths: recognized, so that none is taken for a local folder."""

import os
import pathlib
import re

# pathlib writes gs://bucket as gs:/bucket.
_URL = re.compile(r'([a-z][a-z0-9+.-]+):/')
_URL_TEXT = re.compile(_URL.pattern + '/')


def find_scheme(path: str | os.PathLike[str]) -> str | None:
  """Returns the scheme of a URL, as 'gs' of gs://bucket/x; None for a path.

  A relative path whose first folder ends with a colon is a path: it is no URL
  as text, and as a `pathlib.Path` it may be given as absolute path.
  """
  pattern = _URL_TEXT if isinstance(path, str) else _URL
  match = pattern.match(os.fspath(path).lower())
  return match and match[1]


def explain(path: str | os.PathLike[str], name: str) -> str | None:
  """Returns why a URL cannot be used in place of a local path.

  Args:
    path: as given.
    name: flag, config field or argument that has it.

  Returns:
    The message; None for a local path.
  """
  scheme = find_scheme(path)
  if scheme is None:
    return None
  return (
      f'{name} is {os.fspath(path)}: URLs of {scheme}:// are not supported'
      ' there; allowed: a local path. Mount the bucket (Cloud Storage FUSE,'
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
