"""Evaluation results: running sums over batches, metrics, protocol."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np

from fsq_jax import data
from fsq_jax import quantizers
from fsq_jax.evaluation import codebook_statistics
from fsq_jax.evaluation import image_metrics
from fsq_jax.evaluation import network_metrics
from fsq_jax.runtime import processes
from fsq_jax.workdir import provenance


class EvalOutput(NamedTuple):
  """What one evaluation batch gives.

  Attributes:
    metrics: name to [B] float32, one value an image.
    indices: [B, h, w, *index_shape] int32.
    reconstructions: [B, H, W, 3] uint8.
  """

  metrics: dict[str, jax.Array]
  indices: jax.Array
  reconstructions: jax.Array


# The codebook numbers that stand beside the image metrics in curves and bars.
_CODEBOOK_SCALARS = ('usage', 'perplexity', 'entropy_bits', 'entropy_share')
# Digits of a hash in a line that has room for no more.
_SHORT_HASH = 12


class Evaluation(NamedTuple):
  """What an evaluation gives.

  Attributes:
    metrics: mean over all images of each image metric.
    codebook: `CodebookStatistics.result()`; {} without tokens.
    protocol: how the images were made and the numbers computed.
    originals: [n, H, W, 3] uint8, images spread evenly over the split.
    reconstructions: [n, H, W, 3] uint8, of the same images.
  """

  metrics: dict[str, float]
  codebook: dict[str, Any]
  protocol: dict[str, Any]
  originals: np.ndarray
  reconstructions: np.ndarray

  def scalars(self) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl."""
    names = _CODEBOOK_SCALARS if self.codebook else ()
    return {**self.metrics, **{name: self.codebook[name] for name in names}}

  def lines(self) -> list[str]:
    """All numbers, those of networks with the sha256 of the weights.

    The last line says how many images they are of, and how many are missing.
    """
    hashes = self.protocol['networks']
    return [
        f'{name}: {value:.6g}'
        + (f' (weights sha256 {hashes[name]})' if name in hashes else '')
        for name, value in self.scalars().items()
    ] + [self._count_images()]

  def _count_images(self) -> str:
    protocol = self.protocol
    parts = [
        f'{protocol["num_images"]:,} measured',
        f'{protocol["num_damaged_images"]:,} unreadable',
        f'{protocol["num_nonfinite_reconstructions"]:,} with a reconstruction'
        ' that is not finite',
    ]
    if 'num_skipped_images' in protocol:
      parts.append(f'{protocol["num_skipped_images"]:,} skipped')
    parts += [
        f'{num:,} without {name}'
        for name, num in protocol.get('num_unmeasured_images', {}).items()
    ]
    return f'images: {", ".join(parts)}'

  def summary(self) -> str:
    """The numbers that matter most, in one line."""
    scalars = self.scalars()
    text = f'PSNR {scalars["psnr"]:.2f} dB, SSIM {scalars["ssim"]:.3f}'
    for name, digest in self.protocol['networks'].items():
      text += f', {name} {scalars[name]:.3f} (weights {digest[:_SHORT_HASH]})'
    if self.codebook:
      text += (
          f', codebook usage {scalars["usage"]:.1%}, perplexity'
          f' {scalars["perplexity"]:.1f}'
      )
    return text


