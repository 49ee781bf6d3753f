"""Statistics of the tokens of a data set: usage, entropy, compression."""

from collections.abc import Iterable, Iterator, Mapping
import math
from typing import Any

import numpy as np

from fsq_jax.evaluation import codebook_statistics
from fsq_jax.evaluation import image_metrics
from fsq_jax.tokens import manifest as manifests

# Two different grids of a million share a hash with probability 3e-8.
GRID_HASH_BYTES = 8
# Fraction of repeated grids above which there is a warning.
_MAX_REPEATED = 0.01
_DEFINITIONS = {
    'distinct_grids': 'number of different token grids, of num_images',
    'num_without_label': 'number of images whose label is -1',
    'num_upscaled_images': (
        'number of images of the source, each counted once, that were scaled'
        ' up to data.image_size or data.resize_shorter'
    ),
    'tokens_per_image': 'mean number of tokens of an image',
    'bits_per_image': 'tokens_per_image * log2(K)',
    'entropy_bits_per_image': (
        'tokens_per_image * entropy_bits, what an ideal code of single tokens'
        ' takes'
    ),
    'compression_of_pixels': (
        '{bits} bits of each pixel that the model saw, over bits_per_image'
    ),
    'compression_of_files': (
        'bits of the image files of the source, over bits_per_image; null'
        ' where the source has no files'
    ),
}


def summarize(
    records: Iterable[Mapping[str, Any]], job: manifests.Job
) -> dict[str, Any]:
  """Computes the statistics of the tokens of all shards.

  Args:
    records: one per shard, with codes, counts, grid_hashes, num_images,
      num_pixels, num_upscaled, num_without_label and source_bytes.
    job: the job.

  Returns:
    JSON-able numbers, the same for the same tokens, and their definitions.

  Raises:
    ValueError: no image.
  """
  num_images = num_pixels = num_bytes = num_without_label = num_upscaled = 0
  grid_hashes = []
  statistics = codebook_statistics.CodebookStatistics(job.codebook_size)
  for record in records:
    num_images += record['num_images']
    num_pixels += record['num_pixels']
    num_without_label += record['num_without_label']
    num_upscaled += record['num_upscaled']
    grid_hashes.append(bytes.fromhex(record['grid_hashes']))
    sizes = num_bytes, record['source_bytes']
    num_bytes = None if None in sizes else sum(sizes)
    statistics.add(
        np.array(record['codes'], np.int32),
        np.array(record['counts'], np.int64),
    )
  if not num_images:
    raise ValueError('Could not read any image of the split.')
  codebook = statistics.result()
  num_tokens = codebook['num_tokens']
  num_bits = num_tokens * math.log2(job.codebook_size)
  bits_of_pixel = 8 * job.channels
  hashes = np.frombuffer(b''.join(grid_hashes), f'<u{GRID_HASH_BYTES}')
  return {
      **codebook,
      'distinct_grids': len(np.unique(hashes)),
      'num_without_label': num_without_label,
      'num_upscaled_images': num_upscaled,
      'tokens_per_image': num_tokens / num_images,
      'bits_per_image': num_bits / num_images,
      'entropy_bits_per_image': (
          num_tokens * codebook['entropy_bits'] / num_images
      ),
      'compression_of_pixels': bits_of_pixel * num_pixels / num_bits,
      'compression_of_files': (
          None if num_bytes is None else 8 * num_bytes / num_bits
      ),
      'definitions': {
          **{name: image_metrics.DEFINITIONS[name] for name in codebook},
          **{
              name: text.format(bits=bits_of_pixel)
              for name, text in _DEFINITIONS.items()
          },
      },
  }


def describe(manifest: manifests.Manifest) -> Iterator[str]:
  """Yields the main statistics as lines of text."""
  summary = manifest.summary
  num_images = manifest.num_images
  views = manifest.job.views
  yield (
      f'{num_images} images in {len(manifest.shards)} files,'
      f' {len(manifest.damaged)} damaged'
  )
  if views > 1:
    yield f'views: {views} random crops of each image, counted as images'
  for image in manifest.damaged:
    # File names need not be valid UTF-8.
    name = image['name'].encode(errors='backslashreplace').decode()
    yield f'damaged: {name}: {image["reason"]}'
  # Earlier versions did not count distinct grids.
  if (distinct := summary.get('distinct_grids')) is not None:
    yield f'distinct token grids: {distinct}'
    if num_images - distinct > _MAX_REPEATED * num_images:
      advice = ''
      if views == 1:
        advice = (
            ' If the images themselves repeat, --config.tokenize.views=N takes'
            ' N random crops of each.'
        )
      yield (
          f'warning: {(num_images - distinct) / num_images:.1%} of the token'
          ' grids repeat others. Flat images have equal grids, and so have many'
          f' images if the tokenizer has hardly been trained.{advice}'
      )
  if num := summary.get('num_upscaled_images'):
    yield (
        f'scaled up: {num} images, smaller than data.image_size or'
        ' data.resize_shorter'
    )
  if num := summary.get('num_without_label'):
    yield (
        f'no class label (-1): {num} images; classes are the sub-folders of a'
        " split of data.source 'folder', and the labels of 'tfds',"
        " 'webdataset', 'parquet' and 'arrays'"
    )
  yield f'codebook usage: {summary["usage"]:.1%}'
  yield (
      f'entropy: {summary["entropy_bits"]:.3f} of'
      f' {math.log2(manifest.job.codebook_size):.3f} bits per token'
  )
  yield (
      f'bits per image: {summary["bits_per_image"]:.1f}, entropy'
      f' {summary["entropy_bits_per_image"]:.1f}'
  )
  yield f'compression of pixels: {summary["compression_of_pixels"]:.1f}'
  if summary['compression_of_files'] is not None:
    yield f'compression of files: {summary["compression_of_files"]:.1f}'
