"""Tests of trackers: each row once, over restarts, kills and failures."""

import inspect
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import PIL.Image
import pytest

from fsq_jax import workdir as workdirs
from fsq_jax.workdir import trackers


class _Client(trackers.Client):
  """Keeps rows like a service; `errors` says which calls of `write` fail."""

  def __init__(self, server, run_id, num_rows):
    self.run_id = run_id or 'new'
    self._server = server
    server.connections.append((run_id, num_rows))

  def write(self, row):
    if self._server.is_down:
      raise ConnectionError('no network')
    self._server.rows.append((row.split, row.step, dict(row.scalars)))
    self._server.figures.append(sorted(row.figures))

  def close(self, *, failed=False):
    self._server.closed.append(failed)


@pytest.fixture
def server():
  """What a service has received."""
  return types.SimpleNamespace(
      rows=[], figures=[], connections=[], closed=[], is_down=False,
      delay=0.0, retry_seconds=0.0,
  )  # fmt: skip


def _open(server, folder):

  def connect(run_id, num_rows):
    client = _Client(server, run_id, num_rows)
    client.delay = server.delay
    return client

  return trackers.Delivery(
      'fake', folder, connect, retry_seconds=server.retry_seconds
  )


def _train(
    tracker, folder, first_step, last_step, *, every=1, is_killed=False
):
  """Writes rows like a run with evaluations of every third step."""
  writer = workdirs.MetricWriter(
      folder, first_step=first_step, trackers=[tracker]
  )
  (folder / workdirs.RECONSTRUCTIONS).mkdir(exist_ok=True)
  for step in range(first_step + 1, last_step + 1):
    if step % every == 0:
      writer.write(step, 'train', {'loss': 1 / step})
    if step % 3 == 0:
      for name in ('', '_coffee'):
        path = folder / workdirs.RECONSTRUCTIONS / f'step_{step:08d}{name}.png'
        PIL.Image.new('RGB', (3, 2), (step, 0, 0)).save(path)
      writer.write(step, 'eval', {'psnr': 20.0 + step})
  writer.flush()
  if not is_killed:
    writer.close()
    tracker.close()


def _expected(last_step):
  rows = []
  for step in range(1, last_step + 1):
    rows.append(('train', step, {'loss': 1 / step}))
    if step % 3 == 0:
      rows.append(('eval', step, {'psnr': 20.0 + step}))
  return rows


def test_a_resumed_run_continues_its_curve(server, tmp_path):
  _train(_open(server, tmp_path), tmp_path, 0, 5)
  # From a checkpoint of step 3: two steps are trained again.
  _train(_open(server, tmp_path), tmp_path, 3, 8)
  assert server.rows == _expected(8)
  assert server.connections == [(None, 0), ('new', 6)]
  assert server.figures[3] == ['reconstructions', 'reconstructions/coffee']
  assert server.figures[4] == []
  assert server.closed == [False, False]


def test_another_logging_interval_doubles_no_step(server, tmp_path):
  _train(_open(server, tmp_path), tmp_path, 0, 8, every=4)
  _train(_open(server, tmp_path), tmp_path, 3, 10, every=1)
  steps = [step for split, step, _ in server.rows if split == 'train']
  assert steps == [4, 8, 9, 10]


def test_a_tracker_that_is_added_gets_earlier_rows(server, tmp_path):
  _train(_open(server, tmp_path), tmp_path, 0, 5)
  rows = workdirs.read_metrics(tmp_path)
  (tmp_path / 'trackers.json').unlink()
  server.rows.clear()
  _train(_open(server, tmp_path), tmp_path, 5, 6)
  assert server.rows == _expected(6)
  assert server.figures[-1] == ['reconstructions', 'reconstructions/coffee']
  assert workdirs.read_metrics(tmp_path)[:-2] == rows


