"""Faults of configs and commands."""

import json
import os
import pathlib
import random
import re
import time

from experiments.fault_suite import fault
from fsq_jax import configuration
from fsq_jax import report
from fsq_jax import train
from fsq_jax.configuration import loading
from fsq_jax.configuration import rules

# Any text may be valid there, or any expression or class.
_ANYTHING = re.compile(
    r'data\.(name|data_dir|train_split|eval_split)|eval\.networks\..*'
    r'|.*\.(architecture|checkpoint|latent_statistics|compilation_cache)'
    r'|train\.init_from|optim\.frozen|tokens\.(tokenizer|train|eval)'
    r'|sample\.classes'
)
# A config of each kind that trains without other files.
_KINDS = ('configs/debug.py', 'configs/cifar10_maskgit.py')
_UNBOUNDED = (rules.NUMBER, rules.TEXT)

# Runs launch.py with each line of arguments in a forked process, with imports
# done: prints the exit code, whether a device was used, seconds and the output.
_REFUSE_ALL = """if True:
  import contextlib, io, json, os, sys, time
  import launch
  from absl import flags
  from fsq_jax import models, quantizers
  from jax._src import xla_bridge
  for line in sys.stdin:
    read, write = os.pipe()
    if not os.fork():
      started, said = time.perf_counter(), io.StringIO()
      with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
          code = launch.main(launch.parse_flags(json.loads(line)))
        except SystemExit as left:
          code = left.code
        except BaseException as error:
          code = repr(error)
      row = [code, bool(xla_bridge._backends),
             time.perf_counter() - started, said.getvalue()]
      os.write(write, json.dumps(row).encode() + b'\\n')
      os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
      print(file.read().strip() or 'null', flush=True)
    os.wait()
"""


def _typo(name: str, rng: random.Random) -> str:
  """Misspells the last part of a dotted name by one letter."""
  section, dot, key = name.rpartition('.')
  at = rng.randrange(1, len(key)) if len(key) > 1 else 0
  kinds = [key[:at] + key[at] + key[at:]]
  if len(key) > 3:
    kinds.append(key[:at] + key[at + 1 :])
    if key[at - 1] != key[at]:
      kinds.append(key[: at - 1] + key[at] + key[at - 1] + key[at + 1 :])
  return section + dot + rng.choice(kinds)


def _mutations(path: str, num: int) -> list[tuple[list[str], str, str]]:
  """Returns arguments, required parts of the message, and their kind."""
  rng = random.Random(0)
  config = configuration.load_config(fault.ROOT / path)
  fields = loading.fields_of(config)
  wrong = {
      bool: ('maybe', '2', '-1'),
      int: ('-7', '1.5', 'many', 'nan', '1e12', ''),
      float: ('nan', 'inf', '-0.5', 'x', '1e300', ''),
      tuple: ('x', '(-1,-1,-1)', '(nan,1)', '('),
      str: ('no such name',),
      type(None): ('nan', 'inf', 'x'),
  }
  made = []
  names = list(fields)
  while len(made) < num:
    name = rng.choice(names)
    if rng.random() < 0.4:
      typo = _typo(name, rng)
      if typo not in fields:
        arguments = [f'--config={path}', f'--config.{typo}=1']
        made.append((arguments, f'nearest: {name}', 'typo'))
      continue
    # Constructors check these: of a quantizer only if it is chosen, of parts of
    # generators after a device is found.
    if fields[name].rule in _UNBOUNDED:
      continue
    value = config
    for key in name.split('.'):
      value = value[key]
    if _ANYTHING.fullmatch(name):
      continue
    text = rng.choice(wrong[type(value)])
    arguments = [f'--config={path}', f'--config.{name}={text}']
    made.append((arguments, name, 'value'))
  return made


