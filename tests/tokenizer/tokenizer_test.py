"""Tokenizers: from runs and folders, on any size, what damage and misuse do."""

from concurrent import futures
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import sys
import types

import chex
import jax
from jax import numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from fsq_jax import configuration
from fsq_jax.configuration import loading
from fsq_jax.configuration import schema
from fsq_jax.data import transforms
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.models import pixels
from fsq_jax.models import variables as variables_lib
from fsq_jax.quantizers import convert
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.tokenizer import files
from fsq_jax.tokenizer import tokenizer as tokenizer_lib

_ROOT = pathlib.Path(__file__).parents[2]
# A trained run; see trained_test.
_RUN = _ROOT / 'tests' / 'testdata' / 'run'


def _images(num, height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def _untrained(**kwargs):
  """A tokenizer of configs/debug.py with random weights; kwargs: fields."""
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.update_from_flattened_dict(kwargs)
  model = files.build_model(config)
  rng = np.random.default_rng(0)

  def draw(path, x):
    if path[-1].key in ('bias', 'scale'):
      return np.full(x.shape, path[-1].key == 'scale', x.dtype)
    # Latents have to differ, or all of them would be one token.
    deviation = np.prod(x.shape[:-1]) ** -0.5 if path[0].key == 'params' else 1
    return (deviation * rng.standard_normal(x.shape)).astype(x.dtype)

  # The model's own initialization takes long to compile.
  variables = jax.tree_util.tree_map_with_path(
      draw, variables_lib.abstract_variables(model, config.data.image_size)
  )
  mesh = partitioning.create_mesh({'data': -1, 'fsdp': 1}, jax.devices()[:1])
  variables = jax.device_put(variables, partitioning.replicated(mesh))
  saved = files.SavedModel(config, model, variables)
  return Tokenizer(saved, mesh, batch_size=8)


@pytest.fixture(scope='module')
def tokenizer():
  tokenizer = Tokenizer.from_workdir(_RUN, batch_size=16)
  # Compiles its functions before the first test.
  tokenizer.reconstruct(_images(16, 16, 16))
  return tokenizer


@pytest.fixture
def folder(tokenizer, tmp_path):
  return tokenizer.save_pretrained(tmp_path / 'saved')


# Builds the tokenizer of this file.
@pytest.mark.fast_limit(10)
def test_tokens_and_images_are_those_of_the_evaluation(tokenizer):
  images = _images(40, 16, 16)
  output = jax.jit(evaluators.build_eval_step(tokenizer.model))(
      tokenizer.variables, images
  )
  tokens = tokenizer.encode(images)
  assert tokens.dtype == np.int32
  assert tokens.shape == (40, *tokenizer.grid_size)
  # Of other programs: a latent between two levels may fall otherwise.
  assert np.mean(tokens != output.indices) < 1e-2
  others = tokenizer.decode(tokens).astype(int) - output.reconstructions
  assert np.mean(np.abs(others) > 1) < 1e-2
  np.testing.assert_array_equal(
      tokenizer.reconstruct(images), tokenizer.decode(tokens)
  )


def test_batches_are_filled_up_and_cut(tokenizer):
  images = _images(45, 16, 16)
  whole = tokenizer.encode(images)
  for num in (3, 17):
    part = tokenizer.encode(images[:num])
    assert part.shape[0] == num
    assert np.mean(part != whole[:num]) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [
    {'data': 1, 'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}
])  # fmt: skip
def test_any_mesh_gives_the_same(tokenizer, folder, sizes):
  mesh = partitioning.create_mesh(sizes)
  images = _images(20, 16, 16)
  for other in (
      Tokenizer.from_workdir(_RUN, mesh=mesh, batch_size=16),
      Tokenizer.from_pretrained(folder, mesh=mesh, batch_size=16),
  ):
    assert other.model_hash == tokenizer.model_hash
    assert np.mean(other.encode(images) != tokenizer.encode(images)) < 1e-2


def test_bfloat16_is_the_model_only(tokenizer, folder):
  for other in (
      Tokenizer.from_workdir(_RUN, dtype='bfloat16'),
      Tokenizer.from_pretrained(folder, dtype='bfloat16'),
  ):
    assert other.model.encoder.dtype == jnp.bfloat16
    assert other.model_hash == tokenizer.model_hash
    assert other.variables['params']['encoder']['patches']['kernel'].dtype == (
        jnp.float32
    )
  for load in (Tokenizer.from_workdir, Tokenizer.from_pretrained):
    with pytest.raises(ValueError, match='int8'):
      load(_RUN if load == Tokenizer.from_workdir else folder, dtype='int8')


@pytest.mark.slow
def test_bfloat16_changes_some_tokens(tokenizer):
  other = Tokenizer.from_workdir(_RUN, batch_size=16, dtype='bfloat16')
  images = _images(20, 16, 16)
  tokens, expected = other.encode(images), tokenizer.encode(images)
  assert 0 < np.mean(tokens != expected) < 0.5


def test_padding_keeps_the_size(tokenizer):
  for size in ((1, 1), (16, 16), (15, 33), (48, 5)):
    images = _images(2, *size)
    tokens = tokenizer.encode(images, 'pad')
    assert tokens.shape == (2, *tokenizer.tokens_of(size))
    restored = tokenizer.decode(tokens, size)
    assert restored.shape == images.shape
    np.testing.assert_array_equal(
        tokenizer.reconstruct(images, 'pad'), restored
    )


def test_a_vit_takes_tiles_by_themselves(tokenizer):
  images = _images(2, 32, 48)
  tokens = tokenizer.encode(images, 'pad')
  tile = tokenizer.encode(images[:, 16:, 32:])
  assert np.mean(tokens[:, 4:, 8:] != tile) < 0.05


def test_an_image_is_reconstructed_from_its_path(tokenizer, tmp_path):
  image = _images(1, 20, 33)[0]
  path = tmp_path / 'image.png'
  PIL.Image.fromarray(image).save(path)
  for name in (path, str(path)):
    np.testing.assert_array_equal(
        tokenizer.reconstruct(name),
        tokenizer.reconstruct(image[None], 'pad')[0],
    )
  np.testing.assert_array_equal(
      tokenizer.reconstruct(path, tiles='overlapping'),
      tokenizer.reconstruct(image[None], 'pad', tiles='overlapping')[0],
  )
  assert tokenizer.reconstruct(path, 'crop').shape == (16, 16, 3)
  assert tokenizer.reconstruct(image[None]).shape == (1, 16, 16, 3)
  with pytest.raises(ValueError, match=r'none\.png cannot be read: No such'):
    tokenizer.reconstruct(tmp_path / 'none.png')


def test_overlapping_tiles_are_encoded_by_themselves(tokenizer):
  images = _images(2, 15, 24)
  restored = tokenizer.reconstruct(images, 'pad', tiles='overlapping')
  assert restored.shape == images.shape
  # The last column is of the second tile alone, and the first of the first.
  for columns, x in ((np.s_[:16], 0), (np.s_[8:], -1)):
    tile = tokenizer.reconstruct(images[:, :, columns], 'pad')
    difference = np.abs(restored[:, :, x].astype(int) - tile[:, :, x])
    assert np.mean(difference > 1) < 1e-2


def test_tokens_of_tiles_are_counted(tokenizer):
  for tiles, num in (('disjoint', 6), ('overlapping', 8)):
    assert tokenizer.num_tokens((20, 33), tiles) == num * 16
    # One tile has the same image, whatever the kind.
    image = _images(1, 9, 16)
    assert tokenizer.num_tokens((9, 16), tiles) == 16
    np.testing.assert_array_equal(
        tokenizer.reconstruct(image, 'pad', tiles=tiles),
        tokenizer.reconstruct(image, 'pad'),
    )


def test_unknown_tiles_are_rejected(tokenizer):
  images = _images(1, 16, 16)
  for call in (
      lambda: tokenizer.reconstruct(images, 'pad', tiles='all'),
      lambda: tokenizer.num_tokens((16, 16), 'all'),
  ):
    with pytest.raises(ValueError, match=r"tiles is .*; allowed: \['disjoint'"):
      call()


def test_a_crop_has_no_overlapping_tiles(tokenizer, tmp_path):
  image = _images(1, 16, 16)
  path = tmp_path / 'image.png'
  PIL.Image.fromarray(image[0]).save(path)
  for args in ((image,), (image, 'crop'), (path, 'crop')):
    with pytest.raises(ValueError, match=r"with fit 'crop'.* give fit='pad'"):
      tokenizer.reconstruct(*args, tiles='overlapping')


def _convolutional():
  conv = {'filters': 32, 'channel_multipliers': (1, 1, 1), 'num_res_blocks': 1}
  fields = {
      f'model.{part}.{name}': value
      for part in ('encoder', 'decoder')
      for name, value in {
          'name': 'conv', **{f'conv.{x}': y for x, y in conv.items()}
      }.items()
  }
  return _untrained(**fields)


@pytest.mark.slow
def test_a_convolutional_model_takes_whole_images():
  tokenizer = _convolutional()
  images = _images(2, 19, 30)
  tokens = tokenizer.encode(images, 'pad')
  assert tokens.shape == (2, 5, 8)
  restored = tokenizer.decode(tokens, (19, 30))
  assert restored.shape == images.shape
  # It has no tiles.
  np.testing.assert_array_equal(
      tokenizer.reconstruct(images, 'pad', tiles='overlapping'), restored
  )
  assert tokenizer.num_tokens((19, 30), 'overlapping') == 40
  # What lies far below changes the tokens of the top: GroupNorm sees it.
  assert tokenizer.reconstruct(images[:, :16, :16]).shape == (2, 16, 16, 3)


@pytest.mark.slow
def test_convolutional_models_are_compiled_for_few_sizes(monkeypatch):
  tokenizer = _convolutional()
  exact = {
      method: jax.jit(
          lambda x, method=method: tokenizer.model.apply(
              tokenizer.variables, x, method=method
          )
      )
      for method in (
          tokenizer_lib.images_to_tokens, tokenizer_lib.tokens_to_images
      )
  }
  encode, decode = exact.values()
  # (17, 33) pixels are in the bucket of (20, 48).
  images = _images(2, 17, 33)
  tokens = tokenizer.encode(images, 'pad')
  padded = np.stack([transforms.pad(x, (4, 4)) for x in images])
  np.testing.assert_array_equal(tokens, encode(padded))
  others = np.asarray(decode(tokens))[:, :17, :33].astype(int)
  assert np.abs(tokenizer.decode(tokens, (17, 33)) - others).max() <= 1
  # Of 5 and 6 by 9 to 12 tokens of 4 x 4 pixels, in one bucket; the last one
  # fills it.
  traced, to_float, to_uint8 = [], pixels.to_float, pixels.to_uint8
  monkeypatch.setattr(
      pixels, 'to_float', lambda x: (traced.append(x.shape), to_float(x))[1]
  )
  monkeypatch.setattr(
      pixels, 'to_uint8', lambda x: (traced.append(x.shape), to_uint8(x))[1]
  )
  for size in ((24, 36), (19, 42), (23, 47)):
    images = _images(2, *size)
    tokens = tokenizer.encode(images, 'pad')
    assert tokens.shape == (2, *tokenizer.tokens_of(size))
    whole = tokenizer.decode(tokens)
    assert whole.shape[1:3] == tuple(4 * x for x in tokens.shape[1:3])
    restored = tokenizer.decode(tokens, size)
    np.testing.assert_array_equal(restored, whole[:, : size[0], : size[1]])
  # Sizes within the bucket were compiled above; both functions once more for
  # the size that fills it.
  assert traced == [(2, 24, 48, 3)] * 2


def test_cropping_is_that_of_evaluation(tokenizer):
  images = _images(2, 20, 31)
  np.testing.assert_array_equal(
      tokenizer.encode(images), tokenizer.encode(images[:, 2:18, 7:23])
  )
  with pytest.raises(ValueError, match=r"'stretch'.*crop.*pad"):
    tokenizer.encode(images, 'stretch')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['vq', 'residual_fsq'])
