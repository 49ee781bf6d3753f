"""Tests of the code's layout: imports, sizes, names, docstrings, flags."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]

# What each module or folder of fsq_jax may import of the others; everything
# flows down this list. A new module gets a line here and one in the README.
_ALLOWED_IMPORTS = {
    'fsq_jax': set(),
    'launch': {
        'codebook_analysis', 'configuration', 'data', 'evaluate', 'export',
        'latent_statistics', 'runtime', 'tokens', 'train',
    },
    'train': {
        'checkpoint', 'configuration', 'data', 'evaluate', 'initialization',
        'models', 'networks', 'optim', 'partitioning', 'progress',
        'provenance', 'quantizers', 'report', 'runtime', 'train_state',
        'train_step', 'workdir',
    },
    'codebook_analysis': {
        'codebook_figures', 'configuration', 'data', 'evaluate', 'evaluation',
        'metrics', 'partitioning', 'quantizers', 'report', 'runtime',
        'token_statistics', 'train_step', 'trained', 'workdir',
    },
    'codebook_figures': {'metrics', 'models', 'partitioning', 'quantizers'},
    'evaluate': {
        'configuration', 'data', 'evaluation', 'native_evaluation',
        'network_metrics', 'partitioning', 'report', 'runtime', 'train_step',
        'trained', 'workdir',
    },
    'native_evaluation': {
        'compiled', 'data', 'evaluation', 'models', 'native_size',
        'network_metrics', 'tiled_metrics', 'train_step',
    },
    'evaluation': {
        'data', 'metrics', 'network_metrics', 'provenance', 'quantizers',
        'runtime', 'train_step',
    },
    'native_size': {
        'compiled', 'metrics', 'models', 'partitioning', 'train_step',
    },
    'tiled_metrics': {'metrics'},
    'compiled': set(),
    'latent_statistics': {
        'configuration', 'data', 'initialization', 'models', 'optim',
        'partitioning', 'runtime', 'train_state', 'train_step', 'trained',
        'workdir',
    },
    'initialization': {'configuration', 'models', 'train_state', 'trained'},
    'tokens': {
        'configuration', 'data', 'metrics', 'progress', 'quantizers',
        'runtime', 'tokenizer', 'trained', 'workdir',
    },
    'export': {
        'configuration', 'runtime', 'tokenizer', 'tokens', 'trained', 'workdir',
    },
    'tokenizer': {
        'batching', 'compiled', 'data', 'metrics', 'models', 'native_size',
        'partitioning', 'quantizers', 'tokenizer_files', 'train_step',
        'trained',
    },
    'batching': {'partitioning'},
    'tokenizer_files': {
        'configuration', 'integrity', 'model_card', 'models', 'partitioning',
        'quantizers', 'workdir',
    },
    'model_card': set(),
    'trained': {
        'checkpoint', 'configuration', 'models', 'optim', 'quantizers',
        'train_state', 'workdir',
    },
    'train_step': {
        'adversarial_losses', 'adversary', 'losses', 'metrics', 'optim',
        'partitioning', 'train_state',
    },
    'train_state': {'adversary', 'optim', 'partitioning'},
    'adversary': {
        'adversarial_losses', 'diffaug', 'models', 'optim', 'partitioning',
    },
    'network_metrics': {
        'compiled', 'frechet', 'metrics', 'models', 'partitioning',
        'train_step', 'workdir',
    },
    'networks': {'models', 'partitioning', 'perceptual'},
    'checkpoint': {'integrity', 'runtime', 'storage_errors', 'workdir'},
    'storage_errors': set(),
    'integrity': {'partitioning', 'runtime'},
    'report': {'workdir'},
    'perceptual': {'models'},
    'optim': {'partitioning'},
    'models': {'partitioning', 'quantizers'},
    'configuration': {'config_rules', 'models', 'quantizers', 'rules'},
    'config_rules': {'network_rules', 'quantizer_rules', 'rules'},
    'network_rules': {'rules'},
    'quantizer_rules': {'rules'},
    'adversarial_losses': set(),
    'data': set(),
    'diffaug': set(),
    'frechet': {'workdir'},
    'losses': set(),
    'metrics': set(),
    'partitioning': set(),
    'progress': set(),
    'provenance': set(),
    'quantizers': set(),
    'rules': set(),
    'runtime': set(),
    'token_statistics': set(),
    'workdir': set(),
}
_FORBIDDEN_NAMES = {'utils', 'common', 'helpers'} | sys.stdlib_module_names
# Neither a dependency nor, with torch, a safe reader of files.
_FORBIDDEN_LIBRARIES = {'tensorflow', 'torch', 'pickle'}
# Cohesion decides where a file ends; a longer one needs a reason here.
_MAX_LINES = 600
# A list of every field, with a comment each.
_LONG = {'configs/default.py'}
_TOP_LEVEL = {
    '.ci', '.gitignore', 'LICENSE', 'README.md', 'configs', 'experiments',
    'fsq_jax', 'launch.py', 'pyproject.toml', 'setup.py', 'tests',
}  # fmt: skip

_PACKAGE = sorted((_ROOT / 'fsq_jax').rglob('*.py'))
_LAUNCH = _ROOT / 'launch.py'
_REST = [
    path
    for folder in ('configs', 'experiments', 'tests')
    for path in sorted((_ROOT / folder).rglob('*.py'))
]


def _each(paths):
  return pytest.mark.parametrize(
      'path', paths, ids=[str(path.relative_to(_ROOT)) for path in paths]
  )


@functools.cache
def _parse(path):
  return ast.parse(path.read_text(encoding='utf-8'), str(path))


def _module(path):
  """Dotted name of a file: 'fsq_jax.models.vit', 'fsq_jax.models', 'launch'."""
  parts = path.relative_to(_ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


_MODULES = {_module(path): path for path in [*_PACKAGE, _LAUNCH]}


def _imports(path):
  """Dotted names of all that a file imports, inside functions too."""
  for node in ast.walk(_parse(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        submodule = f'{node.module}.{alias.name}'
        yield submodule if submodule in _MODULES else node.module


def _unit(module):
  """The key of `_ALLOWED_IMPORTS` that a module belongs to."""
  return module.removeprefix('fsq_jax.').split('.')[0]


@_each(_MODULES.values())
def test_imports_follow_the_flow(path):
  unit = _unit(_module(path))
  assert unit in _ALLOWED_IMPORTS, f'Add {unit} to _ALLOWED_IMPORTS.'
  ours = {_unit(name) for name in _imports(path) if name in _MODULES}
  assert ours - {unit, 'fsq_jax'} <= _ALLOWED_IMPORTS[unit]


def test_imports_have_no_cycle():
  graph = {
      module: {name for name in _imports(path) if name in _MODULES} - {module}
      for module, path in _MODULES.items()
  }
  while graph:
    leaves = {m for m, names in graph.items() if not names & graph.keys()}
    assert leaves, f'These modules import each other: {sorted(graph)}.'
    graph = {m: names for m, names in graph.items() if m not in leaves}


@_each(_MODULES.values())
def test_no_forbidden_library_is_imported(path):
  libraries = {name.split('.')[0] for name in _imports(path)}
  assert not libraries & _FORBIDDEN_LIBRARIES


# Tests may be longer: tables of cases are easy to read.
@_each([*_MODULES.values(), *(p for p in _REST if 'tests' not in p.parts)])
def test_files_stay_small(path):
  if str(path.relative_to(_ROOT)) not in _LONG:
    assert len(path.read_text().splitlines()) <= _MAX_LINES


@_each(_PACKAGE)
def test_names_say_what_is_inside(path):
  names = set(path.relative_to(_ROOT).with_suffix('').parts)
  assert not names & _FORBIDDEN_NAMES


@_each([*_PACKAGE, *_REST])
def test_only_launch_defines_flags(path):
  names = {
      getattr(node, 'attr', getattr(node, 'id', ''))
      for node in ast.walk(_parse(path))
  }
  assert not {name for name in names if name.startswith('DEFINE_')}


def _classes():
  return {
      node.name: node
      for path in _PACKAGE
      for node in _parse(path).body
      if isinstance(node, ast.ClassDef)
  }


def _documents(cls, method):
  """Whether a class or one of its bases in the package documents a method."""
  if any(
      getattr(node, 'name', None) == method and ast.get_docstring(node)
      for node in cls.body
  ):
    return True
  bases = (ast.unparse(base).split('.')[-1] for base in cls.bases)
  known = _classes()
  return any(_documents(known[base], method) for base in bases if base in known)


def _undocumented(path):
  """Yields public names without a docstring, methods that override apart."""
  if not ast.get_docstring(_parse(path)):
    yield 'the module'
  functions = (ast.FunctionDef, ast.AsyncFunctionDef)
  for node in _parse(path).body:
    if not isinstance(node, (*functions, ast.ClassDef)):
      continue
    if node.name.startswith('_'):
      continue
    if not ast.get_docstring(node):
      yield node.name
    for method in node.body if isinstance(node, ast.ClassDef) else ():
      # linen's setup only builds what the class describes.
      public = isinstance(method, functions) and (
          method.name == '__call__'
          or not (method.name.startswith('_') or method.name == 'setup')
      )
      if public and not _documents(node, method.name):
        yield f'{node.name}.{method.name}'


@_each([*_MODULES.values(), *_REST])
def test_public_names_are_documented(path):
  if path in _REST and path.name.endswith('_test.py'):
    assert ast.get_docstring(_parse(path))
  else:
    assert list(_undocumented(path)) == []


def test_repository_has_no_other_top_level_names():
  git = subprocess.run(
      ['git', 'ls-files'],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  if git.returncode:
    pytest.skip('Not a git checkout.')
  names = {line.split('/')[0] for line in git.stdout.splitlines()}
  assert names <= _TOP_LEVEL
