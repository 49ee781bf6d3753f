"""Heads with one softmax over all K codes, in chunks of positions."""

from collections.abc import Callable
from typing import Any

from einops import rearrange
from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.generators import dense
from fsq_jax.generators import draws
from fsq_jax.generators import embeddings
from fsq_jax.generators import guidance
from fsq_jax.generators import heads
from fsq_jax.generators import keys as key_lib
from fsq_jax.generators import vocabulary as vocabularies
from fsq_jax.runtime import partitioning

_EPSILON = 1e-6
# Logits that exist at a time, over all devices: 256 MiB of float32.
_MAX_LOGITS = 2**26


class Flat(heads.Head):
  """log p(token | h) = log softmax(W h), W zero-initialized, without bias.

  Loss and sampling compute the logits of a few positions of all examples at a
  time, and again in the backward pass: all logits of a batch of 256 x 256
  tokens with K = 64,000 would take 15.6 GiB.

  Attributes:
    max_logits: elements of the logits that exist at a time.
  """

  max_logits: int = _MAX_LOGITS

  def setup(self):
    shape = (self.width, self.vocabulary.codebook_size)
    self.kernel = self.param(
        'kernel', nn.initializers.zeros, shape, jnp.float32
    )

  def logits_function(self) -> Callable[[jax.Array], jax.Array]:
    """Returns the pure function of features [..., w] to logits [..., K]."""
    kernel = partitioning.gather_parameter(self.kernel).astype(self.dtype)

    def compute(features: jax.Array) -> jax.Array:
      return jnp.einsum(
          '...w,wk->...k',
          features.astype(self.dtype),
          kernel,
          preferred_element_type=jnp.float32,
      )

    return compute

  def cross_entropy(
      self, features: jax.Array, tokens: jax.Array, smoothing: float = 0.0
  ) -> heads.CrossEntropy:
    logits = self.logits_function()
    tokens = vocabularies.as_int32(tokens, 'tokens')

    def compute(features, tokens):
      return heads.softmax_cross_entropy(logits(features), tokens, smoothing)

    return self._in_chunks(compute, features, tokens)

  def sample(
      self,
      features: jax.Array,
      keys: jax.Array,
      *,
      draw: draws.Draw,
      null_features: jax.Array | None = None,
      scale: jax.typing.ArrayLike = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    logits = self.logits_function()

    def compute(features, null_features, keys):
      unconditional = None if null_features is None else logits(null_features)
      combined = guidance.combine(logits(features), unconditional, scale)
      noise = key_lib.gumbel(keys, combined.shape[-1])
      return draws.draw_index(combined, noise, draw)

    return self._in_chunks(compute, features, null_features, keys)

  def all_log_probabilities(self, features: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(self.logits_function()(features), axis=-1)

  def _in_chunks(
      self, function: Callable[..., Any], features: jax.Array, *others: Any
  ) -> Any:
    """Maps a function over chunks of positions.

    Positions are chunked and not examples, since a mesh shards examples.

    Args:
      function: of [B, n, ...] arrays to a tree of [B, n] arrays.
      features: [B, N, w].
      *others: more trees of arrays [B, N, ...].

    Returns:
      Tree of [B, N] arrays.
    """
    batch_size, num_tokens = features.shape[:2]
    size = _chunk_size(
        batch_size * self.vocabulary.codebook_size, num_tokens, self.max_logits
    )
    if size == num_tokens:
      return function(features, *others)
    chunks = jax.tree.map(
        lambda x: rearrange(x, 'b (m n) ... -> m b n ...', n=size),
        (features, *others),
    )
    results = jax.lax.map(lambda x: jax.checkpoint(function)(*x), chunks)
    return jax.tree.map(lambda x: rearrange(x, 'm b n -> b (m n)'), results)


class TiedFlat(Flat):
  """The output head of BERT and MaskGIT, tied to the embedding table.

  log softmax(E t(h) + b) with t = LayerNorm(GELU(dense(h))) and E the K rows of
  the codes.

  Attributes:
    embedding: table of the input tokens.
  """

  embedding: embeddings.TableEmbedding | None = None

  def setup(self):
    self.transform = nn.Dense(
        self.width, dtype=self.dtype, kernel_init=dense.kernel_init(self.width)
    )
    self.norm = nn.LayerNorm(epsilon=_EPSILON, dtype=jnp.float32)
    self.bias = self.param(
        'bias', nn.initializers.zeros, (self.vocabulary.codebook_size,),
        jnp.float32,
    )

  def logits_function(self) -> Callable[[jax.Array], jax.Array]:
    codes = self.embedding.codes().astype(self.dtype)
    bias = self.bias

    def compute(features: jax.Array) -> jax.Array:
      return bias + jnp.einsum(
          '...w,kw->...k',
          features,
          codes,
          preferred_element_type=jnp.float32,
      )

    return compute

  def cross_entropy(
      self, features: jax.Array, tokens: jax.Array, smoothing: float = 0.0
  ) -> heads.CrossEntropy:
    return super().cross_entropy(self._transform(features), tokens, smoothing)

  def sample(
      self,
      features: jax.Array,
      keys: jax.Array,
      *,
      draw: draws.Draw,
      null_features: jax.Array | None = None,
      scale: jax.typing.ArrayLike = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    if null_features is not None:
      null_features = self._transform(null_features)
    return super().sample(
        self._transform(features), keys, draw=draw,
        null_features=null_features, scale=scale,
    )

  def all_log_probabilities(self, features: jax.Array) -> jax.Array:
    return super().all_log_probabilities(self._transform(features))

  def _transform(self, features: jax.Array) -> jax.Array:
    hidden = nn.gelu(self.transform(features.astype(self.dtype)))
    return self.norm(hidden.astype(jnp.float32)).astype(self.dtype)


def _chunk_size(logits_per_position: int, num_tokens: int, most: int) -> int:
  """Returns the largest divisor of N whose chunk has at most `most` logits."""
  limit = max(most // logits_per_position, 1)
  return max(
      n
      for n in range(1, num_tokens + 1)
      if num_tokens % n == 0 and n <= limit
  )
