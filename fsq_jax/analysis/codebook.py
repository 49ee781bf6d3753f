"""Measures and draws how a trained model uses its codebook (mode report).

One pass over the evaluation split keeps counts, a few images, and the tokens of
at most `MAX_GRIDS` images.
"""

import collections
from collections.abc import Iterable, Mapping
import math
import os
from typing import Any, NamedTuple

from absl import logging
import jax
import ml_collections
import numpy as np
import tqdm

from fsq_jax.analysis import figures
from fsq_jax.analysis import token_statistics
from fsq_jax.checkpoints import saved_model
from fsq_jax.data import builder as data_builder
from fsq_jax.data import pipelines
from fsq_jax.evaluation import codebook_statistics
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.evaluation import results as results_lib
from fsq_jax.evaluation import saved_run
from fsq_jax.quantizers import base as quantizer_base
from fsq_jax.quantizers import digits as digits_lib
from fsq_jax.report import report
from fsq_jax.runtime import partitioning
from fsq_jax.workdir import files as workdirs

# Numbers of images shown: evenly spaced in the split, with swapped tokens, best
# (and as many worst ones), and queries of the nearest-neighbour search.
_NUM_SPREAD = 4
_NUM_SWAPPED = 3
_NUM_EXTREME = 8
_NUM_QUERIES = 4
# Largest side in pixels of small images, and of images that are shown alone;
# larger images are shrunk.
_MAX_SIDE = 256
_MAX_SPREAD_SIDE = 1024
# Number of images, evenly spaced in the split, for the nearest-neighbour
# search.
MAX_GRIDS = 4096
# Limits of the counts of pairs: classes of codes (32 MiB per direction), sum of
# the levels of all dimensions, and number of dimensions.
MAX_CLASSES = 2048
_MAX_LEVELS = 1024
_MAX_DIGITS = 32
# Number of most frequent codes, and of classes of codes, that are shown.
_NUM_SHOWN = 12
# Points of the curve of counts by rank.
_MAX_RANKS = 400


class _Image(NamedTuple):
  """An image of the split; original, reconstruction [H, W, 3] uint8."""

  index: int
  psnr: float
  original: np.ndarray
  reconstruction: np.ndarray
  tokens: np.ndarray

  def show(self, max_side: int) -> dict[str, Any]:
    """Returns JSON values with images of at most `max_side` pixels a side."""
    original, reconstruction = (
        figures.png(image, max_side)
        for image in (self.original, self.reconstruction)
    )
    return {
        'index': self.index,
        'psnr': self.psnr,
        'original': original,
        'reconstruction': reconstruction,
    }


def analyze_workdir(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    which: str = 'newest',
    output: str | os.PathLike[str] | None = None,
) -> str:
  """Analyzes the codebook of a run; writes codebook.json and the report.

  Args:
    config: config of the run; its data section may name other evaluation
      images.
    workdir: the run's folder.
    which: 'newest', 'best' (highest PSNR), or the number of a step.
    output: folder for both files; None is the run's folder.

  Returns:
    The path of the report.

  Raises:
    ValueError: an invalid config, another model than the checkpoint's, no
      checkpoint, no readable image, or a folder that cannot be written.
    RuntimeError: the files cannot be written after the analysis.
  """
  found, config, mesh = saved_model.open_run(
      config, workdir, which, mode='report'
  )
  if config.eval.native_size:
    raise ValueError(
        'eval.native_size is True; allowed in mode report: False, since it'
        ' analyzes crops of data.image_size.'
    )
  folder = saved_run.prepare_output(found.folder, output)
  dataset = data_builder.build_dataset(
      config.data,
      split='eval',
      seed=config.seed,
      **partitioning.data_shard(mesh)._asdict(),
  )
  model, variables = saved_model.restore(found, mesh)
  evaluator = evaluators.Evaluator(model, dataset, mesh, num_grid_images=0)
  decoder = figures.Decoder(
      model, variables, mesh, config.data.eval_batch_size
  )
  histogram = CodebookHistogram(dataset.num_examples, decoder)
  outputs = evaluator.outputs(variables)
  for batch, output, *_ in tqdm.tqdm(
      outputs, total=dataset.num_batches, disable=None
  ):
    histogram.update(batch, output)
  result = {
      'version': report.ANALYSIS_VERSION,
      'step': found.step,
      'protocol': dict(dataset.protocol),
      'quantizer': model.quantizer.spec(),
      **histogram.result(),
  }
  result['names'] = _names(result, dataset)
  if jax.process_index() == 0:
    with saved_run.writing_to(folder):
      workdirs.write_json(folder / workdirs.CODEBOOK, result)
      return report.write_report(found.folder, folder)
  return str(folder / workdirs.REPORT)


