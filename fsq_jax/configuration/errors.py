"""Error messages that name the field of a config."""

from collections.abc import Iterator
import contextlib


@contextlib.contextmanager
def about(field: str) -> Iterator[None]:
  """Context that prefixes the message of a ValueError with a field's name."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{field}: {error}') from error
