"""Eight CPU devices and the settings that every test runs under."""

import os
import tempfile

# Toy programs spend their time in the compiler, not in the arithmetic, and the
# same ones are needed again. As variables of the environment, for commands that
# tests start; the process that starts the others makes the folder for all.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
if 'PYTEST_XDIST_WORKER' not in os.environ:
  _PROGRAMS = tempfile.TemporaryDirectory()
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _PROGRAMS.name

# XLA reads these once, when the first device is asked for.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
)

# Files that take minutes: no process should be left with one at the end.
_LONG = (
    'configs_test', 'train_test', 'adversary_test', 'processes_test',
    'train_step_test', 'models_test', 'stages_test', 'notebooks_test',
    'partitioning_test', 'experiments_test',
)  # fmt: skip


def pytest_collection_modifyitems(items):
  """Puts the files that take longest first."""
  items.sort(key=lambda item: item.path.stem not in _LONG)
