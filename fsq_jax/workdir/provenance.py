"""Provenance of a run: command, versions, devices, git commit."""

import datetime
import importlib.metadata
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

from absl import logging
import jax

import fsq_jax
from fsq_jax.workdir import files

_PACKAGES = (
    'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy',
)


def describe() -> dict[str, Any]:
  """Returns metadata of this process as JSON values.

  Environment variables are left out, since they may hold secrets.
  """
  return {
      'command': command(),
      'started': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
      'versions': {
          'fsq_jax': fsq_jax.__version__,
          'python': platform.python_version(),
          **{name: importlib.metadata.version(name) for name in _PACKAGES},
      },
      'devices': [
          f'{d.platform}:{d.id} {d.device_kind}' for d in jax.devices()
      ],
      'num_processes': jax.process_count(),
      'git': git_revision(),
  }


def command() -> str:
  """Returns the command line of this process."""
  return shlex.join(sys.argv)


def read_started_from(path: pathlib.Path) -> dict[str, Any]:
  """Returns 'started_from' of a run.json: sources of the initial variables.

  A corrupted file gives {} and a warning, since a run can resume without.
  """
  try:
    return (files.read_json(path) or {}).get('started_from', {})
  except ValueError as error:
    logging.warning(
        '%s The new run.json will lack the sources of the initial variables.',
        error,
    )
    return {}


def git_revision() -> str | None:
  """Returns the commit of the package's checkout, with '+' if modified."""
  root = pathlib.Path(fsq_jax.__file__).parents[1]
  if not (root / '.git').exists():
    return None  # An installed package may lie in the checkout of a user.

  def git(*arguments: str) -> str:
    command = ['git', '-C', str(root), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()

  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return None
