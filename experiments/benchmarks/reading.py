"""Benchmarks reading photographs: a folder by Pillow, Parquet by a folder."""

from concurrent import futures
import functools
import pathlib
import tempfile
from typing import Any

import ml_collections
import numpy as np
from PIL import Image
import pyarrow
from pyarrow import parquet

from experiments import sweep
from experiments.benchmarks import blocks
from fsq_jax import data
from fsq_jax.data import parquet_pages

CONFIG = 'configs/folder_fsq_8555.py'
NUM_IMAGES = 512
NUM_THREADS = 2
# (height, width) of the files, and the side of the images read from them.
FILE_SIZE = (256, 320)
SIDE = 128
# Options of pyarrow.parquet.write_table: as `datasets` 5 writes images, and a
# compressed page of 100 images per row group.
_CHUNKS = {'min_chunk_size': 2**18, 'max_chunk_size': 2**20, 'norm_level': 0}
PARQUET = {
    'plain': {
        'compression': 'none', 'use_dictionary': False,
        'use_content_defined_chunking': _CHUNKS,
    },
    'compressed': {'row_group_size': 100},
}
# Size of the Parquet files relative to the cache of decompressed pages, which
# then hardly holds the page of the next image: copies of the images fill them.
_NUM_CACHES = 5


def read_figures(rounds: int) -> dict[str, Any]:
  """Times a pass over JPEG files without a cache, and the same by Pillow."""
  with tempfile.TemporaryDirectory() as folder:
    paths = _write_images(pathlib.Path(folder) / 'val')
    config = _make_config(folder)
    dataset = data.build_dataset(config.data, split='eval', seed=0)
    own = np.concatenate([batch['image'] for batch in dataset])

    def read() -> None:
      for _ in dataset:
        pass

    def read_by_pillow() -> list[np.ndarray]:
      with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(_read_by_pillow, paths))

    np.testing.assert_array_equal(own, np.stack(read_by_pillow()))
    return blocks.alternate(
        {
            'folder': blocks.block_of(read),
            'pillow': blocks.block_of(read_by_pillow),
        },
        baseline='pillow', calls=1, rounds=rounds,
    )


def parquet_figures(rounds: int) -> dict[str, Any]:
  """Times reading all images in random order from Parquet and a folder."""
  with tempfile.TemporaryDirectory() as folder:
    paths = _write_images(pathlib.Path(folder) / 'val')
    images = [{'bytes': x.read_bytes()} for x in paths]
    num_bytes = sum(len(x['bytes']) for x in images)
    num_copies = -(-_NUM_CACHES * parquet_pages.CACHE_BYTES // num_bytes)
    table = pyarrow.table({'image': images * num_copies})
    sources = {'folder': _open(folder, 'folder', 'val')}
    for name, options in PARQUET.items():
      parquet.write_table(
          table, pathlib.Path(folder) / f'{name}.parquet', **options
      )
      sources[name] = _open(folder, 'parquet', name)
    rng = np.random.default_rng(0)

    def read(name: str) -> list[np.ndarray]:
      order = rng.permutation(NUM_IMAGES)
      if name != 'folder':
        order += NUM_IMAGES * rng.integers(0, num_copies, NUM_IMAGES)
      with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(sources[name].load, order.tolist()))

    for i in (0, NUM_IMAGES - 1):
      for source in sources.values():
        np.testing.assert_array_equal(source.load(i), sources['folder'].load(i))
    figures = blocks.alternate(
        {x: blocks.block_of(functools.partial(read, x)) for x in sources},
        baseline='folder', calls=1, rounds=rounds,
    )
    return figures | {
        'image_bytes': num_bytes / NUM_IMAGES, 'num_copies': num_copies
    }  # fmt: skip


def _make_config(folder: str, **fields: Any) -> ml_collections.ConfigDict:
  return sweep.make_config(
      CONFIG,
      {
          'data.data_dir': folder,
          'data.eval_split': 'val',
          'data.image_size': (SIDE, SIDE),
          'data.resize_shorter': SIDE,
          'data.eval_batch_size': 64,
          'data.cache_mib': 0,
          'data.num_threads': NUM_THREADS,
          **fields,
      },
  )


def _open(folder: str, source: str, split: str) -> data.ImageSource:
  fields = {'data.source': source, 'data.eval_split': split}
  return data.open_source(_make_config(folder, **fields).data, 'eval')


def _write_images(folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes crops of photographs as JPEG; returns the paths in order."""
  config = sweep.make_config(
      'configs/default.py',
      {'data.image_size': FILE_SIZE, 'data.batch_size': NUM_IMAGES},
  )
  batches = data.build_dataset(config.data, split='train', seed=0).iterator()
  folder.mkdir()
  paths = []
  for i, image in enumerate(next(batches)['image']):
    paths.append(folder / f'{i:04}.jpg')
    Image.fromarray(image).save(paths[-1], quality=90)
  return paths


def _read_by_pillow(path: pathlib.Path) -> np.ndarray:
  """Opens, converts, resizes by the shorter side and crops the centre."""
  with Image.open(path) as image:
    rgb = image.convert('RGB')
  scale = SIDE / min(rgb.size)
  width, height = (round(side * scale) for side in rgb.size)
  rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - SIDE) // 2, (height - SIDE) // 2
  return np.asarray(rgb.crop((left, top, left + SIDE, top + SIDE)))
