"""Tests of the configs of generators: valid, built, lowered, reduced, trained.

Nothing of full size is computed. A reduced copy of each config trains on random
tokens; without FSQ_JAX_ALL_CONFIGS=1 only some of them do.
"""

import functools
import math
import os
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from experiments.accelerators import steps
from fsq_jax import configuration
from fsq_jax.generators import builder
from fsq_jax.generators import embeddings
from fsq_jax.generators import training
from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state

pytestmark = pytest.mark.usefixtures('all_devices')

_FOLDER = pathlib.Path(__file__).parents[2] / 'configs'
_CONFIGS = {
    path.stem: config
    for path in sorted(_FOLDER.glob('*.py'))
    if configuration.is_generator(config := configuration.load_config(path))
    and path.stem != 'default_generator'
}
_MASKGIT = 'imagenet256_maskgit_8555'
_MASKGIT_64000 = 'imagenet256_maskgit_64000'
_LLAMAGEN = 'imagenet256_llamagen_'
_IMAGENET = [name for name in _CONFIGS if name.startswith('imagenet256_')]
_LEVEL_HEADS = {'model.embedding': 'auto', 'model.head': 'auto'}
# Codes, tokens per side and classes of their tokenizers.
_FORMATS = {
    'cifar10_autoregressive': (512, 8, 10),
    'cifar10_maskgit': (512, 8, 10),
    'digits_autoregressive': (625, 4, 10),
    'digits_maskgit': (625, 4, 10),
    'imagenet256_llamagen_b': (16_384, 16, 1000),
    'imagenet256_llamagen_l': (16_384, 16, 1000),
    'imagenet256_maskgit_64000': (64_000, 16, 1000),
    'imagenet256_maskgit_8555': (1000, 16, 1000),
}


@functools.cache
def _find_format(tokenizer):
  """The format of the tokens of a tokenizer's config, by its workdir."""
  config = _changed(_MASKGIT, {'tokens.tokenizer': tokenizer})
  return steps.find_format(config)


def _changed(name, fields):
  config = _CONFIGS[name].copy_and_resolve_references()
  config.update_from_flattened_dict(fields)
  return config


def _format(config):
  return _find_format(config.tokens.tokenizer)


def _state_builder(config, tokens, mesh):
  """The model of a config and the builder of its state."""
  model = builder.build_model(config, tokens)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  return model, training.build_state_builder(config, model, optimizer, mesh)


def _count(config, tokens):
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  _, states = _state_builder(config, tokens, mesh)
  return train_state.num_parameters(states.abstract_variables['params'])


def _vq(codebook_size):
  """The format of ImageNet tokens of a VQ, which has no levels."""
  tokens = _find_format('runs/imagenet256_fsq_1024')
  return tokens._replace(quantizer={'name': 'vq'}, codebook_size=codebook_size)


def test_configs_are_valid_and_locked():
  assert _CONFIGS.keys() == _FORMATS.keys()
  for config in _CONFIGS.values():
    for num_devices in (None, 8):
      configuration.check_config(config, num_devices)
    with pytest.raises(AttributeError):
      config.model.widht = 8


@pytest.mark.parametrize('name', _FORMATS)
def test_configs_fit_the_tokens_of_their_tokenizers(name):
  config = _CONFIGS[name]
  tokens = _format(config)
  codebook_size, side, num_classes = _FORMATS[name]
  assert tokens.codebook_size == codebook_size
  assert math.prod(tokens.quantizer['levels']) == codebook_size
  assert tokens.grid == (side, side)
  assert len(tokens.label_names) == num_classes
  model = builder.build_model(config, tokens)
  assert model.num_tokens == side**2
  builder.build_objective(config.losses)
  builder.build_sampling(config.sample, config.model.kind, model.num_tokens)


