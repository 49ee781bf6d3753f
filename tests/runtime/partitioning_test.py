"""Meshes, sharding rules, and what devices hold of a real train state."""

import contextlib
import functools
import pathlib
import socket
import subprocess
import sys
import types

import chex
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.analysis import figures
from fsq_jax.checkpoints import saved_model
from fsq_jax.models import native_size
from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import partitioning
from fsq_jax.train import latent_statistics
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step

pytestmark = pytest.mark.usefixtures('all_devices')

P = jax.sharding.PartitionSpec
_ROOT = pathlib.Path(__file__).parents[2]
_RUN = _ROOT / 'tests' / 'testdata' / 'run'
_FSDP = (('.*', 'fsdp'),)


def _mesh(data, fsdp, tensor=1):
  return partitioning.create_mesh(
      {'data': data, 'fsdp': fsdp, 'tensor': tensor}
  )


def _specs(tree):
  """Path to PartitionSpec of a tree of shardings."""
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): x.spec
      for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def _spec(shape, rules, *, fsdp=4, tensor=1, min_size=0):
  """PartitionSpec that the rules give to an array of one path."""
  shardings = partitioning.state_shardings(
      {'block': {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}},
      _mesh(-1, fsdp, tensor),
      rules,
      min_size,
  )
  return shardings['block']['kernel'].spec


def _builder(mesh, field='seed', value=0):
  config = configuration.load_config(_ROOT / 'configs' / 'default.py')
  config.model.projector_in.name = 'standardized'
  config.update_from_flattened_dict({field: value})
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  return train_state.build_state_builder(config, model, optimizer, mesh)


@pytest.fixture(scope='module')
def builder():
  """The default config's state on 2 x 4 devices."""
  return _builder(_mesh(2, 4))


@pytest.mark.parametrize(
    ('sizes', 'shape'),
    [
        ({'data': 2, 'fsdp': 4}, (2, 4, 1)),  # As of configs without tensor.
        ({'fsdp': 4, 'data': 2, 'tensor': 1}, (2, 4, 1)),
        ({'data': -1, 'fsdp': 1, 'tensor': 1}, (8, 1, 1)),
        ({'data': -1, 'fsdp': 2, 'tensor': 2}, (2, 2, 2)),
        ({'data': 4, 'fsdp': -1, 'tensor': 1}, (4, 2, 1)),
        ({'data': 1, 'fsdp': 2, 'tensor': -1}, (1, 2, 4)),
    ],
)
def test_mesh_has_the_sizes_asked_for(sizes, shape):
  mesh = partitioning.create_mesh(sizes)
  assert mesh.axis_names == ('data', 'fsdp', 'tensor')
  assert mesh.devices.shape == shape
  assert set(mesh.devices.flat) == set(jax.devices())
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_mesh_takes_the_devices_that_it_is_given():
  devices = jax.devices()[2:4]
  mesh = partitioning.create_mesh({'data': -1, 'fsdp': 1}, devices)
  assert set(mesh.devices.flat) == set(devices)


@pytest.mark.parametrize(
    'sizes', [(3, 1), (4, 4), (-1, 3), (-1, 16), (-1, -1), (-1, 0), (0, 8),
              (-2, -4), (-1, -8)]
)  # fmt: skip
def test_mesh_that_does_not_fill_the_devices_is_refused(sizes):
  with pytest.raises(ValueError, match='does not fill 8 devices') as error:
    _mesh(*sizes)
  for axis, size in zip(('data', 'fsdp'), sizes, strict=True):
    assert f"'{axis}': {size}" in str(error.value)


@pytest.mark.parametrize(
    'sizes', [{'data': 8}, {'data': 1, 'model': 8}, {}]
)
def test_mesh_of_other_axes_is_refused(sizes):
  with pytest.raises(ValueError, match=r"sizes for \['data', 'fsdp', 'tens"):
    partitioning.create_mesh(sizes)


