"""Tests of metrics.jsonl: rows in order, whole after a crash; and of events."""

import json
import math
import struct
import sys

import PIL.Image
import pytest

from fsq_jax import workdir as workdirs
from fsq_jax.workdir import metric_log


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


def _write_rows(folder, steps, *, first_step=0):
  writer = workdirs.MetricWriter(folder, first_step=first_step)
  for step in steps:
    writer.write(step, 'train', {'loss': step / 2})
  writer.flush()
  writer.close()


def _steps(folder):
  return [row['step'] for row in workdirs.read_metrics(folder)]


def _read_events(folder):
  """Returns (step, tag, value) and purged steps of the event files."""
  event_pb2 = pytest.importorskip('tensorboardX.proto.event_pb2')
  values, purged = [], []
  for path in sorted((folder / workdirs.TENSORBOARD).iterdir()):
    data = path.read_bytes()
    while data:
      # A record: length, checksum, that many bytes, checksum.
      (length,) = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12:12 + length])
      data = data[16 + length:]
      if event.session_log.status == event.session_log.START:
        purged.append(event.step)
      for value in event.summary.value:
        content = value.simple_value
        if value.HasField('image'):
          content = value.image.height, value.image.width
        values.append((event.step, value.tag, content))
  return values, purged


def test_rows_come_back_in_order(tmp_path):
  assert workdirs.read_metrics(tmp_path) == []
  writer = workdirs.MetricWriter(tmp_path, first_step=0)
  writer.write(1, 'train', {'loss': 0.5, 'gradient_norm': math.inf})
  writer.write(1, 'eval', {'psnr': math.nan, 'ssim': 0.25})
  # A row is readable as soon as it is written.
  assert workdirs.read_metrics(tmp_path) == [
      {'step': 1, 'split': 'train', 'loss': 0.5, 'gradient_norm': None},
      {'step': 1, 'split': 'eval', 'psnr': None, 'ssim': 0.25},
  ]
  writer.close()


@pytest.mark.parametrize(
    ('first_step', 'kept'),
    [(0, []), (2, [1, 2]), (3, [1, 2]), (4, [1, 2, 4]), (9, [1, 2, 4])],
)
def test_rows_after_the_first_step_are_dropped(tmp_path, first_step, kept):
  _write_rows(tmp_path, [1, 2, 4])
  _write_rows(tmp_path, [10], first_step=first_step)
  assert _steps(tmp_path) == [*kept, 10]


@pytest.mark.parametrize(
    'tail',
    [b'{"step": 3, "spl', b'\x00\x00\x00', b'{"step": 3\xe2\x80', b'3', b'{}'],
    ids=['cut', 'zeros', 'not_utf8', 'number', 'no_step'],
)
def test_a_damaged_last_line_is_left_out(tmp_path, tail):
  _write_rows(tmp_path, [1, 2])
  path = tmp_path / workdirs.METRICS
  path.write_bytes(path.read_bytes() + tail)
  assert _steps(tmp_path) == [1, 2]
  _write_rows(tmp_path, [3], first_step=2)
  assert _steps(tmp_path) == [1, 2, 3]
  # Every line is whole again.
  for line in path.read_text().splitlines():
    json.loads(line)


def test_a_resumed_file_equals_an_undisturbed_one(tmp_path):
  whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
  for folder in (whole, resumed):
    folder.mkdir()
  _write_rows(whole, range(1, 9))
  _write_rows(resumed, range(1, 7))
  _write_rows(resumed, range(5, 9), first_step=4)
  assert (whole / workdirs.METRICS).read_bytes() == (
      resumed / workdirs.METRICS
  ).read_bytes()


def test_events_are_written_with_tensorboardx(tmp_path):
  pytest.importorskip('tensorboardX')
  _write_rows(tmp_path, [1, 2, 3])
  values, _ = _read_events(tmp_path)
  assert values == [(step, 'train/loss', step / 2) for step in (1, 2, 3)]


def test_events_show_the_figures_of_an_evaluation(tmp_path):
  pytest.importorskip('tensorboardX')
  folder = tmp_path / workdirs.RECONSTRUCTIONS
  folder.mkdir()
  for name in ('step_00000003', 'step_00000003_cat', 'step_00000030'):
    PIL.Image.new('L', (7, 5)).save(folder / f'{name}.png')
  writer = workdirs.MetricWriter(tmp_path, first_step=0)
  writer.write(3, 'train', {})
  writer.write(3, 'eval', {'psnr': 0.5})
  writer.close()
  assert _read_events(tmp_path)[0] == [
      (3, 'eval/psnr', 0.5),
      (3, 'reconstructions', (5, 7)),
      (3, 'reconstructions/cat', (5, 7)),
  ]


def test_events_after_the_first_step_are_purged(tmp_path):
  pytest.importorskip('tensorboardX')
  _write_rows(tmp_path, [3], first_step=2)
  _, purged = _read_events(tmp_path)
  # TensorBoard hides what earlier files have from this step on.
  assert purged == [3]


def test_rows_are_written_without_tensorboardx(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  _write_rows(tmp_path, [1, 2])
  assert _steps(tmp_path) == [1, 2]
  assert _names(tmp_path) == [workdirs.METRICS]


def test_a_full_disk_is_reported_once(tmp_path, monkeypatch):

  def open_full(path, *args, **kwargs):
    del path
    return open('/dev/full', *args, **kwargs)

  monkeypatch.setattr(metric_log, 'open', open_full, raising=False)
  writer = workdirs.MetricWriter(tmp_path, first_step=0)
  with pytest.raises(OSError, match='No space left'):
    writer.write(1, 'train', {'loss': 1.0})
  writer.close()  # Not again, in place of the error that tells what to do.
