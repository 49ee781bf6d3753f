"""Projectors: maps against NumPy, features and sizes in closed form."""

import functools

import chex
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import quantizers
from fsq_jax.models import builder
from fsq_jax.models import projectors
from fsq_jax.runtime import partitioning

_WITH_DIGITS = {
    'symmetric': quantizers.FSQ(levels=(8, 5, 3)),
    'paper': quantizers.FSQ(levels=(8, 5, 3), convention='paper'),
    'preserve_symmetry': quantizers.FSQ(
        levels=(4, 5), convention='preserve_symmetry'
    ),
    'grouped': quantizers.GroupedFSQ(levels=(5, 4), num_groups=2),
    'residual': quantizers.ResidualFSQ(levels=(5, 4), num_stages=3),
    'lfq': quantizers.LFQ(num_bits=4),
    'bsq': quantizers.BSQ(num_bits=4),
}
_each_quantizer = pytest.mark.parametrize('name', _WITH_DIGITS)


def test_standardized_latents_have_mean_0_and_variance_1_in_training():
  module = projectors.StandardizedProjectorIn(code_dim=3)
  key_0, key_1 = jax.random.split(jax.random.key(0))
  latents = 5 * jax.random.normal(key_0, (8, 4, 5, 6)) + 2
  variables = jax.jit(module.init)(key_1, latents)

  @jax.jit
  def train(latents):
    return module.apply(variables, latents, train=True, mutable='batch_stats')

  z, updated = train(latents)
  assert z.dtype == jnp.float32
  np.testing.assert_allclose(np.mean(z, (0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(np.var(z, (0, 1, 2)), 1, rtol=1e-4)

  # Running averages start at mean 0 and variance 1 and move by 1 %.
  projected = np.float64(latents) @ np.float64(
      variables['params']['linear']['kernel']
  )
  mean = 0.01 * projected.mean((0, 1, 2))
  variance = 0.99 + 0.01 * projected.var((0, 1, 2))
  statistics = updated['batch_stats']['standardize']
  np.testing.assert_allclose(statistics['mean'], mean, rtol=1e-4)
  np.testing.assert_allclose(statistics['var'], variance, rtol=1e-4)

  # They, and not the batch's, are what evaluation uses.
  evaluated = jax.jit(module.apply)({**variables, **updated}, latents[:1])
  np.testing.assert_allclose(
      evaluated, (projected[:1] - mean) / np.sqrt(variance + 1e-5), rtol=1e-4
  )

  # The batch is the global one, whatever the number of devices.
  mesh = partitioning.create_mesh({'data': 8, 'fsdp': 1})
  sharded = train(partitioning.shard_batch(np.asarray(latents), mesh))
  chex.assert_trees_all_close(sharded, (z, updated), rtol=1e-4, atol=1e-5)


def test_linear_projector_is_the_same_in_training():
  module = projectors.LinearProjectorIn(code_dim=3)
  # Some tokens are so small that the epsilon of LayerNorm counts.
  key_0, key_1 = jax.random.split(jax.random.key(0))
  latents = jax.random.normal(key_0, (2, 4, 5, 6))
  latents *= jnp.logspace(-3, 1, 5)[:, None]
  variables = jax.jit(module.init)(key_1, latents)
  p = jax.tree.map(lambda x: np.float64(x) + 0.1, variables['params'])
  variables = {'params': jax.tree.map(np.float32, p)}
  x = np.float64(latents)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + 1e-6
  )
  x = x * p['norm']['scale'] + p['norm']['bias']
  expected = x @ p['linear']['kernel'] + p['linear']['bias']
  for train in (False, True):
    z = jax.jit(module.apply, static_argnames='train')(
        variables, latents, train=train
    )
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-5)


def _entropies(module, variables, quantizer):
  """Entropy of the digits of each channel, in shares of log2(L) bits."""
  latents = jax.random.normal(jax.random.key(1), (4, 32, 32, 64))

  @jax.jit
  def digits(variables):
    z = module.apply(variables, latents)
    return quantizer.codes_to_digits(quantizer.apply({}, z).z_q)

  shares = []
  for channel, level in enumerate(quantizer.levels):
    counts = np.bincount(
        np.ravel(digits(variables)[..., channel]), minlength=level
    )
    p = counts[counts > 0] / counts.sum()
    shares.append(-np.sum(p * np.log2(p)) / np.log2(level))
  return shares


@pytest.mark.slow
@pytest.mark.parametrize(
    'level', [8, *(pytest.param(x, marks=pytest.mark.slow) for x in (5, 17))]
)
@pytest.mark.parametrize(
    ('module', 'bound'),
    [
        (projectors.LinearProjectorIn(4), 'tanh'),
        (projectors.MlpProjectorIn(4, width=512, bound='none'), 'tanh'),
        (projectors.MlpProjectorIn(4, width=512, bound='tanh'), 'clip'),
        pytest.param(
            projectors.AttentionProjectorIn(
                4, width=256, depth=1, num_heads=4, mlp_dim=64, bound='none'
            ),
            'tanh',
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_digits_of_unit_normal_latents_start_evenly(module, bound, level):
  quantizer = quantizers.FSQ(levels=(level,) * 4, bound=bound)
  latents = jnp.zeros((1, 2, 2, 64))
  variables = jax.jit(module.init)(jax.random.key(0), latents)
  assert min(_entropies(module, variables, quantizer)) > 0.95


@pytest.mark.slow
def test_gains_of_the_original_waste_a_fifth_to_a_third_of_the_bits():
  module = projectors.MlpProjectorIn(4, width=512, bound='tanh')
  variables = jax.jit(module.init)(
      jax.random.key(0), jnp.zeros((1, 2, 2, 64))
  )
  params = variables['params']
  gain = params['output']['gain']
  np.testing.assert_array_equal(gain, np.ones(4))
  output = {**params['output'], 'gain': 3 * gain}
  variables = {'params': {**params, 'output': output}}
  for level, share in ((5, 0.794), (8, 0.716), (17, 0.625)):
    quantizer = quantizers.FSQ(levels=(level,) * 4, bound='clip')
    np.testing.assert_allclose(
        np.mean(_entropies(module, variables, quantizer)), share, atol=0.02
    )


@pytest.mark.parametrize(('channels', 'expected'), [(768, 660_490),
                                                    (1024, 792_074)])
def test_mlp_has_the_size_of_the_original(channels, expected):
  module = projectors.MlpProjectorIn(5, width=512, bound='none')
  shapes = jax.eval_shape(
      module.init, jax.random.key(0), jnp.zeros((1, 2, 2, channels))
  )
  assert sum(x.size for x in jax.tree.leaves(shapes)) == expected


@pytest.mark.slow
def test_attention_mixes_tokens_of_one_image():
  module = projectors.AttentionProjectorIn(
      3, width=8, depth=1, num_heads=2, mlp_dim=12, bound='none'
  )
  latents = jax.random.normal(jax.random.key(0), (2, 2, 3, 6))
  variables = jax.jit(module.init)(jax.random.key(1), latents)
  apply = jax.jit(module.apply)
  before = apply(variables, latents)
  assert before.shape == (2, 2, 3, 3)
  after = apply(variables, latents.at[0, 1, 2, 0].add(1.0))
  moved = np.abs(after - before).max(-1)
  assert np.all(moved[0] > 1e-6)
  assert moved[0].argmax() == 5  # The token itself, row-major.
  assert np.all(moved[1] == 0)


@pytest.mark.parametrize('bound', ['none', 'tanh'])
def test_bound_and_gain_act_on_each_channel(bound):
  module = projectors.MlpProjectorIn(3, width=8, bound=bound)
  latents = 5 * jax.random.normal(jax.random.key(0), (2, 4, 5, 6))
  variables = jax.jit(module.init)(jax.random.key(1), latents)
  params = variables['params']
  output = {**params['output'], 'gain': np.float32([0.5, 1, 2])}
  output['linear'] = {
      'kernel': 10 * params['output']['linear']['kernel'],
      'bias': np.zeros(3, np.float32),
  }
  z = jax.jit(module.apply)({'params': {**params, 'output': output}}, latents)
  largest = np.abs(z).max((0, 1, 2))
  if bound == 'tanh':
    np.testing.assert_allclose(largest, [0.5, 1, 2], rtol=0.01)
  else:
    assert np.all(largest > [0.6, 1.2, 2.4])


@pytest.mark.parametrize(
    'build',
    [
        lambda dtype: projectors.MlpProjectorIn(3, 16, 'none', dtype),
        lambda dtype: projectors.AttentionProjectorIn(
            3, 16, 1, 2, 12, 'none', dtype
        ),
    ],
)
@pytest.mark.slow
def test_bfloat16_is_inside_of_the_hidden_layers(build):
  latents = jax.random.normal(jax.random.key(0), (2, 4, 5, 6))
  exact, module = (build(jnp.dtype(x)) for x in ('float32', 'bfloat16'))
  variables = jax.jit(module.init)(jax.random.key(1), latents)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
  expected, z = (jax.jit(m.apply)(variables, latents) for m in (exact, module))
  assert z.dtype == jnp.float32
  error = np.abs(z - expected).max() / np.abs(expected).max()
  assert 1e-4 < error < 2e-2


def test_latents_that_are_no_codes_are_refused():
  module = projectors.NoProjectorIn(3)
  with pytest.raises(ValueError, match='Latents have 8 channels, codes 3'):
    module.apply({}, jnp.zeros((1, 2, 2, 8)))


def test_unknown_bound_is_refused():
  module = projectors.MlpProjectorIn(3, width=8, bound='clip')
  with pytest.raises(ValueError, match=r"'clip'; known: \['none', 'tanh'\]"):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 2, 8)))


def _num_parameters(module, *inputs):
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  return sum(x.size for x in jax.tree.leaves(shapes['params']))


def _random_digits(quantizer, num=50):
  shape = (num, *quantizer.index_shape, len(quantizer.levels))
  return np.random.default_rng(0).integers(0, quantizer.levels, shape)


def _levels(quantizer, width=6):
  """The module, a random table of embeddings, and its function of codes."""
  module = projectors.LevelsProjectorOut(width, quantizer.clone())
  codes = jnp.zeros((1, quantizer.code_dim))
  shapes = jax.eval_shape(module.init, jax.random.key(0), codes)
  table = np.random.default_rng(1).normal(size=shapes['params']['table'].shape)
  table = np.float32(table)
  apply = functools.partial(module.apply, {'params': {'table': table}})
  return table, jax.jit(apply)


@_each_quantizer
def test_code_steps_are_distances_of_neighbouring_codes(name):
  quantizer = _WITH_DIGITS[name]
  lower = np.zeros((*quantizer.index_shape, len(quantizer.levels)), np.int32)
  upper = lower + 1
  if name == 'residual':
    upper[1:] = 0  # The steps of the first stage.
  lower, upper = map(quantizer.digits_to_codes, (lower, upper))
  np.testing.assert_allclose(quantizer.code_steps, upper - lower, rtol=1e-6)


def test_codes_without_a_grid_have_steps_of_1():
  vq = quantizers.VectorQuantizer(codebook_size=16, code_dim=3)
  assert vq.code_steps == (1.0, 1.0, 1.0)
  assert builder.code_scales(vq) == (1.0, 1.0, 1.0)


@_each_quantizer
def test_scaled_codes_span_two(name):
  quantizer = _WITH_DIGITS[name]
  if name == 'residual':
    quantizer = quantizers.ResidualFSQ(levels=(5, 4), num_stages=1)
  lower = np.zeros((*quantizer.index_shape, len(quantizer.levels)), np.int32)
  upper = lower + np.asarray(quantizer.levels) - 1
  lower, upper = map(quantizer.digits_to_codes, (lower, upper))
  scales = np.asarray(builder.code_scales(quantizer))
  np.testing.assert_allclose((upper - lower) / scales, 2, rtol=1e-6)


@pytest.mark.parametrize(
    ('width', 'expected'), [(768, 1_381_632), (1024, 2_366_464)]
)
def test_fourier_has_the_size_of_the_original(width, expected):
  module = projectors.FourierProjectorOut(
      width, num_frequencies=128, sigma=0.187, code_steps=(1.0,) * 5
  )
  assert _num_parameters(module, jnp.zeros((1, 2, 2, 5))) == expected


def test_mlp_and_levels_have_sizes_in_closed_form():
  mlp = projectors.MlpProjectorOut(12, code_scales=(3.5, 2.0, 1.0))
  codes = jnp.zeros((1, 2, 2, 3))
  assert _num_parameters(mlp, codes) == 4 * 12 + 2 * 13 * 12
  for quantizer, rows in (
      (quantizers.FSQ(levels=(8, 5, 3)), 8 + 5 + 3),
      (quantizers.GroupedFSQ(levels=(5, 4), num_groups=2), 2 * 9),
      (quantizers.ResidualFSQ(levels=(5, 4), num_stages=3), 3 * 9),
      (quantizers.LFQ(num_bits=4), 4 * 2),
  ):
    levels = projectors.LevelsProjectorOut(12, quantizer)
    codes = jnp.zeros((1, 2, 2, quantizer.code_dim))
    assert _num_parameters(levels, codes) == rows * 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ('sigma', 'similarities'),
    # Of neighbours half, two steps apart 1/16; sigma 10: nothing in common.
    [(0.187, (0.5016, 0.0633, 0.002)), (10.0, (0.0, 0.0, 0.0))],
)
def test_similarity_of_fourier_features_has_a_closed_form(sigma, similarities):
  module = projectors.FourierProjectorOut(
      2, num_frequencies=20_000, sigma=sigma, code_steps=(1.0, 0.25)
  )
  codes = jnp.zeros((1, 2))
  constants = jax.jit(module.init)(jax.random.key(0), codes)['constants']
  frequencies = constants['frequencies']
  np.testing.assert_allclose(np.std(frequencies), sigma, rtol=0.02)
  for channel in range(2):
    steps = np.zeros((4, 2), np.float32)
    steps[:, channel] = np.arange(4) - 1.5
    x = np.float64(projectors.fourier_features(steps, frequencies))
    # Features have length 1 up to sqrt(num_frequencies).
    similarity = x @ x[0] / len(frequencies[0])
    np.testing.assert_allclose(
        similarity, (1.0, *similarities), atol=0.03
    )
    delta = np.arange(1, 4)
    np.testing.assert_allclose(
        np.exp(-2 * np.pi**2 * sigma**2 * delta**2), similarities, atol=1e-3
    )


