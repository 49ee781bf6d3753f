"""Sampling from masked models: generation, inpainting, outpainting, editing."""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.generators import draws
from fsq_jax.generators import guidance as guidance_lib
from fsq_jax.generators import keys as key_lib
from fsq_jax.generators import masking
from fsq_jax.generators import model as models
from fsq_jax.generators import orders
from fsq_jax.generators import sampled
from fsq_jax.generators import schedules
from fsq_jax.generators import vocabulary as vocabularies


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedSampling:
  """Options of masked sampling.

  Attributes:
    num_steps: T, 1 to N.
    schedule: how many tokens are masked after each step; see `schedules`.
    order: 'halton', 'random', or 'confidence': the tokens drawn with the
      highest log-probability become known first.
    choice_temperature: tau of the order 'confidence': tau (1 - (t + 1) / T)
      times Gumbel noise is added to the log-probabilities, >= 0.
    draw: temperature, top-k and top-p of each token.
    guidance: classifier-free guidance; the fraction of known tokens of its
      schedule 'linear' is computed for a grid without given tokens.
  """

  num_steps: int = 12
  schedule: str = 'cosine'
  order: str = 'halton'
  choice_temperature: float = 4.5
  draw: draws.Draw = dataclasses.field(default_factory=draws.Draw)
  guidance: guidance_lib.Guidance = dataclasses.field(
      default_factory=guidance_lib.Guidance
  )

  def __post_init__(self):
    schedules.get_schedule(self.schedule)
    if self.order not in orders.ORDERS:
      raise ValueError(
          f'order is {self.order!r}; known: {list(orders.ORDERS)}.'
      )
    if not 0 <= self.choice_temperature < float('inf'):
      raise ValueError(
          f'choice_temperature is {self.choice_temperature}; use a finite'
          ' number >= 0.'
      )


def sample(
    model: models.TokenModel,
    variables: Any,
    labels: jax.Array,
    key: jax.Array,
    *,
    options: MaskedSampling,
    examples: jax.Array | None = None,
    tokens: jax.Array | None = None,
    known: jax.Array | None = None,
) -> sampled.Samples:
  """Samples unknown tokens of a masked model.

  A pure function: use it under jit with `model` and `options` static. Check
  labels and tokens from outside first with `embeddings.check_labels` and
  `Vocabulary.check`, since compiled functions cannot raise.

  Args:
    model: with a non-causal architecture.
    variables: of the model.
    labels: [B] integers in [0, C), -1 for no class.
    key: random key of all samples.
    options: sampling options.
    examples: [B] integers, the number of each example, 0 ... B - 1 by default.
      An example depends on its number and the key, not on its batch.
    tokens: [B, N] integers, the given tokens; None to generate all.
    known: [B, N] bool, where `tokens` are given; they are never changed.

  Returns:
    The samples.
  """
  if model.architecture.causal:
    raise ValueError('The model is causal; use autoregressive_sampling.')
  if (tokens is None) != (known is None):
    raise ValueError('Give both tokens and known, or neither.')
  table = schedules.remaining_counts(
      options.schedule, model.num_tokens, options.num_steps
  )
  # Signed: the label of no class is -1.
  labels = vocabularies.as_int32(labels, 'labels')
  shape = (labels.shape[0], model.num_tokens)
  if tokens is None:
    tokens, known = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
  if examples is None:
    examples = jnp.arange(shape[0])
  tokens = vocabularies.as_int32(tokens, 'tokens')
  known = jnp.asarray(known, bool)
  unknown = jnp.sum(~known, axis=-1, dtype=jnp.int32)
  start = sampled.Samples(
      tokens, jnp.zeros(shape), jnp.full(shape, -1, jnp.int32)
  )
  return _sample(
      model, variables, labels, key_lib.fold(key, examples), options, start,
      known, jnp.asarray(table)[unknown],
  )


def _sample(
    model, variables, labels, keys, options, start, known, remaining
) -> sampled.Samples:
  """Scans the steps; `remaining` is [B, T], masked tokens after each step."""
  num_steps = options.num_steps
  steps = jnp.arange(num_steps)
  ranks = None
  if options.order != 'confidence':
    ranks = orders.fixed_ranks(
        options.order, model.grid, key_lib.fold(keys, num_steps)
    )
  full = schedules.remaining_counts(
      options.schedule, model.num_tokens, num_steps
  )[-1]
  known_fraction = 1 - np.append(model.num_tokens, full[:-1]) / model.num_tokens

  def take_step(carry, inputs):
    samples, known = carry
    step, left, scale = inputs
    step_keys = key_lib.fold(keys, step)
    candidates, log_probs = _draw_candidates(
        model, variables, labels, step_keys, options, samples.tokens, known,
        scale,
    )
    if ranks is None:
      noise = key_lib.gumbel(
          key_lib.fold(step_keys, model.num_tokens), model.num_tokens
      )
      progress = (step + 1) / num_steps
      priority = (
          log_probs + options.choice_temperature * (1 - progress) * noise
      )
    else:
      priority = -ranks.astype(jnp.float32)
    # Known tokens rank above all unknown tokens, whose number exceeds `left`
    # unless the example is complete; so exactly `left` tokens stay masked.
    priority = jnp.where(known, jnp.inf, priority)
    is_new = ~known & masking.choose_known(priority, left)
    samples = sampled.Samples(
        jnp.where(is_new, candidates, samples.tokens),
        jnp.where(is_new, log_probs, samples.log_probs),
        jnp.where(is_new, step.astype(jnp.int32), samples.steps),
    )
    return (samples, known | is_new), None

  inputs = (
      steps, remaining.T, jnp.asarray(options.guidance.scales(known_fraction))
  )
  (samples, _), _ = jax.lax.scan(take_step, (start, known), inputs)
  return samples


def _draw_candidates(
    model, variables, labels, keys, options, tokens, known, scale
) -> tuple[jax.Array, jax.Array]:
  """Returns a token for every position and its log-probability, [B, N]."""
  position_keys = key_lib.fold(keys[:, None], jnp.arange(model.num_tokens))
  features = guidance_lib.both_features(
      lambda labels, *x: model.apply(
          variables, x[0], labels, x[1], method='features'
      ),
      options.guidance, labels, tokens, known,
  )
  return model.apply(
      variables, features[0], position_keys, draw=options.draw,
      null_features=features[1], scale=scale, method='sample',
  )
