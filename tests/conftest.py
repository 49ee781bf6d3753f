"""Eight CPU devices and the settings that every test runs under."""

import os

# XLA reads these once, when the first device is asked for.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
)

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

# Files that take minutes: no process should be left with one at the end.
_LONG = (
    'configs_test', 'train_test', 'experiments_test', 'adversary_test',
    'stages_test',
)  # fmt: skip

# Toy programs spend their time in the compiler, not in the arithmetic.
jax.config.update('jax_disable_most_optimizations', True)


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.stem not in _LONG)


@pytest.fixture(scope='module')
def compiled_programs(tmp_path_factory):
  """Keeps programs on disk, for modules that compile the same ones again."""
  names = {
      'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('programs')),
      'jax_persistent_cache_min_compile_time_secs': 0.0,
  }
  before = {name: getattr(jax.config, name) for name in names}
  for values in (names, before):
    compilation_cache.reset_cache()
    for name, value in values.items():
      jax.config.update(name, value)
    if values is names:
      yield names['jax_compilation_cache_dir']
