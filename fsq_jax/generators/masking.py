"""Random masks of training and class dropout. Arguments are never changed."""

import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.generators import embeddings

NORMALIZATIONS = ('token', 'example')


def rank(scores: jax.Array) -> jax.Array:
  """Returns the rank of each score in its row, 0 for the lowest.

  Ties are ranked by position, so that "the n lowest" are always exactly n.

  Args:
    scores: [B, N] floats or integers.

  Returns:
    int32 [B, N], a permutation of 0 ... N - 1 in each row.
  """
  order = jnp.argsort(scores, axis=-1, stable=True)
  return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def masked_counts(uniform: jax.Array, thresholds: np.ndarray) -> jax.Array:
  """Returns how many tokens to mask.

  Args:
    uniform: [B] float32 in [0, 1).
    thresholds: [N - 1] from `schedules.training_thresholds`.

  Returns:
    int32 [B] in [1, N].
  """
  is_more = uniform[:, None] < jnp.asarray(thresholds)
  return 1 + jnp.sum(is_more, axis=-1, dtype=jnp.int32)


def choose_known(scores: jax.Array, counts: jax.Array) -> jax.Array:
  """Masks the positions of the lowest scores.

  Args:
    scores: [B, N] floats.
    counts: [B] integers, how many positions to mask per example.

  Returns:
    bool [B, N], False at exactly `counts` positions of each row.
  """
  return rank(scores) >= counts[:, None]


def draw_known(
    key: jax.Array, batch_size: int, thresholds: np.ndarray
) -> jax.Array:
  """Draws the mask of a training batch, a ratio per example.

  Args:
    key: random key.
    batch_size: B.
    thresholds: [N - 1] from `schedules.training_thresholds`.

  Returns:
    bool [B, N], True where tokens are visible.
  """
  ratio_key, score_key = jax.random.split(key)
  counts = masked_counts(
      jax.random.uniform(ratio_key, (batch_size,), jnp.float32), thresholds
  )
  shape = (batch_size, len(thresholds) + 1)
  scores = jax.random.uniform(score_key, shape, jnp.float32)
  return choose_known(scores, counts)


def drop_labels(key: jax.Array, labels: jax.Array, rate: float) -> jax.Array:
  """Replaces labels by the label of no class, independently per example.

  Args:
    key: random key.
    labels: [B] integers.
    rate: probability in [0, 1].

  Returns:
    int32 [B], a new array.
  """
  is_dropped = jax.random.uniform(key, labels.shape, jnp.float32) < rate
  return jnp.where(
      is_dropped, embeddings.NO_LABEL, labels.astype(jnp.int32)
  )


def mean_loss(
    losses: jax.Array, weights: jax.Array, normalization: str
) -> jax.Array:
  """Averages losses over masked positions.

  Args:
    losses: [B, N] float32.
    weights: [B, N] bool or float, 0 where a position does not count.
    normalization: 'token', sum over the batch / count over the batch; or
      'example', mean of the means of the examples, as in MaskGIT's successors.

  Returns:
    float32 scalar; 0 if no position counts.
  """
  if normalization not in NORMALIZATIONS:
    raise ValueError(
        f'normalization is {normalization!r}; known: {list(NORMALIZATIONS)}.'
    )
  weights = weights.astype(jnp.float32)
  # A position that does not count must not matter even if its loss is NaN.
  losses = jnp.where(weights > 0, losses, 0.0) * weights
  axis = None if normalization == 'token' else -1
  counts = jnp.sum(weights, axis)
  means = jnp.sum(losses, axis) / jnp.maximum(counts, 1.0)
  return jnp.mean(means)
