"""Writes and reads metrics.jsonl; writes TensorBoard events."""

from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
from typing import Any

from absl import logging

from fsq_jax.workdir import files


class MetricWriter:
  """Appends rows to metrics.jsonl and, with tensorboardX, to event files.

  A run that resumes from a checkpoint first drops the rows after it, so that
  the file equals that of an uninterrupted run.
  """

  def __init__(self, folder: pathlib.Path, *, first_step: int):
    """Opens the files; rows of steps after `first_step` are dropped."""
    self._path = folder / files.METRICS
    kept = ''.join(
        f'{line}\n'
        for line, row in _read_rows(self._path)
        if row['step'] <= first_step
    )
    files.write_bytes(self._path, kept.encode())
    self._file = open(self._path, 'a', encoding='utf-8')  # noqa: SIM115
    self._events = None
    try:
      import tensorboardX  # An optional dependency.
    except ImportError:
      logging.info(
          'No TensorBoard events are written; install them by: pip install'
          ' tensorboardX'
      )
    else:
      self._events = tensorboardX.SummaryWriter(
          str(folder / files.TENSORBOARD), purge_step=first_step + 1
      )

  def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
    """Appends one row; `split` is 'train' or 'eval'."""
    row = files.finite_or_null({'step': step, 'split': split, **scalars})
    self._file.write(json.dumps(row, allow_nan=False) + '\n')
    self._file.flush()
    if self._events is not None:
      for name, value in scalars.items():
        self._events.add_scalar(f'{split}/{name}', value, step)

  def flush(self) -> None:
    """Waits until the rows are on disk."""
    os.fsync(self._file.fileno())
    if self._events is not None:
      self._events.flush()

  def close(self) -> None:
    """Closes the files."""
    # `write` flushes every row, so that an error of this one has been raised.
    with contextlib.suppress(OSError):
      self._file.close()
    if self._events is not None:
      self._events.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads metrics.jsonl and skips corrupted lines, as after a crash.

  Args:
    folder: the run's folder.

  Returns:
    The rows in order; [] if there is no file.
  """
  return [row for _, row in _read_rows(pathlib.Path(folder) / files.METRICS)]


def _read_rows(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  if not path.exists():
    return []
  rows = []
  for line in path.read_text('utf-8', errors='replace').splitlines():
    try:
      row = json.loads(line)
    except ValueError:
      logging.warning('%s: skipped a corrupted line: %.60s', path, line)
      continue
    if isinstance(row, dict) and isinstance(row.get('step'), int):
      rows.append((line, row))
  return rows
