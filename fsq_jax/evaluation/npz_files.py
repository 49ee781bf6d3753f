"""Files of images in the format of ADM's evaluation suite.

guided-diffusion's evaluations/evaluator.py reads the array `arr_0`, [n, H, W,
3] uint8, and ignores arrays with other names than `mu`, `sigma`, `mu_s` and
`sigma_s`; `labels` is such an array.
"""

import os
import zipfile

import numpy as np

from fsq_jax.evaluation import neighbours
from fsq_jax.workdir import files as workdirs

_IMAGES = 'arr_0.npy'
_LABELS = 'labels.npy'


def write(
    path: str | os.PathLike[str],
    images: np.ndarray,
    order: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> None:
  """Writes images, and labels if there are any, atomically.

  Only a block of the images is in memory.

  Args:
    path: of the file; the folder exists.
    images: [n, H, W, C] uint8, n >= 1, which may be a memory map.
    order: [n] integers, a permutation: row i of the file is images[order[i]];
      None keeps the order.
    labels: [n] integers of the images, written in the same order.
  """
  if order is None:
    order = np.arange(len(images))
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
      ordered = labels[order].astype(np.int64)
      with archive.open(_LABELS, 'w') as member:
        np.lib.format.write_array(member, ordered, allow_pickle=False)
