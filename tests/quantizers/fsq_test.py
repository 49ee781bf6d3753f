"""Numbers of FSQ: published vectors, worked examples, gradients, limits."""

import functools
import math
import pathlib

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsq_jax.quantizers import FSQ
from fsq_jax.quantizers import GroupedFSQ
from fsq_jax.quantizers import conventions

_TESTDATA = pathlib.Path(__file__).parents[1] / 'testdata'
# Outputs of the two reference implementations; keys are <levels>/<array>.
_GOLDEN = {
    'paper': dict(np.load(_TESTDATA / 'fsq_paper.npz')),
    'symmetric': dict(np.load(_TESTDATA / 'fsq_symmetric.npz')),
}
# At two levels the paper convention is ill-conditioned, and rejected.
_GOLDEN_CASES = sorted(
    {
        (convention, key.split('/')[0])
        for convention, arrays in _GOLDEN.items()
        for key in arrays
    }
    - {('paper', '2x2x2')}
)
_NAMED_LEVELS = sorted({*conventions.LEVELS.values(), (7, 5, 5, 5)})
_DTYPES = ['float32', 'bfloat16', 'float16']
_CONVENTIONS = ['symmetric', 'paper']
_VARIANTS = [('symmetric', 'tanh'), ('symmetric', 'clip'), ('paper', 'tanh')]

every_dtype = pytest.mark.parametrize(
    'dtype',
    [
        pytest.param(x, marks=[] if x == 'float32' else [pytest.mark.slow])
        for x in _DTYPES
    ],
)
both_conventions = pytest.mark.parametrize('convention', _CONVENTIONS)
every_variant = pytest.mark.parametrize(('convention', 'bound'), _VARIANTS)


def _golden(convention, name):
  """Returns the quantizer of a golden case and its arrays."""
  fsq = FSQ(
      levels=[int(level) for level in name.split('x')],
      convention=convention,
      bound='clip' if convention == 'symmetric' else 'tanh',
  )
  prefix = f'{name}/'
  return fsq, {
      key.removeprefix(prefix): array
      for key, array in _GOLDEN[convention].items()
      if key.startswith(prefix)
  }


def _call(fsq, z):
  return jax.jit(lambda z: fsq.apply({}, z))(z)


def _narrowed(x):
  return [jnp.asarray(x, dtype) for dtype in _DTYPES]


def _waves(d):
  """Returns [8, d] latents that the numbers below were computed for."""
  n, j = np.mgrid[1:9, 1 : d + 1]
  return (1.5 * np.sin(0.7 * n + 1.3 * j)).astype(np.float32)


@pytest.mark.parametrize(('convention', 'name'), _GOLDEN_CASES)
def test_equals_the_reference_implementation(convention, name):
  fsq, golden = _golden(convention, name)
  weights = np.arange(1, fsq.code_dim + 1, dtype=np.float32)

  @jax.jit
  def results(z, indices):
    def total(z):
      out = fsq(z)
      return jnp.sum(out.z_q * weights), out

    gradient, out = jax.grad(total, has_aux=True)(z)
    return out, gradient, fsq.indices_to_codes(indices)

  indices = np.arange(fsq.codebook_size)
  out, gradient, codebook = results(golden['z'], indices)
  np.testing.assert_array_equal(out.z_q, golden['zhat'])
  np.testing.assert_array_equal(out.indices, golden['indices'])
  np.testing.assert_allclose(out.loss, golden.get('loss', 0.0), rtol=1e-6)
  np.testing.assert_array_equal(codebook, golden['codebook'])
  np.testing.assert_allclose(
      gradient / weights,
      golden['grad_sum_arange'] / weights,
      atol=1e-6,
      rtol=0,
  )


def test_example_of_the_paper_notebook():
  fsq = FSQ(levels=(3, 5, 4), convention='paper')
  z_q, loss, indices = _call(fsq, jnp.asarray([0.25, 0.6, -7.0]))
  np.testing.assert_array_equal(z_q, [0, 0.5, -1])
  assert int(indices) == 10
  assert float(loss) == 0


@pytest.mark.parametrize(
    ('z', 'steps', 'index'),
    [
        ((0, 0, 0), (0, 0, 0), 124),
        ((1, 1, 1), (2, 2, 2), 238),
        ((-1, -1, -1), (-3, -2, -2), 9),
        ((0.3, -0.7, 1.2), (1, -2, 2), 205),
        ((-0.05, 0.05, -0.3), (0, 0, -1), 76),
        ((10, 10, 10), (3, 2, 2), 239),
        ((-10, -10, -10), (-4, -3, -2), 0),
    ],
)
def test_worked_examples_paper(z, steps, index):
  out = _call(FSQ(levels=(8, 6, 5), convention='paper'), np.float32(z))
  np.testing.assert_array_equal(
      out.z_q, np.float32(steps) / np.float32((4, 3, 2))
  )
  assert int(out.indices) == index


