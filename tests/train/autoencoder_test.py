"""Tests of whole runs: resumed, stopped, killed, diverged, finished."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image
import pytest

from fsq_jax import checkpoints
from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.evaluation import results as results_lib
from fsq_jax.report import report
from fsq_jax.runtime import partitioning
from fsq_jax.runtime import preemption
from fsq_jax.train import loop
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.workdir import files as files_lib

_ROOT = pathlib.Path(__file__).parents[2]
_DEBUG = 'configs/debug.py'
_NUM_STEPS = 12


class _Crash(Exception):  # noqa: N818
  """Stands for anything that ends a run between two steps."""


def _load_config(variant='plain'):
  config = configuration.load_config(_ROOT / _DEBUG)
  config.train.num_steps = _NUM_STEPS
  config.train.log_every_steps = 1
  config.train.checkpoint_every_steps = 3
  config.train.eval_every_steps = 6
  if variant == 'adversarial_vq':
    # Draws at the start, and restarts on the way.
    config.model.quantizer.name = 'vq'
    config.model.quantizer.vq.codebook_init = 'kmeans'
    config.model.quantizer.vq.restart = 'batch'
    config.model.quantizer.vq.decay = 0.5
    config.model.latent_noise = 0.5
    config.model.projector_in.name = 'standardized'
    config.data.batch_size = 16
    config.partitioning.mesh = {'data': 4, 'fsdp': 2, 'tensor': 1}
    config.optim.accumulation_steps = 2
    # From step 5 on, in the middle of what crashes and is trained again.
    config.discriminator.name = 'dino'
    config.discriminator.start_step = 4
    config.discriminator.lecam_weight = 0.1
    config.losses.adversarial.start_step = 5
    config.losses.adversarial.ramp_steps = 3
    config.losses.adversarial.weighting = 'adaptive'
    config.discriminator.augment_probability = 0.7
    dino = config.discriminator.dino
    dino.checkpoint = str(_ROOT / 'tests/testdata/encoders/dino')
    dino.architecture = (
        'dino(width=12, depth=2, num_heads=3, mlp_dim=20, patch_size=4)'
    )
    dino.image_size = (12, 12)
    dino.blocks = (0,)
    dino.kernel_size = 3
  if variant == 'none':
    config.model.quantizer.name = 'none'
  if variant == 'sizes':
    config.model.encoder.position = 'sincos'
    config.data.image_sizes = ((16, 16), (32, 16))
  return config


@pytest.fixture
def journal(monkeypatch):
  """The images of each step taken, and what to do after a step.

  The report is left out: drawing it takes longer than the steps.
  """
  taken, after = {}, {}

  def record(step, batch):
    indices = batch['index']
    np.testing.assert_array_equal(taken.setdefault(step, indices), indices)
    if step in after:
      after.pop(step)()

  _call_after_steps(monkeypatch, record)
  monkeypatch.setattr(report, 'write_report', lambda *_: None)
  return taken, after


def _call_after_steps(monkeypatch, function):
  """Calls a function of step and batch after each step is logged."""

  class Call(loop.Hook):

    def after_step(self, step, state, scalars, batch):
      function(step, batch)

  run = loop.run
  monkeypatch.setattr(
      loop,
      'run',
      lambda *args, hooks, **kwargs: run(
          *args, hooks=[hooks[0], Call(), *hooks[1:]], **kwargs
      ),
  )


def _crash():
  raise _Crash


def _rows(folder):
  """metrics.jsonl but for the speed."""
  return [
      {k: v for k, v in row.items() if k != 'images_per_second'}
      for row in workdirs.read_metrics(folder)
  ]


def _names(folder):
  return {path.name for path in folder.iterdir()}


def _read_json(path):
  return json.loads(path.read_text())


def _read_state(config, folder, step=None):
  """The newest state on disk."""
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  checkpointer = checkpoints.Checkpointer(folder)
  state = checkpointer.restore(
      step or checkpointer.latest_step, builder.abstract
  )
  checkpointer.close()
  return state


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """Folders and states of runs that were never interrupted, by variant."""
  runs = {}

  def get(variant):
    if variant not in runs:
      folder = tmp_path_factory.mktemp(variant)
      state = train.train_and_evaluate(_load_config(variant), folder)
      runs[variant] = folder, jax.device_get(state)
    return runs[variant]

  get('plain')  # Now, before a test leaves out the report.
  return get


@pytest.fixture
def finished(straight, tmp_path):
  """Copy of a finished run's folder, to be changed."""
  folder = tmp_path / 'finished'
  shutil.copytree(straight('plain')[0], folder)
  return folder


