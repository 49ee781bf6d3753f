"""Whole runs of generators: resumed, stopped, refused, evaluated."""

import json
import math
import os
import re
import shutil
import signal

import chex
import jax
import numpy as np
import pytest

from fsq_jax import tokens
from fsq_jax.data import synthetic
from fsq_jax.generators import evaluation
from fsq_jax.generators import generator as generators
from fsq_jax.generators import sampler as samplers
from fsq_jax.generators import training
from fsq_jax.report import report
from fsq_jax.tokens import tokenization
from fsq_jax.train import loop
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import metric_log

pytestmark = pytest.mark.slow


class _Crash(Exception):  # noqa: N818
  """Stands for anything that ends a run between two steps."""


def _crash():
  raise _Crash


@pytest.fixture(scope='module')
def load_config(make_config):
  """Returns a config by kind; the autoregressive one decodes no samples."""

  def load(kind='autoregressive'):
    config = make_config(kind)
    if kind == 'autoregressive':
      config.tokens.tokenizer = ''
      config.eval.num_samples = 0
    return config

  return load


@pytest.fixture(scope='module')
def trained(load_config, tmp_path_factory):
  """Folder and last state of an uninterrupted run, by kind."""
  runs = {}

  def get(kind='autoregressive'):
    if kind not in runs:
      folder = tmp_path_factory.mktemp(kind)
      state = training.train_and_evaluate(load_config(kind), folder)
      runs[kind] = folder, jax.device_get(state)
    return runs[kind]

  # Now, before a test leaves out the report.
  get('masked')
  get()
  return get


@pytest.fixture
def finished(trained, tmp_path):
  """Copy of the folder of a finished run, to be changed."""
  shutil.copytree(trained()[0], tmp_path / 'finished')
  return tmp_path / 'finished'


@pytest.fixture
def after(monkeypatch):
  """What to do after a step, by step. The report is left out."""
  actions = {}

  class Act(loop.Hook):

    def after_step(self, step, state, scalars, batch):
      if step in actions:
        actions.pop(step)()

  run = loop.run
  monkeypatch.setattr(
      loop,
      'run',
      lambda *args, hooks, **kwargs: run(
          *args, hooks=[hooks[0], Act(), *hooks[1:]], **kwargs
      ),
  )
  monkeypatch.setattr(report, 'write_report', lambda *_: None)
  return actions


def _rows(folder):
  """metrics.jsonl but for the speed."""
  return [
      {k: v for k, v in row.items() if k != 'images_per_second'}
      for row in metric_log.read_metrics(folder)
  ]


def _names(folder):
  return {path.name for path in folder.iterdir()}


def _read_json(path):
  return json.loads(path.read_text())


def _assert_same_run(folder, state, expected_folder, expected_state):
  chex.assert_trees_all_equal(jax.device_get(state), expected_state)
  assert _rows(folder) == _rows(expected_folder)
  for name in (workdirs.EVALUATION, workdirs.QUANTIZER):
    assert (folder / name).read_bytes() == (expected_folder / name).read_bytes()
  pictures = [
      {x.name: x.read_bytes() for x in (y / workdirs.SAMPLES).glob('*')}
      for y in (folder, expected_folder)
  ]
  assert pictures[0] == pictures[1]


@pytest.mark.parametrize('kind', ['masked', 'autoregressive'])
def test_a_run_that_is_stopped_and_crashes_gives_what_a_straight_run_gives(
    trained, load_config, after, tmp_path, kind, fake_wandb
):
  config = load_config(kind)
  config.train.trackers = ('wandb',)
  # Before the first checkpoint, between an evaluation and a checkpoint.
  for step in (1, 4):
    after[step] = _crash
    with pytest.raises(_Crash):
      training.train_and_evaluate(config, tmp_path)
  after[5] = lambda: os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(loop.Preempted) as preempted:
    training.train_and_evaluate(config, tmp_path)
  assert preempted.value.step == 5
  state = training.train_and_evaluate(config, tmp_path)
  assert _read_json(tmp_path / workdirs.RUN)['first_step'] == 5
  _assert_same_run(tmp_path, state, *trained(kind))
  # The tracker has each row once, in one run, with figures.
  (rows,) = fake_wandb.histories.values()
  rows = rows.values()
  assert [(x['step'], x['train/nll']) for x in rows if 'train/nll' in x] == [
      (x['step'], x['nll']) for x in _rows(tmp_path) if x['split'] == 'train'
  ]
  evaluated = [x for x in rows if 'eval/bits_per_token' in x]
  assert [x['step'] for x in evaluated] == [3, 6]
  assert all(('samples' in x) is (kind == 'masked') for x in evaluated)


def test_a_signal_stops_an_evaluation_that_is_made_up_for(
    trained, load_config, after, tmp_path, monkeypatch
):
  del after  # No report.
  config = load_config('masked')
  calls = []
  sample = samplers.Sampler.__call__

  def stop(self, *args, before_batch, **kwargs):
    calls.append(1)
    if len(calls) == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return sample(self, *args, before_batch=before_batch, **kwargs)

  monkeypatch.setattr(samplers.Sampler, '__call__', stop)
  with pytest.raises(loop.Preempted) as preempted:
    training.train_and_evaluate(config, tmp_path)
  assert preempted.value.step == 3
  assert [row['split'] for row in _rows(tmp_path)] == ['train'] * 3
  assert not (tmp_path / workdirs.EVALUATION).exists()
  state = training.train_and_evaluate(config, tmp_path)
  _assert_same_run(tmp_path, state, *trained('masked'))


