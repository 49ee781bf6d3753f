"""Tests of the code's layout: imports, sizes, names, docstrings, flags."""

import ast
import functools
import pathlib
import subprocess
import sys
import tokenize

import pytest

_ROOT = pathlib.Path(__file__).parents[1]

# The sub-packages by floor. Each imports only from lower floors, never from its
# own; launch.py is on top of all. Any other file of the package is the root's
# __init__.py, which imports when asked.
_FLOORS = (
    {'data', 'quantizers', 'runtime', 'workdir'},
    {'models', 'report'},
    {'adversarial', 'configuration', 'perceptual'},
    {'checkpoints'},
    {'evaluation', 'tokenizer'},
    {'analysis', 'tokens', 'train'},
    {'generators'},
    {'launch'},
)
_FLOOR_OF = {name: i for i, names in enumerate(_FLOORS) for name in names}
# Modules on the longest chain of imports, without launch.py and __init__.py.
_LONGEST_CHAIN, _LONGEST_CHAIN_OF_GENERATORS = 12, 16
_FORBIDDEN_NAMES = {'utils', 'common', 'helpers'} | sys.stdlib_module_names
# Neither a dependency nor, with torch, a safe reader of files.
_FORBIDDEN_LIBRARIES = {'tensorflow', 'torch', 'pickle'}
# Cohesion decides where a file ends. Exactly the longer files are listed here,
# each with its reason. Tests may be longer: tables of cases are easy to read.
_MAX_LINES = 600
_LONG: dict[str, str] = {}
# Where fsq_jax/README.md starts reading, and the largest number of code lines.
_READING_PATH = (
    'launch.py', 'fsq_jax/train/autoencoder.py', 'fsq_jax/train/loop.py',
    'fsq_jax/train/step.py', 'fsq_jax/models/autoencoder.py',
    'fsq_jax/models/vit.py', 'fsq_jax/models/layers.py',
    'fsq_jax/quantizers/base.py', 'fsq_jax/quantizers/fsq.py',
)  # fmt: skip
_MAX_READING_LINES = 1150
# Public attributes of named tuples.
_NAMED_TUPLE = {'_asdict', '_fields', '_make', '_replace'}
_TOP_LEVEL = {
    '.ci', '.github', '.gitignore', 'CITATION.cff', 'LICENSE', 'README.md',
    'configs', 'experiments', 'fsq_jax', 'launch.py', 'pyproject.toml',
    'setup.py', 'tests',
}  # fmt: skip

_PACKAGE = sorted((_ROOT / 'fsq_jax').rglob('*.py'))
_REST = [
    path
    for folder in ('configs', 'experiments', 'tests')
    for path in sorted((_ROOT / folder).rglob('*.py'))
]


@functools.cache
def _parse(path):
  return ast.parse(path.read_text(encoding='utf-8'), str(path))


