"""What every quantizer takes and returns."""

from collections.abc import Iterable, Sequence
import math
import numbers
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Axes over which replicas hold parts of the batch, as collectives take them.
AxisName = str | tuple[str, ...] | None


class QuantizerOutput(NamedTuple):
  """Result of a quantizer, the same for all of them.

  Attributes:
    z_q: codes in the shape and dtype of the latents, straight-through: its
      gradient passes to the latents.
    loss: float32 scalar, already weighted; 0 where there is none.
    indices: int32, the latents' shape without the channel axis, then
      `index_shape`; -1 marks a vector that has a NaN channel and is no token.
  """

  z_q: jax.Array
  loss: jax.Array
  indices: jax.Array


def integers(x: jax.Array, name: str) -> jax.Array:
  """Returns indices or digits in at least 32 bits, so that no bound overflows.

  Args:
    x: integers of any shape, on the device or the host; other dtypes raise
      ValueError. Integers that the device has no room for become -2,
      which is out of every range.
    name: what to call them in the error.
  """
  if not isinstance(x, jax.Array):
    x = np.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f'{name} are {x.dtype}; use an integer dtype.')
  if isinstance(x, np.ndarray) and x.dtype.itemsize > 4:
    # JAX would keep the low 32 bits, which may look like a valid index.
    x = np.where((x >= -1) & (x < 2**31), x.astype(np.int64), -2)
  x = jnp.asarray(x)
  return x.astype(jnp.int32) if x.dtype.itemsize < 4 else x


def checked_number(
    name: str, value: Any, *, lowest: float = -math.inf
) -> float:
  """Returns a finite number >= `lowest` as a float, or raises ValueError.

  A NumPy scalar would set the dtype of what it is multiplied with.
  """
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  try:
    number = float(value) if is_number else math.nan
  except OverflowError:  # An integer that is too large.
    number = math.nan
  if not math.isfinite(number) or number < lowest:
    bound = f', {lowest:g} or more' if math.isfinite(lowest) else ''
    raise ValueError(f'{name} is {value!r}; use a finite number{bound}.')
  return number


def checked_integer(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf
) -> int:
  """Returns an integer from `low` to `high` as an int, or raises ValueError."""
  if (
      isinstance(value, bool)
      or not isinstance(value, numbers.Integral)
      or not low <= value <= high
  ):
    bound = f' to {high}' if math.isfinite(high) else ' or more'
    bound = f', {low}{bound}' if math.isfinite(low) else ''
    raise ValueError(f'{name} is {value!r}; use an integer{bound}.')
  return int(value)


def check_name(name: str, value: Any, known: Iterable[str]) -> None:
  """Raises ValueError unless `value` is one of the known names."""
  # A list, since a set does not take values of any type.
  if value not in list(known):
    raise ValueError(f'{name} is {value!r}; known: {sorted(known)}.')


def checked_axis_name(axis_name: str | Sequence[str] | None) -> AxisName:
  """Returns a field `axis_name`, a list as a tuple, or raises ValueError."""
  names = (axis_name,) if isinstance(axis_name, str) else axis_name
  if names is None:
    return None
  if (
      not isinstance(names, (list, tuple))
      or not names
      or not all(isinstance(name, str) and name for name in names)
  ):
    raise ValueError(
        f'axis_name is {axis_name!r}; use None, the name of an axis, or a tuple'
        ' of names.'
    )
  return axis_name if isinstance(axis_name, str) else tuple(names)


