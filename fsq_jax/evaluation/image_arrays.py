"""Evaluated images as .npz files, for other implementations of metrics.

Two files in the format of ADM's evaluation suite (`npz_files`): the array
`arr_0`, [n, H, W, C] uint8, without labels. Unlike generated images, they keep
the order of the data set, so that row i of both files is the same image. FID,
sFID, precision and recall do not depend on the order.
"""

from collections.abc import Mapping
import os
import tempfile
from typing import BinaryIO

import jax
import numpy as np

from fsq_jax.evaluation import npz_files
from fsq_jax.evaluation import results as results_lib
from fsq_jax.runtime import processes
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import urls

# As the folders of `image_folders`.
_KINDS = 'originals', 'reconstructions'


class ImageArrays:
  """Writes NAME_originals.npz and NAME_reconstructions.npz.

  The images are the pixels that the evaluation has measured, as in
  `image_folders.ImageFolders`. Until `finish` they are in temporary files
  without a name, which vanish with the process.

  Attributes:
    paths: of the two files.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Creates the folder of the files.

    Collective.

    Args:
      path: NAME.npz.

    Raises:
      ValueError: a path without .npz, files that exist, or a folder that cannot
        be written.
    """
    path = urls.local_path(path, '--npz').absolute()
    self.paths = tuple(path.with_name(f'{path.stem}_{x}.npz') for x in _KINDS)
    self._files: list[BinaryIO] = []
    self._shape = 0, 0, 0, 0
    with processes.fail_together():
      if path.suffix != '.npz':
        raise ValueError(f'--npz={path} does not end in .npz; add the ending.')
      if jax.process_index() == 0:
        for file in self.paths:
          if file.exists():
            raise ValueError(f'--npz={path}: {file} exists; give another name.')
        workdirs.create(path.parent, '--npz')

  def write(
      self, batch: Mapping[str, np.ndarray], output: results_lib.EvalOutput
  ) -> None:
    """Adds the images of the next batch from process 0.

    Collective: all processes fail together.

    Args:
      batch: as in `ImageFolders.write`.
      output: of the batch, on the host.

    Raises:
      OSError: a file cannot be written.
    """
    with processes.fail_together():
      if jax.process_index() == 0:
        if not self._files:
          folder = self.paths[0].parent
          self._files = [
              tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # See `finish`.
              for _ in self.paths
          ]
        rows = np.flatnonzero(batch['mask'])
        # Rows of a batch are ordered by process first.
        rows = rows[np.argsort(batch['index'][rows])]
        for file, images in zip(
            self._files, (batch['image'], output.reconstructions), strict=True
        ):
          file.write(images[rows])
        self._shape = self._shape[0] + len(rows), *batch['image'].shape[1:]

  def finish(self) -> None:
    """Writes both files, atomically, from process 0.

    Collective: all processes fail together.

    Raises:
      OSError: a file cannot be written.
    """
    with processes.fail_together():
      for path, file in zip(self.paths, self._files, strict=False):
        with file:
          file.flush()
          images = np.memmap(file, np.uint8, 'r', shape=self._shape)
          npz_files.write(path, images)
