"""Writes and reads metrics.jsonl; writes TensorBoard events."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import math
import os
import pathlib
import time
from typing import Any

from absl import logging
import numpy as np
import PIL.Image

from fsq_jax.workdir import files
from fsq_jax.workdir import object_store
from fsq_jax.workdir import rows as rows_lib


class JsonLines(rows_lib.Tracker):
  """Appends rows to metrics.jsonl."""

  def __init__(self, path: pathlib.Path, kept: Sequence[str]):
    """Opens the file, which then has the lines `kept`."""
    text = ''.join(f'{line}\n' for line in kept)
    files.write_bytes(path, text.encode())
    self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115

  def write(self, row):
    self._file.write(_to_line(row) + '\n')
    self._file.flush()

  def flush(self):
    os.fsync(self._file.fileno())

  def close(self, *, failed=False):
    # `write` flushes every row, so that an error of this one has been raised.
    with contextlib.suppress(OSError):
      self._file.close()


class JsonObject(rows_lib.Tracker):
  """Rewrites metrics.jsonl in an object store, which cannot append.

  Rows are stored at the end, at every `flush` and thus before every checkpoint,
  and otherwise at most every `INTERVAL` seconds; a process that is killed loses
  the later ones. Each version replaces this process's own previous one: if
  another process has written meanwhile, an `object_store.ConflictError` ends
  this one before it saves a checkpoint.
  """

  INTERVAL = 30.0

  def __init__(self, path: pathlib.Path, kept: Sequence[str]):
    """Writes the object, which then has the lines `kept`."""
    self._path = path
    self._lines = list(kept)
    self._is_stored = False
    self._generation: int | None = None
    self._store()

  def write(self, row):
    self._lines.append(_to_line(row))
    self._is_stored = False
    if time.monotonic() - self._stored_at > self.INTERVAL:
      try:
        self._store()
      except object_store.ConflictError:
        raise
      except OSError as error:
        # The rows are kept; `flush` raises before a checkpoint is saved.
        self._stored_at = time.monotonic()
        logging.warning('%s cannot be written now: %s', self._path, error)

  def flush(self):
    self._store()

  def close(self, *, failed=False):
    try:
      self._store()
    except OSError as error:
      logging.warning('The last rows of %s are lost: %s', self._path, error)

  def _store(self) -> None:
    if self._is_stored:
      return
    data = ''.join(f'{line}\n' for line in self._lines).encode()
    self._generation = object_store.write(self._path, data, self._generation)
    self._is_stored, self._stored_at = True, time.monotonic()


def _to_line(row: rows_lib.Row) -> str:
  values = {'step': row.step, 'split': row.split, **row.scalars}
  return json.dumps(files.finite_or_null(values), allow_nan=False)


class TensorBoard(rows_lib.Tracker):
  """Writes TensorBoard events with tensorboardX."""

  def __init__(self, folder: pathlib.Path, *, first_step: int):
    """Opens an event file; TensorBoard hides earlier events after `first_step`.

    Args:
      folder: the run's folder.
      first_step: steps taken before this process.

    Raises:
      ImportError: tensorboardX is not installed.
    """
    import tensorboardX  # An optional dependency.

    self._events = tensorboardX.SummaryWriter(
        str(folder / files.TENSORBOARD), purge_step=first_step + 1
    )

  def write(self, row):
    for name, value in row.named_scalars().items():
      self._events.add_scalar(name, value, row.step)
    for name, path in row.figures.items():
      with PIL.Image.open(path) as image:
        mode = 'RGBA' if image.mode == 'RGBA' else 'RGB'
        pixels = np.asarray(image.convert(mode))
      self._events.add_image(name, pixels, row.step, dataformats='HWC')

  def flush(self):
    self._events.flush()

  def close(self, *, failed=False):
    self._events.close()


class MetricWriter:
  """Appends rows to metrics.jsonl, to event files and to other trackers.

  A run that resumes from a checkpoint first drops the rows after it, so that
  the file equals that of an uninterrupted run.
  """

  def __init__(
      self,
      folder: pathlib.Path,
      *,
      first_step: int,
      trackers: Sequence[rows_lib.Tracker] = (),
  ):
    """Opens the files; rows of steps after `first_step` are dropped.

    Args:
      folder: the run's folder.
      first_step: steps taken before this process.
      trackers: other destinations, which stay open after `close`.
    """
    self._folder = folder
    path = folder / files.METRICS
    kept = [x for x in _read_rows(path) if x[1]['step'] <= first_step]
    self._is_remote = files.is_remote(folder)
    lines = JsonObject if self._is_remote else JsonLines
    self._opened: list[rows_lib.Tracker] = [
        lines(path, [line for line, _ in kept])
    ]
    if not self._is_remote:
      self._open_tensorboard(first_step)
    rows = [self._from_json(values) for _, values in kept]
    for tracker in trackers:
      tracker.start(rows)
    self._trackers = [*self._opened, *trackers]

  def _open_tensorboard(self, first_step: int) -> None:
    try:
      self._opened.append(TensorBoard(self._folder, first_step=first_step))
    except ImportError:
      logging.info(
          'No TensorBoard events are written; install them by: pip install'
          ' tensorboardX'
      )

  def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
    """Appends one row; `split` is 'train' or 'eval'.

    Figures of an evaluation have been written to the run's folder before.
    """
    row = self._row(step, split, scalars)
    for tracker in self._trackers:
      tracker.write(row)

  def flush(self) -> None:
    """Waits until the rows are on disk; trackers retry rows that failed."""
    for tracker in self._trackers:
      tracker.flush()

  def close(self) -> None:
    """Closes the files."""
    for tracker in self._opened:
      tracker.close()

  def _from_json(self, values: Mapping[str, Any]) -> rows_lib.Row:
    scalars = {
        name: math.nan if x is None else x
        for name, x in values.items()
        if name not in ('step', 'split')
    }
    return self._row(values['step'], values.get('split', ''), scalars)

  def _row(
      self, step: int, split: str, scalars: Mapping[str, float]
  ) -> rows_lib.Row:
    figures = {}
    if split == 'eval' and not self._is_remote:
      figures = dict(_find_figures(self._folder, step))
    return rows_lib.Row(step, split, scalars, figures)


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads metrics.jsonl and skips corrupted lines, as after a crash.

  Args:
    folder: the run's folder.

  Returns:
    The rows in order; [] if there is no file.

  Raises:
    ValueError: the folder is a URL that is not supported.
  """
  path = files.run_folder(folder) / files.METRICS
  return [row for _, row in _read_rows(path)]


def _find_figures(
    folder: pathlib.Path, step: int
) -> Iterator[tuple[str, pathlib.Path]]:
  """Yields names and paths of the figures of a step's evaluation."""
  stem = f'step_{step:08d}'
  for section in (files.RECONSTRUCTIONS, files.SAMPLES):
    for path in sorted((folder / section).glob(f'{stem}*.png')):
      name = path.stem.removeprefix(stem).lstrip('_')
      yield f'{section}/{name}'.rstrip('/'), path


def _read_rows(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  try:
    text = files.read_bytes(path).decode(errors='replace')
  except (FileNotFoundError, NotADirectoryError):
    return []
  rows = []
  for line in text.splitlines():
    try:
      row = json.loads(line)
    except ValueError:
      logging.warning('%s: skipped a corrupted line: %.60s', path, line)
      continue
    if isinstance(row, dict) and isinstance(row.get('step'), int):
      rows.append((line, row))
  return rows
