"""Evaluation of images at their own size, one by one."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fsq_jax import data
from fsq_jax import evaluation
from fsq_jax import metrics
from fsq_jax import models
from fsq_jax import native_size
from fsq_jax import network_metrics
from fsq_jax import partitioning
from fsq_jax import train_step

# Sizes of images for which compiled programs are kept.
_MAX_SIZES = 256
# Most pixels a side of an image in the grid.
_GRID_SIDE = 256


class NativeEvaluator:
  """Evaluates parameters on a split, each image once and whole.

  A program is compiled for every size of image, in seconds where networks
  measure; a split of many sizes takes far longer than one of crops. All devices
  do the same.
  """

  def __init__(
      self,
      model: models.Autoencoder,
      dataset: data.Dataset,
      mesh: jax.sharding.Mesh,
      image_size: tuple[int, int],
      *,
      num_grid_images: int,
      networks: network_metrics.NetworkMetrics,
  ):
    """Compiles nothing yet.

    Args:
      model: an autoencoder.
      dataset: built with split='eval_native'.
      mesh: from `partitioning.create_mesh`.
      image_size: (height, width) in pixels that the model was built for.
      num_grid_images: originals and reconstructions to return.
      networks: what networks measure, of the same data set.
    """
    self._quantizer = model.quantizer
    self._dataset = dataset
    self._num_grid_images = num_grid_images
    self._networks = networks
    self._reconstructor = native_size.Reconstructor(model, image_size, mesh)
    # Of images that are rounded already.
    self._measure = jax.jit(
        lambda images, reconstructions: metrics.image_metrics(
            images, train_step.to_float(reconstructions)
        ),
        out_shardings=partitioning.replicated(mesh),
    )

  def run(self, variables: Mapping[str, Any]) -> evaluation.Evaluation:
    """Evaluates the variables of the model.

    Args:
      variables: params and the model's other collections.

    Returns:
      The evaluation. Its originals and reconstructions are laid on white, and
      of large ones the middle is cut out.

    Raises:
      ValueError: the split holds no readable image.
    """
    tally = evaluation.Tally(
        self._quantizer, self._networks, self._dataset, self._num_grid_images
    )
    sizes = set()
    for batch in self._dataset:
      if not batch['mask'].all():
        continue
      images = batch['image']
      if images.shape not in sizes and len(sizes) == _MAX_SIZES:
        # They would fill the memory.
        jax.clear_caches()
        sizes.clear()
      sizes.add(images.shape)
      output = self._reconstruct(variables, images)
      shown = output._replace(
          reconstructions=_lay_on_white(output.reconstructions)
      )
      tally.update(
          batch | {'image': _lay_on_white(images)}, shown,
          images, output.reconstructions,
      )
    return tally.result(
        native_size=self._reconstructor.protocol,
        tokens='those that see the image; of padding alone are not counted',
        num_unmeasured_images=tally.num_unmeasured(),
    )

  def _reconstruct(self, variables, images) -> train_step.EvalOutput:
    """Reconstructs [1, H, W, 3] uint8."""
    image, indices, (rows, columns), finite = self._reconstructor(
        variables, images[0]
    )
    values = jax.device_get(self._measure(images, image[None]))
    if not finite:
      values = {name: np.full_like(x, np.nan) for name, x in values.items()}
    return train_step.EvalOutput(
        metrics=values,
        indices=indices[None, :rows, :columns],
        reconstructions=image[None],
    )


def _lay_on_white(images: np.ndarray) -> np.ndarray:
  """Returns the middle of [1, H, W, 3] uint8 in a white square for the grid."""
  square = np.full((1, _GRID_SIDE, _GRID_SIDE, 3), 255, np.uint8)
  inside, outside = [], []
  for side in images.shape[1:3]:
    length = min(side, _GRID_SIDE)
    inside.append(slice((side - length) // 2, (side + length) // 2))
    start = (_GRID_SIDE - length) // 2
    outside.append(slice(start, start + length))
  square[:, *outside] = images[:, *inside]
  return square
