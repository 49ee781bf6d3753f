"""Tokens of one dialect in another: exact, through digits, never by guess.

A spec, what `Quantizer.spec()` returns, names a dialect completely and is kept
beside tokens as JSON. Tokens are decoded under their own spec alone:

  convert.check_same_dialect(spec, quantizer.spec())  # raises ValueError
  indices = convert.convert_indices(indices, spec, quantizer.spec())

Conversion keeps digits, so it changes the order of the digits in an index and
the scale of codes. It does not make the tokens that the other quantizer would
have made of the same latents: bounds and rounding differ too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fsq_jax.quantizers import builder
from fsq_jax.quantizers import digits as digits_lib

# Keys of specs that are fields of quantizers; all others follow from them.
_FIELDS = (
    'name', 'levels', 'convention', 'bound', 'bins', 'eps', 'num_groups',
    'num_stages', 'num_bits', 'bit_order',
)


def quantizer_from_spec(spec: Mapping[str, Any]) -> digits_lib.DigitQuantizer:
  """Returns the quantizer that a spec describes.

  Args:
    spec: of a quantizer whose tokens are digits: any FSQ, LFQ or BSQ.

  Raises:
    ValueError: the spec is of another kind, or of a dialect that this version
      does not have; it lists what differs.
  """
  if 'index_order' not in spec:
    raise ValueError(
        f'Tokens of {spec.get("name")!r} are not digits; only those of FSQ, LFQ'
        ' and their kind can be converted.'
    )
  try:
    quantizer = builder.build_quantizer(
        {key: spec[key] for key in _FIELDS if key in spec}
    )
  except TypeError as error:
    raise ValueError(f'The spec {dict(spec)} is none: {error}.') from error
  if differences := _differences(spec, quantizer.spec()):
    raise ValueError(
        'The spec is no dialect of this version (spec -> this version):\n  '
        + '\n  '.join(differences)
    )
  return quantizer


def check_same_dialect(
    tokens: Mapping[str, Any], quantizer: Mapping[str, Any]
) -> None:
  """Raises ValueError, listing what differs, unless two specs are equal.

  Tuples and lists are alike: a spec that comes from JSON has lists.

  Args:
    tokens: spec that the tokens were made under.
    quantizer: spec of the quantizer that is to decode them.
  """
  if differences := _differences(tokens, quantizer):
    try:
      _same_digits(tokens, quantizer)
      advice = 'Convert them with convert.convert_indices, or decode'
    except ValueError:
      advice = 'Decode'
    raise ValueError(
        'The tokens are of another dialect (tokens -> quantizer):\n  '
        + '\n  '.join(differences)
        + f'\n{advice} them with the quantizer that made them.'
    )


def convert_indices(
    indices: np.ndarray, source: Mapping[str, Any], target: Mapping[str, Any]
) -> np.ndarray:
  """Returns the int32 indices that spell the same digits in another dialect.

  Args:
    indices: integers, in the shape that the source's quantizer gives; -1, the
      mark of no token, stays -1.
    source: spec that the indices were made under.
    target: spec to convert them to, of the same levels.

  Raises:
    ValueError: dialects that have no digits in common, indices whose last axis
      is not that of the source, or an index that is neither -1 nor in its
      range.
  """
  source, target = _same_digits(source, target)
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
  """Returns float32 codes of the same digits in the scale of another dialect.

  Args:
    codes: [..., code_dim] codes of the source, any float dtype.
    source: spec that the codes were made under.
    target: spec to convert them to, of the same levels.
  """
  source, target = _same_digits(source, target)
  return np.asarray(target.digits_to_codes(source.codes_to_digits(codes)))


def _same_digits(
    source: Mapping[str, Any], target: Mapping[str, Any]
) -> tuple[digits_lib.DigitQuantizer, digits_lib.DigitQuantizer]:
  """Returns the quantizers of two specs, or raises ValueError."""
  pair = quantizer_from_spec(source), quantizer_from_spec(target)
  shapes = [(q.levels, q.index_shape, q.code_dim) for q in pair]
  if shapes[0] != shapes[1]:
    raise ValueError(
        f'Tokens of {source["name"]!r} and {target["name"]!r} have no digits in'
        ' common: (levels, indices a code, channels) are'
        f' {shapes[0]} and {shapes[1]}.'
    )
  return pair


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """Returns 'key: value -> value' of what two specs do not share."""

  def plain(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in spec.items()
    }

  def show(spec: Mapping[str, Any], key: str) -> str:
    return repr(spec[key]) if key in spec else 'absent'

  one, other = plain(one), plain(other)
  return [
      f'{key}: {show(one, key)} -> {show(other, key)}'
      for key in sorted({*one, *other})
      if key not in one or key not in other or one[key] != other[key]
  ]
