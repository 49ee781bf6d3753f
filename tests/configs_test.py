"""Tests of the files in configs/: each one parses, is valid, and builds.

Those with a pretrained or a convolutional encoder train too, reduced by
overrides alone.
"""

import functools
import pathlib
import re

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax import optim
from fsq_jax import partitioning
from fsq_jax import quantizers
from fsq_jax import train_state
from fsq_jax import train_step

_CONFIGS = sorted(
    (pathlib.Path(__file__).parents[1] / 'configs').glob('*.py')
)
_each_config = pytest.mark.parametrize(
    'path', _CONFIGS, ids=[path.stem for path in _CONFIGS]
)
_PRETRAINED = [
    path
    for path in _CONFIGS
    if configuration.load_config(path).model.encoder.name == 'pretrained'
]
_each_pretrained = pytest.mark.parametrize(
    'path', _PRETRAINED, ids=[path.stem for path in _PRETRAINED]
)
_CONV = [
    path
    for path in _CONFIGS
    if configuration.load_config(path).model.encoder.name == 'conv'
]
_each_conv = pytest.mark.parametrize(
    'path', _CONV, ids=[path.stem for path in _CONV]
)

# Parameters of the XL decoder by the channels of its latents.
_DECODER_SIZES = {768: 415_056_640, 1024: 415_351_552, 1152: 415_499_008}
_STAGE_2 = 'vqrae_fsq_siglip_l_stage2'
# For two CPU cores, with sizes of its own.
_SMALL = 'vqrae_fsq_dinov2_s'
# Reduced, these have all parts; the others put them together otherwise.
_VARIED = (
    'rae_dinov2_b', 'vqrae_fsq_siglip_l', _STAGE_2, 'vqrae_simvq_dinov2_b',
    'vqrae_vq_siglip2_so400m',
)


def _load(path, tmp_path):
  """Loads a config and sets what it asks of the command line."""
  config = configuration.load_config(path)
  if config.data.source == 'folder':
    config.data.data_dir = str(tmp_path)
  if config.model.encoder.checkpoint is None:
    config.model.encoder.checkpoint = ''
  if config.train.init_from is None:
    config.train.init_from = str(tmp_path)
  return config


@functools.cache
def _trace(path):
  """The config, and the output and variables of its model as shapes."""
  config = configuration.load_config(path)
  model = models.build_autoencoder(config.model, config.data.image_size)
  images = jax.ShapeDtypeStruct((1, *config.data.image_size, 3), jnp.float32)
  return config, *jax.eval_shape(
      lambda x: model.init_with_output(jax.random.key(0), x), images
  )


def _count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@_each_config
def test_config_is_valid_and_locked(path, tmp_path):
  config = _load(path, tmp_path)
  configuration.check_config(config)
  configuration.check_config(config, num_devices=8)
  with pytest.raises(AttributeError):
    config.model.encoder.widht = 8


