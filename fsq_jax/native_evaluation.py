"""Evaluation of images at their own size, one by one."""

from collections.abc import Mapping, Sequence
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
        self._quantizer,
        self._networks,
        self._dataset,
        self._num_grid_images,
        lay_out=_lay_on_white,
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
      tally.update(batch, output, images, output.reconstructions)
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


def _lay_on_white(images: Sequence[np.ndarray]) -> np.ndarray:
  """Lays [H, W, 3] uint8 images, or the middle of large ones, on white.

  Returns:
    [n, height, width, 3] uint8, no larger than the largest of them needs.
  """
  sides = np.array([image.shape[:2] for image in images])
  height, width = np.minimum(sides.max(axis=0), _GRID_SIDE).tolist()
  laid = np.full((len(images), height, width, 3), 255, np.uint8)
  for target, image in zip(laid, images, strict=True):
    inside, outside = [], []
    for side, room in zip(image.shape[:2], (height, width), strict=True):
      length = min(side, room)
      first, start = (side - length) // 2, (room - length) // 2
      inside.append(slice(first, first + length))
      outside.append(slice(start, start + length))
    target[tuple(outside)] = image[tuple(inside)]
  return laid
