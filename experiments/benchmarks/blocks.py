"""Times alternatives in short alternating blocks.

Ratios are computed within one round and their median is reported, since the
speed of the machine may drift between rounds.
"""

from collections.abc import Callable, Mapping
import contextlib
import json
import pathlib
import statistics
import subprocess
import time
from typing import Any

# Runs a number of calls; returns their wall-clock and CPU seconds.
Block = Callable[[int], tuple[float, float]]


def block_of(function: Callable[[], Any]) -> Block:
  """Returns a block that calls a synchronous function."""

  def run(calls: int) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
      function()
    return time.perf_counter() - wall, time.process_time() - processor

  return run


def alternate(
    blocks: Mapping[str, Block], *, baseline: str, calls: int, rounds: int
) -> dict[str, dict[str, float]]:
  """Runs each block once per round.

  Args:
    blocks: blocks by name.
    baseline: the block that ratios are relative to.
    calls: calls per block.
    rounds: timed rounds, after one warm-up call of each block.

  Returns:
    For each name: ms, median wall-clock time per call; ratio, median over
    rounds of its wall-clock time relative to the baseline; cpu_ms and
    cpu_ratio, the same for the CPU time of all threads of the process.
  """
  for block in blocks.values():
    block(1)
  times = [
      {name: block(calls) for name, block in blocks.items()}
      for _ in range(rounds)
  ]
  figures = {}
  for name in blocks:
    figures[name] = {}
    for clock, prefix in enumerate(('', 'cpu_')):
      own = [t[name][clock] for t in times]
      figures[name][f'{prefix}ms'] = statistics.median(own) / calls * 1e3
      figures[name][f'{prefix}ratio'] = statistics.median(
          t[name][clock] / t[baseline][clock] for t in times
      )
  return figures


class TorchPeer:
  """A process of another interpreter that times PyTorch on demand."""

  def __init__(self, interpreter: str):
    self._process = subprocess.Popen(
        [interpreter, str(pathlib.Path(__file__).with_name('torch_peer.py'))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

  def build(self, name: str, **arguments: Any) -> dict[str, Any]:
    """Builds and warms up a function of `torch_peer`; returns its version."""
    return self._ask({'name': name, 'build': arguments})

  def block(self, name: str) -> Block:
    """Returns the block of a built function."""

    def run(calls: int) -> tuple[float, float]:
      answer = self._ask({'name': name, 'calls': calls})
      return answer['seconds'], answer['cpu_seconds']

    return run

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(BrokenPipeError):  # It may have exited.
      self._process.stdin.close()
    self._process.wait()

  def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(
          'The process of --torch_python exited; see its error above.'
      )
    return json.loads(line)