def _module(path):
  """Dotted name of a file: 'fsq_jax.models.vit', 'fsq_jax.models', 'launch'."""
  parts = path.relative_to(_ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def _names(paths):
  return [str(path.relative_to(_ROOT)) for path in paths]


_MODULES = {_module(path): path for path in [*_PACKAGE, _ROOT / 'launch.py']}


def _imports(path):
  """Dotted names of all that a file imports, inside functions too."""
  for node in ast.walk(_parse(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        submodule = f'{node.module}.{alias.name}'
        yield submodule if submodule in _MODULES else node.module


@functools.cache
def _graph():
  """The modules of the package that each one imports when it is imported."""
  return {
      module: {x for x in _imports(path) if x in _MODULES} - {module}
      for module, path in _MODULES.items()
  }


def _unit(module):
  """Sub-package of a module; '' for the root."""
  return module.removeprefix('fsq_jax').strip('.').split('.')[0]


def test_sub_packages_import_from_lower_floors_only():
  against = [
      f'{module} imports {other}'
      for module, others in _graph().items()
      for other in others
      if _unit(other) != _unit(module)
      and not _FLOOR_OF.get(_unit(other), -1) < _FLOOR_OF[_unit(module)]
  ]
  assert not against, 'Against _FLOORS:\n' + '\n'.join(against)


def test_every_sub_package_has_a_floor():
  folders = {p.name for p in (_ROOT / 'fsq_jax').iterdir() if p.is_dir()}
  assert folders - {'__pycache__'} == _FLOOR_OF.keys() - {'launch'}


def test_imports_have_no_cycle():
  graph = _graph()
  while graph:
    leaves = {m for m, names in graph.items() if not names & graph.keys()}
    assert leaves, f'These modules import each other: {sorted(graph)}.'
    graph = {m: names for m, names in graph.items() if m not in leaves}


@functools.cache
def _chain(module):
  """The longest chain of modules that import each other from this one on."""
  chains = (_chain(x) for x in _graph()[module])
  return (module, *max(chains, key=len, default=()))


def test_chains_of_imports_are_short():
  for module, path in _MODULES.items():
    if path.name in ('__init__.py', 'launch.py'):
      continue
    of_generators = _unit(module) == 'generators'
    limit = _LONGEST_CHAIN_OF_GENERATORS if of_generators else _LONGEST_CHAIN
    chain = _chain(module)
    assert len(chain) <= limit, ' > '.join(chain)


def test_faces_only_re_export():
  """An __init__.py defines nothing but the root's lazy names."""
  kinds = (ast.Expr, ast.ImportFrom, ast.Assign)
  assert not [
      str(path)
      for path in _PACKAGE
      if path.name == '__init__.py'
      and path.parent.name != 'fsq_jax'
      and not all(isinstance(node, kinds) for node in _parse(path).body)
  ]


def test_no_forbidden_library_is_imported():
  assert not {
      (module, name)
      for module, path in _MODULES.items()
      for name in _imports(path)
      if name.split('.')[0] in _FORBIDDEN_LIBRARIES
  }


def test_files_stay_small():
  paths = [*_MODULES.values(), *(p for p in _REST if 'tests' not in p.parts)]
  long = [p for p in paths if len(p.read_text().splitlines()) > _MAX_LINES]
  assert set(_names(long)) == _LONG.keys()


def test_names_say_what_is_inside():
  parts = {
      path: {*path.relative_to(_ROOT).with_suffix('').parts}
      for path in _PACKAGE
  }
  assert not _names(p for p, names in parts.items() if names & _FORBIDDEN_NAMES)


def test_only_launch_defines_flags():
  names = {
      path: {
          getattr(node, 'attr', getattr(node, 'id', ''))
          for node in ast.walk(_parse(path))
      }
      for path in [*_PACKAGE, *_REST]
      if 'DEFINE_' in path.read_text(encoding='utf-8')
  }
  assert not _names(
      path
      for path, found in names.items()
      if any(name.startswith('DEFINE_') for name in found)
  )


@functools.cache
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


@pytest.mark.fast_limit(10)
def test_public_names_are_documented():
  missing = {}
  for path in [*_MODULES.values(), *_REST]:
    if path in _REST and path.name.endswith('_test.py'):
      names = [] if ast.get_docstring(_parse(path)) else ['the module']
    else:
      names = list(_undocumented(path))
    if names:
      missing[str(path.relative_to(_ROOT))] = names
  assert not missing


def _is_private(name):
  is_public = not name.startswith('_') or name.startswith('__')
  return not is_public and name not in _NAMED_TUPLE


def _root(node):
  """Name at the start of a chain of attributes, or ''."""
  while isinstance(node, ast.Attribute):
    node = node.value
  return getattr(node, 'id', '')


def _private_uses(path):
  """Yields private names of the package that a test imports, uses, patches."""
  nodes = list(ast.walk(_parse(path)))
  imported = set()
  for node in nodes:
    if isinstance(node, ast.Import | ast.ImportFrom):
      module = getattr(node, 'module', '') or ''
      for alias in node.names:
        name = f'{module}.{alias.name}'.strip('.')
        if name.split('.')[0] in ('fsq_jax', 'launch'):
          imported.add(alias.asname or alias.name.split('.')[0])
          if _is_private(alias.name):
            yield name
  for node in nodes:
    if isinstance(node, ast.Attribute):
      if _is_private(node.attr) and _root(node) in imported:
        yield ast.unparse(node)
    elif isinstance(node, ast.Call) and (
        getattr(node.func, 'attr', '') == 'setattr'
    ):
      target, name = node.args[:2]
      name = str(getattr(name, 'value', ''))
      if _is_private(name) and _root(target) in imported:
        yield f'{ast.unparse(target)}.{name}'


@pytest.mark.fast_limit(10)
def test_tests_use_public_names():
  private = {
      str(path.relative_to(_ROOT)): names
      for path in _REST
      if 'tests' in path.relative_to(_ROOT).parts
      and (names := sorted(set(_private_uses(path))))
  }
  assert not private


@pytest.mark.parametrize(
    ('module', 'loaded'),
    [
        ('fsq_jax', set()),
        ('fsq_jax.quantizers', {'quantizers'}),
        ('fsq_jax.models', {'models', 'quantizers', 'runtime'}),
    ],
)
def test_an_import_loads_no_more_than_it_needs(module, loaded):
  code = (
      f'import {module}, sys\n'
      'names = [x.split(".") for x in sys.modules]\n'
      'print({x[1] for x in names if x[0] == "fsq_jax" and len(x) > 1})'
  )
  done = subprocess.run(
      [sys.executable, '-c', code], cwd=_ROOT, capture_output=True, text=True,
      check=True,
  )
  assert ast.literal_eval(done.stdout.replace('set()', '()')) in (loaded, ())


def test_the_root_offers_its_names():
  code = (
      'import fsq_jax; print(fsq_jax.FSQ((8, 8)).codebook_size,'
      ' set(dir(fsq_jax)) >= {"FSQ", "tokens"}, fsq_jax.quantizers.__name__)'
  )
  done = subprocess.run(
      [sys.executable, '-c', code], cwd=_ROOT, capture_output=True, text=True,
      check=True,
  )
  assert done.stdout.split() == ['64', 'True', 'fsq_jax.quantizers']


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


def _code_lines(path):
  """Numbers of the lines with code, not of docstrings, comments and blanks."""
  docstrings = {
      line
      for node in ast.walk(_parse(path))
      if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
      and ast.get_docstring(node) is not None
      for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
  }
  ignored = {
      tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
      tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER,
  }  # fmt: skip
  with open(path, 'rb') as file:
    lines = {
        line
        for token in tokenize.tokenize(file.readline)
        if token.type not in ignored
        for line in range(token.start[0], token.end[0] + 1)
    }
  return lines - docstrings


def test_the_reading_path_of_a_newcomer_is_short():
  readme = (_ROOT / 'fsq_jax' / 'README.md').read_text(encoding='utf-8')
  places = [
      readme.find(f'[{x.removeprefix("fsq_jax/")}](') for x in _READING_PATH
  ]
  assert places[0] > -1
  assert places == sorted(places)
  assert sum(len(_code_lines(_ROOT / x)) for x in _READING_PATH) <= (
      _MAX_READING_LINES
  )