def test_other_quantizers_return_from_a_folder(name, tmp_path):
  tokenizer = _untrained(**{'model.quantizer.name': name})
  images = _images(4, 16, 16)
  tokens = tokenizer.encode(images)
  shape = tokenizer.model.quantizer.index_shape
  assert tokens.shape == (4, *tokenizer.grid_size, *shape)
  again = Tokenizer.from_pretrained(
      tokenizer.save_pretrained(tmp_path / 'x'), mesh=tokenizer.mesh,
      batch_size=8,
  )
  np.testing.assert_array_equal(again.encode(images), tokens)
  np.testing.assert_array_equal(again.decode(tokens), tokenizer.decode(tokens))
  assert again.spec == tokenizer.spec


def test_a_tokenizer_works_at_each_size_of_its_training(tmp_path):
  tokenizer = _untrained(**{
      'model.encoder.position': 'sincos',
      'data.image_sizes': ((16, 16), (24, 16)),
  })
  images = _images(2, 24, 16)
  # Otherwise two tiles, of which the second is half padding.
  assert tokenizer.tokens_of((24, 16)) == (8, 4)
  sized = tokenizer.at_size((24, 16))
  tokens = sized.encode(images)
  assert tokens.shape == (2, 6, 4)
  expected = jax.jit(tokenizer.model.apply)(
      tokenizer.variables, pixels.to_float(jnp.asarray(images))
  )
  np.testing.assert_array_equal(tokens, expected.indices)
  assert sized.decode(tokens).shape == images.shape
  assert sized.model_hash != tokenizer.model_hash
  assert sized.at_size((16, 16)).model_hash == tokenizer.model_hash
  folder = sized.save_pretrained(tmp_path / 'sized')
  returned = Tokenizer.from_pretrained(folder)
  assert (returned.grid_size, returned.model_hash) == ((6, 4), sized.model_hash)
  with pytest.raises(ValueError, match=r'with \(16, 16\), \(24, 16\)\. Other'):
    tokenizer.at_size((32, 32))


