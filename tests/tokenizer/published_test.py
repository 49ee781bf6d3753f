"""Published tokenizers: both layouts of MaskGIT's VQGAN, and its formulas."""

import json
import pathlib

from flax import serialization
from flax import traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from fsq_jax import configuration
from fsq_jax.models import pixels
from fsq_jax.models import variables as variables_lib
from fsq_jax.models.pretrained import maskgit
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.tokenizer import files
from fsq_jax.tokenizer import published

_CONFIG = (
    pathlib.Path(__file__).parents[2] / 'configs' / 'imagenet256_vq_1024.py'
)
_FILTERS, _MULTIPLIERS, _BLOCKS = 32, (1, 2, 2), 2
_CODES, _WIDTH = 40, 6
_RULES = (('.*', 'replicate'),)
# Not square, as the grid must not be transposed.
_SIZE = (12, 16)


def _config(**fields):
  config = configuration.load_config(_CONFIG)
  config.update_from_flattened_dict({
      'data.image_size': _SIZE,
      'model.encoder.conv.filters': _FILTERS,
      'model.encoder.conv.channel_multipliers': _MULTIPLIERS,
      'model.encoder.conv.num_res_blocks': _BLOCKS,
      'model.quantizer.vq.codebook_size': _CODES,
      'model.quantizer.vq.code_dim': _WIDTH,
      'losses.perceptual.name': 'none',
      'discriminator.name': 'none',
      **fields,
  })
  return config


# An independent implementation in float64, which asks for parameters in the
# order of the published code and so determines the keys of its files.


class _Flax:
  """Parameters that flax's @nn.compact numbers by kind in order of calls."""

  def __init__(self, arrays, scope=('params',)):
    self.arrays, self.scope, self._counts = arrays, scope, {}

  def child(self, kind):
    i = self._counts.get(kind, 0)
    self._counts[kind] = i + 1
    return _Flax(self.arrays, (*self.scope, f'{kind}_{i}'))

  def get(self, name, shape):
    key = '/'.join((*self.scope, name))
    if key not in self.arrays:
      rng = np.random.default_rng(len(self.arrays))
      if name == 'kernel':
        value = rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape)
      else:
        value = (name == 'scale') + rng.uniform(-0.4, 0.4, shape)
      self.arrays[key] = np.float32(value)
    assert self.arrays[key].shape == shape
    return np.float64(self.arrays[key])


def _conv(p, x, filters, side, use_bias=True):
  p = p.child('Conv')
  kernel = p.get('kernel', (side, side, x.shape[-1], filters))
  reach = side // 2
  padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(
      padded, (side, side), axis=(1, 2)
  )
  y = np.einsum('bhwcij,ijco->bhwo', windows, kernel, optimize=True)
  return y + p.get('bias', (filters,)) if use_bias else y


def _norm_swish(p, x):
  p = p.child('GroupNorm')
  groups = x.reshape(*x.shape[:3], 32, -1)
  mean = groups.mean(axis=(1, 2, 4), keepdims=True)
  variance = groups.var(axis=(1, 2, 4), keepdims=True)
  y = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
  y = y * p.get('scale', x.shape[-1:]) + p.get('bias', x.shape[-1:])
  return y / (1 + np.exp(-y))


def _block(p, x, filters):
  p = p.child('ResBlock')
  y = _conv(p, _norm_swish(p, x), filters, 3, use_bias=False)
  y = _conv(p, _norm_swish(p, y), filters, 3, use_bias=False)
  if x.shape[-1] != filters:
    x = _conv(p, y, filters, 1, use_bias=False)
  return x + y


def _encode(arrays, images):
  """[B, H, W, 3] in [0, 1] to latents."""
  p = _Flax(arrays, ('params', 'encoder'))
  x = _conv(p, images, _FILTERS, 3, use_bias=False)
  for level, multiplier in enumerate(_MULTIPLIERS):
    for _ in range(_BLOCKS):
      x = _block(p, x, _FILTERS * multiplier)
    if level < len(_MULTIPLIERS) - 1:
      b, h, w, c = x.shape
      x = x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
  for _ in range(_BLOCKS):
    x = _block(p, x, x.shape[-1])
  return _conv(p, _norm_swish(p, x), _WIDTH, 1)


def _decode(arrays, codes):
  """Codes to images [B, H, W, 3], about in [0, 1]."""
  p = _Flax(arrays, ('params', 'decoder'))
  x = _conv(p, codes, _FILTERS * _MULTIPLIERS[-1], 3)
  for _ in range(_BLOCKS):
    x = _block(p, x, x.shape[-1])
  for level in reversed(range(len(_MULTIPLIERS))):
    for _ in range(_BLOCKS):
      x = _block(p, x, _FILTERS * _MULTIPLIERS[level])
    if level > 0:
      x = x.repeat(2, axis=1).repeat(2, axis=2)
      x = _conv(p, x, x.shape[-1], 3)
  return _conv(p, _norm_swish(p, x), 3, 3)


