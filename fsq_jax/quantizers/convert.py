"""Converts tokens between FSQ conventions, losslessly, by their level indices.

A spec, the result of `Quantizer.spec()`, defines a convention completely and is
stored beside tokens as JSON. Tokens are only decoded under their own spec:

  quantizers.check_same_spec(spec, quantizer.spec())  # raises ValueError
  indices = convert.convert_indices(indices, spec, quantizer.spec())

Conversion keeps the level indices; it changes the order of channels in an index
and the scale of codes. The other quantizer may give the same latents other
tokens: bounds and rounding differ too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fsq_jax.quantizers import builder
from fsq_jax.quantizers import digits as digits_lib
from fsq_jax.quantizers import specs

# Keys of specs that are fields of quantizers; all other keys follow from them.
_FIELDS = (
    'name', 'levels', 'convention', 'bound', 'bins', 'eps', 'num_groups',
    'num_stages', 'num_bits', 'bit_order',
)


def quantizer_from_spec(spec: Mapping[str, Any]) -> digits_lib.DigitQuantizer:
  """Returns the quantizer that a spec describes.

  Args:
    spec: of a quantizer with level indices: any FSQ, LFQ or BSQ.

  Raises:
    ValueError: the spec is of another kind, or of a convention that this
      version does not have; the message lists what differs.
  """
  if 'index_order' not in spec:
    raise ValueError(
        f'Tokens of {spec.get("name")!r} have no level indices; only tokens of'
        ' FSQ, LFQ and their variants can be converted.'
    )
  try:
    quantizer = builder.build_quantizer(
        {key: spec[key] for key in _FIELDS if key in spec}
    )
  except TypeError as error:
    raise ValueError(
        f'Invalid quantizer spec {dict(spec)}: {error}.'
    ) from error
  if different := specs.differences(spec, quantizer.spec()):
    raise ValueError(
        'This version has no such convention (spec -> this version):\n  '
        + '\n  '.join(different)
    )
  return quantizer


def convert_indices(
    indices: np.ndarray, source: Mapping[str, Any], target: Mapping[str, Any]
) -> np.ndarray:
  """Returns int32 indices of the same level indices in another convention.

  Args:
    indices: integers, in the shape that the source's quantizer returns; -1, no
      token, stays -1.
    source: spec of the indices.
    target: spec to convert them to, with the same levels.

  Raises:
    ValueError: the conventions have different levels, the last axis of indices
      has a wrong size, or an index is neither -1 nor in range.
  """
  source, target = _quantizers(source, target)
  indices = np.asarray(indices)
  source.check_index_axes(indices.shape)
  wrong = (indices < -1) | (indices >= source.codebook_size)
  if np.any(wrong):
    raise ValueError(
        f'Indices hold {indices[wrong][0]}; the source has indices from 0 to'
        f' {source.codebook_size - 1}, and -1 for no token.'
    )
  digits = source.indices_to_digits(indices)
  return np.asarray(target.digits_to_indices(digits))


def convert_codes(
    codes: np.ndarray, source: Mapping[str, Any], target: Mapping[str, Any]
) -> np.ndarray:
  """Returns float32 codes of the same level indices in another convention.

  Args:
    codes: [..., code_dim] codes of the source, any float dtype.
    source: spec of the codes.
    target: spec to convert them to, with the same levels.
  """
  source, target = _quantizers(source, target)
  return np.asarray(target.digits_to_codes(source.codes_to_digits(codes)))


def _quantizers(
    source: Mapping[str, Any], target: Mapping[str, Any]
) -> tuple[digits_lib.DigitQuantizer, digits_lib.DigitQuantizer]:
  """Returns the quantizers of two specs with the same levels."""
  pair = quantizer_from_spec(source), quantizer_from_spec(target)
  one, other = specs.layout(source), specs.layout(target)
  if one != other:
    raise ValueError(
        f'Tokens of {source["name"]!r} and {target["name"]!r} have different'
        f' level indices: {one} and {other}.'
    )
  return pair
