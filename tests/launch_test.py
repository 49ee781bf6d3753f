"""Tests of the command line: modes, overrides, exit codes, messages."""

import pathlib
import subprocess
import sys
import warnings

from absl import logging
from absl.testing import flagsaver
import pytest

import fsq_jax
from fsq_jax import configuration
from fsq_jax import tokens
from fsq_jax import train
from fsq_jax.analysis import codebook
from fsq_jax.analysis import reconstruction
from fsq_jax.data import builder
from fsq_jax.evaluation import saved_run
from fsq_jax.runtime import host
from fsq_jax.runtime import processes
from fsq_jax.tokenizer import export
from fsq_jax.tokens import detokenization
from fsq_jax.tokens import summary
from fsq_jax.tokens import tokenization
from fsq_jax.train import autoencoder
import launch

_ROOT = pathlib.Path(__file__).parents[1]
_DEBUG = f'--config={_ROOT}/configs/debug.py'


def _show(*values):
  sys.stdout.write(' '.join(map(str, values)) + '\n')


@pytest.fixture
def run(capsys, monkeypatch):
  """Runs launch.main with stubs, which print their arguments, for the modes.

  It returns exit code, standard output and standard error.
  """
  ours = 'exec(compile("raise error", fsq_jax.__file__, "exec"))'

  def train_and_evaluate(config, workdir, *, allow_config_change):
    if config.seed == 13:
      raise train.Preempted(5)
    if config.seed == 14:
      configuration.config_from_json('none')
    if config.seed == 15:
      raise ValueError('raised in a library')
    if config.seed in (16, 17):
      error = {16: train.RunError('disk full'), 17: RuntimeError('not now')}
      exec(ours, {'fsq_jax': fsq_jax, 'error': error[config.seed]})
    _show(
        'train', config.train.num_steps, config.model.quantizer.fsq.levels,
        workdir, allow_config_change,
    )

  def evaluate_workdir(config, workdir, *, which, output, images, npz, show):
    paths = filter(None, [images, npz])
    _show('eval', config.seed, workdir, which, output, *paths)
    show(['psnr: 27.5'])

  def analyze_workdir(config, workdir, *, which, output):
    _show('report', config.seed, workdir, which, output)
    return f'{workdir}/report.html'

  def reconstruct_files(workdir, images_in, images, *, which, tiles, config):
    _show('reconstruct', config.seed, workdir, images_in, images, which, tiles)
    return ['psnr']

  def prepare(config):
    _show('prepare', config.source)
    lines = ['/data', '3 files']
    return {'': None, 'one': '/data', 'lines': lines}[config.name]

  def export_workdir(config, workdir, folder, *, which):
    _show('export', config.seed, workdir, folder, which)
    return 'written'

  def tokenize_workdir(config, workdir, *, which, folder, verify_images):
    if config.seed == 13:
      raise tokens.Interrupted
    verify = ['verify'] if verify_images else []
    _show('tokenize', config.seed, workdir, which, folder, *verify)

  stubs = {
      autoencoder: {'train_and_evaluate': train_and_evaluate},
      saved_run: {'evaluate_workdir': evaluate_workdir},
      codebook: {'analyze_workdir': analyze_workdir},
      reconstruction: {'reconstruct_files': reconstruct_files},
      export: {'export_workdir': export_workdir},
      builder: {'prepare': prepare},
      host: {'keep_freed_memory': lambda: None},
      processes: {'join_processes': lambda *args: _show('join', *args)},
      tokenization: {
          'default_folder': lambda config, workdir: f'{workdir}/tokens/x',
          'is_complete': lambda folder: folder == 'complete',
          'tokenize_workdir': tokenize_workdir,
      },
      detokenization: {
          'detokenize_workdir': (
              lambda *folders, which, config: _show(
                  'make', config.seed, *folders, which
              )
          ),
      },
      summary: {'describe': lambda manifest: ['usage: 90%']},
  }
  for module, functions in stubs.items():
    for name, function in functions.items():
      monkeypatch.setattr(module, name, function)
  monkeypatch.chdir(_ROOT)

  def run(*args):
    with flagsaver.flagsaver():
      try:
        code = launch.main(launch.parse_flags(['launch.py', *args]))
      except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()

  return run


_BAD_INPUT = (
    ([], ['--config is missing', 'configs/debug.py', 'configs/fsq_888.py']),
    (['--config=none.py'], ['none.py is not a file', 'configs/debug.py']),
    (['--mode=eval', '--workdir=none'], ['none has no config.json']),
    *(
        (
            [_DEBUG, f'--{flag}=s3://bucket/x'],
            [f'--{flag} is s3://bucket/x: URLs of s3:// are not supported'],
        )
        for flag in (
            'workdir', 'tokens', 'images', 'images_in', 'npz', 'export',
            'output',
        )
    ),
    (
        [_DEBUG, '--config.data.data_dir=gs://bucket/x'],
        ['data.data_dir is gs://bucket/x: URLs of gs:// are not supported'],
    ),
    ([_DEBUG, '--mode=tain'], ['--mode=tain', 'train|eval|report']),
    (
        [_DEBUG, '--npz=x.npz'],
        ['--npz has no effect with --mode=train, only with --mode=eval or'
         ' generate; leave it out.'],
    ),
    (
        [_DEBUG, '--mode=prepare', '--checkpoint=best'],
        ['--checkpoint has no effect with --mode=prepare'],
    ),
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
    ([_DEBUG, '--noconfig.seed'], ['--noconfig.seed is not a flag']),
    (
        [_DEBUG, '--config.seed'],
        ['Missing value for flag --config.seed. See --help'],
    ),
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
            'model.quantizer.residual_fsq.levels[1] is 1;',
            'model.quantizer.fsq.eps is inf',
            "losses.reconstruction is 'l3'; allowed: one of ['l1', 'l2']",
        ],
    ),
)


