"""What the tokens of a data set are like: usage, entropy, compression."""

from collections.abc import Iterable, Iterator, Mapping
import math
from typing import Any

import numpy as np

from fsq_jax import metrics
from fsq_jax.tokens import manifest as manifests

_BITS_OF_PIXEL = 24

_DEFINITIONS = {
    'tokens_per_image': 'mean number of tokens of an image',
    'bits_per_image': 'tokens_per_image * log2(K)',
    'entropy_bits_per_image': (
        'tokens_per_image * entropy_bits, what an ideal code of single tokens'
        ' takes'
    ),
    'compression_of_pixels': (
        f'{_BITS_OF_PIXEL} bits of each pixel that the model saw, over'
        ' bits_per_image'
    ),
    'compression_of_files': (
        'bits of the image files of the source, over bits_per_image; null'
        ' where the source has no files'
    ),
}


def summarize(
    records: Iterable[Mapping[str, Any]], job: manifests.Job
) -> dict[str, Any]:
  """Sums up what the tokens of all shards are like.

  Args:
    records: of the shards, with codes, counts, num_images, num_pixels and
      source_bytes.
    job: what they are of.

  Returns:
    JSON-able numbers, the same for the same tokens, and their definitions.

  Raises:
    ValueError: there is no image.
  """
  num_images = num_pixels = num_bytes = 0
  statistics = metrics.CodebookStatistics(job.codebook_size)
  for record in records:
    num_images += record['num_images']
    num_pixels += record['num_pixels']
    sizes = num_bytes, record['source_bytes']
    num_bytes = None if None in sizes else sum(sizes)
    statistics.add(
        np.array(record['codes'], np.int32),
        np.array(record['counts'], np.int64),
    )
  if not num_images:
    raise ValueError('No image of the split can be read.')
  codebook = statistics.result()
  num_tokens = codebook['num_tokens']
  num_bits = num_tokens * math.log2(job.codebook_size)
  return {
      **codebook,
      'tokens_per_image': num_tokens / num_images,
      'bits_per_image': num_bits / num_images,
      'entropy_bits_per_image': (
          num_tokens * codebook['entropy_bits'] / num_images
      ),
      'compression_of_pixels': _BITS_OF_PIXEL * num_pixels / num_bits,
      'compression_of_files': (
          None if num_bytes is None else 8 * num_bytes / num_bits
      ),
      'definitions': {
          **{name: metrics.DEFINITIONS[name] for name in codebook},
          **_DEFINITIONS,
      },
  }


def describe(manifest: manifests.Manifest) -> Iterator[str]:
  """Yields the numbers that matter most as lines for a person."""
  summary = manifest.summary
  yield (
      f'{manifest.num_images} images in {len(manifest.shards)} files,'
      f' {len(manifest.damaged)} damaged'
  )
  for image in manifest.damaged:
    yield f'damaged: {image["name"]}: {image["reason"]}'
  yield f'codebook usage: {summary["usage"]:.1%}'
  yield (
      f'entropy: {summary["entropy_bits"]:.3f} of'
      f' {math.log2(manifest.job.codebook_size):.3f} bits a token'
  )
  yield (
      f'bits an image: {summary["bits_per_image"]:.1f}, entropy'
      f' {summary["entropy_bits_per_image"]:.1f}'
  )
  yield f'compression of pixels: {summary["compression_of_pixels"]:.1f}'
  if summary['compression_of_files'] is not None:
    yield f'compression of files: {summary["compression_of_files"]:.1f}'
