"""The result of the samplers."""

from typing import NamedTuple

import jax


class Samples(NamedTuple):
  """Sampled token grids.

  Attributes:
    tokens: int32 [B, N]; given tokens are unchanged.
    log_probs: float32 [B, N], nats, log p of each token under the guided logits
      of the step that drew it; 0 for given tokens.
    steps: int32 [B, N], the step, counted from 0, that drew each token; -1 for
      given tokens.
  """

  tokens: jax.Array
  log_probs: jax.Array
  steps: jax.Array
