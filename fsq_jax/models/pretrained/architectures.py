"""Architectures of pretrained vision transformers, by family and by name."""

import ast
import dataclasses
import math
from typing import Any

from fsq_jax.models import resampling

# Longer than any description, short enough for Python's parser.
_MAX_TEXT = 1000
_MAX_FLOAT32 = 3.4e38
POSITIONS = ('learned', 'sincos', 'rope')
MLPS = ('plain', 'gated')
ACTIVATIONS = ('gelu', 'gelu_tanh', 'silu')
BIASES = ('query', 'key', 'value', 'out', 'mlp')
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """Sizes and variants of a pretrained vision transformer.

  Attributes:
    width: channels of a token.
    depth: blocks.
    num_heads: attention heads; they divide the width.
    mlp_dim: hidden channels of the MLP; with a gate, of each of its halves.
    patch_size: side in pixels; incomplete patches at the bottom and on the
      right are cropped, as by a convolution without padding.
    num_class_tokens: 0 or 1; the class token comes first.
    num_registers: tokens without a position, between class token and patches.
    position: 'learned' and 'sincos' embeddings are added before the first block
      and differ only in their initial values; 'rope' rotates the queries and
      keys of patches.
    position_kernel: kernel by which the authors of the weights resample added
      positions to other grids, a key of `resampling.KERNELS`; unused by 'rope'.
    rope_theta: base of the wavelengths of 'rope'.
    mlp: 'plain', two dense layers, or 'gated', with a gate beside the first.
    activation: 'gelu' is exact, 'gelu_tanh' its approximation.
    biases: dense layers with a bias, of `BIASES`.
    layer_scale: whether a learned vector scales each residual branch.
    norm_epsilon: added to the variance by each LayerNorm.
    mean: per channel, of the training pixels in [0, 1].
    std: standard deviation per channel, likewise.
  """

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  patch_size: int
  num_class_tokens: int
  num_registers: int
  position: str
  position_kernel: str
  rope_theta: float
  mlp: str
  activation: str
  biases: tuple[str, ...]
  layer_scale: bool
  norm_epsilon: float
  mean: tuple[float, ...]
  std: tuple[float, ...]

  def __post_init__(self):
    for name, (allowed, fits) in _FIELDS.items():
      if not fits(getattr(self, name)):
        raise ValueError(f'{name} is {getattr(self, name)!r}; {allowed}.')
    if self.position == 'rope' and not self.rope_theta:
      raise ValueError("rope_theta is 0; positions 'rope' divide by it.")
    # RoPE uses pairs of the channels of a head, one half for rows and one for
    # columns; sines and cosines do the same with the full width.
    multiple = {
        'learned': self.num_heads,
        'sincos': math.lcm(4, self.num_heads),
        'rope': 4 * self.num_heads,
    }[self.position]
    if self.width % multiple:
      raise ValueError(
          f'The width {self.width} must be a multiple of {multiple}, for'
          f' {self.num_heads} heads and {self.position} positions.'
      )

  @property
  def num_prefix_tokens(self) -> int:
    """Number of tokens before the patches."""
    return self.num_class_tokens + self.num_registers


def _one_of(*known):
  # Types are compared too, since 1 == True.
  return f'known: {sorted(known)}', lambda x: any(
      type(x) is type(y) and x == y for y in known
  )


def _is_number(x: Any, low: float = -math.inf) -> bool:
  # math.isfinite fails on an int that exceeds a float.
  return type(x) in (int, float) and low <= x and abs(x) <= _MAX_FLOAT32


def _are_channels(x: Any) -> bool:
  return type(x) is tuple and len(x) == 3 and all(map(_is_number, x))


