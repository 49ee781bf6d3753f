"""Notebooks: they run, hold small outputs, and installing leaves JAX alone."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import nbclient
import nbformat
import pytest

from fsq_jax import workdir as workdirs

_ROOT = pathlib.Path(__file__).parents[2]
_FOLDER = _ROOT / 'experiments' / 'notebooks'
# Parameters of each notebook in the tests: warm-up takes 100 steps. In this
# order:
# tokenize_and_generate_inputs encodes with the run of train_a_tokenizer.
_PARAMETERS = {
    'train_a_tokenizer': {'NUM_STEPS': 101},
    'fsq_in_five_minutes': {'NUM_LATENTS': 10_000},
    'tokenize_and_generate_inputs': {'NUM_STEPS': 101, 'NUM_TRAIN_BATCHES': 8},
    'generate_digits': {
        'TOKENIZER_STEPS': 101, 'NUM_STEPS': 101, 'NUM_HELD_OUT': 50
    },
}
_each = pytest.mark.parametrize('name', _PARAMETERS)


def _read(name):
  return nbformat.read(_FOLDER / f'{name}.ipynb', as_version=4)


def _code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def _code(name):
  return _code_cells(_read(name))


def _setup():
  return _code('fsq_in_five_minutes')[0].source


def test_every_notebook_is_tested():
  notebooks = {path.stem for path in _FOLDER.glob('*.ipynb')}
  assert notebooks == _PARAMETERS.keys()


@_each
def test_outputs_are_those_of_one_run_from_the_top(name):
  cells = _code(name)
  counts = [cell.execution_count for cell in cells]
  assert counts == list(range(1, len(cells) + 1))
  for cell in cells:
    for output in cell.outputs:
      assert output.output_type in ('display_data', 'execute_result', 'stream')
      assert output.get('name') != 'stderr'
      # Paths of the machine that executed it.
      assert not re.search(r'(^|\s)/\w+/', output.get('text', ''))
    _check_figures(cell)


def test_outputs_are_small():
  sizes = {x.name: x.stat().st_size for x in _FOLDER.glob('*.ipynb')}
  assert sum(sizes.values()) < 1.5e6, sizes


def _check_figures(cell):
  if re.search(r'(subplots|figure|draw_levels|display)\(', cell.source):
    assert any('image/png' in x.get('data', ()) for x in cell.outputs)


@_each
def test_notebooks_use_the_package_and_define_only_plots(name):
  imported = set()
  for cell in _code(name):
    for node in ast.walk(ast.parse(cell.source)):
      assert not isinstance(node, ast.ClassDef | ast.AsyncFunctionDef)
      if isinstance(node, ast.FunctionDef):
        assert node.name.startswith('draw_'), node.name
      if isinstance(node, ast.ImportFrom):
        imported.add(node.module.split('.')[0])
  assert 'fsq_jax' in imported


@_each
def test_links_lead_somewhere(name):
  for cell in _read(name).cells:
    if cell.cell_type == 'markdown':
      for path in re.findall(r'\]\(((?!https?:)[^)]+)\)', cell.source):
        assert (_FOLDER / path).exists()


@_each
def test_the_first_cell_sets_up(name):
  assert _code(name)[0].source == _setup()
  assert len([line for line in _setup().splitlines() if line]) <= 8


def test_setup_does_nothing_where_the_package_is(tmp_path, monkeypatch):
  def run(command, **kwargs):
    raise AssertionError(command)

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(subprocess, 'run', run)
  path = list(sys.path)
  exec(_setup(), {})
  assert sys.path == path
  assert not list(tmp_path.iterdir())


def _write_wheel(folder, name, version, *requirements):
  info = f'{name}-{version}.dist-info'
  with zipfile.ZipFile(folder / f'{name}-{version}-py3-none-any.whl', 'w') as x:
    x.writestr(f'{info}/METADATA', _metadata(name, version, requirements))
    x.writestr(
        f'{info}/WHEEL',
        'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
    )
    x.writestr(f'{info}/RECORD', '')


def _metadata(name, version, requirements):
  lines = ['Metadata-Version: 2.1', f'Name: {name}', f'Version: {version}']
  return '\n'.join([*lines, *(f'Requires-Dist: {x}' for x in requirements), ''])


# Builds without setuptools, which pip could not install here.
_BACKEND = """
import pathlib

