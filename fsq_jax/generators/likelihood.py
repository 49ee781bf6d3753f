"""Likelihoods of token grids in bits: exact, bounds, and compression cost.

All are of unsmoothed probabilities. "Bits" are of the tokens given the class,
not of the image.
"""

import math
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.generators import keys as key_lib
from fsq_jax.generators import masking
from fsq_jax.generators import model as models
from fsq_jax.generators import orders
from fsq_jax.generators import schedules

# The FSQ paper's compression cost: group sizes grow as (t + 1)^2.2 (M2T,
# arXiv 2304.07313).
COMPRESSION_STEPS = 12
_COMPRESSION_ALPHA = 2.2


def exact_bits(
    model: models.TokenModel,
    variables: Any,
    tokens: jax.Array,
    labels: jax.Array,
) -> jax.Array:
  """Returns -log2 p(token | class, earlier tokens) of a causal model.

  Args:
    model: with a causal architecture.
    variables: of the model.
    tokens: [B, N] integers.
    labels: [B] integers in [0, C), -1 for no class.

  Returns:
    float32 [B, N]; the sum over N is the exact code length of an image.
  """
  losses = model.apply(
      variables, tokens, labels, None, method='cross_entropy'
  )
  return losses.nll / math.log(2)


def any_order_bits(
    model: models.TokenModel,
    variables: Any,
    tokens: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    num_draws: int,
    examples: jax.Array | None = None,
) -> jax.Array:
  """Estimates the any-order bound of a masked model.

  -log p(tokens) <= E_n E_mask (N / n) sum_masked -log p(token | known), with n
  uniform on 1 ... N and a uniform mask of n positions: the mean code length
  over all orders, one token at a time. The estimate is unbiased. Draws of n are
  stratified: draw j of J takes n from the j-th of J equal parts.

  Args:
    model: with a non-causal architecture.
    variables: of the model.
    tokens: [B, N] integers.
    labels: [B] integers in [0, C), -1 for no class.
    key: random key.
    num_draws: masks per image, J; the cost is J model calls.
    examples: [B] integers, the number of each example, 0 ... B - 1 by default;
      the masks of an example depend on its number and the key.

  Returns:
    float32 [B] bits per image.
  """
  batch_size, num_tokens = tokens.shape
  if examples is None:
    examples = jnp.arange(batch_size)
  keys = key_lib.fold(key, examples)

  def add(total, draw):
    draw_keys = key_lib.fold(keys, draw)
    # Stratified in float32: exact enough for N up to 2^20.
    place = (draw + key_lib.uniform(draw_keys)) / num_draws
    counts = jnp.floor(place * num_tokens).astype(jnp.int32) + 1
    counts = jnp.minimum(counts, num_tokens)
    position_keys = key_lib.fold(draw_keys[:, None], jnp.arange(num_tokens))
    known = masking.choose_known(key_lib.uniform(position_keys), counts)
    nll = model.apply(
        variables, tokens, labels, known, method='cross_entropy'
    ).nll
    masked = jnp.sum(jnp.where(known, 0.0, nll), axis=-1)
    return total + masked * num_tokens / counts, None

  total, _ = jax.lax.scan(add, jnp.zeros(batch_size), jnp.arange(num_draws))
  return total / (num_draws * math.log(2))


def compression_bits(
    model: models.TokenModel,
    variables: Any,
    tokens: jax.Array,
    labels: jax.Array,
    *,
    num_steps: int = COMPRESSION_STEPS,
    order: np.ndarray | None = None,
) -> jax.Array:
  """Returns the compression cost of the FSQ paper, a decodable code length.

  sum_t sum_{n in S_t} -log2 p(token_n | class, tokens of S_1 ... S_{t-1}), for
  groups S_t of sizes proportional to (t + 1)^2.2 along a fixed order.

  Args:
    model: with a non-causal architecture.
    variables: of the model.
    tokens: [B, N] integers.
    labels: [B] integers in [0, C), -1 for no class.
    num_steps: groups, T; N for one token at a time.
    order: [N] raster positions; the Halton order by default.

  Returns:
    float32 [B] bits per image.
  """
  order = orders.halton_order(model.grid) if order is None else order
  sizes = schedules.power_group_sizes(
      model.num_tokens, num_steps, _COMPRESSION_ALPHA
  )
  groups = np.empty(model.num_tokens, np.int32)
  groups[np.asarray(order)] = np.repeat(np.arange(num_steps), sizes)

  def add(total, step):
    known = jnp.broadcast_to(groups < step, tokens.shape)
    nll = model.apply(
        variables, tokens, labels, known, method='cross_entropy'
    ).nll
    return total + jnp.sum(jnp.where(groups == step, nll, 0.0), axis=-1), None

  total, _ = jax.lax.scan(
      add, jnp.zeros(tokens.shape[0]), jnp.arange(num_steps)
  )
  return total / math.log(2)
