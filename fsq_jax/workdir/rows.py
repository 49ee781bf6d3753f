"""Rows of metrics, and the interface of their destinations."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import NamedTuple


class Row(NamedTuple):
  """A row of metrics.jsonl.

  Attributes:
    step: training steps taken.
    split: 'train' or 'eval'.
    scalars: metrics by name; NaN for values that are not finite.
    figures: PNG files of an evaluation by name: 'reconstructions', 'samples',
      and 'reconstructions/coffee' for a figure with a name of its own.
  """

  step: int
  split: str
  scalars: Mapping[str, float]
  figures: Mapping[str, pathlib.Path]

  def named_scalars(self) -> dict[str, float]:
    """Returns the scalars as 'train/loss' and the like."""
    return {f'{self.split}/{name}': x for name, x in self.scalars.items()}


class Tracker:
  """Destination of rows: a file, TensorBoard, or a service for experiments."""

  def start(self, rows: Sequence[Row]) -> None:
    """Called once before `write`, with the rows of earlier processes."""

  def write(self, row: Row) -> None:
    """Adds a row."""
    raise NotImplementedError

  def flush(self) -> None:
    """Waits until the rows are stored."""

  def close(self, *, failed: bool = False) -> None:
    """Ends the rows of this process.

    Args:
      failed: an error or a signal has ended the run.
    """
