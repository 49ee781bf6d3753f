"""The tokens of a generator: codebook size, levels, and level indices."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.quantizers import digits

_MAX_CODEBOOK_SIZE = 2**31 - 1


def as_int32(x: jax.typing.ArrayLike, name: str) -> jax.Array:
  """Returns integers as int32, so that no later sum overflows.

  Args:
    x: [...] integers of any width below 2^31, such as the uint16 of token
      files. A NumPy int64 or uint64 outside int32 becomes -2, which is outside
      of every range.
    name: of the argument, for the message.

  Raises:
    ValueError: `x` is not of an integer dtype.
  """
  if not isinstance(x, jax.Array):
    x = np.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f'{name} are {x.dtype}; use an integer dtype.')
  if isinstance(x, np.ndarray) and x.dtype.itemsize >= 4:
    info = np.iinfo(np.int32)
    x = np.where((x >= info.min) & (x <= info.max), x, -2).astype(np.int32)
  return jnp.asarray(x).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """The codebook that tokens index.

  Attributes:
    codebook_size: number of codes, K.
    levels: number of values of each dimension, (L_1, ..., L_d) with product K;
      () for tokens without levels (VQ, SimVQ).
    strides: weight of each level index in a token; () without levels.
  """

  codebook_size: int
  levels: tuple[int, ...] = ()
  strides: tuple[int, ...] = ()

  def __post_init__(self):
    if not 1 <= self.codebook_size <= _MAX_CODEBOOK_SIZE:
      raise ValueError(
          f'codebook_size is {self.codebook_size}; use 1 to'
          f' {_MAX_CODEBOOK_SIZE}.'
      )
    size = math.prod(self.levels)
    if self.levels and size != self.codebook_size:
      raise ValueError(
          f'levels {self.levels} have {size} codes, but codebook_size is'
          f' {self.codebook_size}.'
      )
    if len(self.strides) != len(self.levels):
      raise ValueError(
          f'strides {self.strides} do not match levels {self.levels}; give one'
          ' stride per level.'
      )

  def to_levels(self, tokens: jax.Array) -> jax.Array:
    """Returns the int32 level indices [..., d] of tokens [...].

    Level indices of tokens outside [0, K) are -1.
    """
    tokens = as_int32(tokens, 'tokens')
    is_valid = (tokens >= 0) & (tokens < self.codebook_size)
    tokens = jnp.where(is_valid, tokens, 0)
    indices = [
        jax.lax.rem(jax.lax.div(tokens, np.int32(stride)), np.int32(level))
        for stride, level in zip(self.strides, self.levels, strict=True)
    ]
    return jnp.where(is_valid[..., None], jnp.stack(indices, axis=-1), -1)

  def to_tokens(self, levels: jax.Array | Sequence[jax.Array]) -> jax.Array:
    """Returns the int32 tokens [...] of level indices.

    Args:
      levels: [..., d] integers in [0, L_i), or a list of d arrays [...].
    """
    if not isinstance(levels, (list, tuple)):
      levels = [levels[..., i] for i in range(len(self.levels))]
    return sum(
        as_int32(index, 'levels') * np.int32(stride)
        for index, stride in zip(levels, self.strides, strict=True)
    )

  def check(self, tokens: np.ndarray) -> None:
    """Raises ValueError unless all tokens are in [0, K); for host arrays."""
    tokens = np.asarray(tokens)
    outside = (tokens < 0) | (tokens >= self.codebook_size)
    if np.any(outside):
      raise ValueError(
          f'tokens contain {tokens[outside][0]} ({np.sum(outside)} of'
          f' {tokens.size} are outside of the codebook); allowed are 0 to'
          f' {self.codebook_size - 1}.'
      )


def from_levels(
    levels: Sequence[int], *, first_fastest: bool = False
) -> Vocabulary:
  """Returns the vocabulary of FSQ tokens.

  Args:
    levels: number of values of each dimension.
    first_fastest: whether the first dimension varies fastest in a token, as in
      the conventions 'paper' and 'vqp', or the last one, as in 'symmetric'.
  """
  levels = tuple(int(level) for level in levels)
  strides = tuple(
      math.prod(levels[:i] if first_fastest else levels[i + 1 :])
      for i in range(len(levels))
  )
  return Vocabulary(
      codebook_size=math.prod(levels), levels=levels, strides=strides
  )


def from_spec(spec: Mapping[str, Any], codebook_size: int) -> Vocabulary:
  """Returns the vocabulary of the tokens of a quantizer.

  Args:
    spec: `Quantizer.spec()`, as in the manifest of token files.
    codebook_size: number of codes.

  Raises:
    ValueError: a quantizer with several indices per code.
  """
  if 'num_groups' in spec or 'num_stages' in spec:
    raise ValueError(
        f'The quantizer {spec.get("name")!r} has several indices per code;'
        ' generators need one token per position: use fsq, lfq, bsq, vq or'
        ' simvq.'
    )
  if 'index_order' not in spec:
    return Vocabulary(codebook_size=codebook_size)
  levels = spec.get('levels') or (2,) * spec['num_bits']
  vocabulary = from_levels(
      levels, first_fastest=spec['index_order'] == digits.FIRST_FASTEST
  )
  return dataclasses.replace(vocabulary, codebook_size=codebook_size)
