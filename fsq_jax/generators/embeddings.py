"""Embeddings of tokens, by their levels or by a table, and of class labels."""

import itertools

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.generators import vocabulary as vocabularies
from fsq_jax.runtime import partitioning

# Class label of an example without a class; it has a row of its own.
NO_LABEL = -1
_STDDEV = 0.02


def _table(module: nn.Module, rows: int, width: int) -> jax.Array:
  """Returns the float32 parameter [rows, width] of a module, replicated."""
  table = module.param(
      'embedding',
      nn.initializers.truncated_normal(_STDDEV),
      (rows, width),
      jnp.float32,
  )
  return partitioning.gather_parameter(table)


def _take(table: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns rows [..., w] of a table, NaN outside of [0, number of rows)."""
  rows = jnp.where(rows < 0, table.shape[0], rows)
  return jnp.take(table, rows, axis=0, mode='fill', fill_value=jnp.nan)


class LevelEmbedding(nn.Module):
  """Sum of one embedding per dimension, sum_i E_i[level_i].

  E_i has one row more than levels, for a masked token: sum(L_i + 1) rows.
  """

  vocabulary: vocabularies.Vocabulary
  width: int

  @nn.compact
  def __call__(
      self, tokens: jax.Array, known: jax.Array | None
  ) -> jax.Array:
    """Embeds tokens.

    Args:
      tokens: [...] integers.
      known: [...] bool, False where the token is masked and its value ignored;
        None for all True.

    Returns:
      [..., w] float32; NaN for known tokens outside of the codebook.
    """
    levels = self.vocabulary.levels
    sizes = [level + 1 for level in levels]
    table = _table(self, sum(sizes), self.width)
    offsets = [0, *itertools.accumulate(sizes)]
    indices = self.vocabulary.to_levels(tokens)
    embedded = 0.0
    for i, level in enumerate(levels):
      rows = indices[..., i]
      if known is not None:
        rows = jnp.where(known, rows, level)
      part = table[offsets[i] : offsets[i + 1]]
      embedded += _take(part, rows)
    return embedded


class TableEmbedding(nn.Module):
  """One row per code and one for masked tokens, K + 1 rows.

  Used for tokens without levels, and for comparison.
  """

  vocabulary: vocabularies.Vocabulary
  width: int

  def setup(self):
    self.table = _table(self, self.vocabulary.codebook_size + 1, self.width)

  def __call__(
      self, tokens: jax.Array, known: jax.Array | None
  ) -> jax.Array:
    """Embeds tokens; arguments and result as in `LevelEmbedding`."""
    # int32 first: K itself may not fit in the dtype of the tokens.
    tokens = vocabularies.as_int32(tokens, 'tokens')
    size = self.vocabulary.codebook_size
    rows = jnp.where(tokens < size, tokens, -1)
    if known is not None:
      rows = jnp.where(known, rows, size)
    return _take(self.table, rows)

  def codes(self) -> jax.Array:
    """Returns the rows of the codes, [K, w] float32, to tie an output to."""
    return self.table[: self.vocabulary.codebook_size]


class ClassEmbedding(nn.Module):
  """One row per class and a dedicated null row, C + 1 rows."""

  num_classes: int
  width: int

  @nn.compact
  def __call__(self, labels: jax.Array) -> jax.Array:
    """Embeds labels.

    Args:
      labels: [B] integers in [0, C), or negative for the null row.

    Returns:
      [B, w] float32; NaN for labels >= C.
    """
    table = _table(self, self.num_classes + 1, self.width)
    labels = vocabularies.as_int32(labels, 'labels')
    rows = jnp.where(labels < self.num_classes, labels, self.num_classes + 1)
    return _take(table, jnp.where(labels < 0, self.num_classes, rows))


def check_labels(labels: np.ndarray, num_classes: int) -> None:
  """Raises ValueError unless labels are in [0, C) or -1; for host arrays."""
  labels = np.asarray(labels)
  if labels.dtype.kind not in 'iu' or not labels.size:
    raise ValueError(
        f'labels are {labels.dtype}{list(labels.shape)}; give one integer or'
        ' more.'
    )
  outside = (labels < NO_LABEL) | (labels >= num_classes)
  if np.any(outside):
    allowed = f'0 to {num_classes - 1}, and {NO_LABEL} for no class'
    if not num_classes:
      allowed = f'{NO_LABEL}, since the model has no classes'
    raise ValueError(
        f'labels contain {labels[outside][0]}; allowed are {allowed}.'
    )