@pytest.mark.slow
def test_fourier_counts_in_steps_of_the_codes():
  coarse, fine = (
      projectors.FourierProjectorOut(
          3, num_frequencies=7, sigma=0.187, code_steps=steps
      )
      for steps in ((1.0, 1.0), (1.0, 0.25))
  )
  codes = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
  variables = jax.jit(coarse.init)(jax.random.key(0), codes)
  expected = jax.jit(coarse.apply)(variables, codes)
  actual = jax.jit(fine.apply)(variables, codes * np.float32([1, 0.25]))
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        name
        if name == 'preserve_symmetry'
        else pytest.param(name, marks=pytest.mark.slow)
        for name in _WITH_DIGITS
    ],
)
def test_levels_are_sums_of_embeddings_of_digits(name):
  quantizer = _WITH_DIGITS[name]
  table, apply = _levels(quantizer)
  digits = _random_digits(quantizer)
  codes = quantizer.digits_to_codes(digits)
  rows = digits.reshape(len(digits), -1)
  sizes = np.resize(quantizer.levels, rows.shape[1])
  rows = rows + np.cumsum(sizes) - sizes
  np.testing.assert_allclose(
      apply(codes), table[rows].sum(1), rtol=1e-5, atol=1e-5
  )
  # Codes of a quantizer are those of its indices, to the last bit.
  indices = quantizer.digits_to_indices(digits)
  z_q = quantizer.apply({}, jnp.asarray(codes)).z_q
  np.testing.assert_array_equal(
      apply(z_q),
      apply(quantizer.indices_to_codes(quantizer.codes_to_indices(z_q))),
  )
  np.testing.assert_array_equal(
      apply(codes), apply(quantizer.indices_to_codes(indices))
  )
  assert np.all(np.isnan(apply(jnp.full_like(codes, jnp.nan))))