@pytest.mark.parametrize(
    ('z', 'codes', 'index', 'loss'),
    [
        ((0, 0, 0), (0.5, -0.5, 0), 132, 1 / 6),
        ((1, 1, 1), (3.5, 2.5, 2), 239, 0),
        ((-1, -1, -1), (-3.5, -2.5, -2), 0, 0),
        ((0.3, -0.7, 1.2), (1.5, -1.5, 2), 159, 0.141667),
        ((-0.05, 0.05, -0.3), (-0.5, 0.5, -1), 106, 0.135417),
        ((10, 10, 10), (3.5, 2.5, 2), 239, 607.5),
        ((-10, -10, -10), (-3.5, -2.5, -2), 0, 607.5),
    ],
)
def test_worked_examples_symmetric(z, codes, index, loss):
  out = _call(FSQ(levels=(8, 6, 5), bound='clip'), np.float32(z))
  np.testing.assert_array_equal(out.z_q, codes)
  assert int(out.indices) == index
  np.testing.assert_allclose(out.loss, loss, atol=1e-6)


@pytest.mark.parametrize(
    ('levels', 'paper', 'symmetric', 'loss'),
    [
        ('8 6 5', '23 14 51 153 208 225 188 142',
         '220 180 61 3 14 24 119 237', 0.516522),
        ('8 8 8', '31 78 195 393 472 497 444 318',
         '472 384 130 6 31 55 255 507', 0.903234),
        ('8 5 5 5', '223 606 843 921 968 585 356 118',
         '926 753 259 19 49 97 495 985', 0.426541),
        ('7 5 5 5 5', '3695 4030 4237 2555 1722 512 311 978',
         '4009 3144 1299 97 245 485 2475 4301', 0.379253),
        ('8 8 8 6 5', '13343 14414 15043 9097 6104 2033 956 3390',
         '14169 11544 3929 207 955 1665 7650 15211', 0.705589),
    ],
)  # fmt: skip
def test_indices_of_waves(levels, paper, symmetric, loss):
  levels = tuple(int(level) for level in levels.split())
  z = _waves(len(levels))
  np.testing.assert_array_equal(
      _call(FSQ(levels=levels, convention='paper'), z).indices,
      np.asarray(paper.split(), int),
  )
  out = _call(FSQ(levels=levels, bound='clip'), z)
  np.testing.assert_array_equal(
      out.indices, np.asarray(symmetric.split(), int)
  )
  np.testing.assert_allclose(out.loss, loss, atol=1e-6)


def test_indices_of_waves_symmetric_tanh():
  # In the published numbers the first channel varies fastest: equal level
  # indices in the other order.
  fsq = FSQ(levels=(8, 6, 5))
  digits = fsq.indices_to_digits(_call(fsq, _waves(3)).indices)
  np.testing.assert_array_equal(
      np.asarray(digits) @ (1, 8, 48),
      (23, 5, 50, 145, 208, 225, 187, 142),
  )


def test_digits_are_half_open_integers_in_the_stated_order():
  digits = jnp.asarray([4, 3, 2])
  for convention, index, codes in (
      ('symmetric', 4 * 30 + 3 * 5 + 2, [0.5, 0.5, 0]),
      ('paper', 4 + 3 * 8 + 2 * 48, [0, 0, 0]),
  ):
    fsq = FSQ(levels=(8, 6, 5), convention=convention)
    assert int(jax.jit(fsq.digits_to_indices)(digits)) == index
    np.testing.assert_array_equal(jax.jit(fsq.digits_to_codes)(digits), codes)
    np.testing.assert_array_equal(jax.jit(fsq.indices_to_digits)(index), digits)


@both_conventions
@pytest.mark.parametrize('levels', _NAMED_LEVELS, ids=str)
def test_every_code_of_every_named_set_returns(convention, levels):
  fsq = FSQ(levels=levels, convention=convention)
  indices = np.arange(fsq.codebook_size)

  @jax.jit
  def round_trip(indices):
    codes = _narrowed(fsq.indices_to_codes(indices))
    return (
        fsq.digits_to_indices(fsq.indices_to_digits(indices)),
        *(fsq.codes_to_indices(c) for c in codes),
    )

  for returned in round_trip(indices):
    np.testing.assert_array_equal(returned, indices)


