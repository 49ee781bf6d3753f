"""Quantizers whose codes are digits: every channel takes one of few values."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp
import numpy as np

from fsq_jax.quantizers import base

FIRST_FASTEST = 'first dimension fastest'
LAST_FASTEST = 'last dimension fastest'
# float32 holds all whole numbers up to here.
_MOST_WHOLE = 2**24


class DigitQuantizer(base.Quantizer, kw_only=True):
  """Quantizer whose indices are numbers that the digits of channels spell.

  A channel with L levels takes one of L values, numbered by its digit, 0 ...
  L - 1. Digits are integers on the last axis whatever `channel_axis` is, and
  the only safe form in which to carry tokens between conventions.

  Subclasses have `levels`, the number of values of each channel that an index
  covers, and define `_index_order`, `_codes` and `_nearest_digits`. Where a
  code has several indices, these stand on trailing axes of `index_shape`;
  digits of [..., *index_shape] indices are [..., *index_shape, d].
  """

  @property
  def codebook_size(self) -> int:
    return math.prod(self.levels)

  @property
  def code_dim(self) -> int:
    return len(self.levels)

  @property
  def index_shape(self) -> tuple[int, ...]:
    """Trailing axes of the indices of one code; () where it has one index."""
    return ()

  def codes_to_indices(self, codes: jax.Array) -> jax.Array:
    return self.digits_to_indices(self.codes_to_digits(codes))

  def indices_to_codes(self, indices: jax.Array) -> jax.Array:
    return self.digits_to_codes(self.indices_to_digits(indices))

  def codes_to_digits(self, codes: jax.Array) -> jax.Array:
    """Returns the nearest digits of codes.

    Args:
      codes: codes, any float dtype, channels on `channel_axis`.

    Returns:
      int32 digits in [0, L), channels last; -1 where a code is NaN.
    """
    codes = self._channels_last(jnp.asarray(codes), 'Codes')
    return self._nearest_digits(codes.astype(jnp.float32))

  def digits_to_codes(self, digits: jax.Array) -> jax.Array:
    """Returns float32 codes, channels on `channel_axis`, of integer digits.

    Codes are NaN where a digit is outside [0, L).
    """
    digits = self._checked_digits(digits)
    self.check_index_axes(digits.shape[:-1])
    return self._channels_back(self._codes(digits))

  def digits_to_indices(self, digits: jax.Array) -> jax.Array:
    """Returns int32 indices [...]; -1 where a digit is outside [0, L).

    Args:
      digits: [..., d] integers, channels last.
    """
    digits = self._checked_digits(digits)
    # Channel by channel: XLA reduces a short last axis slowly on CPU.
    indices, valid = 0, True
    for i, level in enumerate(self.levels):
      digit = digits[..., i]
      indices += digit.astype(jnp.int32) * self._bases[i]
      valid &= (digit >= 0) & (digit < level)
    return jnp.where(valid, indices, -1)

  def _spell(self, digits: Sequence[jax.Array]) -> jax.Array:
    """Returns int32 indices [...] of float32 digits [...] of each channel.

    Args:
      digits: whole numbers in [0, L), or NaN, which makes the index -1.
    """
    if self.codebook_size > _MOST_WHOLE:
      digits = jnp.stack(digits, axis=-1)
      digits = jnp.where(jnp.isnan(digits), -1, digits)
      return self.digits_to_indices(digits.astype(jnp.int32))
    # Added up as they are: one conversion a vector, not one a channel.
    indices = sum(
        digit * np.float32(basis)
        for digit, basis in zip(digits, self._bases, strict=True)
    )
    return jnp.where(jnp.isnan(indices), -1, indices).astype(jnp.int32)

  def indices_to_digits(self, indices: jax.Array) -> jax.Array:
    """Returns int32 digits [..., d], channels last, of each index.

    Args:
      indices: [...] integers.

    Returns:
      Digits in [0, L); all -1 for an index outside [0, codebook_size).
    """
    indices = base.integers(indices, 'Indices')
    # Compared before the cast: 64-bit indices must not wrap into the range.
    valid = (indices >= 0) & (indices < self.codebook_size)
    indices = jnp.where(valid, indices, 0).astype(jnp.int32)
    # Channel by channel, truncating: division by a constant is a product.
    digits = [
        jax.lax.rem(jax.lax.div(indices, np.int32(basis)), np.int32(level))
        for basis, level in zip(self._bases, self.levels, strict=True)
    ]
    return jnp.where(valid[..., None], jnp.stack(digits, axis=-1), -1)

  @property
  def _index_order(self) -> str:
    """FIRST_FASTEST or LAST_FASTEST."""
    raise NotImplementedError

  def _codes(self, digits: jax.Array) -> jax.Array:
    """Returns float32 codes of int32 digits, both channels last."""
    raise NotImplementedError

  def _nearest_digits(self, codes: jax.Array) -> jax.Array:
    """Returns int32 digits of float32 codes, channels last; -1 for NaN."""
    raise NotImplementedError

  def check_index_axes(self, shape: Sequence[int]) -> None:
    """Raises ValueError unless indices of `shape` end in `index_shape`."""
    count = len(self.index_shape)
    if tuple(shape[len(shape) - count :]) != self.index_shape:
      raise ValueError(
          f'Indices have shape {tuple(shape)}; the last axis must hold the'
          f' {self.index_shape[0]} indices of a code.'
      )

  @property
  def _bases(self) -> tuple[int, ...]:
    """Weight of each digit in the index, in Python's unbounded integers."""
    levels, numbers_of = self.levels, range(len(self.levels))
    if self._index_order == FIRST_FASTEST:
      return tuple(math.prod(levels[:i]) for i in numbers_of)
    return tuple(math.prod(levels[i + 1 :]) for i in numbers_of)

  def _checked_digits(self, digits: jax.Array) -> jax.Array:
    digits = base.integers(digits, 'Digits')
    if digits.shape[-1:] != (len(self.levels),):
      raise ValueError(
          f'Digits have shape {digits.shape}; the last axis must hold '
          f'{len(self.levels)} channels.'
      )
    return digits

  def _is_valid(self, digits: jax.Array) -> jax.Array:
    """Returns where digits [..., d] are in [0, L)."""
    return (digits >= 0) & (digits < np.asarray(self.levels, np.int32))

  def _random_key(self, option: str) -> jax.Array:
    """Returns the key that a training option draws from."""
    if self.scope is None or not self.has_rng('quantizer'):
      raise ValueError(
          f'{option} draws random numbers in training: call apply with'
          f" rngs={{'quantizer': key}}, or set {option} to 0."
      )
    return self.make_rng('quantizer')


def per_example(shape: Sequence[int], rank: int) -> tuple[int, ...]:
  """Returns the shape of one number for each example of latents.

  Args:
    shape: shape of the latents, channels last, maybe with further axes.
    rank: rank of the latents as given; a single vector is one example.
  """
  return (shape[0] if rank > 1 else 1, *(1 for _ in shape[1:]))