def test_bad_input_is_refused_with_a_message(run):
  failures = []
  for args, messages in _BAD_INPUT:
    code, out, err = run(*args)
    missing = [message for message in messages if message not in err]
    if code != 2 or out or missing or 'Traceback' in err:
      failures.append((args, code, out, missing, err))
  assert not failures


# Field, value, the example that the message gives.
_NO_TUPLES = (
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
)


def test_a_single_value_is_no_tuple(run):
  failures = []
  for field, value, example in _NO_TUPLES:
    code, _, err = run(_DEBUG, f'--config.{field}={value}')
    if (
        code != 2
        or f'{value!r} is not a tuple; allowed: ' not in err
        or f' --config.{field}={example}' not in err
    ):
      failures.append((field, value, code, err))
  assert not failures


def test_debug_adds_the_traceback(run):
  code, _, err = run(_DEBUG, '--config.seed=-1', '--debug')
  assert code == 2
  assert 'Traceback' in err
  assert 'seed is -1; allowed' in err


_TRAINED = 'train 8 (8, 8, 8) runs/debug False'
_CALLS = (
    (['--config.train.num_steps=1e3'], _TRAINED.replace(' 8 ', ' 1000 ')),
    (['--config.train.num_steps', '9'], _TRAINED.replace(' 8 ', ' 9 ')),
    # A repeated flag has its last value, as any other.
    (['--config.seed=13', '--config.seed=1'], _TRAINED),
    (['--config.model.quantizer.fsq.eps=None'], _TRAINED),
    (['--config.data.flip', '--noconfig.data.flip'], _TRAINED),
    (
        ['--workdir=/tmp/x y', '--allow_config_change'],
        'train 8 (8, 8, 8) /tmp/x y True',
    ),
    (
        ['--mode=eval', '--config.seed=0x10', '--checkpoint=best'],
        'eval 16 runs/debug best None\npsnr: 27.5',
    ),
    (
        ['--mode=eval', '--images=i'],
        'eval 0 runs/debug newest None i\npsnr: 27.5',
    ),
    (
        ['--mode=eval', '--images=i', '--npz=x.npz'],
        'eval 0 runs/debug newest None i x.npz\npsnr: 27.5',
    ),
    (
        ['--mode=reconstruct', '--images_in=in', '--images=i'],
        'reconstruct 0 runs/debug in i newest disjoint\npsnr',
    ),
    (
        ['--mode=reconstruct', '--tiles=overlapping', '--checkpoint=8',
         '--config.seed=3'],
        'reconstruct 3 runs/debug None None 8 overlapping\npsnr',
    ),
    (
        ['--mode=report', '--config.seed=3', '--checkpoint=5'],
        'report 3 runs/debug 5 None\nruns/debug/report.html',
    ),
    (['--mode=prepare'], 'prepare synthetic'),
    (
        ['--mode=prepare', '--config.data.name=one'],
        'prepare synthetic\n/data',
    ),
    (
        ['--mode=prepare', '--config.data.name=lines'],
        'prepare synthetic\n/data\n3 files',
    ),
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
        'make 0 runs/debug runs/debug/tokens/x runs/debug/tokens/x_images'
        ' newest\nruns/debug/tokens/x_images',
    ),
    (
        ['--mode=detokenize', '--tokens=t', '--images=i', '--config.seed=3'],
        'make 3 runs/debug t i newest\ni',
    ),
    (
        ['--mode=export', '--export=/tmp/x', '--checkpoint=best'],
        'export 0 runs/debug /tmp/x best\nwritten',
    ),
    (['--distributed'], f'join None None None\n{_TRAINED}'),
    (
        ['--coordinator_address=a:1', '--num_processes=4', '--process_id=3'],
        f'join a:1 4 3\n{_TRAINED}',
    ),
    (
        [
            '--config=configs/vqrae_fsq_siglip_l.py',
            '--config.model.encoder.checkpoint=x',
            '--config.losses.perceptual.checkpoint=x',
            '--config.discriminator.dino.checkpoint=x',
        ],
        'train 40032 (8, 8, 8, 8, 4) runs/vqrae_fsq_siglip_l False',
    ),
    *(
        ([f'--config.model.quantizer.fsq.levels={x}' for x in values],
         _TRAINED.replace('(8, 8, 8)', levels))
        for values, levels in (
            (['(8,6,5)'], '(8, 6, 5)'),
            (['[8, 6, 5]'], '(8, 6, 5)'),
            (['8,6,5'], '(8, 6, 5)'),
            (['(512,)'], '(512,)'),
            (['(8,8)', '(5,5)'], '(5, 5)'),
        )
    ),
)  # fmt: skip


