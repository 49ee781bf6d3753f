"""Weights & Biases and MLflow as destinations of the rows of metrics.jsonl."""

import collections
from collections.abc import Callable, Mapping
import functools
import importlib.util
import os
import pathlib
import time
from typing import Any

from absl import logging

from fsq_jax.workdir import files
from fsq_jax.workdir import rows as rows_lib

# Names of trackers, and the packages to install for them.
PACKAGES = {'mlflow': 'mlflow-skinny', 'wandb': 'wandb'}


class Client(rows_lib.Tracker):
  """A run of a service. Methods raise the errors of its package.

  Attributes:
    run_id: of the run, by which a later process continues it.
    delay: seconds after which a row that was written is stored even if this
      process is killed.
  """

  run_id: str
  delay = 0.0


class Wandb(Client):
  """A run of Weights & Biases.

  Its environment variables hold: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and so
  on. Files are in the run's folder under wandb/. The x axis of all curves is
  the metric 'step', since W&B's own step cannot go back to add an evaluation
  that a stop has delayed. W&B's own step is the number of the row: W&B drops a
  row that it already has.
  """

  # W&B 0.31 writes its file, and uploads, every 15 s.
  delay = 30.0

  def __init__(
      self,
      folder: pathlib.Path,
      config: Mapping[str, Any],
      run_id: str | None,
      num_rows: int,
  ):
    """Starts the run, or continues it if it has an id.

    Args:
      folder: the run's folder.
      config: fields by dotted name.
      run_id: of an earlier process.
      num_rows: rows that earlier processes have written.
    """
    # Without a network, the end of the run would wait for it. W&B keeps the
    # rows in its file, for `wandb sync`.
    os.environ.setdefault('WANDB_FINISH_TIMEOUT', '120')
    import wandb  # An optional dependency.

    self._image = wandb.Image
    name = None if run_id else os.environ.get('WANDB_NAME', folder.name)
    self._run = wandb.init(
        dir=str(folder),
        config=dict(config),
        id=run_id,
        name=name,
        resume='allow',
    )
    self.run_id = self._run.id
    self._num_rows = num_rows
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def write(self, row):
    images = {name: self._image(str(x)) for name, x in row.figures.items()}
    values = {'step': row.step, **row.named_scalars(), **images}
    self._run.log(values, step=self._num_rows, commit=True)
    self._num_rows += 1

  def close(self, *, failed=False):
    self._run.finish(exit_code=int(failed))


