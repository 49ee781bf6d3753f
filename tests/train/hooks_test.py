"""Tests of the training loop and of what its hooks do around steps."""

import types
from typing import NamedTuple

import pytest

from fsq_jax.train import hooks
from fsq_jax.train import loop


class _State(NamedTuple):
  step: int
  eval_variables: str = 'variables'


class _Request:
  """Asks to stop after a step, or during an evaluation."""

  def __init__(self, after=None, during=False):
    self._after = after
    self._during = during

  def is_due(self, step=None):
    return self._during if step is None else step == self._after


class _Saver:
  """Notes what is saved."""

  def __init__(self, events):
    self._events = events

  def save(self, step, state, metrics):
    assert state.step == step
    self._events.append(('save', step, metrics))

  def wait(self):
    self._events.append('wait')


class _Log(loop.Hook):
  """Notes what the loop calls."""

  def __init__(self, events):
    self._events = events

  def start(self, step, state):
    self._events.append(('start', step))

  def before_step(self, step):
    self._events.append(('before', step))

  def after_step(self, step, state, scalars, batch):
    assert state.step == step
    assert scalars == {'loss': batch}
    self._events.append(('after', step))

  def finish(self, step, state):
    self._events.append(('finish', step))


def _log(writer=None, **options):
  """A log that shows nothing."""
  progress = types.SimpleNamespace(
      start=lambda step: None,
      update=lambda step, scalars: 10.0,
      log=lambda step, scalars: None,
      say=lambda text: None,
      restart_clock=lambda: None,
  )
  defaults = {
      'every_steps': 1,
      'num_steps': 100,
      'max_bad_steps': 3,
      'describe_image': 'image {}'.format,
      'latest_saved': lambda: 7,
  }
  return hooks.Log(progress, writer, **(defaults | options))


def _run(
    first, num_steps, request=None, *, every=(0, 100), evaluated=(), events
):
  """Runs the loop; events get what is evaluated and saved, in order."""

  def evaluate(variables, *, before_batch):
    assert variables == 'variables'
    before_batch()
    step = state_step[-1]
    events.append(('evaluate', step))
    return types.SimpleNamespace(
        scalars=lambda: {'psnr': float(step)}, summary=str
    )

  state_step = [first]

  def train_step(state, batch):
    state_step.append(state.step + 1)
    return _State(state.step + 1), {'loss': batch}

  saver = _Saver(events)
  stop = hooks.Stop(request or _Request(), saver)
  evaluation = hooks.Evaluate(
      types.SimpleNamespace(run=evaluate),
      _log(),
      stop,
      None,
      every_steps=every[0],
      num_steps=num_steps,
      is_evaluated=lambda step: step in evaluated,
  )
  return loop.run(
      _State(first),
      iter(range(first + 1, num_steps + 1)),
      train_step=train_step,
      hooks=[stop, evaluation, hooks.SaveSteps(saver, evaluation, every[1])],
      num_steps=num_steps,
  )


def test_scalars_are_logged_one_step_late_and_flushed():
  rows = []
  writer = types.SimpleNamespace(
      write=lambda step, split, row: rows.append((step, split, row['loss'])),
      flush=lambda: rows.append('flush'),
  )
  log = _log(writer, every_steps=2, num_steps=5)
  for step in range(1, 6):
    scalars = {'loss': step / 2, 'bad_steps': 0}
    log.after_step(step, None, scalars, {'index': [step]})
    assert len(rows) == (step - 1) // 2
  log.flush()
  assert rows == [(2, 'train', 1), (4, 'train', 2), (5, 'train', 2.5), 'flush']


def test_too_many_bad_steps_in_a_row_name_their_images():
  log = _log(max_bad_steps=2)
  for step in (1, 2):
    scalars = {'loss': float('nan'), 'bad_steps': step, 'invalid_tokens': 0.5}
    log.after_step(step, None, scalars, {'index': [step, 9]})
  with pytest.raises(loop.DivergedError) as error:
    log.flush()
  message = str(error.value)
  assert message.startswith('Step 2: loss not finite (50.0% of the tokens')
  assert 'update skipped, 2 in a row. Images: image 2, image 9' in message
  assert 'The last checkpoint is of step 7;' in message


def test_the_loop_calls_its_hooks_around_each_step():
  events = []
  state = loop.run(
      _State(3),
      iter([4, 5]),
      train_step=lambda state, batch: (_State(state.step + 1), {'loss': batch}),
      hooks=[_Log(events)],
      num_steps=5,
  )
  assert state.step == 5
  assert events == [
      ('start', 3), ('before', 4), ('after', 4), ('before', 5), ('after', 5),
      ('finish', 5),
  ]


def test_steps_are_saved_when_due_and_with_their_evaluation():
  events = []
  _run(0, 7, every=(3, 2), events=events)
  assert events == [
      ('save', 2, None),
      ('evaluate', 3), ('save', 3, {'psnr': 3.0}),
      ('save', 4, None),
      ('evaluate', 6), ('save', 6, {'psnr': 6.0}),
      ('evaluate', 7), ('save', 7, {'psnr': 7.0}),
      'wait',
  ]  # fmt: skip


def test_stop_request_saves_the_step_first():
  events = []
  with pytest.raises(loop.Preempted) as stopped:
    _run(0, 7, _Request(after=3), every=(3, 2), events=events)
  assert stopped.value.step == 3
  assert events == [('save', 2, None), ('save', 3, None), 'wait']


def test_a_stop_during_an_evaluation_saves_without_it():
  events = []
  with pytest.raises(loop.Preempted):
    _run(0, 7, _Request(during=True), every=(3, 100), events=events)
  assert events == [('save', 3, None), 'wait']


@pytest.mark.parametrize(
    ('first', 'evaluated', 'expected'),
    [
        # A stop has kept the step from being evaluated.
        (3, (), [('evaluate', 3)]),
        (3, (3,), []),
        # No evaluation was due, and a run that starts has none to make up for.
        (2, (), []),
        (0, (), []),
    ],
)
def test_missed_evaluation_runs_first(first, evaluated, expected):
  events = []
  _run(first, 5, every=(3, 100), evaluated=evaluated, events=events)
  start = [] if first >= 3 else [('evaluate', 3), ('save', 3, {'psnr': 3.0})]
  assert events == [
      *expected, *start, ('evaluate', 5), ('save', 5, {'psnr': 5.0}), 'wait'
  ]  # fmt: skip


def test_a_finished_run_is_evaluated_again_and_takes_no_step():
  events = []
  state = _run(7, 7, events=events)
  assert state.step == 7
  assert events == [('evaluate', 7), 'wait']


def test_a_step_is_saved_with_its_record_after_the_log():
  events = []
  log = _log(types.SimpleNamespace(
      write=lambda step, *row: events.append(('write', step)),
      flush=lambda: events.append('flush'),
  ))
  checkpointer = types.SimpleNamespace(
      save=lambda *args: events.append(args),
      wait=lambda: events.append('wait'),
  )
  saver = hooks.Saver(checkpointer, lambda: {'position': 5}, log)
  log.after_step(5, _State(5), {'loss': 1.0, 'bad_steps': 0}, {'index': [0]})
  saver.save(5, 'state', {'psnr': 1.0})
  saver.wait()
  assert events[0] == ('write', 5)
  assert events[-2:] == [(5, 'state', {'position': 5}, {'psnr': 1.0}), 'wait']