def test_a_corrupted_checkpoint_costs_no_more_than_its_steps(
    trained, finished, load_config, after
):
  del after
  for path in (finished / workdirs.CHECKPOINTS / '6' / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[::-1])
  state = training.train_and_evaluate(load_config(), finished)
  _assert_same_run(finished, state, *trained())
  assert (finished / workdirs.DAMAGED / '6').is_dir()


def test_a_finished_run_is_evaluated_again(
    trained, finished, load_config, after
):
  del after
  (finished / workdirs.EVALUATION).unlink()
  state = training.train_and_evaluate(load_config(), finished)
  _assert_same_run(finished, state, *trained())


def test_a_workdir_describes_its_run(trained, tokenizer):
  folder, state = trained('masked')
  assert _names(folder) - {workdirs.TENSORBOARD} == {
      '.lock', 'checkpoints', 'config.json', 'evaluation.json', 'metrics.jsonl',
      'quantizer.json', 'report.html', 'run.json', 'samples',
  }
  run = _read_json(folder / workdirs.RUN)
  assert run['tokens']['model_hash'] == tokenizer.model_hash
  assert run['tokens']['label_names'] == ['cat', 'dog', 'a/b c']
  assert run['num_parameters'] == sum(
      x.size for x in jax.tree.leaves(state.params)
  )
  assert _names(folder / workdirs.SAMPLES) == {
      f'step_0000000{step}{name}.png'
      for step in (3, 6) for name in ('', '_inpainting', '_nearest')
  }
  rows = _rows(folder)
  assert [(row['step'], row['split']) for row in rows] == [
      (1, 'train'), (2, 'train'), (3, 'train'), (3, 'eval'),
      (4, 'train'), (5, 'train'), (6, 'train'), (6, 'eval'),
  ]
  # The head starts at the uniform distribution.
  assert rows[0]['nll'] == pytest.approx(math.log(512), rel=1e-3)
  assert rows[-1]['bits_per_token'] < rows[3]['bits_per_token'] < 9
  content = _read_json(folder / workdirs.EVALUATION)
  assert content['step'] == 6
  metrics = content['metrics']
  assert {'step': 6, 'split': 'eval', **metrics} == rows[-1]
  assert metrics['bits_per_image'] == pytest.approx(
      16 * metrics['bits_per_token']
  )
  assert metrics['generalization_gap'] == pytest.approx(
      metrics['bits_per_token'] - metrics['train_bits_per_token']
  )
  protocol = content['protocol']
  assert protocol['tokens']['eval']['num_images'] == 12
  assert protocol['definitions'].keys() >= {
      'bits_per_token', 'fd_pixel_pca', 'left_neighbour'
  }
  page = (folder / workdirs.REPORT).read_text()
  assert f'{metrics["bits_per_token"]:.2f}' in page
  assert page.count('data:image/png') >= 3
  assert not list(folder.rglob('*.tmp'))


@pytest.mark.parametrize('kind', ['masked', 'autoregressive'])
def test_the_evaluation_is_of_the_average_of_the_parameters(
    trained, load_config, kind
):
  folder, state = trained(kind)
  generator = generators.Generator.from_workdir(folder)
  chex.assert_trees_all_equal(
      jax.device_get(generator.variables['params']), state.ema_params
  )
  source = tokens.TokenSource(load_config(kind).tokens.eval)
  grids = np.stack([x.tokens for x in source])
  nll = generator.nll(grids, np.array([x.label for x in source]))
  metrics = _read_json(folder / workdirs.EVALUATION)['metrics']
  assert metrics['bits_per_image'] == pytest.approx(
      np.mean(nll) / math.log(2), rel=1e-5
  )
  assert ('compression_bits_per_token' in metrics) == (kind == 'masked')
  baselines = _read_json(folder / workdirs.EVALUATION)['baselines']
  assert baselines['uniform'] == 9


def test_the_best_checkpoint_has_the_fewest_bits(
    load_config, after, tmp_path, monkeypatch
):
  del after
  bits = iter([8.5, 8.0, 8.25])

  def run(self, variables, before_batch):
    metrics = dict.fromkeys(
        ('bits_per_token', 'bits_per_image', 'train_bits_per_token'), next(bits)
    )
    return evaluation.Evaluation(metrics, {'uniform': 9.0}, {}, {})

  monkeypatch.setattr(evaluation.Evaluator, 'run', run)
  config = load_config()
  config.train.eval_every_steps = 2
  config.train.keep_checkpoints = 1
  training.train_and_evaluate(config, tmp_path)
  assert generators.Generator.from_workdir(tmp_path, 'best').step == 4
  assert _names(tmp_path / workdirs.CHECKPOINTS) == {'4', '6'}