def test_a_model_without_tokens_is_refused():
  with pytest.raises(ValueError, match="'none' has no tokens"):
    _untrained(**{'model.quantizer.name': 'none'})


def test_a_folder_returns_all(tokenizer, folder):
  again = Tokenizer.from_pretrained(folder, batch_size=16)
  images = _images(20, 16, 16)
  np.testing.assert_array_equal(again.encode(images), tokenizer.encode(images))
  assert again.model_hash == tokenizer.model_hash
  assert again.step == tokenizer.step == 8
  saved = {
      path: (folder / path).read_bytes()
      for path in ('model.safetensors', 'config.json', 'README.md')
  }
  second = again.save_pretrained(folder / 'again')
  assert saved == {path: (second / path).read_bytes() for path in saved}


def test_a_decoder_alone_decodes(tokenizer, tmp_path):
  whole = tokenizer.save_pretrained(tmp_path / 'whole')
  half = tokenizer.save_pretrained(tmp_path / 'half', decoder_only=True)
  sizes = [(x / 'model.safetensors').stat().st_size for x in (half, whole)]
  assert sizes[0] < sizes[1]
  images = _images(4, 16, 16)
  tokens = tokenizer.encode(images)
  decoder = Tokenizer.from_pretrained(half, batch_size=16)
  for x in (decoder, tokenizer.without_encoder()):
    np.testing.assert_array_equal(x.decode(tokens), tokenizer.decode(tokens))
    assert x.model_hash == tokenizer.model_hash
    with pytest.raises(ValueError, match='decoder_only'):
      x.encode(images)
    assert 'encoder' not in x.variables['params']
  third = decoder.save_pretrained(tmp_path / 'third')
  with pytest.raises(ValueError, match='decoder_only'):
    Tokenizer.from_pretrained(third).encode(images)