def _assert_same_run(folder, state, expected_folder, expected_state):
  chex.assert_trees_all_equal(jax.device_get(state), expected_state)
  assert _rows(folder) == _rows(expected_folder)
  for name in (workdirs.EVALUATION, workdirs.QUANTIZER):
    # The command may be another one.
    text, expected = (
        re.sub('"command": .*', '', (x / name).read_text())
        for x in (folder, expected_folder)
    )
    assert text == expected


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['adversarial_vq', 'sizes'])
def test_a_run_that_crashes_gives_what_a_straight_run_gives(
    straight, journal, tmp_path, variant
):
  taken, after = journal
  config = _load_config(variant)
  config.data.num_threads = 2  # Changes speed, not images.
  after[5] = _crash
  with pytest.raises(_Crash):
    train.train_and_evaluate(config, tmp_path)
  state = train.train_and_evaluate(config, tmp_path)
  assert not after
  assert sorted(taken) == list(range(1, _NUM_STEPS + 1))
  _assert_same_run(tmp_path, state, *straight(variant))
  run = _read_json(tmp_path / workdirs.RUN)
  assert (run['first_step'], run['started_from']) == (3, {})
  # Every image comes once an epoch.
  indices = np.concatenate(list(taken.values()))
  assert len(set(indices.tolist())) == _NUM_STEPS * config.data.batch_size


@pytest.mark.slow
def test_one_image_is_learned(journal, tmp_path):
  taken, _ = journal
  (tmp_path / 'images' / 'train').mkdir(parents=True)
  pixels = np.full((16, 16, 3), (250, 120, 30), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'images' / 'train' / 'a.png')
  config = _load_config()
  config.data.source = 'folder'
  config.data.data_dir = str(tmp_path / 'images')
  config.data.eval_split = 'train'
  config.data.batch_size = 1
  # All devices take each image together.
  config.partitioning.mesh = {'data': 1, 'fsdp': 1, 'tensor': 8}
  config.optim.learning_rate = 1e-2
  config.train.num_steps = 8
  config.train.eval_every_steps = 0
  train.train_and_evaluate(config, tmp_path / 'run')
  losses = [
      row['reconstruction_loss']
      for row in _rows(tmp_path / 'run')
      if row['split'] == 'train'
  ]
  assert losses[-1] < 0.3 * losses[0]
  assert sorted(taken) == [1, 2, 3, 4, 5, 6, 7, 8]
  assert all(indices.tolist() == [0] for indices in taken.values())


@pytest.mark.slow
def test_a_discriminator_starts_on_the_way(straight):
  folder, state = straight('adversarial_vq')
  rows = [row for row in _rows(folder) if row['split'] == 'train']
  assert [row['discriminator_gradient_norm'] > 0 for row in rows] == (
      [False] * 4 + [True] * 8
  )
  # The ramp is 0 in its first step.
  assert [row['adversarial_weight'] > 0 for row in rows] == (
      [False] * 6 + [True] * 6
  )
  assert {row['skipped_steps'] for row in rows} == {0}
  # Of both sides; 0 before.
  assert all(x != 0 for x in state.adversary.average_logits.values())
  # Two vectors of three convolutions of two heads.
  vectors = jax.tree.leaves(state.adversary.model_state)
  assert len(vectors) == 2 * 3 * 2


@pytest.mark.slow
def test_a_run_that_is_stopped_gives_what_a_straight_run_gives(
    straight, journal, tmp_path, fake_wandb
):
  _, after = journal
  config = _load_config()
  config.train.trackers = ('wandb',)
  handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  # Between checkpoints, and after the last step.
  stops = ((4, signal.SIGTERM), (12, signal.SIGINT))
  for step, number in stops:
    after[step] = lambda number=number: os.kill(os.getpid(), number)
    with pytest.raises(train.Preempted) as preempted:
      train.train_and_evaluate(config, tmp_path)
    assert preempted.value.step == step
    assert str(step) in _names(tmp_path / workdirs.CHECKPOINTS)
  assert handlers == [
      signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)
  ]
  state = train.train_and_evaluate(config, tmp_path)
  _assert_same_run(tmp_path, state, *straight('plain'))
  # The tracker has each row once, in one run, with figures.
  (rows,) = fake_wandb.histories.values()
  assert [_as_metrics(row) for row in rows.values()] == workdirs.read_metrics(
      tmp_path
  )
  assert [x['step'] for x in rows.values() if 'reconstructions' in x] == [6, 12]
  assert fake_wandb.exit_codes == [1, 1, 0]
  config = json.loads((tmp_path / workdirs.CONFIG).read_text())
  assert fake_wandb.calls[0]['config']['optim.b1'] == config['optim']['b1']


