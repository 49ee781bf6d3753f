"""Training losses of masked and causal models: pure functions of a batch."""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp

from fsq_jax.generators import masking
from fsq_jax.generators import model as models
from fsq_jax.generators import schedules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Options of the training loss.

  Attributes:
    class_dropout: probability of replacing a label by -1, per example, [0, 1].
    label_smoothing: in [0, 1); of each level with heads over levels.
    mask_schedule: of the masked fraction, see `schedules`; masked models only,
      like the next two.
    mask_floor: smallest masked fraction, in [0, 1).
    normalization: 'token' or 'example', see `masking.mean_loss`.
  """

  class_dropout: float = 0.1
  label_smoothing: float = 0.0
  mask_schedule: str = 'cosine'
  mask_floor: float = 0.0
  normalization: str = 'token'

  def __post_init__(self):
    schedules.get_schedule(self.mask_schedule)
    if self.normalization not in masking.NORMALIZATIONS:
      raise ValueError(
          f'normalization is {self.normalization!r}; known:'
          f' {list(masking.NORMALIZATIONS)}.'
      )
    for name, high in (
        ('class_dropout', 1.0),
        ('label_smoothing', 0.99),
        ('mask_floor', 0.99),
    ):
      if not 0 <= getattr(self, name) <= high:
        raise ValueError(
            f'{name} is {getattr(self, name)}; use a number in [0, {high:g}].'
        )


def loss(
    model: models.TokenModel,
    variables: Any,
    tokens: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    objective: Objective,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the training loss of a batch.

  The loss of a masked model is the cross-entropy at masked positions, and of a
  causal one at all positions. Draws depend on the key only, not on how the
  batch is sharded.

  Args:
    model: masked or causal.
    variables: of the model.
    tokens: [B, N] integers of any width.
    labels: [B] integers in [0, C), -1 for no class.
    key: random key of masks, class dropout and dropout.
    objective: options.

  Returns:
    The loss, float32 scalar in nats per token, and float32 scalars: 'nll',
    nats per token at the same positions without label smoothing, and
    'masked_fraction'.
  """
  mask_key, label_key, dropout_key = jax.random.split(key, 3)
  labels = masking.drop_labels(label_key, labels, objective.class_dropout)
  known, weights = None, jnp.ones(tokens.shape, bool)
  if not model.architecture.causal:
    thresholds = schedules.training_thresholds(
        objective.mask_schedule, model.num_tokens, objective.mask_floor
    )
    known = masking.draw_known(mask_key, tokens.shape[0], thresholds)
    weights = ~known
  losses = model.apply(
      variables, tokens, labels, known,
      smoothing=objective.label_smoothing, train=True, method='cross_entropy',
      rngs={'dropout': dropout_key},
  )
  means = [
      masking.mean_loss(x, weights, objective.normalization)
      for x in (losses.smoothed, losses.nll)
  ]
  return means[0], {
      'nll': means[1],
      'masked_fraction': jnp.mean(weights.astype(jnp.float32)),
  }
