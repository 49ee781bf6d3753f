"""The contract of the quantizers, over everything the builder knows."""

import dataclasses
import functools
import inspect
import json
import math
import subprocess
import sys

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from fsq_jax import quantizers
from fsq_jax.quantizers import builder

# One or more small configs for every name in the builder's table.
_CONFIGS = {
    'fsq': [
        {'levels': [8, 6, 5]},
        {'levels': (8, 5, 4), 'bound': 'clip', 'commitment_weight': 0.25},
        {'levels': (8, 6, 5), 'convention': 'paper', 'eps': None},
        {'levels': (8, 6, 5), 'convention': 'vqp'},
        {'levels': (8, 2, 5), 'convention': 'preserve_symmetry'},
        {'levels': (8, 2, 5), 'bound': 'ifsq', 'bins': 'equal', 'noise': 0.5},
    ],
    'grouped_fsq': [
        {'levels': (5, 4), 'num_groups': 3},
        {'levels': (5, 4), 'num_groups': 3, 'convention': 'paper'},
    ],
    'residual_fsq': [{'levels': (8, 6, 5), 'num_stages': 3}],
    'lfq': [
        {'num_bits': 7, 'entropy_group_bits': 4, 'commitment_weight': 2.0},
        {'num_bits': 7, 'bit_order': 'lsb_first', 'entropy_weight': 0.0},
    ],
    'bsq': [{'num_bits': 7}],
    'none': [{'code_dim': 4}],
    'simvq': [
        {'codebook_size': 24, 'code_dim': 4},
        {
            'codebook_size': 24,
            'code_dim': 4,
            'metric': 'cosine',
            'gradient': 'rotation',
            'input_projection': 'linear',
            'weighting': 'legacy',
        },
    ],
    'vq': [
        {'codebook_size': 24, 'code_dim': 4},
        {
            'codebook_size': 25,
            'code_dim': 4,
            'codebook_init': 'kmeans',
            'restart': 'batch',
            'gradient': 'rotation',
        },
        {'codebook_size': 26, 'code_dim': 4, 'codebook_update': 'gradient'},
        {
            'codebook_size': 24,
            'code_dim': 4,
            'metric': 'cosine',
            'entropy_weight': 0.1,
            'restart': 'split',
        },
    ],
}
_CASES = {
    f'{name}{i}': {'name': name, **config}
    for name, configs in _CONFIGS.items()
    for i, config in enumerate(configs)
}
# One per class, and FSQ's other conventions.
_FAST = (
    'fsq0', 'fsq2', 'fsq4', 'grouped_fsq0', 'residual_fsq0', 'lfq0', 'bsq0',
    'none0', 'simvq1', 'vq0', 'vq3',
)  # fmt: skip


def _cases(*fast, of=tuple(_CASES), tokens=False):
  """Parametrizes over cases; those that are not in `fast` are slow.

  Args:
    *fast: names of the cases in the fast tier; by default `_FAST`.
    of: names of all cases.
    tokens: leaves out 'none', whose counterparts are in none_test.
  """
  return pytest.mark.parametrize('case', [
      pytest.param(
          case, marks=[] if case in (fast or _FAST) else [pytest.mark.slow]
      )
      for case in of
      if not (tokens and case.startswith('none'))
  ])  # fmt: skip


def _build(config, **fields):
  return quantizers.build_quantizer(
      ml_collections.ConfigDict({**config, **fields})
  )


def _latents(quantizer, shape=(4, 6, 7), dtype=jnp.float32):
  z = jax.random.normal(jax.random.key(0), (*shape, quantizer.code_dim))
  return z.astype(dtype)


def _init(quantizer, z):
  return jax.jit(quantizer.init)(jax.random.key(1), z)


def _apply(quantizer, variables, z):
  return jax.jit(quantizer.apply)(variables, z)


