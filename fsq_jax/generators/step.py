"""One training step of a generator."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from einops import rearrange
import jax
from jax import numpy as jnp

from fsq_jax.generators import model as models
from fsq_jax.generators import objectives
from fsq_jax.train import state as train_state


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
  """Takes training steps; `take_step` is a pure function.

  Attributes:
    model: masked or causal.
    objective: options of the training loss.
    update: updates the parameters.
    seed: random numbers depend on seed and step only.
    accumulation_steps: parts of a batch, whose gradients are averaged.
  """

  model: models.TokenModel
  objective: objectives.Objective
  update: train_state.Update
  seed: int
  accumulation_steps: int

  def take_step(
      self, state: train_state.TrainState, batch: Mapping[str, jax.Array]
  ) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
    """Takes one step.

    Args:
      state: before the step.
      batch: 'tokens' [B, N] and 'labels' [B], int32.

    Returns:
      The next state and float32 scalars, means over the global batch: 'loss'
      and 'nll' in nats per token. If the loss or the gradient is not finite,
      the step is skipped: only the counters of the state change.
    """
    key = jax.random.fold_in(jax.random.key(self.seed), state.step)
    num_parts = self.accumulation_steps
    if num_parts == 1:
      gradients, scalars = self._differentiate(state.params, batch, key)
    else:
      # Strided, so that every device splits its own images.
      parts = jax.tree.map(
          lambda x: rearrange(x, '(b k) ... -> k b ...', k=num_parts), batch
      )

      def add(total, part):
        gradients, scalars = self._differentiate(state.params, *part)
        return jax.tree.map(jnp.add, total, gradients), scalars

      total, scalars = jax.lax.scan(
          add,
          jax.tree.map(jnp.zeros_like, state.params),
          (parts, jax.random.split(key, num_parts)),
      )
      gradients = jax.tree.map(lambda x: x / num_parts, total)
      scalars = jax.tree.map(jnp.mean, scalars)
    return self.update.apply(state, gradients, scalars)

  def _differentiate(
      self, params: Any, batch: Mapping[str, jax.Array], key: jax.Array
  ) -> tuple[Any, dict[str, jax.Array]]:
    def loss(params):
      return objectives.loss(
          self.model, {'params': params}, batch['tokens'], batch['labels'],
          key, self.objective,
      )

    (value, scalars), gradients = jax.value_and_grad(loss, has_aux=True)(
        params
    )
    return gradients, {'loss': value, **scalars}
