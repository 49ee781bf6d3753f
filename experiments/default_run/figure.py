"""Draws the README's figure: from an image to tokens and back.

  python experiments/default_run/figure.py --workdir=runs/fsq_888

Above, one image on its way through the tokenizer; below, the two held-out
photographs, whole, beside their reconstructions. Photographs are tokenized in
the disjoint 32 x 32 tiles that the evaluation uses, and the remainder at the
right and lower edges is cut off.
"""

import argparse
import pathlib

import matplotlib

matplotlib.use('Agg')
from matplotlib import patches
from matplotlib import pyplot as plt
import numpy as np
import skimage.data

from fsq_jax.tokenizer import Tokenizer

_FOLDER = pathlib.Path(__file__).parent
# Upper left corner of the image above, an eye in chelsea.png.
_EXAMPLE = (96, 160)


def _split(photo, size):
  """Returns the tiles [rows, columns, h, w, 3] of a photograph."""
  (height, width), (rows, columns) = size, np.floor_divide(
      photo.shape[:2], size
  )
  tiles = photo[: rows * height, : columns * width].reshape(
      rows, height, columns, width, 3
  )
  return tiles.swapaxes(1, 2)


def _join(tiles):
  rows, columns, height, width, _ = tiles.shape
  return tiles.swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def _psnr(a, b):
  error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
  return 10 * np.log10(255**2 / error)


def _show(axes, image, title):
  axes.imshow(image, interpolation='nearest')
  axes.set_title(title, fontsize=9)
  axes.axis('off')


def _draw_pipeline(figure, row, tokenizer, image):
  """Draws image -> encoder -> grid of codes -> decoder -> reconstruction."""
  tokens = tokenizer.encode(image[None])
  # Each of the three level indices is one of red, green and blue.
  levels = np.asarray(tokenizer.spec['levels'])
  grid = np.stack(np.unravel_index(np.asarray(tokens[0]), levels), -1)
  columns = row.subgridspec(1, 5, width_ratios=(1, 1.25, 1, 1.25, 1))
  axes = [figure.add_subplot(column) for column in columns]
  _show(axes[0], image, f'image, {image.shape[0]} x {image.shape[1]}')
  _show(
      axes[2],
      grid / (levels - 1),
      f'{tokens[0].size} tokens of {np.prod(levels)} codes',
  )
  _show(axes[4], tokenizer.decode(tokens)[0], 'reconstruction')
  boxes = {
      1: 'ViT encoder\nto 3 channels\n\nFSQ: round each\nto 8 levels',
      3: 'ViT decoder',
  }
  for i, text in boxes.items():
    axes[i].axis('off')
    axes[i].set(xlim=(0, 1), ylim=(0, 1))
    axes[i].add_patch(
        patches.FancyBboxPatch(
            (0.14, 0.2), 0.72, 0.6, boxstyle='round,pad=0.02', fc='#eef2f7',
            ec='#52667a',
        )
    )
    axes[i].text(0.5, 0.5, text, ha='center', va='center', fontsize=8)
    for start, end in ((-0.12, 0.12), (0.88, 1.12)):
      axes[i].annotate(
          '', (end, 0.5), (start, 0.5), arrowprops={'arrowstyle': '->'},
          annotation_clip=False,
      )


def draw(workdir: pathlib.Path, path: pathlib.Path) -> None:
  """Writes the figure of a trained run of configs/fsq_888.py as a PNG."""
  tokenizer = Tokenizer.from_workdir(workdir, batch_size=64)
  size = tokenizer.config.data.image_size
  originals = {
      'coffee': skimage.data.coffee(),
      'chelsea': skimage.data.chelsea(),
  }
  figure = plt.figure(figsize=(12, 4.4), dpi=100)
  rows = figure.add_gridspec(2, 1, height_ratios=(1, 1.35), hspace=0.22)
  top, left = _EXAMPLE
  image = originals['chelsea'][top : top + size[0], left : left + size[1]]
  _draw_pipeline(figure, rows[0], tokenizer, image)
  widths = [photo.shape[1] / photo.shape[0] for photo in originals.values()]
  pairs = rows[1].subgridspec(1, 2, width_ratios=widths, wspace=0.05)
  for column, (name, photo) in zip(pairs, originals.items(), strict=True):
    tiles = _split(photo, size)
    images = tiles.reshape(-1, *tiles.shape[2:])
    tokens = tokenizer.encode(images)
    restored = _join(tokenizer.decode(tokens).reshape(tiles.shape))
    original = _join(tiles)
    bits = np.log2(np.prod(tokenizer.spec['levels'])) * tokens.size
    pair = column.subgridspec(1, 2, wspace=0.03)
    shape = f'{original.shape[1]} x {original.shape[0]}'
    _show(figure.add_subplot(pair[0]), original, f'{name}, {shape}, held out')
    _show(
        figure.add_subplot(pair[1]),
        restored,
        f'{bits / original[..., 0].size:.2f} bits per pixel,'
        f' {_psnr(original, restored):.1f} dB PSNR',
    )
  figure.savefig(path, bbox_inches='tight', pad_inches=0.05)
  plt.close(figure)


def main() -> None:
  """Draws what the command line names."""
  parser = argparse.ArgumentParser(
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--workdir', type=pathlib.Path, default='runs/fsq_888')
  parser.add_argument(
      '--output', type=pathlib.Path, default=_FOLDER / 'figure.png'
  )
  arguments = parser.parse_args()
  draw(arguments.workdir, arguments.output)


if __name__ == '__main__':
  main()
