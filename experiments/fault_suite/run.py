"""Runs fault tests: each injects a fault and measures the effect.

  python -m experiments.fault_suite.run [--only=D1,F3] [--quick]

Runs all tests, or the tests of --only, one after the other, each in its own
process: a crash or a timeout is a failure. Each result is written to
results.json and to the table of README.md. --quick injects fewer faults and
writes nothing. The exit code is 1 if a test has failed.
"""

import argparse
import datetime
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from experiments.fault_suite import fault as faults
from experiments.fault_suite import group_a
from experiments.fault_suite import group_b
from experiments.fault_suite import group_b_runs
from experiments.fault_suite import group_c
from experiments.fault_suite import group_c_places
from experiments.fault_suite import group_d
from experiments.fault_suite import group_d_files
from experiments.fault_suite import group_d_formats
from experiments.fault_suite import group_e
from experiments.fault_suite import group_f
from experiments.fault_suite import group_f_files
from experiments.fault_suite import group_f_runs
from experiments.fault_suite import group_f_tokens
from experiments.fault_suite import group_g
from experiments.fault_suite import group_g_generators
from experiments.fault_suite import group_processes
from fsq_jax import workdir as workdirs
from fsq_jax.workdir import provenance

_FOLDER = pathlib.Path(__file__).parent
_GROUPS = (
    group_a, group_b, group_b_runs, group_c, group_c_places, group_d,
    group_d_files, group_d_formats, group_e, group_f, group_f_files,
    group_f_runs, group_f_tokens, group_g, group_g_generators, group_processes,
)  # fmt: skip
_HEADER = (
    '| id | injected | required | measured | verdict |\n|---|---|---|---|---|\n'
)
_PACKAGES = ('python', 'jax', 'orbax-checkpoint', 'grain', 'numpy')

FAULTS: dict[str, faults.Fault] = {
    name: fault
    for name, fault in sorted(
        (item for group in _GROUPS for item in group.FAULTS.items()),
        key=lambda item: faults.natural(item[0]),
    )
}


def main() -> int:
  """Runs the selected tests; returns the exit code."""
  parser = argparse.ArgumentParser(
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--only', help='comma-separated ids')
  parser.add_argument('--quick', action='store_true', help='fewer faults')
  parser.add_argument('--child', help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    name, folder = arguments.child.split('=', 1)
    _run_here(name, pathlib.Path(folder), arguments.quick)
    return 0
  names = arguments.only.split(',') if arguments.only else list(FAULTS)
  if unknown := sorted(set(names) - FAULTS.keys()):
    parser.error(f'unknown ids {unknown}; available: {list(FAULTS)}')
  # Read before results.json changes, which makes the checkout dirty.
  metadata = provenance.describe()
  passed = True
  for name in names:
    result = _run(name, arguments.quick, metadata)
    passed &= result['verdict'] == 'passed'
    sys.stdout.write(
        f'{name} {result["verdict"]} in {result["seconds"]} s:'
        f' {result["measured"]}\n'
    )
    sys.stdout.flush()
    if not arguments.quick:
      _store(name, result)
  return 0 if passed else 1


def _run(name: str, quick: bool, metadata: dict[str, Any]) -> dict[str, Any]:
  """Runs one fault test in its own process.

  Args:
    name: id of the test.
    quick: whether to inject only a few faults.
    metadata: versions and commit, from `provenance.describe`.

  Returns:
    The entry of results.json.
  """
  fault = FAULTS[name]
  started = time.monotonic()
  with tempfile.TemporaryDirectory(
      prefix=f'fault_{name}_', ignore_cleanup_errors=True
  ) as folder:
    outcome = pathlib.Path(folder, 'outcome.json')
    command = [
        sys.executable, '-m', 'experiments.fault_suite.run',
        f'--child={name}={folder}', *(['--quick'] if quick else []),
    ]
    flags = f'--xla_force_host_platform_device_count={fault.num_devices}'
    process = subprocess.Popen(
        command,
        cwd=faults.ROOT,
        env={
            **os.environ,
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': flags,
            # Commands that a test starts repeatedly compile once.
            'JAX_COMPILATION_CACHE_DIR': str(pathlib.Path(folder, 'programs')),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
      _, log = process.communicate(timeout=fault.limit_seconds)
      ended = f'ended with code {process.returncode}'
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)  # And its subprocesses.
      _, log = process.communicate()
      ended = f'hung for {fault.limit_seconds} s'
    if outcome.is_file():
      values = json.loads(outcome.read_text('utf-8'))
    else:
      last = log.strip().rpartition('\n')[2]
      values = {
          'passed': False, 'measured': f'{ended}: {last}', 'figures': {}
      }
      sys.stderr.write(log)
  return {
      'injected': fault.injected,
      'required': fault.required,
      'measured': values['measured'],
      'verdict': 'passed' if values['passed'] else 'failed',
      'figures': values['figures'],
      'seconds': round(time.monotonic() - started),
      'command': shlex.join(['python', *command[1:3], f'--only={name}']),
      'commit': metadata['git'],
      'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
      'versions': {x: metadata['versions'][x] for x in _PACKAGES},
  }


def _run_here(name: str, folder: pathlib.Path, quick: bool) -> None:
  """Runs one fault test in this process and writes outcome.json."""
  work = folder / 'work'
  work.mkdir()
  outcome = FAULTS[name].test(work, quick)
  values = {**outcome._asdict(), 'passed': bool(outcome.passed)}
  workdirs.write_json(folder / 'outcome.json', values)


def _store(name: str, result: dict[str, Any]) -> None:
  """Replaces one result in results.json and the table in README.md."""
  path = _FOLDER / 'results.json'
  results = json.loads(path.read_text('utf-8')) if path.is_file() else {}
  results[name] = result
  results = {x: results[x] for x in sorted(results, key=faults.natural)}
  workdirs.write_json(path, results)
  readme = _FOLDER / 'README.md'
  text = readme.read_text('utf-8')
  before, _, rest = text.partition(_HEADER)
  # Skip the old rows.
  lines = rest.splitlines(keepends=True)
  while lines and lines[0].startswith('|'):
    lines.pop(0)
  text = before + table(results) + ''.join(lines)
  workdirs.write_bytes(readme, text.encode())


def table(results: dict[str, Any]) -> str:
  """Returns the table of the README."""
  columns = ('injected', 'required', 'measured', 'verdict')
  return _HEADER + ''.join(
      f'| {name} | {" | ".join(result[x] for x in columns)} |\n'
      for name, result in results.items()
  )


if __name__ == '__main__':
  sys.exit(main())