def test_rows_that_may_be_lost_by_a_kill_are_sent_again(server, tmp_path):
  server.delay = 30.0
  _train(_open(server, tmp_path), tmp_path, 0, 5, is_killed=True)
  server.rows.clear()
  _train(_open(server, tmp_path), tmp_path, 3, 8)
  assert server.rows == _expected(8)
  # A run that ends stores all.
  assert server.connections == [(None, 0), ('new', 0)]
  _train(_open(server, tmp_path), tmp_path, 8, 8)
  assert server.connections[-1] == ('new', 10)


@pytest.mark.parametrize('is_back_in_time', [True, False])
def test_rows_that_fail_wait_and_training_continues(
    server, tmp_path, caplog, is_back_in_time
):
  tracker = _open(server, tmp_path)
  writer = workdirs.MetricWriter(tmp_path, first_step=0, trackers=[tracker])
  for step in range(1, 7):
    server.is_down = step in (3, 4) or (step > 4 and not is_back_in_time)
    writer.write(step, 'train', {'loss': 1.0})
    if step == 5:
      writer.flush()  # A checkpoint.
  writer.close()
  tracker.close()
  assert 'fake failed (ConnectionError: no network)' in caplog.text
  assert ('fake lacks' in caplog.text) is not is_back_in_time
  assert [row['step'] for row in workdirs.read_metrics(tmp_path)] == [
      1, 2, 3, 4, 5, 6,
  ]
  if not is_back_in_time:
    assert [step for _, step, _ in server.rows] == [1, 2]
    server.is_down = False
    _train(_open(server, tmp_path), tmp_path, 6, 6)
  assert [step for _, step, _ in server.rows] == [1, 2, 3, 4, 5, 6]


def test_a_failure_is_not_retried_at_every_checkpoint(server, tmp_path, caplog):
  server.retry_seconds, server.is_down = 300.0, True
  tracker = _open(server, tmp_path)
  _train(tracker, tmp_path, 0, 4)
  assert caplog.text.count('fake failed') == 1
  server.is_down = False
  _train(_open(server, tmp_path), tmp_path, 4, 5)
  assert server.rows == _expected(5)


def test_only_a_new_run_needs_a_connection(server, tmp_path, caplog):

  def fail(run_id, num_rows):
    raise ConnectionError('no network')

  with pytest.raises(
      RuntimeError, match=r'train.trackers: fake cannot .*no network.*README'
  ):
    trackers.Delivery('fake', tmp_path, fail)
  _train(_open(server, tmp_path), tmp_path, 0, 5)
  tracker = trackers.Delivery('fake', tmp_path, fail)
  _train(tracker, tmp_path, 5, 7)
  assert 'fake lacks 3 rows, from step 6 on' in caplog.text
  _train(_open(server, tmp_path), tmp_path, 7, 7)
  assert server.rows == _expected(7)


def test_wandb_gets_config_rows_and_figures(fake_wandb, tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()

  def open_tracker():
    return trackers.open_tracker('wandb', folder, {'optim.b1': 0.9})

  # Killed: rows that it has already are dropped by their numbers.
  _train(open_tracker(), folder, 0, 4, is_killed=True)
  _train(open_tracker(), folder, 3, 5)
  same = {'dir': str(folder), 'config': {'optim.b1': 0.9}}
  assert fake_wandb.calls == [
      {'id': None, 'name': 'run', **same}, {'id': 'run0', 'name': None, **same}
  ]
  (rows,) = fake_wandb.histories.values()
  assert list(rows) == list(range(6))
  png = str(folder / workdirs.RECONSTRUCTIONS / 'step_00000003')
  assert list(rows.values()) == [
      {'step': 1, 'train/loss': 1.0},
      {'step': 2, 'train/loss': 1 / 2},
      {'step': 3, 'train/loss': 1 / 3},
      {
          'step': 3,
          'eval/psnr': 23.0,
          'reconstructions': f'{png}.png',
          'reconstructions/coffee': f'{png}_coffee.png',
      },
      {'step': 4, 'train/loss': 1 / 4},
      {'step': 5, 'train/loss': 1 / 5},
  ]
  open_tracker().close(failed=True)
  assert fake_wandb.exit_codes == [0, 1]


class _FakeMlflow(types.ModuleType):
  """The functions of MLflow that are used, with their signatures."""

  def __init__(self):
    super().__init__('mlflow')
    self.calls = []

  def start_run(
      self, run_id=None, experiment_id=None, run_name=None, nested=False,
      parent_run_id=None, tags=None, description=None, log_system_metrics=None,
  ):
    self.calls.append(('start_run', run_id, run_name))
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id='id'))

  def log_params(self, params, synchronous=None, run_id=None):
    self.calls.append(('log_params', params))

  def log_metrics(
      self, metrics, step=None, synchronous=None, run_id=None, timestamp=None,
      model_id=None, dataset=None,
  ):
    self.calls.append(('log_metrics', metrics, step))

  def log_artifact(self, local_path, artifact_path=None, run_id=None):
    self.calls.append(
        ('log_artifact', pathlib.Path(local_path).name, artifact_path)
    )

  def end_run(self, status='FINISHED'):
    self.calls.append(('end_run', status))