def _as_metrics(row):
  """A row of `fake_wandb` as one of metrics.jsonl, without figures."""
  names = [name for name in row if name.startswith(('train/', 'eval/'))]
  return {
      'step': row['step'],
      'split': names[0].partition('/')[0],
      **{name.partition('/')[2]: row[name] for name in names},
  }


@pytest.mark.slow
def test_a_signal_stops_an_evaluation_that_is_made_up_for(
    straight, journal, tmp_path, monkeypatch
):
  del journal  # No report.
  config = _load_config()
  counts = []  # Batches of each evaluation.
  sums = results_lib.EvaluationSums
  start, update = sums.__init__, sums.update

  def count_from_0(*args):
    start(*args)
    counts.append(0)

  def update_and_ask(*args):
    update(*args)
    counts[-1] += 1
    # Twice the one of step 6, once that of step 12.
    if counts[-1] == 2 and len(counts) in (1, 2, 4):
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(sums, '__init__', count_from_0)
  monkeypatch.setattr(sums, 'update', update_and_ask)
  for step in (6, 6, 12):
    with pytest.raises(train.Preempted) as preempted:
      train.train_and_evaluate(config, tmp_path)
    assert preempted.value.step == step
    assert str(step) in _names(tmp_path / workdirs.CHECKPOINTS)
    assert (step, 'eval') not in [
        (row['step'], row['split']) for row in _rows(tmp_path)
    ]
  state = train.train_and_evaluate(config, tmp_path)
  _assert_same_run(tmp_path, state, *straight('plain'))
  num_batches = counts[-1]
  assert num_batches > 2
  assert counts == [2, 2, num_batches, 2, num_batches]


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_no_more_than_its_steps(
    straight, finished, journal
):
  taken, _ = journal
  for path in (finished / workdirs.CHECKPOINTS / '12' / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[::-1])
  state = train.train_and_evaluate(_load_config(), finished)
  assert sorted(taken) == [10, 11, 12]
  _assert_same_run(finished, state, *straight('plain'))
  assert (finished / workdirs.DAMAGED / '12').is_dir()
  assert train.train_and_evaluate(_load_config(), finished).step == _NUM_STEPS


@pytest.mark.slow
def test_one_run_writes_into_a_folder(finished):
  before = {x: x.stat() for x in finished.rglob('*') if x.name != workdirs.LOCK}
  with (
      workdirs.lock(finished),
      pytest.raises(ValueError, match=rf'process {os.getpid()} on \S+; wait'),
  ):
    train.train_and_evaluate(_load_config(), finished)
  after = {x: x.stat() for x in finished.rglob('*') if x.name != workdirs.LOCK}
  assert {x: y.st_mtime_ns for x, y in after.items() if x.is_file()} == {
      x: y.st_mtime_ns for x, y in before.items() if x.is_file()
  }
  with workdirs.lock(finished):
    pass  # Free again.


@pytest.mark.slow
def test_a_full_disk_ends_a_run_whose_steps_are_intact(
    tmp_path, journal, monkeypatch
):
  save = checkpoints.Checkpointer.save

  def fill(self, step, *args):
    if step == 6:
      monkeypatch.setattr(ocp.CheckpointManager, 'save', _raise_full)
    save(self, step, *args)

  monkeypatch.setattr(checkpoints.Checkpointer, 'save', fill)
  with pytest.raises(train.RunError, match=r'No space .* disk are \[3\]'):
    train.train_and_evaluate(_load_config(), tmp_path)
  assert {'3'} == _names(tmp_path / workdirs.CHECKPOINTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [workdirs.RUN, workdirs.CONFIG, workdirs.METRICS]
)
def test_a_full_disk_ends_a_run_before_its_first_step(
    tmp_path, monkeypatch, name
):
  write_bytes = workdirs.write_bytes

  def fill(path, data):
    if path.name == name:
      _raise_full()
    write_bytes(path, data)

  monkeypatch.setattr(files_lib, 'write_bytes', fill)
  with pytest.raises(train.RunError, match=r'stopped: .* No space left'):
    train.train_and_evaluate(_load_config(), tmp_path)
  with workdirs.lock(tmp_path):
    pass  # Free again.


