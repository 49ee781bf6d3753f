"""A codebook learned by moving averages: updates, restarts and k-means.

`axis_name` is the axis, or axes, over which replicas (under jax.shard_map,
jax.pmap or jax.vmap) hold parts of the batch; None where there are none. With
it all functions return the same on every replica, as for the whole batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.quantizers import base
from fsq_jax.quantizers import lookup

# Laplace smoothing of the counts, the same in all published code.
_SMOOTHING = 1e-5
# Standard deviation of the factors that tell the halves of a split apart.
_SPLIT_NOISE = 1e-3
_KMEANS_ITERATIONS = 10


class EmaCodebook(NamedTuple):
  """Entries and the averages that they come from, all float32.

  Attributes:
    entries: [K, d] what is looked up.
    counts: [K] averages of the number of vectors an entry gets in a batch.
    sums: [K, d] averages of the sums of these vectors.
  """

  entries: jax.Array
  counts: jax.Array
  sums: jax.Array


def start(entries: jax.Array) -> EmaCodebook:
  """Returns averages that leave unused entries [K, d] where they are at first.

  An entry that no vector chooses stays while its count is well above the
  smoothing, 1e-5, so for about ln(1e5) / (1 - decay) updates, 1150 with decay
  0.99. From then on it shrinks to the origin.
  """
  counts = jnp.ones(entries.shape[:1], jnp.float32)
  return EmaCodebook(entries, counts, entries)


def update(
    codebook: EmaCodebook,
    x: jax.Array,
    indices: jax.Array,
    decay: float,
    axis_name: base.AxisName = None,
) -> EmaCodebook:
  """Moves the averages towards a batch, and the entries to sums / counts.

  As in VQ-VAE (arXiv 1711.00937, appendix A.1). Sums run over the global batch.
  The smoothing bounds what is divided by: where the count has decayed to 0, so
  has the sum, and the entry is at the origin.

  Args:
    codebook: before the batch.
    x: [N, d] float32 vectors.
    indices: [N] int32, the entry of each; -1 leaves a vector out.
    decay: weight of the past, in [0, 1).
    axis_name: see above.

  Returns:
    The codebook after the batch.
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
    axis_name: base.AxisName = None,
) -> EmaCodebook:
  """Puts dead entries on vectors of the batch, with the mean count.

  Each vector is used once at most; entries for which none is left wait for the
  next batch. A count as of a common entry gives them time to find use.

  Args:
    codebook: after its update.
    x: [N, d] float32 vectors.
    indices: [N] int32; vectors at -1 are not used.
    key: random key of this step.
    dead_share: share of the mean count below which an entry is dead.
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
    axis_name: base.AxisName = None,
) -> EmaCodebook:
  """Gives the n-th dead entry half of the n-th most used one.

  Only entries above the mean count are split. The halves differ by a factor of
  about 1 - 2e-3 ... 1 + 2e-3 in each dimension. After the codebook splitting of
  UViM (arXiv 2205.10337, github.com/google-research/big_vision).

  Args:
    codebook: after its update.
    x: not used.
    indices: not used.
    key: random key of this step.
    dead_share: share of the mean count below which an entry is dead.
    axis_name: not used.
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
    [EmaCodebook, jax.Array, jax.Array, jax.Array, float, base.AxisName],
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
    axis_name: base.AxisName = None,
) -> jax.Array:
  """Ten iterations of Lloyd's algorithm from vectors drawn without return.

  Args:
    entries: [K, d] float32; those for which the batch has no vector left take
      part as they are.
    x: [N, d] float32 vectors; ones that are not finite are left out.
    key: random key.
    constrain: applied to entries after every iteration; `lookup.normalize`
      gives spherical k-means.
    axis_name: see above.

  Returns:
    [K, d] float32. An entry that no vector is nearest to stays where it is.
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
    axis_name: base.AxisName,
) -> tuple[jax.Array, jax.Array]:
  """Returns the number [K] and the sum [K, d] of the vectors of each entry."""
  # Index K is out of range, which drops the vector; -1 would be the last entry.
  indices = jnp.where(indices >= 0, indices, codebook_size)
  counts = jnp.zeros((codebook_size,), jnp.float32)
  sums = jnp.zeros((codebook_size, x.shape[-1]), jnp.float32)
  totals = (
      counts.at[indices].add(1.0, mode='drop', out_sharding=_unsharded(x)),
      sums.at[indices].add(x, mode='drop', out_sharding=_unsharded(x)),
  )
  return totals if axis_name is None else jax.lax.psum(totals, axis_name)


def _unsharded(x: jax.Array) -> jax.NamedSharding:
  """Returns the sharding of x without its axes.

  With explicit axes in the mesh JAX wants to be told what sums over the batch
  have; without a mesh this says nothing.
  """
  return jax.typeof(x).sharding.update(spec=jax.P())


def _dead(
    codebook: EmaCodebook, dead_share: float
) -> tuple[jax.Array, jax.Array]:
  """Returns which entries [K] are dead, and the mean count."""
  mean = jnp.mean(codebook.counts)
  return codebook.counts < dead_share * mean, mean


def _rank(chosen: jax.Array) -> jax.Array:
  """Numbers what is chosen: 0, 1, ... where `chosen` [K] is true."""
  return jnp.cumsum(chosen, dtype=jnp.int32) - 1


def _draw(
    x: jax.Array,
    indices: jax.Array,
    rank: jax.Array,
    key: jax.Array,
    axis_name: base.AxisName,
) -> tuple[jax.Array, jax.Array]:
  """Draws vectors at random, every one once at most.

  Args:
    x: [N, d] vectors.
    indices: [N] int32; vectors at -1 are not drawn.
    rank: [K] int32: which draw each entry gets.
    key: random key, the same on every replica.
    axis_name: see above.

  Returns:
    [K, d] vectors, and [K] whether there were enough of them.
  """
  sharding = _unsharded(x)
  if not sharding.mesh.empty:  # What is sorted and drawn from is not sharded.
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
  # Each replica adds the vectors that it holds: K of them travel, not N.
  own = chosen - first
  is_own = (own >= 0) & (own < x.shape[0])
  vectors = x[jnp.clip(own, 0, x.shape[0] - 1)]
  vectors = jnp.where(is_own[:, None], vectors, 0)
  return jax.lax.psum(vectors, axis_name), found


def _gather(
    valid: jax.Array, axis_name: str | tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
  """Returns the flags [N] of the whole batch, and where a replica's begin.

  By a sum, whose result JAX knows to be the same on every replica.
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
