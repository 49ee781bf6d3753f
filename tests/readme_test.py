"""The documents: their Python runs, their commands start, their links exist."""

import ast
import functools
import json
import operator
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from absl.testing import flagsaver
import jax
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import tokens
from fsq_jax.configuration import command_line
from fsq_jax.configuration import generator_schema
from fsq_jax.configuration import loading
from fsq_jax.configuration import schema
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
import launch

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / 'README.md'
# The README comes first: the other documents use the runs that it trains.
DOCUMENTS = [
    README,
    ROOT / 'configs' / 'README.md',
    *sorted((ROOT / 'fsq_jax').rglob('README.md')),
    *sorted((ROOT / 'experiments').rglob('README.md')),
    *sorted((ROOT / '.github').rglob('*.md')),
]
GUIDES = [x for x in DOCUMENTS if 'experiments' not in x.parts]
MODES = launch.flags.FLAGS['mode'].parser.enum_values
# In a command, or Python, that cannot run as it is printed.
PLACEHOLDER = '/path/to/'


@functools.cache
def _text(path):
  return path.read_text(encoding='utf-8')


def _blocks(path, language):
  return re.findall(rf'```{language}\n(.*?)```', _text(path), re.DOTALL)


def _commands(path):
  """Commands of a document's shell blocks, each in one line."""
  return [
      command.strip()
      for block in _blocks(path, 'bash')
      for line in block.replace('\\\n', ' ').splitlines()
      for command in re.split('&&|  # ', line)
      if command.strip()
  ]


def _launches(path):
  """Commands of launch.py, and of files that hand it their arguments."""
  commands = (
      re.sub(r'.*experiments/launching/\w+\.sh', 'launch.py', command)
      for command in _commands(path)
  )
  return [command for command in commands if 'launch.py' in command]


PYTHON = [
    pytest.param(
        block,
        id=f'{path.relative_to(ROOT)}-{i}',
        # A generator is trained first.
        marks=()
        if path == README and 'generators' not in block
        else pytest.mark.slow,
    )
    for path in GUIDES
    for i, block in enumerate(_blocks(path, 'python'))
]
LAUNCHES = [command for path in GUIDES for command in _launches(path)]


@pytest.mark.parametrize('block', PYTHON)
def test_python_runs(block, tmp_path, monkeypatch, capsys, digits):
  if PLACEHOLDER in block:  # Tested in tokenizer/published_test.py.
    compile(block, 'README.md', 'exec')
    return
  monkeypatch.chdir(ROOT)
  # Runs of the examples go to a temporary folder, where one is already.
  shutil.copytree(ROOT / 'tests/testdata/run', tmp_path / 'fsq_888')
  if 'runs/fsq_888/export' in block:
    (command,) = (x for x in LAUNCHES if '--mode=export' in x)
    words = shlex.split(command.replace('runs/', f'{tmp_path}/'))
    with flagsaver.flagsaver():
      assert launch.main(launch.parse_flags(words[1:])) == 0
  if (name := 'photos_train_4_views') in block:
    _write_token_files(tmp_path / 'fsq_888', name)
  if 'runs/digits_maskgit' in block:
    for run in digits().iterdir():
      shutil.copytree(run, tmp_path / run.name)
  block = block.replace("'runs/", f"'{tmp_path}/")
  for name in ('tokenizer', 'generator'):
    block = block.replace(f"'{name}'", f"'{tmp_path}/{name}'")
  capsys.readouterr()
  exec(compile(block, 'README.md', 'exec'), {'__name__': 'readme'})
  # What a document says that a line prints.
  printed = re.findall(r'^print\(.*\)  # (.*)$', block, re.MULTILINE)
  if printed:
    assert capsys.readouterr().out.splitlines() == printed


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  """Returns a folder of the runs of `_train_digits`, which are made once."""

  @functools.cache
  def train():
    folder = tmp_path_factory.mktemp('digits')
    _train_digits(folder)
    return folder

  return train


