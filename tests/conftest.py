"""Eight CPU devices and the settings that every test runs under."""

import collections
import functools
from importlib import machinery
from importlib import metadata
import os
import sys
import tempfile
import time
import types

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


@pytest.hookimpl(tryfirst=True)  # Before tests are deselected by `-m`.
def pytest_collection_modifyitems(items):
  """Marks slow variants of tests; puts the files that take longest first."""
  variants = collections.defaultdict(dict)
  for item in items:
    if marker := item.get_closest_marker('fast_variants'):
      variants[item.path, item.originalname, marker.args][item.callspec.id] = (
          item
      )
  for (_, name, fast), by_id in variants.items():
    # Fewer are collected if the command names some.
    if len(by_id) > len(fast) and (unknown := set(fast) - by_id.keys()):
      raise pytest.UsageError(f'{name} has no variants {sorted(unknown)}.')
    for variant in by_id.keys() - set(fast):
      by_id[variant].add_marker(pytest.mark.slow)
  items.sort(key=lambda item: not item.path.as_posix().endswith(_LONG))


def _processor_seconds():
  """Seconds of all threads of this process and of its finished children."""
  times = os.times()
  return times.user + times.system + times.children_user + times.children_system


@pytest.fixture(scope='session', autouse=True)
def _one_device_unless_sizes_are_named():
  """Takes one device of the eight for a mesh of all, and for commands.

  Programs for eight take half as long again to compile. Tests of sharding give
  a mesh its sizes or devices, or use `all_devices`.
  """
  # Imported here: JAX reads its settings first.
  import jax

  from fsq_jax.runtime import partitioning

  first = jax.devices()[:1]
  create_mesh = partitioning.create_mesh

  def create(sizes, devices=None):
    if devices is None and -1 in sizes.values():
      devices = first
    return create_mesh(sizes, devices)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(partitioning, 'create_mesh', create)
    patch.setattr(
        partitioning, 'create_local_mesh',
        lambda: create_mesh({'data': 1, 'fsdp': 1}, first),
    )  # fmt: skip
    patch.setenv(
        'XLA_FLAGS',
        f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=1',
    )
    yield create_mesh


@pytest.fixture(scope='module')
def all_devices(_one_device_unless_sizes_are_named):
  """Makes meshes of all eight devices, as outside of tests."""
  from fsq_jax.runtime import partitioning

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
        partitioning, 'create_mesh', _one_device_unless_sizes_are_named
    )
    yield


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


class FakeWandb(types.ModuleType):
  """The functions of W&B that are used, with their signatures, and a server.

  trackers_test.py compares the signatures with those of the true package.

  Attributes:
    histories: rows by number, of each run id.
    calls: keyword arguments of each `init`.
    exit_codes: of each `finish`.
  """

  def __init__(self):
    super().__init__('wandb')
    self.__spec__ = machinery.ModuleSpec('wandb', None, origin='fake')
    self.histories, self.calls, self.exit_codes = {}, [], []

  def init(
      self, entity=None, project=None, dir=None, id=None, name=None, notes=None,
      tags=None, config=None, config_exclude_keys=None,
      config_include_keys=None, allow_val_change=None, group=None,
      job_type=None, mode=None, force=None, reinit=None, resume=None,
  ):  # fmt: skip
    """Starts a run, or resumes it."""
    self.calls.append({'dir': dir, 'id': id, 'name': name, 'config': config})
    assert resume == 'allow'
    id = id or f'run{len(self.histories)}'
    return FakeWandbRun(self, id, self.histories.setdefault(id, {}))

  def Image(self, data_or_path, mode=None, caption=None):  # noqa: N802
    """Stands for an image by its path."""
    assert os.path.isfile(data_or_path)
    return data_or_path


class FakeWandbRun:
  """A run of `FakeWandb`."""

  def __init__(self, module, id, history):
    self.id = id
    self._module, self._history = module, history

  def define_metric(
      self, name, step_metric=None, step_sync=None, hidden=None, summary=None,
      overwrite=None,
  ):
    """Accepts the x axis."""
    assert (name, step_metric) in (('step', None), ('*', 'step'))

  def log(self, data, step=None, commit=None):
    """Adds a row; drops one whose number is not new, as W&B does."""
    assert commit
    if step > max(self._history, default=-1):
      self._history[step] = data

  def finish(self, exit_code=None):
    """Ends the run."""
    self._module.exit_codes.append(exit_code)


@pytest.fixture
def fake_wandb(monkeypatch):
  """A `FakeWandb` that `import wandb` finds."""
  module = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', module)
  # Set by the client.
  monkeypatch.setenv('WANDB_FINISH_TIMEOUT', '120')
  monkeypatch.delenv('WANDB_NAME', raising=False)
  return module


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
