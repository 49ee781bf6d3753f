"""Tests of the command line: exit codes and messages of what it refuses."""

import pathlib
import subprocess
import sys

import pytest

from fsq_jax import configuration

_ROOT = pathlib.Path(__file__).parents[1]
_DEBUG = '--config=configs/debug.py'

# Runs launch.py with stubs, which print their arguments, for what it calls: the
# modes, and the quantizers that would import JAX.
_STUBS = """
import runpy, sys, types
import fsq_jax
import fsq_jax.analysis, fsq_jax.configuration, fsq_jax.evaluation
import fsq_jax.runtime

class Preempted(Exception):
  step = 5

class RunError(Exception):
  pass

def train_and_evaluate(config, workdir, *, allow_config_change):
  if config.seed == 13:
    raise Preempted()
  if config.seed == 14:
    fsq_jax.configuration.config_from_json('none')
  if config.seed == 15:
    raise ValueError('raised in a library')
  if config.seed == 16:
    raise RunError('the disk is full')
  if config.seed == 17:
    code = compile("raise RuntimeError('not now')", fsq_jax.__file__, 'exec')
    exec(code)
  print('train', config.train.num_steps, workdir, allow_config_change)

fsq_jax.train = types.SimpleNamespace(
    train_and_evaluate=train_and_evaluate,
    Preempted=Preempted,
    RunError=RunError,
)
def join_processes(*args):
  print('join', *args)

fsq_jax.runtime.processes = types.SimpleNamespace(join_processes=join_processes)
fsq_jax.runtime.host = types.SimpleNamespace(keep_freed_memory=lambda: None)
def evaluate_workdir(config, workdir, *, which, output, show):
  print('eval', config.seed, workdir, which, output)
  show(['psnr: 27.5'])

def analyze_workdir(config, workdir, *, which, output):
  print('report', config.seed, workdir, which, output)
  return f'{workdir}/report.html'

fsq_jax.analysis.codebook = types.SimpleNamespace(
    analyze_workdir=analyze_workdir
)
fsq_jax.evaluation.saved_run = types.SimpleNamespace(
    evaluate_workdir=evaluate_workdir
)
def export_workdir(config, workdir, folder, *, which):
  print('export', config.seed, workdir, folder, which)
  return 'written'

sys.modules['fsq_jax.tokenizer'] = types.SimpleNamespace(
    export=types.SimpleNamespace(export_workdir=export_workdir)
)
fsq_jax.data = types.SimpleNamespace(
    prepare=lambda config: print('prepare', config.source)
)
class Interrupted(Exception):
  pass

def tokenize_workdir(config, workdir, *, which, folder, verify_images):
  if config.seed == 13:
    raise Interrupted()
  verify = ['verify'] if verify_images else []
  print('tokenize', config.seed, workdir, which, folder, *verify)

fsq_jax.tokens = types.SimpleNamespace(
    Interrupted=Interrupted,
    default_folder=lambda config, workdir: f'{workdir}/tokens/x',
    describe=lambda manifest: ['usage: 90%'],
    detokenize_workdir=lambda *folders, which: print('make', *folders, which),
    is_complete=lambda folder: folder == 'complete',
    tokenize_workdir=tokenize_workdir,
)
fsq_jax.quantizers = types.SimpleNamespace(build_quantizer=lambda config: None)
fsq_jax.models = types.SimpleNamespace(build_autoencoder=lambda *parts: None)
sys.argv = sys.argv[1:]
sys.path.insert(0, '.')
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def _launch(*args, stubs=False, cwd=_ROOT):
  """Runs launch.py, with `_STUBS` or with others."""
  program = ['-c', _STUBS if stubs is True else stubs] if stubs else []
  launch = 'launch.py' if program else str(_ROOT / 'launch.py')
  return subprocess.run(
      [sys.executable, *program, launch, *args],
      cwd=cwd,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
  )


@pytest.mark.parametrize(
    ('args', 'messages'),
    [
        ([], ['--config is missing', 'configs/debug.py', 'configs/fsq_888.py']),
        (['--config=none.py'], ['none.py is not a file', 'configs/debug.py']),
        (['--mode=eval', '--workdir=none'], ['none holds no config.json']),
        ([_DEBUG, '--mode=tain'], ['--mode=tain', 'train|eval|report']),
        (
            [_DEBUG, '--wrokdir=x'],
            ['--wrokdir is not a flag; did you mean --workdir=x?', '--help'],
        ),
        ([_DEBUG, 'configs/fsq_888.py'], ['--config=PATH']),
        (
            [_DEBUG, '--config.data.batchsize=8', '--config.model.widht=8'],
            [
                'data.batchsize is not a field of a config; nearest:'
                ' data.batch_size,',
                'model.widht is not a field',
            ],
        ),
        ([_DEBUG, '--config.data={}'], ['data is not a field']),
        (
            ['--config=configs/vqrae_fsq_siglip_l.py'],
            ['model.encoder.checkpoint is None; allowed: a path',
             'set --config.model.encoder.checkpoint'],
        ),
        (
            ['--config=configs/vqrae_fsq_siglip_l_stage2.py'],
            ['train.init_from is None; allowed: the workdir of stage 1',
             'set --config.train.init_from'],
        ),
        (
            [_DEBUG, '--config.train.num_steps=1.5'],
            ["--config.train.num_steps=1.5: '1.5' is not an integer"],
        ),
        (
            [_DEBUG, '--config.train.num_steps=many'],
            ["--config.train.num_steps=many: 'many' is not an integer"],
        ),
        (
            [_DEBUG, '--config.data.flip=yes'],
            ["--config.data.flip=yes: 'yes' is not a boolean; allowed: True or"
             ' False.'],
        ),
        (
            [_DEBUG, '--config.optim.b1=x'],
            ["--config.optim.b1=x: 'x' is not a number; allowed: a finite"
             ' number in [0, 1).'],
        ),
        ([_DEBUG, '--config.optim.b1=None'], ['optim.b1 is None; allowed: a']),
        (
            [_DEBUG, '--batch_size=8'],
            ['--batch_size is not a flag; did you mean'
             ' --config.data.batch_size=8? See --help.'],
        ),
        (
            [_DEBUG, '--data.batch_size', '8'],
            ['did you mean --config.data.batch_size?'],
        ),
        ([_DEBUG, '--config.batch_size=8'], ['nearest: data.batch_size.']),
        (
            [
                _DEBUG,
                '--config.optim.learning_rate=nan',
                '--config.data.batch_size=-8',
                '--config.model.quantizer.residual_fsq.levels=8,1',
                '--config.model.quantizer.fsq.eps=inf',
                '--config.losses.reconstruction=l3',
            ],
            [
                'optim.learning_rate is nan; allowed: a finite number > 0',
                'data.batch_size is -8; allowed: an integer from 1',
                'model.quantizer.residual_fsq.levels has 1;',
                'model.quantizer.fsq.eps is inf',
                "losses.reconstruction is 'l3'; allowed: one of ['l1', 'l2']",
            ],
        ),
    ],
)
def test_bad_input_is_refused_with_a_message(args, messages):
  result = _launch(*args)
  assert result.returncode == 2
  assert result.stdout == ''
  assert 'Traceback' not in result.stderr
  for message in messages:
    assert message in result.stderr


@pytest.mark.parametrize(
    ('field', 'value', 'example'),
    [
        ('model.quantizer.fsq.levels', '512', "'(8,8,8)'"),
        ('model.quantizer.fsq.levels', '8 6 5', "'(8,6,5)'"),
        ('model.quantizer.fsq.levels', '8x6x5', "'(8,6,5)'"),
        ('model.quantizer.residual_fsq.levels', '8', "'(8,8,8)'"),
        ('model.quantizer.fsq.levels', '{8: 1}', "'(8,8,8)'"),
        ('model.quantizer.fsq.levels', 'None', "'(8,8,8)'"),
        ('model.quantizer.fsq.levels', '', "'(8,8,8)'"),
        ('data.image_size', '32', "'(16,16)'"),
        ('data.image_size', '32x64', "'(32,64)'"),
        ('data.crop_scale', '0.5', "'(1.0,1.0)'"),
        ('model.encoder.conv.channel_multipliers', '2', "'(1,1,2,2,4)'"),
        ('discriminator.dino.blocks', '3', "'(2,5,8,11)'"),
        ('optim.frozen', 'encoder/.*', '"(\'encoder/.*\',)"'),
        ('train.profile_steps', '5', "'(A,B)'"),
        ('partitioning.rules', 'fsdp', '"((\'blocks/'),
    ],
)
def test_a_single_value_is_no_tuple(field, value, example):
  result = _launch(_DEBUG, f'--config.{field}={value}')
  assert result.returncode == 2
  assert f'{value!r} is not a tuple; allowed: ' in result.stderr
  assert f' --config.{field}={example}' in result.stderr


def test_debug_adds_the_traceback():
  result = _launch(_DEBUG, '--config.seed=-1', '--debug')
  assert result.returncode == 2
  assert 'Traceback' in result.stderr
  assert 'seed is -1; allowed' in result.stderr


def test_help_lists_flags_and_exit_codes():
  result = _launch('--help')
  assert result.returncode == 0
  for text in ('--workdir', '--mode', '--[no]allow_config_change', '75'):
    assert text in result.stdout


def test_unknown_field_is_refused_without_jax():
  code = (
      'import runpy, sys; sys.path.insert(0, ".")\n'
      'try: runpy.run_path("launch.py", run_name="__main__")\n'
      'finally: print("jax" in sys.modules)'
  )
  result = subprocess.run(
      [sys.executable, '-c', code, _DEBUG, '--config.sed=3'],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
  )
  assert result.returncode == 2
  assert result.stdout == 'False\n'


@pytest.mark.parametrize(
    ('args', 'call'),
    [
        (['--config.train.num_steps=1e3'], 'train 1000 runs/debug False'),
        (['--config.train.num_steps', '9'], 'train 9 runs/debug False'),
        (
            ['--workdir=/tmp/x y', '--allow_config_change'],
            'train 8 /tmp/x y True',
        ),
        (
            ['--mode=eval', '--config.seed=0x10', '--checkpoint=best'],
            'eval 16 runs/debug best None\npsnr: 27.5',
        ),
        (
            ['--mode=report', '--config.seed=3', '--checkpoint=5'],
            'report 3 runs/debug 5 None\nruns/debug/report.html',
        ),
        (['--mode=prepare'], 'prepare synthetic'),
        (
            ['--mode=tokenize', '--checkpoint=best'],
            'tokenize 0 runs/debug best runs/debug/tokens/x\n'
            'runs/debug/tokens/x\nusage: 90%',
        ),
        (
            ['--mode=tokenize', '--tokens=t'],
            'tokenize 0 runs/debug newest t\nt\nusage: 90%',
        ),
        (
            ['--mode=tokenize', '--tokens=complete', '--verify_images'],
            'tokenize 0 runs/debug newest complete verify\ncomplete\nnothing'
            ' written: the folder is already complete\nusage: 90%',
        ),
        (
            ['--mode=detokenize'],
            'make runs/debug runs/debug/tokens/x runs/debug/tokens/x_images'
            ' newest\nruns/debug/tokens/x_images',
        ),
        (
            ['--mode=detokenize', '--tokens=t', '--images=i'],
            'make runs/debug t i newest\ni',
        ),
        (
            ['--mode=export', '--export=/tmp/x', '--checkpoint=best'],
            'export 0 runs/debug /tmp/x best\nwritten',
        ),
        (['--distributed'], 'join None None None\ntrain 8 runs/debug False'),
        (
            [
                '--coordinator_address=a:1', '--num_processes=4',
                '--process_id=3',
            ],
            'join a:1 4 3\ntrain 8 runs/debug False',
        ),
        (
            [
                '--config=configs/vqrae_fsq_siglip_l.py',
                '--config.model.encoder.checkpoint=x',
                '--config.losses.perceptual.checkpoint=x',
                '--config.discriminator.dino.checkpoint=x',
            ],
            'train 40032 runs/vqrae_fsq_siglip_l False',
        ),
    ],
)
def test_mode_is_called_with_config_and_workdir(args, call):
  result = _launch(_DEBUG, *args, stubs=True)
  assert result.returncode == 0, result.stderr
  assert result.stdout == f'{call}\n'


@pytest.mark.parametrize(
    ('values', 'levels'),
    [
        (['(8,6,5)'], (8, 6, 5)),
        (['[8, 6, 5]'], (8, 6, 5)),
        (['8,6,5'], (8, 6, 5)),
        (['(512,)'], (512,)),
        # As of any other flag, the last one.
        (['(8,8)', '(5,5)'], (5, 5)),
    ],
)
def test_a_tuple_is_taken_as_it_is_written(values, levels):
  program = _STUBS.replace(
      "print('train', config.train.num_steps",
      "print('train', config.model.quantizer.fsq.levels",
  )
  result = _launch(
      _DEBUG,
      *(f'--config.model.quantizer.fsq.levels={x}' for x in values),
      stubs=program,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout == f'train {levels} runs/debug False\n'


def test_none_is_taken_for_a_number_that_may_be_none():
  result = _launch(_DEBUG, '--config.model.quantizer.fsq.eps=None', stubs=True)
  assert result.returncode == 0, result.stderr


def test_paths_that_are_not_there_are_absolute(tmp_path):
  result = _launch(
      f'--config={_ROOT}/configs/folder_fsq_8555.py',
      '--config.data.data_dir=images',
      cwd=tmp_path,
  )
  assert result.returncode == 2
  assert f"data.data_dir is '{tmp_path}/images'; allowed" in result.stderr
  result = _launch(_DEBUG, cwd=tmp_path)
  assert result.returncode == 2
  first, *known = result.stderr.splitlines()
  assert f'{tmp_path}/configs/debug.py is not a file' in first
  assert f'Did you mean --config={_ROOT}/configs/debug.py?' in first
  assert {line.strip() for line in known} == {
      str(path) for path in _ROOT.glob('configs/*.py')
  }
  result = _launch('--mode=export', '--workdir=x', cwd=tmp_path)
  assert result.returncode == 2
  assert f'{tmp_path}/x/config.json is not a file' in result.stderr


@pytest.mark.parametrize(
    ('seed', 'code', 'message'),
    [
        (13, 75, 'step 5 is saved'),
        (14, 2, 'The saved config is not JSON'),
        (15, 1, 'raised in a library'),
        (16, 1, 'launch.py: the disk is full'),
        (17, 1, 'launch.py: not now'),
    ],
)
def test_exit_code_tells_how_training_ended(seed, code, message):
  result = _launch(_DEBUG, f'--config.seed={seed}', stubs=True)
  assert result.returncode == code
  assert message in result.stderr
  assert ('Traceback' in result.stderr) == (seed == 15)


def test_tokenizing_that_is_stopped_can_be_resumed():
  result = _launch(
      _DEBUG, '--mode=tokenize', '--config.seed=13', stubs=True
  )
  assert result.returncode == 75
  assert 'Run the same command again' in result.stderr


def test_modes_find_the_config_in_the_workdir(tmp_path):
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.seed = 3
  text = configuration.config_to_json(config)
  (tmp_path / 'config.json').write_text(text)
  args = ['--mode=eval', f'--workdir={tmp_path}']
  result = _launch(*args, stubs=True)
  assert result.stdout == f'eval 3 {tmp_path} newest None\npsnr: 27.5\n'
  report = ['--mode=report', f'--workdir={tmp_path}']
  result = _launch(*report, stubs=True)
  assert result.stdout.startswith(f'report 3 {tmp_path} newest None\n')
  export = ['--mode=export', f'--workdir={tmp_path}']
  result = _launch(*export, stubs=True)
  assert result.stdout == f'export 3 {tmp_path} None newest\nwritten\n'
  result = _launch(*args, '--config.seed=4', stubs=True)
  assert result.stdout == f'eval 4 {tmp_path} newest None\npsnr: 27.5\n'
  result = _launch(*args, '--config.sed=4', stubs=True)
  assert result.returncode == 2
  assert 'sed is not a field' in result.stderr