def _train_digits(folder):
  """Runs two steps of the README's commands for both stages."""
  for name in ('digits_fsq', 'digits_maskgit'):
    command, *_ = (x for x in LAUNCHES if f'configs/{name}.py' in x)
    words = shlex.split(command)[1:]
    words += [f'--workdir={folder}/{name}', '--config.train.num_steps=2']
    if name == 'digits_maskgit':
      words += [
          f'--config.tokens.tokenizer={folder}/digits_fsq',
          '--config.eval.num_images=8',
          '--config.eval.num_samples=0',
      ]
    with flagsaver.flagsaver():
      assert launch.main(launch.parse_flags(words)) == 0


def _write_token_files(run, name):
  """Writes four views of the few validation images of a run."""
  config = configuration.config_from_json((run / 'config.json').read_text())
  config.tokenize.views = 4
  tokens.tokenize_workdir(config, run, folder=run / 'tokens' / name)
  # It is where the command above the example writes.
  config = configuration.load_config(ROOT / 'configs/fsq_888.py')
  config.tokenize.update(split='train', views=4)
  assert tokens.default_folder(config, run) == run / 'tokens' / name


@pytest.mark.slow
def test_the_small_vqrae_runs_from_files_to_report(tmp_path):
  (command,) = (x for x in LAUNCHES if 'testdata/encoders/siglip' in x)
  words = shlex.split(command.replace('runs/tiny', str(tmp_path / 'tiny')))
  subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)
  assert 'fsq' in (tmp_path / 'tiny' / 'report.html').read_text().lower()
  config = json.loads((tmp_path / 'tiny' / 'config.json').read_text())
  # What the run was of is known without the files that it started from.
  assert config['model']['encoder']['architecture'].startswith('siglip(')


@pytest.mark.slow
def test_a_run_becomes_token_files_and_images_again(tmp_path):
  shutil.copytree(ROOT / 'tests/testdata/run', tmp_path / 'run')
  commands = [
      command
      for command in _launches(ROOT / 'fsq_jax/tokens/README.md')
      if 'gs://' not in command  # tests/workdir has a server for these.
  ]
  assert len(commands) == 3
  for command in commands:
    # That run is one of the debug config.
    words = shlex.split(command.replace('fsq_888', 'debug'))
    subprocess.run(
        [sys.executable, *words[1:], f'--workdir={tmp_path}/run'],
        cwd=ROOT,
        check=True,
    )
  folder = tmp_path / 'run' / 'tokens'
  images = json.loads((folder / 'synthetic_eval/manifest.json').read_text())
  assert len(list((folder / 'synthetic_eval_images').glob('*.png'))) == (
      images['num_images']
  )
  training = folder / 'synthetic_train_4_views' / 'manifest.json'
  summary = json.loads(training.read_text())['summary']
  # Synthetic images have the size of the crop, so that views differ in flips.
  assert 1.5 * 8192 < summary['distinct_grids'] <= 2 * 8192


@pytest.mark.slow
def test_sizes_of_train_states_are_those_of_siglip_l():
  sizes = []
  for name in ('vqrae_fsq_siglip_l', 'vqrae_fsq_siglip_l_stage2'):
    config = configuration.load_config(ROOT / f'configs/{name}.py')
    mesh = partitioning.create_mesh({'data': -1, 'fsdp': 1})
    builder = train_state.build_state_builder(
        config,
        models.build_autoencoder(config.model, config.data.image_size),
        optim.build_optimizer(config.optim, config.train.num_steps),
        mesh,
    )
    leaves = jax.tree.leaves(builder.abstract)
    sizes.append(sum(x.size * x.dtype.itemsize for x in leaves) / 2**30)
  text = f'takes {sizes[0]:.1f} GiB in stage 1, {sizes[1]:.1f} GiB in stage 2'
  assert text in _text(ROOT / 'configs/README.md').replace('\n', ' ')


def test_there_is_something_to_run():
  assert len(PYTHON) >= 7
  assert len(LAUNCHES) >= 20


def test_readme_is_a_landing_page():
  lines = _text(README).splitlines()
  assert len(lines) <= 220
  # Figure, installation and both commands are at the top.
  top = '\n'.join(lines[:50])
  assert '![' in top
  assert top.count('python3 -m venv') == 2