def test_the_card_says_what_was_evaluated(tokenizer, tmp_path):
  evaluation = json.loads(
      (_ROOT / 'experiments/default_run/results.json').read_text()
  )['evaluation']
  evaluated = Tokenizer(
      files.SavedModel(
          tokenizer.config, tokenizer.model, tokenizer.variables,
          files.Metadata(step=8, evaluation=evaluation),
      ),
      tokenizer.mesh,
  )
  folder = evaluated.save_pretrained(tmp_path / 'x')
  card = (folder / 'README.md').read_text()
  numbers = evaluation['metrics'] | evaluation['codebook']
  assert f'| {numbers["psnr"]:.2f} | {numbers["ssim"]:.3f} |' in card
  assert f'{numbers["usage"]:.1%}' in card
  assert '342 images of photos' in card
  assert '| levels | 8, 8, 8 |' in card
  assert tokenizer.model_hash in card
  saved = Tokenizer.from_pretrained(folder).evaluation
  assert saved == files.without_places(evaluation)


def test_a_saved_tokenizer_has_one_checkpoint(folder):
  tokenizer_lib.load_tokenizer(folder, 'newest')
  for which in ('best', '4'):
    with pytest.raises(ValueError, match=f"has no checkpoint '{which}'"):
      tokenizer_lib.load_tokenizer(folder, which)


