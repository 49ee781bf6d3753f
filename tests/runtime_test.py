"""Tests of the settings of the process."""

import ctypes
import pathlib
import subprocess
import sys
import types

import pytest

from fsq_jax import runtime

_ROOT = pathlib.Path(__file__).parents[1]


def test_glibc_is_asked_to_keep_memory(monkeypatch):
  asked = []
  library = types.SimpleNamespace(mallopt=lambda *x: asked.append(x))
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: library)
  runtime.keep_freed_memory()
  assert asked == [(-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 256 * 2**20)]


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone is asked')
def test_a_step_fetches_no_pages():
  # In a process of its own: threads of JAX must not be there before.
  script = (
      'import resource, jax; from fsq_jax import runtime;'
      'runtime.keep_freed_memory();'
      'x = jax.numpy.zeros(2**25); f = jax.jit(lambda x: x + 1);'
      'faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt;'
      'counts = [(f(x).block_until_ready(), faults())[1] for _ in range(12)];'
      'print(sorted(b - a for a, b in zip(counts, counts[1:]))[5])'
  )
  process = subprocess.run(
      [sys.executable, '-c', script],
      capture_output=True, text=True, check=True, cwd=_ROOT,
  )
  # The median of 11; 128 MiB are 32,768 pages.
  assert int(process.stdout.split()[-1]) < 1000


@pytest.mark.parametrize('error', [OSError, TypeError])
def test_other_systems_are_left_alone(monkeypatch, error):
  def load(_):
    raise error('no such library')

  monkeypatch.setattr(ctypes, 'CDLL', load)
  runtime.keep_freed_memory()
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: object())
  runtime.keep_freed_memory()