def test_first_rule_that_is_found_in_the_path_wins():
  rules = [
      ('^kernel', (None, 'data')),  # Not found: the path is block/kernel.
      ('kernel$', ('fsdp', None)),
      ('block', 'replicate'),
  ]
  assert _spec((8, 8), rules) == P('fsdp')
  assert _spec((8, 8), rules[::-1]) == P()


@pytest.mark.parametrize(
    ('shape', 'spec'),
    [
        ((4, 16, 8), P(None, 'fsdp')),
        ((8, 8), P(None, 'fsdp')),  # The last of equally large ones.
        ((10, 4), P(None, 'fsdp')),  # 4 devices do not divide 10.
        ((12,), P('fsdp')),
        ((), P()),
    ],
)
def test_fsdp_takes_the_largest_axis_that_divides(shape, spec):
  assert _spec(shape, _FSDP) == spec


@pytest.mark.parametrize(('size', 'spec'), [(8, P()), (12, P('fsdp'))])
def test_fsdp_leaves_arrays_below_the_floor_whole(size, spec):
  assert _spec((size,), _FSDP, min_size=12) == spec


def test_fsdp_of_one_device_shards_nothing():
  assert _spec((16, 16), _FSDP, fsdp=1) == P()


@pytest.mark.parametrize(
    ('strategy', 'shape', 'spec'),
    [
        ('column', (4, 16, 8), P(None, 'fsdp', 'tensor')),
        ('column', (8, 64), P('fsdp', 'tensor')),  # Not 'fsdp' on the largest.
        ('column', (4, 8), P('fsdp', 'tensor')),  # A stack of biases.
        ('column', (8,), P('tensor')),
        ('row', (4, 16, 8), P(None, 'tensor', 'fsdp')),
        ('row', (64, 8), P('tensor', 'fsdp')),
        ('row', (64, 6), P('tensor')),
        ('column', (64, 7), P('fsdp')),  # 2 devices do not divide 7.
        ('fsdp', (64, 8), P('fsdp')),
    ],
)
def test_tensor_takes_its_axis_and_fsdp_the_largest_other_one(
    strategy, shape, spec
):
  assert _spec(shape, [('.*', strategy)], fsdp=4, tensor=2) == spec


@pytest.mark.parametrize('strategy', ['column', 'row'])
@pytest.mark.parametrize('shape', [(4, 16, 8), (8, 64), (16,), (10, 6)])
def test_without_tensor_its_strategies_are_fsdp(strategy, shape):
  assert _spec(shape, [('.*', strategy)]) == _spec(shape, _FSDP)


def test_what_nothing_divides_is_listed():
  state = {
      name: jax.ShapeDtypeStruct(shape, jnp.float32)
      for name, shape in {
          'odd': (3, 5), 'even': (4, 4), 'small': (1,), 'column': (8, 7)
      }.items()
  }
  rules = (('column', 'column'), ('.*', 'fsdp'))
  assert partitioning.list_replicated(state, _mesh(1, 4, 2), rules, 2) == {
      'odd (3, 5)': 60, 'column (8, 7)': 224
  }
  assert not partitioning.list_replicated(state, _mesh(8, 1), rules, 0)
  assert not partitioning.list_replicated(state, _mesh(1, 8), rules, 60)


@pytest.mark.slow
def test_a_state_warns_once_of_all_that_stays_whole(monkeypatch):
  warnings = []
  monkeypatch.setattr(
      train_state.logging, 'warning', lambda *a: warnings.append(a[0] % a[1:])
  )
  assert not _builder(_mesh(2, 4)).replicated
  assert not warnings
  builder = _builder(_mesh(1, 8), 'partitioning.fsdp_min_size', 0)
  # Of the 3 dimensions of codes.
  standardize = 'model_state/batch_stats/projector_in/standardize'
  assert builder.replicated == {
      f'{standardize}/mean (3,)': 12, f'{standardize}/var (3,)': 12
  }
  (warning,) = warnings
  assert ', '.join(builder.replicated) in warning