class Mlflow(Client):
  """A run of MLflow.

  Its environment variables hold: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME
  and so on. Config fields are the parameters of the run, which MLflow cannot
  change later; figures are artifacts.
  """

  def __init__(
      self,
      folder: pathlib.Path,
      config: Mapping[str, Any],
      run_id: str | None,
      num_rows: int,
  ):
    """Starts the run, or continues it; arguments as of `Wandb`."""
    del num_rows  # Rows have steps.
    # Rows that failed are sent again at the next checkpoint: the defaults, 7
    # retries and 120 s, would hold training up for many minutes.
    os.environ.setdefault('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '2')
    os.environ.setdefault('MLFLOW_HTTP_REQUEST_TIMEOUT', '10')
    import mlflow  # An optional dependency.

    self._mlflow = mlflow
    name = None if run_id else os.environ.get('MLFLOW_RUN_NAME', folder.name)
    self.run_id = mlflow.start_run(run_id=run_id, run_name=name).info.run_id
    if run_id is None:
      mlflow.log_params(dict(config))

  def write(self, row):
    # Figures first: sent again after an error, they are replaced.
    for name, path in row.figures.items():
      self._mlflow.log_artifact(str(path), name.partition('/')[0])
    self._mlflow.log_metrics(row.named_scalars(), step=row.step)

  def close(self, *, failed=False):
    self._mlflow.end_run('FAILED' if failed else 'FINISHED')


_CLIENTS: dict[str, Callable[..., Client]] = {'mlflow': Mlflow, 'wandb': Wandb}


def is_installed(name: str) -> bool:
  """Whether the package of a tracker can be imported."""
  spec = importlib.util.find_spec(name)
  # A folder wandb/, as W&B writes it, reads as a package without an origin.
  return spec is not None and spec.origin is not None


class Delivery(rows_lib.Tracker):
  """Sends every row to a client once, also over restarts and failures.

  trackers.json in the run's folder holds the id of the client's run, the number
  of rows that it has stored, and the newest step of each split. A resumed run
  sends only later steps; rows of metrics.jsonl that the client lacks come
  first. So a tracker that is added to an old run gets the whole curve.

  An error of the client never ends a run: rows wait, with a warning, and are
  sent again by a later `flush` or by the next process. A process that is
  killed may leave up to `Client.delay` seconds of rows uncounted: the next
  process sends them again.
  """

  def __init__(
      self,
      name: str,
      folder: pathlib.Path,
      connect: Callable[[str | None, int], Client],
      *,
      retry_seconds: float = 300.0,
  ):
    """Connects.

    Args:
      name: of the tracker, in messages and trackers.json.
      folder: the run's folder.
      connect: takes a run id, None for a new run, and the number of its rows;
        returns the client.
      retry_seconds: pause after an error before rows are sent again.

    Raises:
      RuntimeError: a new run cannot be started. A run that has an id has been
        started before, and resumes without a connection.
      ValueError: trackers.json cannot be read.
    """
    self._name = name
    self._path = folder / files.TRACKERS
    self._connect = connect
    self._retry_seconds = retry_seconds
    record = (files.read_json(self._path) or {}).get(name, {})
    self._run_id: str | None = record.get('run_id')
    self._num_rows: int = record.get('num_rows', 0)
    self._newest: dict[str, int] = record.get('newest', {})
    self._pending: collections.deque[rows_lib.Row] = collections.deque()
    # Times and rows that may not be stored yet.
    self._sent: collections.deque[tuple[float, rows_lib.Row]] = (
        collections.deque()
    )
    self._client: Client | None = None
    self._failed_at: float | None = None
    try:
      self._open()
    except Exception as error:
      if self._run_id is None:
        raise RuntimeError(
            f'train.trackers: {name} cannot start a run'
            f' ({type(error).__name__}: {error}). Correct its settings (see'
            ' fsq_jax/workdir/README.md), or train without it.'
        ) from error
      self._wait(error)

  def start(self, rows):
    self._pending.extend(filter(self._is_new, rows))
    if self._failed_at is None:
      self._send()

  def write(self, row):
    if self._is_new(row):
      self._pending.append(row)
      if self._failed_at is None:
        self._send()

  def flush(self):
    if self._failed_at is not None:
      if time.monotonic() - self._failed_at < self._retry_seconds:
        return
      self._failed_at = None
    self._send()

  def close(self, *, failed=False):
    if self._client is not None:
      try:
        self._client.close(failed=failed)
        if self._failed_at is None:
          self._count_stored(delay=0)
      except Exception as error:
        logging.warning('%s: %s: %s', self._name, type(error).__name__, error)
    if self._pending:
      logging.warning(
          '%s lacks %d rows, from step %d on. They are in metrics.jsonl; the'
          ' same command sends them.',
          self._name, len(self._pending), self._pending[0].step,
      )

  def _is_new(self, row: rows_lib.Row) -> bool:
    return row.step > self._newest.get(row.split, -1)

  def _open(self) -> None:
    if self._client is None:
      self._client = self._connect(self._run_id, self._num_rows)
      self._run_id = self._client.run_id
      self._save()

  def _send(self) -> None:
    try:
      while self._pending:
        self._open()
        self._client.write(self._pending[0])
        self._sent.append((time.monotonic(), self._pending.popleft()))
        self._count_stored(self._client.delay)
    except Exception as error:
      self._wait(error)

  def _wait(self, error: Exception) -> None:
    self._failed_at = time.monotonic()
    logging.warning(
        '%s failed (%s: %s). Training continues; its rows are in metrics.jsonl'
        ' and are sent again at a checkpoint in %d s or later.',
        self._name, type(error).__name__, error, self._retry_seconds,
    )

  def _count_stored(self, delay: float) -> None:
    """Counts the rows that were sent at least `delay` seconds ago."""
    num_before, latest = self._num_rows, time.monotonic() - delay
    while self._sent and self._sent[0][0] <= latest:
      _, row = self._sent.popleft()
      self._num_rows += 1
      self._newest[row.split] = row.step
    if self._num_rows > num_before:
      self._save()

  def _save(self) -> None:
    others = files.read_json(self._path) or {}
    record = {
        'run_id': self._run_id,
        'num_rows': self._num_rows,
        'newest': self._newest,
    }
    files.write_json(self._path, {**others, self._name: record})


def open_tracker(
    name: str, folder: pathlib.Path, config: Mapping[str, Any]
) -> Delivery:
  """Connects to a tracker.

  Args:
    name: a key of `PACKAGES`; its package is installed.
    folder: the run's folder.
    config: fields by dotted name, which the tracker shows.

  Raises:
    RuntimeError: it cannot start a new run.
    ValueError: trackers.json cannot be read.
  """
  connect = functools.partial(_CLIENTS[name], folder, config)
  return Delivery(name, folder, connect)
