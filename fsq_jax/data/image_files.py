"""Image files named by a path: one file, or all images of a folder."""

from concurrent import futures
import os
import pathlib

import numpy as np

from fsq_jax.data import decoding
from fsq_jax.data import image_errors
from fsq_jax.data import listing

_NUM_LISTED = 10


def find_images(path: str | os.PathLike[str]) -> dict[str, pathlib.Path]:
  """Finds the image files of a path.

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
  sizes = listing.list_images(str(real.parent), real.name).sizes
  if not sizes:
    raise ValueError(
        f'{path} holds no images; known extensions: {listing.EXTENSIONS}.'
    )
  names = sorted(name.partition('/')[2] for name in sizes)
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


def check_images(paths: list[pathlib.Path]) -> None:
  """Decodes every file once, so that none fails during long work.

  Raises:
    ValueError: some files cannot be read; lists the first of them.
  """

  def find_problem(path: pathlib.Path) -> str | None:
    try:
      read_image(path)
    except ValueError as error:
      return str(error)
    return None

  with futures.ThreadPoolExecutor() as pool:
    problems = [x for x in pool.map(find_problem, paths) if x is not None]
  if problems:
    raise ValueError(
        '\n  '.join([
            f'{len(problems)} of {len(paths)} images cannot be read; repair or'
            ' remove them. The first:',
            *problems[:_NUM_LISTED],
        ])
    )