class _Example:
  """A quantizer with variables and latents; each method is compiled once."""

  def __init__(self, case):
    self.quantizer = _build(_CASES[case])
    self.z = _latents(self.quantizer)
    self.variables = _init(self.quantizer, self.z)
    self.apply = functools.partial(
        jax.jit(self.quantizer.apply), self.variables
    )
    self.out = self.apply(self.z)

  def method(self, name, x):
    """Calls a method, compiled."""
    apply = jax.jit(self.quantizer.apply, static_argnames='method')
    return apply(self.variables, x, method=name)

  @functools.cached_property
  def decoded(self):
    """Indices of the output, of the codebook and outside; codes; indices."""
    size, shape = self.quantizer.codebook_size, self.quantizer.index_shape
    numbers = np.int32([*range(size), -1, size, 2**31 - 1])
    # Repeated for every index of a code.
    numbers = numbers.reshape(-1, *(1 for _ in shape))
    numbers = np.broadcast_to(numbers, (size + 3, *shape))
    indices = np.concatenate([self.out.indices.reshape(-1, *shape), numbers])
    codes = self.method('get_codebook_entry', indices)
    return indices, codes, self.method('codes_to_indices', codes)


@functools.cache
def _example(case):
  return _Example(case)


def test_every_quantizer_of_the_builder_is_tested():
  assert sorted(builder.QUANTIZERS) == sorted(_CONFIGS)


@_cases()
def test_shapes_and_dtypes(case):
  example = _example(case)
  out, quantizer, z = example.out, example.quantizer, example.z
  assert isinstance(out, quantizers.QuantizerOutput)
  assert out._fields == ('z_q', 'loss', 'indices')
  chex.assert_shape(out.z_q, z.shape)
  chex.assert_shape(out.loss, ())
  chex.assert_shape(out.indices, (*z.shape[:-1], *quantizer.index_shape))
  assert out.z_q.dtype == jnp.float32
  assert out.loss.dtype == jnp.float32
  assert out.indices.dtype == jnp.int32
  assert np.all(np.asarray(out.indices) >= 0)
  assert np.all(np.asarray(out.indices) < quantizer.codebook_size)


@_cases(tokens=True)
def test_codes_and_indices_are_each_others_inverse(case):
  example = _example(case)
  size, dim = example.quantizer.codebook_size, example.quantizer.code_dim
  indices, codes, again = map(np.asarray, example.decoded)
  num = len(indices) - size - 3
  np.testing.assert_array_equal(codes[:num], example.out.z_q.reshape(-1, dim))
  np.testing.assert_array_equal(again[:-3], indices[:-3])
  chex.assert_shape(codes, (len(indices), dim))
  assert len(np.unique(codes[num:-3], axis=0)) == size


@_cases('fsq0', of=_FAST)
def test_compiled_equals_eager(case):
  example = _example(case)
  compiled = example.out
  eager = example.quantizer.apply(example.variables, example.z)
  np.testing.assert_array_equal(compiled.z_q, eager.z_q)
  np.testing.assert_array_equal(compiled.indices, eager.indices)
  np.testing.assert_allclose(compiled.loss, eager.loss, rtol=1e-6)


def test_training_and_evaluation_have_one_signature():
  for quantizer in builder.QUANTIZERS.values():
    parameters = inspect.signature(quantizer.__call__).parameters
    assert parameters['train'].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters['train'].default is False


@_cases()
def test_gradient_is_finite_and_reaches_every_latent(case):
  example = _example(case)
  quantizer, variables, z = example.quantizer, example.variables, example.z
  weights = np.random.default_rng(2).normal(size=z.shape).astype(np.float32)

  @jax.jit
  @jax.grad
  def gradient(z):
    return jnp.sum(quantizer.apply(variables, z).z_q * weights)

  of_z = np.asarray(gradient(z))
  assert np.all(np.isfinite(of_z))
  assert np.all(of_z != 0)


@_cases('fsq0', of=_FAST)
def test_computes_in_float32_whatever_the_latents(case):
  quantizer = _build(_CASES[case])
  z = 2 * _latents(quantizer, (4096,), jnp.bfloat16)
  variables = _init(quantizer, z)
  narrow = _apply(quantizer, variables, z)
  wide = _apply(quantizer, variables, z.astype(jnp.float32))
  assert narrow.z_q.dtype == jnp.bfloat16
  assert narrow.loss.dtype == jnp.float32
  np.testing.assert_array_equal(narrow.indices, wide.indices)
  np.testing.assert_array_equal(narrow.z_q, wide.z_q.astype(jnp.bfloat16))
  np.testing.assert_array_equal(narrow.loss, wide.loss)


