"""Count-based baselines of held-out bits per token, from arrays of tokens.

Every baseline interpolates counts in a context with a coarser distribution,

  p(x | context) = (count(context, x) + a parent(x)) / (count(context) + a),

with one weight a per baseline, the power of 2 that maximizes the leave-one-out
likelihood of the training tokens. So there is nothing to tune, and unseen
tokens have a probability.
"""

from typing import NamedTuple

import numpy as np

DEFINITIONS = {
    'uniform': 'log2 of the codebook size',
    'unigram': 'frequencies of the tokens in the training images',
    'class_position_unigram': (
        'frequencies per class and grid cell, interpolated with frequencies per'
        ' cell, which are interpolated with the unigram'
    ),
    'left_neighbour': (
        'frequencies given the token to the left, interpolated with the'
        ' unigram; the first column has the unigram'
    ),
}
_WEIGHTS = 2.0 ** np.arange(-6, 25)


class Baselines(NamedTuple):
  """Held-out code lengths in bits per token; see `DEFINITIONS`."""

  uniform: float
  unigram: float
  class_position_unigram: float
  left_neighbour: float


class _Fit(NamedTuple):
  """Probabilities under an interpolated distribution.

  Attributes:
    train: of the training tokens, each left out of the counts.
    test: of the test tokens.
  """

  train: np.ndarray
  test: np.ndarray


def measure(
    train_tokens: np.ndarray,
    train_labels: np.ndarray,
    test_tokens: np.ndarray,
    test_labels: np.ndarray,
    codebook_size: int,
) -> Baselines:
  """Fits the baselines on training tokens and evaluates them on test tokens.

  Args:
    train_tokens: [M, rows, columns] integers in [0, K).
    train_labels: [M] integers, -1 for no class.
    test_tokens: [M', rows, columns] integers.
    test_labels: [M'] integers.
    codebook_size: K.

  Returns:
    Bits per test token.

  Raises:
    ValueError: other shapes, or tokens outside of the codebook.
  """
  sets = [
      (np.asarray(tokens).astype(np.int64), np.asarray(labels, np.int64))
      for tokens, labels in (
          (train_tokens, train_labels), (test_tokens, test_labels)
      )
  ]
  for tokens, labels in sets:
    if (
        tokens.ndim != 3
        or tokens.shape[1:] != sets[0][0].shape[1:]
        or labels.shape != tokens.shape[:1]
    ):
      raise ValueError(
          f'Tokens have shape {tokens.shape} and labels {labels.shape}; use'
          ' [M, rows, columns] of one grid and [M].'
      )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < codebook_size:
      raise ValueError(
          f'tokens range from {tokens.min()} to {tokens.max()}; allowed are 0'
          f' to {codebook_size - 1}.'
      )
  tokens = [x.ravel() for x, _ in sets]
  uniform = _Fit(*(np.full(len(x), 1 / codebook_size) for x in tokens))
  unigram = _interpolate([np.zeros_like(x) for x in tokens], tokens, uniform)
  cells = [_cells(x).ravel() for x, _ in sets]
  position = _interpolate(cells, tokens, unigram)
  classes = [
      ((labels + 1)[:, None, None] * x[0].size + _cells(x)).ravel()
      for x, labels in sets
  ]
  class_position = _interpolate(classes, tokens, position)
  left = _interpolate([_left(x).ravel() for x, _ in sets], tokens, unigram)
  is_first = _left(sets[1][0]).ravel() < 0
  return Baselines(
      uniform=float(np.log2(codebook_size)),
      unigram=_bits(unigram.test),
      class_position_unigram=_bits(class_position.test),
      left_neighbour=_bits(np.where(is_first, unigram.test, left.test)),
  )


def _cells(tokens: np.ndarray) -> np.ndarray:
  """Returns the raster position of each token, in the shape of the tokens."""
  cells = np.arange(tokens.shape[1] * tokens.shape[2])
  return np.broadcast_to(cells.reshape(tokens.shape[1:]), tokens.shape)


def _left(tokens: np.ndarray) -> np.ndarray:
  """Returns the token to the left of each token, -1 in the first column."""
  return np.pad(tokens[:, :, :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1)


def _bits(probabilities: np.ndarray) -> float:
  return float(-np.mean(np.log2(probabilities)))


def _interpolate(
    contexts: list[np.ndarray], tokens: list[np.ndarray], parent: _Fit
) -> _Fit:
  """Interpolates counts per context with the parent's probabilities.

  Args:
    contexts: int64 context of each training and each test token, >= -1.
    tokens: int64 training and test tokens.
    parent: probabilities of all tokens under the coarser distribution, which
      depend on context and token only.
  """
  size = max(x.max(initial=0) for x in tokens) + 1
  pairs = [
      (context + 1) * size + x
      for context, x in zip(contexts, tokens, strict=True)
  ]
  known, first, inverse, counts = np.unique(
      pairs[0], return_index=True, return_inverse=True, return_counts=True
  )
  totals_of, totals = np.unique(contexts[0], return_counts=True)
  of_pair = totals[np.searchsorted(totals_of, contexts[0][first])]
  prior = parent.train[first]

  def left_out(weight):
    # A context with a single token has counts of 0 without it.
    return (counts - 1 + weight * prior) / (of_pair - 1 + weight)

  weight = max(_WEIGHTS, key=lambda w: np.sum(counts * np.log(left_out(w))))
  test_counts = _look_up(known, counts, pairs[1])
  test_totals = _look_up(totals_of, totals, contexts[1])
  return _Fit(
      train=left_out(weight)[inverse],
      test=(test_counts + weight * parent.test) / (test_totals + weight),
  )


def _look_up(
    keys: np.ndarray, values: np.ndarray, queries: np.ndarray
) -> np.ndarray:
  """Returns the value of each query in sorted keys, 0 where it is missing."""
  places = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
  return np.where(keys[places] == queries, values[places], 0)