@every_variant
@pytest.mark.parametrize(
    'levels',
    [
        (5, 3),
        *(
            pytest.param(levels, marks=pytest.mark.slow)
            for levels in _NAMED_LEVELS[1:]
        ),
    ],
    ids=str,
)
def test_every_code_is_reached_and_decoded(levels, convention, bound):
  fsq = FSQ(levels, convention, bound)
  indices = np.arange(fsq.codebook_size)
  half = (np.asarray(levels) - 1) / 2
  # Where tanh has to be in the middle of each bin.
  unit = (np.asarray(fsq.indices_to_digits(indices)) - half) / half
  z = unit
  if bound == 'tanh':
    z = np.arctanh(0.99 * unit)
  if convention == 'paper':
    z = z - np.tan(np.where(half % 1, 0.5, 0) / (half * 0.999))
  codes = jax.jit(fsq.indices_to_codes)(indices)
  for out in jax.jit(lambda *zs: [fsq(z) for z in zs])(*_narrowed(z)):
    np.testing.assert_array_equal(out.indices, indices)
    np.testing.assert_array_equal(out.z_q, codes.astype(out.z_q.dtype))


@every_variant
@pytest.mark.parametrize('eps', [
    None,
    pytest.param(0.01, marks=pytest.mark.slow),
    pytest.param(-0.01, marks=pytest.mark.slow),
])  # fmt: skip
def test_gradient_is_that_of_the_scaled_bound(convention, bound, eps):
  levels = np.asarray((8, 6, 5))
  fsq = FSQ(tuple(levels.tolist()), convention, bound, eps)
  z = np.concatenate([3 * _waves(3), [[10.0] * 3, [-10.0] * 3]])
  gradient = jax.jit(jax.grad(lambda z: jnp.sum(fsq(z).z_q)))(np.float32(z))
  eps = {'paper': 1e-3, 'symmetric': 0.0}[convention] if eps is None else eps
  half = (levels - 1) * (1 - eps) / 2
  if convention == 'paper':
    shift = np.tan(np.where(levels % 2, 0, 0.5) / half)
    expected = half / (levels // 2) * (1 - np.tanh(z + shift) ** 2)
  elif bound == 'tanh':
    expected = half * (1 - np.tanh(z) ** 2)
  else:
    expected = np.broadcast_to(half, z.shape)
  # Relative to the steepest slope: 1 - tanh^2 cancels where tanh is near 1.
  np.testing.assert_allclose(
      gradient / half, expected / half, rtol=0, atol=1e-6
  )


@pytest.mark.parametrize('bound', ['tanh', 'clip'])
def test_loss_pulls_latents_to_codes_and_not_codes_to_latents(bound):
  fsq = FSQ(levels=(8, 6, 5), bound=bound, commitment_weight=0.25)
  z = 2 * _waves(3)
  half = np.float64([3.5, 2.5, 2])
  slope = half
  if bound == 'tanh':
    slope = half * (1 - np.tanh(np.float64(z)) ** 2)
  y = half * (np.tanh(np.float64(z)) if bound == 'tanh' else z)
  error = y - np.float64(_call(fsq, z).z_q)
  loss, gradient = jax.jit(jax.value_and_grad(lambda z: fsq(z).loss))(z)
  np.testing.assert_allclose(loss, 0.25 * np.mean(error**2), rtol=1e-6)
  np.testing.assert_allclose(
      gradient, 0.25 * 2 * error * slope / z.size, rtol=1e-5, atol=1e-7
  )


def _latents_at(positions, levels):
  """Returns latents of bound 'clip' at these (fractional) level indices."""
  half = (np.asarray(levels, np.float32) - 1) / 2
  return (np.asarray(positions, np.float32) - half) / half


def test_diversity_loss_is_the_missing_entropy_of_the_levels():
  fsq = FSQ(
      (4, 3), bound='clip', commitment_weight=0.0, diversity_weight=0.5
  )

  def loss(positions):
    return float(fsq.apply({}, _latents_at(positions, fsq.levels)).loss)

  everything = math.log(4) + math.log(3)
  np.testing.assert_allclose(loss([(2, 1)] * 7), everything / 2, rtol=1e-6)
  grid = np.stack(np.meshgrid(range(4), range(3)), axis=-1)
  np.testing.assert_allclose(loss(grid), 0, atol=1e-6)
  # Half a count for each of two levels; beyond the outermost, a whole one.
  expected = (everything - math.log(2)) / 2
  np.testing.assert_allclose(loss([(0.5, 2)] * 3), expected, rtol=1e-6)
  np.testing.assert_allclose(loss([(0, -3), (3, 0)]), expected, rtol=1e-6)


@pytest.mark.parametrize('convention', sorted(conventions.CONVENTIONS))
def test_diversity_loss_pulls_latents_to_rarer_levels(convention):
  levels = (5, 3)
  fsq = FSQ(
      levels, convention, commitment_weight=0.0, diversity_weight=1.0
  )
  z = np.random.default_rng(0).normal(0.3, 0.4, (2, 40, 2)).astype(np.float32)
  loss, gradient = jax.value_and_grad(lambda z: fsq.apply({}, z).loss)(z)
  kind = conventions.CONVENTIONS[convention]
  grid = kind(levels, 'tanh', 'rounded', kind.eps)
  position = np.asarray(grid.to_steps(grid.bound(z)) + grid.origin)
  expected, direction = 0.0, []
  for i, num_levels in enumerate(levels):
    low = np.floor(position[..., i]).astype(int)
    high = np.minimum(low + 1, num_levels - 1)
    share = position[..., i] - low
    p = np.bincount(low.ravel(), (1 - share).ravel(), num_levels)
    p += np.bincount(high.ravel(), share.ravel(), num_levels)
    p /= low.size
    used = p[p > 0]
    expected += math.log(num_levels) + np.sum(used * np.log(used))
    direction.append(np.sign(p[low] - p[high]))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  # A step against the gradient goes to the level with the smaller count.
  np.testing.assert_array_equal(
      np.sign(-gradient), np.stack(direction, axis=-1)
  )


def test_groups_have_diversity_losses_of_their_own():
  options = {
      'levels': (4, 3), 'commitment_weight': 0.0, 'diversity_weight': 2.0,
  }  # fmt: skip
  z = np.random.default_rng(0).normal(size=(5, 7, 4)).astype(np.float32)
  loss = GroupedFSQ(num_groups=2, **options).apply({}, z).loss
  parts = [FSQ(**options).apply({}, x).loss for x in np.split(z, 2, axis=-1)]
  np.testing.assert_allclose(loss, sum(parts), rtol=1e-6)


def test_loss_of_the_paper_convention_is_in_units_of_codes():
  fsq = FSQ(levels=(5, 5), convention='paper', commitment_weight=1.0)
  z = jnp.asarray([0.3, -0.2])
  y = np.tanh([0.3, -0.2]) * 4 * 0.999 / 2 / 2
  np.testing.assert_allclose(
      _call(fsq, z).loss, np.mean((np.asarray([0.5, 0]) - y) ** 2), rtol=1e-5
  )


@every_variant
@every_dtype
def test_indices_equal_float64_away_from_boundaries(convention, bound, dtype):
  # NumPy in float64 on the same cast latents; tokens may differ only within
  # four float32 units of a rounding boundary.
  levels = np.asarray((8, 6, 5))
  fsq = FSQ((8, 6, 5), convention, bound)
  z = 1.5 * jax.random.normal(jax.random.key(0), (10**5, 3))
  z = z.astype(dtype)
  wide = np.asarray(z).astype(np.float64)
  if convention == 'paper':
    half = (levels - 1) * 0.999 / 2
    offset = np.where(levels % 2, 0, 0.5)
    y = np.tanh(wide + np.tan(offset / half)) * half - offset + levels // 2
  else:
    half = (levels - 1) / 2
    y = (np.tanh(wide) if bound == 'tanh' else wide) * half + half
  expected = np.clip(np.round(y), 0, levels - 1)
  near = np.abs(y - np.floor(y) - 0.5) <= 4 * np.spacing(np.float32(levels))
  digits = np.asarray(fsq.indices_to_digits(_call(fsq, z).indices))
  assert np.mean(near) < 1e-2
  np.testing.assert_array_equal(digits[~near], expected[~near])


@pytest.mark.slow
@every_variant
@every_dtype
def test_extreme_latents_give_corners_and_no_nan(convention, bound, dtype):
  fsq = FSQ((8, 5), convention, bound)
  largest = float(jnp.finfo(dtype).max)
  tiny = float(jnp.finfo(dtype).smallest_subnormal)
  sizes = [tiny, 1e4, min(1e30, largest), largest, np.inf]
  z = jnp.asarray([[s * size] * 2 for s in (-1, 1) for size in sizes], dtype)

  def total(z):
    out = fsq(z)
    return jnp.sum(out.z_q.astype(jnp.float32)), out

  gradient, out = jax.jit(jax.grad(total, has_aux=True))(z)
  corners = np.asarray(fsq.indices_to_digits(out.indices))
  np.testing.assert_array_equal(corners[1:5], np.zeros((4, 2)))
  np.testing.assert_array_equal(corners[6:], np.broadcast_to([7, 4], (4, 2)))
  np.testing.assert_array_equal(
      out.z_q, fsq.indices_to_codes(out.indices).astype(dtype)
  )
  assert not np.any(np.isnan(gradient))
  if bound == 'clip':  # constant for every finite latent, however large
    finite = np.isfinite(z[:, 0])
    np.testing.assert_array_equal(
        gradient[finite], np.broadcast_to([3.5, 2], (8, 2))
    )


@pytest.mark.parametrize('bound', ['tanh', 'clip'])
def test_loss_of_infinite_latents_has_no_nan(bound):
  fsq = FSQ(levels=(8, 5), bound=bound)
  z = jnp.asarray([[jnp.inf, -jnp.inf], [3e38, -3e38]])
  loss, gradient = jax.jit(jax.value_and_grad(lambda z: fsq(z).loss))(z)
  assert not np.isnan(loss)
  assert not np.any(np.isnan(gradient))
  without = FSQ(levels=(8, 5), bound=bound, commitment_weight=0)
  loss, gradient = jax.jit(jax.value_and_grad(lambda z: without(z).loss))(z)
  assert float(loss) == 0
  np.testing.assert_array_equal(gradient, np.zeros((2, 2)))


@every_variant
def test_nan_channels_stay_nan_and_spoil_only_their_vector(convention, bound):
  fsq = FSQ((8, 6, 5), convention, bound)
  z = _waves(3)
  clean = _call(fsq, z)
  call = jax.jit(lambda z: fsq.apply({}, z))
  for channel in range(3):
    dirty = z.copy()
    dirty[2, channel] = np.nan
    out = call(dirty)
    expected = np.asarray(clean.indices).copy()
    expected[2] = -1
    np.testing.assert_array_equal(out.indices, expected)
    expected = np.asarray(clean.z_q).copy()
    expected[2, channel] = np.nan
    np.testing.assert_array_equal(out.z_q, expected)


@both_conventions
def test_codes_off_the_grid_are_rounded_and_clipped(convention):
  fsq = FSQ(levels=(8, 5), convention=convention)
  digits = np.int32([[3, 1], [0, 0], [7, 4], [1, 1]])
  codes = np.array(jax.jit(fsq.digits_to_codes)(digits))
  off = codes + [[0.4], [2.0], [-2.0], [0]] * (codes[1] - codes[3])
  off = np.float32([*off, [-np.inf, np.inf], [np.nan, 0]])
  np.testing.assert_array_equal(
      jax.jit(fsq.codes_to_digits)(off), [*digits, [0, 4], [-1, 2]]
  )


@pytest.mark.parametrize('dtype', [
    np.int8,
    np.uint64,
    *(
        pytest.param(dtype, marks=pytest.mark.slow)
        for dtype in (np.uint8, np.int16, np.uint16, np.int64)
    ),
])  # fmt: skip
def test_indices_of_any_width_are_checked_before_they_wrap(dtype):
  fsq = FSQ(levels=(8, 8, 8))
  largest = int(np.iinfo(dtype).max)
  indices = np.asarray([5, 100, largest], dtype)
  codes = np.asarray(fsq.indices_to_codes(indices))
  np.testing.assert_array_equal(
      codes[:2], fsq.indices_to_codes(jnp.asarray([5, 100]))
  )
  assert np.all(np.isnan(codes[2])) == (largest >= 512)
  if np.iinfo(dtype).bits == 64:
    wraps_to_5 = np.asarray([2**32 + 5], dtype)
    assert np.all(np.isnan(fsq.indices_to_codes(wraps_to_5)))


def test_digits_out_of_range_are_no_token():
  fsq = FSQ(levels=(8, 5))
  digits = jnp.asarray([[7, 4], [8, 0], [0, 5], [-1, 0]])
  indices = jax.jit(fsq.digits_to_indices)(digits)
  np.testing.assert_array_equal(indices, [39, -1, -1, -1])
  np.testing.assert_array_equal(
      jax.jit(fsq.digits_to_codes)(digits),
      [[3.5, 2], [np.nan, -2], [-3.5, np.nan], [np.nan, -2]],
  )
  with pytest.raises(ValueError, match='2 channels'):
    fsq.digits_to_codes(jnp.zeros((4, 3), jnp.int32))


_latents = hnp.arrays(
    np.float32, (6, 3), elements=st.floats(-1e6, 1e6, width=32)
)


@functools.cache
def _compiled(convention, bound):
  """Returns latents [6, 3] -> (output, level indices), compiled once."""
  fsq = FSQ((8, 5, 3), convention, bound)

  def call(z):
    out = fsq(z)
    return out, fsq.indices_to_digits(out.indices)

  return jax.jit(call)


@every_variant
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(z=_latents, step=_latents)
def test_monotone_in_range_and_independent(convention, bound, z, step):
  call = _compiled(convention, bound)
  out, digits = call(z)
  higher, higher_digits = call(np.maximum(z, z + np.abs(step)))
  assert np.all(np.asarray(higher_digits) >= np.asarray(digits))
  assert np.all(np.asarray(higher.z_q) >= np.asarray(out.z_q))
  assert np.all((np.asarray(digits) >= 0) & (np.asarray(digits) < (8, 5, 3)))
  # A token depends on its own vector alone.
  np.testing.assert_array_equal(call(z[::-1])[0].indices, out.indices[::-1])


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(z=_latents)
def test_quantizing_codes_again_changes_nothing(z):
  # Scaled back into [-1, 1], codes are latents of the clip bound.
  call = _compiled('symmetric', 'clip')
  codes = call(z)[0].z_q
  again = call(codes / np.float32([3.5, 2, 1]))[0]
  np.testing.assert_array_equal(again.z_q, codes)
  np.testing.assert_allclose(again.loss, 0, atol=1e-12)


@pytest.mark.slow
@every_variant
def test_rank_of_the_batch_does_not_matter(convention, bound):
  fsq = FSQ((8, 6, 5), convention, bound)
  flat = _call(fsq, _waves(3))
  grid = _call(fsq, _waves(3).reshape(2, 1, 4, 3))
  np.testing.assert_array_equal(grid.indices, flat.indices.reshape(2, 1, 4))
  np.testing.assert_array_equal(grid.z_q, flat.z_q.reshape(2, 1, 4, 3))
  one = _call(fsq, _waves(3)[5])
  assert one.indices.shape == ()
  assert int(one.indices) == int(flat.indices[5])


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'convention': 'seed'}, "'seed'; known: .'paper', .*'symmetric'"),
        ({'bound': 'sigmoid'}, "'sigmoid'; .*'tanh', 'ifsq', 'clip'"),
        ({'convention': 'paper', 'bound': 'clip'}, "'clip'; .*'tanh'"),
        ({'eps': 0.15}, 'eps is 0.15; with 8 levels'),
        ({'eps': -0.15}, 'eps is -0.15'),
        ({'eps': math.nan}, 'eps is nan'),
        ({'eps': '1e-3'}, "eps is '1e-3'"),
        ({'levels': (2000,), 'convention': 'paper'}, 'eps is 0.001; with 2000'),
        ({'commitment_weight': -1.0}, 'commitment_weight is -1.0'),
        ({'commitment_weight': math.inf}, 'commitment_weight is inf'),
        ({'commitment_weight': True}, 'commitment_weight is True'),
    ],
)
def test_constructor_refuses_what_cannot_work(fields, match):
  with pytest.raises(ValueError, match=match):
    FSQ(**{'levels': (8, 8, 8), **fields})


def test_spec_names_the_dialect_and_leaves_training_out():
  assert FSQ(levels=(8, 6, 5)).spec() == {
      'name': 'fsq',
      'levels': [8, 6, 5],
      'convention': 'symmetric',
      'bound': 'tanh',
      'bins': 'rounded',
      'eps': 0.0,
      'shift': 'none',
      'rounding': 'half to even',
      'index_order': 'last dimension fastest',
      'code': 'digit - (L-1)/2',
  }
  paper = FSQ(levels=(8, 6, 5), convention='paper')
  assert paper.spec()['index_order'] == 'first dimension fastest'
  assert paper.spec()['eps'] == 1e-3
  # An explicit default, or another loss weight, is the same convention.
  same = FSQ((8, 6, 5), 'paper', eps=1e-3, commitment_weight=0.5)
  assert same.spec() == paper.spec()
