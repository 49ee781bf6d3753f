"""Exported programs do what the tokenizer does, without the package too."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

from flax import traverse_util
import jax
from jax import export as jax_export
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.quantizers import lookup
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.tokenizer import export
from fsq_jax.tokenizer import files
from fsq_jax.workdir import files as workdir_files

_ROOT = pathlib.Path(__file__).parents[2]
# A trained run; see trained_test.
_RUN = _ROOT / 'tests' / 'testdata' / 'run'
_NAMES = ['encode', 'decode', 'codes_to_indices', 'indices_to_codes']
_CONV = {
    f'model.{part}.{name}': value
    for part in ('encoder', 'decoder')
    for name, value in {
        'name': 'conv',
        'conv.filters': 32,
        'conv.channel_multipliers': (1, 1, 1),
        'conv.num_res_blocks': 1,
    }.items()
}


def _images(num, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (num, 16, 16, 3), dtype=np.uint8)


def _mesh():
  return partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])


def _abstract(config):
  """A tokenizer with shapes for weights, which is enough to lower it."""
  model = models.build_autoencoder(config.model, config.data.image_size)
  images = np.zeros((1, *config.data.image_size, 3), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  saved = files.SavedModel(config, model, dict(variables))
  return Tokenizer(saved, _mesh(), batch_size=4)


def _untrained(config):
  """A tokenizer of random weights; a model's own take long to compile."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    if path[-1].key in ('bias', 'scale'):
      return np.full(x.shape, path[-1].key == 'scale', x.dtype)
    # Of latents that differ, or all would be one token.
    deviation = np.prod(x.shape[:-1]) ** -0.5 if path[0].key == 'params' else 1
    return (deviation * rng.standard_normal(x.shape)).astype(x.dtype)

  abstract = _abstract(config)
  variables = jax.tree_util.tree_map_with_path(draw, abstract.variables)
  variables = jax.device_put(variables, partitioning.replicated(_mesh()))
  saved = files.SavedModel(config, abstract.model, variables)
  return Tokenizer(saved, _mesh(), batch_size=4)


def _load(folder, name):
  data = (folder / f'{name}.stablehlo').read_bytes()
  return jax_export.deserialize(bytearray(data))


def _check_equal(tokenizer, weights, programs, num):
  images = _images(num)
  tokens = tokenizer.encode(images)
  assert len(np.unique(tokens)) >= num * 4
  np.testing.assert_array_equal(programs['encode'](weights, images), tokens)
  np.testing.assert_array_equal(
      programs['decode'](weights, tokens), tokenizer.decode(tokens)
  )
  codes = programs['indices_to_codes'](weights, tokens)
  assert codes.shape == (
      *tokens.shape[:3], tokenizer.model.quantizer.code_dim
  )
  expected = jax.jit(lambda variables, x: tokenizer.model.apply(
      variables, x, method=lambda model, x: model.quantizer.indices_to_codes(x)
  ))(tokenizer.variables, tokens)
  np.testing.assert_array_equal(codes, expected)
  np.testing.assert_array_equal(
      programs['codes_to_indices'](weights, codes), tokens
  )


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer.from_workdir(_RUN, mesh=_mesh(), batch_size=4)


@pytest.fixture(scope='module')
def folder(tokenizer, tmp_path_factory):
  return export.write(tokenizer, tmp_path_factory.mktemp('x') / 'export')


@pytest.fixture(scope='module')
def manifest(folder):
  return json.loads((folder / 'manifest.json').read_text())


@pytest.fixture(scope='module')
def weights(folder):
  return safetensors.numpy.load_file(folder / 'weights.safetensors')


@pytest.fixture(scope='module')
def programs(folder):
  return {name: jax.jit(_load(folder, name).call) for name in _NAMES}


@pytest.mark.slow
def test_programs_do_what_the_tokenizer_does(tokenizer, programs, weights):
  _check_equal(tokenizer, weights, programs, 4)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    {**_CONV, 'model.quantizer.name': 'vq'},
    {'model.quantizer.name': 'grouped_fsq', 'model.encoder.depth': 1},
], ids=['conv_vq', 'vit_grouped_fsq'])  # fmt: skip
def test_other_models_do_what_they_did(fields, monkeypatch):
  # Several chunks of rows, and the last one not full.
  monkeypatch.setattr(lookup, 'EXPORTED_ROWS', 24)
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.update_from_flattened_dict(fields)
  tokenizer = _untrained(config)
  programs = {
      name: jax.jit(x.call)
      for name, x in export.export_programs(tokenizer).items()
  }
  weights = traverse_util.flatten_dict(tokenizer.variables, sep='/')
  _check_equal(tokenizer, weights, programs, 4)


