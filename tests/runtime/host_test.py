"""Tests of the settings of the process."""

import ctypes
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from fsq_jax.runtime import host

_ROOT = pathlib.Path(__file__).parents[2]


def test_glibc_is_asked_to_keep_memory(monkeypatch):
  asked = []
  library = types.SimpleNamespace(mallopt=lambda *x: asked.append(x))
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: library)
  updated = []
  monkeypatch.setattr(jax.config, 'update', lambda *x: updated.append(x))
  host.keep_freed_memory()
  assert asked == [(-4, 0), (-1, 2**31 - 1), (-2, 256 * 2**20)]
  assert updated == [('jax_cpu_enable_async_dispatch', False)]


_EXECUTE = """
import resource
from fsq_jax.runtime import host
host.keep_freed_memory()
import jax
f = jax.jit(lambda x: (x @ x.T) @ x)
x = jax.numpy.ones((5120, 8))
counts = []
for _ in range(15):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  jax.block_until_ready(f(x))
  counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(f.lower(x).compile().memory_analysis().temp_size_in_bytes)
print(sorted(counts)[7])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone is asked')
def test_large_buffers_of_steps_keep_their_pages():
  # In a process of its own, where JAX has not been initialized.
  process = subprocess.run(
      [sys.executable, '-c', _EXECUTE],
      capture_output=True, text=True, check=True, cwd=_ROOT,
  )
  temporary_bytes, median = map(int, process.stdout.split())
  assert temporary_bytes >= 100 * 2**20  # 25,600 pages
  assert median < 1000


@pytest.mark.parametrize('error', [OSError, TypeError])
def test_other_systems_are_left_alone(monkeypatch, error):
  def load(_):
    raise error('no such library')

  monkeypatch.setattr(ctypes, 'CDLL', load)
  host.keep_freed_memory()
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: object())
  host.keep_freed_memory()
