"""Nearest entries of a codebook, in memory that has a bound."""

from einops import rearrange
import jax
from jax import export
from jax import numpy as jnp

# Most distances, tokens times entries, that are in memory at once over all
# devices: 1 GiB of float32.
MAX_DISTANCES = 2**28
# Rows in a chunk of a program that is exported for any number of them: the last
# chunk is filled up, so that few cost little.
_EXPORTED_ROWS = 1024
# Distances among which the position of the smallest is looked for at a time.
_BLOCK = 128
# exp(-distance / temperature) weighs the entries in the entropy loss, as in
# MaskGIT and MAGVIT.
ENTROPY_TEMPERATURE = 0.01
# Those of a float32 but for sign and mantissa.
_EXPONENT_BITS = 0x7F800000


def normalize(x: jax.Array) -> jax.Array:
  """Divides vectors [..., d] by their length; zero vectors stay zero.

  Vectors with a channel that is not finite get one that is NaN.
  """
  # First by the power of two below the largest channel, or squares overflow
  # and underflow. This rounds nothing.
  largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1, keepdims=True)
  bits = jax.lax.bitcast_convert_type(largest, jnp.int32) & _EXPONENT_BITS
  power = jax.lax.bitcast_convert_type(bits, jnp.float32)
  # XLA may multiply by the reciprocal; that of 2^127 is no normal float32.
  power = jnp.minimum(power, 2.0**126)
  x = x / jnp.where(power > 0, power, 1)
  squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  length = jnp.sqrt(jnp.where(squares > 0, squares, 1))
  # Bounded, though never below 1, or XLA makes a product with the reciprocal
  # root of this in some programs and not in others: the same entry would round
  # to two codes.
  return x / jnp.maximum(length, 0.5)


# Brings vectors and entries to the space in which Euclidean distances decide.
METRICS = {'euclidean': lambda x: x, 'cosine': normalize}


def nearest(x: jax.Array, codebook: jax.Array) -> jax.Array:
  """Finds the entries at the smallest Euclidean distance.

  Distances are |e|^2 - 2 x e in float32, which cancels far from the origin:
  with vectors of unit variance around 100, a few in a thousand get an entry
  that is nearest but for rounding. Keep latents around the origin.

  Args:
    x: [..., d] float32 vectors.
    codebook: [K, d] float32 entries.

  Returns:
    [...] int32, the lowest index among equals; -1 where the distance is not a
    finite float32. No gradient.
  """
  x, codebook = jax.lax.stop_gradient((x, codebook))
  rows = rearrange(x, '... d -> (...) d')
  chunks, _ = _deal(rows, codebook.shape[0])

  def search(chunk: jax.Array) -> jax.Array:
    return _first_smallest(_distances(chunk, codebook))

  indices = rearrange(jax.lax.map(search, chunks), 'c n -> (n c)')
  indices = indices[: rows.shape[0]].reshape(x.shape[:-1])
  error = jnp.sum(jnp.square(x - take(codebook, indices)), axis=-1)
  return jnp.where(jnp.isfinite(error), indices, -1)