def test_a_mode_is_called_with_config_and_workdir(run):
  failures = []
  for args, call in _CALLS:
    result = run(_DEBUG, *args)
    if result[:2] != (0, f'{call}\n'):
      failures.append((args, result))
  assert not failures


def test_paths_that_are_not_there_are_absolute(run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, _, err = run(
      f'--config={_ROOT}/configs/folder_fsq_8555.py',
      '--config.data.data_dir=images',
  )
  assert code == 2
  assert f"data.data_dir is '{tmp_path}/images'; allowed" in err
  code, _, err = run('--mode=export', '--workdir=x')
  assert code == 2
  assert f'{tmp_path}/x/config.json is not a file' in err


@pytest.mark.parametrize(
    ('args', 'code', 'message'),
    [
        (['--config.seed=13'], 75, 'step 5 is saved. Run the same command'),
        (['--config.seed=14'], 2, 'The saved config is not JSON'),
        (['--config.seed=16'], 1, 'launch.py: disk full'),
        (['--config.seed=17'], 1, 'launch.py: not now'),
        (
            ['--mode=tokenize', '--config.seed=13'], 75,
            'Interrupted. Run the same command again to continue.',
        ),
    ],
)
def test_the_exit_code_tells_how_a_mode_ended(run, args, code, message):
  actual, out, err = run(_DEBUG, *args)
  assert (actual, out) == (code, '')
  assert message in err
  assert 'Traceback' not in err


@pytest.mark.parametrize('code', [0, 1, 2, 75])
def test_nothing_is_logged_after_the_message_of_a_failure(code, monkeypatch):
  # Threads of Orbax log errors as the interpreter shuts down.
  monkeypatch.setattr(launch, 'main', lambda argv: code)
  monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
  verbosity = logging.get_verbosity()
  try:
    with warnings.catch_warnings():
      assert launch.run_main([]) == code
    assert (logging.get_verbosity() == logging.FATAL) == (code in (1, 2))
  finally:
    logging.set_verbosity(verbosity)


def test_errors_of_libraries_keep_their_traceback(run):
  with pytest.raises(ValueError, match='raised in a library'):
    run(_DEBUG, '--config.seed=15')


def test_modes_find_the_config_in_the_workdir(run, tmp_path):
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.seed = 3
  text = configuration.config_to_json(config)
  (tmp_path / 'config.json').write_text(text)
  workdir = f'--workdir={tmp_path}'
  calls = {
      'eval': f'eval 3 {tmp_path} newest None\npsnr: 27.5\n',
      'report': f'report 3 {tmp_path} newest None\n{tmp_path}/report.html\n',
      'export': f'export 3 {tmp_path} None newest\nwritten\n',
  }
  for mode, call in calls.items():
    assert run(f'--mode={mode}', workdir)[:2] == (0, call)
  code, out, _ = run('--mode=eval', workdir, '--config.seed=4')
  assert (code, out) == (0, calls['eval'].replace(' 3 ', ' 4 '))
  code, _, err = run('--mode=eval', workdir, '--config.sed=4')
  assert code == 2
  assert 'sed is not a field' in err
  # Training needs the config itself.
  code, _, err = run(workdir)
  assert code == 2
  assert '--config is missing' in err


def _start(*args, cwd=_ROOT):
  """Runs launch.py as a program; its output ends with whether it loads JAX."""
  code = (
      'import runpy, sys; sys.argv = sys.argv[1:]\n'
      f'sys.path.insert(0, {str(_ROOT)!r})\n'
      'try: runpy.run_path(sys.argv[0], run_name="__main__")\n'
      'finally: print("jax" in sys.modules)'
  )
  return subprocess.run(
      [sys.executable, '-c', code, str(_ROOT / 'launch.py'), *args],
      cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
  )  # fmt: skip


def test_help_lists_flags_and_exit_codes_without_jax():
  result = _start('--help')
  assert result.returncode == 0
  for text in ('--workdir', '--mode', '--[no]allow_config_change', '75'):
    assert text in result.stdout
  assert result.stdout.endswith('False\n')


def test_an_unknown_field_is_refused_without_jax():
  result = _start(_DEBUG, '--config.sed=3')
  assert result.returncode == 2
  assert result.stdout == 'False\n'
  assert 'sed is not a field' in result.stderr
  assert 'Traceback' not in result.stderr


def test_configs_are_suggested_from_any_folder(tmp_path):
  result = _start('--config=configs/debug.py', cwd=tmp_path)
  assert result.returncode == 2
  first, *known = result.stderr.splitlines()
  assert f'{tmp_path}/configs/debug.py is not a file' in first
  assert f'Did you mean --config={_ROOT}/configs/debug.py?' in first
  assert {line.strip() for line in known} == {
      str(path) for path in _ROOT.glob('configs/*.py')
  }
