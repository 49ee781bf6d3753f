"""Base class of quantizers whose channels each take one of few values."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp
import numpy as np

from fsq_jax.quantizers import base
from fsq_jax.quantizers import checks

# Orders of channels in an index, as specs have them in 'index_order'.
FIRST_FASTEST = 'first dimension fastest'
_LAST_FASTEST = 'last dimension fastest'
# float32 represents every integer up to this one.
_MAX_EXACT = 2**24


class DigitQuantizer(base.Quantizer, kw_only=True):
  """Quantizer whose indices are mixed-radix numbers of level indices.

  A channel with L levels takes one of L values, numbered by a level index in
  0 ... L - 1 (`digits` in names). Arrays of level indices have the channels on
  the last axis for every `channel_axis`. Tokens are converted between
  conventions by their level indices.

  Subclasses have `levels`, the number of values of each channel that an index
  covers, and define `first_fastest`, `_codes` and `_nearest_digits`. If a code
  has several indices, they stand on a trailing axis, `index_shape`; their level
  indices are [..., *index_shape, d].
  """

  @property
  def codebook_size(self) -> int:
    return math.prod(self.levels)

  @property
  def code_dim(self) -> int:
    return len(self.levels)

  @property
  def first_fastest(self) -> bool:
    """Whether the first channel varies fastest in the index, or the last."""
    raise NotImplementedError

  def codes_to_indices(self, codes: jax.Array) -> jax.Array:
    return self.digits_to_indices(self.codes_to_digits(codes))

  def indices_to_codes(self, indices: jax.Array) -> jax.Array:
    return self.digits_to_codes(self.indices_to_digits(indices))

  def codes_to_digits(self, codes: jax.Array) -> jax.Array:
    """Returns the level indices of the nearest codes.

    Args:
      codes: codes, any float dtype, channels on `channel_axis`.

    Returns:
      int32 in [0, L), channels last; -1 for NaN.
    """
    codes = self._channels_last(jnp.asarray(codes), 'Codes')
    return self._nearest_digits(codes.astype(jnp.float32))

  def digits_to_codes(self, digits: jax.Array) -> jax.Array:
    """Returns float32 codes, channels on `channel_axis`, of level indices.

    Codes are NaN where a level index is outside [0, L).
    """
    digits = self._validated_digits(digits)
    self.check_index_axes(digits.shape[:-1])
    return self._channels_back(self._codes(digits))

  def digits_to_indices(self, digits: jax.Array) -> jax.Array:
    """Returns int32 indices [...] of level indices [..., d], channels last.

    Indices are -1 where a level index is outside [0, L).
    """
    digits = self._validated_digits(digits)
    # Channel by channel: XLA reduces a short last axis slowly on CPU.
    indices, valid = 0, True
    for i, level in enumerate(self.levels):
      digit = digits[..., i]
      indices += digit.astype(jnp.int32) * self._bases[i]
      valid &= (digit >= 0) & (digit < level)
    return jnp.where(valid, indices, -1)

  def indices_to_digits(self, indices: jax.Array) -> jax.Array:
    """Returns int32 level indices [..., d], channels last, of each index.

    Args:
      indices: [...] integers.

    Returns:
      Values in [0, L); all -1 for an index outside [0, codebook_size).
    """
    indices = checks.as_integers(indices, 'Indices')
    # Compared before the cast: 64-bit indices must not wrap into the range.
    valid = (indices >= 0) & (indices < self.codebook_size)
    indices = jnp.where(valid, indices, 0).astype(jnp.int32)
    # Channel by channel; XLA turns division by a constant into multiplication.
    digits = [
        jax.lax.rem(jax.lax.div(indices, np.int32(basis)), np.int32(level))
        for basis, level in zip(self._bases, self.levels, strict=True)
    ]
    return jnp.where(valid[..., None], jnp.stack(digits, axis=-1), -1)

  def check_index_axes(self, shape: Sequence[int]) -> None:
    """Raises ValueError unless indices of `shape` end in `index_shape`."""
    count = len(self.index_shape)
    if tuple(shape[len(shape) - count :]) != self.index_shape:
      raise ValueError(
          f'Indices have shape {tuple(shape)}; the last axis must hold the'
          f' {self.index_shape[0]} indices of a code.'
      )

  def _codes(self, digits: jax.Array) -> jax.Array:
    """Returns float32 codes of int32 level indices, both channels last."""
    raise NotImplementedError

  def _nearest_digits(self, codes: jax.Array) -> jax.Array:
    """Returns int32 level indices, channels last, of codes; -1 for NaN."""
    raise NotImplementedError

  def _pack(self, digits: Sequence[jax.Array]) -> jax.Array:
    """Returns int32 indices [...] of the level indices [...] of each channel.

    These are float32 integers in [0, L), or NaN, which makes the index -1.
    """
    if self.codebook_size > _MAX_EXACT:
      digits = jnp.stack(digits, axis=-1)
      digits = jnp.where(jnp.isnan(digits), -1, digits)
      return self.digits_to_indices(digits.astype(jnp.int32))
    # Summed in float32: one conversion per vector, not one per channel.
    indices = sum(
        digit * np.float32(basis)
        for digit, basis in zip(digits, self._bases, strict=True)
    )
    return jnp.where(jnp.isnan(indices), -1, indices).astype(jnp.int32)

  @property
  def _index_order(self) -> str:
    """The order of channels in an index, as it is written in specs."""
    return FIRST_FASTEST if self.first_fastest else _LAST_FASTEST

  @property
  def _bases(self) -> tuple[int, ...]:
    """Weight of each channel in the index, Python integers of any size."""
    before = [self.levels[:i] for i in range(len(self.levels))]
    after = [self.levels[i + 1 :] for i in range(len(self.levels))]
    return tuple(map(math.prod, before if self.first_fastest else after))

  def _validated_digits(self, digits: jax.Array) -> jax.Array:
    digits = checks.as_integers(digits, 'Digits')
    if digits.shape[-1:] != (len(self.levels),):
      raise ValueError(
          f'Digits have shape {digits.shape}; the last axis must hold '
          f'{len(self.levels)} channels.'
      )
    return digits

  def _is_valid(self, digits: jax.Array) -> jax.Array:
    """Returns whether level indices [..., d] are in [0, L)."""
    return (digits >= 0) & (digits < np.asarray(self.levels, np.int32))

  def _random_key(self, option: str) -> jax.Array:
    """Returns the random key of a training option, from rng 'quantizer'."""
    if self.scope is None or not self.has_rng('quantizer'):
      raise ValueError(
          f'{option} draws random numbers in training: call apply with'
          f" rngs={{'quantizer': key}}, or set {option} to 0."
      )
    return self.make_rng('quantizer')


def per_example(shape: Sequence[int], rank: int) -> tuple[int, ...]:
  """Returns the shape of an array with one number per example.

  Args:
    shape: shape of the latents, channels last, maybe with more axes.
    rank: rank of the latents passed in; a single vector is one example.
  """
  return (shape[0] if rank > 1 else 1, *(1 for _ in shape[1:]))