def _quantize(arrays, latents):
  codebook = _Flax(arrays, ('params', 'quantizer')).get(
      'codebook', (_CODES, _WIDTH)
  )
  distances = np.sum((latents[..., None, :] - codebook) ** 2, axis=-1)
  indices = np.argmin(distances, axis=-1)
  return indices, codebook[indices]


def _torch_arrays(arrays):
  """The same weights with the keys that the port's modules have."""
  last = len(_MULTIPLIERS) - 1
  blocks = {
      'encoder': [
          *(f'down.{i}.block.{j}' for i in range(last + 1) for j in (0, 1)),
          'mid.0', 'mid.1',
      ],
      'decoder': [
          'mid.0', 'mid.1',
          *(f'up.{i}.block.{j}' for i in (2, 1, 0) for j in (0, 1)),
      ],
  }
  convs = {
      'encoder': ['conv_in', 'conv_out'],
      'decoder': [
          'conv_in', 'up.2.upsample_conv', 'up.1.upsample_conv', 'conv_out'
      ],
  }
  renamed = {}
  for key, x in arrays.items():
    _, part, *layers, leaf = key.split('/')
    if part == 'quantizer':
      renamed['quantize.embedding.weight'] = x
      continue
    names = [part]
    kind, i = layers[0].split('_')
    if kind == 'ResBlock':
      names.append(blocks[part][int(i)])
      names.append({
          'Conv_0': 'conv1', 'Conv_1': 'conv2', 'Conv_2': 'nin_shortcut',
          'GroupNorm_0': 'norm1', 'GroupNorm_1': 'norm2',
      }[layers[1]])  # fmt: skip
    else:
      names.append(convs[part][int(i)] if kind == 'Conv' else 'norm_out')
    names.append('bias' if leaf == 'bias' else 'weight')
    x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x
    renamed['.'.join(names)] = np.ascontiguousarray(x)
  return renamed


@pytest.fixture(scope='module')
def reference():
  """(arrays of a Flax file, images, indices, reconstructions in [0, 1])."""
  arrays = {}
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, *_SIZE, 3), np.uint8)
  indices, codes = _quantize(arrays, _encode(arrays, images / 255))
  return arrays, images, indices, _decode(arrays, codes)


# Of tokenizer_imagenet256_checkpoint, as listed in convert_tokenizer_weights.
# ipynb of github.com/hmorimitsu/maskgit-torch, which ran on it. It has 168.
_PUBLISHED = {
    'decoder/Conv_0/kernel': (3, 3, 256, 512),
    'decoder/Conv_1/kernel': (3, 3, 512, 512),
    'decoder/Conv_2/kernel': (3, 3, 256, 256),
    'decoder/Conv_4/bias': (128,),
    'decoder/Conv_5/kernel': (3, 3, 128, 3),
    'decoder/GroupNorm_0/scale': (128,),
    'decoder/ResBlock_1/Conv_0/kernel': (3, 3, 512, 512),
    'decoder/ResBlock_4/Conv_0/kernel': (3, 3, 512, 256),
    'decoder/ResBlock_4/Conv_2/kernel': (1, 1, 256, 256),
    'decoder/ResBlock_8/GroupNorm_0/scale': (256,),
    'decoder/ResBlock_8/Conv_2/kernel': (1, 1, 128, 128),
    'decoder/ResBlock_11/Conv_0/kernel': (3, 3, 128, 128),
    'encoder/Conv_0/kernel': (3, 3, 3, 128),
    'encoder/Conv_1/kernel': (1, 1, 512, 256),
    'encoder/GroupNorm_0/bias': (512,),
    'encoder/ResBlock_4/Conv_2/kernel': (1, 1, 256, 256),
    'encoder/ResBlock_8/Conv_0/kernel': (3, 3, 256, 512),
    'encoder/ResBlock_8/GroupNorm_1/scale': (512,),
    'encoder/ResBlock_11/Conv_1/kernel': (3, 3, 512, 512),
    'quantizer/codebook': (1024, 256),
}


def _write(path, arrays, layout='flax'):
  if layout == 'flax':
    tree = traverse_util.unflatten_dict(arrays, sep='/')
    path.write_bytes(serialization.msgpack_serialize(tree))
  else:
    safetensors.numpy.save_file(arrays, path)
  return path


