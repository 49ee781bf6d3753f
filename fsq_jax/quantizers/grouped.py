"""Grouped FSQ: channels in groups with one index each."""

from typing import Any

from einops import rearrange
import jax

from fsq_jax.quantizers import checks
from fsq_jax.quantizers import fsq

_MAX_GROUPS = 2**16


class GroupedFSQ(fsq.FSQ, kw_only=True):
  """FSQ over groups of channels, for more than the 2^31 codes of one index.

    grouped = GroupedFSQ(levels=(4,) * 8, num_groups=2)  # 4^16 codes
    z_q, loss, indices = grouped.apply({}, z)  # [..., 16], scalar, [..., 2]

  Channels g * d ... g * d + d - 1, d = len(levels), form group g. Every group
  has its own index in [0, codebook_size), on the last axis of the indices for
  every `channel_axis`; `levels` and `codebook_size` describe one index. A NaN
  channel makes only the index of its group -1, and an index out of range only
  the codes of its group NaN.

  Attributes:
    levels: number of levels of each channel of a group.
    num_groups: number of groups.
  """

  num_groups: int

  def __post_init__(self):
    checks.set_integers(self, 'num_groups', low=1, high=_MAX_GROUPS)
    super().__post_init__()

  @property
  def code_dim(self) -> int:
    return self.num_groups * len(self.levels)

  @property
  def code_steps(self) -> tuple[float, ...]:
    return super().code_steps * self.num_groups

  @property
  def index_shape(self) -> tuple[int, ...]:
    return (self.num_groups,)

  def spec(self) -> dict[str, Any]:
    spec = super().spec()
    return spec | {'name': 'grouped_fsq', 'num_groups': self.num_groups}

  def _channels_last(self, x: jax.Array, name: str) -> jax.Array:
    x = super()._channels_last(x, name)
    return rearrange(x, '... (g d) -> ... g d', g=self.num_groups)

  def _channels_back(self, x: jax.Array) -> jax.Array:
    return super()._channels_back(rearrange(x, '... g d -> ... (g d)'))
