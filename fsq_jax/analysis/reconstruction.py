"""Reconstructs whole image files with a tokenizer (--mode=reconstruct)."""

from collections.abc import Iterator, Mapping
import contextlib
import math
import os
import pathlib
import statistics
from typing import Any

import jax
import ml_collections
import numpy as np

from fsq_jax.checkpoints import saved_model
from fsq_jax.data import image_files
from fsq_jax.evaluation import image_metrics
from fsq_jax.evaluation import saved_run
from fsq_jax.evaluation import tiled_metrics
from fsq_jax.models import tiles as tiles_lib
from fsq_jax.report import grid as grid_lib
from fsq_jax.runtime import compiled
from fsq_jax.tokenizer import tokenizer as tokenizers
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import progress
from fsq_jax.workdir import provenance
from fsq_jax.workdir import urls

RECORD = 'reconstructions.json'
_FOLDERS = 'originals', 'reconstructions', 'side_by_side'
_METRICS = ('bits_per_pixel', 'psnr', 'ssim')
_DEFINITIONS = {
    'bits_per_pixel': (
        'num_tokens * log2(codebook_size) / (height * width); tokens of'
        ' padding, and of each overlapping tile, count; no entropy coding'
    ),
    'psnr': image_metrics.DEFINITIONS['psnr'],
    'ssim': image_metrics.DEFINITIONS['ssim'],
}
# Most images that are printed one by one.
_NUM_PRINTED = 20


def reconstruct_files(
    workdir: str | os.PathLike[str],
    images_in: str | os.PathLike[str] | None,
    images: str | os.PathLike[str] | None,
    *,
    which: str = 'newest',
    tiles: str = 'disjoint',
    config: ml_collections.ConfigDict | None = None,
) -> list[str]:
  """Reconstructs image files at their own size, and measures the error.

  Writes reconstructions.json and, for each image, originals/NAME.png (as
  decoded, with the tokenizer's channels), reconstructions/NAME.png and
  side_by_side/NAME.png. Images that cannot be read are skipped, and listed in
  reconstructions.json.

  Args:
    workdir: folder of a run, or of a saved tokenizer.
    images_in: image file, or folder of images.
    images: new or empty output folder.
    which: checkpoint: 'newest', 'best' or a step number.
    tiles: as in `Tokenizer.reconstruct`.
    config: checked to have the model of the checkpoint, if given.

  Returns:
    Lines to print: results, and the path of the JSON file.

  Raises:
    ValueError: missing arguments, no image that can be read, an output folder
      that is not empty, no such checkpoint, a config of another model, or
      several processes. Nothing was reconstructed.
    RuntimeError: an output cannot be written.
  """
  if images_in is None or images is None:
    raise ValueError(
        'Give --images_in=FILE_OR_FOLDER to read and --images=FOLDER to write.'
    )
  if jax.process_count() > 1:
    raise ValueError(
        '--mode=reconstruct runs in one process, not in'
        f' {jax.process_count()}; leave out --distributed.'
    )
  tiles_lib.check_tiles(tiles)
  paths = image_files.find_images(urls.local_path(images_in, 'images_in'))
  files = _name_files(paths)
  saved_run.check_new_folder(images, '--images')
  unreadable = image_files.find_unreadable(paths)
  paths = {name: x for name, x in paths.items() if name not in unreadable}
  tokenizer = tokenizers.load_tokenizer(workdir, which)
  if config is not None:
    saved_model.check_same_model(tokenizer.config, config)
  tokenizer.check_encoder()
  folder = saved_run.new_folder(images, '--images')
  rows = {}
  bar = progress.ImageProgress(num_images=len(paths), first=0, enabled=True)
  with contextlib.closing(bar), saved_run.writing_to(folder, '--images'):
    for name, path in paths.items():
      original = image_files.read_image(path, tokenizer.model.channels)
      rows[name] = _reconstruct(
          tokenizer, original, tiles,
          [folder / x / files[name] for x in _FOLDERS],
      )
      bar.update(1)
    workdirs.write_json(
        folder / RECORD,
        {
            'workdir': str(workdirs.run_folder(workdir)),
            'step': tokenizer.step,
            'model_hash': tokenizer.model_hash,
            'codebook_size': tokenizer.model.quantizer.codebook_size,
            'tiles': tiles,
            'mean': _mean(rows),
            'num_images': len(rows),
            'images': rows,
            'unreadable': unreadable,
            'definitions': _DEFINITIONS,
            **provenance.describe(),
        },
    )
  return [*_describe(rows, len(unreadable)), str(folder / RECORD)]


def _name_files(paths: Mapping[str, pathlib.Path]) -> dict[str, str]:
  """Returns the name of the PNG file of each image, by its name."""
  files = {
      name: name if name.endswith('.png') else f'{name}.png' for name in paths
  }
  for name, file in files.items():
    if name != file and file in paths:
      raise ValueError(
          f'{paths[name]} and {paths[file]} would both be written as {file};'
          ' rename one of them.'
      )
  return files


def _reconstruct(
    tokenizer: tokenizers.Tokenizer,
    original: np.ndarray,
    tiles: str,
    paths: list[pathlib.Path],
) -> dict[str, Any]:
  """Writes the pictures of one image; returns its row of the JSON file."""
  height, width = original.shape[:2]
  try:
    restored = tokenizer.reconstruct(original[None], 'pad', tiles=tiles)[0]
  except compiled.TooLargeError as error:
    raise ValueError(
        f'The image {paths[0].stem} of {width} x {height} pixels is too large'
        f' for the memory: {error}'
    ) from error
  num_tokens = tokenizer.num_tokens((height, width), tiles)
  bits = num_tokens * math.log2(tokenizer.model.quantizer.codebook_size)
  metrics = tiled_metrics.image_metrics(original, restored)
  row = {
      'height': height,
      'width': width,
      'num_tokens': num_tokens,
      'bits_per_pixel': bits / (height * width),
      'psnr': metrics['psnr'],
      # Undefined for images smaller than its window.
      'ssim': metrics.get('ssim'),
  }
  picture = grid_lib.side_by_side(
      original, restored, captions=(f'original, {width} x {height}', _text(row))
  )
  for path, image in zip(paths, (original, restored, picture), strict=True):
    grid_lib.save_png(path, image)
  return row


def _mean(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
  """Returns the mean over the images that have a metric."""
  mean = {}
  for name in _METRICS:
    values = [x[name] for x in rows.values() if x[name] is not None]
    mean[name] = statistics.fmean(values) if values else None
  return mean


def _describe(
    rows: Mapping[str, Mapping[str, Any]], num_unreadable: int
) -> Iterator[str]:
  """Yields lines with the numbers of images, if they are few, and the mean."""
  if len(rows) <= _NUM_PRINTED:
    for name, row in rows.items():
      yield f'{name}: {_text(row)}'
  skipped = f' ({num_unreadable} unreadable)' if num_unreadable else ''
  yield f'mean of {len(rows)} images{skipped}: {_text(_mean(rows))}'


def _text(row: Mapping[str, Any]) -> str:
  text = f'{row["bits_per_pixel"]:.2f} bits per pixel'
  text += f', PSNR {row["psnr"]:.2f} dB'
  return text if row['ssim'] is None else f'{text}, SSIM {row["ssim"]:.3f}'