# With 1,024 and 16,384 codes, as published (MaskGIT's output bias covers
# classes and the mask, too, 1,001 values more: 172,457,193).
@pytest.mark.parametrize(
    ('name', 'codebook_size', 'count'),
    [
        (_MASKGIT, 1024, 172_457_193 - 1001),
        (f'{_LLAMAGEN}b', 16_384, 110_889_216),
        (f'{_LLAMAGEN}l', 16_384, 342_912_000),
    ],
)
def test_parameters_are_those_of_the_published_models(
    name, codebook_size, count
):
  config = _CONFIGS[name]
  assert _count(config, _vq(codebook_size)) == count
  # As shipped: FSQ tokens, a row of the table and a logit for each code.
  tokens = _format(config)
  missing = codebook_size - tokens.codebook_size
  each = {'flat_tied': 768 + 1}.get(config.model.head, 0)
  assert _count(config, tokens) == count - missing * each


@pytest.mark.fast_variants('imagenet256_maskgit_64000--42.6')
@pytest.mark.parametrize(
    ('name', 'millions'),
    [
        (_MASKGIT, 3.4),
        (_MASKGIT_64000, -42.6),
        (f'{_LLAMAGEN}b', -19.2),
        (f'{_LLAMAGEN}l', -22.9),
    ],
)
def test_level_heads_replace_the_table_and_the_logits(name, millions):
  tokens = _format(_CONFIGS[name])
  flat = {'model.embedding': 'table', 'model.head': 'flat_tied'}
  if 'llamagen' in name:
    flat['model.head'] = 'flat'
  config = _changed(name, flat)
  difference = _count(_changed(name, _LEVEL_HEADS), tokens)
  difference -= _count(config, tokens)
  assert round(difference / 1e6, 1) == millions
  levels = tokens.quantizer['levels']
  w = builder.build_architecture(config.model).width
  d, k = len(levels), tokens.codebook_size
  # Rows of the masked token; MLPs, projection, positions, levels and norm.
  rows = sum(levels) + d
  head = d * 2 * w**2 + sum(levels) * (w + 1) + d * w + sum(levels) * w + w
  flat = {'flat': k * w, 'flat_tied': k + w**2 + 3 * w}[config.model.head]
  assert difference == (rows * w + head) - ((k + 1) * w + flat)


@pytest.mark.parametrize('name', _IMAGENET)
def test_large_states_are_sharded_over_all_devices(name):
  config = _CONFIGS[name]
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 8, 'tensor': 1}
  _, states = _state_builder(config, _format(config), mesh)
  assert not states.replicated
  sizes = [
      (math.prod(x.sharding.shard_shape(x.shape)), x.size)
      for x in jax.tree.leaves(states.abstract)
  ]
  on_a_device, total = map(sum, zip(*sizes, strict=True))
  # The rest are vectors of less than fsdp_min_size values.
  assert 1 / 8 <= on_a_device / total < 0.127


# Axes of the kernels of blocks, [depth, in, out], on 4 x 2 devices.
_AXES = {
    'attention/qkv/kernel': (None, 'tensor', 'fsdp'),
    'attention/out/kernel': (None, 'tensor', 'fsdp'),
    'mlp/in/kernel': (None, 'fsdp', 'tensor'),
    'mlp/gate/kernel': (None, 'fsdp', 'tensor'),
    'mlp/out/kernel': (None, 'tensor', 'fsdp'),
}


@pytest.mark.parametrize('name', [_MASKGIT, f'{_LLAMAGEN}b'])
def test_heads_and_channels_of_blocks_are_sharded_over_tensor(name):
  config = _CONFIGS[name]
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 4, 'tensor': 2})
  _, states = _state_builder(config, _format(config), mesh)
  params = states.abstract.params
  paths = jax.tree.leaves(parameter_paths.tree_paths(params))
  specs = {
      path.partition('blocks/')[2]: tuple(x.sharding.spec)
      for path, x in zip(paths, jax.tree.leaves(params), strict=True)
  }
  kernels = {x for x in specs if x.endswith('kernel')}
  expected = _AXES.keys()
  if config.model.mlp == 'gelu':
    expected -= {'mlp/gate/kernel'}
  assert kernels == expected
  for path in expected:
    assert specs[path] == _AXES[path], path