@pytest.mark.parametrize(
    ('field', 'value', 'line'),
    [
        ('seed', 1, 'seed: 0 -> 1'),
        ('model.kind', 'masked', "model.kind: 'autoregressive' -> "),
        ('losses.mask_schedule', 'arccos', "losses.mask_schedule: 'cosine'"),
        ('tokens.batch_size', 16, 'tokens.batch_size: 8 -> 16'),
    ],
)
def test_another_config_is_refused(finished, load_config, field, value, line):
  config = load_config()
  config.update_from_flattened_dict({field: value})
  before = (finished / workdirs.RUN).read_bytes()
  with pytest.raises(ValueError, match=re.escape(line)):
    training.train_and_evaluate(config, finished)
  assert (finished / workdirs.RUN).read_bytes() == before


def test_other_token_files_are_refused(
    finished, load_config, write_tokens, tmp_path, after
):
  del after
  config = load_config()
  # Another folder with the same files is the same.
  shutil.copytree(config.tokens.train, tmp_path / 'same')
  config.tokens.train = str(tmp_path / 'same')
  assert int(training.train_and_evaluate(config, finished).step) == 6
  config.tokens.train = str(write_tokens(tmp_path / 'other', 40, seed=7))
  with pytest.raises(ValueError, match=r'training data differ .*\n  shards: '):
    training.train_and_evaluate(config, finished)
  config.train.num_steps = 7
  state = training.train_and_evaluate(
      config, finished, allow_config_change=True
  )
  assert int(state.step) == 7
  (path,) = (tmp_path / 'other').glob('tokens*')
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with pytest.raises(ValueError, match=r'^tokens\.train: .* cannot be used'):
    training.train_and_evaluate(config, finished)


def test_tokens_of_another_tokenizer_are_refused(
    finished, load_config, write_tokens, tmp_path
):
  config = load_config()
  for split, num in (('train', 40), ('eval', 12)):
    config.tokens[split] = str(
        write_tokens(tmp_path / split, num, model_hash='ab' * 32)
    )
  for options in ({}, {'allow_config_change': True}):
    with pytest.raises(ValueError, match=r'other tokens .*\n  model_hash: '):
      training.train_and_evaluate(config, finished, **options)


def test_missing_token_files_are_made(
    load_config, tmp_path, after, monkeypatch
):
  del after
  monkeypatch.setattr(synthetic, 'NUM_TRAIN', 24)
  monkeypatch.setattr(synthetic, 'NUM_VALIDATION', 16)
  config = load_config('masked')
  tokenizer = tmp_path / 'tokenizer'
  shutil.copytree(config.tokens.tokenizer, tokenizer)
  config.tokens.tokenizer = str(tokenizer)
  config.tokens.train = config.tokens.eval = ''
  config.model.class_conditional = False
  config.losses.class_dropout = 0.0
  config.tokens.train_views = 2
  config.train.num_steps = 1
  config.eval.reference = 'original'
  training.train_and_evaluate(config, tmp_path / 'run')
  assert _names(tokenizer / 'tokens') == {
      'synthetic_train_2_views', 'synthetic_eval',
  }
  source = tokens.TokenSource(tokenizer / 'tokens' / 'synthetic_train_2_views')
  assert len(source) == 2 * 24
  run = _read_json(tmp_path / 'run' / workdirs.EVALUATION)
  assert run['protocol']['num_images'] == 16
  assert run['protocol']['samples']['reference'] == 'original'
  # They are not made again.
  monkeypatch.setattr(tokenization, 'tokenize_workdir', None)
  training.train_and_evaluate(config, tmp_path / 'run')


@pytest.mark.parametrize('field', ['tokens.eval', 'tokens.tokenizer'])
def test_missing_inputs_leave_no_folder(load_config, tmp_path, field):
  config = load_config('masked')
  (tmp_path / 'empty').mkdir()
  config.update_from_flattened_dict({field: str(tmp_path / 'empty')})
  with pytest.raises(ValueError, match=rf'(?s){field}.*empty'):
    training.train_and_evaluate(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_run_needs_no_tokenizer(trained):
  folder, _ = trained()
  assert not (folder / workdirs.SAMPLES).exists()
  assert (folder / workdirs.REPORT).is_file()
  content = _read_json(folder / workdirs.EVALUATION)
  assert 'sampler' not in content['protocol']
  generator = generators.Generator.from_workdir(folder)
  assert generator.sample([0]).images is None


def test_a_run_that_diverges_says_when_and_on_what(
    load_config, tmp_path, after
):
  del after
  config = load_config()
  config.optim.learning_rate = 1e30  # The first update breaks everything.
  config.train.eval_every_steps = 0
  config.train.max_bad_steps = 2
  with pytest.raises(loop.DivergedError) as error:
    training.train_and_evaluate(config, tmp_path)
  message = str(error.value)
  assert message.startswith('Step 3: ')
  assert 'Images: 0/' in message
  assert 'train.max_bad_steps = 2' in message
  rows = _rows(tmp_path)
  assert [row['loss'] is None for row in rows] == [False, True]
  assert rows[-1]['skipped_steps'] == 1


