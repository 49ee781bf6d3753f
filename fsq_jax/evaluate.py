"""Evaluation over a whole split: image metrics and codebook statistics."""

import collections
from collections.abc import Mapping
import os
import pathlib
import re
from typing import Any, NamedTuple

from absl import logging
from flax import linen as nn
import jax
import ml_collections
import numpy as np

from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import metrics
from fsq_jax import network_metrics
from fsq_jax import partitioning
from fsq_jax import quantizers
from fsq_jax import report
from fsq_jax import runtime
from fsq_jax import train_step
from fsq_jax import trained
from fsq_jax import workdir as workdirs

# Fields of the data section that say which images are evaluated, and how.
_EVALUATION_IMAGES = (
    'source', 'name', 'data_dir', 'eval_split', 'resize_shorter',
)  # fmt: skip
# The codebook numbers that stand beside the image metrics in curves and bars.
_CODEBOOK_SCALARS = ('usage', 'perplexity', 'entropy_bits', 'entropy_share')


class Evaluation(NamedTuple):
  """What an evaluation gives.

  Attributes:
    metrics: mean over all images of each image metric.
    codebook: `metrics.CodebookStatistics.result()`; {} without tokens.
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

  def summary(self) -> str:
    """The numbers that matter most, in one line."""
    scalars = self.scalars()
    text = f'PSNR {scalars["psnr"]:.2f} dB, SSIM {scalars["ssim"]:.3f}'
    for name in network_metrics.DEFINITIONS:
      if name in scalars:
        text += f', {name} {scalars[name]:.3f}'
    if self.codebook:
      text += (
          f', codebook usage {scalars["usage"]:.1%}, perplexity'
          f' {scalars["perplexity"]:.1f}'
      )
    return text


class Evaluator:
  """Evaluates parameters on a split, each image once.

  The numbers depend neither on the batch size nor on the number of devices.
  """

  def __init__(
      self,
      model: nn.Module,
      dataset: data.Dataset,
      mesh: jax.sharding.Mesh,
      *,
      num_grid_images: int,
      networks: network_metrics.NetworkMetrics | None = None,
  ):
    """Compiles nothing yet.

    Args:
      model: an autoencoder.
      dataset: built with split='eval'.
      mesh: from `partitioning.create_mesh`.
      num_grid_images: originals and reconstructions to return.
      networks: what networks measure, of the same data set; None for nothing.
    """
    if networks is None:
      networks = network_metrics.NetworkMetrics({}, mesh, images={})
    self._networks = networks
    self._quantizer = model.quantizer
    self._digits = {}
    if isinstance(model.quantizer, quantizers.DigitQuantizer):
      self._digits = {
          'levels': model.quantizer.levels,
          'digits_of': lambda indices: np.asarray(
              model.quantizer.indices_to_digits(indices)
          ),
      }
    self._dataset = dataset
    self._mesh = mesh
    # Every process gets the results of the whole batch.
    self._eval_step = jax.jit(
        train_step.build_eval_step(model),
        out_shardings=partitioning.replicated(mesh),
    )
    self._gather = jax.jit(
        lambda batch: batch, out_shardings=partitioning.replicated(mesh)
    )
    positions = np.linspace(
        0, dataset.num_examples, num_grid_images, endpoint=False
    )
    self._grid = sorted(set(positions.astype(int).tolist()))

  def run(self, variables: Mapping[str, Any]) -> Evaluation:
    """Evaluates the variables of the model.

    Args:
      variables: params and the model's other collections.

    Returns:
      The evaluation.

    Raises:
      ValueError: the split holds no readable image.
    """
    means: dict[str, metrics.Mean] = {}
    codebook = None
    if self._quantizer.codebook_size:
      codebook = metrics.CodebookStatistics(
          self._quantizer.codebook_size, **self._digits
      )
    scores = self._networks.start()
    originals, reconstructions = [], []
    waiting = collections.deque(self._grid)
    for local_batch in self._dataset:
      batch = partitioning.shard_batch(local_batch, self._mesh)
      output = self._eval_step(variables, batch['image'])
      pairs = batch['image'], output.reconstructions
      batch, output = jax.device_get((self._gather(batch), output))
      mask = batch['mask']
      scores.update(*pairs, mask, np.isfinite(output.metrics['psnr']))
      for name, values in output.metrics.items():
        means.setdefault(name, metrics.Mean()).update(values, mask)
      if codebook is not None:
        codebook.update(output.indices, mask)
      shown = _select(batch, waiting)
      originals.extend(batch['image'][shown])
      reconstructions.extend(output.reconstructions[shown])
    if not originals:
      raise ValueError('No image of the evaluation split can be read.')
    return self._summarise(means, scores, codebook, originals, reconstructions)

  def _summarise(self, means, scores, codebook, originals, reconstructions):
    nonfinite = means['psnr'].num_nonfinite
    if nonfinite:
      logging.error('%d reconstructions are not finite.', nonfinite)
    return Evaluation(
        metrics={
            **{name: mean.result() for name, mean in means.items()},
            **scores.result(),
        },
        codebook={} if codebook is None else codebook.result(),
        protocol={
            **self._dataset.protocol,
            'num_images': means['psnr'].num_values,
            'num_damaged_images': self._dataset.damaged,
            'num_nonfinite_reconstructions': nonfinite,
            'rounding': 'clipped to [-1, 1], rounded to the nearest of 256',
            'quantizer': self._quantizer.spec(),
            'networks': self._networks.protocol,
            'definitions': metrics.DEFINITIONS | self._networks.definitions,
        },
        originals=np.stack(originals),
        reconstructions=np.stack(reconstructions),
    )


def build_evaluator(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    dataset: data.Dataset,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
) -> Evaluator:
  """Builds what the `eval` section of a config describes.

  Args:
    config: the whole config.
    model: an autoencoder.
    dataset: built with split='eval'.
    mesh: from `partitioning.create_mesh`.
    folder: of the run, where statistics of the originals are kept.

  Returns:
    The evaluator.

  Raises:
    ValueError: weights of networks that are missing or damaged.
  """
  networks = network_metrics.NetworkMetrics(
      config.eval.networks,
      mesh,
      images={
          name: value
          for name, value in (dataset.fingerprint | dataset.protocol).items()
          if name not in ('batch_size', 'process_count')
      },
      folder=folder / workdirs.REFERENCES,
  )
  return Evaluator(
      model,
      dataset,
      mesh,
      num_grid_images=config.eval.num_grid_images,
      networks=networks,
  )


def _select(
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


def write_evaluation(
    folder: pathlib.Path, step: int, evaluation: Evaluation, label: str = ''
) -> None:
  """Writes evaluation.json and the grid of reconstructions of one step.

  Args:
    folder: the run's folder.
    step: steps taken.
    evaluation: what to write.
    label: added to the names of the files, for what is not the run's own
      evaluation: another split or the best checkpoint.
  """
  record = {
      'step': step,
      'metrics': evaluation.metrics,
      'codebook': evaluation.codebook,
      'protocol': evaluation.protocol,
  }
  name = f'evaluation_{label}.json' if label else workdirs.EVALUATION
  workdirs.write_json(folder / name, record)
  grids = folder / workdirs.RECONSTRUCTIONS
  grids.mkdir(exist_ok=True)
  grid = report.reconstruction_grid(
      evaluation.originals, evaluation.reconstructions
  )
  name = f'{label}_step_{step:08d}.png' if label else f'step_{step:08d}.png'
  report.save_png(grids / name, grid)


def evaluate_workdir(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    which: str = 'newest',
) -> Evaluation:
  """Evaluates a checkpoint of a run.

  The newest checkpoint on the run's own split rewrites evaluation.json and the
  report. Anything else gets files of its own, such as
  evaluation_test_0_2000.json, and leaves the run's numbers alone.

  Args:
    config: of the run; its data section may name other evaluation images.
    workdir: the run's folder.
    which: 'newest' checkpoint, or the 'best', of the highest PSNR.

  Returns:
    The evaluation, also written to the folder.

  Raises:
    ValueError: a config that is not valid or not that of the checkpoint's
      model, or no checkpoint.
  """
  configuration.check_config(config, num_devices=jax.device_count())
  runtime.keep_freed_memory()
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  found = trained.find(workdir, which)
  _check_same_model(found.config, configuration.resolve(config))
  model, variables = trained.restore(found, mesh)
  dataset = data.build_dataset(
      config.data,
      split='eval',
      seed=config.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
  )
  evaluator = build_evaluator(config, model, dataset, mesh, found.folder)
  evaluation = evaluator.run(variables)
  if jax.process_index() == 0:
    label = '' if which == 'newest' else which
    if any(found.config.data[x] != config.data[x] for x in _EVALUATION_IMAGES):
      words = [label, config.data.name, config.data.eval_split]
      label = '_'.join(re.findall(r'\w+', ' '.join(words)))
    write_evaluation(found.folder, found.step, evaluation, label)
    if not label:
      report.write_report(found.folder)
  return evaluation


def _check_same_model(
    saved: ml_collections.ConfigDict, given: ml_collections.ConfigDict
) -> None:
  """Refuses a config that was given for another model than the checkpoint's."""
  differences = [
      line
      for line in configuration.diff_configs(saved, given)
      if line.startswith(('model.', 'data.image_size:'))
      # Where weights once came from.
      and not line.partition(':')[0].endswith('.checkpoint')
  ]
  if differences:
    raise ValueError(
        'The config has another model than the checkpoint (saved -> given):\n'
        + '\n'.join(differences)
    )