def _mesh():
  return partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])


@pytest.fixture(scope='module')
def model():
  """The model of the config, and its variables as shapes."""
  model = files.build_model(_config())
  shapes = variables_lib.abstract_variables(model, _SIZE)
  return model, partitioning.place_abstract(shapes, _mesh(), _RULES, 0)


@pytest.fixture(scope='module')
def tokenizer(reference, tmp_path_factory):
  path = tmp_path_factory.mktemp('maskgit') / 'tokenizer_checkpoint'
  return Tokenizer.from_maskgit(
      _write(path, reference[0]), _config(), mesh=_mesh()
  )


@pytest.mark.slow
def test_tokens_and_images_are_those_of_the_published_formulas(
    reference, tokenizer
):
  _, images, indices, expected = reference
  assert len(np.unique(indices)) > 8
  output = jax.jit(tokenizer.model.apply)(
      tokenizer.variables, pixels.to_float(images)
  )
  np.testing.assert_array_equal(output.indices, indices)
  # In [0, 1] and of deviation 1, where ours are in [-1, 1].
  np.testing.assert_allclose(
      output.reconstructions, expected * 2 - 1, rtol=2e-5, atol=2e-5
  )
  np.testing.assert_array_equal(tokenizer.encode(images), indices)
  levels = np.round(np.clip(expected, 0, 1) * 255)
  assert np.max(np.abs(tokenizer.decode(indices) - levels)) <= 1


@pytest.mark.slow
def test_images_padded_to_other_sizes_are_those_of_the_formulas(
    reference, tokenizer
):
  arrays = reference[0]
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (1, 20, 8, 3), np.uint8)
  indices, codes = _quantize(arrays, _encode(arrays, images / 255))
  # 5 x 2 latents are padded to 6 x 2, with zeros of MaskGIT's range.
  np.testing.assert_array_equal(tokenizer.encode(images, 'pad'), indices)
  levels = np.round(np.clip(_decode(arrays, codes), 0, 1) * 255)
  assert np.max(np.abs(tokenizer.decode(indices) - levels)) <= 1


def test_both_layouts_hold_the_same_weights(reference, model, tmp_path):
  arrays = reference[0]
  flax = maskgit.load_variables(_write(tmp_path / 'flax', arrays), *model)
  flat = traverse_util.flatten_dict(flax, sep='/')
  assert len(flat) == len(arrays)
  # A few by hand: after two levels of two blocks; the first upsampling.
  for ours, theirs in (
      ('encoder/level_2_block_1/conv_1', 'encoder/ResBlock_5/Conv_1'),
      ('encoder/level_1_block_0/shortcut', 'encoder/ResBlock_2/Conv_2'),
      ('decoder/level_2_block_0/conv_0', 'decoder/ResBlock_2/Conv_0'),
      ('decoder/level_2_upsample', 'decoder/Conv_1'),
  ):
    np.testing.assert_array_equal(
        flat[f'params/{ours}/kernel'], arrays[f'params/{theirs}/kernel']
    )
  folder = tmp_path / 'torch'
  folder.mkdir()
  path = _write(folder / 'model.safetensors', _torch_arrays(arrays), 'torch')
  for given in (path, folder):
    torch = maskgit.load_variables(given, *model)
    jax.tree.map(np.testing.assert_array_equal, torch, flax)


def test_what_is_saved_keeps_weights_range_and_source(tokenizer, tmp_path):
  folder = tokenizer.save_pretrained(tmp_path / 'saved')
  loaded = Tokenizer.from_pretrained(folder, mesh=_mesh())
  assert loaded.model_hash == tokenizer.model_hash
  jax.tree.map(
      np.testing.assert_array_equal, loaded.variables, tokenizer.variables
  )
  for part in (loaded.model.encoder, loaded.model.decoder):
    assert part.pixel_range == (0, 1)
  stored = json.loads((folder / 'config.json').read_text())
  assert stored['step'] == 0
  assert stored['config']['train']['init_from'] == 'tokenizer_checkpoint'
  card = (folder / 'README.md').read_text()
  assert 'Weights of tokenizer_checkpoint; encoder conv' in card


def test_keys_and_shapes_are_those_of_the_published_file(tmp_path):
  # As one number each, so that all are of another shape.
  arrays = {f'params/{key}': np.zeros((), np.float32) for key in _PUBLISHED}
  path = _write(tmp_path / 'tokenizer_imagenet256_checkpoint', arrays)
  with pytest.raises(ValueError, match=r'148 missing: .*; 20 of another') as e:
    Tokenizer.from_maskgit(
        path, configuration.load_config(_CONFIG), mesh=_mesh()
    )
  for key, shape in _PUBLISHED.items():
    assert f'params/{key} is () instead of {shape}' in str(e.value)


