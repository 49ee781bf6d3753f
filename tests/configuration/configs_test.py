"""Tests of the files in configs/: each file parses, is valid, and builds.

Configs of generators build in tests/generators/configs_test.py.
Configs with a pretrained or a convolutional encoder train too, reduced by
overrides alone; the networks of their losses are small as well. Without
FSQ_JAX_ALL_CONFIGS=1 only one config of each kind trains.
"""

import functools
import json
import os
import pathlib
import re

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import numpy as safetensors_numpy

from experiments.weights import golden_networks
from fsq_jax import adversarial
from fsq_jax import configuration
from fsq_jax import data
from fsq_jax import models
from fsq_jax import quantizers
from fsq_jax.perceptual import classifiers
from fsq_jax.perceptual import distance
from fsq_jax.perceptual import lpips
from fsq_jax.runtime import partitioning
from fsq_jax.train import frozen_networks
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step

_CONFIGS = sorted(
    (pathlib.Path(__file__).parents[2] / 'configs').glob('*.py')
)
_LOADED = {path: configuration.load_config(path) for path in _CONFIGS}
_AUTOENCODERS = {
    path: config
    for path, config in _LOADED.items()
    if not configuration.is_generator(config)
}
# They document the fields; the other configs start from them.
_DEFAULTS = ('default', 'default_generator')
_PRETRAINED = [
    path
    for path, config in _AUTOENCODERS.items()
    if config.model.encoder.name == 'pretrained'
]
_CONV = [
    path
    for path, config in _AUTOENCODERS.items()
    if config.model.encoder.name == 'conv'
]


def _parts(config):
  """What makes models different, apart from sizes."""
  model = config.model
  return (
      model.encoder.architecture
      if model.encoder.name == 'pretrained'
      else model.encoder.name,
      model.decoder.name,
      model.projector_in.name,
      model.projector_out.name,
  )


# One config of each kind of model.
_KINDS = {_parts(config): path for path, config in _AUTOENCODERS.items()}


_TESTDATA = pathlib.Path(__file__).parents[1] / 'testdata'
_FROZEN = _TESTDATA / 'frozen'
# With the shapes of the files there.
_CLASSIFIERS = {
    'convnext_small': functools.partial(
        classifiers.ConvNext, widths=(8, 16, 24, 32), depths=(1, 1, 2, 1),
        num_classes=10,
    ),
    'resnet50': functools.partial(
        classifiers.ResNet, depths=(1, 2, 1, 1), num_classes=10
    ),
}  # fmt: skip
_DINO = {
    'checkpoint': str(_TESTDATA / 'encoders' / 'dino'),
    'architecture': (
        'dino(width=12, depth=2, num_heads=3, mlp_dim=20, patch_size=4)'
    ),
    'image_size': (12, 12),
    'blocks': (0,),
    'kernel_size': 3,
}
# Parameters of the XL decoder by the channels of its latents.
_DECODER_SIZES = {768: 415_056_640, 1024: 415_351_552, 1152: 415_499_008}
_STAGE_2 = 'vqrae_fsq_siglip_l_stage2'
# For two CPU cores, with sizes of its own.
_SMALL = 'vqrae_fsq_dinov2_s'
# Reduced, these have all parts but VQ and SimVQ, whose steps are tested in
# train/step_test.py; other configs combine them otherwise.
_VARIED = ('imagenet256_fsq_1024', 'rae_dinov2_b', _STAGE_2)


