"""Tests of the settings of the process."""

import ctypes
import types

import pytest

from fsq_jax import runtime


def test_glibc_is_asked_to_keep_memory(monkeypatch):
  asked = []
  library = types.SimpleNamespace(mallopt=lambda *x: asked.append(x))
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: library)
  runtime.keep_freed_memory()
  assert asked == [(-4, 0), (-2, 256 * 2**20)]


@pytest.mark.parametrize('error', [OSError, TypeError])
def test_other_systems_are_left_alone(monkeypatch, error):
  def load(_):
    raise error('no such library')

  monkeypatch.setattr(ctypes, 'CDLL', load)
  runtime.keep_freed_memory()
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: object())
  runtime.keep_freed_memory()
