"""Files that are made once from a file of a data set, for random access.

They are beside that file or, if its folder is not writable, in a cache folder.
"""

from collections.abc import Callable
import contextlib
import hashlib
import os
import pathlib
from typing import BinaryIO
import uuid


def places(path: str, suffix: str, folder: str) -> list[pathlib.Path]:
  """Returns where the derived file of a file may be, the first choice first.

  Args:
    path: of the file, absolute.
    suffix: of the name of the derived file.
    folder: the cache folder; '~' is the home folder.
  """
  digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
  beside = pathlib.Path(path + suffix)
  return [beside, pathlib.Path(folder).expanduser() / f'{digest}_{beside.name}']


def write(
    paths: list[pathlib.Path], write_content: Callable[[BinaryIO], None]
) -> pathlib.Path:
  """Writes a file to the first place that can be written, atomically.

  Args:
    paths: from `places`.
    write_content: writes to an open file.

  Returns:
    The path.

  Raises:
    OSError: no place can be written; the message has the error of each.
  """
  errors = []
  for path in paths:
    temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')
    try:
      if path is not paths[0]:
        path.parent.mkdir(parents=True, exist_ok=True)
      with open(temporary, 'xb') as file:
        write_content(file)
      os.replace(temporary, path)
      return path
    except OSError as error:
      errors.append(f'{path}: {error.strerror or error}')
    finally:
      with contextlib.suppress(OSError):
        temporary.unlink()
  raise OSError('; '.join(errors))
