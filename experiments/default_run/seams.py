"""Seams between the tiles of whole photographs, by kind of tiles.

  python experiments/default_run/seams.py --workdir=runs/fsq_888

Reconstructs the two held-out photographs at their own size with each kind of
tiles (`fsq_jax.models.tiles`) and writes seams.json and seams.png, a part of
chelsea. The error of a step is the change from one pixel to the next in the
reconstruction, minus that change in the photograph; its root mean square is
taken over all steps across borders of the disjoint tiles, and over all other
steps across borders of patches. Without seams both are equal.
"""

import argparse
import pathlib

import numpy as np
import skimage.data

from fsq_jax.evaluation import tiled_metrics
from fsq_jax.models import tiles as tiles_lib
from fsq_jax.report import grid
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.workdir import files as workdirs

_FOLDER = pathlib.Path(__file__).parent
_PHOTOGRAPHS = {'coffee': skimage.data.coffee, 'chelsea': skimage.data.chelsea}
# Rows and columns of chelsea in the picture, which is enlarged twice.
_PART = np.s_[64:224, 112:272]


def step_errors(
    photograph: np.ndarray,
    reconstruction: np.ndarray,
    tile: tuple[int, int],
    grid_size: tuple[int, int],
) -> tuple[float, float]:
  """Returns the RMS error of steps across tile borders and patch borders.

  Args:
    photograph: [H, W, 3] uint8.
    reconstruction: same shape and dtype.
    tile: (height, width) in pixels; tiles start at the upper left corner.
    grid_size: patches of a tile, per column and row.

  Returns:
    Grey levels: across borders of tiles, across other borders of patches.
  """
  error = np.subtract(reconstruction, photograph, dtype=np.float64)
  across_tiles, across_patches = [], []
  for axis in (0, 1):
    squares = np.moveaxis(np.diff(error, axis=axis), axis, 0) ** 2
    position = 1 + np.arange(len(squares))
    is_tile = position % tile[axis] == 0
    is_patch = position % (tile[axis] // grid_size[axis]) == 0
    across_tiles.append(squares[is_tile].ravel())
    across_patches.append(squares[is_patch & ~is_tile].ravel())
  return tuple(
      float(np.sqrt(np.mean(np.concatenate(x))))
      for x in (across_tiles, across_patches)
  )


def measure(tokenizer: Tokenizer) -> tuple[dict, dict]:
  """Returns numbers and images by photograph and kind of tiles."""
  numbers, images = {}, {}
  for name, load in _PHOTOGRAPHS.items():
    photograph = load()
    numbers[name], images[name] = {}, {'original': photograph}
    for tiles in tiles_lib.TILES:
      restored = tokenizer.reconstruct(photograph[None], 'pad', tiles=tiles)[0]
      metrics = tiled_metrics.image_metrics(photograph, restored)
      across_tiles, across_patches = step_errors(
          photograph,
          restored,
          tokenizer.config.data.image_size,
          tokenizer.grid_size,
      )
      num = tokenizer.num_tokens(photograph.shape[:2], tiles)
      bits = num * np.log2(tokenizer.model.quantizer.codebook_size)
      numbers[name][tiles] = {
          'num_tokens': num,
          'bits_per_pixel': float(bits / photograph[..., 0].size),
          'psnr': metrics['psnr'],
          'ssim': metrics['ssim'],
          'step_error_tile_borders': across_tiles,
          'step_error_patch_borders': across_patches,
          'ratio': across_tiles / across_patches,
      }
      images[name][tiles] = restored
  return numbers, images


def main() -> None:
  """Measures the run that the command line names."""
  parser = argparse.ArgumentParser(
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--workdir', default='runs/fsq_888')
  parser.add_argument('--output', type=pathlib.Path, default=_FOLDER)
  arguments = parser.parse_args()
  tokenizer = Tokenizer.from_workdir(arguments.workdir)
  numbers, images = measure(tokenizer)
  record = {
      'step': tokenizer.step,
      'model_hash': tokenizer.model_hash,
      'photographs': numbers,
  }
  workdirs.write_json(arguments.output / 'seams.json', record)
  parts = [
      grid.draw_text(kind, 20, 320).repeat(3, axis=2)
      for kind in images['chelsea']
  ]
  parts = [
      np.concatenate([
          caption, image[_PART].repeat(2, axis=0).repeat(2, axis=1)
      ])
      for caption, image in zip(parts, images['chelsea'].values(), strict=True)
  ]
  gap = np.full((len(parts[0]), 6, 3), 255, np.uint8)
  picture = np.concatenate(
      [x for part in parts for x in (part, gap)][:-1], axis=1
  )
  grid.save_png(arguments.output / 'seams.png', picture)


if __name__ == '__main__':
  main()