def _flags(command):
  words = shlex.split(command, comments=True)
  return dict(
      word.removeprefix('--').split('=', 1)
      for word in words
      if word.startswith('--') and '=' in word
  )


def _fields(path):
  """The fields of a config file, or of all configs without one."""
  if path is None:
    return schema.FIELDS | generator_schema.FIELDS
  return loading.fields_of(configuration.load_config(ROOT / path))


def test_launch_commands_name_existing_configs_and_fields():
  unknown = []
  for command in (x for path in DOCUMENTS for x in _launches(path)):
    flags = _flags(command)
    fields = _fields(flags.pop('config', None))
    for name in flags:
      known = launch.flags.FLAGS
      if name.startswith('config.'):
        known = [f'config.{field}' for field in fields]
      if name not in known:
        unknown.append((name, command))
    if flags.get('mode', 'train') not in MODES:
      unknown.append(('mode', command))
  assert not unknown


def _made_by(commands):
  """Files and folders that commands write: workdirs and converted weights."""
  made = set()
  for command in commands:
    flags = _flags(command)
    if 'launch.py' in command:
      stem = pathlib.Path(flags.get('config', '')).stem
      workdir = flags.get('workdir', f'runs/{stem}')
      made |= {workdir, f'{workdir}/latent_statistics.safetensors'}
    elif command.endswith('.safetensors'):
      made.add(command.split()[-1])
  return made


def test_launch_commands_run_or_have_a_placeholder(
    tmp_path, monkeypatch, fake_wandb
):
  del fake_wandb  # Installed by a command.
  monkeypatch.chdir(ROOT)
  problems = []
  for document in GUIDES:
    earlier = _commands(README) if document != README else []
    for command in _commands(document):
      if 'launch.py' in command:
        try:
          _check_launch(command, _made_by(earlier), tmp_path)
        except (AssertionError, ValueError) as error:
          problems.append((document.parent.name, command, error))
      earlier.append(command)
  assert not problems


def _check_launch(command, made, tmp_path):
  """Raises an error unless a command would start, given what is `made`."""
  flags = _flags(command)
  mode = flags.get('mode', 'train')
  if 'config' not in flags:
    if 'workdir' not in flags:  # With the tokenizer that ships.
      assert mode == 'reconstruct'
      return
    # The config of a run that an earlier command has trained.
    assert flags['workdir'] in made
    return
  config = command_line.load(flags['config'], None, ROOT)
  words = shlex.split(command, comments=True)
  overrides = [x for x in words if x.startswith('--config.')]
  command_line.override(config, ['launch.py', *overrides])
  if (
      mode != 'prepare'
      and 'data' in config
      and config.data.source
      in ('folder', 'tfds', 'webdataset', 'parquet', 'arrays')
  ):
    assert config.data.data_dir.startswith(PLACEHOLDER)
  for name, row in loading.fields_of(config).items():
    if not row.rule.is_path:
      continue
    section, _, field = name.rpartition('.')
    path = functools.reduce(operator.getitem, section.split('.'), config)[field]
    if path and path.startswith(PLACEHOLDER):
      stand_in = tmp_path / path.removeprefix(PLACEHOLDER)
      stand_in.mkdir(exist_ok=True)
      config.update_from_flattened_dict({name: str(stand_in)})
    elif path:
      assert (ROOT / path).exists() or path in made, name
  configuration.check_config(config, mode=mode)


def test_scripts_of_commands_exist_and_have_their_flags():
  shared = (ROOT / 'experiments' / 'sweep.py').read_text()
  unknown = []
  for command in (x for path in DOCUMENTS for x in _commands(path)):
    script = re.search(
        r'-m (experiments\.[\w.]+)|(experiments/\S+\.py)', command
    )
    if 'experiments' not in command or 'experiments/launching' in command:
      continue  # `_launches` has the arguments of launching.
    path = ROOT / (script[2] or f'{script[1].replace(".", "/")}.py')
    text = path.read_text() + shared
    unknown += [
        (flag, command)
        for flag in re.findall(r' --(\w+)', command)
        if f"'--{flag}'" not in text and f"'{flag}': " not in text
    ]
  assert not unknown


