"""The diversity loss of quantizers with levels."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

from fsq_jax.quantizers import checks


def missing_entropy(
    position: jax.Array,
    levels: Sequence[int],
    batch_axes: Sequence[int],
    axis_name: checks.AxisName = None,
) -> jax.Array:
  """Returns the sum of log L - H(p) over channels, in nats.

  p is the histogram of the L levels over the batch. Counts are interpolated
  linearly between the two levels next to a position, so that the gradient
  pulls it towards the rarer one.

  Args:
    position: [..., d] float32 level indices, not rounded, in [0, L - 1].
    levels: number of levels of each channel.
    batch_axes: axes over which levels are counted; other axes than the last
      have histograms of their own.
    axis_name: axes over which replicas hold parts of the batch, or None.

  Returns:
    float32 scalar, at least 0.
  """
  total = jnp.zeros((), jnp.float32)
  for i, num_levels in enumerate(levels):
    distance = jnp.abs(position[..., i, None] - jnp.arange(num_levels))
    p = jnp.mean(jnp.maximum(1 - distance, 0), axis=tuple(batch_axes))
    if axis_name is not None:
      p = jax.lax.pmean(p, axis_name)
    # The gradient of p log p is infinite at 0; there it is set to 0.
    logarithms = jnp.log(jnp.where(p > 0, p, 1))
    total += jnp.sum(math.log(num_levels) + jnp.sum(p * logarithms, -1))
  return total
