"""Images as .npz files in the format of ADM's evaluation.

guided-diffusion's evaluations/evaluator.py reads the array `arr_0`, [n, H, W,
3] uint8, and ignores arrays with other names than `mu`, `sigma`, `mu_s` and
`sigma_s`; `labels` is such an array. Its Inception score takes splits of the
images in the order of the file, hence generated images are shuffled. It takes
RGB only; grey and RGBA images, [n, H, W, 1] and [n, H, W, 4], are for other
readers.
"""

import os
import zipfile

import numpy as np

from fsq_jax.evaluation import neighbours
from fsq_jax.evaluation import sample_metrics
from fsq_jax.workdir import files as workdirs

_IMAGES = 'arr_0.npy'
_LABELS = 'labels.npy'


def write_npz(
    path: str | os.PathLike[str],
    images: np.ndarray,
    labels: np.ndarray,
    seed: int,
) -> None:
  """Writes generated images and labels in shuffled order, atomically.

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
  _write(path, images, order, labels[order].astype(np.int64))


def write_images(path: str | os.PathLike[str], images: np.ndarray) -> None:
  """Writes images without labels in their order, atomically.

  Only a block of the images is in memory.

  Args:
    path: of the file; the folder exists.
    images: [n, H, W, C] uint8, n >= 1, which may be a memory map.
  """
  _write(path, images, np.arange(len(images)), None)


def _write(
    path: str | os.PathLike[str],
    images: np.ndarray,
    order: np.ndarray,
    labels: np.ndarray | None,
) -> None:
  """Writes images[order] and, if there are any, ordered labels."""
  with (
      workdirs.open_atomic(path) as file,
      zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive,
  ):
    # Members may exceed 4 GiB.
    with archive.open(_IMAGES, 'w', force_zip64=True) as member:
      np.lib.format.write_array_header_1_0(
          member,
          {'descr': '|u1', 'fortran_order': False, 'shape': images.shape},
      )
      for rows in neighbours.row_blocks(images):
        member.write(np.ascontiguousarray(images[order[rows]]))
    if labels is not None:
      with archive.open(_LABELS, 'w') as member:
        np.lib.format.write_array(member, labels, allow_pickle=False)


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