def test_levels_are_piecewise_linear():
  quantizer = quantizers.FSQ(levels=(4, 3))
  table, apply = _levels(quantizer)
  # Channel 0 has codes -1.5 ... 1.5; channel 1 stays at its first level.
  x = np.float32([-2.0, -1.5, -1.25, -0.5, 0.2, 1.5, 1.7])
  codes = np.stack([x, np.full_like(x, -1)], axis=1)
  expected = np.stack(
      [np.interp(x, np.arange(4) - 1.5, table[:4, c]) for c in range(6)], 1
  )
  np.testing.assert_allclose(apply(codes), expected + table[4], atol=1e-5)


def test_gradient_of_levels_reaches_the_latents():
  quantizer = quantizers.FSQ(levels=(4, 3))
  table, apply = _levels(quantizer)
  direction = np.random.default_rng(2).normal(size=6).astype(np.float32)
  z = np.float32(np.arctanh(np.array([[-0.99, 0.01], [0.3, -0.99]])))

  @jax.jit
  def gradient(z):
    return jax.grad(
        lambda z: jnp.sum(apply(quantizer.apply({}, z).z_q) @ direction)
    )(z)

  # Digits 0 and 1 of the first vector, 2 and 0 of the second.
  slopes = np.stack([
      np.stack([table[1] - table[0], (table[6] - table[4]) / 2]),
      np.stack([(table[3] - table[1]) / 2, table[5] - table[4]]),
  ])
  half = np.array([1.5, 1.0])
  expected = slopes @ direction * half * (1 - np.tanh(z) ** 2)
  np.testing.assert_allclose(gradient(z), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('convention', ['symmetric', 'preserve_symmetry'])
@pytest.mark.parametrize('level', [2, 3, 4, 5, 8])
def test_slope_of_levels_is_a_central_difference(level, convention):
  # The other channel has a slope of its own, which must not mix in.
  quantizer = quantizers.FSQ(levels=(level, 3), convention=convention)
  table, apply = _levels(quantizer)
  digits = np.stack([np.arange(level), np.arange(level) % 3], axis=1)
  codes = np.float64(quantizer.digits_to_codes(digits))
  knots = np.sort(codes[:, 0])
  step = knots[1] - knots[0]

  def line(x):
    """The first channel's part of the result, [level, width], by NumPy."""
    columns = np.float64(table[:level]).T
    return np.stack([np.interp(x, knots, column) for column in columns], 1)

  # Half a step to either side; at the ends, to the inner side alone.
  upper = np.minimum(knots + step / 2, knots[-1])
  lower = np.maximum(knots - step / 2, knots[0])
  expected = (line(upper) - line(lower)) / (upper - lower)[:, None]
  assert np.abs(expected).max() > 0.1

  def slope(codes):
    tangent = jnp.zeros_like(codes).at[:, 0].set(1)
    return jax.jvp(apply, (codes,), (tangent,))[1]

  codes = jnp.asarray(codes, jnp.float32)
  np.testing.assert_allclose(
      jax.jit(slope)(codes), expected, rtol=1e-5, atol=1e-5
  )


def test_levels_start_as_a_linear_map():
  quantizer = quantizers.FSQ(levels=(8, 5, 3))
  module = projectors.LevelsProjectorOut(200, quantizer.clone())
  codes = quantizer.digits_to_codes(_random_digits(quantizer))
  variables = jax.jit(module.init)(jax.random.key(0), codes)
  y = np.float64(jax.jit(module.apply)(variables, codes))
  x = np.float64(codes)
  kernel, *_ = np.linalg.lstsq(x, y, rcond=None)
  np.testing.assert_allclose(x @ kernel, y, atol=1e-5)
  # Kernels for codes in [-1, 1], of variance 1 / 3.
  stddev = np.std(kernel * [[3.5], [2], [1]])
  np.testing.assert_allclose(stddev, 3**-0.5, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['fourier', 'levels', 'linear', 'mlp', 'none'])
def test_bfloat16_is_what_the_decoder_gets(name):
  quantizer = quantizers.FSQ(levels=(8, 5, 3))
  section = {
      'fourier': {'num_frequencies': 16, 'sigma': 0.187}
  }.get(name, {})
  codes = quantizer.digits_to_codes(_random_digits(quantizer))
  width = 3 if name == 'none' else 24

  def build(dtype):
    return builder.build_projector_out(
        {'name': name, name: section}, width, quantizer,
        {'dtype': jnp.dtype(dtype)},
    )

  variables = jax.jit(build('float32').init)(jax.random.key(0), codes)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
  expected = jax.jit(build('float32').apply)(variables, codes)
  y = jax.jit(build('bfloat16').apply)(variables, codes)
  assert expected.dtype == jnp.float32
  assert y.dtype == jnp.bfloat16
  error = np.abs(np.float32(y) - expected).max() / np.abs(expected).max()
  assert error < 2e-2
  assert (error > 1e-4) == (name != 'none')  # These codes are exact.


def test_codes_that_are_no_decoder_latents_are_refused():
  module = projectors.NoProjectorOut(8)
  with pytest.raises(ValueError, match='3 channels, the decoder 8'):
    module.apply({}, jnp.zeros((2, 3)))


def test_levels_of_a_quantizer_without_digits_are_refused():
  vq = quantizers.VectorQuantizer(codebook_size=16, code_dim=3)
  with pytest.raises(ValueError, match='VectorQuantizer have no levels'):
    projectors.LevelsProjectorOut(8, vq)
