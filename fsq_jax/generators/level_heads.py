"""Heads over the level indices of a token: sum(L) logits instead of K."""

import itertools

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.generators import dense
from fsq_jax.generators import draws
from fsq_jax.generators import guidance
from fsq_jax.generators import heads
from fsq_jax.generators import keys as key_lib
from fsq_jax.runtime import partitioning

_EPSILON = 1e-6
# Above this many dimensions one MLP serves all of them.
_MAX_SEPARATE = 8


class _LevelHead(heads.Head):
  """A softmax per dimension, computed dimension by dimension.

  Subclasses define `_logits` and `_follow`. Training and sampling call the same
  two functions, so that both see the same distribution.
  """

  def setup(self):
    levels = self.vocabulary.levels
    if not levels:
      raise ValueError(
          f'{type(self).__name__} needs tokens with levels; use the head flat.'
      )
    ends = list(itertools.accumulate(levels))
    self.columns = [
        slice(end - n, end) for end, n in zip(ends, levels, strict=True)
    ]
    # Zeros: the first loss is exactly sum_i ln L_i = ln K.
    zeros = nn.initializers.zeros
    shape = (self.width, ends[-1])
    self.kernel = self.param('kernel', zeros, shape, jnp.float32)
    self.bias = self.param('bias', zeros, shape[1:], jnp.float32)

  def _logits(self, i: int, context: jax.Array) -> jax.Array:
    """Returns float32 logits [..., L_i] of dimension i, given its context."""
    raise NotImplementedError

  def _follow(self, i: int, context: jax.Array, level: jax.Array) -> jax.Array:
    """Returns the context [..., w] of dimension i + 1, given level index i."""
    raise NotImplementedError

  def _project(self, i: int, x: jax.Array) -> jax.Array:
    """Returns float32 logits [..., L_i] of the features of dimension i."""
    columns = self.columns[i]
    kernel = partitioning.gather_parameter(self.kernel)[:, columns]
    logits = jnp.einsum(
        '...w,wl->...l',
        x.astype(self.dtype),
        kernel.astype(self.dtype),
        preferred_element_type=jnp.float32,
    )
    return logits + self.bias[columns]

  def cross_entropy(
      self, features: jax.Array, tokens: jax.Array, smoothing: float = 0.0
  ) -> heads.CrossEntropy:
    levels = self.vocabulary.to_levels(tokens)
    context, losses = features, []
    for i in range(len(self.columns)):
      if i:
        context = self._follow(i - 1, context, levels[..., i - 1])
      logits = self._logits(i, context)
      losses.append(
          heads.softmax_cross_entropy(logits, levels[..., i], smoothing)
      )
    return heads.CrossEntropy(*(sum(x) for x in zip(*losses, strict=True)))

  def sample(
      self,
      features: jax.Array,
      keys: jax.Array,
      *,
      draw: draws.Draw,
      null_features: jax.Array | None = None,
      scale: jax.typing.ArrayLike = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    # Both branches of the guidance are given the same sampled level indices.
    contexts = [features, null_features]
    levels, log_probs = [], 0.0
    noise = key_lib.gumbel(keys, sum(self.vocabulary.levels))
    for i in range(len(self.columns)):
      if i:
        contexts = [
            None if x is None else self._follow(i - 1, x, levels[-1])
            for x in contexts
        ]
      conditional, unconditional = (
          None if x is None else self._logits(i, x) for x in contexts
      )
      level, log_prob = draws.draw_index(
          guidance.combine(conditional, unconditional, scale),
          noise[..., self.columns[i]],
          draw,
      )
      levels.append(level)
      log_probs += log_prob
    return self.vocabulary.to_tokens(levels), log_probs


class IndependentLevels(_LevelHead):
  """log p(token | h) = sum_i log p(level_i | h); for comparison.

  It cannot represent two codes that differ in two dimensions without giving
  probability to their mixtures.
  """

  def _logits(self, i: int, context: jax.Array) -> jax.Array:
    return self._project(i, context)

  def _follow(self, i: int, context: jax.Array, level: jax.Array) -> jax.Array:
    del i, level
    return context


class AutoregressiveLevels(_LevelHead):
  """log p(token | h) = sum_i log p(level_i | h, level_1 ... level_{i-1}).

  Exact and normalized over all K codes. With contexts c_1 = h and c_{i+1} =
  c_i + E_i[level_i], the logits of dimension i are a linear map of
  y + MLP_i(y), y = RMSNorm(c_i) + position_i: TokenBridge (arXiv 2503.16430)
  with an MLP in place of its small transformer. Up to 8 dimensions have an MLP
  of their own; more dimensions share one.
  """

  def setup(self):
    super().setup()
    count, width = len(self.vocabulary.levels), self.width
    groups = count if count <= _MAX_SEPARATE else 1
    init = dense.kernel_init(width)
    shape = (groups, width, width)
    self.norm = nn.RMSNorm(epsilon=_EPSILON, dtype=jnp.float32)
    self.mlp_in = self.param('mlp_in_kernel', init, shape, jnp.float32)
    self.mlp_out = self.param('mlp_out_kernel', init, shape, jnp.float32)
    self.position = self.param(
        'position', nn.initializers.zeros, (count, width), jnp.float32
    )
    # The sum over dimensions has about the size of the normalized features.
    self.embedding = self.param(
        'embedding',
        nn.initializers.truncated_normal(count**-0.5),
        (sum(self.vocabulary.levels), width),
        jnp.float32,
    )

  def _logits(self, i: int, context: jax.Array) -> jax.Array:
    y = self.norm(context.astype(jnp.float32)) + self.position[i]
    y = y.astype(self.dtype)
    mlp_in, mlp_out = (
        partitioning.gather_parameter(x)[i % len(x)].astype(self.dtype)
        for x in (self.mlp_in, self.mlp_out)
    )
    hidden = nn.gelu(jnp.einsum('...w,wv->...v', y, mlp_in))
    return self._project(i, y + jnp.einsum('...v,vw->...w', hidden, mlp_out))

  def _follow(self, i: int, context: jax.Array, level: jax.Array) -> jax.Array:
    table = partitioning.gather_parameter(self.embedding)[self.columns[i]]
    embedded = jnp.take(table, jnp.maximum(level, 0), axis=0, mode='clip')
    return context + embedded.astype(context.dtype)