@_each_config
def test_config_builds_a_model_that_keeps_the_shape(path):
  config, output, variables = _trace(path)
  encoder = config.model.encoder
  size, patch = config.data.image_size, encoder.patch_size
  if encoder.name == 'pretrained':
    size = encoder.image_size or size
    patch = models.parse_architecture(encoder.architecture).patch_size
  elif encoder.name == 'conv':
    patch = 16
  assert 'params' in variables
  assert output.reconstructions.shape == (1, *config.data.image_size, 3)
  assert output.indices.shape[:3] == (1, size[0] // patch, size[1] // patch)


@_each_config
def test_header_gives_the_command(path):
  if path.stem != 'default':
    assert f'python launch.py --config=configs/{path.name}' in path.read_text()


@_each_config
def test_config_survives_json(path, tmp_path):
  config = _load(path, tmp_path)
  loaded = configuration.config_from_json(configuration.config_to_json(config))
  assert loaded.to_dict() == config.to_dict()


def test_names_of_configs_tell_their_levels():
  named = 0
  for path in _CONFIGS:
    if match := re.search(r'fsq_(?:.*_)?(\d+)$', path.stem):
      levels = configuration.load_config(path).model.quantizer.fsq.levels
      if match[1] == '1024':  # The codes that the paper's levels come close to.
        assert levels == quantizers.recommended_levels(10)
      else:
        assert ''.join(map(str, levels)) == match[1]
      named += 1
  assert named >= 11


def test_config_loads_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for path in _CONFIGS:
    configuration.load_config(path)


def test_overrides_turn_a_config_to_a_folder_of_other_size(tmp_path):
  config = configuration.load_config(_CONFIGS[0].parent / 'fsq_888.py')
  config.data.source = 'folder'
  config.data.data_dir = str(tmp_path)
  config.data.image_size = (64, 64)
  config.data.eval_split = 'val'
  configuration.check_config(config)


# Configs with a pretrained encoder.


@_each_pretrained
def test_a_pretrained_encoder_is_never_random_by_oversight(path):
  config = configuration.load_config(path)
  fields = {'model.encoder.checkpoint': None}
  if path.stem == _STAGE_2:
    fields = {'train.init_from': None}
  for field in fields:
    with pytest.raises(ValueError, match=f'set --config.{field}') as error:
      configuration.check_config(config)
    assert f'{field} is None' in str(error.value)


@_each_pretrained
def test_sizes_are_those_of_the_published_models(path):
  config, output, variables = _trace(path)
  params = variables['params']
  if path.stem == _SMALL:
    assert output.latents.shape[1:] == (8, 8, 384)
    assert _count(params['encoder']) // 10**6 == 21
    return
  assert output.latents.shape[1:3] == (16, 16)
  width = config.model.decoder.mae.input_width
  assert _count(params['decoder']) == _DECODER_SIZES[width]
  # Published towers without heads; DINOv2's of 86 has 37 x 37 positions.
  millions = {768: 85, 1024: 303, 1152: 412}[output.latents.shape[-1]]
  assert _count(params['encoder']) // 10**6 == millions


def test_codebooks_to_compare_are_of_one_size():
  sizes = {}
  for path in _PRETRAINED:
    config = configuration.load_config(path)
    quantizer = models.build_autoencoder(
        config.model, config.data.image_size
    ).quantizer
    sizes[path.stem] = quantizer.codebook_size
  assert sizes.pop('rae_dinov2_b') == 0
  assert sizes.pop('vqrae_fsq_siglip_l_88865') == 15_360
  assert sizes.pop(_SMALL) == 1000
  assert set(sizes.values()) == {16_384}


def _shrink(config):
  """Overrides that leave the parts and their order, and make them tiny."""
  family = config.model.encoder.architecture.rpartition('_')[0]
  large = models.parse_architecture(config.model.encoder.architecture)
  sizes = {'width': 24, 'depth': 2, 'num_heads': 2, 'mlp_dim': 48}
  fields = ', '.join(f'{name}={size}' for name, size in sizes.items())
  model = config.model
  model.encoder.architecture = (
      f'{family}({fields}, patch_size={large.patch_size})'
  )
  model.encoder.checkpoint = ''
  model.encoder.image_size = tuple(x // 8 for x in model.encoder.image_size)
  model.projector_in.mlp.width = 16
  for quantizer in (model.quantizer.vq, model.quantizer.simvq):
    quantizer.codebook_size = 16
    quantizer.code_dim = 24 * quantizer.code_dim // large.width
  model.quantizer.none.code_dim = 24
  model.projector_out.fourier.num_frequencies = 8
  model.decoder.mae.preset = 'none'
  model.decoder.mae.input_width = 24
  model.decoder.update(sizes)
  config.data.source = 'synthetic'
  config.data.image_size = tuple(x // 8 for x in config.data.image_size)
  config.data.batch_size = 8
  config.train.init_from = ''
  config.optim.warmup_steps = 0
  config.optim.name = 'adamw'  # Whose moments are found by one name.
  return config


@functools.cache
def _two_steps(text):
  """Returns the states before and after, and the losses, of JSON of a config.

  Reduced, some configs are the same.
  """
  config = configuration.config_from_json(text)
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.StateBuilder(config, model, optimizer, mesh)
  step = jax.jit(
      train_step.build_train_step(model, optimizer, config),
      in_shardings=(builder.shardings, partitioning.batch_sharding(mesh)),
      out_shardings=(builder.shardings, partitioning.replicated(mesh)),
  )
  dataset = data.build_dataset(config.data, split='train', seed=0)
  iterator = dataset.iterator()
  first = state = builder.create()
  losses = []
  for _ in range(2):
    images = partitioning.shard_batch(next(iterator)['image'], mesh)
    state, scalars = step(state, images)
    losses.append(float(scalars['loss']))
  return jax.device_get(first), jax.device_get(state), losses


def _two_good_steps(config):
  first, last, losses = _two_steps(configuration.config_to_json(config))
  assert np.all(np.isfinite(losses))
  assert last.skipped_steps == 0
  return first, last


def _assert_that_all_moves(first, last):
  moments = _leaves(optax.tree.get(last.opt_state, 'mu'))
  after = _leaves(last.params)
  for name, before in _leaves(first.params).items():
    # Blocks are stacked: each of them counts.
    axes = tuple(range(1, before.ndim)) if '/blocks/' in name else None
    assert np.all(np.any(after[name] != before, axis=axes)), name
    # Weight decay alone moves kernels too, but leaves no moment.
    assert np.all(np.any(moments[name] != 0, axis=axes)), name


def _leaves(tree):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): x
      for path, x in flat
  }


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[] if path.stem in _VARIED else pytest.mark.slow,
        )
        for path in _PRETRAINED
    ],
)
def test_a_reduced_copy_trains_what_it_should(path):
  config = _shrink(configuration.load_config(path))
  first, last = _two_good_steps(config)
  names = {'projector_in': config.model.projector_in.name,
           'projector_out': config.model.projector_out.name}
  trained = {'decoder'} | {x for x, name in names.items() if name != 'none'}
  if config.model.quantizer.name == 'simvq':
    trained.add('quantizer')
  if path.stem == _STAGE_2:
    trained.add('encoder')
    assert not first.frozen_params
  else:
    assert set(first.frozen_params) == {'encoder'}
  assert set(first.params) == trained
  _assert_that_all_moves(first, last)
  fixed = _leaves((last.frozen_params, last.teacher_params))
  for name, before in _leaves(
      (first.frozen_params, first.teacher_params)
  ).items():
    assert fixed[name].tobytes() == before.tobytes(), name


