"""Results of an evaluation: running sums over batches, metrics, protocol."""

import collections
from collections.abc import Callable, Mapping, Sequence
import pathlib
import types
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np

from fsq_jax.data import image_source
from fsq_jax.data import pipelines
from fsq_jax.evaluation import codebook_statistics
from fsq_jax.evaluation import image_metrics
from fsq_jax.evaluation import network_metrics
from fsq_jax.quantizers import base as quantizers
from fsq_jax.report import grid as grid_lib
from fsq_jax.runtime import processes
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import provenance


class EvalOutput(NamedTuple):
  """Results of one evaluation batch.

  Attributes:
    metrics: name to [B] float32, one value per image.
    indices: [B, h, w, *index_shape] int32.
    reconstructions: [B, H, W, C] uint8.
  """

  metrics: dict[str, jax.Array]
  indices: jax.Array
  reconstructions: jax.Array


# Codebook statistics that are shown with the image metrics in curves and bars.
_CODEBOOK_SCALARS = ('usage', 'perplexity', 'entropy_bits', 'entropy_share')
# Pixels; smaller photographs are enlarged towards it.
_PHOTOGRAPH_WIDTH = 600
# Characters of a hash in a summary.
_SHORT_HASH = 12


class Evaluation(NamedTuple):
  """Results of an evaluation.

  Attributes:
    metrics: each image metric, averaged over all images.
    codebook: `CodebookStatistics.result()`; {} without tokens.
    protocol: preprocessing of the images and definitions of the metrics.
    originals: [n, H, W, C] uint8, images at regular intervals of the split.
    reconstructions: [n, H, W, C] uint8, of the same images.
    photographs: by name, [2, H, W, C] uint8: a photograph and its
      reconstruction, joined from all tiles, if the images of the split are
      tiles of whole photographs.
    at_sizes: evaluations at the other data.image_sizes by size, such as
      '48x64' (height x width); {} without any.
  """

  metrics: dict[str, float]
  codebook: dict[str, Any]
  protocol: dict[str, Any]
  originals: np.ndarray
  reconstructions: np.ndarray
  photographs: Mapping[str, np.ndarray] = types.MappingProxyType({})
  at_sizes: Mapping[str, 'Evaluation'] = types.MappingProxyType({})

  def scalars(self) -> dict[str, float]:
    """Returns the numbers of a row of metrics.jsonl.

    Metrics at other sizes have the size as a suffix: 'psnr_48x64'.
    """
    names = _CODEBOOK_SCALARS if self.codebook else ()
    return {
        **self.metrics,
        **{name: self.codebook[name] for name in names},
        **{
            f'{name}_{size}': value
            for size, evaluation in self.at_sizes.items()
            for name, value in evaluation.scalars().items()
        },
    }

  def lines(self) -> list[str]:
    """Returns a line per number, with the sha256 of a network's weights.

    The last lines have the numbers of measured and of missing images, a line
    for each image size.
    """
    hashes = self.protocol['networks']
    return [
        f'{name}: {value:.6g}'
        + (f' (weights sha256 {hashes[name]})' if name in hashes else '')
        for name, value in self.scalars().items()
    ] + [
        f'images{size}: {evaluation.count_images()}'
        for size, evaluation in (
            ('', self),
            *((f' at {size}', x) for size, x in self.at_sizes.items()),
        )
    ]

  def count_images(self) -> str:
    """Returns the numbers of measured and of missing images in words."""
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
    return ', '.join(parts)

  def summary(self) -> str:
    """Returns the most important numbers in one line."""
    scalars = self.scalars()
    text = f'PSNR {scalars["psnr"]:.2f} dB, SSIM {scalars["ssim"]:.3f}'
    for name, digest in self.protocol['networks'].items():
      text += f', {name} {scalars[name]:.3f} (weights {digest[:_SHORT_HASH]})'
    if self.codebook:
      text += (
          f', codebook usage {scalars["usage"]:.1%}'
          f' ({self.codebook["num_used_codes"]:,} of'
          f' {self.codebook["codebook_size"]:,} codes), perplexity'
          f' {scalars["perplexity"]:.1f}'
      )
    for size in self.at_sizes:
      text += f', PSNR {scalars[f"psnr_{size}"]:.2f} dB at {size}'
    return text

  def write(self, folder: pathlib.Path, step: int) -> pathlib.Path:
    """Writes the run's own evaluation; see `write_evaluation`."""
    return write_evaluation(folder, step, self)


