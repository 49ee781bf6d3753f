"""Generated images as .npz files in the format of ADM's evaluation.

ADM's reader ignores the labels (`npz_files`). Its Inception score takes splits
of the images in the order of the file, hence the order is shuffled. It takes
RGB only; grey and RGBA images, [n, H, W, 1] and [n, H, W, 4], are for other
readers.
"""

import os

import numpy as np

from fsq_jax.evaluation import npz_files
from fsq_jax.evaluation import sample_metrics


def write_npz(
    path: str | os.PathLike[str],
    images: np.ndarray,
    labels: np.ndarray,
    seed: int,
) -> None:
  """Writes images and labels in shuffled order, atomically.

  Only a block of the images is in memory; 50,000 images of 256 x 256 pixels
  (9.8 GB) can come from a memory map of `np.lib.format.open_memmap`.

  Args:
    path: of the file; the folder exists.
    images: [n, H, W, C] uint8, which may be a memory map.
    labels: [n] integers; -1 for no class.
    seed: of the order. The file depends on the arguments alone.

  Raises:
    ValueError: no images, images that are not uint8, or wrong labels.
  """
  sample_metrics.check_image_set(
      'the file', sample_metrics.ImageSet(images, labels)
  )
  order = np.random.default_rng(seed).permutation(len(images))
  npz_files.write(path, images, order, labels)


def balanced_labels(num_images: int, num_classes: int, seed: int) -> np.ndarray:
  """Returns class labels in shuffled order whose counts differ by at most one.

  Args:
    num_images: number of labels.
    num_classes: labels are in [0, num_classes).
    seed: of the order, and of the classes with one image more.

  Returns:
    [num_images] int64.

  Raises:
    ValueError: a number below 1.
  """
  if min(num_images, num_classes) < 1:
    raise ValueError(
        f'There are {num_images} images of {num_classes} classes; use 1 or'
        ' more of both.'
    )
  rng = np.random.default_rng(seed)
  # Cutting repeated classes off favours the first ones, hence permuted.
  return rng.permutation(np.resize(rng.permutation(num_classes), num_images))
