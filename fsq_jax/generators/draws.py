"""Drawing from logits: temperature, top-k, top-p, in this order."""

import dataclasses

import jax
from jax import numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
  """How an index is drawn from logits.

  With heads that factorize a token, the rule applies to each level index.

  Attributes:
    temperature: divides the logits, >= 0; 0 takes the largest logit.
    top_k: keeps the k largest logits; 0 keeps all.
    top_p: keeps the smallest set of largest probabilities whose sum reaches p,
      after temperature and top-k; in (0, 1], 1 keeps all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(
          f'temperature is {self.temperature}; use a finite number >= 0.'
      )
    if self.top_k < 0:
      raise ValueError(f'top_k is {self.top_k}; use 1 or more, or 0 for all.')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p is {self.top_p}; use a number in (0, 1].')


def draw_index(
    logits: jax.Array, noise: jax.Array, draw: Draw
) -> tuple[jax.Array, jax.Array]:
  """Draws an index from each row of logits, by the Gumbel-max trick.

  Args:
    logits: [..., L] float32, guidance included.
    noise: [..., L] float32, standard Gumbel; not used at temperature 0.
    draw: the rule.

  Returns:
    int32 indices [...], and their log-probabilities [...] in nats under
    softmax(logits), before temperature, top-k and top-p.

  Raises:
    ValueError: logits that are not float32. In bfloat16 large codebooks are
      sampled wrongly, since Gumbel noise has 128 values.
  """
  if logits.dtype != jnp.float32:
    raise ValueError(f'logits are {logits.dtype}; cast them to float32.')
  scores = logits
  if draw.temperature > 0:
    kept = keep_top_p(
        keep_top_k(logits / draw.temperature, draw.top_k), draw.top_p
    )
    scores = kept + noise
  indices = jnp.argmax(scores, axis=-1).astype(jnp.int32)
  return indices, log_probability(logits, indices)


def log_probability(logits: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns log softmax(logits)[index], [...] float32 in nats.

  Args:
    logits: [..., L] float32.
    indices: [...] integers in [0, L).
  """
  chosen = jnp.take_along_axis(logits, indices[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
  """Returns logits [..., L] with all below the k-th largest at -inf.

  Logits equal to the k-th largest are kept. k = 0 keeps all.
  """
  if not 0 < k < logits.shape[-1]:
    return logits
  lowest = jax.lax.top_k(logits, k)[0][..., -1:]
  return jnp.where(logits < lowest, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
  """Returns logits [..., L] outside of the nucleus of mass p at -inf.

  An index is kept while the sum of all larger probabilities is below p, so the
  largest one always is; equal logits are kept together. p = 1 keeps all.
  """
  if p >= 1:
    return logits
  ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
  probabilities = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept = jnp.where(before < p, ordered, jnp.inf)
  lowest = jnp.min(kept, axis=-1, keepdims=True)
  return jnp.where(logits < lowest, -jnp.inf, logits)
