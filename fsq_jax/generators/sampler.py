"""Samples token grids in batches on a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fsq_jax.generators import autoregressive_sampling
from fsq_jax.generators import builder
from fsq_jax.generators import embeddings
from fsq_jax.generators import masked_sampling
from fsq_jax.generators import model as models
from fsq_jax.generators import sampled
from fsq_jax.runtime import batching
from fsq_jax.runtime import partitioning


class Sampler:
  """Samples from a model; compiled once per batch shape.

  A sample depends on its label, its number and the seed, not on the other
  samples, the batch size or the devices, up to rounding.
  """

  def __init__(
      self,
      model: models.TokenModel,
      options: builder.Sampling,
      mesh: jax.sharding.Mesh,
      *,
      batch_size: int,
      shared: bool = False,
  ):
    """Functions are compiled on first call.

    Args:
      model: masked or causal.
      options: sampling options.
      mesh: from `partitioning.create_mesh`.
      batch_size: largest number of images in a batch.
      shared: see `batching.Batcher`.
    """
    self._model = model
    self._batcher = batching.Batcher(mesh, batch_size, shared=shared)
    causal = model.architecture.causal

    def sample(variables, key, batch):
      arguments = {'examples': batch['examples'], 'options': options}
      if causal:
        return autoregressive_sampling.sample(
            model, variables, batch['labels'], key,
            tokens=batch['tokens'], num_given=batch['given'], **arguments,
        )
      return masked_sampling.sample(
          model, variables, batch['labels'], key,
          tokens=batch['tokens'], known=batch['given'], **arguments,
      )

    self._sample = jax.jit(
        sample, out_shardings=partitioning.replicated(mesh)
    )

  def __call__(
      self,
      variables: Any,
      labels: np.ndarray,
      seed: int,
      *,
      tokens: np.ndarray | None = None,
      given: np.ndarray | None = None,
      examples: np.ndarray | None = None,
      before_batch: Callable[[], None] = lambda: None,
  ) -> sampled.Samples:
    """Samples grids, or completes given ones.

    Args:
      variables: of the model, on the mesh.
      labels: [B] integers in [0, C), -1 for no class.
      seed: random seed of all samples.
      tokens: [B, N] integers, any where not given; None to generate all.
      given: where `tokens` are given: [B, N] bool for masked models; [B], how
        many of the first tokens in raster order, for causal ones.
      examples: [B] integers, the number of each sample; 0 ... B - 1 by default.
      before_batch: called before each batch.

    Returns:
      The samples, on the host.

    Raises:
      ValueError: labels or tokens out of range, or of other shapes; a seed that
        is no integer.
    """
    labels = np.asarray(labels)
    embeddings.check_labels(labels, self._model.num_classes)
    shape = len(labels), self._model.num_tokens
    given_shape = shape[: 2 - self._model.architecture.causal]
    if tokens is None:
      tokens = np.zeros(shape, np.int32)
      given = np.zeros(given_shape, np.int32)
    tokens, given = np.asarray(tokens), np.asarray(given)
    if tokens.shape != shape or given.shape != given_shape:
      raise ValueError(
          f'tokens have shape {tokens.shape} and given {given.shape}; for'
          f' {shape[0]} labels use {shape} and {given_shape}.'
      )
    is_given = given
    if given.ndim == 1:
      is_given = np.arange(shape[1]) < given[:, None]
    tokens = np.where(is_given, tokens, 0)
    self._model.vocabulary.check(tokens)
    if examples is None:
      examples = np.arange(len(labels))
    if not isinstance(seed, int | np.integer):
      raise ValueError(f'seed is {seed!r}; give an integer.')
    key = jax.random.key(seed)

    def sample(batch):
      before_batch()
      return self._sample(variables, key, batch)

    return self._batcher.map(
        sample,
        {
            'labels': labels.astype(np.int32),
            'examples': np.asarray(examples, np.int32),
            'tokens': tokens.astype(np.int32),
            'given': given.astype(np.int32),
        },
    )
