"""Token files of digits as exact 2 x 2 patch codes, without a tokenizer.

Each pixel of the 8 x 8 digits (grey values 0 to 16) falls into one of 5 equal
bins; the 4 bins of a patch are the level indices of one token of FSQ with
levels 5, 5, 5, 5. So an image has 16 tokens, decoding is exact up to the bins,
and results depend on the generator alone.
"""

import hashlib
import pathlib

from einops import rearrange
import numpy as np
from sklearn import datasets

from fsq_jax import quantizers
from fsq_jax.data import digits
from fsq_jax.evaluation import sample_metrics
from fsq_jax.generators import vocabulary as vocabularies
from fsq_jax.tokens import manifest as manifests
from fsq_jax.tokens import shards
from fsq_jax.tokens import source as sources
from fsq_jax.tokens import writer as writers

LEVELS = (5, 5, 5, 5)
_MODEL = 'experiments/generation/patch_codes.py, version 1'
_PATCHES = '(h p) (w q) -> h w (p q)'


def write(folder: pathlib.Path) -> dict[str, sources.TokenSource]:
  """Writes the token files of both splits, unless they exist; opens them."""
  opened = {}
  for split in ('train', 'eval'):
    path = folder / split
    images, labels = _load(split)
    examples = [
        shards.Example(tokens, f'{split}_{i:04d}', int(label), (8, 8), (8, 8))
        for i, (tokens, label) in enumerate(
            zip(encode(images), labels, strict=True)
        )
    ]
    writer = writers.TokenWriter(path, _job(split, len(examples)))
    if not writer.is_finished:
      writer.write(0, examples, damaged=[], source_bytes=None)
      writer.finish()
    opened[split] = sources.TokenSource(path)
  return opened


def encode(images: np.ndarray) -> np.ndarray:
  """Maps [n, 8, 8] grey values 0 to 16 to [n, 4, 4] int32 tokens."""
  bins = np.minimum(np.asarray(images, np.int32) * LEVELS[0] // 16, 4)
  levels = np.stack([rearrange(x, _PATCHES, p=2, q=2) for x in bins])
  return np.asarray(_vocabulary().to_tokens(levels))


def decode(
    tokens: np.ndarray, labels: np.ndarray
) -> sample_metrics.ImageSet:
  """Maps [n, 16] tokens to images whose pixels are the bins, 0 to 4."""
  levels = np.asarray(_vocabulary().to_levels(tokens.reshape(-1, 4, 4)))
  images = rearrange(levels, 'n h w (p q) -> n (h p) (w q) 1', p=2, q=2)
  images = np.repeat(images.astype(np.uint8), 3, axis=-1)
  return sample_metrics.ImageSet(images, np.asarray(labels, np.int64))


def _load(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns [n, 8, 8] grey values and [n] labels of a split of `digits`."""
  source = digits.DigitsSource(
      {'train': 'train', 'eval': 'validation'}[split], size=8
  )
  # Names end with the number of the image in scikit-learn's file.
  names = [source.metadata(i).name for i in range(len(source))]
  numbers = [int(name.rpartition('_')[2]) for name in names]
  bunch = datasets.load_digits()
  return bunch.images[numbers], bunch.target[numbers]


def _vocabulary() -> vocabularies.Vocabulary:
  quantizer = quantizers.FSQ(LEVELS)
  return vocabularies.from_spec(quantizer.spec(), quantizer.codebook_size)


def _job(split: str, num_images: int) -> manifests.Job:
  quantizer = quantizers.FSQ(LEVELS)
  return manifests.Job(
      storage='npz',
      quantizer=quantizer.spec(),
      codebook_size=quantizer.codebook_size,
      index_shape=(),
      model_hash=hashlib.sha256(_MODEL.encode()).hexdigest(),
      fit='crop',
      image_size=(8, 8),
      batch_size=num_images,
      images_per_shard=num_images,
      source={'name': 'digits', 'split': split, 'num_examples': num_images},
      label_names=tuple('0123456789'),
  )
