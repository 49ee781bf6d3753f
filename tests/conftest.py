"""Eight CPU devices and the settings that every test runs under."""

import functools
from importlib import metadata
import os
import tempfile
import time

import pytest

# Toy programs spend their time in the compiler, not in the arithmetic, and the
# same ones are needed again. As variables of the environment, for commands that
# tests start; the process that starts the others makes the folder for all,
# unless .ci/run has made one for both tiers.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _PROGRAMS = tempfile.TemporaryDirectory()
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _PROGRAMS.name

# XLA reads these once, when the first device is asked for.
os.environ['JAX_PLATFORMS'] = 'cpu'
_flags = ['--xla_force_host_platform_device_count=8']
if metadata.version('jaxlib').startswith('0.10.'):
  # The older code generator compiles the step of a GAN in half the time. Later
  # versions refuse the flag.
  _flags.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *_flags])

_MAX_FAST_SECONDS = 5.0

# Files that take minutes: no process should be left with one at the end.
_LONG = (
    'adversarial/adversary_test.py', 'configuration/configs_test.py',
    'experiments/experiments_test.py', 'experiments/notebooks_test.py',
    'models/builder_test.py', 'models/pretrained/loading_test.py',
    'quantizers/quantizers_test.py', 'runtime/partitioning_test.py',
    'runtime/processes_test.py', 'train/autoencoder_test.py',
    'train/initialization_test.py', 'train/stages_test.py',
    'train/step_test.py', 'readme_test.py', 'generators/training_test.py',
    'tokens/tokenization_test.py', 'evaluation/sample_metrics_test.py',
)  # fmt: skip


def pytest_collection_modifyitems(items):
  """Puts the files that take longest first."""
  items.sort(key=lambda item: not item.path.as_posix().endswith(_LONG))


def _processor_seconds():
  """Seconds of all threads of this process and of its finished children."""
  times = os.times()
  return times.user + times.system + times.children_user + times.children_system


@pytest.fixture
def interpreted_kernels(monkeypatch):
  """Lets attention run the TPU kernel, interpreted, on CPU devices."""
  # Imported here: JAX reads its settings first.
  from jax.experimental import pallas

  from fsq_jax.models import fused_attention

  monkeypatch.setattr(
      pallas, 'pallas_call',
      functools.partial(pallas.pallas_call, interpret=True),
  )
  monkeypatch.setattr(fused_attention, 'vmem_bytes', lambda mesh: 2**27)


_STARTED = pytest.StashKey[tuple[float, float]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Starts the clock: fixtures count for the first test that needs them."""
  item.stash[_STARTED] = time.monotonic(), _processor_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
  """In CI, fails a test of the fast tier that has become slow.

  The smaller of wall-clock and processor time is compared: other processes add
  to the one, threads to the other.
  """
  result = yield
  wall, processor = item.stash[_STARTED]
  seconds = min(time.monotonic() - wall, _processor_seconds() - processor)
  marker = item.get_closest_marker('fast_limit')
  limit = marker.args[0] if marker else _MAX_FAST_SECONDS
  if (
      os.environ.get('CI')
      and seconds > limit
      and item.get_closest_marker('slow') is None
  ):
    pytest.fail(
        f'{seconds:.1f} s; at most {limit} s are allowed in the fast tier.'
        ' Make the test cheaper, or mark it'
        ' @pytest.mark.slow.',
        pytrace=False,
    )
  return result
