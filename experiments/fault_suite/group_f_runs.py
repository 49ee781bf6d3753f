"""Faults of the environment: no network, missing packages; long runs."""

import importlib.metadata
import os
import pathlib
import re

import jax
import numpy as np
from packaging import requirements

from experiments.fault_suite import fault
from fsq_jax import train
from fsq_jax.train import loop

_NO_NETWORK = """
import os, sys
def refuse(event, arguments):
  if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):
    with open(os.environ['ATTEMPTS'], 'a') as file:
      file.write(f'{event} {arguments!r}\\n')
    raise OSError(101, 'Network is unreachable')
sys.addaudithook(refuse)
"""


def _no_network(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  (folder / 'sitecustomize.py').write_text(_NO_NETWORK)
  attempts = folder / 'attempts'
  attempts.touch()
  env = {
      **os.environ,
      'ATTEMPTS': str(attempts),
      'PYTHONPATH': os.pathsep.join(
          [str(folder), str(fault.ROOT), os.environ.get('PYTHONPATH', '')]
      ),
  }
  codes = []
  for config, fields in (
      ('debug', ()),
      ('fsq_888', ('num_steps=4', 'compilation_cache=')),
  ):
    fields = [f'--config.train.{x}' for x in fields]
    fields += ['--config.optim.warmup_steps=1']
    for mode in ('train', 'eval'):
      codes.append(
          fault.launch(
              f'--config=configs/{config}.py', *fields, f'--mode={mode}',
              f'--workdir={folder / config}', env=env, timeout=900,
          ).returncode
      )
    if quick:
      break
  tried = attempts.read_text().splitlines()
  return fault.Outcome(
      not any(codes) and not tried,
      f'{codes.count(0)} of {len(codes)} commands (training and evaluation of'
      f' debug and fsq_888) end with 0; {len(tried)} attempts to connect',
      {'codes': codes, 'attempts': tried},
  )


def _declared() -> set[str]:
  """Returns the installed distributions required by this package."""
  found, pending = set(), [('fsq_jax', ())]
  while pending:
    name, extras = pending.pop()
    if (name, extras) in found:
      continue
    found.add((name, extras))
    try:
      lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
      continue
    for line in lines:
      requirement = requirements.Requirement(line)
      if requirement.marker is None or any(
          requirement.marker.evaluate({'extra': extra})
          for extra in (*extras, '')
      ):
        wanted = re.sub(r'[-_.]+', '-', requirement.name).lower()
        pending.append((wanted, tuple(sorted(requirement.extras))))
  return {name.replace('_', '-') for name, _ in found}


_MISSING = """if True:
  import sys
  hidden = set(sys.argv.pop(1).split(','))
  class Finder:
    def __init__(self, finder):
      self.finder = finder
    def find_spec(self, name, path=None, target=None):
      # None is what is not installed: some look whether it is.
      if name.split('.')[0] not in hidden:
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
      return getattr(self.finder, name)
  sys.meta_path[:] = [
      Finder(x) if hasattr(x, 'find_spec') else x for x in sys.meta_path
  ]
  import runpy
  sys.path.insert(0, '.')
  sys.argv[0] = 'launch.py'
  runpy.run_path('launch.py', run_name='__main__')
"""


def _only_declared(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  declared = _declared()
  owners = importlib.metadata.packages_distributions()
  hidden = {
      module for module, names in owners.items()
      if not any(
          re.sub(r'[-_.]+', '-', x).lower() in declared for x in names
      )
  } | {'tensorflow', 'torch', 'wandb', 'tensorboardX'}
  codes = {}
  for mode in ('train', 'eval'):
    done = fault.run_python(
        _MISSING, ','.join(sorted(hidden)), '--config=configs/debug.py',
        f'--mode={mode}', f'--workdir={folder / "run"}',
    )
    codes[mode] = done.returncode
    if done.returncode:
      codes['said'] = done.stderr[-500:]
  code = (
      'from fsq_jax.data import tfds_source\n'
      f'tfds_source.prepare("cifar10", {str(folder)!r})'
  )
  done = fault.run_python(
      'import sys\nsys.modules["tensorflow"] = None\n' + code
  )
  named = 'pip install' in done.stderr and 'TensorFlow' in done.stderr
  return fault.Outcome(
      codes == {'train': 0, 'eval': 0} and named,
      f'trains and evaluates with {len(hidden)} undeclared modules hidden'
      f' (tensorflow, torch, wandb, tensorboardX among them); the mode that'
      ' needs one says which' if named else f'{codes} {done.stderr[-300:]}',
      {'hidden': sorted(hidden), 'codes': codes},
  )


def _long_run(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  num_steps = 1500 if quick else 10_000
  every = num_steps // 10
  memory, compiled = {}, []

  def count(event, *_, **__):
    if 'backend_compile' in event:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(count)
  at_warm = []

  class Measure(loop.Hook):
    """Records memory and compilations."""

    def after_step(self, step, state, scalars, batch):
      if step % every == 0:
        memory[step] = round(fault.resident_mb(), 2)
      if step in (2 * every + 1, num_steps - 1):
        at_warm.append(len(compiled))

  fault.add_hook(Measure())
  train.train_and_evaluate(
      fault.toy_config(
          train__num_steps=num_steps, train__eval_every_steps=2 * every,
          train__checkpoint_every_steps=every,
          train__log_every_steps=every // 10,
      ),
      folder / 'run',
  )
  steps = np.array(sorted(memory))[2:]
  slope = np.polyfit(steps, [memory[s] for s in steps.tolist()], 1)[0] * 1000
  again = at_warm[1] - at_warm[0]
  return fault.Outcome(
      slope <= 5 and again == 0,
      f'{slope:+.2f} MB in 1000 steps of {num_steps:,}, with saves and'
      f' evaluations; {again} programs compiled after warm-up',
      {'slope': float(slope), 'mb': memory, 'recompiled': again},
  )


FAULTS = {
    'F8': fault.Fault('no network', 'quick start runs', _no_network),
    'F9': fault.Fault(
        'every module hidden that setup.py does not bring',
        'import, train, evaluate; optional features name what they need',
        _only_declared,
    ),
    'F10': fault.Fault(
        '10,000 steps', '<= 5 MB in 1000 steps, 0 recompilations', _long_run,
    ),
}