def _raise_full(*args, **kwargs):
  raise OSError(28, 'No space left on device')


def test_a_second_signal_is_not_caught():
  with preemption.catch_signals() as stop_request:
    assert not stop_request.is_due(1)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 5
    while not stop_request.is_due(1):
      assert time.monotonic() < deadline
    for number in (signal.SIGTERM, signal.SIGINT):
      assert signal.getsignal(number) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL


def _launch(config, folder):
  """Starts launch.py."""
  overrides = [
      f'--config.train.{name}={config.train[name]}'
      for name in (
          'num_steps', 'log_every_steps', 'checkpoint_every_steps',
          'eval_every_steps',
      )
  ]
  with open(folder.with_suffix('.log'), 'ab') as log:
    return subprocess.Popen(
        [
            sys.executable, 'launch.py', f'--config={_DEBUG}',
            f'--workdir={folder}', *overrides,
        ],
        cwd=_ROOT,
        stdout=log,
        stderr=log,
    )


def _wait_for_step(process, folder, step):
  """Returns when the process has logged that step."""
  for _ in range(6000):
    rows = workdirs.read_metrics(folder) if folder.exists() else []
    if rows and rows[-1]['step'] >= step:
      return
    assert process.poll() is None, folder.with_suffix('.log').read_text()
    time.sleep(0.01)
  raise AssertionError(f'step {step} never came')


@pytest.mark.slow
def test_a_command_that_is_stopped_and_killed_gives_what_a_straight_run_gives(
    tmp_path,
):
  config = _load_config()
  config.train.num_steps = 60
  config.train.checkpoint_every_steps = 5
  config.train.eval_every_steps = 0
  folder = tmp_path / 'interrupted'
  log = folder.with_suffix('.log')
  saved = []
  for step, number, code in (
      (8, signal.SIGTERM, 75), (25, signal.SIGKILL, -signal.SIGKILL)
  ):
    process = _launch(config, folder)
    _wait_for_step(process, folder, step)
    process.send_signal(number)
    assert process.wait(timeout=60) == code, log.read_text()
    steps = _names(folder / workdirs.CHECKPOINTS)
    saved.append(max(int(name) for name in steps if name.isdigit()))
  process = _launch(config, folder)
  assert process.wait(timeout=120) == 0, log.read_text()
  first, second = re.findall(r'Continuing .* from step (\d+)', log.read_text())
  # The signal lost nothing, the kill at most what was not on disk yet.
  assert [int(first), int(second)] == saved
  assert 8 <= saved[0] < 25
  assert 25 - 2 * config.train.checkpoint_every_steps <= saved[1] < 60

  straight = tmp_path / 'straight'
  state = train.train_and_evaluate(config, straight)
  _assert_same_run(
      folder, _read_state(config, folder), straight, jax.device_get(state)
  )


@pytest.mark.parametrize(
    ('section', 'field', 'value', 'line'),
    [
        (None, 'seed', 1, 'seed: 0 -> 1'),
        ('data', 'batch_size', 16, 'data.batch_size: 8 -> 16'),
        ('optim', 'b1', 0.8, 'optim.b1: 0.9 -> 0.8'),
    ],
)
@pytest.mark.slow
def test_another_config_is_refused(finished, section, field, value, line):
  config = _load_config()
  (config[section] if section else config)[field] = value
  files = (workdirs.CONFIG, workdirs.METRICS, workdirs.RUN)
  before = [(finished / name).read_bytes() for name in files]
  with pytest.raises(ValueError, match='differs from that of') as error:
    train.train_and_evaluate(config, finished)
  assert line in [x.strip() for x in str(error.value).splitlines()]
  assert '--allow_config_change' in str(error.value)
  assert [(finished / name).read_bytes() for name in files] == before