class EvaluationSums:
  """Adds up what is measured of the images of one split."""

  def __init__(
      self,
      quantizer: quantizers.Quantizer,
      networks: network_metrics.NetworkMetrics,
      dataset: data.Dataset,
      num_grid_images: int,
      *,
      cut: Callable[[np.ndarray], np.ndarray] = np.copy,
      lay_out: Callable[[Sequence[np.ndarray]], np.ndarray] = np.stack,
  ):
    """Starts at no image.

    Args:
      quantizer: of the model, whose indices are counted.
      networks: what networks measure.
      dataset: that the batches are of.
      num_grid_images: originals and reconstructions to keep.
      cut: returns a copy of what is kept of one of those.
      lay_out: makes one array of them, where they differ in size.
    """
    self._cut = cut
    self._lay_out = lay_out
    self._quantizer = quantizer
    self._networks = networks
    self._scores = networks.start()
    self._dataset = dataset
    self._num_images = 0
    self._num_damaged = 0
    self._num_nonfinite = 0
    self._num_upscaled = 0
    self._means = {
        name: image_metrics.Mean() for name in image_metrics.IMAGE_METRICS
    }
    self._codebook = codebook_statistics.count_codes(quantizer)
    positions = np.linspace(
        0, dataset.num_examples, num_grid_images, endpoint=False
    )
    self._waiting = collections.deque(sorted(set(positions.astype(int))))
    self._originals, self._reconstructions = [], []

  def update(
      self,
      batch: Mapping[str, np.ndarray],
      output: EvalOutput,
      images: jax.Array,
      reconstructions: jax.Array,
  ) -> dict[str, str]:
    """Adds a batch.

    Args:
      batch: of the data set, from all processes, on the host.
      output: what became of it, on the host. Metrics that images of this size
        do not have are missing.
      images: those of the batch, on devices.
      reconstructions: those of the output, on devices.

    Returns:
      By the name of each metric that images of this size do not have, why not.
    """
    mask = batch['mask']
    finite = np.isfinite(output.metrics['psnr'])
    self._num_images += int(np.sum(mask))
    # The last batch is filled up.
    is_example = batch['index'] < self._dataset.num_examples
    self._num_damaged += int(np.sum(~mask & is_example))
    self._num_nonfinite += int(np.sum(mask & ~finite))
    self._num_upscaled += int(np.sum(mask & batch['upscaled']))
    missing = {
        name: f'takes {min_side} pixels a side or more'
        for name, (_, min_side) in image_metrics.IMAGE_METRICS.items()
        if name not in output.metrics
    }
    missing |= self._scores.update(
        images, reconstructions, mask, finite, pixels=batch['image']
    )
    for name, values in output.metrics.items():
      self._means[name].update(values, mask)
    if self._codebook is not None:
      self._codebook.update(output.indices, mask)
    shown = select(batch, self._waiting)
    self._originals.extend(self._cut(batch['image'][i]) for i in shown)
    self._reconstructions.extend(
        self._cut(output.reconstructions[i]) for i in shown
    )
    return missing

  def num_unmeasured(self) -> dict[str, int]:
    """Images without a metric, where there are any, by its name."""
    counts = {name: mean.num_values for name, mean in self._means.items()}
    counts |= self._scores.num_images
    return {
        name: self._num_images - count
        for name, count in counts.items()
        if count != self._num_images
    }

  def result(self, **protocol: Any) -> Evaluation:
    """Returns the evaluation; `protocol` is added to its protocol.

    Raises:
      ValueError: the split holds no readable image.
    """
    if not self._originals:
      raise ValueError('No image of the evaluation split can be read.')
    if self._num_nonfinite:
      logging.error('%d reconstructions are not finite.', self._num_nonfinite)
    if self._num_upscaled:
      logging.warning(
          '%d of %d evaluated images have fewer pixels than the crop or'
          ' data.resize_shorter asks for; they are scaled up.',
          self._num_upscaled,
          self._num_images,
      )
    return Evaluation(
        metrics={
            **{name: mean.result() for name, mean in self._means.items()},
            **self._scores.result(),
        },
        codebook={} if self._codebook is None else self._codebook.result(),
        protocol={
            **self._dataset.protocol,
            **protocol,
            'content': _content(self._dataset),
            'command': provenance.command(),
            'num_images': self._num_images,
            # A data set knows of the images that its process has read; batches
            # hold those of all processes, but one by one only readable ones.
            'num_damaged_images': max(self._num_damaged, self._dataset.damaged),
            'num_upscaled_images': self._num_upscaled,
            'num_nonfinite_reconstructions': self._num_nonfinite,
            'rounding': 'clipped to [-1, 1], rounded to the nearest of 256',
            'quantizer': self._quantizer.spec(),
            'networks': self._networks.protocol,
            'definitions': image_metrics.DEFINITIONS
            | self._networks.definitions,
        },
        originals=self._lay_out(self._originals),
        reconstructions=self._lay_out(self._reconstructions),
    )


def _content(dataset: data.Dataset) -> str:
  """Returns a hash of all images of a data set that was read to its end.

  Several processes have read a part each, and all call this.
  """
  digests = dataset.digests
  if not len(digests):
    return dataset.fingerprint['content']
  return data.content_hash(processes.gather(digests).max(axis=0))


def select(
    batch: Mapping[str, np.ndarray], waiting: collections.deque[int]
) -> list[int]:
  """Takes the numbers of a batch's images from those that wait to be shown.

  Args:
    batch: of an evaluation data set.
    waiting: ascending numbers; in place of an image that cannot be read the
      next one is taken.

  Returns:
    Positions in the batch.
  """
  shown = []
  for row in np.argsort(batch['index']):
    if batch['mask'][row] and waiting and batch['index'][row] >= waiting[0]:
      waiting.popleft()
      shown.append(row)
  return shown
