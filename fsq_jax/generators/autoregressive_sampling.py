"""Sampling from causal models in raster order."""

import dataclasses
from typing import Any

from einops import rearrange
import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.generators import attention
from fsq_jax.generators import draws
from fsq_jax.generators import embeddings
from fsq_jax.generators import guidance as guidance_lib
from fsq_jax.generators import keys as key_lib
from fsq_jax.generators import model as models
from fsq_jax.generators import sampled
from fsq_jax.generators import vocabulary as vocabularies
from fsq_jax.runtime import partitioning

CACHES = ('static', 'none')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveSampling:
  """Options of autoregressive sampling.

  Attributes:
    draw: temperature, top-k and top-p of each token.
    guidance: classifier-free guidance; step n of N predicts position n.
    cache: 'static': keys and values of N positions, N model calls on one token;
      'none': N model calls on all tokens, for comparison.
  """

  draw: draws.Draw = dataclasses.field(default_factory=draws.Draw)
  guidance: guidance_lib.Guidance = dataclasses.field(
      default_factory=guidance_lib.Guidance
  )
  cache: str = 'static'

  def __post_init__(self):
    if self.cache not in CACHES:
      raise ValueError(f'cache is {self.cache!r}; known: {list(CACHES)}.')


def sample(
    model: models.TokenModel,
    variables: Any,
    labels: jax.Array,
    key: jax.Array,
    *,
    options: AutoregressiveSampling,
    examples: jax.Array | None = None,
    tokens: jax.Array | None = None,
    num_given: jax.Array | None = None,
) -> sampled.Samples:
  """Samples token grids of a causal model, or completes given prefixes.

  A pure function: use it under jit with `model` and `options` static. Check
  labels and tokens from outside first with `embeddings.check_labels` and
  `Vocabulary.check`, since compiled functions cannot raise.

  Args:
    model: with a causal architecture.
    variables: of the model.
    labels: [B] integers in [0, C), -1 for no class.
    key: random key of all samples.
    options: sampling options.
    examples: [B] integers, the number of each example, 0 ... B - 1 by default.
      An example depends on its number and the key, not on its batch.
    tokens: [B, N] integers whose first tokens are given; None to generate all.
    num_given: [B] integers in [0, N], how many of the first tokens in raster
      order are given. A causal model can be given nothing else.

  Returns:
    The samples; `steps` are raster positions.
  """
  if not model.architecture.causal:
    raise ValueError('The model is masked; use masked_sampling.')
  if (tokens is None) != (num_given is None):
    raise ValueError('Give both tokens and num_given, or neither.')
  # Signed: the label of no class is -1.
  labels = vocabularies.as_int32(labels, 'labels')
  shape = (labels.shape[0], model.num_tokens)
  if tokens is None:
    tokens = jnp.zeros(shape, jnp.int32)
    num_given = jnp.zeros(shape[:1], jnp.int32)
  if examples is None:
    examples = jnp.arange(shape[0])
  positions = jnp.arange(model.num_tokens, dtype=jnp.int32)
  is_given = positions < jnp.asarray(num_given)[:, None]
  tokens, log_probs = _sample(
      model, variables, labels, key_lib.fold(key, examples), options,
      vocabularies.as_int32(tokens, 'tokens'), is_given,
  )
  steps = jnp.where(is_given, -1, positions)
  return sampled.Samples(tokens, log_probs, steps)


def _sample(
    model, variables, labels, keys, options, tokens, is_given
) -> tuple[jax.Array, jax.Array]:
  """Scans the positions; returns tokens and log-probabilities, [B, N]."""
  num_tokens = model.num_tokens
  rule = options.guidance
  if rule.is_active:
    null = jnp.full_like(labels, embeddings.NO_LABEL)
    labels = guidance_lib.double(labels, null)
  next_features = _build_next_features(model, variables, labels, options)

  def take_step(carry, inputs):
    cache, tokens = carry
    position, scale, given = inputs
    doubled = guidance_lib.double(tokens, tokens) if rule.is_active else tokens
    features, cache = next_features(doubled, cache, position)
    pair = (features, None)
    if rule.is_active:
      pair = rearrange(features, '(b g) n w -> g b n w', g=2)
    drawn, log_probs = model.apply(
        variables, pair[0], key_lib.fold(keys, position)[:, None],
        draw=options.draw, null_features=pair[1], scale=scale, method='sample',
    )
    old = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
    tokens = jax.lax.dynamic_update_slice_in_dim(
        tokens, jnp.where(given[:, None], old, drawn), position, axis=1
    )
    return (cache, tokens), jnp.where(given, 0.0, log_probs[:, 0])

  cache = None
  if options.cache == 'static':
    # Of the labels, since constants are on no mesh and would be replicated.
    zeros = (0 * labels)[:, None, None, None]
    cache = jax.tree.map(
        jax.vmap(
            lambda x: partitioning.constrain(
                x + zeros.astype(x.dtype), tensor_axis=1
            )
        ),
        attention.empty_cache(model.architecture, labels.shape[0], num_tokens),
    )
  scales = rule.scales(np.arange(num_tokens) / num_tokens)
  (_, tokens), log_probs = jax.lax.scan(
      take_step, (cache, tokens),
      (jnp.arange(num_tokens), jnp.asarray(scales), is_given.T),
  )
  return tokens, log_probs.T


def _build_next_features(model, variables, labels, options):
  """Returns the function of tokens, cache and position to features [B, 1, w].

  The cache is returned too. Only tokens before the position are read.
  """
  if options.cache == 'none':

    def recompute(tokens, cache, position):
      features = model.apply(
          variables, tokens, labels, None, method='features'
      )
      return jax.lax.dynamic_slice_in_dim(features, position, 1, axis=1), cache

    return recompute

  def extend(tokens, cache, position):
    previous = jax.lax.dynamic_index_in_dim(
        tokens, jnp.maximum(position - 1, 0), axis=1, keepdims=False
    )
    return model.apply(
        variables, previous, labels, cache, position, method='step'
    )

  return extend