@pytest.mark.slow
def test_another_config_is_taken_when_that_is_allowed(finished, journal):
  taken, _ = journal
  config = _load_config()
  config.data.batch_size = 16
  config.train.num_steps = 14
  state = train.train_and_evaluate(config, finished, allow_config_change=True)
  assert int(state.step) == 14
  assert sorted(taken) == [13, 14]
  # The count of batches means nothing for batches of another size.
  dataset = data.build_dataset(config.data, split='train', seed=config.seed)
  for step, batch in zip((13, 14), dataset.iterator(), strict=False):
    np.testing.assert_array_equal(taken[step], batch['index'])
  saved = _read_json(finished / workdirs.CONFIG)
  assert saved['data']['batch_size'] == 16
  steps = [row['step'] for row in _rows(finished) if row['split'] == 'train']
  assert steps == list(range(1, 15))


@pytest.mark.slow
def test_a_run_that_diverges_says_when_and_on_what(tmp_path, journal):
  taken, _ = journal
  config = _load_config()
  config.optim.learning_rate = 1e30  # The first update breaks everything.
  config.train.checkpoint_every_steps = 1
  config.train.eval_every_steps = 0
  config.train.max_bad_steps = 3
  with pytest.raises(train.DivergedError) as error:
    train.train_and_evaluate(config, tmp_path)
  message = str(error.value)
  assert message.startswith('Step 4: gradient_norm and loss')
  assert 'reconstruction_loss not finite' in message
  assert 'update skipped, 3 in a row' in message
  assert f'synthetic image {taken[4][0]}, ' in message
  assert 'train.max_bad_steps = 3. The last checkpoint is of step 3;' in message
  assert 'lower optim.learning_rate' in message
  assert _names(tmp_path / workdirs.CHECKPOINTS) == {'2', '3'}
  state = _read_state(config, tmp_path)
  chex.assert_tree_all_finite(state)
  assert (int(state.step), int(state.bad_steps)) == (3, 2)
  rows = workdirs.read_metrics(tmp_path)
  assert [row['loss'] is None for row in rows] == [False, True, True]


@pytest.mark.slow
def test_a_finished_run_is_described_and_evaluated_again(straight, finished):
  (finished / workdirs.EVALUATION).unlink()
  (finished / workdirs.REPORT).unlink()
  path = finished / workdirs.RUN
  path.write_text(path.read_text()[:100])  # Corrupted.
  state = train.train_and_evaluate(_load_config(), finished)
  _assert_same_run(finished, state, *straight('plain'))
  facts = _read_json(path)
  assert (facts['first_step'], facts['started_from']) == (_NUM_STEPS, {})
  assert (finished / workdirs.REPORT).is_file()


@pytest.mark.slow
def test_a_run_need_not_be_in_the_main_thread(tmp_path, journal):
  del journal  # No report.
  config = _load_config()
  config.train.num_steps = 4
  config.train.eval_every_steps = 0
  states = []
  thread = threading.Thread(
      target=lambda: states.append(train.train_and_evaluate(config, tmp_path))
  )
  thread.start()
  thread.join(timeout=120)
  assert [int(state.step) for state in states] == [4]


@pytest.mark.slow
def test_the_profile_is_of_the_steps_named(tmp_path, journal, monkeypatch):
  _, after = journal
  events = []

  def log(owner, name, event):
    function = getattr(owner, name)

    def logged(*args):
      events.append(event(*args))
      function(*args)

    monkeypatch.setattr(owner, name, logged)

  log(jax.profiler, 'start_trace', lambda folder: 'start')
  log(jax.profiler, 'stop_trace', lambda: 'stop')
  _call_after_steps(monkeypatch, lambda step, batch: events.append(step))
  config = _load_config()
  config.train.profile_steps = (2, 5)
  after[4] = _crash
  with pytest.raises(_Crash):
    train.train_and_evaluate(config, tmp_path)
  # The crash comes before step 4 is noted.
  assert events == [1, 'start', 2, 3, 'stop']
  events.clear()
  train.train_and_evaluate(config, tmp_path)  # Goes on from step 3.
  assert events == ['start', 4, 5, 'stop', *range(6, _NUM_STEPS + 1)]
  traces = list((tmp_path / workdirs.PROFILE).rglob('*.xplane.pb'))
  assert len(traces) == 2