class Quantizer(nn.Module, kw_only=True):
  """Contract of the quantizers: latents to codes, codes to indices and back.

  Quantizers compute in float32 and int32 whatever the dtype of the latents.
  No NaN turns into a token: NaN channels give index -1, and indices outside
  [0, codebook_size) give NaN codes.

  Attributes:
    channel_axis: axis of the latents and codes that holds the channels; 1 for
      [B, C, H, W]. Never guessed from the rank.
  """

  channel_axis: int = -1

  def __post_init__(self):
    self._set_integers('channel_axis')
    super().__post_init__()

  @property
  def codebook_size(self) -> int:
    """Number of values that one index can take, K; 0 without indices."""
    raise NotImplementedError

  @property
  def code_dim(self) -> int:
    """Number of channels of a code."""
    raise NotImplementedError

  @property
  def code_steps(self) -> tuple[float, ...]:
    """Distance between neighbouring codes in each channel.

    In units of 1 where codes are not on a grid. Where they have stages, the
    distance in the first.
    """
    return (1.0,) * self.code_dim

  @property
  def index_shape(self) -> tuple[int, ...]:
    """Trailing axes of the indices of one code; () for one, (0,) for none."""
    return ()

  def __call__(self, z: jax.Array, *, train: bool = False) -> QuantizerOutput:
    """Quantizes latents.

    Args:
      z: [..., code_dim] latents, any float dtype, channels on `channel_axis`.
      train: whether this is a training step.

    Returns:
      QuantizerOutput of codes, loss and indices.
    """
    raise NotImplementedError

  def codes_to_indices(self, codes: jax.Array) -> jax.Array:
    """Returns int32 indices [...] of codes [..., code_dim]; -1 for NaN."""
    raise NotImplementedError

  def indices_to_codes(self, indices: jax.Array) -> jax.Array:
    """Returns float32 codes [..., code_dim] of integer indices [...].

    The channels are put on `channel_axis`. Codes of indices outside
    [0, codebook_size) are NaN.
    """
    raise NotImplementedError

  def get_codebook_entry(self, indices: jax.Array) -> jax.Array:
    """Does what `indices_to_codes` does, under the name VQ code uses."""
    return self.indices_to_codes(indices)

  def spec(self) -> dict[str, Any]:
    """Returns all that fixes the meaning of a token, ready for JSON.

    Given equal variables, two quantizers with equal specs give the same indices
    for the same latents and the same codes for the same indices. What only acts
    on training, such as the weight of the loss, is not part of it.
    """
    raise NotImplementedError

  def _set_integers(
      self, *names: str, low: float = -math.inf, high: float = math.inf
  ) -> None:
    """Checks fields, and makes integers of NumPy ints."""
    for name in names:
      value = checked_integer(name, getattr(self, name), low, high)
      setattr(self, name, value)

  def _set_numbers(self, *names: str, lowest: float = 0) -> None:
    """Checks fields, and makes floats of integers and NumPy scalars."""
    for name in names:
      value = checked_number(name, getattr(self, name), lowest=lowest)
      setattr(self, name, value)

  def _axis_name_in_use(self, train: bool) -> AxisName:
    """Returns `axis_name` in training; initialization has no such axis."""
    return self.axis_name if train and not self.is_initializing() else None

  def _channels_last(self, x: jax.Array, name: str) -> jax.Array:
    """Checks float latents or codes; moves their channels to the last axis."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
          f'{name} are {x.dtype}; a quantizer takes floats: float32, bfloat16 '
          'or float16.'
      )
    if not -x.ndim <= self.channel_axis < x.ndim:
      raise ValueError(
          f'{name} have shape {x.shape}, without an axis {self.channel_axis} '
          'for the channels; set channel_axis to the one that holds them.'
      )
    if x.shape[self.channel_axis] != self.code_dim:
      raise ValueError(
          f'{name} have {x.shape[self.channel_axis]} channels on axis '
          f'{self.channel_axis} of {x.shape}, the quantizer {self.code_dim}; '
          'project the latents, or set channel_axis.'
      )
    return jnp.moveaxis(x, self.channel_axis, -1)

  def _channels_back(self, x: jax.Array) -> jax.Array:
    """Moves the channels from the last axis to `channel_axis`."""
    if not -x.ndim <= self.channel_axis < x.ndim:
      raise ValueError(
          f'Codes of shape {x.shape} have no axis {self.channel_axis} to put '
          'the channels on; use channel_axis=-1.'
      )
    return jnp.moveaxis(x, -1, self.channel_axis)