class EvaluationSums:
  """Running sums of all metrics over the images of one split."""

  def __init__(
      self,
      quantizer: quantizers.Quantizer,
      networks: network_metrics.NetworkMetrics,
      dataset: pipelines.Dataset,
      num_grid_images: int,
      *,
      cut: Callable[[np.ndarray], np.ndarray] = np.copy,
      lay_out: Callable[[Sequence[np.ndarray]], np.ndarray] = np.stack,
  ):
    """Sums over no images.

    Args:
      quantizer: of the model.
      networks: metrics by networks.
      dataset: of the batches.
      num_grid_images: number of originals and reconstructions to keep.
      cut: returns a copy of an image, or of a part of it, to keep.
      lay_out: stacks kept images, which may differ in size.
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
    self._tiles = {}

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
      output: results of the batch, on the host, without the metrics that are
        undefined for images of this size.
      images: of the batch, on devices.
      reconstructions: of the output, on devices.

    Returns:
      The reason for each metric that is missing, by name.
    """
    mask = batch['mask']
    finite = np.isfinite(output.metrics['psnr'])
    self._num_images += int(np.sum(mask))
    # The last batch is padded.
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
    if self._dataset.tiles:
      for i in np.flatnonzero(mask):
        self._tiles[self._dataset.tiles[batch['index'][i]]] = np.stack(
            [batch['image'][i], output.reconstructions[i]]
        )
    return missing

  def num_unmeasured(self) -> dict[str, int]:
    """Returns the number of images without a metric, by its name, if any."""
    counts = {name: mean.num_values for name, mean in self._means.items()}
    counts |= self._scores.num_images
    return {
        name: self._num_images - count
        for name, count in counts.items()
        if count != self._num_images
    }

  def result(self, **protocol: Any) -> Evaluation:
    """Returns the evaluation.

    Args:
      **protocol: further entries of its protocol.

    Raises:
      ValueError: the split has no readable image.
    """
    if not self._originals:
      raise ValueError('No image of the evaluation split can be read.')
    if self._num_nonfinite:
      logging.error('%d reconstructions are not finite.', self._num_nonfinite)
    if self._num_upscaled:
      logging.warning(
          '%d of %d evaluated images are smaller than the crop or than'
          ' data.resize_shorter; they are scaled up.',
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
            # A data set counts the images of its process. Batches have images
            # of all processes; native-size batches only readable ones.
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
        photographs=_join(self._tiles),
    )


def _join(
    tiles: Mapping[image_source.Tile, np.ndarray],
) -> dict[str, np.ndarray]:
  """Joins tiles [..., h, w, C]; returns [..., H, W, C] by photograph."""
  photographs = {}
  for name in dict.fromkeys(tile.photograph for tile in tiles):
    parts = [
        (pixels, slice(tile.top, tile.top + pixels.shape[-3]),
         slice(tile.left, tile.left + pixels.shape[-2]))
        for tile, pixels in tiles.items()
        if tile.photograph == name
    ]
    height, width = (
        max(part[axis].stop for part in parts) for axis in (1, 2)
    )
    pixels = parts[0][0]
    shape = (*pixels.shape[:-3], height, width, pixels.shape[-1])
    whole = np.zeros(shape, pixels.dtype)
    for pixels, rows, columns in parts:
      whole[..., rows, columns, :] = pixels
    photographs[name] = whole
  return photographs


def _content(dataset: pipelines.Dataset) -> str:
  """Returns a hash of all images of a data set after a full epoch.

  Collective: each process has read a part of the images.
  """
  digests = dataset.digests
  if not len(digests):
    return dataset.fingerprint['content']
  return image_source.content_hash(processes.gather(digests).max(axis=0))


def select(
    batch: Mapping[str, np.ndarray], waiting: collections.deque[int]
) -> list[int]:
  """Removes the images of a batch from a queue; returns their rows.

  Args:
    batch: of an evaluation data set.
    waiting: ascending image numbers; an unreadable image is replaced by the
      next one.

  Returns:
    Rows of the batch.
  """
  shown = []
  for row in np.argsort(batch['index']):
    if batch['mask'][row] and waiting and batch['index'][row] >= waiting[0]:
      waiting.popleft()
      shown.append(row)
  return shown


def write_evaluation(
    folder: pathlib.Path,
    step: int,
    result: Evaluation,
    label: str = '',
) -> pathlib.Path:
  """Writes evaluation.json and pictures of the reconstructions of one step.

  The pictures are step_00004500.png, a grid of some images, and, for example,
  step_00004500_coffee.png, one per whole photograph of the evaluation, and
  step_00004500_48x64.png, a grid of each other image size.

  Args:
    folder: the run's folder.
    step: of the checkpoint.
    result: the evaluation.
    label: part of the file names, for other images or another checkpoint than
      the newest; '' for the run's own evaluation.

  Returns:
    The path of the JSON file.
  """
  record = {'step': step, **_contents(result)}
  if result.at_sizes:
    record['image_sizes'] = {
        size: _contents(x) for size, x in result.at_sizes.items()
    }
  # The run's own evaluation always belongs to the newest checkpoint.
  suffix = f'{label}_step_{step:08d}' if label else f'step_{step:08d}'
  name = f'evaluation_{suffix}.json' if label else workdirs.EVALUATION
  path = folder / name
  workdirs.write_json(path, record)
  grids = folder / workdirs.RECONSTRUCTIONS
  workdirs.make_folder(grids)
  # Photographs come first: the report shows those of the newest grid.
  for photograph, (original, reconstruction) in result.photographs.items():
    picture = grid_lib.reconstruction_grid(
        original[None], reconstruction[None], width=_PHOTOGRAPH_WIDTH
    )
    grid_lib.save_png(grids / f'{suffix}_{photograph}.png', picture)
  named = {f'{suffix}_{size}': x for size, x in result.at_sizes.items()}
  for name, evaluation in (named | {suffix: result}).items():
    grid = grid_lib.reconstruction_grid(
        evaluation.originals, evaluation.reconstructions
    )
    grid_lib.save_png(grids / f'{name}.png', grid)
  return path


def _contents(result: Evaluation) -> dict[str, Any]:
  """Returns the numbers and the protocol of evaluation.json."""
  return {
      'metrics': result.metrics,
      'codebook': result.codebook,
      'protocol': result.protocol,
  }
