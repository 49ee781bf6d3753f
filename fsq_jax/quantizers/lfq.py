"""Lookup-free quantization (LFQ) and binary spherical quantization (BSQ)."""

from collections.abc import Sequence
import math
from typing import Any

from einops import rearrange
import jax
import jax.numpy as jnp
import numpy as np

from fsq_jax.quantizers import base
from fsq_jax.quantizers import checks
from fsq_jax.quantizers import digits as digits_lib
from fsq_jax.quantizers import lookup

_BIT_ORDERS = ('msb_first', 'lsb_first')
# Indices are int32.
_MAX_BITS = 30
# The joint distribution of a group has 2^bits numbers.
_MAX_GROUP_BITS = 16
# At larger logits sigmoid and entropy are 0 or 1 in float32.
_MAX_LOGIT = 128.0


class LFQ(digits_lib.DigitQuantizer):
  """Lookup-free quantization (arXiv 2310.05737), without parameters.

    lfq = LFQ(num_bits=18)
    z_q, loss, indices = lfq.apply({}, z)

  The code of a channel is 1 (level index, or bit, 1) if it is positive,
  otherwise -1 (bit 0). The loss, in nats and averaged over vectors, is

    commitment_weight * mean((z - code)^2)
    + entropy_weight * (mean_n H(p_n) - diversity_weight * H(mean_n p_n)),

  with p_n the softmax of -|z_n - code|^2 / temperature over the codebook: low
  per-token entropy, high codebook entropy. The logits are sums over bits: p_n
  is a product over bits, and H(p_n) the sum of their entropies, in memory of
  num_bits instead of 2^num_bits. The codebook entropy H(mean_n p_n) is not such
  a sum: it is computed exactly within groups of at most `entropy_group_bits`
  neighbouring bits and summed over groups, an upper bound that is tight for
  independent groups. No probability is clamped.

  Attributes:
    num_bits: number of channels and of bits of an index; 1 to 30.
    bit_order: 'msb_first', the first channel is the highest bit of the index,
      as in lucidrains/vector-quantize-pytorch; or 'lsb_first', as in
      TencentARC/SEED-Voken.
    commitment_weight: weight of the commitment loss.
    entropy_weight: weight of the entropy loss.
    diversity_weight: weight of the codebook entropy in the entropy loss.
    temperature: softmax temperature of the entropy loss.
    entropy_group_bits: 1 to 16; see above.
    axis_name: in training, the axis of jax.shard_map, jax.pmap or jax.vmap, or
      a tuple of axes, over which replicas hold parts of the batch: `mean_n p_n`
      is averaged over the whole batch, and the mean of the replicas' losses is
      the loss of the whole batch.
  """

  num_bits: int
  bit_order: str = 'msb_first'
  commitment_weight: float = 0.25
  entropy_weight: float = 0.1
  diversity_weight: float = 1.0
  temperature: float = 0.01
  entropy_group_bits: int = 9
  axis_name: str | Sequence[str] | None = None

  def __post_init__(self):
    checks.set_integers(self, 'num_bits', low=1, high=_MAX_BITS)
    checks.set_integers(
        self, 'entropy_group_bits', low=1, high=_MAX_GROUP_BITS
    )
    checks.check_name('bit_order', self.bit_order, _BIT_ORDERS)
    checks.set_numbers(
        self, 'commitment_weight', 'entropy_weight', 'diversity_weight'
    )
    checks.set_numbers(self, 'temperature', low=1e-6)
    self.axis_name = checks.validated_axis_name(self.axis_name)
    super().__post_init__()

  @property
  def levels(self) -> tuple[int, ...]:
    """Number of values of each channel: two."""
    return (2,) * self.num_bits

  def __call__(
      self, z: jax.Array, *, train: bool = False
  ) -> base.QuantizerOutput:
    z = jnp.asarray(z)
    x = self._channels_last(z, 'Latents').astype(jnp.float32)
    # Infinite latents become the largest finite ones: inf - inf is NaN.
    x = self._normalized(jnp.nan_to_num(x, nan=jnp.nan))
    digits = self._nearest_digits(x)
    codes = self._codes(digits)
    # The axis does not exist in initialization.
    axis_name = self.axis_name if train and not self.is_initializing() else None
    # Codes stop the gradient; their sum with an exact zero is exact.
    z_q = codes + (x - jax.lax.stop_gradient(x))
    return base.QuantizerOutput(
        z_q=self._channels_back(z_q).astype(z.dtype),
        loss=self._loss(x, codes, axis_name=axis_name),
        indices=self.digits_to_indices(digits),
    )

  @property
  def code_steps(self) -> tuple[float, ...]:
    return (2 * self._scale,) * self.num_bits

  def spec(self) -> dict[str, Any]:
    return {
        'name': 'lfq',
        'num_bits': self.num_bits,
        'bit_order': self.bit_order,
        'rounding': 'digit 1 where z > 0',
        'index_order': self._index_order,
        'code': '2 * digit - 1',
    }

  @property
  def first_fastest(self) -> bool:
    return self.bit_order == 'lsb_first'

  @property
  def _scale(self) -> float:
    """Size of a channel of a code."""
    return 1.0

  def _normalized(self, x: jax.Array) -> jax.Array:
    """Returns float32 latents [..., num_bits] before the sign is taken."""
    return x

  def _nearest_digits(self, codes: jax.Array) -> jax.Array:
    digits = (codes > 0).astype(jnp.int32)
    return jnp.where(jnp.isnan(codes), -1, digits)

  def _codes(self, digits: jax.Array) -> jax.Array:
    codes = (2 * digits - 1).astype(jnp.float32) * np.float32(self._scale)
    return jnp.where(self._is_valid(digits), codes, jnp.nan)

  def _loss(
      self, x: jax.Array, codes: jax.Array, *, axis_name: checks.AxisName
  ) -> jax.Array:
    """Returns the float32 loss of latents and codes [..., num_bits]."""
    loss = jnp.zeros((), jnp.float32)
    if self.commitment_weight > 0:
      loss += self.commitment_weight * jnp.mean(jnp.square(x - codes))
    if self.entropy_weight > 0:
      logits = rearrange(x, '... d -> (...) d') * np.float32(
          4 * self._scale / self.temperature
      )
      logits = jnp.clip(logits, -_MAX_LOGIT, _MAX_LOGIT)
      entropy = _mean_entropy(logits)
      if self.diversity_weight > 0:
        num_groups = math.ceil(self.num_bits / self.entropy_group_bits)
        entropy -= self.diversity_weight * sum(
            _entropy_of_mean(group, axis_name)
            for group in jnp.array_split(logits, num_groups, axis=-1)
        )
      loss += self.entropy_weight * entropy
    return loss