def test_tuple_names_a_mesh_axis_for_each_axis():
  assert _spec((2, 8), [('.*', ('data', 'fsdp'))]) == P('data', 'fsdp')
  assert _spec((2, 8), [('.*', (None, 'data'))]) == P(None, 'data')
  assert _spec((), [('.*', ('data', 'fsdp'))]) == P()


@pytest.mark.parametrize(
    ('shape', 'strategy'),
    [
        ((6, 8), ('fsdp', None)),  # 4 devices do not divide 6.
        ((8,), ('fsdp', None)),
        ((8, 8), ('fsdp',)),
        ((8, 8), ('model', None)),
    ],
)
def test_tuple_that_does_not_fit_is_refused(shape, strategy):
  with pytest.raises(ValueError, match='only names that divide') as error:
    _spec(shape, [('.*', strategy)])
  mesh = {'data': 2, 'fsdp': 4, 'tensor': 1}
  for part in (strategy, "'block/kernel'", shape, mesh):
    assert str(part) in str(error.value)


def test_unknown_strategy_is_refused():
  with pytest.raises(ValueError, match=r"'shard'; known: \['column', 'f"):
    _spec((8, 8), [('.*', 'shard')])


def test_array_without_a_rule_is_named():
  with pytest.raises(ValueError, match="match nothing in 'block/kernel'"):
    _spec((8, 8), [('bias', 'replicate')])


def test_paths_are_joined_by_slashes():
  tree = {'encoder': {'kernel': 0}, 'rest': [1, (2,)]}
  assert parameter_paths.tree_paths(tree) == {
      'encoder': {'kernel': 'encoder/kernel'}, 'rest': ['rest/0', ('rest/1/0',)]
  }


def test_large_kernels_of_a_state_are_sharded_and_the_rest_is_whole(builder):
  specs = _specs(builder.shardings.params)
  mlp = 'encoder/transformer/blocks/mlp'
  assert specs[f'{mlp}/in/kernel'] == P(None, None, 'fsdp')
  assert specs[f'{mlp}/out/kernel'] == P(None, 'fsdp')
  attention = 'decoder/transformer/blocks/attention'
  assert specs[f'{attention}/qkv/kernel'] == P(None, None, 'fsdp')
  assert specs[f'{attention}/out/kernel'] == P()  # 2 * 64 * 64 < 2^14.
  assert specs['projector_in/linear/kernel'] == P()
  assert builder.shardings.step.spec == P()
  assert set(_specs(builder.shardings.model_state).values()) == {P()}


@pytest.mark.parametrize(
    ('name', 'sizes'),
    [('adamw', (2, 4)), ('adamw', (2, 2, 2)), ('muon', (2, 2, 2))],
)
def test_optimizer_state_and_averages_follow_their_parameters(name, sizes):
  builder = _builder(_mesh(*sizes), 'optim.name', name)
  specs = _specs(builder.shardings.params)
  assert _specs(builder.shardings.ema_params) == specs
  found = {'mu': set(), 'nu': set()}
  for path, spec in _specs(builder.shardings.opt_state).items():
    for moment, parameters in found.items():
      _, separator, parameter = path.partition(f'/{moment}/')
      if separator:
        assert spec == specs[parameter], path
        parameters.add(parameter)
  # Muon keeps no second moment of the kernels that it is for.
  rest = {
      path for path in specs if name != 'muon' or not _is_of_muon(path)
  }
  assert found == {'mu': set(specs), 'nu': rest}
  assert (rest != set(specs)) == (name == 'muon')


def _is_of_muon(path):
  return 'blocks/' in path and path.endswith('kernel')