@pytest.mark.slow
@pytest.mark.parametrize('name', _CONFIGS)
def test_the_training_step_lowers_for_eight_devices(name):
  config = _CONFIGS[name]
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  assert mesh.size == 8
  lowered = steps.build_step(config, mesh).lowered
  state, scalars = lowered.out_info
  model, states = _state_builder(config, _format(config), mesh)
  # What comes out goes in again, as it is sharded.
  assert jax.tree.structure(state) == jax.tree.structure(states.abstract)
  for after, before in zip(
      jax.tree.leaves(state), jax.tree.leaves(states.abstract), strict=True
  ):
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
  assert {'loss', 'nll', 'gradient_norm'} <= scalars.keys()
  (_, batch), _ = lowered.args_info
  assert batch['tokens'].shape == (config.tokens.batch_size, model.num_tokens)
  text = lowered.as_text()
  assert 'num_partitions = 8' in text
  # Matmuls are in the dtype of the config.
  dtype = {'bfloat16': 'bf16', 'float32': 'f32'}[config.model.dtype]
  assert f'x{dtype}>' in text


# All of the parts; the others combine them otherwise.
_VARIED = ('cifar10_autoregressive', _MASKGIT, _MASKGIT_64000)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name not in _VARIED
                and not os.environ.get('FSQ_JAX_ALL_CONFIGS'),
                reason='Its parts train in others; set FSQ_JAX_ALL_CONFIGS=1.',
            ),
        )
        for name in _CONFIGS
    ],
)
def test_a_reduced_generator_trains(name):
  config = _changed(name, {
      'model.preset': 'tiny', 'model.depth': 0, 'model.width': 0,
      'model.num_heads': 0, 'tokens.batch_size': 8, 'optim.warmup_steps': 0,
      'train.num_steps': 2,
  })  # fmt: skip
  tokens = _format(config)._replace(grid=(2, 4))
  # A step compiles sooner for one device.
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  model, states = _state_builder(config, tokens, mesh)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  step = states.compile_step(
      training.build_train_step(
          model, builder.build_objective(config.losses), optimizer, config
      ),
      training.abstract_batch(8, model.num_tokens, mesh),
  )
  rng = np.random.default_rng(0)
  state = states.create()
  first, rows = jax.device_get(state), []
  for _ in range(2):
    batch = {
        'tokens': rng.integers(0, tokens.codebook_size, (8, 8), np.int32),
        'labels': rng.integers(0, len(tokens.label_names), 8, np.int32),
    }
    batch['labels'][0] = embeddings.NO_LABEL
    state, scalars = step(state, partitioning.shard_batch(batch, mesh))
    rows.append({name: float(x) for name, x in scalars.items()})
  last = jax.device_get(state)
  assert last.skipped_steps == 0
  # Untied outputs start at zero: all codes are equally probable.
  if config.model.head != 'flat_tied':
    expected = math.log(tokens.codebook_size)
    assert rows[0]['nll'] == pytest.approx(expected, rel=1e-5)
  assert np.isfinite(rows[1]['loss'])
  _assert_that_all_moves(first, last)


def _assert_that_all_moves(first, last):
  paths = jax.tree.leaves(parameter_paths.tree_paths(first.params))
  moments = optax.tree.get(last.opt_state, 'mu')
  for path, before, after, moment in zip(
      paths,
      *map(jax.tree.leaves, (first.params, last.params, moments)),
      strict=True,
  ):
    # Blocks are stacked: each of them counts.
    axes = tuple(range(1, before.ndim)) if '/blocks/' in path else None
    assert np.all(np.any(after != before, axis=axes)), path
    # Weight decay alone moves kernels, too, but leaves no moment.
    assert np.all(np.any(moment != 0, axis=axes)), path
    assert jnp.all(jnp.isfinite(after)), path
