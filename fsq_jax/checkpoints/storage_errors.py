"""What an error of reading says: that files are damaged, or something else."""

import errno
import re

# Numbers of the system's errors about files that are gone, or that damaged
# bytes name. Any other, as of a disk or a server, says nothing about the files.
_OF_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL}
_NUMBER = re.compile(r"(?:\[Errno |os_error_code=')(\d+)")
# Of TensorStore, which has no number for those of object stores.
_NOT_OF_DAMAGE = re.compile(
    r'\b(ABORTED|CANCELLED|DEADLINE_EXCEEDED|PERMISSION_DENIED'
    r'|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE):'
)


def find_other_cause(error: BaseException | None) -> BaseException | None:
  """Returns the error behind this one that is not of damage, if there is."""
  while error is not None:
    numbers = {int(x) for x in _NUMBER.findall(str(error))}
    if numbers - _OF_DAMAGE or _NOT_OF_DAMAGE.search(str(error)):
      return error
    error = error.__cause__ or error.__context__
  return None


def shorten(error: BaseException) -> str:
  """Returns the two ends of an error's text, which may fill pages."""
  # TensorStore ends with how the file was opened.
  text = ' '.join(str(error).partition(' [tensorstore_spec')[0].split())
  return text if len(text) < 300 else f'{text[:120]} ... {text[-160:]}'
