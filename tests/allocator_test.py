"""Tests of what the C library is asked for."""

import ctypes
import types

import pytest

from fsq_jax import allocator


def test_glibc_is_asked_to_keep_memory(monkeypatch):
  asked = []
  library = types.SimpleNamespace(mallopt=lambda *x: asked.append(x))
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: library)
  allocator.keep_freed_memory()
  assert asked == [(-4, 0), (-2, 256 * 2**20)]


@pytest.mark.parametrize('error', [OSError, TypeError])
def test_other_systems_are_left_alone(monkeypatch, error):
  def load(_):
    raise error('no such library')

  monkeypatch.setattr(ctypes, 'CDLL', load)
  allocator.keep_freed_memory()
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: object())
  allocator.keep_freed_memory()