def test_teacher_and_adversary_follow_their_parameters():
  config = configuration.load_config(_ROOT / 'configs' / 'default.py')
  config.losses.distillation_weight = 1.0
  config.discriminator.name = 'patch'
  config.discriminator.patch.channels = 32
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(
      config, model, optimizer, _mesh(2, 2, 2)
  )
  specs = _specs(builder.shardings.params)
  teacher = _specs(builder.shardings.teacher_params)
  assert teacher == {x: specs[x] for x in specs if x.startswith('encoder/')}
  adversary = _specs(builder.shardings.adversary.params)
  assert P(None, None, None, 'fsdp') in adversary.values()
  moments = _specs(builder.shardings.adversary.opt_state)
  for path, spec in adversary.items():
    assert [
        x for y, x in moments.items() if y.endswith(f'/{path}')
    ] == [spec, spec]


@pytest.mark.slow
def test_steps_on_a_tensor_mesh_are_those_of_one_device():
  config = configuration.load_config(_ROOT / 'configs' / 'default.py')
  config.model.encoder.update(width=16, num_heads=2, mlp_dim=32, patch_size=8)
  config.optim.update(name='muon', warmup_steps=0)
  config.discriminator.name = 'patch'
  config.discriminator.patch.update(channels=32, num_stages=2)
  config.partitioning.fsdp_min_size = 0
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  step = train_step.build_train_step(model, optimizer, config)
  images = np.random.default_rng(0).integers(
      0, 256, (8, *config.data.image_size, 3), np.uint8
  )
  losses = []
  for mesh in (
      _mesh(2, 2, 2),
      partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1]),
  ):
    builder = train_state.build_state_builder(config, model, optimizer, mesh)
    jitted = jax.jit(
        step,
        in_shardings=(builder.shardings, partitioning.batch_sharding(mesh)),
        out_shardings=(builder.shardings, partitioning.replicated(mesh)),
        donate_argnums=0,
    )
    state, rows = builder.create(), []
    for _ in range(3):
      state, scalars = jitted(state, partitioning.shard_batch(images, mesh))
      names = (
          'loss', 'gradient_norm', 'discriminator_loss',
          'discriminator_gradient_norm',
      )
      rows.append([float(scalars[name]) for name in names])
    losses.append(rows)
  assert losses[0][0][0] > 1.01 * losses[0][2][0]  # It learns.
  np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.fixture(scope='module')
def states(builder):
  """The default config's state on 2 x 4 devices and on one device."""
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  return builder.create(), _builder(mesh).create()


@pytest.mark.slow
def test_a_created_state_is_what_was_announced(builder, states):
  def check(abstract, array):
    assert array.shape == abstract.shape
    assert array.dtype == abstract.dtype
    assert array.sharding == abstract.sharding

  jax.tree.map(check, builder.abstract, states[0])


@pytest.mark.slow
def test_values_do_not_depend_on_the_mesh(states):
  chex.assert_trees_all_equal(*jax.device_get(states))


@pytest.mark.slow
def test_fsdp_shrinks_what_each_device_holds(states):
  def bytes_of(device, state):
    return sum(
        shard.data.nbytes
        for x in jax.tree.leaves(state)
        for shard in x.addressable_shards
        if shard.device == device
    )

  sharded, whole = states
  total = bytes_of(jax.devices()[0], whole)
  assert total == sum(x.nbytes for x in jax.tree.leaves(whole))
  # In each of 2 stacks of 2 blocks, 64 x 192 and twice 64 x 256 float32
  # weights; parameters, average and two moments; 3/4 are elsewhere.
  split = 4 * 4 * 2 * 2 * (64 * 192 + 2 * 64 * 256)
  for device in jax.devices():
    assert bytes_of(device, sharded) == total - split * 3 // 4
  assert split > total // 2


def test_batch_on_cpus_is_ready(monkeypatch):
  waited = []
  monkeypatch.setattr(jax, 'block_until_ready', waited.append)
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  batch = partitioning.shard_batch({'image': np.zeros((2, 4))}, mesh)
  assert waited == [batch]