def _reduced(paths):
  """Parametrizes a test over reduced configs, of which few run by default."""
  skip = pytest.mark.skipif(
      not os.environ.get('FSQ_JAX_ALL_CONFIGS'),
      reason='Its parts train in other configs; set FSQ_JAX_ALL_CONFIGS=1.',
  )
  return pytest.mark.parametrize(
      'path',
      [
          pytest.param(
              path, id=path.stem, marks=() if path.stem in _VARIED else skip
          )
          for path in paths
      ],
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
  if config.losses.perceptual.name != 'none':
    config.losses.perceptual.checkpoint = str(tmp_path / 'weights')
  if config.discriminator.name == 'dino':
    config.discriminator.dino.checkpoint = str(tmp_path)
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


def _classifier(name):
  return distance.OutputDistance(
      classifiers.CLASSIFIERS[name](precision='default')
  )


def _abstract_networks(config):
  """The module of the perceptual loss, and all frozen variables as shapes."""
  modules = {
      'none': lambda: None,
      'lpips_vgg16': lambda: lpips.Lpips('vgg16'),
      'convnext': lambda: _classifier('convnext_small'),
      'resnet50': lambda: _classifier('resnet50'),
  }
  module = modules[config.losses.perceptual.name]()
  images = jax.ShapeDtypeStruct((1, *config.data.image_size, 3), jnp.float32)
  variables = {}
  if module is not None:
    variables['perceptual'] = jax.eval_shape(
        module.init, jax.random.key(0), images, images
    )
  if config.discriminator.name == 'dino':
    params = jax.eval_shape(
        adversarial.build_discriminator(config.discriminator).init,
        jax.random.key(0), images,
    )['params']
    variables['discriminator'] = {'backbone': params['backbone']}
  return module, variables


def _count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_configs_are_valid_and_locked(tmp_path):
  failures = []
  for path in _AUTOENCODERS:
    config = _load(path, tmp_path)
    for num_devices in (None, 8):
      try:
        configuration.check_config(config, num_devices)
      except ValueError as error:
        failures.append((path.stem, num_devices, str(error)))
    with pytest.raises(AttributeError):
      config.model.encoder.widht = 8
  assert not failures


@pytest.mark.fast_variants(
    'photos',
    'vqrae_fsq_dinov2_b',
    'imagenet256_vq_1024',
)
@pytest.mark.parametrize(
    'path', _KINDS.values(), ids=[path.stem for path in _KINDS.values()]
)
def test_config_builds_a_model_that_keeps_the_shape(path):
  config, output, variables = _trace(path)
  encoder = config.model.encoder
  size, patch = config.data.image_size, encoder.patch_size
  if encoder.name == 'pretrained':
    size = encoder.image_size or size
    patch = models.parse_architecture(encoder.architecture).patch_size
  elif encoder.name == 'conv':
    patch = 2 ** (len(encoder.conv.channel_multipliers) - 1)
  assert 'params' in variables
  assert output.reconstructions.shape == (1, *config.data.image_size, 3)
  assert output.indices.shape[:3] == (1, size[0] // patch, size[1] // patch)


# Others train with the same losses.
_WITH_NETWORKS = {
    'imagenet256_fsq_1024': ('resnet50', 'stylegan', 23_998_017),
    'vqrae_fsq_siglip_l': ('lpips_vgg16', 'dino', 5 * 1_477_249),
    'vqrae_fsq_siglip_l_stage2': ('convnext', 'dino', 5 * 1_477_249),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(_WITH_NETWORKS))
def test_the_whole_training_step_fits_together_at_full_size(name):
  config = configuration.load_config(_CONFIGS[0].parent / f'{name}.py')
  mesh = partitioning.create_mesh({'data': -1, 'fsdp': 1}, jax.devices()[:1])
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  module, variables = _abstract_networks(config)
  images = jax.ShapeDtypeStruct((2, *config.data.image_size, 3), jnp.uint8)
  step = train_step.build_train_step(model, optimizer, config, module)
  state, scalars = jax.eval_shape(step, builder.abstract, images, variables)
  # What comes out goes in again.
  assert jax.tree.structure(state) == jax.tree.structure(builder.abstract)
  for after, before in zip(
      jax.tree.leaves(state), jax.tree.leaves(builder.abstract), strict=True
  ):
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
  assert {'perceptual_loss', 'adversarial_loss'} <= scalars.keys()
  perceptual_name, discriminator, size = _WITH_NETWORKS[name]
  assert config.losses.perceptual.name == perceptual_name
  assert config.discriminator.name == discriminator
  assert _count(state.adversary.params) == size


def test_which_configs_have_networks():
  by_losses = {}
  for path, config in _AUTOENCODERS.items():
    losses = config.losses.perceptual.name, config.discriminator.name
    by_losses.setdefault(losses, set()).add(path.stem)
  assert by_losses.keys() == {
      ('none', 'none'), *(x[:2] for x in _WITH_NETWORKS.values())
  }
  large = {x.stem for x in _PRETRAINED + _CONV} - {_SMALL}
  assert by_losses['none', 'none'].isdisjoint(large)


def test_headers_give_the_command_and_name_files():
  failures = []
  for path, config in _LOADED.items():
    text = path.read_text()
    if path.stem in _DEFAULTS:
      continue
    if f'python launch.py --config=configs/{path.name}' not in text:
      failures.append((path.stem, 'command'))
    if path not in _AUTOENCODERS:
      continue
    if config.losses.perceptual.name != 'none' and not (
        '--config.losses.perceptual.checkpoint=FILE' in text
        or re.search(r'files\s+of\s+the\s+losses', text)
    ):
      failures.append((path.stem, 'files of the losses'))
  assert not failures


@pytest.mark.parametrize('name', sorted(_WITH_NETWORKS))
def test_networks_are_never_random_by_oversight(name, tmp_path):
  path = _CONFIGS[0].parent / f'{name}.py'
  fields = ['losses.perceptual.checkpoint']
  if _WITH_NETWORKS[name][1] == 'dino':
    fields.append('discriminator.dino.checkpoint')
  for field in fields:
    config = _load(path, tmp_path)
    config.update_from_flattened_dict({field: ''})
    with pytest.raises(ValueError, match=f'set --config.{field}') as error:
      configuration.check_config(config)
    assert f"{field} is ''" in str(error.value)


def test_configs_survive_json():
  failures = []
  for path, config in _LOADED.items():
    text = configuration.config_to_json(config)
    if configuration.config_from_json(text).to_dict() != config.to_dict():
      failures.append(path.stem)
  assert not failures


def test_names_of_configs_tell_their_levels():
  named = 0
  for path, config in _AUTOENCODERS.items():
    if match := re.search(r'fsq_(?:.*_)?(\d+)$', path.stem):
      levels = config.model.quantizer.fsq.levels
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


@pytest.mark.parametrize(
    'name',
    ['folder_fsq_8555', 'imagenet128_fsq_8555', 'imagenet256_fsq_1024', _SMALL],
)
def test_resizing_follows_the_image_size_unless_it_is_set(name, tmp_path):
  path = _CONFIGS[0].parent / f'{name}.py'
  config = _load(path, tmp_path)
  size, length = config.data.image_size, config.data.resize_shorter
  assert length in {112: (128,), 256: (256, 384)}.get(size[0], size)
  config.data.image_size = (2 * size[0], size[1])
  assert config.data.resize_shorter == 2 * length
  saved = configuration.config_from_json(configuration.config_to_json(config))
  assert saved.data.resize_shorter == 2 * length
  for image_size in ((), ('a', 'b')):  # The reference must not fail on these.
    config.data.image_size = image_size
    with pytest.raises(ValueError, match=r'data\.image_size is'):
      configuration.check_config(config)
  for order in (1, -1):
    config = _load(path, tmp_path)
    for name, value in [('image_size', (64, 96)), ('resize_shorter', 97)][
        ::order
    ]:
      config.data[name] = value
    assert config.data.image_size == (64, 96)
    assert config.data.resize_shorter == 97


# Configs with a pretrained encoder.


def test_a_pretrained_encoder_is_never_random_by_oversight():
  failures = []
  for path in _PRETRAINED:
    field = 'model.encoder.checkpoint'
    if path.stem == _STAGE_2:
      field = 'train.init_from'
    try:
      configuration.check_config(_LOADED[path])
      failures.append(path.stem)
    except ValueError as error:
      if not re.search(f'{field} is None.*set --config.{field}', str(error)):
        failures.append((path.stem, str(error)))
  assert not failures


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, id=path.stem)
        for path in _KINDS.values()
        if path in _PRETRAINED
    ],
)
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
    config = _LOADED[path]
    quantizer = models.build_autoencoder(
        config.model, config.data.image_size
    ).quantizer
    sizes[path.stem] = quantizer.codebook_size
  assert sizes.pop('rae_dinov2_b') == 0
  assert sizes.pop('vqrae_fsq_siglip_l_88865') == 15_360
  assert sizes.pop(_SMALL) == 1000
  assert set(sizes.values()) == {16_384}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """Random weights of small perceptual networks, by the name of the loss."""
  folder = tmp_path_factory.mktemp('weights')
  files = {'lpips_vgg16': _draw_lpips('vgg16')}
  for loss, name in (('convnext', 'convnext_small'), ('resnet50', 'resnet50')):
    shapes = json.loads(str(np.load(_FROZEN / f'{name}.npz')['shapes']))
    files[loss] = golden_networks.make_arrays(shapes)
  paths = {name: str(folder / f'{name}.safetensors') for name in files}
  for name, arrays in files.items():
    safetensors_numpy.save_file(arrays, paths[name])
  return paths


