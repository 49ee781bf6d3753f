"""Faults of several processes on one machine."""

from collections.abc import Mapping
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

from experiments.fault_suite import fault
from fsq_jax import workdir as workdirs


def launch(
    folder: pathlib.Path,
    num_processes: int,
    *overrides: str,
    env: Mapping[str, str] | None = None,
) -> list[subprocess.Popen]:
  """Starts launch.py several times on the debug config, joined.

  Args:
    folder: their workdir; their logs are beside it, as NAME.log0 and so on.
    num_processes: how many.
    *overrides: more of the command line.
    env: environment variables; those of this process by default.

  Returns:
    The processes; the first one writes.
  """
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    port = listener.getsockname()[1]
  processes = []
  for i in range(num_processes):
    with open(folder.with_suffix(f'.log{i}'), 'ab') as log:
      processes.append(
          subprocess.Popen(
              [
                  sys.executable, 'launch.py', '--config=configs/debug.py',
                  f'--workdir={folder}', f'--process_id={i}',
                  f'--num_processes={num_processes}',
                  f'--coordinator_address=127.0.0.1:{port}',
                  '--config.train.log_every_steps=1', *overrides,
              ],
              cwd=fault.ROOT, env=env, stdout=log, stderr=log,
          )
      )
  return processes


def _one_is_stopped(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  rng = random.Random(0)
  tries = 2 if quick else 20
  agreed, steps = 0, []
  for i in range(tries):
    run = folder / str(i)
    processes = launch(
        run, 2, '--config.train.num_steps=1000000',
        '--config.train.eval_every_steps=0',
        '--config.train.checkpoint_every_steps=1000000',
        f'--config.train.compilation_cache={folder}/programs',
    )
    while not run.exists() or not workdirs.read_metrics(run):
      if any(process.poll() is not None for process in processes):
        raise RuntimeError(run.with_suffix('.log0').read_text())
      time.sleep(0.02)
    time.sleep(rng.uniform(0, 1))
    processes[i % 2].send_signal(rng.choice((signal.SIGTERM, signal.SIGINT)))
    codes = [process.wait(timeout=300) for process in processes]
    saved = [
        int(x.name) for x in (run / workdirs.CHECKPOINTS).iterdir()
        if x.name.isdigit()
    ]
    said = [
        f'Interrupted; step {saved[0]} is saved'
        in run.with_suffix(f'.log{j}').read_text()
        for j in range(2)
    ]
    agreed += codes == [75, 75] and len(saved) == 1 and all(said)
    steps += saved
  return fault.Outcome(
      agreed == tries,
      f'{agreed} of {tries} times (SIGTERM or SIGINT, to one or the other) both'
      f' left with 75 after saving one step, between {min(steps)} and'
      f' {max(steps)}',
      {'agreed': agreed, 'steps': steps},
  )


FAULTS = {
    'C4': fault.Fault(
        'a signal to one of two processes', 'both save the same step, 20 of 20',
        _one_is_stopped, num_devices=2, limit_seconds=3600,
    ),
}
