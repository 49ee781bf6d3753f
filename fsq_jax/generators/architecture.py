"""Shape of a generator's transformer, and presets of published sizes."""

import dataclasses
from typing import Any, NamedTuple

from jax import numpy as jnp

_CHOICES = {
    'mlp': ('swiglu', 'gelu'),
    'norm': ('rms', 'layer'),
    'positions': ('learned', 'rope'),
    'conditioning': ('prefix', 'adaln'),
}
# LlamaGen rounds the hidden width of SwiGLU up to a multiple of this.
_SWIGLU_MULTIPLE = 256


class Size(NamedTuple):
  """Depth, width and attention heads of a preset."""

  depth: int
  width: int
  num_heads: int


# S, B and L are the sizes of MAGVIT and ViT, B to XL also of LlamaGen.
SIZES = {
    'tiny': Size(2, 64, 2),
    'S': Size(12, 384, 6),
    'B': Size(12, 768, 12),
    'L': Size(24, 1024, 16),
    'XL': Size(36, 1280, 20),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """Options of the pre-norm transformer.

  Attributes:
    causal: whether a position sees earlier positions only (raster-order
      autoregression) or all positions (masked token modelling).
    depth: number of blocks.
    width: channels of the residual stream, w.
    num_heads: attention heads; divides width.
    mlp_dim: hidden channels of the MLP.
    mlp: 'swiglu' (three kernels) or 'gelu' (two).
    norm: 'rms' (RMSNorm) or 'layer' (LayerNorm), both in float32.
    use_bias: whether dense layers of the blocks have biases.
    qk_norm: RMSNorm of queries and keys per head, with a learned gain.
    positions: 'learned', one vector per grid cell, or 'rope', 2-D rotary
      embedding with the identity for the prefix token.
    conditioning: 'prefix', a class token in front of the sequence, or 'adaln',
      adaLN-zero modulation of every block.
    dropout: rate on embeddings and residual branches in training, [0, 1).
    dtype: of activations and matmuls; parameters, norms, softmax and logits
      are float32.
    remat: of blocks, see `models.remat.apply_remat`.
    scan_unroll: unroll factor of the scan over blocks; changes speed only.
  """

  causal: bool
  depth: int
  width: int
  num_heads: int
  mlp_dim: int
  mlp: str = 'swiglu'
  norm: str = 'rms'
  use_bias: bool = False
  qk_norm: bool = True
  positions: str = 'learned'
  conditioning: str = 'prefix'
  dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1

  def __post_init__(self):
    for name, known in _CHOICES.items():
      if getattr(self, name) not in known:
        raise ValueError(
            f'{name} is {getattr(self, name)!r}; known: {list(known)}.'
        )
    if self.width % self.num_heads:
      raise ValueError(
          f'width is {self.width}, which num_heads = {self.num_heads} does not'
          ' divide.'
      )
    if self.positions == 'rope' and self.head_dim % 4:
      raise ValueError(
          f'positions is rope with {self.head_dim} channels per head; 2-D RoPE'
          ' needs a multiple of 4: change width or num_heads.'
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout is {self.dropout}; use a rate in [0, 1).')

  @property
  def head_dim(self) -> int:
    """Channels per attention head."""
    return self.width // self.num_heads


def preset(name: str, *, causal: bool, **options: Any) -> Architecture:
  """Returns the architecture of a preset size.

  Args:
    name: 'tiny', 'S', 'B', 'L' or 'XL'.
    causal: see `Architecture`.
    **options: other fields of `Architecture`, or sizes that replace those of
      the preset. mlp_dim is by default 4 w for GELU, and for SwiGLU 8 w / 3
      rounded up to a multiple of 256 (of the width if that is smaller), as in
      LlamaGen.

  Raises:
    ValueError: an unknown name or option value.
  """
  if name not in SIZES:
    raise ValueError(f'The preset is {name!r}; known: {list(SIZES)}.')
  options = {**SIZES[name]._asdict(), **options}
  width = options['width']
  multiple = min(_SWIGLU_MULTIPLE, width)
  mlp_dim = 4 * width
  if options.get('mlp', 'swiglu') == 'swiglu':
    mlp_dim = -(-(2 * mlp_dim // 3) // multiple) * multiple
  return Architecture(causal=causal, **{'mlp_dim': mlp_dim, **options})