def _draw_lpips(network):
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  with pytest.MonkeyPatch.context() as patch:
    _shrink_networks(patch)
    params = jax.eval_shape(
        lpips.Lpips(network).init, jax.random.key(0), images, images
    )['params']
  rng = np.random.default_rng(0)
  arrays = {}
  for name, x in _leaves(params).items():
    deviation = np.prod((1, *x.shape[:-1])) ** -0.5
    # Heads are positive, as the true ones.
    arrays[name] = np.float32(np.abs(rng.normal(0, deviation, x.shape)))
  return arrays


def _shrink_networks(patch):
  """Perceptual networks of the same parts with fewer channels and blocks."""
  for name, build in _CLASSIFIERS.items():
    patch.setitem(classifiers.CLASSIFIERS, name, build)
  vgg16 = lpips.NETWORKS['vgg16']
  stages = tuple(
      stage._replace(channels=(8,) * len(stage.channels))
      for stage in vgg16.stages
  )
  patch.setitem(lpips.NETWORKS, 'vgg16', vgg16._replace(stages=stages))


@pytest.fixture
def shrink_losses(monkeypatch, weights):
  """Overrides for small networks and for losses that start at once."""
  _shrink_networks(monkeypatch)

  def shrink(config):
    config.losses.perceptual.checkpoint = weights.get(
        config.losses.perceptual.name, ''
    )
    config.losses.adversarial.start_step = 0
    config.discriminator.start_step = 0
    config.discriminator.optim.warmup_steps = 0
    config.discriminator.dino.update(_DINO)
    config.discriminator.stylegan.filters = 8
    config.discriminator.stylegan.multipliers = (2, 4)

  return shrink


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
  """Returns the states before and after, and the scalars, of JSON of a config.

  Reduced, some configs are the same.
  """
  config = configuration.config_from_json(text)
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  frozen = frozen_networks.load_networks(config, mesh)
  before = jax.device_get(frozen.variables)
  step = jax.jit(
      train_step.build_train_step(
          model, optimizer, config, frozen.perceptual
      ),
      in_shardings=(
          builder.shardings,
          partitioning.batch_sharding(mesh),
          jax.tree.map(lambda x: x.sharding, frozen.variables),
      ),
      out_shardings=(builder.shardings, partitioning.replicated(mesh)),
      donate_argnums=0,
  )
  dataset = data.build_dataset(config.data, split='train', seed=0)
  iterator = dataset.iterator()
  state = builder.create()
  first = jax.device_get(state)
  rows = []
  for _ in range(2):
    images = partitioning.shard_batch(next(iterator)['image'], mesh)
    state, scalars = step(state, images, frozen.variables)
    rows.append({name: float(x) for name, x in scalars.items()})
  _assert_same(before, jax.device_get(frozen.variables))
  return first, jax.device_get(state), rows