_COUNT = ('it must be an integer >= 1', lambda x: type(x) is int and x >= 1)
_NUMBER = ('it must be a finite number >= 0', lambda x: _is_number(x, 0))
_CHANNELS = ('it must be a tuple of three finite numbers', _are_channels)
# `parse_architecture` may read values of any type from a text.
_FIELDS = {
    'width': _COUNT,
    'depth': _COUNT,
    'num_heads': _COUNT,
    'mlp_dim': _COUNT,
    'patch_size': _COUNT,
    'num_class_tokens': _one_of(0, 1),
    'num_registers': (
        'it must be an integer >= 0', lambda x: type(x) is int and x >= 0
    ),
    'position': _one_of(*POSITIONS),
    'position_kernel': _one_of(*resampling.KERNELS),
    'rope_theta': _NUMBER,
    'mlp': _one_of(*MLPS),
    'activation': _one_of(*ACTIVATIONS),
    'biases': (
        f'it must be a tuple of some of {BIASES}, in their order',
        lambda x: type(x) is tuple and x == tuple(b for b in BIASES if b in x),
    ),
    'layer_scale': _one_of(False, True),
    'norm_epsilon': _NUMBER,
    'mean': _CHANNELS,
    'std': (
        'it must be a tuple of three finite numbers > 0',
        lambda x: _are_channels(x) and min(x) > 0,
    ),
}
# Fields that all members of a family share. SigLIP of big_vision differs from
# SigLIP of Hugging Face only in the resampling of positions.
FAMILIES: dict[str, dict[str, Any]] = {}
FAMILIES['siglip'] = {
    'num_class_tokens': 0,
    'num_registers': 0,
    'position': 'learned',
    'position_kernel': 'bicubic',
    'rope_theta': 0.0,
    'mlp': 'plain',
    'activation': 'gelu_tanh',
    'biases': BIASES,
    'layer_scale': False,
    'norm_epsilon': 1e-6,
    'mean': _HALF,
    'std': _HALF,
}
FAMILIES['siglip_big_vision'] = {
    **FAMILIES['siglip'],
    'position_kernel': 'bilinear_align_corners',
}
FAMILIES['dinov2'] = {
    **FAMILIES['siglip'],
    'num_class_tokens': 1,
    'activation': 'gelu',
    'layer_scale': True,
    'mean': _IMAGENET_MEAN,
    'std': _IMAGENET_STD,
}
# The first DINO.
FAMILIES['dino'] = {**FAMILIES['dinov2'], 'layer_scale': False}
FAMILIES['dinov2_with_registers'] = {
    **FAMILIES['dinov2'],
    'num_registers': 4,
    'position_kernel': 'bicubic_antialias',
}
FAMILIES['dinov3'] = {
    **FAMILIES['dinov2'],
    'num_registers': 4,
    'position': 'rope',
    'rope_theta': 100.0,
    'biases': ('query', 'value', 'out', 'mlp'),
    'norm_epsilon': 1e-5,
}
FAMILIES['mae'] = {
    **FAMILIES['dinov2'],
    'position': 'sincos',
    'layer_scale': False,
    'norm_epsilon': 1e-12,
}
_SIZES = {
    'S': {'width': 384, 'depth': 12, 'num_heads': 6, 'mlp_dim': 1536},
    'B': {'width': 768, 'depth': 12, 'num_heads': 12, 'mlp_dim': 3072},
    'L': {'width': 1024, 'depth': 24, 'num_heads': 16, 'mlp_dim': 4096},
    'So400m': {'width': 1152, 'depth': 27, 'num_heads': 16, 'mlp_dim': 4304},
    'g-opt': {'width': 1536, 'depth': 40, 'num_heads': 16, 'mlp_dim': 6144},
    # DINOv2's giant; each half of its MLP has 2/3 of 4 times the width.
    'g': {
        'width': 1536, 'depth': 40, 'num_heads': 24, 'mlp_dim': 4096,
        'mlp': 'gated', 'activation': 'silu',
    },
}
_MEMBERS = {
    'siglip': (
        ('B', 16), ('L', 16), ('So400m', 14), ('So400m', 16), ('g-opt', 16)
    ),
    'dino': (('S', 8), ('S', 16), ('B', 8), ('B', 16)),
    'dinov2': (('S', 14), ('B', 14), ('L', 14), ('g', 14)),
    'dinov2_with_registers': (('S', 14), ('B', 14), ('L', 14), ('g', 14)),
    'dinov3': (('B', 16), ('L', 16)),
    'mae': (('B', 16), ('L', 16)),
}