def _names(value: Any, dataset: pipelines.Dataset) -> dict[str, str]:
  """Returns 'index' to name of all images in a tree of JSON values."""
  if isinstance(value, list):
    parts, names = value, {}
  elif isinstance(value, Mapping):
    parts, names = value.values(), {}
    if 'index' in value and (name := dataset.name(value['index'])):
      names[str(value['index'])] = name
  else:
    return {}
  for part in parts:
    names |= _names(part, dataset)
  return names


class CodebookHistogram:
  """Counts the tokens, and keeps some images, of one pass over a split."""

  def __init__(self, num_examples: int, decoder: figures.Decoder):
    """Starts with empty counts.

    Args:
      num_examples: number of images in the split, readable or not.
      decoder: decoder of the model.
    """
    self._decoder = decoder
    self._quantizer = decoder.quantizer
    self._num_images = 0
    self._num_nonfinite = 0
    self._spread, self._worst, self._best = [], [], []
    self._waiting = _evenly_spaced(num_examples, _NUM_SPREAD)
    self._grids_waiting = _evenly_spaced(num_examples, MAX_GRIDS)
    self._grids, self._grid_numbers = [], []
    self._codes = codebook_statistics.count_codes(self._quantizer)
    self._levels = _levels(self._quantizer)
    self._digit_pairs = None
    if 0 < sum(self._levels) <= _MAX_LEVELS:
      self._digit_pairs = token_statistics.DigitPairs(self._levels)
    self._classes = _Classes(decoder) if self._codes is not None else None
    if self._classes is not None:
      self._code_pairs = token_statistics.CodePairs(self._classes.num)

  def update(
      self, batch: Mapping[str, np.ndarray], output: results_lib.EvalOutput
  ) -> None:
    """Adds a batch of the data set and the model's output, on the host."""
    mask, psnr = batch['mask'], output.metrics['psnr']
    self._num_images += int(np.sum(mask))
    finite = mask & np.isfinite(psnr)
    self._num_nonfinite += int(np.sum(mask & ~finite))

    def take(rows: Iterable[int]) -> list[_Image]:
      # Copies, since views would keep the whole batch alive.
      return [
          _Image(
              int(batch['index'][i]),
              float(psnr[i]),
              batch['image'][i].copy(),
              output.reconstructions[i].copy(),
              output.indices[i].copy(),
          )
          for i in rows
      ]

    self._spread += take(results_lib.select(batch, self._waiting))
    rows = np.flatnonzero(finite)
    for kept, sign in ((self._worst, 1), (self._best, -1)):
      order = np.lexsort((batch['index'][rows], sign * psnr[rows]))
      kept += take(rows[order[:_NUM_EXTREME]])
      kept.sort(key=lambda image: (sign * image.psnr, image.index))
      del kept[_NUM_EXTREME:]
    if self._codes is not None:
      self._count(batch, output.indices)

  def _count(
      self, batch: Mapping[str, np.ndarray], indices: np.ndarray
  ) -> None:
    self._codes.update(indices, batch['mask'])
    for i in results_lib.select(batch, self._grids_waiting):
      self._grids.append(indices[i].copy())
      self._grid_numbers.append(int(batch['index'][i]))
    indices = indices[batch['mask']]
    self._code_pairs.update(self._classes.of(indices))
    if self._digit_pairs is not None:
      codes, inverse = np.unique(indices, return_inverse=True)
      digits = codebook_statistics.level_indices(self._quantizer, codes)
      digits = digits[inverse.reshape(indices.shape)]
      self._digit_pairs.update(
          digits.reshape(*indices.shape[:3], len(self._levels))
      )

  def result(self) -> dict[str, Any]:
    """Returns all counts and images as JSON values.

    Raises:
      ValueError: no image of the split can be read.
    """
    if not self._spread:
      raise ValueError('No image of the evaluation split can be read.')
    if self._num_nonfinite:
      logging.error('%d reconstructions are not finite.', self._num_nonfinite)
    result = {
        'num_images': self._num_images,
        'num_nonfinite_reconstructions': self._num_nonfinite,
    }
    if self._codes is not None:
      result |= self._tokens()
    for name, images, max_side in (
        ('spread', self._spread, _MAX_SPREAD_SIDE),
        ('worst', self._worst, _MAX_SIDE),
        ('best', self._best, _MAX_SIDE),
    ):
      result[name] = [image.show(max_side) for image in images]
    return result

  def _tokens(self) -> dict[str, Any]:
    """Returns the part of the result that needs discrete tokens."""
    codes, counts = self._codes.histogram()
    order = np.lexsort((codes, -counts))
    codes, counts = codes[order], counts[order]
    grids = np.stack(self._grids)
    return {
        'codebook': self._codes.result(),
        'index_shape': list(self._quantizer.index_shape),
        'dimensions': len(getattr(self._quantizer, 'levels', ())),
        'digits': self._digits(),
        'code_ranks': _ranks(counts),
        'top_codes': self._top_codes(codes, counts, grids.shape[1:3]),
        'code_pairs': self._pairs_of_codes(codes, counts),
        'swaps': self._swaps(),
        'num_grids': len(grids),
        'nearest': figures.nearest(
            self._decoder, grids, np.array(self._grid_numbers), _NUM_QUERIES
        ),
    }

  def _digits(self) -> dict[str, Any] | None:
    """Returns counts of the levels of each dimension, and of their pairs."""
    if self._digit_pairs is None:
      return None
    num = len(self._levels)
    histograms = [self._digit_pairs.histogram(i).tolist() for i in range(num)]
    pairs = None
    if num <= _MAX_DIGITS:
      pairs = {
          name: {
              'num_pairs': int(self._digit_pairs.block(name, 0, 0).sum()),
              'bits': self._digit_pairs.mutual_information(name),
          }
          for name in self._digit_pairs.counts
      }
    return {
        'histograms': histograms,
        'entropy_bits': [
            codebook_statistics.entropy_bits(np.array(h)) for h in histograms
        ],
        'pairs': pairs,
    }

  def _top_codes(self, codes, counts, grid) -> list[dict[str, Any]]:
    """Returns the most frequent codes, with swatches if they are tokens."""
    codes, counts = codes[:_NUM_SHOWN], counts[:_NUM_SHOWN]
    top = [
        {'code': int(code), 'count': int(count)}
        for code, count in zip(codes, counts, strict=True)
    ]
    if self._levels:
      digits = codebook_statistics.level_indices(self._quantizer, codes)
      for entry, values in zip(top, digits.tolist(), strict=True):
        entry['digits'] = values
    if not self._quantizer.index_shape and top:
      images = figures.swatches(self._decoder, codes, grid)
      for entry, image in zip(top, images, strict=True):
        entry['swatch'] = image
    return top

  def _pairs_of_codes(self, codes, counts) -> dict[str, Any]:
    """Returns counts of neighbouring codes among the most frequent classes."""
    classes = self._classes.of(codes)
    totals = np.bincount(classes, counts, minlength=self._classes.num)
    shown = np.argsort(-totals, kind='stable')[:_NUM_SHOWN]
    shown = shown[totals[shown] > 0]
    directions = {}
    for name, pairs in self._code_pairs.counts.items():
      total = max(int(pairs.sum()), 1)
      expected = np.outer(pairs.sum(axis=1)[shown], pairs.sum(axis=0)[shown])
      directions[name] = {
          **token_statistics.mutual_information(pairs)._asdict(),
          'observed': pairs[np.ix_(shown, shown)].tolist(),
          'expected': (expected / total).tolist(),
      }
    return {
        'num_classes': self._classes.num,
        'codes_per_class': self._classes.size,
        'order': self._classes.order,
        'shown': shown.tolist(),
        'directions': directions,
    }

  def _swaps(self) -> list[dict[str, Any]]:
    swaps = []
    for image in self._spread[:_NUM_SWAPPED]:
      height, width = image.tokens.shape[:2]
      if np.all(image.tokens >= 0):
        position = height // 2, width // 2
        swap = figures.swap(self._decoder, image.tokens, position)
        swaps.append({'index': image.index, **swap})
    return swaps


