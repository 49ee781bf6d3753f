"""Tests of the script that measures on the devices at hand."""

import pytest

from experiments.accelerators import measure


@pytest.mark.slow
def test_small_models_are_measured_on_cpus(capsys, monkeypatch):
  monkeypatch.setattr(measure, 'SECONDS_PER_ROW', 0.0)
  rows = list(measure.measure(measure.TINY, matmul_side=64, num_vectors=64))
  assert [row.label for row in rows] == [
      'matmul of 64 x 64 in bfloat16',
      'copy on the device',
      'FSQ forward with indices, 64 vectors',
      'ViT autoencoder',
      'ViT autoencoder, attention by XLA',
      'sampling, tiny: masked, 8 steps',
  ]
  assert all(row.seconds > 0 for row in rows)
  assert rows[3].flops == rows[4].flops > 1e6
  measure.print_table(rows)
  table = capsys.readouterr().out.splitlines()
  assert len(table) == 2 + len(rows)
  assert '| 64 |' not in table[2]


def test_a_case_that_fails_leaves_the_other_rows(capsys, monkeypatch):
  monkeypatch.setattr(measure, 'SECONDS_PER_ROW', 0.0)

  def fail(*_):
    raise RuntimeError('no compiler\nat all')

  monkeypatch.setattr(measure, '_measure_sampling', fail)
  cases = measure.TINY[-1:]
  rows = list(measure.measure(cases, matmul_side=8, num_vectors=8))
  assert len(rows) == 4
  assert rows[-1].note == 'failed: RuntimeError: no compiler'
  measure.print_table(rows)
  assert rows[-1].note in capsys.readouterr().out


def test_measuring_ends_in_time(capsys, monkeypatch):
  monkeypatch.setattr(measure, 'SECONDS_PER_ROW', 0.0)
  case = measure.TINY[-1]
  rows = list(
      measure.measure([case], budget=-1, matmul_side=8, num_vectors=8)
  )
  assert rows[-1].note == 'skipped, out of time'
  measure.print_table(rows)
  last = capsys.readouterr().out.splitlines()[-1]
  assert last == f'| {rows[-1].label} |  |  |  |  |  | {rows[-1].note} |'
