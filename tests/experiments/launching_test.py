"""Tests of the launch files: their commands run, with stand-ins of clusters.

tests/runtime/processes_test.py runs slurm.sh.
"""

import os
import pathlib
import subprocess

import pytest

_SCRIPT = (
    pathlib.Path(__file__).parents[2] / 'experiments/launching/tpu_pod.sh'
)
# Keeps the state of a queued resource in a file; $RESULTS has the states after
# each training.
_GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >> log
case "$4 $3" in
  "describe queued-resources")
    [[ -f state ]] || { echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1; }
    cat state
    if [[ "$(cat state)" == WAITING ]]; then echo ACTIVE > state; fi ;;
  "create queued-resources") echo WAITING > state ;;
  "delete queued-resources") rm state ;;
  "ssh tpu-vm")
    if [[ "$*" == *launch.py* ]]; then
      head -n 1 results > state; sed -i 1d results
      [[ "$(cat state)" == DONE ]]
    fi ;;
esac
"""


def _run(folder, results):
  (folder / 'bin').mkdir()
  (folder / 'bin/gcloud').write_text(_GCLOUD)
  (folder / 'bin/gcloud').chmod(0o755)
  (folder / 'results').write_text(results)
  environment = {
      'PATH': f'{folder}/bin:{os.environ["PATH"]}', 'POLL_SECONDS': '0',
      'NAME': 'fsq', 'ZONE': 'z', 'TPU': 'v5litepod-16', 'NFS': 'h:/a b',
      'EXTRAS': 'gcs,wandb',
  }  # fmt: skip
  done = subprocess.run(
      [_SCRIPT, '--config=a b.py'], cwd=folder, env=os.environ | environment,
      capture_output=True, text=True, timeout=60, check=False,
  )  # fmt: skip
  log = (folder / 'log').read_text()
  verbs = [
      line.split()[3] for line in log.splitlines()
      if 'queued-resources' in line and 'describe' not in line
  ]  # fmt: skip
  return done, verbs, log


def test_a_preempted_tpu_is_requested_again(tmp_path):
  done, verbs, log = _run(tmp_path, 'SUSPENDED\nDONE\n')
  assert done.returncode == 0, done.stderr
  assert verbs == ['create', 'delete', 'create', 'delete']
  assert log.count('launch.py         --distributed') == 2
  assert r'--config=a\ b.py' in log
  assert r'mount h:/a\ b /mnt/share' in log
  assert r'install -q -e .\[gcs\,wandb\]' in log
  assert '--spot' in log


def test_a_run_that_fails_keeps_its_tpu(tmp_path):
  done, verbs, _ = _run(tmp_path, 'ACTIVE\n')
  assert done.returncode == 1
  assert 'The run has failed' in done.stderr
  assert verbs == ['create']


@pytest.mark.parametrize('name', ['NAME', 'ZONE', 'TPU', 'NFS'])
def test_missing_settings_are_named(name):
  given = {x: 'x' for x in ('NAME', 'ZONE', 'TPU', 'NFS') if x != name}
  environment = {k: v for k, v in os.environ.items() if k != name}
  done = subprocess.run(
      [_SCRIPT], env=environment | given, capture_output=True, text=True,
      check=False,
  )  # fmt: skip
  assert done.returncode == 1
  assert f'{name}: ' in done.stderr