def _drop(arrays, key):
  return {name: x for name, x in arrays.items() if name != key}


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        (
            'params/decoder/Conv_2/bias', None,
            '1 missing: params/decoder/Conv_2/bias',
        ),
        (
            'params/encoder/ResBlock_8/Conv_0/kernel', np.zeros(3, np.float32),
            '1 unexpected: params/encoder/ResBlock_8/Conv_0/kernel',
        ),
        (
            'params/quantizer/codebook', np.zeros((41, _WIDTH), np.float32),
            r'params/quantizer/codebook is \(41, 6\) instead of \(40, 6\)',
        ),
        (
            'params/encoder/Conv_1/bias', np.zeros(_WIDTH, np.int32),
            'params/encoder/Conv_1/bias is int32 instead of',
        ),
        ('step', 3, '1 unexpected: step'),
        (
            'params/encoder/Conv_1/bias', np.full(_WIDTH, np.nan, np.float32),
            "'params/encoder/Conv_1/bias' of .* holds NaN",
        ),
    ],
    ids=['missing', 'unexpected', 'shape', 'dtype', 'number', 'nan'],
)
def test_arrays_that_do_not_fit_are_named(
    reference, model, tmp_path, key, value, message
):
  arrays = _drop(reference[0], key) | ({} if value is None else {key: value})
  path = _write(tmp_path / 'checkpoint', arrays)
  with pytest.raises(ValueError, match=message):
    maskgit.load_variables(path, *model)


def test_keys_of_the_port_that_do_not_fit_are_named(reference, model, tmp_path):
  arrays = _torch_arrays(reference[0])
  # Two blocks of another number of levels.
  arrays['encoder.down.3.block.0.norm1.weight'] = np.zeros(64, np.float32)
  del arrays['decoder.mid.1.norm2.bias']
  path = _write(tmp_path / 'x.safetensors', arrays, 'torch')
  with pytest.raises(ValueError, match=(
      r'1 missing: decoder.mid.1.norm2.bias; '
      r'1 unexpected: encoder.down.3.block.0.norm1.weight'
  )):
    maskgit.load_variables(path, *model)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'PK\x03\x04pytorch', 'is a pickle of PyTorch'),
        (b'\x80\x02}q\x00.', 'is a pickle of PyTorch'),
        (b'', 'cannot be read: it is corrupted, or not Flax msgpack'),
        (b'\x01', 'holds int instead of dict'),
        (b'\x81\xa6params\x81\xa7enc', 'cannot be read'),
        (b'version https://git-lfs.github.com/spec/v1', 'cannot be read'),
        (b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":', 'cannot be read'),
        (b'\x81\xa6params\x80', "holds neither 'params/encoder/Conv_0/kernel'"),
    ],
    ids=['zip', 'pickle', 'empty', 'int', 'cut', 'text', 'cut_st', 'other'],
)
def test_other_files_are_named(model, tmp_path, content, message):
  path = tmp_path / 'weights'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    maskgit.load_variables(path, *model)
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ('key', 'name'),
    [
        ('encoder.conv_blocks.0.res.0.conv1.weight', 'LlamaGen'),
        ('encoder.down_blocks.0.resnets.0.conv1.weight', 'diffusers'),
        ('encoder.down.0.block.0.conv1.weight', 'taming'),
    ],
)
def test_vqgans_of_another_architecture_are_named(model, tmp_path, key, name):
  arrays = dict.fromkeys(
      (key, 'quant_conv.weight', 'encoder.conv_in.weight'),
      np.zeros(1, np.float32),
  )
  path = _write(tmp_path / 'x.safetensors', arrays, 'torch')
  with pytest.raises(ValueError, match=f'{name}.*cannot express'):
    maskgit.load_variables(path, *model)


def test_configs_of_other_models_are_errors(tmp_path):
  config = _config(**{
      'model.encoder.conv.pixel_range': (-1.0, 1.0),
      'model.quantizer.vq.codebook_update': 'ema',
  })
  with pytest.raises(ValueError, match='has another model') as error:
    published.read_maskgit(tmp_path / 'none', config, _mesh())
  lines = str(error.value).splitlines()[1:]
  assert [line.split()[0] for line in lines] == [
      'model.encoder.conv.pixel_range',
      'model.quantizer.vq.codebook_update',
      'model.decoder.conv.pixel_range',
  ]
  with pytest.raises(ValueError, match=r'There is no .*none'):
    Tokenizer.from_maskgit(tmp_path / 'none', _config(), mesh=_mesh())