# Evaluation is a part of training, but for the codebook's own update.
@pytest.mark.slow
@pytest.mark.parametrize(
    ('case', 'axis_type', 'train'),
    [
        *((case, 'Auto', True) for case in _CASES),
        *((case, 'Explicit', True) for case in ('fsq0', 'lfq0', 'vq0')),
        ('vq0', 'Explicit', False),
    ],
)
def test_results_do_not_depend_on_the_number_of_devices(
    case, axis_type, train
):
  config = _CASES[case]
  quantizer = _build(config)
  z = 2 * _latents(quantizer, (64, 16))
  variables = _init(quantizer, z)
  axis_types = (jax.sharding.AxisType[axis_type],)
  mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types)
  sharding = jax.NamedSharding(mesh, jax.P('data'))

  @jax.jit
  def apply(variables, z):
    return quantizer.apply(
        variables,
        z,
        train=train,
        mutable=['codebook'],
        rngs={'quantizer': jax.random.key(2)},
    )

  one, one_after = apply(variables, z)
  many, many_after = apply(variables, jax.device_put(z, sharding))
  assert len(many.indices.sharding.device_set) == 8
  np.testing.assert_array_equal(many.indices, one.indices)
  # K-means comes before the lookup, and devices add in another order.
  tolerance = 1e-5 if train and 'codebook_init' in config else 0
  np.testing.assert_allclose(many.z_q, one.z_q, rtol=0, atol=tolerance)
  np.testing.assert_allclose(many.loss, one.loss, rtol=1e-6)
  chex.assert_trees_all_close(
      jax.device_get(many_after),
      jax.device_get(one_after),
      rtol=1e-5,
      atol=1e-6,
  )


# Quantizers with statistics of the whole batch, and one with a mean only.
_WITH_STATISTICS = {
    'lfq': {'name': 'lfq', 'num_bits': 4, 'entropy_group_bits': 3},
    'bsq': {'name': 'bsq', 'num_bits': 4},
    'ema': {'name': 'vq', 'codebook_size': 24, 'code_dim': 4},
    'kmeans_batch': {
        'name': 'vq',
        'codebook_size': 24,
        'code_dim': 4,
        'codebook_init': 'kmeans',
        'restart': 'batch',
        'dead_share': 0.9,
        'entropy_weight': 0.1,
    },
    'split': {
        'name': 'vq',
        'codebook_size': 24,
        'code_dim': 4,
        'metric': 'cosine',
        'restart': 'split',
        'decay': 0.5,
        'dead_share': 0.9,
    },
    'gradient': {
        'name': 'vq',
        'codebook_size': 24,
        'code_dim': 4,
        'codebook_update': 'gradient',
        'entropy_weight': 1.0,
    },
    'fsq': {
        'name': 'fsq',
        'levels': (4, 3),
        'commitment_weight': 0.1,
        'diversity_weight': 1.0,
    },
}
_AXIS = 'replicas'


def _split_by(kind, function):
  """Maps (state, z) over 8 parts of z; the state is the same on each.

  Returns:
    A function of the state and z to z_q, loss, indices and gradient of the
    whole batch, and the states [8, ...] of the replicas.
  """
  if kind.startswith('shard_map'):
    mesh = jax.make_mesh((8,), (_AXIS,), (jax.sharding.AxisType.Auto,))
    batch, whole = jax.P(_AXIS), jax.P()
    mapped = jax.jit(jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(whole, batch),
        out_specs=((batch, whole, batch, batch), whole),
        # Where it is checked, JAX proves that replicas have the same state.
        check_vma=kind == 'shard_map',
    ))  # fmt: skip

    def call(state, z):
      out, state = mapped(state, z)
      shards = jax.tree.map(
          lambda x: np.stack([shard.data for shard in x.addressable_shards]),
          state,
      )
      return out, shards

    return call
  if kind == 'pmap':
    mapped = jax.pmap(function, _AXIS, in_axes=(None, 0))
  else:
    mapped = jax.jit(jax.vmap(function, (None, 0), axis_name=_AXIS))

  def call(state, z):
    (z_q, loss, *rest), state = mapped(state, z.reshape(8, -1, *z.shape[1:]))
    z_q, *rest = (x.reshape(-1, *x.shape[2:]) for x in (z_q, *rest))
    return (z_q, loss[0], *rest), state

  return call