def test_mlflow_gets_config_rows_and_figures(tmp_path, monkeypatch):
  module = _FakeMlflow()
  monkeypatch.setitem(sys.modules, 'mlflow', module)
  for name in ('MAX_RETRIES', 'TIMEOUT'):  # Set by the client.
    monkeypatch.setenv(f'MLFLOW_HTTP_REQUEST_{name}', '1')
  monkeypatch.setenv('MLFLOW_RUN_NAME', 'mine')
  config = {'optim.b1': 0.9}
  _train(trackers.open_tracker('mlflow', tmp_path, config), tmp_path, 0, 3)
  trackers.open_tracker('mlflow', tmp_path, config).close(failed=True)
  assert module.calls == [
      ('start_run', None, 'mine'),
      ('log_params', config),
      ('log_metrics', {'train/loss': 1.0}, 1),
      ('log_metrics', {'train/loss': 1 / 2}, 2),
      ('log_metrics', {'train/loss': 1 / 3}, 3),
      ('log_artifact', 'step_00000003.png', 'reconstructions'),
      ('log_artifact', 'step_00000003_coffee.png', 'reconstructions'),
      ('log_metrics', {'eval/psnr': 23.0}, 3),
      ('end_run', 'FINISHED'),
      ('start_run', 'id', None),
      ('end_run', 'FAILED'),
  ]


def test_a_folder_is_no_package(tmp_path, monkeypatch):
  (tmp_path / 'wandb_of_a_run').mkdir()
  monkeypatch.syspath_prepend(tmp_path)
  assert not trackers.is_installed('wandb_of_a_run')
  assert not trackers.is_installed('not_there')
  assert trackers.is_installed('json')


def _assert_same_parameters(fakes, module):
  """Checks that the parameters of fakes are those of a module, in order."""
  for name, fake in fakes.items():
    true = module
    for part in name.split('.'):
      true = getattr(true, part)
    expected = [x for x in inspect.signature(true).parameters if x != 'self']
    given = [x for x in inspect.signature(fake).parameters if x != 'self']
    assert given == expected[:len(given)], name


def test_fakes_have_the_signatures_of_wandb(fake_wandb, monkeypatch):
  monkeypatch.delitem(sys.modules, 'wandb')
  wandb = pytest.importorskip('wandb')
  run = type(fake_wandb.init(resume='allow'))
  methods = ('define_metric', 'log', 'finish')
  _assert_same_parameters(
      {
          'init': fake_wandb.init,
          'Image': fake_wandb.Image,
          **{f'Run.{name}': getattr(run, name) for name in methods},
      },
      wandb,
  )


def test_fakes_have_the_signatures_of_mlflow():
  mlflow = pytest.importorskip('mlflow')
  names = ('start_run', 'log_params', 'log_metrics', 'log_artifact', 'end_run')
  _assert_same_parameters({x: getattr(_FakeMlflow, x) for x in names}, mlflow)


