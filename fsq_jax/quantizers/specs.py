"""Comparison of quantizer specs: whether tokens mean the same."""

from collections.abc import Mapping
from typing import Any


def check_same_spec(
    tokens: Mapping[str, Any], quantizer: Mapping[str, Any]
) -> None:
  """Raises ValueError, listing what differs, unless two specs are equal.

  Tuples and lists are equal: a spec that was read from JSON has lists.

  Args:
    tokens: spec of the quantizer that made the tokens.
    quantizer: spec of the quantizer that is to decode them.
  """
  if different := differences(tokens, quantizer):
    advice = 'Decode'
    if layout(tokens) == layout(quantizer) is not None:
      advice = 'Convert them with convert.convert_indices, or decode'
    raise ValueError(
        'The tokens are of another convention (tokens -> quantizer):\n  '
        + '\n  '.join(different)
        + f'\n{advice} them with the quantizer that made them.'
    )


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """Returns 'key: value -> value' for every difference of two specs."""
  one, other = _with_lists(one), _with_lists(other)
  return [
      f'{key}: {_show(one, key)} -> {_show(other, key)}'
      for key in sorted({*one, *other})
      if key not in one or key not in other or one[key] != other[key]
  ]


def layout(spec: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns what determines the level indices of a token: levels, indices.

  Tokens of two specs with equal layouts can be converted into each other.
  None for quantizers without level indices.
  """
  if 'index_order' not in spec:
    return None
  spec = _with_lists(spec)
  # The bits of LFQ and BSQ are level indices of two levels.
  levels = spec.get('levels') or [2] * spec.get('num_bits', 0)
  indices = {
      key: spec[key] for key in ('num_groups', 'num_stages') if key in spec
  }
  return {'levels': levels, **indices}


def _with_lists(spec: Mapping[str, Any]) -> dict[str, Any]:
  return {
      key: list(value) if isinstance(value, tuple) else value
      for key, value in spec.items()
  }


def _show(spec: Mapping[str, Any], key: str) -> str:
  return repr(spec[key]) if key in spec else 'absent'