def test_a_run_is_no_saved_tokenizer():
  with pytest.raises(ValueError, match=r'run is a run.*\.from_workdir\('):
    Tokenizer.from_pretrained(_RUN)


def _change_json(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


@pytest.mark.parametrize('name', [
    'model.safetensors', 'config.json', 'quantizer.json'
])  # fmt: skip
def test_damaged_files_are_refused(folder, name):
  path = folder / name
  content = path.read_bytes()
  for changed in (None, b'', content[: len(content) // 2], b'[1]'):
    path.unlink()
    if changed is not None:
      path.write_bytes(changed)
    with pytest.raises(ValueError, match=name):
      Tokenizer.from_pretrained(folder)
    path.write_bytes(content)
  Tokenizer.from_pretrained(folder)


@pytest.mark.fast_limit(10)
def test_flipped_bits_of_weights_are_found(folder):
  path = folder / 'model.safetensors'
  content = path.read_bytes()
  rng = np.random.default_rng(0)
  for position in rng.integers(0, len(content) * 8, 5):
    flipped = bytearray(content)
    flipped[position // 8] ^= 1 << (position % 8)
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r'model\.safetensors'):
      Tokenizer.from_pretrained(folder)


def test_changed_configs_and_dialects_are_refused(folder):
  config, spec = folder / 'config.json', folder / 'quantizer.json'
  texts = config.read_text(), spec.read_text()

  def refuses(match):
    with pytest.raises(ValueError, match=match):
      Tokenizer.from_pretrained(folder)
    config.write_text(texts[0])
    spec.write_text(texts[1])

  _change_json(spec, lambda x: x.update(convention='paper'))
  refuses("convention: 'paper' -> 'symmetric'")
  quantizer = ('config', 'model', 'quantizer', 'fsq')

  def to_paper(content):
    for name in quantizer:
      content = content[name]
    content.update(convention='paper', commitment_weight=0.0)

  _change_json(config, to_paper)
  refuses("convention: 'symmetric' -> 'paper'")
  _change_json(config, lambda x: x['config']['model'].update(scan_unroll=3))
  refuses('was changed')
  _change_json(config, lambda x: x.update(model_hash='0' * 64))
  refuses('was changed')
  _change_json(
      config, lambda x: x['config']['model']['encoder'].update(depth=5)
  )
  refuses('another model')
  _change_json(config, lambda x: x.update(format='another, version 9'))
  refuses("'another, version 9'")
  _change_json(config, lambda x: x.pop('hashes'))
  refuses('hashes')


def test_fields_of_later_versions_do_not_change_a_hash(folder, monkeypatch):
  before = Tokenizer.from_pretrained(folder).model_hash
  later = schema.FIELDS['model.encoder.width']._replace(added=lambda _: 0)
  monkeypatch.setitem(schema.FIELDS, 'model.encoder.later_field', later)
  after = Tokenizer.from_pretrained(folder)
  assert after.config.model.encoder.later_field == 0
  assert after.model_hash == before


def test_the_config_of_a_folder_is_that_of_the_run(folder, tokenizer):
  config = configuration.config_from_json((folder / 'config.json').read_text())
  assert config.to_dict() == tokenizer.config.to_dict()


def test_weights_of_another_model_are_refused(folder, tmp_path):
  fields = {'model.encoder.width': 48, 'model.encoder.num_heads': 2}
  other = _untrained(**fields).save_pretrained(tmp_path / 'other')
  (folder / 'model.safetensors').write_bytes(
      (other / 'model.safetensors').read_bytes()
  )
  with pytest.raises(ValueError, match=r'another model.*\n.*float32\['):
    Tokenizer.from_pretrained(folder)
  arrays = safetensors.numpy.load_file(folder / 'model.safetensors')
  assert all(path.startswith('params/') for path in arrays)


def test_nothing_is_overwritten(tokenizer, folder):
  with pytest.raises(ValueError, match='not empty'):
    tokenizer.save_pretrained(folder)


def test_paths_stay_at_home(tokenizer, tmp_path):
  config = tokenizer.config.copy_and_resolve_references()
  config.update_from_flattened_dict({
      name: f'/home/somebody/{name}'
      for name in configuration.PATHS
      if name != 'model.latent_statistics'  # Of another model.
  })
  evaluation = {
      'step': 8,
      'metrics': {'psnr': 20.0, 'ssim': 0.5},
      'codebook': {},
      'protocol': {
          **dict.fromkeys(
              ('source', 'split', 'crop', 'resize', 'kernel', 'rounding'), 'x'
          ),
          'num_images': 8,
          'images': {'folder': '/home/somebody/images', 'sha256': '12'},
          'command': ['launch.py', '--workdir=/home/somebody/run'],
      },
  }
  other = Tokenizer(
      files.SavedModel(
          config, tokenizer.model, tokenizer.variables,
          files.Metadata(step=8, evaluation=evaluation),
      ),
      tokenizer.mesh,
  )
  folder = other.save_pretrained(tmp_path / 'x')
  for name in ('config.json', 'README.md'):
    assert 'somebody' not in (folder / name).read_text()
  again = Tokenizer.from_pretrained(folder)
  for name, value in loading.flatten(again.config):
    assert name not in configuration.PATHS or value in (name, '')
  protocol = evaluation['protocol']
  del protocol['command']
  protocol['images']['folder'] = 'images'
  assert again.evaluation == evaluation
  assert again.model_hash == other.model_hash == tokenizer.model_hash


def test_other_arrays_are_no_images(tokenizer):
  for images, message in (
      (np.zeros((2, 16, 16, 3), np.float32), r'float32\[2, 16, 16, 3\]'),
      (np.zeros((16, 16, 3), np.uint8), r'uint8\[16, 16, 3\]'),
      (np.zeros((2, 3, 16, 16), np.uint8), r'uint8\[2, 3, 16, 16\]'),
      (np.zeros((0, 16, 16, 3), np.uint8), 'at least one pixel'),
  ):
    with pytest.raises(ValueError, match=message):
      tokenizer.encode(images)


def test_other_arrays_are_no_tokens(tokenizer):
  for tokens, message in (
      (np.zeros((2, 4, 4), np.float32), 'float32'),
      (np.zeros((4, 4), np.int32), r'int32\[4, 4\]'),
      (np.zeros((2, 4, 6), np.int32), r'multiples of \(4, 4\)'),
      (np.zeros((2, 4, 4, 2), np.int32), r'\[2, 4, 4, 2\]'),
      (np.zeros((0, 4, 4), np.int32), r'\[0, 4, 4\]'),
      (np.full((2, 4, 4), 512, np.uint16), r'512.*0 \.\.\. 511'),
      (np.full((2, 4, 4), -1, np.int64), 'NaN'),
      (np.full((2, 4, 4), 2**40, np.int64), str(2**40)),
  ):
    with pytest.raises(ValueError, match=message):
      tokenizer.decode(tokens)
  residual = _untrained(**{'model.quantizer.name': 'residual_fsq'})
  with pytest.raises(ValueError, match=r'integers \[B, h, w, 2\]'):
    residual.decode(np.zeros((2, 4, 4), np.int32))


def test_tokens_of_another_dialect_are_converted(tokenizer):
  tokens = tokenizer.encode(_images(4, 16, 16))
  quantizer = convert.quantizer_from_spec(tokenizer.spec)
  paper = quantizer.clone(convention='paper', commitment_weight=0.0).spec()
  foreign = convert.convert_indices(tokens, tokenizer.spec, paper)
  assert np.any(foreign != tokens)
  with pytest.raises(ValueError, match='another convention'):
    tokenizer.decode(foreign, spec=paper)
  back = convert.convert_indices(foreign, paper, tokenizer.spec)
  np.testing.assert_array_equal(
      tokenizer.decode(back, spec=tokenizer.spec), tokenizer.decode(tokens)
  )


def test_sizes_beyond_the_images_are_refused(tokenizer):
  tokens = tokenizer.encode(_images(1, 16, 16))
  for size in ((17, 16), (16, 2**70)):
    with pytest.raises(ValueError, match=f'cropped to {re.escape(str(size))}'):
      tokenizer.decode(tokens, size)


def test_sizes_are_two_integers_of_at_least_one(tokenizer):
  tokens = tokenizer.encode(_images(1, 16, 16))
  for size in (
      (-3, 10), (0, 4), (4, 0), (16,), (16, 16, 3), 16, '16', (16.0, 16),
      (True, 4), np.array([4.0, 5.0]), np.array([[4, 5]]), ('4', '4'),
      (None, 4), {4, 5},
  ):  # fmt: skip
    with pytest.raises(ValueError, match=r'^size is .*; give \(height, width'):
      tokenizer.decode(tokens, size)
    with pytest.raises(ValueError, match=r'^size is '):
      tokenizer.tokens_of(size)


def test_sizes_crop_from_the_top_left(tokenizer):
  tokens = tokenizer.encode(_images(1, 16, 16))
  whole = tokenizer.decode(tokens)
  for size in ((5, 7), [5, 7], np.array([5, 7])):
    np.testing.assert_array_equal(
        tokenizer.decode(tokens, size), whole[:, :5, :7]
    )


def test_lists_of_different_shapes_are_refused(tokenizer):
  images = [*_images(1, 16, 16), *_images(1, 8, 16)]
  for call in (tokenizer.encode, tokenizer.reconstruct):
    with pytest.raises(ValueError, match='Images of a list have different'):
      call(images)
  with pytest.raises(ValueError, match='Tokens of a list have different'):
    tokenizer.decode([[[0, 1]], [[0]]])


def _encode_in_worker(tokenizer, images):
  return (
      tokenizer.encode(images), tokenizer.spec, tokenizer.model_hash,
      tokenizer.mesh.size,
  )  # fmt: skip


@pytest.mark.slow
def test_a_pickled_tokenizer_does_the_same_in_another_process(
    tokenizer, monkeypatch
):
  images = _images(5, 16, 16)
  expected = (
      tokenizer.encode(images), tokenizer.spec, tokenizer.model_hash, 2
  )
  count = '--xla_force_host_platform_device_count=2'
  monkeypatch.setenv('XLA_FLAGS', f'{os.environ["XLA_FLAGS"]} {count}')
  # Not by fork, which JAX does not survive.
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    tokens, *others = pool.submit(
        _encode_in_worker, tokenizer, images
    ).result()
  np.testing.assert_array_equal(tokens, expected[0])
  assert others == list(expected[1:])


def test_pickling_keeps_all_but_the_mesh(folder):
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 2}, jax.devices()[:2])
  tokenizer = Tokenizer.from_pretrained(
      folder, mesh=mesh, batch_size=3, dtype='bfloat16'
  )
  again = pickle.loads(pickle.dumps(tokenizer))
  for name in ('config', 'model', 'step', 'evaluation', 'model_hash'):
    assert getattr(again, name) == getattr(tokenizer, name)
  assert again.model.encoder.dtype == jnp.bfloat16
  assert again.mesh.size == 1
  chex.assert_trees_all_equal(
      jax.device_get(again.variables), jax.device_get(tokenizer.variables)
  )
  # Of the decoder alone, too.
  tokenizer.save_pretrained(folder.parent / 'decoder', decoder_only=True)
  decoder = Tokenizer.from_pretrained(folder.parent / 'decoder')
  again = pickle.loads(pickle.dumps(decoder))
  assert again.model_hash == tokenizer.model_hash
  with pytest.raises(ValueError, match='decoder_only'):
    again.encode(_images(5, 16, 16))


@pytest.mark.parametrize('text', ['{"step": ', '[]', '{}'])
def test_a_damaged_evaluation_is_named(tmp_path, text):
  run = tmp_path / 'run'
  shutil.copytree(_RUN, run)
  (run / 'evaluation.json').write_text(text)
  with pytest.raises(ValueError, match=r'evaluation\.json cannot be read'):
    Tokenizer.from_workdir(run)


def test_missing_folders_are_named(tmp_path):
  with pytest.raises(ValueError, match='no folder'):
    Tokenizer.from_pretrained(tmp_path / 'nothing')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match=r'config\.json'):
    Tokenizer.from_pretrained(tmp_path / 'empty')
  with pytest.raises(ValueError, match='from_workdir'):
    Tokenizer.from_pretrained(_RUN.parent)