def take(codebook: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns entries [..., d] of integer indices [...].

  Indices outside [0, K) give NaN.
  """
  valid = (indices >= 0) & (indices < codebook.shape[0])
  indices = jnp.where(valid, indices, 0).astype(jnp.int32)
  sharding = jax.typeof(indices).sharding
  entries = codebook.at[indices].get(
      mode='clip',
      # With explicit axes in the mesh JAX wants to be told.
      out_sharding=sharding.update(spec=jax.P(*sharding.spec, None)),
  )
  return jnp.where(valid[..., None], entries, jnp.nan)


def entropy_loss(
    x: jax.Array,
    codebook: jax.Array,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
  """Rewards vectors that are sure of their entry, and entries all in use.

  The mean over vectors of the entropy of p = softmax(-distance / temperature),
  less the entropy of the mean p; in nats. As in MaskGIT and MAGVIT, which add
  1e-5 inside the logarithms where this is exact.

  Args:
    x: [..., d] float32 vectors.
    codebook: [K, d] float32 entries.
    axis_name: axis, or axes, over which replicas hold parts of the batch; the
      mean p is that of the whole batch then.

  Returns:
    float32 scalar in [-log K, 0]; of replicas, their mean is.
  """
  rows = rearrange(x, '... d -> (...) d')
  codebook_size = codebook.shape[0]

  def add(sums, chunk):
    rows, weights = chunk
    logits = -_distances(rows, codebook) / ENTROPY_TEMPERATURE
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = weights[:, None] * jnp.exp(log_p)
    return (sums[0] - jnp.sum(p * log_p), sums[1] + jnp.sum(p, axis=0)), None

  # The backward pass computes distances again: kept, they would be N x K.
  add = jax.checkpoint(add, prevent_cse=False)
  # Of rows, since JAX wants to be told what differs between replicas.
  start = tuple(
      jnp.zeros_like(rows, shape=shape) for shape in ((), (codebook_size,))
  )
  sums, _ = jax.lax.scan(add, start, _deal(rows, codebook_size))
  entropy, p = (part / rows.shape[0] for part in sums)
  if axis_name is not None:
    p = jax.lax.pmean(p, axis_name)
  # Where p is 0 the logarithm's gradient must be finite: it gets multiplied.
  log_p = jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))
  return entropy + jnp.sum(p * log_p)


def _distances(rows: jax.Array, codebook: jax.Array) -> jax.Array:
  """Returns |e|^2 - 2 x e [N, K]: squared distances less |x|^2."""
  products = jnp.einsum(
      'nd,kd->nk', rows, codebook, precision=jax.lax.Precision.HIGHEST
  )
  return jnp.sum(jnp.square(codebook), axis=-1) - 2 * products


def _first_smallest(distances: jax.Array) -> jax.Array:
  """Returns the position [N] int32 of the first smallest of rows [N, K].

  In two levels, the block with the smallest distance and the place in it: XLA's
  CPU backend finds a minimum several times as fast as its position.
  """
  if distances.shape[-1] <= _BLOCK:
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)
  padding = -distances.shape[-1] % _BLOCK
  distances = jnp.pad(
      distances, ((0, 0), (0, padding)), constant_values=jnp.inf
  )
  blocks = rearrange(distances, 'n (b k) -> n b k', k=_BLOCK)
  block = jnp.argmin(jnp.min(blocks, axis=-1), axis=-1)
  within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  return (block * _BLOCK + jnp.argmin(within, axis=-1)).astype(jnp.int32)


def _deal(
    rows: jax.Array, codebook_size: int
) -> tuple[jax.Array, jax.Array]:
  """Deals rows out to chunks with MAX_DISTANCES each at most.

  Chunk i gets rows i, i + c, i + 2c, ... Rows sharded over devices so stay
  where they are, if their number is a multiple of devices times chunks.

  Args:
    rows: [N, d].
    codebook_size: distances a row.

  Returns:
    [c, n, d] rows and [c, n] weights: 1, and 0 for rows of padding.
  """
  num_rows = rows.shape[0]
  # Rows are padded to whole blocks.
  most_rows = MAX_DISTANCES // (codebook_size + -codebook_size % _BLOCK)
  if export.is_symbolic_dim(num_rows):
    size = min(most_rows, _EXPORTED_ROWS)
    # Not -(-n // size), of which JAX does not see that it is positive.
    num_chunks = (num_rows + size - 1) // size
    padding = num_chunks * size - num_rows
  else:
    # A power of two divides most batches: little or nothing is padded.
    num_chunks = 1 << max(0, -(-num_rows // most_rows) - 1).bit_length()
    padding = -num_rows % num_chunks
  weights = jnp.pad(jnp.ones((num_rows,), jnp.float32), (0, padding))
  rows = jnp.pad(rows, ((0, padding), (0, 0)))
  return (
      rearrange(rows, '(n c) d -> c n d', c=num_chunks),
      rearrange(weights, '(n c) -> c n', c=num_chunks),
  )