@pytest.mark.slow
def test_a_workdir_describes_its_run(straight):
  folder, _ = straight('plain')
  config = _load_config()
  assert _names(folder) - {workdirs.TENSORBOARD} == {
      '.lock', 'checkpoints', 'config.json', 'evaluation.json', 'metrics.jsonl',
      'quantizer.json', 'reconstructions', 'report.html', 'run.json',
  }
  saved = configuration.config_from_json((folder / workdirs.CONFIG).read_text())
  assert configuration.diff_configs(saved, config) == []
  quantizer = _read_json(folder / workdirs.QUANTIZER)
  assert quantizer['levels'] == [8, 8, 8]
  run = _read_json(folder / workdirs.RUN)
  assert run['mesh'] == {'data': 1, 'fsdp': 1, 'tensor': 1}
  assert run['num_parameters'] == 6707
  assert run['first_step'] == 0
  assert _names(folder / workdirs.RECONSTRUCTIONS) == {
      'step_00000006.png', 'step_00000012.png',
  }
  assert {'9', '12'} <= _names(folder / workdirs.CHECKPOINTS)
  rows = workdirs.read_metrics(folder)
  assert [(row['step'], row['split']) for row in rows] == [
      *((step, 'train') for step in range(1, 7)), (6, 'eval'),
      *((step, 'train') for step in range(7, 13)), (12, 'eval'),
  ]
  assert rows[-2]['loss'] < rows[0]['loss']
  assert all(row['images_per_second'] > 0 for row in rows[:6])
  assert not list(folder.rglob('*.tmp'))


@pytest.mark.slow
def test_a_run_without_quantizer_has_no_tokens_anywhere(tmp_path, capsys):
  config = _load_config('none')
  config.train.num_steps = 6
  config.train.eval_every_steps = 3
  train.train_and_evaluate(config, tmp_path)
  lines = capsys.readouterr().err
  rows = workdirs.read_metrics(tmp_path)
  evaluations = [row for row in rows if row['split'] == 'eval']
  assert [row['step'] for row in evaluations] == [3, 6]
  for row in evaluations:
    assert not {'usage', 'perplexity', 'entropy_bits'} & row.keys()
    assert (
        f'Step {row["step"]}: PSNR {row["psnr"]:.2f} dB, SSIM {row["ssim"]:.3f}'
        '\n'
    ) in lines
  steps = [row for row in rows if row['split'] == 'train']
  assert {row['invalid_tokens'] for row in steps} == {0}
  assert {row['quantizer_loss'] for row in steps} == {0}
  record = _read_json(tmp_path / workdirs.EVALUATION)
  assert record['codebook'] == {}
  assert _read_json(tmp_path / workdirs.QUANTIZER) == {
      'name': 'none', 'code_dim': 8, 'code': 'latent',
  }
  page = (tmp_path / workdirs.REPORT).read_text()
  assert 'A continuous autoencoder reconstructs' in page
  assert 'Codebook' not in page

  # The same again finds nothing left to do; another size is another model.
  state = train.train_and_evaluate(config, tmp_path)
  assert int(state.step) == 6
  config.model.quantizer.none.code_dim = 5
  with pytest.raises(ValueError, match=r'none\.code_dim: 8 -> 5'):
    train.train_and_evaluate(config, tmp_path)


@pytest.mark.slow
def test_the_evaluation_is_that_of_the_average_of_the_parameters(straight):
  folder, state = straight('plain')
  config = _load_config()
  model = models.build_autoencoder(config.model, config.data.image_size)
  config.data.eval_batch_size = 256
  (batch,) = data.build_dataset(config.data, split='eval', seed=0)
  images = batch['image']
  floats = images.astype(np.float32) / 127.5 - 1
  output = jax.jit(model.apply)({'params': state.ema_params}, floats)
  pixels = (np.asarray(output.reconstructions, np.float64) + 1) * 127.5
  pixels = np.rint(np.clip(pixels, 0, 255))
  mse = np.mean(((pixels - images) / 255) ** 2, axis=(1, 2, 3))
  record = _read_json(folder / workdirs.EVALUATION)
  assert record['step'] == _NUM_STEPS
  assert record['metrics']['psnr'] == pytest.approx(
      np.mean(-10 * np.log10(mse)), rel=1e-5
  )
  used = np.unique(output.indices)
  assert record['codebook']['num_used_codes'] == len(used)
  assert record['codebook']['usage'] == len(used) / 512
  row = workdirs.read_metrics(folder)[-1]
  assert row['psnr'] == record['metrics']['psnr']
  assert row['usage'] == record['codebook']['usage']
