"""The errors of unreadable images and files, and limits of their size."""

import tokenize
import zipfile
import zlib

MAX_PIXELS = 10**8
# More than any format needs for MAX_PIXELS pixels of four 16-bit channels.
MAX_BYTES = 2**30
# Raised by np.load for corrupted files: TokenError for headers of .npy files,
# OverflowError and RuntimeError for shapes and for features of zip files.
UNREADABLE_NUMPY = (
    OSError, EOFError, KeyError, OverflowError, RuntimeError, SyntaxError,
    TypeError, ValueError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class DamagedImageError(ValueError):
  """The image cannot be read; the message says why."""


def check_num_pixels(width: int, height: int) -> None:
  """Raises DamagedImageError for more than MAX_PIXELS pixels."""
  if width * height > MAX_PIXELS:
    raise DamagedImageError(
        f'{width} x {height} pixels are more than the {MAX_PIXELS} allowed'
    )


def check_num_bytes(size: int) -> None:
  """Raises DamagedImageError for a file of more than MAX_BYTES bytes."""
  if size > MAX_BYTES:
    raise DamagedImageError(
        f'{size} bytes are more than the {MAX_BYTES} allowed'
    )
