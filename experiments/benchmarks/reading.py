"""Benchmarks reading photographs: folder against Pillow, formats against it."""

from concurrent import futures
import functools
import pathlib
import tarfile
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

CONFIG = 'configs/folder_fsq_8555.py'
NUM_IMAGES = 512
NUM_THREADS = 2
# (height, width) of the files, and the side of the images read from them.
FILE_SIZE = (256, 320)
SIDE = 128


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


def format_figures(rounds: int) -> dict[str, Any]:
  """Times reading all images in random order from each format of files."""
  with tempfile.TemporaryDirectory() as folder:
    paths = _write_images(pathlib.Path(folder) / 'val')
    images = [{'bytes': x.read_bytes()} for x in paths]
    parquet.write_table(
        pyarrow.table({'image': images}), pathlib.Path(folder) / 'val.parquet'
    )
    with tarfile.open(pathlib.Path(folder) / 'val.tar', 'w') as shard:
      for path in paths:
        shard.add(path, path.name)
    sources = {x: _open(folder, x) for x in ('folder', 'parquet', 'webdataset')}
    rng = np.random.default_rng(0)

    def read(name: str) -> list[np.ndarray]:
      order = rng.permutation(NUM_IMAGES).tolist()
      with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(sources[name].load, order))

    for i in (0, NUM_IMAGES - 1):
      for source in sources.values():
        np.testing.assert_array_equal(source.load(i), sources['folder'].load(i))
    return blocks.alternate(
        {x: blocks.block_of(functools.partial(read, x)) for x in sources},
        baseline='folder', calls=1, rounds=rounds,
    )


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


def _open(folder: str, source: str) -> data.ImageSource:
  config = _make_config(folder, **{'data.source': source})
  return data.open_source(config.data, 'eval')


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