def _overrides(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  num = 20 if quick else 120
  mutations = [x for path in _KINDS for x in _mutations(path, num)]
  lines = '\n'.join(
      json.dumps(['launch.py', *arguments]) for arguments, _, _ in mutations
  )
  done = fault.run_python(_REFUSE_ALL, timeout=900, input=lines)
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  bad = []
  for (arguments, expected, _), row in zip(mutations, rows, strict=True):
    if row is None or row[0] != 2 or row[1] or expected not in row[3]:
      bad.append([arguments, row])
  cold = []
  for arguments, _, _ in mutations[:: len(mutations) // 10]:
    started = time.monotonic()
    fault.launch(*arguments)
    cold.append(time.monotonic() - started)
  num_typos = sum(kind == 'typo' for _, _, kind in mutations)
  median = sorted(cold)[len(cold) // 2]
  return fault.Outcome(
      not bad and max(cold) < 3,
      f'{len(mutations) - len(bad)} of {len(mutations)} ({num_typos} typos)'
      ' refused by name with code 2, before a device; a command takes'
      f' {median:.1f} s (at most {max(cold):.1f} s)'
      + (f'; not: {bad[:3]}' if bad else ''),
      {'mutations': len(mutations), 'bad': bad, 'seconds': cold},
  )


def _every_config(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  ran, failed, others = [], [], []
  for path in sorted((fault.ROOT / 'configs').glob('*.py')):
    if path.stem in ('default', 'default_generator'):
      continue
    config = configuration.load_config(path)
    if (
        configuration.is_generator(config)
        or config.model.encoder.name != 'vit'
    ):
      others.append(path.stem)
      continue
    if quick and ran:
      continue
    config.data.source = 'synthetic'
    config.data.batch_size = config.data.eval_batch_size = 16
    config.optim.accumulation_steps = 1
    config.optim.warmup_steps = 1
    config.train.num_steps = 2
    config.train.compilation_cache = ''
    # Takes longer than the steps.
    report.write_report = lambda *_: None
    state = train.train_and_evaluate(config, folder / path.stem)
    good = int(state.step) == 2 and fault.all_finite(state)
    (ran if good else failed).append(path.stem)
  done = fault.run_python(
      'import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))',
      '-n', '0', '-q', '-p', 'no:cacheprovider', '-m', '',
      'tests/configuration/configs_test.py',
      'tests/generators/configs_test.py',
      '-k', 'reduced and siglip_l' if quick else 'reduced', timeout=3300,
      env={**os.environ, 'FSQ_JAX_ALL_CONFIGS': '' if quick else '1'},
  )
  counts = re.search(r'(\d+) passed', done.stdout)
  passed = int(counts[1]) if counts else 0
  return fault.Outcome(
      not failed and not done.returncode and (quick or passed == len(others)),
      f'{len(ran)} of {len(ran) + len(failed)} configs as they are, {passed} of'
      f' {len(others)} with large networks or on tokens reduced, ran 2 steps',
      {'ran': ran, 'failed': failed, 'reduced': others, 'passed': passed},
  )


def _commands(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  debug = '--config=configs/debug.py'
  (folder / 'file').write_text('x')
  (folder / 'broken.py').write_text('def get_config(:')
  (folder / 'fails.py').write_text('def get_config(): return 1 / 0')
  (folder / 'empty').mkdir()
  cases = [
      (('--help',), 0, '--workdir'),
      ((), 2, '--config is missing'),
      (('--config=none.py',), 2, 'none.py'),
      (('train',), 2, 'config'),
      ((debug, '--mode=serve'), 2, 'serve'),
      ((debug, '--nonsense'), 2, 'nonsense'),
      ((debug, f'--workdir={folder / "file"}'), 2, 'is a file'),
      ((f'--config={folder / "broken.py"}',), 2, 'SyntaxError'),
      ((f'--config={folder / "fails.py"}',), 2, 'ZeroDivisionError'),
      (('--mode=eval', f'--workdir={folder / "empty"}'), 2, 'config.json'),
      ((debug, '--mode=eval', f'--workdir={folder / "empty"}'), 2, 'no check'),
      (
          (debug, '--config.data.source=folder',
           f'--config.data.data_dir={folder}', '--config.data.train_split=x'),
          2, "'empty'",
      ),
      (
          (debug, '--config.losses.perceptual.name=lpips_vgg16',
           f'--config.losses.perceptual.checkpoint={folder / "none"}',
           f'--workdir={folder / "run"}'),
          2, str(folder / 'none'),
      ),
      (
          (debug, '--config.train.init_from=/nowhere',
           f'--workdir={folder / "run"}'),
          2, '/nowhere',
      ),
  ]
  bad = []
  for arguments, code, message in (cases := cases[:6] if quick else cases):
    done = fault.launch(*arguments)
    text = done.stderr + done.stdout
    if done.returncode != code or message not in text or 'Traceback' in text:
      bad.append([list(arguments), done.returncode, text[-300:]])
  done = fault.launch('--config=none.py', '--debug')
  traced = done.returncode == 2 and 'Traceback' in done.stderr
  return fault.Outcome(
      not bad and traced,
      f'{len(cases) - len(bad)} of {len(cases)} with the right code and'
      ' message, a traceback with --debug alone'
      + (f'; not: {bad}' if bad else ''),
      {'cases': len(cases), 'bad': bad},
  )


FAULTS = {
    'F1': fault.Fault(
        '240 overrides: typos, other types, NaN, negative numbers',
        '100 % refused before a device, nearest key for typos, < 3 s',
        _overrides,
    ),
    'F2': fault.Fault(
        '2 steps of every config', '100 % run', _every_config,
        limit_seconds=3600,
    ),
    'F7': fault.Fault(
        '--help, unknown flags and modes, missing and broken files',
        'exit code and message, traceback with --debug alone', _commands,
    ),
}