class BSQ(LFQ):
  """Binary spherical quantization (arXiv 2406.07548), without parameters.

    bsq = BSQ(num_bits=18)
    z_q, loss, indices = bsq.apply({}, z)

  LFQ of latents normalized to unit length, with codes of unit length: 1 /
  sqrt(num_bits) times the sign. The loss uses the normalized latents. Zero
  vectors stay zero.
  """

  def spec(self) -> dict[str, Any]:
    return super().spec() | {
        'name': 'bsq',
        'projection': 'z / |z|',
        'code': '(2 * digit - 1) / sqrt(num_bits)',
    }

  @property
  def _scale(self) -> float:
    return self.num_bits**-0.5

  def _normalized(self, x: jax.Array) -> jax.Array:
    return lookup.normalize(x)


def _mean_entropy(logits: jax.Array) -> jax.Array:
  """Returns mean_n H(p_n) in nats of the logits [N, bits] of each bit."""
  size = jnp.abs(logits)
  entropies = jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size)
  return jnp.mean(jnp.sum(entropies, axis=-1))


def _entropy_of_mean(
    logits: jax.Array, axis_name: checks.AxisName
) -> jax.Array:
  """Returns H(mean_n p_n) in nats over the 2^bits codes of a group.

  Args:
    logits: [N, bits] float32 logits of each bit.
    axis_name: axes over which replicas hold parts of the batch, or None.
  """
  # A matmul of two halves: no array is [N, 2^bits].
  left, right = (_joint(half) for half in jnp.array_split(logits, 2, axis=-1))
  total = jnp.einsum(
      'na,nb->ab',
      left,
      right,
      precision=jax.lax.Precision.HIGHEST,
      # Required by JAX if the mesh has explicit axes.
      out_sharding=jax.typeof(left).sharding.update(spec=jax.P(None, None)),
  )
  mean = total / logits.shape[0]
  if axis_name is not None:
    mean = jax.lax.pmean(mean, axis_name)
  # The gradient of p log p is infinite at 0; there it is set to 0.
  logarithms = jnp.log(jnp.where(mean > 0, mean, 1))
  return -jnp.sum(mean * logarithms)


def _joint(logits: jax.Array) -> jax.Array:
  """Returns probabilities [N, 2^bits] of the values of independent bits."""
  joint = jnp.ones((logits.shape[0], 1), jnp.float32)
  for i in range(logits.shape[-1]):
    bit = jax.nn.sigmoid(jnp.stack([-logits[:, i], logits[:, i]], axis=-1))
    joint = rearrange(joint[:, :, None] * bit[:, None], 'n a b -> n (a b)')
  return joint
