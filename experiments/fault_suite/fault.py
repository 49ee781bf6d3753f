"""Types and shared helpers of the fault tests."""

from collections.abc import Callable, Mapping
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.runtime import partitioning
from fsq_jax.train import loop
from fsq_jax.train import optim
from fsq_jax.train import state as train_state

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENCODERS = ROOT / 'tests' / 'testdata' / 'encoders'


class Outcome(NamedTuple):
  """Result of a fault test.

  Attributes:
    passed: whether the requirement is met.
    measured: text of the table.
    figures: its numbers and further ones, JSON-serializable.
  """

  passed: bool
  measured: str
  figures: Mapping[str, Any]


class Fault(NamedTuple):
  """One fault test.

  Attributes:
    injected: description of the fault.
    required: description of the required behaviour.
    test: called with an empty folder and whether to inject only a few faults,
      in its own process.
    num_devices: number of CPU devices.
    limit_seconds: timeout, after which the test has failed.
  """

  injected: str
  required: str
  test: Callable[[pathlib.Path, bool], Outcome]
  num_devices: int = 1
  limit_seconds: int = 1200


class Training(NamedTuple):
  """The parts of a run that exist before the loop."""

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  model: models.Autoencoder
  optimizer: Any
  builder: train_state.StateBuilder


def add_hook(hook: loop.Hook) -> None:
  """Adds a hook to all later runs of this process, after the logging hook."""
  run = loop.run
  loop.run = lambda *args, hooks, **kwargs: run(
      *args, hooks=[hooks[0], hook, *hooks[1:]], **kwargs
  )


def toy_config(**fields: Any) -> ml_collections.ConfigDict:
  """Returns configs/debug.py with overrides; a__b is the field a.b."""
  config = configuration.load_config(ROOT / 'configs' / 'debug.py')
  for name, value in fields.items():
    *sections, key = name.split('__')
    section = config
    for part in sections:
      section = section[part]
    section[key] = value
  configuration.check_config(config)
  return config


def build_training(
    config: ml_collections.ConfigDict, num_devices: int | None = None
) -> Training:
  """Builds model, optimizer and state of a config on the first devices."""
  mesh = partitioning.create_mesh(
      config.partitioning.mesh, jax.devices()[:num_devices]
  )
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  return Training(config, mesh, model, optimizer, builder)


def reset_peak() -> float:
  """Resets the peak memory; returns the resident memory in MB (Linux)."""
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  return resident_mb()


def peak_mb() -> float:
  """Returns the peak memory since `reset_peak`, in MB (Linux)."""
  return _status_mb('VmHWM')


def resident_mb() -> float:
  """Returns the resident memory of this process in MB (Linux)."""
  return _status_mb('VmRSS')


def _status_mb(name: str) -> float:
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(rf'{name}:\s+(\d+) kB', status)[1]) * 1024 / 1e6


def run_python(
    code: str, *arguments: Any, timeout: float = 300, **options: Any
) -> subprocess.CompletedProcess:
  """Runs Python code in a new process in this checkout."""
  return subprocess.run(
      [sys.executable, '-c', code, *map(str, arguments)],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=timeout,
      check=False,
      **options,
  )


def launch(*arguments: Any, timeout: float = 300, **options: Any):
  """Runs launch.py and returns the completed process."""
  return subprocess.run(
      [sys.executable, 'launch.py', *map(str, arguments)],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=timeout,
      check=False,
      **options,
  )


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any):
  """Calls a function and returns its ValueError, or None if it returns.

  Other exceptions are crashes and propagate.
  """
  try:
    function(*arguments, **options)
  except ValueError as error:
    return error
  return None


def same(one: Any, other: Any) -> bool:
  """Whether two trees of arrays are bitwise equal."""
  one, other = jax.device_get((one, other))
  leaves = jax.tree.leaves(one), jax.tree.leaves(other)
  return jax.tree.structure(one) == jax.tree.structure(other) and all(
      np.asarray(a).tobytes() == np.asarray(b).tobytes()
      for a, b in zip(*leaves, strict=True)
  )


def all_finite(tree: Any) -> bool:
  """Whether all arrays of a tree are finite."""
  return all(
      np.isfinite(np.asarray(x, np.float64)).all()
      for x in jax.tree.leaves(jax.device_get(tree))
  )


def natural(name: str) -> tuple[str, int]:
  """Sorts A2 before A10."""
  letter, number = re.fullmatch(r'([A-Z])(\d+)', name).groups()
  return letter, int(number)
