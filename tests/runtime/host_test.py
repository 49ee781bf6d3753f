"""Tests of the settings of the process."""

import ctypes
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys
import types

import pytest

from fsq_jax.runtime import host

_ROOT = pathlib.Path(__file__).parents[2]


def test_glibc_is_asked_to_keep_memory(monkeypatch):
  asked = []
  library = types.SimpleNamespace(mallopt=lambda *x: asked.append(x))
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: library)
  host.keep_freed_memory()
  assert asked == [(-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 256 * 2**20)]


@pytest.mark.parametrize(('platforms', 'plugins', 'alone'), [
    ('cpu', ['cuda'], True),
    ('cuda,cpu', [], False),
    (None, ['cuda'], False),
    (None, [], importlib.util.find_spec('libtpu') is None),
])  # fmt: skip
def test_one_heap_is_for_hosts_without_accelerators(
    monkeypatch, platforms, plugins, alone
):
  asked = []
  library = types.SimpleNamespace(mallopt=lambda *x: asked.append(x))
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: library)
  config = types.SimpleNamespace(jax_platforms=platforms)
  monkeypatch.setattr(host.jax, 'config', config)
  monkeypatch.setattr(
      importlib.metadata, 'entry_points', lambda group: plugins
  )
  host.keep_freed_memory()
  assert ((-8, 1) in asked) == alone


_ALLOCATE = """
import ctypes, resource, threading
from fsq_jax.runtime import host
host.keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
def use(size=100 * 2**20):
  buffer = library.malloc(size)
  ctypes.memset(buffer, 1, size)
  library.free(buffer)
counts = []
for _ in range(11):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  thread = threading.Thread(target=use)
  thread.start()
  thread.join()
  counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(counts)[5])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone is asked')
def test_large_buffers_of_threads_keep_their_pages():
  # In a process of its own, whose threads have no heaps yet.
  process = subprocess.run(
      [sys.executable, '-c', _ALLOCATE],
      capture_output=True, text=True, check=True, cwd=_ROOT,
  )
  # 100 MiB are 25,600 pages. The median: a buffer moves, and fetches pages
  # once, where another thread has taken a piece of the one before.
  assert int(process.stdout) < 1000


@pytest.mark.parametrize('error', [OSError, TypeError])
def test_other_systems_are_left_alone(monkeypatch, error):
  def load(_):
    raise error('no such library')

  monkeypatch.setattr(ctypes, 'CDLL', load)
  host.keep_freed_memory()
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: object())
  host.keep_freed_memory()
