"""The interface of output heads: features to distributions over tokens."""

from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.generators import draws
from fsq_jax.generators import vocabulary as vocabularies


class CrossEntropy(NamedTuple):
  """Loss of each token, in nats, float32 [...].

  Attributes:
    nll: -log p(token), without label smoothing.
    smoothed: the training loss, with label smoothing.
  """

  nll: jax.Array
  smoothed: jax.Array


class Head(nn.Module):
  """Distribution over the K codes at each position.

  Logits, softmax and sampling are float32 whatever the dtype of matmuls.

  Attributes:
    vocabulary: of the tokens.
    width: channels of the features, w.
    dtype: of matmuls.
  """

  vocabulary: vocabularies.Vocabulary
  width: int
  dtype: Any

  def cross_entropy(
      self, features: jax.Array, tokens: jax.Array, smoothing: float = 0.0
  ) -> CrossEntropy:
    """Returns the loss of given tokens, teacher-forced within each token.

    Args:
      features: [..., w].
      tokens: [...] integers; the loss is NaN outside of [0, K).
      smoothing: label smoothing in [0, 1). Heads over levels smooth the target
        of each level.
    """
    raise NotImplementedError

  def sample(
      self,
      features: jax.Array,
      keys: jax.Array,
      *,
      draw: draws.Draw,
      null_features: jax.Array | None = None,
      scale: jax.typing.ArrayLike = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    """Draws a token at each position.

    Args:
      features: [B, N, w].
      keys: [B, N] typed keys.
      draw: temperature, top-k and top-p, applied after guidance.
      null_features: [B, N, w] features without the class, for guidance; None
        without guidance.
      scale: of the guidance, scalar.

    Returns:
      int32 tokens [B, N], and their log-probabilities [B, N] in nats under the
      guided logits, before temperature, top-k and top-p. Without guidance they
      equal -`cross_entropy(features, tokens).nll`.
    """
    raise NotImplementedError

  def all_log_probabilities(self, features: jax.Array) -> jax.Array:
    """Returns log p of every code, [..., K] float32 in nats; for small K.

    Args:
      features: [..., w].
    """
    size = self.vocabulary.codebook_size
    shape = (*features.shape[:-1], size)
    features = jnp.broadcast_to(
        features[..., None, :], (*shape, self.width)
    )
    tokens = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), shape)
    return -self.cross_entropy(features, tokens).nll


def softmax_cross_entropy(
    logits: jax.Array, targets: jax.Array, smoothing: float
) -> CrossEntropy:
  """Cross-entropy of one softmax.

  Label smoothing in closed form: (1 - e) nll + e mean_k(-log p_k).

  Args:
    logits: [..., L] float32.
    targets: [...] int32; NaN losses outside of [0, L).
    smoothing: e, in [0, 1).
  """
  size = logits.shape[-1]
  is_valid = (targets >= 0) & (targets < size)
  nll = -draws.log_probability(logits, jnp.where(is_valid, targets, 0))
  nll = jnp.where(is_valid, nll, jnp.nan)
  smoothed = nll
  if smoothing:
    uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    smoothed = (1 - smoothing) * nll + smoothing * uniform
  return CrossEntropy(nll, smoothed)