class _Classes:
  """Partition of the codes into classes, few enough to count their pairs.

  Attributes:
    num: number of classes.
    size: number of codes per class; the last class may have fewer.
    order: order of the codes, cut into classes: 'index', where codes of a
      class share the slowest level indices, or 'first principal
      component'.
  """

  def __init__(self, decoder: figures.Decoder):
    num_codes = decoder.quantizer.codebook_size
    self.size = math.ceil(num_codes / MAX_CLASSES)
    self.num = math.ceil(num_codes / self.size)
    self.order = 'index'
    self._num_codes = num_codes
    self._ranks = None
    if self.size > 1 and not _levels(decoder.quantizer):
      codes = decoder.codes(np.arange(num_codes, dtype=np.int32))
      codes = codes - codes.mean(axis=0)
      _, vectors = np.linalg.eigh(codes.T @ codes)
      order = np.argsort(codes @ vectors[:, -1], kind='stable')
      self._ranks = np.empty(num_codes, np.int32)
      self._ranks[order] = np.arange(num_codes)
      self.order = 'first principal component'

  def of(self, indices: np.ndarray) -> np.ndarray:
    """Returns the classes of indices, -1 for invalid indices."""
    valid = (indices >= 0) & (indices < self._num_codes)
    ranks = np.where(valid, indices, 0)
    if self._ranks is not None:
      ranks = self._ranks[ranks]
    return np.where(valid, ranks // self.size, -1)


def _levels(quantizer: quantizer_base.Quantizer) -> tuple[int, ...]:
  """Levels of all dimensions of a token; () if codes have no level indices."""
  if not isinstance(quantizer, digits_lib.DigitQuantizer):
    return ()
  return tuple(quantizer.levels) * math.prod(quantizer.index_shape)


def _evenly_spaced(num_examples: int, num: int) -> collections.deque[int]:
  """Returns ascending numbers of at most `num` images, evenly spaced."""
  positions = (np.arange(num) + 0.5) * num_examples / num
  return collections.deque(sorted(set(positions.astype(int).tolist())))


def _ranks(counts: np.ndarray) -> dict[str, Any]:
  """Returns the curve of descending counts, at geometrically spaced ranks."""
  total = np.cumsum(counts)
  ranks = np.geomspace(1, max(len(counts), 1), _MAX_RANKS).round()
  ranks = np.unique(ranks.astype(int))[: len(counts)]
  return {
      'ranks': ranks.tolist(),
      'counts': counts[ranks - 1].tolist(),
      'num_codes_of_share': {
          str(share): int(np.searchsorted(total, share * total[-1])) + 1
          for share in (0.5, 0.9, 0.99)
          if len(counts)
      },
  }
