"""Distortion of latents by the quantizer, and its cost in PSNR."""

import pathlib

import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax import data
from fsq_jax import quantizers
from fsq_jax.checkpoints import saved_model
from fsq_jax.evaluation import image_metrics
from fsq_jax.models import pixels
from fsq_jax.quantizers import conventions
from fsq_jax.runtime import partitioning

# Full batches of the 10,000 test images.
NUM_BATCHES = 78


def measure(workdir: pathlib.Path) -> dict[str, float]:
  """Measures a trained model on evaluation images.

  Args:
    workdir: of the run.

  Returns:
    'distortion': squared error of the codes relative to the variance of the
    latents, summed over channels, after FSQ's bound; 'psnr', the mean over
    images in dB; 'psnr_unquantized', of the latents without rounding.
  """
  found = saved_model.find_run(workdir)
  mesh = partitioning.create_mesh(found.config.partitioning.mesh)
  model, variables = saved_model.restore(found, mesh)
  dataset = data.build_dataset(found.config.data, split='eval', seed=0)

  def errors(model, images):
    x = pixels.to_float(images)
    z = model.projector_in(model.encoder(x))
    codes = model.quantizer(z).z_q
    if isinstance(model.quantizer, quantizers.FSQ):
      z = bound(model.quantizer, z)
    psnr = [
        image_metrics.psnr(images, pixels.to_uint8(model.decode(y))).mean()
        for y in (codes, z)
    ]
    axes = tuple(range(z.ndim - 1))
    moments = [jnp.mean(y, axes) for y in (z, z**2, (codes - z) ** 2)]
    return jnp.stack(psnr), jnp.stack(moments)

  apply = jax.jit(lambda x: model.apply(variables, x, method=errors))
  batches = [
      apply(batch['image'])
      for _, batch in zip(range(NUM_BATCHES), dataset, strict=False)
  ]
  psnr, moments = (np.mean(x, axis=0) for x in zip(*batches, strict=True))
  mean, square, error = moments
  quantized, unquantized = map(float, psnr)
  return {
      'distortion': float(error.sum() / (square - mean**2).sum()),
      'psnr': quantized,
      'psnr_unquantized': unquantized,
  }


def bound(fsq: quantizers.FSQ, z: jax.Array) -> jax.Array:
  """Returns bounded latents in units of codes."""
  kind = conventions.CONVENTIONS[fsq.convention]
  eps = kind.eps if fsq.eps is None else fsq.eps
  grid = kind(fsq.levels, fsq.bound, fsq.bins, eps)
  return grid.to_steps(grid.bound(z)) / grid.scale