def test_headers_of_configs_name_themselves_and_existing_fields():
  wrong = []
  for path in sorted(ROOT.glob('configs/*.py')):
    header = ast.get_docstring(ast.parse(path.read_text()))
    for name in re.findall(r'--config\.([\w.]*\w)=', header):
      if name not in _fields(path):
        wrong.append((path.name, name))
    command = re.search(r'launch\.py --config=(\S+\.py)', header)
    if not path.stem.startswith('default') and (
        not command or command[1] != f'configs/{path.name}'
    ):
      wrong.append((path.name, 'its command'))
  assert not wrong


def test_links_lead_somewhere():
  broken, count = [], 0
  for path in DOCUMENTS:
    for link in re.findall(r'\]\(((?!https?:|#)[^)]+)\)', _text(path)):
      count += 1
      if not (path.parent / link.split('#')[0]).exists():
        broken.append((path, link))
  assert count > 100
  assert not broken


def test_nobody_is_told_to_install_a_name_that_is_not_registered():
  paths = list(ROOT.glob('*.*'))
  for folder in ('configs', 'experiments', 'fsq_jax', 'tests'):
    paths += (ROOT / folder).glob('**/*.*')
  paths = [
      path
      for path in paths
      if path.suffix in ('.ipynb', '.md', '.py', '.toml')
      and path != pathlib.Path(__file__)
  ]
  assert len(paths) > 200
  # From a checkout it is: pip install -e '.[hub]'.
  wrong = re.compile(r'pip install[^\n]*fsq[_-]jax|fsq[_-]jax\[')
  assert [x for x in paths if wrong.search(x.read_text('utf-8'))] == []


def test_the_map_of_the_code_is_true():
  block, floors = _blocks(ROOT / 'fsq_jax/README.md', 'text')
  named = set(re.findall(r'^  (\w+\.py|\w+/)', block, re.MULTILINE))
  package = ROOT / 'fsq_jax'
  there = {
      path.name + ('/' if path.is_dir() else '')
      for path in package.iterdir()
      if path.name not in ('__init__.py', '__pycache__', 'README.md')
  }
  assert named == there
  assert {f'{x}/' for x in re.findall('[a-z]+', floors)} == there


# Of VQRAE-FSQ-SigLIP-L.yaml with its section gan, and of the parameters of
# VQRAE in hugoycj/RAE.
YAML_KEYS = """
encoder_cls encoder_config_path encoder_input_size encoder_params
decoder_config_path decoder_patch_size pretrained_decoder_path
use_fsq fsq_levels fsq_use_projection use_simvq num_embeddings commitment_cost
vq_decay vq_epsilon quantize_before_reshape use_post_quant_conv
post_quant_conv_kernel_size freeze_encoder noise_tau reshape_to_2d
normalization_stat_path eps
epochs ema_decay batch_size num_workers clip_grad log_interval
checkpoint_interval sample_interval lr betas weight_decay
type warmup_epochs decay_end_epoch base_lr final_lr
perceptual_weight disc_weight disc_start max_d_weight gen_loss disc_loss
disc_upd_start
"""


def test_every_key_of_the_original_has_its_place():
  (table,) = re.findall(
      r'\| YAML \| here \|\n\|.*\n((?:\|.*\n)+)',
      _text(ROOT / 'configs/README.md'),
  )
  rows = [row.split(' | ') for row in table.splitlines()]
  keys = [key for row in rows for key in re.findall('`(.+?)`', row[0])]
  assert len(keys) == len(set(keys))
  assert set(YAML_KEYS.split()) <= set(keys)
  for key, ours in rows:
    fields = re.findall(r'`(\w+\.[\w.]+)`', ours)
    assert set(fields) <= schema.FIELDS.keys(), key
    assert fields or re.search('always|not needed', ours), key


def test_every_config_is_named():
  for path in ROOT.glob('configs/*.py'):
    assert f']({path.name})' in _text(ROOT / 'configs/README.md'), path.name
