"""Image files named by a path: one file, or all images of a folder."""

from collections.abc import Mapping
from concurrent import futures
import os
import pathlib

from absl import logging
import numpy as np

from fsq_jax.data import decoding
from fsq_jax.data import image_errors
from fsq_jax.data import listing

_NUM_LISTED = 10


def find_images(path: str | os.PathLike[str]) -> dict[str, pathlib.Path]:
  """Finds the image files of a path; logs how many other files it skips.

  Args:
    path: an image file, or a folder whose images are found at any depth.

  Returns:
    Paths by name: the file's name, or its path relative to the folder. Sorted.

  Raises:
    ValueError: there is no such file, or no image in the folder.
  """
  path = pathlib.Path(path).expanduser().absolute()
  if path.is_file():
    return {path.name: path}
  if not path.is_dir():
    raise ValueError(f'{path} is neither an image file nor a folder of them.')
  real = pathlib.Path(os.path.realpath(path))
  found = listing.list_images(str(real.parent), real.name)
  listing.check_files(
      len(found.sizes), found.skipped, found.num_unread, str(path), max_share=1
  )
  names = sorted(name.partition('/')[2] for name in found.sizes)
  return {name: path / name for name in names}


def read_image(
    path: str | os.PathLike[str], channels: int = 3
) -> np.ndarray:
  """Reads an image file; conversions as in `decoding`.

  Args:
    path: of the file.
    channels: 1 (grey), 3 (RGB) or 4 (RGBA).

  Returns:
    [H, W, channels] uint8, perhaps read-only.

  Raises:
    ValueError: the file is missing or is no image that can be read.
  """
  path = pathlib.Path(path).expanduser()
  try:
    image_errors.check_num_bytes(path.stat().st_size)
    return decoding.decode_image(path.read_bytes(), channels)
  except OSError as error:
    raise ValueError(f'{path} cannot be read: {error.strerror}.') from error
  except image_errors.DamagedImageError as error:
    raise ValueError(f'{path} cannot be read: {error}.') from error


def find_unreadable(paths: Mapping[str, pathlib.Path]) -> dict[str, str]:
  """Decodes every file once, so that none fails during long work.

  Args:
    paths: by name, at least one.

  Returns:
    The message of each file that cannot be read, by name; each is logged.

  Raises:
    ValueError: no file can be read; lists the first messages.
  """

  def find_problem(path: pathlib.Path) -> str | None:
    try:
      read_image(path)
    except ValueError as error:
      return str(error)
    return None

  with futures.ThreadPoolExecutor() as pool:
    found = zip(paths, pool.map(find_problem, paths.values()), strict=True)
    problems = {name: x for name, x in found if x is not None}
  if len(problems) == len(paths):
    raise ValueError(
        '\n  '.join([
            f'None of {len(paths)} images can be read; repair them, or give'
            ' others. The first:',
            *list(problems.values())[:_NUM_LISTED],
        ])
    )
  for problem in problems.values():
    logging.warning('Skipped. %s', problem)
  return problems