@pytest.mark.parametrize(
    'sizes', [(8, 1), (2, 4), (1, 8), (2, 2, 2), (1, 2, 4)]
)
def test_batch_is_split_over_data_and_fsdp(sizes):
  mesh = _mesh(*sizes)
  batch = {
      'image': np.arange(16 * 12, dtype=np.uint8).reshape(16, 2, 2, 3),
      'index': np.arange(16),
  }
  sharded = partitioning.shard_batch(batch, mesh)
  rows = []
  for name, x in sharded.items():
    assert x.sharding == partitioning.batch_sharding(mesh)
    np.testing.assert_array_equal(x, batch[name])
  for shard in sharded['index'].addressable_shards:
    assert shard.data.shape == (16 // (sizes[0] * sizes[1]),)
    rows.extend(np.asarray(shard.data))
  assert sorted(rows) == sorted([*range(16)] * mesh.shape['tensor'])


def test_replicated_arrays_are_whole_everywhere():
  x = jax.device_put(np.arange(6), partitioning.replicated(_mesh(2, 4)))
  assert len(x.addressable_shards) == 8
  assert all(shard.data.shape == (6,) for shard in x.addressable_shards)


def _small_autoencoder(projector_in, projector_out, decoder):
  """An autoencoder of 16 x 16 images in 4 x 4 tokens."""
  config = configuration.load_config(_ROOT / 'configs' / 'default.py').model
  config.encoder.update(width=8, depth=1, num_heads=2, mlp_dim=16)
  config.decoder.update(name=decoder, width=12, depth=1, num_heads=3)
  config.projector_in.name = projector_in
  config.projector_in.mlp.width = 16
  config.projector_in.attention.update(
      width=16, depth=1, num_heads=2, mlp_dim=24
  )
  config.projector_out.name = projector_out
  config.projector_out.fourier.num_frequencies = 8
  config.quantizer.fsq.levels = (8, 5, 4)
  return models.build_autoencoder(config, (16, 16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('projector_in', 'projector_out', 'decoder', 'sizes'),
    [
        ('standardized', 'levels', 'vit', (4, 2, 1)),
        # The decoder's three heads are not split, all others are.
        ('attention', 'fourier', 'mae', (2, 2, 2)),
    ],
)
def test_gradients_of_a_model_do_not_depend_on_the_mesh(
    projector_in, projector_out, decoder, sizes
):
  model = _small_autoencoder(projector_in, projector_out, decoder)
  rng = np.random.default_rng(0)
  images = np.float32(rng.uniform(-1, 1, (8, 16, 16, 3)))

  def draw(path, x):
    around = 1.0 if path[-1].key in ('scale', 'var', 'gain') else 0.0
    return np.float32(around + rng.uniform(-0.4, 0.4, x.shape))

  # No parameter is at a value, such as 0, that would hide a gradient.
  variables = jax.tree_util.tree_map_with_path(
      draw, jax.eval_shape(model.init, jax.random.key(0), images)
  )

  def loss_and_gradients(variables, images):
    def loss(params):
      output, state = model.apply(
          {**variables, 'params': params}, images, train=True,
          mutable=['batch_stats'],
      )
      error = jnp.mean(jnp.square(output.reconstructions - images))
      return error + output.quantizer_loss, (state, output.indices)

    return jax.value_and_grad(loss, has_aux=True)(variables['params'])

  mesh = _mesh(*sizes)
  rules = configuration.load_config(
      _ROOT / 'configs' / 'default.py'
  ).partitioning.rules
  shardings = partitioning.state_shardings(variables, mesh, rules, 0)
  function = jax.jit(
      loss_and_gradients,
      in_shardings=(shardings, partitioning.batch_sharding(mesh)),
      out_shardings=(None, shardings['params']),
  )
  (loss, aux), gradients = function(
      jax.device_put(variables, shardings),
      partitioning.shard_batch(images, mesh),
  )
  # Only odd axes, such as the 3 dimensions of a code, are not split in two.
  for path, x in jax.tree_util.tree_leaves_with_path(gradients):
    split = any(n % sizes[1] == 0 for n in x.shape)
    if sizes[2] > 1 and x.ndim == 3 and path[-1].key == 'kernel':
      assert 'tensor' in x.sharding.spec, path  # Of a stack of blocks.
    elif split:
      assert not x.sharding.is_fully_replicated, path
    else:
      assert x.sharding.is_fully_replicated or sizes[2] > 1, path
  (expected_loss, expected_aux), expected = jax.jit(loss_and_gradients)(
      variables, images
  )
  assert expected_loss.sharding.device_set == {jax.devices()[0]}
  assert len(np.unique(aux[1])) > 8
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  chex.assert_trees_all_close(
      jax.device_get(aux), jax.device_get(expected_aux), rtol=1e-5, atol=1e-6
  )
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  chex.assert_trees_all_close(
      jax.device_get(gradients), jax.device_get(expected), rtol=1e-4,
      atol=1e-6 * largest,
  )


@pytest.fixture(scope='module')
def restored():
  """A run of an earlier version on 2 x 4 devices: model, variables, mesh."""
  found = saved_model.find_run(_RUN)
  found.config.partitioning.mesh.update(data=2, fsdp=4)
  found.config.partitioning.fsdp_min_size = 0
  mesh = partitioning.create_mesh(found.config.partitioning.mesh)
  return found.config, *saved_model.restore(found, mesh), mesh


def _decode_tokens(config, model, variables, mesh):
  decoder = figures.Decoder(model, variables, mesh, batch_size=8)
  decoder.decode(np.zeros((8, *model.encoder.grid_size), np.int32))


def _reconstruct_tiles(config, model, variables, mesh):
  size = config.data.image_size
  image = np.zeros((2 * size[0], 4 * size[1], 3), np.uint8)
  native_size.Reconstructor(model, size, mesh)(variables, image)


def _measure_latents(config, *_):
  config = config.copy_and_resolve_references()
  config.train.init_from = str(_RUN)
  config.data.source, config.data.eval_batch_size = 'photos', 64
  latent_statistics.measure(config)


@pytest.mark.fast_variants('_reconstruct_tiles-17')
@pytest.mark.fast_limit(10)
@pytest.mark.parametrize(
    ('apply', 'num_activations'),
    [(_decode_tokens, 9), (_reconstruct_tiles, 17), (_measure_latents, 7)],
)
def test_activations_are_sharded_wherever_a_model_is_applied(
    restored, monkeypatch, apply, num_activations
):
  """Parameters are sharded, and nobody says on what mesh the images are."""
  constrain, specs = partitioning.constrain, []

  def constrain_and_look(x, *args, **kwargs):
    x = constrain(x, *args, **kwargs)
    jax.debug.inspect_array_sharding(
        x, callback=lambda sharding: specs.append(sharding.spec)
    )
    return x

  monkeypatch.setattr(partitioning, 'constrain', constrain_and_look)
  # Flax takes a callback in the body of a scan for a varying constant.
  scan = functools.partial(nn.scan, check_constancy_invariants=False)
  monkeypatch.setattr(nn, 'scan', scan)
  apply(*restored)
  assert specs == [P(('data', 'fsdp'))] * num_activations


def test_constraints_follow_the_array_and_can_be_switched_off():
  mesh = _mesh(2, 2, 2)

  def num_constraints(x, context=contextlib.nullcontext):
    def function(x):
      with context():
        y = partitioning.constrain(jnp.sin(x).reshape(8, 2, 2), tensor_axis=2)
        y = partitioning.gather_parameter(y)
        return partitioning.shard_over_all_axes(y)

    return jax.jit(function).lower(x).as_text().count('sharding_constraint')

  x = np.ones((8, 4), np.float32)
  sharded = partitioning.shard_batch(x, mesh)
  assert num_constraints(sharded) == 3
  assert num_constraints(sharded, partitioning.no_mesh) == 0
  assert num_constraints(sharded) == 3
  assert num_constraints(x) == 0
  # A batch of 2 is not divided by 4 or 8 devices.
  function = jax.jit(lambda x: partitioning.constrain(x[:2]))
  assert 'sharding_constraint' not in function.lower(sharded).as_text()


def _mesh_of_processes(processes):
  """A mesh of [data, fsdp, tensor] devices of the processes named."""
  processes = np.array(processes)
  devices = [
      types.SimpleNamespace(process_index=i) for i in processes.ravel()
  ]
  return types.SimpleNamespace(
      devices=np.array(devices).reshape(processes.shape),
      shape=dict(zip(partitioning.AXES, processes.shape, strict=True)),
  )


@pytest.mark.parametrize(
    ('processes', 'shares', 'count'),
    [
        ([[[0]], [[0]]], [0], 1),
        ([[[0]], [[0]], [[1]], [[1]]], [0, 1], 2),
        ([[[0], [0]], [[1], [1]]], [0, 1], 2),
        ([[[0, 0]], [[1, 1]]], [0, 1], 2),
        # Along 'tensor', one device of each or more.
        ([[[0, 1]]], [0, 0], 1),
        ([[[0, 0, 1, 1]]], [0, 0], 1),
        ([[[0, 1]], [[0, 1]]], [0, 0], 1),
        ([[[0, 1], [2, 3]]], [0, 0, 1, 1], 2),
        ([[[0, 1]], [[0, 1]], [[2, 3]], [[2, 3]]], [0, 0, 1, 1], 2),
        # Devices lie as their connections do, not by number.
        ([[[1]], [[0]]], [1, 0], 2),
        ([[[2, 0]], [[1, 3]], [[2, 0]], [[1, 3]]], [0, 1, 0, 1], 2),
    ],
)
def test_processes_share_a_batch_as_their_devices_do(
    processes, shares, count, monkeypatch
):
  mesh = _mesh_of_processes(processes)
  for process, index in enumerate(shares):
    monkeypatch.setattr(jax, 'process_index', lambda i=process: i)
    assert partitioning.data_shard(mesh) == (index, count)


@pytest.mark.parametrize(
    ('processes', 'parts'),
    [
        # Three devices of each, two along 'tensor'.
        ([[[0, 0]], [[0, 1]], [[1, 1]]], r'0 .* \[0, 1\] .* 1 \[1, 2\]'),
        ([[[0]], [[1]], [[1]]], r'0 .* \[0\] .* process 1 \[1, 2\]'),
        ([[[0, 1]], [[0, 0]]], r'0 .* \[0, 1\] .* process 1 \[0\]'),
    ],
)
def test_processes_that_cannot_share_a_batch_are_refused_by_all(
    processes, parts, monkeypatch
):
  mesh = _mesh_of_processes(processes)
  for process in range(2):
    monkeypatch.setattr(jax, 'process_index', lambda i=process: i)
    with pytest.raises(ValueError, match=parts) as error:
      partitioning.data_shard(mesh)
    assert f'partitioning.mesh is {mesh.shape}' in str(error.value)
    assert 'make tensor a divisor or a multiple' in str(error.value)


_PROCESS = """
import sys
import jax
import numpy as np
from fsq_jax.runtime import partitioning

process = int(sys.argv[2])
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, process)
mesh = partitioning.create_mesh({'data': 2, 'fsdp': -1})
local = np.arange(4, dtype=np.int32) + 10 * process
batch = partitioning.shard_batch(local, mesh)
total = jax.jit(lambda x: (x * x).sum())(batch)
print(batch.shape, jax.process_count(), mesh.devices.shape, int(total))
"""


@pytest.mark.slow
def test_batches_of_two_processes_become_one():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = str(free.getsockname()[1])
  processes = [
      subprocess.Popen(
          [sys.executable, '-c', _PROCESS, port, str(i)],
          cwd=_ROOT,
          env={
              'PATH': '',
              'JAX_PLATFORMS': 'cpu',
              'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
          },
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
      )
      for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  expected = sum(x**2 for x in (0, 1, 2, 3, 10, 11, 12, 13))
  for stdout, stderr in outputs:
    # The transport has printed lines of its own before.
    last = stdout.splitlines()[-1:]
    assert last == [f'(8,) 2 (2, 2, 1) {expected}'], stderr