def _two_good_steps(config):
  first, last, rows = _two_steps(configuration.config_to_json(config))
  for row in rows:
    assert np.all(np.isfinite(list(row.values())))
    if config.losses.perceptual.name != 'none':
      assert row['perceptual_loss'] > 0
      assert row['adversarial_weight'] > 0
  assert last.skipped_steps == 0
  # No part of a frozen network is part of the state.
  assert not any('backbone' in name for name in _leaves(last))
  return first, last


def _assert_same(tree, expected):
  tree, expected = _leaves(tree), _leaves(expected)
  assert tree.keys() == expected.keys()
  for name, x in expected.items():
    assert tree[name].tobytes() == x.tobytes(), name


def _assert_that_all_moves(first, last):
  """Of an autoencoder's state or of a discriminator's."""
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


def _check_what_trains(config, state):
  """Of stage 1, that the encoder is frozen; of stage 2, that nothing is."""
  names = {'projector_in': config.model.projector_in.name,
           'projector_out': config.model.projector_out.name}
  trained = {'decoder'} | {x for x, name in names.items() if name != 'none'}
  if config.model.quantizer.name == 'simvq':
    trained.add('quantizer')
  frozen = {'encoder'}
  if config.losses.distillation_weight:
    trained, frozen = trained | frozen, set()
  assert set(state.frozen_params) == frozen
  assert set(state.params) == trained


