"""EMA codebook: updates, dead-code reset and k-means.

`axis_name` is the axis, or axes, over which replicas (under jax.shard_map,
jax.pmap or jax.vmap) hold parts of the batch, or None. With it all functions
return the same on every replica, as for the whole batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.quantizers import checks
from fsq_jax.quantizers import lookup

# Laplace smoothing of the counts, as in all published code.
_SMOOTHING = 1e-5
# Standard deviation of the factors by which the halves of a split differ.
_SPLIT_NOISE = 1e-3
_KMEANS_ITERATIONS = 10


class EmaCodebook(NamedTuple):
  """Entries and their EMA statistics, all float32.

  Attributes:
    entries: [K, d] codes.
    counts: [K] EMA of the number of vectors per batch assigned to an entry.
    sums: [K, d] EMA of the sums of these vectors.
  """

  entries: jax.Array
  counts: jax.Array
  sums: jax.Array


def start(entries: jax.Array) -> EmaCodebook:
  """Returns the initial statistics of entries [K, d].

  An unused entry stays while its count is well above the smoothing, 1e-5: for
  about ln(1e5) / (1 - decay) updates, 1150 with decay 0.99. Then it shrinks to
  the origin.
  """
  counts = jnp.ones(entries.shape[:1], jnp.float32)
  return EmaCodebook(entries, counts, entries)


def update(
    codebook: EmaCodebook,
    x: jax.Array,
    indices: jax.Array,
    decay: float,
    axis_name: checks.AxisName = None,
) -> EmaCodebook:
  """Updates the EMAs with a batch, and sets entries to sums / counts.

  As in VQ-VAE (arXiv 1711.00937, appendix A.1). Sums run over the global batch.
  The smoothing bounds the divisor: where the count has decayed to 0, the sum
  has too, and the entry is at the origin.

  Args:
    codebook: codebook before the update.
    x: [N, d] float32 vectors.
    indices: [N] int32, the entry of each vector; -1 skips a vector.
    decay: EMA decay, in [0, 1).
    axis_name: see above.
  """
  counts, sums = _totals(x, indices, codebook.counts.shape[0], axis_name)
  counts = decay * codebook.counts + (1 - decay) * counts
  sums = decay * codebook.sums + (1 - decay) * sums
  total = jnp.sum(counts)
  smoothed = counts + _SMOOTHING
  smoothed *= total / (total + counts.shape[0] * _SMOOTHING)
  return EmaCodebook(sums / smoothed[:, None], counts, sums)


def restart_from_batch(
    codebook: EmaCodebook,
    x: jax.Array,
    indices: jax.Array,
    key: jax.Array,
    dead_share: float,
    axis_name: checks.AxisName = None,
) -> EmaCodebook:
  """Resets dead entries to vectors of the batch, with the mean count.

  Each vector is used at most once; with fewer vectors than dead entries, the
  remaining entries wait for the next batch. With the mean count they are not
  dead again before vectors are assigned to them.

  Args:
    codebook: codebook after its update.
    x: [N, d] float32 vectors.
    indices: [N] int32; vectors with -1 are not used.
    key: random key of this step.
    dead_share: fraction of the mean count below which an entry is dead.
    axis_name: see above.
  """
  dead, mean = _dead(codebook, dead_share)
  chosen, found = _draw(x, indices, _rank(dead), key, axis_name)
  return _replace(codebook, dead & found, chosen, mean)


def split_most_used(
    codebook: EmaCodebook,
    x: jax.Array,
    indices: jax.Array,
    key: jax.Array,
    dead_share: float,
    axis_name: checks.AxisName = None,
) -> EmaCodebook:
  """Splits the n-th most used entry between itself and the n-th dead entry.

  Only entries above the mean count are split. The halves differ by a factor of
  about 1 - 2e-3 ... 1 + 2e-3 in each dimension. After the codebook splitting of
  UViM (arXiv 2205.10337, github.com/google-research/big_vision).

  Args:
    codebook: codebook after its update.
    x: unused.
    indices: unused.
    key: random key of this step.
    dead_share: fraction of the mean count below which an entry is dead.
    axis_name: unused.
  """
  del x, indices, axis_name
  dead, mean = _dead(codebook, dead_share)
  by_use = jnp.argsort(-codebook.counts)
  parents = by_use[jnp.maximum(_rank(dead), 0)]
  child = dead & (codebook.counts[parents] > mean)
  parent = jnp.argsort(by_use) < jnp.sum(child)
  places = jnp.arange(dead.shape[0], dtype=parents.dtype)
  source = jnp.where(child, parents, places)
  noise = _SPLIT_NOISE * jax.random.normal(
      key, codebook.entries.shape, jnp.float32
  )
  sign = jnp.where(child, np.float32(-1), np.float32(1))[:, None]
  entries = codebook.entries[source] * (1 + sign * noise[source])
  counts = codebook.counts[source] / 2
  return _replace(codebook, child | parent, entries, counts)


Restart = Callable[
    [EmaCodebook, jax.Array, jax.Array, jax.Array, float, checks.AxisName],
    EmaCodebook,
]
RESTARTS: dict[str, Restart] = {
    'none': lambda codebook, *_: codebook,
    'batch': restart_from_batch,
    'split': split_most_used,
}


def kmeans(
    entries: jax.Array,
    x: jax.Array,
    key: jax.Array,
    constrain: Callable[[jax.Array], jax.Array],
    axis_name: checks.AxisName = None,
) -> jax.Array:
  """Ten iterations of Lloyd's algorithm.

  Args:
    entries: [K, d] float32. They are initialized with vectors of the batch,
      drawn without replacement; with fewer vectors the remaining entries start
      unchanged.
    x: [N, d] float32 vectors; non-finite vectors are skipped.
    key: random key.
    constrain: applied to entries after every iteration; `lookup.normalize`
      gives spherical k-means.
    axis_name: see above.

  Returns:
    [K, d] float32. Entries to which no vector is assigned do not move.
  """
  indices = jnp.where(jnp.all(jnp.isfinite(x), axis=-1), 0, -1)
  rank = jnp.arange(entries.shape[0], dtype=jnp.int32)
  chosen, found = _draw(x, indices, rank, key, axis_name)
  entries = jnp.where(found[:, None], chosen, entries)

  def iterate(_, entries):
    indices = lookup.nearest(x, entries)
    counts, sums = _totals(x, indices, entries.shape[0], axis_name)
    means = sums / jnp.maximum(counts, 1)[:, None]
    return constrain(jnp.where(counts[:, None] > 0, means, entries))

  return jax.lax.fori_loop(0, _KMEANS_ITERATIONS, iterate, constrain(entries))


def _totals(
    x: jax.Array,
    indices: jax.Array,
    codebook_size: int,
    axis_name: checks.AxisName,
) -> tuple[jax.Array, jax.Array]:
  """Returns the number [K] and the sum [K, d] of the vectors of each entry."""
  # Index K is out of range and dropped; -1 would be the last entry.
  indices = jnp.where(indices >= 0, indices, codebook_size)
  counts = jnp.zeros((codebook_size,), jnp.float32)
  sums = jnp.zeros((codebook_size, x.shape[-1]), jnp.float32)
  totals = (
      counts.at[indices].add(1.0, mode='drop', out_sharding=_unsharded(x)),
      sums.at[indices].add(x, mode='drop', out_sharding=_unsharded(x)),
  )
  return totals if axis_name is None else jax.lax.psum(totals, axis_name)


def _unsharded(x: jax.Array) -> jax.NamedSharding:
  """Returns the replicated sharding on the mesh of x.

  JAX requires the sharding of sums over the batch if the mesh has explicit
  axes; without a mesh it has no effect.
  """
  return jax.typeof(x).sharding.update(spec=jax.P())


def _dead(
    codebook: EmaCodebook, dead_share: float
) -> tuple[jax.Array, jax.Array]:
  """Returns a mask [K] of dead entries, and the mean count."""
  mean = jnp.mean(codebook.counts)
  return codebook.counts < dead_share * mean, mean


def _rank(chosen: jax.Array) -> jax.Array:
  """Returns 0, 1, ... at the positions where `chosen` [K] is true."""
  return jnp.cumsum(chosen, dtype=jnp.int32) - 1


def _draw(
    x: jax.Array,
    indices: jax.Array,
    rank: jax.Array,
    key: jax.Array,
    axis_name: checks.AxisName,
) -> tuple[jax.Array, jax.Array]:
  """Draws vectors without replacement.

  Args:
    x: [N, d] vectors.
    indices: [N] int32; vectors with -1 are not drawn.
    rank: [K] int32, number of the draw of each entry.
    key: random key, the same on every replica.
    axis_name: see above.

  Returns:
    [K, d] vectors; [K] whether there were enough vectors for the draw.
  """
  sharding = _unsharded(x)
  if not sharding.mesh.empty:  # Sorting needs replicated arrays.
    x, indices = jax.sharding.reshard((x, indices), sharding)
  valid = indices >= 0
  if axis_name is not None:
    valid, first = _gather(valid, axis_name)
  draws = jax.random.uniform(key, valid.shape, jnp.float32)
  order = jnp.argsort(jnp.where(valid, draws, 2))
  found = rank < jnp.sum(valid, dtype=jnp.int32)
  chosen = order[jnp.clip(rank, 0, valid.shape[0] - 1)].astype(jnp.int32)
  if axis_name is None:
    return x[chosen], found
  # Each replica contributes its own vectors: K are communicated, not N.
  own = chosen - first
  is_own = (own >= 0) & (own < x.shape[0])
  vectors = x[jnp.clip(own, 0, x.shape[0] - 1)]
  vectors = jnp.where(is_own[:, None], vectors, 0)
  return jax.lax.psum(vectors, axis_name), found


def _gather(
    valid: jax.Array, axis_name: str | tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
  """Returns the flags [N] of the whole batch, and the replica's offset.

  By a sum: JAX knows that its result is the same on every replica.
  """
  size = valid.shape[0]
  first = jax.lax.axis_index(axis_name) * size
  flags = jnp.zeros((size * jax.lax.psum(1, axis_name),), jnp.int32)
  flags = jax.lax.dynamic_update_slice(
      flags, valid.astype(jnp.int32), (first,)
  )
  return jax.lax.psum(flags, axis_name) > 0, first


def _replace(
    codebook: EmaCodebook,
    where: jax.Array,
    entries: jax.Array,
    counts: jax.Array,
) -> EmaCodebook:
  """Sets entries [K, d] and counts [K] or scalar, and their sums, `where`."""
  counts = jnp.where(where, counts, codebook.counts)
  entries = jnp.where(where[:, None], entries, codebook.entries)
  sums = jnp.where(where[:, None], entries * counts[:, None], codebook.sums)
  return EmaCodebook(entries, counts, sums)
