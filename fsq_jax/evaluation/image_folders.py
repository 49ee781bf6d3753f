"""Evaluated images as PNG files, for other implementations of metrics.

Two flat folders of files, RGB unless data.channels is not 3, whose sorted names
have the order of the data set: pytorch-fid and, by default, torch-fidelity list
the image files of a folder without its sub-folders, and sort them.
"""

from collections.abc import Mapping
from concurrent import futures
import pathlib

import jax
import numpy as np

from fsq_jax.evaluation import results as results_lib
from fsq_jax.report import grid as grid_lib
from fsq_jax.runtime import processes

ORIGINALS = 'originals'
RECONSTRUCTIONS = 'reconstructions'


class ImageFolders:
  """Writes originals/INDEX.png and reconstructions/INDEX.png.

  INDEX is the number of the image in the split, with leading zeros. Originals
  are the crops that the model was given, reconstructions are rounded to uint8:
  the pixels that the evaluation has measured.

  Attributes:
    folder: of the two sub-folders.
  """

  def __init__(self, folder: pathlib.Path):
    """Takes the folder, which exists; sub-folders are created."""
    self.folder = folder
    self._pool = futures.ThreadPoolExecutor()

  def write(
      self, batch: Mapping[str, np.ndarray], output: results_lib.EvalOutput
  ) -> None:
    """Writes the images of a batch from process 0.

    Collective: all processes fail together.

    Args:
      batch: 'image' [B, H, W, C] uint8, 'index' and 'mask' [B], on the host;
        unmasked rows, which are padding or unreadable, are left out.
      output: of the batch, on the host.

    Raises:
      OSError: a file cannot be written.
    """
    with processes.fail_together():
      if jax.process_index() == 0:
        list(self._pool.map(grid_lib.save_png, *self._files(batch, output)))

  def finish(self) -> None:
    """Does nothing: every file is complete already."""

  def _files(self, batch, output):
    """Returns paths and images, in lists of equal length."""
    paths, images = [], []
    for row in np.flatnonzero(batch['mask']):
      name = f'{batch["index"][row]:08d}.png'
      for kind, source in (
          (ORIGINALS, batch['image']),
          (RECONSTRUCTIONS, output.reconstructions),
      ):
        paths.append(self.folder / kind / name)
        images.append(source[row])
    return paths, images
