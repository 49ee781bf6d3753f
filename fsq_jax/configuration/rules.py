"""Rules that values of config fields satisfy, and their texts."""

from collections.abc import Callable, Container
import pathlib
import re
from typing import Any, NamedTuple

MAX_INT32 = 2**31 - 1
_MAX_FLOAT32 = 3.4e38
_HUB_ID = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')


class Rule(NamedTuple):
  """The values that one field may have.

  Attributes:
    allowed: the allowed values in words, as messages print them.
    fits: whether a value, of any type, is allowed.
    is_path: whether values are paths.
    takes_name: whether a path may also be `is_hub_id` or in `shipped.NAMES`.
    stores: schemes of URLs that a path may also have.
  """

  allowed: str
  fits: Callable[[Any], bool]
  is_path: bool = False
  takes_name: bool = False
  stores: tuple[str, ...] = ()


class CrossRule(NamedTuple):
  """The combinations of values that several fields may have.

  Attributes:
    fields: dotted names.
    allowed: the allowed combinations in words.
    fits: whether the values of the fields, in order, are allowed. Each value
      satisfies the rule of its own field.
  """

  fields: tuple[str, ...]
  allowed: str
  fits: Callable[..., bool]


def integer(low: int, high: int = MAX_INT32) -> Rule:
  """An int from low to high; not a bool."""
  # The type itself, since a bool is an instance of int.
  return Rule(
      f'an integer from {low} to {high}',
      lambda x: type(x) is int and low <= x <= high,
  )


def number(condition: str, fits: Callable[[float], bool]) -> Rule:
  """A finite int or float that satisfies the condition named `condition`."""
  # NaN and infinity fail the comparison too.
  return Rule(
      f'a finite number {condition}'.rstrip(),
      lambda x: type(x) in (int, float) and abs(x) <= _MAX_FLOAT32 and fits(x),
  )


def optional(rule: Rule) -> Rule:
  """None, or a value that the rule allows."""
  return Rule(f'None or {rule.allowed}', lambda x: x is None or rule.fits(x))


def name(*names: str) -> Rule:
  """One of the names."""
  return Rule(
      f'one of {sorted(names)}', lambda x: isinstance(x, str) and x in names
  )


def tuple_of(
    allowed: str, element: Rule, lengths: Container[int] | None = None
) -> Rule:
  """A tuple, described by `allowed`, of one of the lengths; None is any."""
  return Rule(
      allowed,
      lambda x: (
          isinstance(x, tuple)
          and (lengths is None or len(x) in lengths)
          and all(map(element.fits, x))
      ),
  )


def path(
    allowed: str,
    *,
    takes_name: bool = False,
    stores: tuple[str, ...] = (),
) -> Rule:
  """A path, described by `allowed`, or ''."""
  return Rule(allowed, TEXT.fits, True, takes_name, stores)


def is_hub_id(value: str) -> bool:
  """Whether a value is 'owner/name' of the Hugging Face Hub, and no path."""
  return (
      _HUB_ID.fullmatch(value) is not None
      and not pathlib.Path(value).expanduser().exists()
  )


def is_expression(value: Any) -> bool:
  """Whether a value is a regular expression."""
  try:
    return isinstance(value, str) and bool(re.compile(value))
  except re.error:
    return False


def is_partition_rule(value: Any) -> bool:
  """Whether a value is (regular expression, strategy), see partitioning."""
  if not isinstance(value, tuple) or len(value) != 2:
    return False
  pattern, strategy = value
  if isinstance(strategy, tuple):
    known = all(axis in ('data', 'fsdp', 'tensor', None) for axis in strategy)
  else:
    known = strategy in ('column', 'fsdp', 'replicate', 'row')
  return known and is_expression(pattern)


def is_factor_rule(value: Any) -> bool:
  """Whether a value is (regular expression, number > 0)."""
  if not isinstance(value, tuple) or len(value) != 2:
    return False
  pattern, factor = value
  return is_expression(pattern) and POSITIVE.fits(factor)


INTEGER = Rule('an integer', integer(-MAX_INT32).fits)
COUNT = integer(1)
COUNT_OR_ZERO = integer(0)
NUMBER = number('', lambda x: True)
POSITIVE = number('> 0', lambda x: x > 0)
NOT_NEGATIVE = number('>= 0', lambda x: x >= 0)
FRACTION = number('in [0, 1]', lambda x: 0 <= x <= 1)
DECAY = number('in [0, 1)', lambda x: 0 <= x < 1)
BOOL = Rule('True or False', lambda x: isinstance(x, bool))
# Most are names of files, which cannot hold NUL.
TEXT = Rule(
    'a string without NUL', lambda x: isinstance(x, str) and '\0' not in x
)
NON_EMPTY = Rule(
    'a string that is not empty, without NUL',
    lambda x: TEXT.fits(x) and x != '',
)
PATH = path(TEXT.allowed)
DTYPE = name('float32', 'bfloat16')
REMAT = name('none', 'blocks', 'qkv', 'dots')
