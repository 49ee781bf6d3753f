"""Nearest-neighbour search in a codebook, in bounded memory."""

from einops import rearrange
import jax
from jax import export
from jax import numpy as jnp

# Distances, tokens times entries, that are in memory at once over all devices:
# 1 GiB of float32.
MAX_DISTANCES = 2**28
# Rows in a chunk of an exported function with a symbolic number of rows. The
# last chunk is padded: few rows cost little.
EXPORTED_ROWS = 1024
# Block size of the search for the position of the smallest distance.
_BLOCK = 128
# Softmax temperature of the entropy loss, as in MaskGIT and MAGVIT.
ENTROPY_TEMPERATURE = 0.01
# Exponent bits of a float32.
_EXPONENT_BITS = 0x7F800000


def normalize(x: jax.Array) -> jax.Array:
  """Divides vectors [..., d] by their length; zero vectors stay zero.

  Vectors with a non-finite channel get a NaN channel.
  """
  # First by the power of two below the largest channel, which is exact:
  # otherwise squares overflow and underflow.
  largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1, keepdims=True)
  bits = jax.lax.bitcast_convert_type(largest, jnp.int32) & _EXPONENT_BITS
  power = jax.lax.bitcast_convert_type(bits, jnp.float32)
  # XLA may multiply by the reciprocal, which is subnormal for 2^127.
  power = jnp.minimum(power, 2.0**126)
  x = x / jnp.where(power > 0, power, 1)
  squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  length = jnp.sqrt(jnp.where(squares > 0, squares, 1))
  # The length is never below 1. Without the bound XLA multiplies by the
  # reciprocal root in some compiled functions only, and the same entry would be
  # rounded to two codes.
  return x / jnp.maximum(length, 0.5)


# Maps of vectors and entries to the space of Euclidean distances.
METRICS = {'euclidean': lambda x: x, 'cosine': normalize}


def nearest(x: jax.Array, codebook: jax.Array) -> jax.Array:
  """Finds the entries at the smallest Euclidean distance.

  Distances are |e|^2 - 2 x e in float32, which cancels far from the origin:
  of vectors with unit variance around 100, rounding gives a few in a thousand
  another entry than the nearest. Keep latents around the origin.

  Args:
    x: [..., d] float32 vectors.
    codebook: [K, d] float32 entries.

  Returns:
    [...] int32, the lowest index of ties; -1 where the distance is not a finite
    float32. No gradient.
  """
  x, codebook = jax.lax.stop_gradient((x, codebook))
  rows = rearrange(x, '... d -> (...) d')
  chunks, _ = _split(rows, codebook.shape[0])

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
      # Required by JAX if the mesh has explicit axes.
      out_sharding=sharding.update(spec=jax.P(*sharding.spec, None)),
  )
  return jnp.where(valid[..., None], entries, jnp.nan)


def entropy_loss(
    x: jax.Array,
    codebook: jax.Array,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
  """Entropy loss: low per-token entropy, high codebook entropy.

  The mean over vectors of the entropy of p = softmax(-distance / temperature),
  minus the entropy of the mean p; in nats. As in MaskGIT and MAGVIT, which add
  1e-5 inside the logarithms; here they are exact.

  Args:
    x: [..., d] float32 vectors.
    codebook: [K, d] float32 entries.
    axis_name: axis, or axes, over which replicas hold parts of the batch; p is
      then averaged over the whole batch.

  Returns:
    float32 scalar; its mean over replicas is in [-log K, 0].
  """
  rows = rearrange(x, '... d -> (...) d')
  codebook_size = codebook.shape[0]

  def add(sums, chunk):
    rows, weights = chunk
    logits = -_distances(rows, codebook) / ENTROPY_TEMPERATURE
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = weights[:, None] * jnp.exp(log_p)
    return (sums[0] - jnp.sum(p * log_p), sums[1] + jnp.sum(p, axis=0)), None

  # The backward pass recomputes the distances, which are N x K.
  add = jax.checkpoint(add, prevent_cse=False)
  # Made from rows, so that JAX knows that they differ between replicas.
  start = tuple(
      jnp.zeros_like(rows, shape=shape) for shape in ((), (codebook_size,))
  )
  sums, _ = jax.lax.scan(add, start, _split(rows, codebook_size))
  entropy, p = (part / rows.shape[0] for part in sums)
  if axis_name is not None:
    p = jax.lax.pmean(p, axis_name)
  # Where p is 0, the gradient of the logarithm must be finite: 0 * inf is NaN.
  log_p = jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))
  return entropy + jnp.sum(p * log_p)


def _distances(rows: jax.Array, codebook: jax.Array) -> jax.Array:
  """Returns |e|^2 - 2 x e [N, K]: squared distances less |x|^2."""
  inner = jnp.einsum(
      'nd,kd->nk', rows, codebook, precision=jax.lax.Precision.HIGHEST
  )
  return jnp.sum(jnp.square(codebook), axis=-1) - 2 * inner


def _first_smallest(distances: jax.Array) -> jax.Array:
  """Returns the position [N] int32 of the first smallest of rows [N, K].

  In two steps, the block of the smallest distance and the position in it: on
  CPU, XLA finds a minimum several times as fast as its position.
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


def _split(
    rows: jax.Array, codebook_size: int
) -> tuple[jax.Array, jax.Array]:
  """Splits rows into chunks of at most MAX_DISTANCES distances.

  Chunk i gets rows i, i + c, i + 2c, ...: sharded rows stay on their devices
  if their number is a multiple of devices times chunks.

  Args:
    rows: [N, d].
    codebook_size: distances per row.

  Returns:
    [c, n, d] rows and [c, n] weights: 1, or 0 for padding.
  """
  num_rows = rows.shape[0]
  # Rows are padded to whole blocks.
  most_rows = MAX_DISTANCES // (codebook_size + -codebook_size % _BLOCK)
  if export.is_symbolic_dim(num_rows):
    size = min(most_rows, EXPORTED_ROWS)
    # JAX cannot prove that -(-n // size) is positive.
    num_chunks = (num_rows + size - 1) // size
    padding = num_chunks * size - num_rows
  else:
    # A power of two divides most batch sizes: little padding.
    num_chunks = 1 << max(0, -(-num_rows // most_rows) - 1).bit_length()
    padding = -num_rows % num_chunks
  weights = jnp.pad(jnp.ones((num_rows,), jnp.float32), (0, padding))
  rows = jnp.pad(rows, ((0, padding), (0, 0)))
  return (
      rearrange(rows, '(n c) d -> c n d', c=num_chunks),
      rearrange(weights, '(n c) -> c n', c=num_chunks),
  )