class _Hub:
  """Stands in for huggingface_hub: repositories are folders."""

  def __init__(self, root):
    self.root = root

  def snapshot_download(self, name, allow_patterns):
    folder = self.root / name
    if not folder.is_dir():
      raise OSError(f'404: {name}')
    assert {x.name for x in folder.iterdir()} <= set(allow_patterns)
    return str(folder)

  def create_repo(self, name, exist_ok):
    assert exist_ok
    (self.root / name).mkdir(parents=True, exist_ok=True)
    return f'https://hub/{name}'

  def upload_folder(self, repo_id, folder_path):
    for path in pathlib.Path(folder_path).iterdir():
      (self.root / repo_id / path.name).write_bytes(path.read_bytes())


def test_the_hub_keeps_folders(tokenizer, tmp_path, monkeypatch):
  hub = _Hub(tmp_path)
  module = types.SimpleNamespace(
      snapshot_download=hub.snapshot_download, HfApi=lambda: hub
  )
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
  assert tokenizer.push_to_hub('me/mine') == 'https://hub/me/mine'
  again = Tokenizer.from_pretrained('me/mine')
  assert again.model_hash == tokenizer.model_hash
  with pytest.raises(ValueError, match='404: me/other'):
    Tokenizer.from_pretrained('me/other')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match=r'pip install huggingface_hub\.'):
    tokenizer.push_to_hub('me/mine')