@pytest.mark.slow
def test_parts_train_or_are_frozen_as_their_stage_says():
  for path in _PRETRAINED:
    config = _shrink(configuration.load_config(path))
    config.discriminator.name = 'none'
    builder = train_state.build_state_builder(
        config,
        models.build_autoencoder(config.model, config.data.image_size),
        optim.build_optimizer(config.optim, config.train.num_steps),
        partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1]),
    )
    assert bool(config.losses.distillation_weight) == (path.stem == _STAGE_2)
    _check_what_trains(config, builder.abstract)


@pytest.mark.slow
@_reduced(_PRETRAINED)
def test_a_reduced_copy_trains_what_it_should(path, shrink_losses):
  config = _shrink(configuration.load_config(path))
  shrink_losses(config)
  first, last = _two_good_steps(config)
  _check_what_trains(config, first)
  _assert_that_all_moves(first, last)
  if config.discriminator.name != 'none':
    _assert_that_all_moves(first.adversary, last.adversary)
  _assert_same(
      (last.frozen_params, last.teacher_params),
      (first.frozen_params, first.teacher_params),
  )


# Configs with the convolutional autoencoder of the FSQ paper.


@pytest.mark.slow
@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, id=path.stem)
        for path in _CONV
        if path.stem in ('imagenet128_fsq_8555', 'imagenet256_fsq_1024')
    ],
)
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


@pytest.mark.slow
@_reduced(_CONV)
def test_a_reduced_conv_autoencoder_trains(path, shrink_losses):
  config = configuration.load_config(path)
  shrink_losses(config)
  config.model.encoder.conv.update(
      filters=32, channel_multipliers=(1, 2), num_res_blocks=1
  )
  config.data.source = 'synthetic'
  config.data.resize_shorter = 0
  config.data.image_size = (8, 8)
  config.data.batch_size = 8
  first, last = _two_good_steps(config)
  assert set(first.params) - {'quantizer'} == {'encoder', 'decoder'}
  _assert_that_all_moves(first, last)
  _assert_that_all_moves(first.adversary, last.adversary)