# Configs with the convolutional autoencoder of the FSQ paper.


@_each_conv
def test_sizes_are_those_of_the_paper(path):
  config, output, variables = _trace(path)
  params = variables['params']
  assert params.keys() == {'encoder', 'decoder'}
  if config.model.quantizer.fsq.levels == (8, 5, 5, 5):
    assert _count(params['encoder']) == 23_645_828
    assert _count(params['decoder']) == 29_317_123
  pixels = config.data.image_size[0]
  tokens = {128: 64, 256: 256}[pixels]
  assert output.indices.size == tokens
  # 100 epochs at 128 pixels, 400 at 256.
  images = config.train.num_steps * config.data.batch_size
  epochs = {128: 100, 256: 400}[pixels]
  assert images / 1_281_167 == pytest.approx(epochs, rel=2e-3)
  schedule = optim.build_schedule(config.optim, config.train.num_steps)
  for step in (0, 1, config.train.num_steps // 2, config.train.num_steps):
    assert float(schedule(step)) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(
            path,
            id=path.stem,
            # The others differ in levels and sizes.
            marks=[] if '256' in path.stem else pytest.mark.slow,
        )
        for path in _CONV
    ],
)
def test_a_reduced_conv_autoencoder_trains(path):
  config = configuration.load_config(path)
  config.model.encoder.conv.update(
      filters=32, channel_multipliers=(1, 2), num_res_blocks=1
  )
  config.data.source = 'synthetic'
  config.data.resize_shorter = 0
  config.data.image_size = (8, 8)
  config.data.batch_size = 8
  first, last = _two_good_steps(config)
  assert set(first.params) == {'encoder', 'decoder'}
  _assert_that_all_moves(first, last)
