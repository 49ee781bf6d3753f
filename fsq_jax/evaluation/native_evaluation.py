"""Evaluation of images at their native size, one by one."""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any

from absl import logging
import jax
import numpy as np

from fsq_jax.data import pipelines
from fsq_jax.evaluation import network_metrics
from fsq_jax.evaluation import results as results_lib
from fsq_jax.evaluation import tiled_metrics
from fsq_jax.models import autoencoder
from fsq_jax.models import native_size
from fsq_jax.runtime import compiled

# Most images without some metric that a protocol names.
_NUM_NAMED = 20
# Largest side of an image in the grid, in pixels.
_GRID_SIDE = 256


class NativeEvaluator:
  """Evaluates variables on a split, each image once and uncropped.

  Networks of metrics are compiled for every image size, which takes seconds
  each. All devices compute the same.
  """

  def __init__(
      self,
      model: autoencoder.Autoencoder,
      dataset: pipelines.Dataset,
      mesh: jax.sharding.Mesh,
      image_size: tuple[int, int],
      *,
      num_grid_images: int,
      networks: network_metrics.NetworkMetrics,
  ):
    """Functions are compiled on first call.

    Args:
      model: an autoencoder.
      dataset: built with split='eval_native'.
      mesh: from `partitioning.create_mesh`.
      image_size: (height, width) of the model in pixels.
      num_grid_images: number of originals and reconstructions to return.
      networks: metrics by networks, for the same data set.
    """
    self._quantizer = model.quantizer
    self._dataset = dataset
    self._num_grid_images = num_grid_images
    self._networks = networks
    self._reconstructor = native_size.Reconstructor(model, image_size, mesh)

  def run(self, variables: Mapping[str, Any]) -> results_lib.Evaluation:
    """Evaluates the variables of the model.

    Args:
      variables: params and the model's other collections.

    Returns:
      The evaluation. Its originals and reconstructions are centre crops on a
      white background.

    Raises:
      ValueError: the split has no image that can be read and evaluated.
    """
    sums = results_lib.EvaluationSums(
        self._quantizer,
        self._networks,
        self._dataset,
        self._num_grid_images,
        cut=crop_centre,
        lay_out=lay_on_white,
    )
    skipped, unmeasured = {}, {}
    for batch in self._dataset:
      if not batch['mask'].all():
        continue
      images = batch['image']
      name = self._dataset.describe(batch['index'][0])
      size = f'{images.shape[1]} x {images.shape[2]} pixels'
      try:
        output = self._reconstruct(variables, images)
      except Exception as error:
        if not compiled.is_out_of_memory(error):
          raise
        skipped[name] = f'{size}: {str(error).splitlines()[0]}'
        logging.error('Skipped %s, %s', name, skipped[name])
        continue
      missing = sums.update(batch, output, images, output.reconstructions)
      if missing:
        reasons = '; '.join(f'{x} {reason}' for x, reason in missing.items())
        unmeasured[name] = f'{size}: {reasons}'
        logging.warning('Partly measured: %s, %s', name, unmeasured[name])
    num_left = self._dataset.num_examples - self._dataset.damaged
    if skipped and len(skipped) == num_left:
      raise ValueError(
          'No image of the evaluation split can be evaluated. The first:'
          f' {next(iter(skipped.items()))}.'
      )
    return sums.result(
        native_size=self._reconstructor.protocol,
        tokens='those that see the image; of padding alone are not counted',
        num_unmeasured_images=sums.num_unmeasured(),
        unmeasured_images=_first(unmeasured),
        num_skipped_images=len(skipped),
        skipped_images=_first(skipped),
    )

  def _reconstruct(self, variables, images) -> results_lib.EvalOutput:
    """Reconstructs [1, H, W, C] uint8."""
    image, indices, (rows, columns), finite = self._reconstructor(
        variables, images[0]
    )
    values = tiled_metrics.image_metrics(images[0], image)
    if not finite:
      values = dict.fromkeys(values, np.nan)
    return results_lib.EvalOutput(
        metrics={name: np.array([x]) for name, x in values.items()},
        indices=indices[None, :rows, :columns],
        reconstructions=image[None],
    )


def _first(reasons: Mapping[str, str]) -> dict[str, str]:
  """Returns the first images, as many as a protocol names."""
  return dict(itertools.islice(reasons.items(), _NUM_NAMED))


def crop_centre(image: np.ndarray) -> np.ndarray:
  """Returns a copy of the centre crop with sides of at most `_GRID_SIDE`."""
  inside = []
  for side in image.shape[:2]:
    length = min(side, _GRID_SIDE)
    inside.append(slice((side - length) // 2, (side - length) // 2 + length))
  return image[tuple(inside)].copy()


def lay_on_white(images: Sequence[np.ndarray]) -> np.ndarray:
  """Centres [H, W, C] uint8 images on white backgrounds of one size.

  Returns:
    [n, height, width, C] uint8, with the largest height and the largest width.
  """
  height, width = np.max([image.shape[:2] for image in images], axis=0)
  shape = len(images), height, width, images[0].shape[-1]
  laid = np.full(shape, 255, np.uint8)
  for target, image in zip(laid, images, strict=True):
    top, left = np.subtract((height, width), image.shape[:2]) // 2
    target[top : top + image.shape[0], left : left + image.shape[1]] = image
  return laid