_SESSION = """
import os, sys, pathlib
from fsq_jax.workdir import metric_log, trackers
name, folder, first, last, is_killed = sys.argv[1:]
folder = pathlib.Path(folder)
config = {'model.quantizer.fsq.levels': (8, 5), 'train.init_from': ''}
config |= {f'field.{i}': i for i in range(300)}
tracker = trackers.open_tracker(name, folder, config)
writer = metric_log.MetricWriter(
    folder, first_step=int(first), trackers=[tracker])
for step in range(int(first) + 1, int(last) + 1):
  loss = float('nan') if step == 2 else 1 / step
  writer.write(step, 'train', {'loss': loss})
  if step == 4:
    writer.write(step, 'eval', {'psnr': 20.0})
if is_killed == 'True':
  os._exit(9)
tracker.close()
"""


def _run_sessions(name, folder, **environment):
  """A process that is killed, and one that resumes the run."""
  figures = folder / workdirs.RECONSTRUCTIONS
  figures.mkdir()
  PIL.Image.new('RGB', (3, 2)).save(figures / 'step_00000004.png')
  for first, last, is_killed in ((0, 5, True), (3, 6, False)):
    done = subprocess.run(
        [sys.executable, '-c', _SESSION, name, folder, str(first), str(last),
         str(is_killed)],
        cwd=pathlib.Path(__file__).parents[2], env=os.environ | environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == (9 if is_killed else 0)


@pytest.mark.slow
def test_wandb_reads_its_files_back(tmp_path):
  pytest.importorskip('wandb')
  _run_sessions(
      'wandb', tmp_path, WANDB_MODE='offline', WANDB_PROJECT='tests'
  )
  run_id = json.loads((tmp_path / 'trackers.json').read_text())['wandb'][
      'run_id'
  ]
  rows = {}
  paths = sorted((tmp_path / 'wandb').glob(f'offline-run-*-{run_id}'))
  assert len(paths) == 2
  for path in paths:
    # Its own reader of the file that `wandb sync` uploads.
    text = subprocess.run(
        [sys.executable, '-m', 'wandb', 'leet', 'inspect', '--json', path],
        check=True, capture_output=True, text=True,
    ).stdout
    for record in map(json.loads, text.splitlines()):
      if record['type'] == 'run':
        config = record['run']['config']['update']
        assert config['model.quantizer.fsq.levels'] == [8, 5]
      elif record['type'] == 'history':
        item = record['history']['item']
        rows.setdefault(item['_step'], item)
  losses = [(x['step'], x['train/loss']) for x in rows.values() if
            'train/loss' in x]  # fmt: skip
  assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
  assert math.isnan(float(losses[1][1]))
  assert losses[-1][1] == 1 / 6
  (row,) = (x for x in rows.values() if 'eval/psnr' in x)
  assert (row['step'], row['eval/psnr']) == (4, 20.0)
  assert (paths[-1] / 'files' / row['reconstructions.path']).is_file()


@pytest.mark.slow
def test_mlflow_reads_its_files_back(tmp_path, monkeypatch):
  mlflow = pytest.importorskip('mlflow')
  uri = {
      'MLFLOW_TRACKING_URI': f'file:{tmp_path}/mlruns',
      'MLFLOW_ALLOW_FILE_STORE': 'true',
  }
  _run_sessions('mlflow', tmp_path, **uri)
  for name, value in uri.items():
    monkeypatch.setenv(name, value)
  run_id = json.loads((tmp_path / 'trackers.json').read_text())['mlflow'][
      'run_id'
  ]
  client = mlflow.MlflowClient(uri['MLFLOW_TRACKING_URI'])
  run = client.get_run(run_id)
  assert run.info.status == 'FINISHED'
  assert run.data.params['model.quantizer.fsq.levels'] == '(8, 5)'
  assert len(run.data.params) == 302
  losses = client.get_metric_history(run_id, 'train/loss')
  assert [x.step for x in losses] == [1, 2, 3, 4, 5, 6]
  assert run.data.metrics['eval/psnr'] == 20.0
  (figure,) = client.list_artifacts(run_id, 'reconstructions')
  assert figure.path.endswith('step_00000004.png')