def prepare_metadata_for_build_editable(folder, config_settings=None):
  info = pathlib.Path(folder) / 'fsq_jax-1.dist-info'
  info.mkdir()
  (info / 'METADATA').write_text({metadata!r})
  return info.name

build_editable = None
"""


@pytest.fixture
def checkout(tmp_path):
  """A checkout that requires `follower`, whose newest release needs JAX 9999.

  `wheels/` beside the checkout has that JAX, and an older release of `follower`
  without the requirement.
  """
  wheels = tmp_path / 'wheels'
  wheels.mkdir()
  _write_wheel(wheels, 'jax', '9999')
  _write_wheel(wheels, 'follower', '1')
  _write_wheel(wheels, 'follower', '2', 'jax>=9999')
  folder = tmp_path / 'checkout'
  (folder / 'experiments' / 'notebooks').mkdir(parents=True)
  shutil.copy(
      _FOLDER / 'install.py', folder / 'experiments' / 'notebooks'
  )
  (folder / 'fsq_jax').mkdir()
  (folder / 'fsq_jax' / '__init__.py').touch()
  (folder / 'pyproject.toml').write_text(
      '[build-system]\nrequires = []\nbuild-backend = "backend"\n'
      'backend-path = ["."]\n'
  )
  metadata = _metadata('fsq_jax', '1', ['jax', 'follower'])
  (folder / 'backend.py').write_text(_BACKEND.format(metadata=metadata))
  return folder


@pytest.mark.slow
def test_setup_installs_the_package_and_keeps_jax(checkout, tmp_path):
  source = _setup().replace("'../..'", repr(str(checkout)))
  assert source != _setup()
  script = '\n'.join([
      'import importlib.util',
      # As where the package has not been installed.
      'importlib.util.find_spec = lambda name: None',
      source,
      'import fsq_jax',
      'print(fsq_jax.__file__)',
  ])
  here = tmp_path / 'here'
  here.mkdir()
  report = tmp_path / 'report.json'
  pip = {
      'PIP_CONFIG_FILE': os.devnull,
      'PIP_DISABLE_PIP_VERSION_CHECK': '1',
      'PIP_DRY_RUN': '1',
      'PIP_FIND_LINKS': str(tmp_path / 'wheels'),
      'PIP_NO_INDEX': '1',
      'PIP_REPORT': str(report),
  }
  done = subprocess.run(
      [sys.executable, '-c', script],
      cwd=here, env=os.environ | pip, check=True, capture_output=True,
      text=True,
  )
  assert done.stdout.strip() == str(checkout / 'fsq_jax' / '__init__.py')
  planned = {
      x['metadata']['name']: x['metadata']['version']
      for x in json.loads(report.read_text())['install']
  }
  assert planned == {'fsq_jax': '1', 'follower': '1'}


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
  return tmp_path_factory.mktemp('notebooks')


def _set_parameters(notebook, values):
  """Adds a cell with other values below the one with the parameters."""
  (place,) = (
      place
      for place, cell in enumerate(notebook.cells)
      if 'parameters' in cell.metadata.get('tags', ())
  )
  names = {
      node.id
      for node in ast.walk(ast.parse(notebook.cells[place].source))
      if isinstance(node, ast.Name)
  }
  assert values.keys() <= names
  lines = [f'{name} = {value!r}' for name, value in values.items()]
  cell = nbformat.v4.new_code_cell('\n'.join(lines))
  notebook.cells.insert(place + 1, cell)


@pytest.mark.slow
@_each
def test_notebooks_run(name, run_folder):
  notebook = _read(name)
  _set_parameters(notebook, _PARAMETERS[name])
  client = nbclient.NotebookClient(
      notebook, timeout=1800, resources={'metadata': {'path': str(run_folder)}}
  )
  client.execute(
      env=os.environ
      | {
          'HOME': str(run_folder),  # Compilation cache, IPython's history.
          'PYTHONPATH': str(_ROOT),
      }
  )
  for cell in _code_cells(notebook):
    _check_figures(cell)
  if name == 'train_a_tokenizer':
    rows = workdirs.read_metrics(run_folder / 'runs' / name)
    psnr = [row['psnr'] for row in rows if row['split'] == 'eval']
    assert psnr[-1] > psnr[0] + 0.5