def build_architecture(family: str, **fields: Any) -> Architecture:
  """Builds an architecture of a family.

  Args:
    family: a key of `FAMILIES`.
    **fields: of `Architecture`: required fields that the family does not set,
      and overrides.

  Raises:
    ValueError: an unknown family, or invalid or inconsistent fields.
  """
  if family not in FAMILIES:
    raise ValueError(f'The family is {family!r}; known: {sorted(FAMILIES)}.')
  return Architecture(**{**FAMILIES[family], **fields})


# Published sizes, such as 'siglip_L/16'. SigLIP 2 with a fixed resolution has
# the architecture of SigLIP.
ARCHITECTURES = {
    f'{family}_{size}/{patch}': build_architecture(
        family, patch_size=patch, **_SIZES[size]
    )
    for family, members in _MEMBERS.items()
    for size, patch in members
}


def parse_architecture(text: str) -> Architecture:
  """Returns the architecture with a name or a description.

  Args:
    text: a key of `ARCHITECTURES`, or a family with fields in parentheses as
      returned by `describe_architecture`: 'siglip(width=32, depth=2, ...)'.

  Raises:
    ValueError: another text, or missing, unknown or invalid fields.
  """
  if text in ARCHITECTURES:
    return ARCHITECTURES[text]
  try:
    return build_architecture(**_parse_call(text))
  except _NO_ARCHITECTURE as error:
    shown = text if len(text) <= _MAX_TEXT else f'{text[:50]} ...'
    raise ValueError(
        f'The architecture {shown!r} is invalid ({error}); known:'
        f' {sorted(ARCHITECTURES)}, or a family with its fields, such as'
        " 'siglip(width=768, depth=12, num_heads=12, mlp_dim=3072,"
        " patch_size=16)'."
    ) from error


# Errors of Python's parser, and of `build_architecture` with wrong fields.
_NO_ARCHITECTURE = (
    MemoryError, RecursionError, SyntaxError, TypeError, ValueError,
)


def _parse_call(text: str) -> dict[str, Any]:
  """Returns the arguments of `build_architecture`; nothing is executed."""
  if len(text) > _MAX_TEXT:
    raise ValueError(f'{len(text)} characters, more than {_MAX_TEXT}')
  call = ast.parse(text, mode='eval').body
  if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
    raise ValueError('neither a name nor a family with fields')
  if call.args:
    raise ValueError('fields without a name')
  names = [keyword.arg for keyword in call.keywords]
  if len(set(names)) < len(names):
    raise ValueError('a field twice')
  fields = {x.arg: ast.literal_eval(x.value) for x in call.keywords}
  if unknown := sorted({str(name) for name in names} - _FIELDS.keys()):
    raise ValueError(f'unknown fields {unknown}; known: {sorted(_FIELDS)}')
  return {'family': call.func.id, **fields}


def describe_architecture(architecture: Architecture) -> str:
  """Returns a text from which `parse_architecture` makes the architecture.

  Args:
    architecture: of any family.

  Returns:
    Its name in `ARCHITECTURES`; without one, the family with the fewest fields
    to be added or changed, and these fields.
  """
  for name, known in ARCHITECTURES.items():
    if architecture == known:
      return name
  fields = {
      field.name: getattr(architecture, field.name)
      for field in dataclasses.fields(architecture)
  }
  descriptions = []
  for family, known in FAMILIES.items():
    own = {n: x for n, x in fields.items() if known.get(n) != x}
    text = ', '.join(f'{name}={value!r}' for name, value in own.items())
    descriptions.append((len(own), f'{family}({text})'))
  return min(descriptions)[1]
