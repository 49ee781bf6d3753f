"""The contract of quantizers: arguments, results and what indices mean."""

import numbers
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp


class QuantizerOutput(NamedTuple):
  """Result of every quantizer.

  Attributes:
    z_q: codes in the shape and dtype of the latents, straight-through: its
      gradient passes to the latents.
    loss: float32 scalar, already weighted; 0 for quantizers without a loss.
    indices: int32, the latents' shape without the channel axis, then
      `index_shape`; -1 for vectors with a NaN channel, which have no token.
  """

  z_q: jax.Array
  loss: jax.Array
  indices: jax.Array


class Quantizer(nn.Module, kw_only=True):
  """Base class: latents to codes, codes to indices and back.

  Quantizers compute in float32 and int32 for latents of any float dtype. NaN
  never becomes a token: NaN channels give index -1, and indices outside
  [0, codebook_size) give NaN codes.

  Attributes:
    channel_axis: axis of the latents and codes that holds the channels; 1 for
      [B, C, H, W]. Never guessed from the rank.
  """

  channel_axis: int = -1

  def __post_init__(self):
    axis = self.channel_axis
    if isinstance(axis, bool) or not isinstance(axis, numbers.Integral):
      raise ValueError(f'channel_axis is {axis!r}; use an integer.')
    self.channel_axis = int(axis)
    super().__post_init__()

  @property
  def codebook_size(self) -> int:
    """Number of values of one index, K; 0 for NoQuantizer."""
    raise NotImplementedError

  @property
  def code_dim(self) -> int:
    """Number of channels of a code."""
    raise NotImplementedError

  @property
  def code_steps(self) -> tuple[float, ...]:
    """Distance between neighbouring codes in each channel.

    1 where codes are not on a grid; of residual quantizers, the distance in
    the first stage.
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

    Channels are on `channel_axis`. Codes of indices outside [0, codebook_size)
    are NaN.
    """
    raise NotImplementedError

  def get_codebook_entry(self, indices: jax.Array) -> jax.Array:
    """Alias of `indices_to_codes`, the name in taming-transformers."""
    return self.indices_to_codes(indices)

  def spec(self) -> dict[str, Any]:
    """Returns everything that defines the meaning of a token, JSON-ready.

    Given equal variables, quantizers with equal specs give the same indices for
    the same latents and the same codes for the same indices. Fields that only
    affect training, such as the weight of the loss, are not in it.
    """
    raise NotImplementedError

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
