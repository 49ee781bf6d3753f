"""Benchmarks the mode tokenize relative to its encoder, for two models."""

import pathlib
import tempfile
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image

from experiments import sweep
from experiments.benchmarks import blocks
from fsq_jax import data
from fsq_jax import models
from fsq_jax import tokenizer as tokenizers
from fsq_jax import tokens
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import files as tokenizer_files
from fsq_jax.tokenizer import tokenizer as tokenizer_lib

CONFIG = 'configs/fsq_888.py'
# Config overrides and number of images of each model. The time of NUM_START
# images, mostly start-up, is subtracted.
CASES = {
    'default_run': ({}, 4096),
    'vit_s': (
        {
            'data.image_size': (64, 64),
            'model.encoder.patch_size': 8,
            'model.decoder.patch_size': 8,
            'model.encoder.width': 384,
            'model.encoder.depth': 12,
            'model.encoder.num_heads': 6,
            'model.encoder.mlp_dim': 1536,
        },
        512,
    ),
}
BATCH_SIZE = 128
NUM_START = 256


def tokenize_figures(rounds: int) -> dict[str, Any]:
  """Times image file to token file relative to the jitted encoder."""
  figures = {}
  for name, (fields, num_images) in CASES.items():
    config = sweep.make_config(
        CONFIG, {**fields, 'data.eval_batch_size': BATCH_SIZE}
    )
    with tempfile.TemporaryDirectory() as folder:
      figures[name] = _case(config, num_images, pathlib.Path(folder), rounds)
    figures[name]['num_images'] = num_images
  return figures


def _case(
    config: ml_collections.ConfigDict,
    num_images: int,
    folder: pathlib.Path,
    rounds: int,
) -> dict[str, Any]:
  images = _write_images(config, num_images, folder / 'images')
  tokenizer = _build_tokenizer(config)
  tokenizer.save_pretrained(folder / 'tokenizer')
  config.data.source = 'folder'
  config.data.data_dir = str(folder / 'images')
  config.data.train_split, config.data.eval_split = 'many', 'few'
  config.data.cache_mib = 0
  encode = jax.jit(
      lambda variables, x: tokenizer.model.apply(
          variables, x, method=tokenizer_lib.images_to_tokens
      )
  )

  def encode_all() -> None:
    pending = None
    for batch in images:
      started = encode(tokenizer.variables, batch)
      if pending is not None:
        np.asarray(pending)
      pending = started
    np.asarray(pending)

  def tokenize(split: str) -> blocks.Block:
    def run() -> None:
      config.tokenize.split = split
      with tempfile.TemporaryDirectory(dir=folder) as target:
        tokens.tokenize_workdir(
            config, folder / 'tokenizer', folder=pathlib.Path(target) / 'x'
        )

    return blocks.block_of(run)

  def without_start(calls: int) -> tuple[float, float]:
    many, few = (tokenize(split)(calls) for split in ('train', 'eval'))
    return many[0] - few[0], many[1] - few[1]

  source = data.open_source(config.data, 'train')

  def read() -> None:
    for i in range(num_images):
      source.load(i)

  return blocks.alternate(
      {
          'tokenize': without_start,
          'encode': blocks.block_of(encode_all),
          'read': blocks.block_of(read),
      },
      baseline='encode', calls=1, rounds=rounds,
  )


def _write_images(
    config: ml_collections.ConfigDict, num_images: int, folder: pathlib.Path
) -> list[np.ndarray]:
  """Writes crops of photographs as PNG and returns them in batches."""
  config.data.batch_size = BATCH_SIZE
  dataset = data.build_dataset(config.data, split='train', seed=0)
  batches = dataset.iterator()
  num_batches = (NUM_START + num_images) // BATCH_SIZE
  batches = [next(batches)['image'] for _ in range(num_batches)]
  for split, num in (('many', num_batches), ('few', NUM_START // BATCH_SIZE)):
    (folder / split).mkdir(parents=True)
    for i, image in enumerate(np.concatenate(batches[:num])):
      Image.fromarray(image).save(folder / split / f'{i:05}.png')
  return batches[NUM_START // BATCH_SIZE :]


def _build_tokenizer(
    config: ml_collections.ConfigDict,
) -> tokenizers.Tokenizer:
  """Returns an untrained tokenizer."""
  mesh = partitioning.create_mesh({'data': -1, 'fsdp': 1})
  model = models.build_autoencoder(config.model, config.data.image_size)
  images = np.zeros((1, *config.data.image_size, 3), np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  variables = jax.device_put(variables, partitioning.replicated(mesh))
  saved = tokenizer_files.SavedModel(config, model, dict(variables))
  return tokenizers.Tokenizer(saved, mesh, batch_size=BATCH_SIZE)