# The kinds differ in how an axis is reduced; these two have all reductions.
@pytest.mark.slow
@pytest.mark.parametrize(('name', 'kind'), [
    *((name, 'shard_map') for name in _WITH_STATISTICS),
    *((name, 'vmap') for name in ('lfq', 'kmeans_batch')),
    ('kmeans_batch', 'shard_map_unchecked'),
    ('lfq', 'pmap'), ('kmeans_batch', 'pmap'),
])  # fmt: skip
def test_replicas_with_an_axis_name_equal_one_device(name, kind):
  one = _build(_WITH_STATISTICS[name])
  replica = _build(_WITH_STATISTICS[name], axis_name=_AXIS)
  assert replica.spec() == one.spec()
  batches = np.random.default_rng(0).normal(size=(3, 32, 5, one.code_dim))
  batches = batches.astype(np.float32)
  state = _init(one, batches[0])
  chex.assert_trees_all_equal(_init(replica, batches[0]), state)

  def train(quantizer, state, z):
    def loss(z):
      out, changed = quantizer.apply(
          state, z, train=True, mutable=['codebook']
      )
      value = out.loss
      if quantizer is replica:
        value = jax.lax.pmean(value, _AXIS)
      return value, (out, {**state, **changed})

    # pmean's gradient is the part of this replica, or eight times it; which
    # one, depends on the kind.
    (value, (out, state)), gradient = jax.value_and_grad(loss, has_aux=True)(z)
    return (out.z_q, value, out.indices, gradient), state

  on_replicas = _split_by(kind, functools.partial(train, replica))
  on_one = jax.jit(functools.partial(train, one))
  for z in batches:
    (z_q, loss, indices, gradient), states = on_replicas(state, z)
    expected, state = on_one(state, z)
    np.testing.assert_array_equal(indices, expected[2])
    np.testing.assert_allclose(z_q, expected[0], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(loss, expected[1], rtol=1e-5, atol=1e-6)
    factor = 1 if kind == 'shard_map' else 8
    np.testing.assert_allclose(
        gradient / factor, expected[3], rtol=1e-4, atol=1e-6
    )
    for of_replicas, x in zip(
        jax.tree.leaves(states), jax.tree.leaves(state), strict=True
    ):
      assert of_replicas.shape == (8, *x.shape)
      for copy in of_replicas:
        np.testing.assert_array_equal(copy, of_replicas[0])
      np.testing.assert_allclose(of_replicas[0], x, rtol=1e-4, atol=1e-5)
    # The next step has the same state for both.
    state = jax.tree.map(lambda x: jnp.asarray(x[0]), states)


@pytest.mark.slow
def test_an_axis_may_be_several():
  one = _build(_WITH_STATISTICS['kmeans_batch'])
  two = _build(_WITH_STATISTICS['kmeans_batch'], axis_name=['a', 'b'])
  assert two.axis_name == ('a', 'b')
  assert hash(two) != hash(one)
  z = np.random.default_rng(0).normal(size=(2, 4, 10, 4)).astype(np.float32)
  variables = _init(one, z)

  def train(quantizer, z):
    return quantizer.apply(variables, z, train=True, mutable=['codebook'])

  inner = jax.vmap(functools.partial(train, two), axis_name='b')
  out, state = jax.jit(jax.vmap(inner, axis_name='a'))(z)
  expected, expected_state = jax.jit(functools.partial(train, one))(z)
  np.testing.assert_array_equal(out.indices, expected.indices)
  for i in np.ndindex(2, 4):
    chex.assert_trees_all_close(
        jax.tree.map(lambda x, i=i: x[i], state), expected_state,
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
  # Evaluation needs no axis.
  two.apply(variables, z)


@pytest.mark.parametrize('name', ['lfq', 'bsq', 'ema', 'fsq'])
def test_wrong_axis_names_are_refused(name):
  for axis_name in ('', (), 1, True, ('a', 1), {'a'}):
    with pytest.raises(ValueError, match=r'axis_name is .*; use None, the na'):
      _build(_WITH_STATISTICS[name], axis_name=axis_name)


_WRONG = {
    'levels': [
        512, '888', '8 8 8', np.array([8, 8, 8]), (True, 8, 8), (8.0, 8, 8),
        ('8', '8'), (8, (8,)), None, {8, 5}, range(3, 6), (), (8, -8),
        (np.True_, 8), (2**70, 8),
    ],
    'int': [
        True, np.True_, '3', '', 3.0, np.float32(3), None, (3,), [3],
        np.array([3]), -1, 0, float('nan'),
    ],
    'channel_axis': [True, None, '1', 1.0, (1,), [1]],
    'float': [True, '0.1', [0.1], math.inf, math.nan, 10**400, (0.1,)],
    'str': [None, 1, [], {}, ('tanh',), '', 'TANH', True],
}  # fmt: skip
_GOOD = {'int': [np.int64(2), np.uint8(2)], 'float': [np.float64(0.1)]}


def _kind_of(field):
  """Key of the table of wrong values for a dataclass's field."""
  if field.name in _WRONG:
    return field.name
  kinds = [kind for kind in ('int', 'float', 'str') if kind in str(field.type)]
  return kinds[0]


@pytest.mark.parametrize('config', [
    pytest.param({'name': name, **configs[0]}, id=name)
    for name, configs in _CONFIGS.items()
])  # fmt: skip
def test_constructors_check_the_type_of_every_field(config):
  fields = {
      field.name: _kind_of(field)
      for field in dataclasses.fields(_build(config))
      if field.name not in ('parent', 'name', 'axis_name')
  }
  for name, kind in fields.items():
    for value in _WRONG[kind]:
      with pytest.raises(ValueError, match=name):
        quantizers.build_quantizer({**config, name: value})
    if name == 'num_stages' or kind not in _GOOD:
      continue
    for value in _GOOD[kind]:
      quantizer = quantizers.build_quantizer({**config, name: value})
      # NumPy scalars are neither JSON nor weakly typed.
      assert type(getattr(quantizer, name)) is type(value.item())
      json.dumps(quantizer.spec())
      assert hash(quantizer) == hash(quantizer)


@_cases(tokens=True)
def test_nan_is_never_a_token(case):
  example = _example(case)
  out = example.apply(example.z.at[1, 0, 0, 0].set(jnp.nan))
  indices = np.asarray(out.indices).reshape(*example.z.shape[:-1], -1)
  spoiled = np.zeros(example.z.shape[:-1], bool)
  spoiled[1, 0, 0] = True
  np.testing.assert_array_equal(indices.min(-1) == -1, spoiled)
  z_q = np.asarray(out.z_q)
  assert np.isnan(z_q[1, 0, 0, 0])
  assert not np.any(np.isnan(z_q[~spoiled]))
  _, codes, again = map(np.asarray, example.decoded)
  assert np.all(np.isnan(codes[-3:]))
  assert np.all(again[-3:] == -1)


@pytest.mark.parametrize(
    'case',
    ['fsq0', *(pytest.param(x, marks=pytest.mark.slow) for x in _FAST[1:])],
)
def test_channels_may_stand_on_another_axis(case):
  config = _CASES[case]
  last, first = _build(config), _build(config, channel_axis=1)
  z = _latents(last, (2, 4, 3))  # [B, H, W, C]
  variables = _init(last, z)
  expected = _apply(last, variables, z)
  out = _apply(first, variables, jnp.moveaxis(z, -1, 1))
  np.testing.assert_array_equal(out.indices, expected.indices)
  np.testing.assert_array_equal(out.z_q, jnp.moveaxis(expected.z_q, -1, 1))
  np.testing.assert_allclose(out.loss, expected.loss, rtol=1e-6)
  apply = jax.jit(first.apply, static_argnames='method')
  np.testing.assert_array_equal(
      apply(variables, out.z_q, method='codes_to_indices'), out.indices
  )
  if config['name'] != 'none':
    np.testing.assert_array_equal(
        apply(variables, out.indices, method='indices_to_codes'), out.z_q
    )


@_cases()
def test_wrong_latents_are_refused_by_name(case):
  config = _CASES[case]
  quantizer = _build(config)
  dim = quantizer.code_dim
  with pytest.raises(ValueError, match=f'{dim + 1} channels .* {dim};'):
    quantizer.apply({}, jnp.zeros((2, dim + 1)))
  with pytest.raises(ValueError, match='int32'):
    quantizer.apply({}, jnp.zeros((2, dim), jnp.int32))
  with pytest.raises(ValueError, match=r'shape \(\)'):
    quantizer.apply({}, jnp.zeros(()))
  with pytest.raises(ValueError, match='without an axis 1'):
    _build(config, channel_axis=1).apply({}, jnp.zeros((dim,)))
  match = 'no tokens' if config['name'] == 'none' else 'float32'
  with pytest.raises(ValueError, match=match):
    quantizer.apply({}, jnp.zeros((2,)), method='indices_to_codes')


@_cases('fsq0', of=_FAST, tokens=True)
def test_works_inside_another_module(case):
  class Tokenizer(nn.Module):
    quantizer: nn.Module

    def __call__(self, z):
      return self.quantizer(z)

    def decode(self, indices):
      return self.quantizer.indices_to_codes(indices)

  quantizer = _build(_CASES[case])
  z = _latents(quantizer)
  tokenizer = Tokenizer(quantizer)
  variables = _init(tokenizer, z)
  out = _apply(tokenizer, variables, z)

  def decode(indices):
    return tokenizer.apply(variables, indices, method='decode')

  np.testing.assert_array_equal(jax.jit(decode)(out.indices), out.z_q)
  np.testing.assert_array_equal(jax.vmap(decode)(out.indices), out.z_q)


def test_specs_survive_json_and_differ():
  specs = [_build(config).spec() for config in _CASES.values()]
  assert json.loads(json.dumps(specs)) == specs
  for spec, config in zip(specs, _CASES.values(), strict=True):
    assert spec['name'] == config['name']
    assert specs.count(spec) == 1


@pytest.mark.slow
def test_conversion_is_an_attribute_of_the_package():
  # In a process of its own: here others have imported it already.
  program = 'from fsq_jax import quantizers; quantizers.convert.convert_codes'
  subprocess.run([sys.executable, '-c', program], check=True)


@pytest.mark.parametrize(
    ('config', 'match'),
    [
        ({'name': 'fsk', 'levels': (8,)}, "'fsk'; known: .*'fsq'"),
        ({'levels': (8,)}, 'None; known'),
        ({'name': 'fsq', 'levels': (8,), 'levles': 1}, 'levles.*levels'),
        ({'name': 'fsq', 'levels': None}, 'levels is None'),
    ],
)
def test_builder_names_what_it_does_not_know(config, match):
  with pytest.raises(ValueError, match=match):
    quantizers.build_quantizer(config)


def test_builder_takes_placeholders_and_leaves_the_config_alone():
  config = ml_collections.ConfigDict({
      'name': 'fsq',
      'levels': [8, 6, 5],
      'eps': ml_collections.config_dict.placeholder(float),
      'commitment_weight': ml_collections.config_dict.placeholder(float),
  })
  quantizer = quantizers.build_quantizer(config.lock())
  assert quantizer == quantizers.FSQ(levels=(8, 6, 5))
  assert config.name == 'fsq'


@pytest.mark.slow
@pytest.mark.parametrize('case', _FAST)
def test_x64_and_strict_promotion_change_no_result(case):
  config = _CASES[case]

  def run():
    quantizer = _build(config)
    z = np.random.default_rng(0).normal(size=(8, 9, quantizer.code_dim))
    z = jnp.asarray(z, jnp.float32)
    variables = _init(quantizer, z)

    @jax.jit
    def train(variables, z):
      out, changed = quantizer.apply(
          variables, z, train=True, mutable=['codebook'],
          rngs={'quantizer': jax.random.key(2)},
      )
      return out, {**variables, **changed}

    results = [variables]
    for _ in range(2):
      out, variables = train(variables, z)
      results += [out, variables]
    if config['name'] != 'none':
      decode = {'method': 'indices_to_codes'}
      codes = quantizer.apply(variables, out.indices, **decode)
      results.append(codes)
      results.append(
          quantizer.apply(variables, codes, method='codes_to_indices')
      )
      # Of NumPy's usual integers, too.
      indices = np.asarray(out.indices, np.int64)
      results.append(quantizer.apply(variables, indices, **decode))
    return jax.device_get(results)

  expected = run()
  # Accidental float64 arrays then meet float32 arrays.
  with jax.enable_x64(True), jax.numpy_dtype_promotion('strict'):
    actual = run()
  chex.assert_trees_all_equal_dtypes(actual, expected)
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
