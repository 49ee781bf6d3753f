"""FSQ conventions, bounds, bins, noise and levels, against their formulas."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsq_jax.quantizers import FSQ
from fsq_jax.quantizers import conventions
from fsq_jax.quantizers import recommended_levels

_TESTDATA = pathlib.Path(__file__).parents[1] / 'testdata'
# Outputs of vector-quantize-pytorch; keys are <levels>/<array>.
_GOLDEN = dict(np.load(_TESTDATA / 'fsq_preserve_symmetry.npz'))
_OPTIMIZED = {
    'xla_backend_optimization_level': 3,
    'xla_llvm_disable_expensive_passes': False,
}


def _call(fsq, z, **options):
  return jax.jit(lambda z: fsq.apply({}, z, **options))(z)


def _normal(shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _waves(d):
  n, j = np.mgrid[1:9, 1 : d + 1]
  return (1.5 * np.sin(0.7 * n + 1.3 * j)).astype(np.float32)


def _away_from_boundaries(steps, levels):
  """Where float32 cannot round float64 steps otherwise."""
  gap = np.abs(steps - np.floor(steps) - 0.5)
  return gap > 4 * np.spacing(np.float32(levels))


def _assert_digits(fsq, z, steps):
  """Checks level indices against float64 steps before clipping and rounding."""
  levels = np.asarray(fsq.levels)
  digits = np.asarray(fsq.indices_to_digits(_call(fsq, z).indices))
  away = _away_from_boundaries(steps, levels)
  assert np.mean(away) > 0.999
  expected = np.clip(np.round(steps), 0, levels - 1)
  np.testing.assert_array_equal(digits[away], expected[away])


@pytest.mark.parametrize(
    'options',
    [pytest.param({}, marks=pytest.mark.slow), _OPTIMIZED],
    ids=['plain', 'fused'],
)
@pytest.mark.parametrize('name', sorted({k.split('/')[0] for k in _GOLDEN}))
def test_preserve_symmetry_equals_the_library_bit_for_bit(name, options):
  fsq = FSQ([int(level) for level in name.split('x')], 'preserve_symmetry')
  z = _GOLDEN[f'{name}/z']
  # Where the compiler may fuse a product and a sum, it must not matter.
  call = jax.jit(lambda z: fsq.apply({}, z)).lower(z)
  out = call.compile(compiler_options=options)(z)
  np.testing.assert_array_equal(out.z_q, _GOLDEN[f'{name}/zhat'])
  np.testing.assert_array_equal(out.indices, _GOLDEN[f'{name}/indices'])
  assert float(out.loss) == 0


def test_preserve_symmetry_rounds_halves_up():
  fsq = FSQ((8, 6, 4, 2), 'preserve_symmetry')
  digits = fsq.indices_to_digits(_call(fsq, jnp.zeros(4)).indices)
  np.testing.assert_array_equal(digits, [4, 3, 2, 1])


def test_preserve_symmetry_gradient_is_that_of_tanh():
  fsq = FSQ((8, 6, 5), 'preserve_symmetry')
  z = _waves(3)
  gradient = jax.jit(jax.grad(lambda z: jnp.sum(fsq(z).z_q)))(z)
  np.testing.assert_allclose(gradient, 1 - np.tanh(z) ** 2, atol=1e-6)


@pytest.mark.parametrize(('levels', 'share'), [
    ((8, 5, 5, 5), 0.0105),
    pytest.param((8, 8, 8, 6, 5), 0.0163, marks=pytest.mark.slow),
])  # fmt: skip
def test_vqp_widens_and_shifts_by_the_arctanh(levels, share):
  z = _normal((200_000, len(levels)))
  L = np.asarray(levels)
  half = (L - 1) * 1.001 / 2
  offset = np.where(L % 2, 0, 0.5)
  shift = np.arctanh(offset / half)
  steps = np.tanh(np.float64(z) + shift) * half - offset + L // 2
  vqp, paper = FSQ(levels, 'vqp'), FSQ(levels, 'paper')
  _assert_digits(vqp, z, steps)
  # The fraction of tokens that differ was measured on the implementations.
  differ = np.mean(_call(vqp, z).indices != _call(paper, z).indices)
  np.testing.assert_allclose(differ, share, atol=1e-3)
  # All that separates 'vqp' from 'paper' with its eps is arctanh for tan.
  almost = _call(FSQ(levels, 'paper', eps=-1e-3), z).indices
  assert 0 < np.mean(_call(vqp, z).indices != almost) < 1e-3
  indices = np.arange(vqp.codebook_size)
  np.testing.assert_array_equal(
      jax.jit(vqp.indices_to_codes)(indices),
      jax.jit(paper.indices_to_codes)(indices),
  )


def test_ifsq_is_a_scaled_sigmoid():
  fsq = FSQ((8, 6, 5), bound='ifsq')
  digits = fsq.indices_to_digits(_call(fsq, _waves(3)).indices)
  np.testing.assert_array_equal(
      np.asarray(digits) @ (1, 8, 48),  # published first dimension fastest
      (22, 13, 50, 153, 209, 225, 187, 142),
  )
  z = _normal((30_000, 3))
  half = np.asarray([3.5, 2.5, 2])
  sigmoid = 1 / (1 + np.exp(-1.6 * np.float64(z)))
  _assert_digits(fsq, z, (2 * sigmoid - 1) * half + half)
  gradient = jax.jit(jax.grad(lambda z: jnp.sum(fsq(z).z_q)))(z)
  expected = half * 3.2 * sigmoid * (1 - sigmoid)
  np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize(
    ('bound', 'y'),
    [
        ('tanh', np.tanh),
        ('ifsq', lambda z: np.tanh(0.8 * z)),
        ('clip', lambda z: z),
    ],
)
def test_equal_bins_split_the_range_evenly(bound, y):
  fsq = FSQ((8, 5, 2), bound=bound, bins='equal')
  z = _normal((30_000, 3))
  y = y(np.float64(z))
  digits = np.asarray(fsq.indices_to_digits(_call(fsq, z).indices))
  L = np.asarray(fsq.levels)
  steps = y * L / 2 + (L - 1) / 2
  _assert_digits(fsq, z, steps)
  away = _away_from_boundaries(steps, L)
  even = np.clip(np.floor(L * (y + 1) / 2), 0, L - 1)
  np.testing.assert_array_equal(digits[away], even[away])
  error = np.clip(np.round(steps), 0, L - 1) - steps
  np.testing.assert_allclose(_call(fsq, z).loss, np.mean(error**2), rtol=1e-4)


@pytest.mark.parametrize(
    ('fields', 'gain', 'entropies'),
    [
        ({'convention': 'paper'}, None, (2.3043, 2.966, 4.056)),
        ({}, None, (2.3047, 2.979, 4.057)),
        ({'bound': 'ifsq'}, None, (2.2205, 2.9085, 4.017)),
        ({'bound': 'ifsq', 'bins': 'equal'}, None, (2.3212, 2.9968, 4.078)),
        ({'bound': 'clip'}, None, (2.3122, 2.926, 3.82)),
        ({'bound': 'clip'}, 3, (1.8438, 2.147, 2.555)),
    ],
)
@pytest.mark.slow
def test_occupancy_of_bins_by_normal_latents(fields, gain, entropies):
  # Quantiles in place of the samples on which the numbers were measured.
  z = jax.scipy.special.ndtri((jnp.arange(50_000) + 0.5) / 50_000)
  z = z if gain is None else gain * jnp.tanh(z)
  for level, entropy in zip((5, 8, 17), entropies, strict=True):
    indices = _call(FSQ((level,), **fields), z[:, None]).indices
    shares = np.bincount(indices, minlength=level) / len(z)
    np.testing.assert_allclose(
        -np.sum(shares * np.log2(shares)), entropy, atol=2e-3
    )


@pytest.mark.parametrize('bound', ['tanh', 'ifsq', 'clip'])
@pytest.mark.parametrize(
    'bins', ['rounded', pytest.param('equal', marks=pytest.mark.slow)]
)
def test_two_levels_are_the_sign(bound, bins):
  fsq = FSQ((2, 2, 2), bound=bound, bins=bins)
  z = _normal((1000, 3))
  z_q, _, indices = _call(fsq, z)
  np.testing.assert_array_equal(z_q, np.where(z > 0, 0.5, -0.5))
  np.testing.assert_array_equal(indices, np.asarray(z > 0) @ (4, 2, 1))
  gradient = jax.jit(jax.grad(lambda z: jnp.sum(fsq(z).z_q)))(z)
  assert np.all(np.asarray(gradient) > 0)


def _noisy(fsq, z, seed=0):
  """Applies in training, with a key."""

  def apply(z, key):
    return fsq.apply({}, z, train=True, rngs={'quantizer': key})

  return jax.jit(apply)(z, jax.random.key(seed))


@pytest.mark.parametrize(('convention', 'noise_per'), [
    ('paper', 'example'),
    pytest.param('paper', 'element', marks=pytest.mark.slow),
    pytest.param('symmetric', 'example', marks=pytest.mark.slow),
    pytest.param('symmetric', 'element', marks=pytest.mark.slow),
])  # fmt: skip
def test_noise_moves_codes_and_nothing_else(convention, noise_per):
  fields = {'levels': (8, 8, 8, 6, 5), 'convention': convention}
  fsq = FSQ(**fields, noise=0.7, noise_per=noise_per)
  z = 3 * _normal((40, 2000, 5))
  clean, noisy = _call(FSQ(**fields), z), _noisy(fsq, z)
  np.testing.assert_array_equal(noisy.indices, clean.indices)
  np.testing.assert_array_equal(noisy.loss, clean.loss)
  step = {'symmetric': 1, 'paper': 1 / np.asarray((4, 4, 4, 3, 2))}[convention]
  noise = np.asarray(noisy.z_q - clean.z_q) / step
  assert np.max(np.abs(noise)) <= 0.7 + 1e-5
  np.testing.assert_allclose(np.mean(noise), 0, atol=4e-3)
  amplitudes = np.max(np.abs(noise), axis=(1, 2))
  if noise_per == 'element':
    np.testing.assert_allclose(np.std(noise), 0.7 / np.sqrt(3), rtol=1e-2)
    np.testing.assert_allclose(amplitudes, 0.7, rtol=1e-2)
  else:
    # Uniform within every example, up to an amplitude of its own.
    np.testing.assert_allclose(
        np.std(noise, axis=(1, 2)), amplitudes / np.sqrt(3), rtol=2e-2
    )
    np.testing.assert_allclose(np.mean(amplitudes), 0.35, atol=0.15)
    assert np.min(amplitudes) < 0.1
    assert np.max(amplitudes) > 0.6
  evaluated = _call(fsq, z)
  np.testing.assert_array_equal(evaluated.z_q, clean.z_q)
  other = _noisy(fsq, z, seed=1)
  assert np.mean(other.z_q == noisy.z_q) < 0.01


def test_noise_leaves_the_gradient_alone():
  z = _normal((6, 3))
  fsq = FSQ((8, 6, 5), noise=0.5)

  def total(z, train):
    rngs = {'quantizer': jax.random.key(0)}
    return jnp.sum(fsq.apply({}, z, train=train, rngs=rngs).z_q)

  gradient = jax.jit(jax.grad(total), static_argnums=1)
  np.testing.assert_array_equal(gradient(z, True), gradient(z, False))


@pytest.mark.slow
@pytest.mark.parametrize('noise_per', ['element', 'example'])
def test_noise_does_not_depend_on_the_number_of_devices(noise_per):
  fsq = FSQ((8, 6, 5), noise=0.5, noise_per=noise_per)
  z = _normal((16, 4, 3))
  mesh = jax.make_mesh((8,), ('data',))
  sharded = jax.device_put(z, jax.NamedSharding(mesh, jax.P('data')))
  one, many = _noisy(fsq, z), _noisy(fsq, sharded)
  assert len(many.z_q.sharding.device_set) == 8
  np.testing.assert_array_equal(many.z_q, one.z_q)
  single = _noisy(fsq, z[0, 0])
  assert single.z_q.shape == (3,)
  assert single.indices.shape == ()


def test_noise_asks_for_its_key():
  fsq = FSQ((8, 6, 5), noise=0.5)
  match = "noise draws .*'quantizer': key"
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(lambda z: fsq.apply({}, z, train=True), jnp.zeros(3))
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(lambda z: fsq(z, train=True), jnp.zeros(3))
  without = FSQ((8, 6, 5))
  jax.eval_shape(lambda z: without.apply({}, z, train=True), jnp.zeros(3))


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'convention': 'vqp', 'bound': 'ifsq'}, "bound is 'ifsq'; .*'vqp'"),
        ({'convention': 'vqp', 'bins': 'equal'}, "bins is 'equal'; .*'vqp'"),
        ({'bins': 'even'}, "bins is 'even'; .*'rounded', 'equal'"),
        ({'bins': 'equal', 'eps': 0.01}, "eps is 0.01; bins 'equal'"),
        ({'convention': 'vqp', 'levels': (2, 2)}, r'levels\[0\] is 2; .* 3 to'),
        ({'noise': -0.5}, 'noise is -0.5; .* 0 or more'),
        ({'noise': float('nan')}, 'noise is nan'),
        ({'noise': None}, 'noise is None'),
        ({'noise_per': 'token'}, "'token'; known: .'element', 'example'"),
    ],
)
def test_fields_that_do_not_fit_the_convention_are_refused(fields, match):
  with pytest.raises(ValueError, match=match):
    FSQ(**{'levels': (8, 8, 8), **fields})


def test_spec_tells_every_dialect_and_leaves_noise_out():
  dialects = [
      {'convention': 'symmetric'},
      {'bound': 'ifsq'},
      {'bound': 'clip'},
      {'bins': 'equal'},
      {'convention': 'paper'},
      {'convention': 'paper', 'eps': -1e-3},
      {'convention': 'vqp'},
      {'convention': 'preserve_symmetry'},
  ]
  specs = [FSQ((8, 6, 5), **fields).spec() for fields in dialects]
  assert all(specs.count(spec) == 1 for spec in specs)
  assert specs[-2]['shift'] == 'arctanh'
  assert specs[-2]['eps'] == -1e-3
  assert specs[-1]['rounding'] == 'half up'
  assert FSQ((8, 6, 5), noise=1, noise_per='example').spec() == specs[0]


def test_recommended_levels_are_those_of_the_paper():
  sizes = {
      4: 15, 6: 64, 8: 240, 9: 512, 10: 1000, 11: 1920, 12: 4375, 14: 15360,
      16: 64000,
  }  # fmt: skip
  assert sorted(conventions.LEVELS) == sorted(sizes)
  for bits, size in sizes.items():
    assert FSQ(levels=recommended_levels(bits)).codebook_size == size
  with pytest.raises(ValueError, match=r'7 bits; known: \[4, 6, 8'):
    recommended_levels(7)


@pytest.mark.parametrize(
    ('levels', 'match'),
    [
        ((), r'levels is \(\)'),
        (8, 'levels is 8'),
        ('888', "levels is '888'"),
        ((8, 1), r'levels\[1\] is 1; .* 2 to'),
        ((8, 0), r'levels\[1\] is 0'),
        ((8, -5), r'levels\[1\] is -5'),
        ((8, 5.0), r'levels\[1\] is 5.0'),
        ((8, True), r'levels\[1\] is True'),
        ((2**22 + 1,), r'levels\[0\] is 4194305'),
        ((2**16, 2**15), '2147483648 codes.*groups'),
        ((4,) * 16, '4294967296 codes.*fewer or smaller'),
    ],
)
def test_levels_that_cannot_work_are_refused(levels, match):
  with pytest.raises(ValueError, match=match):
    FSQ(levels=levels)


def test_two_levels_are_for_the_symmetric_convention():
  fsq = FSQ(levels=(2, 2))
  codes = [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]
  decode = jax.jit(fsq.indices_to_codes)
  np.testing.assert_array_equal(decode(jnp.arange(4)), codes)
  with pytest.raises(ValueError, match=r'levels\[0\] is 2; .* 3 to'):
    FSQ(levels=(2, 2), convention='paper')


@pytest.mark.parametrize('convention', ['symmetric', 'paper'])
def test_largest_codebook_works_to_its_last_index(convention):
  levels = (331, 302, 21483)
  size = math.prod(levels)
  assert size == 2**31 - 2  # 2**31 - 1 is prime
  fsq = FSQ(levels=levels, convention=convention, eps=0.0)
  indices = jnp.asarray([0, 1, size // 2, size - 2, size - 1])
  every = jnp.concatenate([indices, jnp.asarray([size, size + 1])])
  codes = jax.jit(fsq.indices_to_codes)(every)
  np.testing.assert_array_equal(
      jax.jit(fsq.codes_to_indices)(codes)[:-2], indices
  )
  assert np.all(np.isnan(codes[-2:]))


def test_levels_become_a_tuple_of_ints():
  fsq = FSQ(levels=[np.int64(8), np.int32(5)])
  assert fsq == FSQ(levels=(8, 5))
  assert [type(level) for level in fsq.levels] == [int, int]