_ENCODER = _ROOT / 'tests' / 'testdata' / 'encoders' / 'dinov2_with_registers'
_TINY = {
    'data.image_size': (56, 56),
    'model.dtype': 'float32',
    'model.encoder.checkpoint': str(_ENCODER),
    'model.encoder.architecture': 'checkpoint',
    'model.encoder.image_size': (56, 56),
    'model.decoder.patch_size': 14,
    'model.decoder.mae.grid_size': (4, 4),
    'model.decoder.mae.preset': 'none',
    'model.decoder.mae.input_width': 64,
    'model.decoder.width': 64,
    'model.decoder.depth': 1,
    'model.decoder.num_heads': 2,
    'model.decoder.mlp_dim': 128,
}


@pytest.mark.slow
@pytest.mark.parametrize(('config', 'fields', 'size'), [
    ('debug', {'model.quantizer.name': 'lfq'}, 16),
    ('debug', {'model.quantizer.name': 'residual_fsq'}, 16),
    ('debug', {'model.quantizer.name': 'simvq'}, 16),
    ('vqrae_fsq_dinov2_b', _TINY, 56),
], ids=['lfq', 'residual_fsq', 'simvq', 'pretrained'])  # fmt: skip
def test_every_part_is_lowered_for_every_platform(config, fields, size):
  config = configuration.load_config(_ROOT / 'configs' / f'{config}.py')
  config.update_from_flattened_dict(fields)
  config = configuration.resolve(config)
  tokenizer = _abstract(config)
  programs = export.export_programs(tokenizer)
  assert list(programs) == _NAMES
  tokens = (*tokenizer.grid_size, *tokenizer.model.quantizer.index_shape)
  for name, shape, dtype in (
      ('encode', tokens, np.int32), ('decode', (size, size, 3), np.uint8)
  ):
    again = jax_export.deserialize(bytearray(programs[name].serialize()))
    assert again.platforms == ('cpu', 'cuda', 'tpu')
    (result,) = again.out_avals
    assert str(result.shape[0]) == 'b'
    assert (result.shape[1:], result.dtype) == (shape, dtype)


# Runs the examples of the manifest on given arrays where neither the package
# nor Flax can be imported.
_FRESH = """
import json, sys
sys.modules.update(fsq_jax=None, flax=None)
functions = json.load(open('manifest.json'))['functions']
for name, path in zip(['encode', 'decode'], sys.argv[1:]):
  lines = functions[name]['example']
  (first,) = (i for i, line in enumerate(lines) if line.startswith('x = '))
  lines[first + 1:first + 1] = ['import numpy', f'x = numpy.load({path!r})']
  exec('\\n'.join(lines))
  numpy.save(f'{path}.{name}.npy', y)
"""


@pytest.mark.slow
def test_a_process_without_the_package_gives_the_same(
    tokenizer, folder, tmp_path
):
  images = _images(4, seed=1)
  tokens = tokenizer.encode(images)
  np.save(tmp_path / 'images.npy', images)
  np.save(tmp_path / 'tokens.npy', tokens)
  paths = [str(tmp_path / f'{x}.npy') for x in ('images', 'tokens')]
  # As in this process, see conftest.
  env = os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  subprocess.run(
      [sys.executable, '-c', _FRESH, *paths], cwd=folder, env=env, check=True
  )
  np.testing.assert_array_equal(np.load(f'{paths[0]}.encode.npy'), tokens)
  np.testing.assert_array_equal(
      np.load(f'{paths[1]}.decode.npy'), tokenizer.decode(tokens)
  )


def test_the_manifest_says_what_is_there(tokenizer, folder, manifest, weights):
  others = {x.name for x in folder.iterdir()} - {'manifest.json'}
  assert manifest['sha256'] == {
      name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
      for name in others
  }
  assert others == {'weights.safetensors', *(f'{x}.stablehlo' for x in _NAMES)}
  assert manifest['jax'] == jax.__version__
  assert manifest['platforms'] == ['cpu', 'cuda', 'tpu']
  assert manifest['quantizer'] == json.loads(json.dumps(tokenizer.spec))
  assert manifest['model_hash'] == tokenizer.model_hash
  assert manifest['step'] == 8
  assert manifest['functions']['encode']['x'] == {
      'dtype': 'uint8', 'shape': ['b', 16, 16, 3]
  }
  assert manifest['functions']['encode']['y'] == {
      'dtype': 'int32', 'shape': ['b', 4, 4]
  }
  for name in _NAMES:
    assert manifest['functions'][name]['file'] == f'{name}.stablehlo'
    assert (
        _load(folder, name).calling_convention_version
        == manifest['calling_convention_version']
    )
  assert all(path.startswith('params/') for path in weights)
  with safetensors.safe_open(folder / 'weights.safetensors', 'np') as file:
    metadata = {x: json.loads(y) for x, y in file.metadata().items()}
  assert metadata['quantizer'] == manifest['quantizer']


@pytest.mark.parametrize('token', [-1, 512, 2**31 - 1, -(2**31)])
def test_tokens_without_a_code_are_black(
    tokenizer, programs, weights, token
):
  tokens = tokenizer.encode(_images(2))
  changed = tokens.copy()
  changed[1, 2, 3] = token
  codes = np.asarray(programs['indices_to_codes'](weights, changed))
  np.testing.assert_array_equal(
      np.isnan(codes).any(axis=-1), changed != tokens
  )
  images = np.asarray(programs['decode'](weights, changed))
  expected = tokenizer.decode(tokens).copy()
  expected[1] = 0
  np.testing.assert_array_equal(images, expected)


def test_arrays_of_another_shape_are_refused(programs, weights):
  encode = programs['encode']
  with pytest.raises(ValueError, match='16'):
    encode(weights, np.zeros((2, 8, 8, 3), np.uint8))
  with pytest.raises(ValueError, match='uint8'):
    encode(weights, np.zeros((2, 16, 16, 3), np.float32))


def test_a_decoder_alone_is_exported_without_encode(tokenizer, tmp_path):
  half = tokenizer.save_pretrained(tmp_path / 'half', decoder_only=True)
  decoder = Tokenizer.from_pretrained(half, mesh=_mesh())
  programs = export.export_programs(decoder)
  assert list(programs) == _NAMES[1:]


def _unfinished(monkeypatch, tokenizer, folder):
  write, written = workdir_files.write_bytes, []

  def fail_at_third(path, data):
    if len(written) == 2:
      raise OSError('No space left on device')
    written.append(path)
    write(path, data)

  with monkeypatch.context() as patch:
    patch.setattr(workdir_files, 'write_bytes', fail_at_third)
    with pytest.raises(OSError, match='No space'):
      export.write(tokenizer, folder)


def test_nothing_is_overwritten(tokenizer, folder, tmp_path, monkeypatch):
  # They are made above.
  programs = {name: _load(folder, name) for name in _NAMES}
  monkeypatch.setattr(export, 'export_programs', lambda _: programs)
  with pytest.raises(ValueError, match='is not empty; remove it'):
    export.write(tokenizer, folder)
  _unfinished(monkeypatch, tokenizer, tmp_path / 'x')
  assert not (tmp_path / 'x' / 'manifest.json').exists()
  with pytest.raises(ValueError, match=r'no manifest\.json.*--export'):
    export.write(tokenizer, tmp_path / 'x')


def test_a_run_is_exported_to_its_folder(tmp_path, tokenizer, monkeypatch):
  shutil.copytree(_RUN, tmp_path / 'run')
  config = configuration.config_from_json(
      (_RUN / 'config.json').read_text()
  )
  exported = []
  monkeypatch.setattr(export, 'write', lambda *args: exported.append(args))
  export.export_workdir(config, tmp_path / 'run', which='8')
  saved = tokenizer.save_pretrained(tmp_path / 'saved')
  export.export_workdir(config, saved, tmp_path / 'other')
  (of_run, folder), (of_saved, other) = exported
  assert (of_run.step, folder) == (8, tmp_path / 'run' / 'export')
  assert of_saved.model_hash == of_run.model_hash
  assert other == tmp_path / 'other'
  config.model.encoder.depth = 7
  with pytest.raises(ValueError, match='another model'):
    export.export_workdir(config, tmp_path / 'run')
  with pytest.raises(ValueError, match='is not empty'):
    export.export_workdir(config, tmp_path, tmp_path / 'run')
