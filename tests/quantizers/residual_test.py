"""ResidualFSQ against its definition, stage by stage, and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsq_jax.quantizers import ResidualFSQ


@functools.cache
def _jitted(quantizer, method, train=False):
  """Returns a method of a quantizer, compiled once."""

  def apply(x, key):
    options = {'train': True, 'rngs': {'quantizer': key}} if train else {}
    return quantizer.apply({}, x, method=method, **options)

  return jax.jit(apply)


def _call(quantizer, z):
  return _jitted(quantizer, '__call__')(z, jax.random.key(0))


def _drop(quantizer, z, seed=0):
  """Applies in training, with a key."""
  key = jax.random.key(seed)
  return _jitted(quantizer, '__call__', train=True)(z, key)


def _decode(quantizer, indices):
  return _jitted(quantizer, 'indices_to_codes')(indices, None)


def _index(quantizer, codes):
  return _jitted(quantizer, 'codes_to_indices')(codes, None)


def _normal(shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _definition(z, levels, num_stages):
  """Returns float64 codes and level indices of each stage, in sequence.

  Also where float32 cannot round otherwise, at any stage.
  """
  L = np.asarray(levels, np.float64)
  clamp = 1 + 1 / (L - 1)
  residual = clamp * np.tanh(np.float64(z) / clamp)
  codes, digits, away = np.zeros_like(residual), [], True
  for q in range(num_stages):
    steps = np.clip(residual * L**q, -1, 1) * (L - 1) / 2 + (L - 1) / 2
    digit = np.floor(steps + 0.5)
    away &= np.abs(steps - np.floor(steps) - 0.5) > 1e-6 * L ** (q + 1)
    quantized = (2 * digit / (L - 1) - 1) * L**-q
    residual -= quantized
    codes += quantized
    digits.append(digit)
  return codes, np.stack(digits, axis=-2), np.all(away, axis=-1)


@pytest.mark.parametrize(
    ('levels', 'num_stages'),
    [
        ((8, 5, 3), 4),
        pytest.param((2, 7), 5, marks=pytest.mark.slow),
        pytest.param((4,), 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_stages_one_after_the_other(levels, num_stages):
  quantizer = ResidualFSQ(levels, num_stages)
  z = 1.5 * _normal((20_000, len(levels)))
  out = _call(quantizer, z)
  codes, digits, away = _definition(z, levels, num_stages)
  assert np.mean(away) > 0.95
  np.testing.assert_array_equal(
      quantizer.indices_to_digits(out.indices)[away], digits[away]
  )
  np.testing.assert_allclose(out.z_q[away], codes[away], atol=3e-7)
  first_fastest = digits @ np.cumprod([1, *levels[:-1]])
  np.testing.assert_array_equal(out.indices[away], first_fastest[away])


@pytest.mark.parametrize(
    ('level', 'rms'),
    [
        (3, (0.2766, 0.0955, 0.0321, 0.0107)),
        (5, (0.1410, 0.0288, 0.0058, 0.0012)),
        (8, (0.0813, 0.0103, 0.0013, 0.0002)),
    ],
)
@pytest.mark.slow
def test_residual_shrinks_by_the_level_every_stage(level, rms):
  quantizer = ResidualFSQ((level,), 4)
  # Quantiles for samples; the numbers were measured on normal latents.
  z = jax.scipy.special.ndtri((jnp.arange(50_000) + 0.5) / 50_000)[:, None]
  indices = _call(quantizer, z).indices
  clamp = level / (level - 1)
  x = clamp * np.tanh(np.float64(z) / clamp)
  for q in range(4):
    residual = x - _decode(quantizer, indices[:, : q + 1])
    np.testing.assert_allclose(
        np.sqrt(np.mean(residual**2)), rms[q], atol=2e-4
    )
    largest = level**-q / (level - 1)
    np.testing.assert_allclose(np.max(np.abs(residual)), largest, rtol=1e-2)


def test_every_code_returns():
  quantizer = ResidualFSQ((3, 2), 3)
  stages = np.indices((6, 6, 6)).reshape(3, -1).T  # [216, 3]
  codes = _decode(quantizer, stages)
  assert len(np.unique(codes, axis=0)) == 216
  np.testing.assert_array_equal(_index(quantizer, codes), stages)
  # Together the stages are one even grid.
  np.testing.assert_allclose(
      np.unique(codes[:, 0]), np.linspace(-13 / 9, 13 / 9, 27), atol=1e-6
  )
  np.testing.assert_allclose(
      np.unique(codes[:, 1]), np.linspace(-7 / 4, 7 / 4, 8), atol=1e-6
  )


def test_finest_grid_returns_to_its_last_code():
  quantizer = ResidualFSQ((8, 128), 3)  # 2^21 steps in the second channel
  indices = jnp.asarray([[0, 0, 0], [1023, 1023, 1023], [1, 517, 1022]])
  codes = _decode(quantizer, indices)
  np.testing.assert_array_equal(_index(quantizer, codes), indices)


def test_zero_takes_the_middle_or_what_is_above():
  out = _call(ResidualFSQ((5, 6, 8), 2), jnp.zeros(3))
  np.testing.assert_allclose(out.z_q, [0, 1 / 30, 1 / 56], rtol=1e-6)
  # To even, this half would go down.
  out = _call(ResidualFSQ((6,), 1), jnp.zeros(1))
  np.testing.assert_allclose(out.z_q, [1 / 5], rtol=1e-6)


def test_gradient_is_that_of_the_soft_clamp():
  quantizer = ResidualFSQ((8, 5, 2), 3)
  z = _normal((20, 3))
  gradient = jax.jit(jax.grad(lambda z: jnp.sum(quantizer(z).z_q)))(z)
  clamp = np.asarray([8 / 7, 5 / 4, 2])
  np.testing.assert_allclose(
      gradient, 1 - np.tanh(z / clamp) ** 2, rtol=0, atol=1e-6
  )


def test_extreme_latents_give_corners():
  quantizer = ResidualFSQ((8, 5), 2)
  z = jnp.asarray([[s * size] * 2 for s in (-1, 1) for size in (1e30, np.inf)])
  out = _call(quantizer, z)
  np.testing.assert_array_equal(out.indices, [[0, 0]] * 2 + [[39, 39]] * 2)
  assert not np.any(np.isnan(out.z_q))


def test_nan_latents_and_indices_out_of_range():
  quantizer = ResidualFSQ((8, 5), 3)
  z = _normal((3, 2)).at[1, 0].set(jnp.nan)
  out = _call(quantizer, z)
  np.testing.assert_array_equal(out.indices[1], [-1, -1, -1])
  assert np.all(np.asarray(out.indices)[[0, 2]] >= 0)
  np.testing.assert_array_equal(np.isnan(out.z_q[1]), [True, False])
  np.testing.assert_array_equal(_index(quantizer, out.z_q), out.indices)
  codes = _decode(quantizer, jnp.asarray([[0, 40, 0], [0, 0, 40], [0, 0, -2]]))
  assert np.all(np.isnan(codes))
  with pytest.raises(ValueError, match=r'shape \(2, 4\); .* 1 to 3 stages'):
    quantizer.indices_to_codes(jnp.zeros((2, 4), jnp.int32))


@pytest.mark.slow
def test_trailing_stages_at_minus_one_are_dropped():
  quantizer = ResidualFSQ((8, 5), 3)
  indices = np.random.default_rng(0).integers(40, size=(50, 3))
  codes = {n: _decode(quantizer, indices[:, :n]) for n in (1, 2, 3)}
  # Of all stages and of a prefix.
  for length, num in ((3, 1), (3, 2), (2, 1)):
    marked = np.array(indices[:, :length])
    marked[:, num:] = -1
    np.testing.assert_array_equal(_decode(quantizer, marked), codes[num])
  # Only some lose stages.
  marked, expected = np.array(indices), np.array(codes[3])
  marked[7, 2], expected[7] = -1, codes[2][7]
  np.testing.assert_array_equal(_decode(quantizer, marked), expected)
  none = np.zeros((50, 3), np.int32)
  none[:5] = [-1] * 3, [-1, 0, 0], [0, -1, 0], [0, 40, -1], [40] * 3
  assert np.all(np.isnan(_decode(quantizer, none)[:5]))
  # 64-bit indices that the device cannot hold are no dropped stages.
  assert np.all(np.isnan(quantizer.indices_to_codes(np.asarray([0, 0, 2**40]))))


def _stages_left(quantizer, out):
  """Returns for each example how many stages its codes have; checks them."""
  left = []
  coarse = [
      np.asarray(_decode(quantizer, out.indices[..., : q + 1]))
      for q in range(quantizer.num_stages)
  ]
  for i, codes in enumerate(np.asarray(out.z_q)):
    errors = [np.max(np.abs(codes - c[i])) for c in coarse]
    left.append(1 + int(np.argmin(errors)))
    assert min(errors) < 1e-6
  return np.asarray(left)


@pytest.mark.slow
def test_dropout_leaves_the_first_stages_of_some_examples():
  z = _normal((600, 2, 2))
  full = ResidualFSQ((8, 5), 4)
  quantizer = ResidualFSQ((8, 5), 4, stage_dropout=0.6)
  clean, out = _call(full, z), _drop(quantizer, z)
  np.testing.assert_array_equal(out.indices, clean.indices)
  shares = np.bincount(_stages_left(full, out), minlength=5) / 600
  np.testing.assert_allclose(shares, [0, 0.2, 0.2, 0.2, 0.4], atol=0.06)
  other = _stages_left(full, _drop(quantizer, z, seed=1))
  assert np.any(other != _stages_left(full, out))


@pytest.mark.slow
def test_dropout_is_of_training_and_leaves_the_gradient_alone():
  z = _normal((600, 2, 2))
  full = ResidualFSQ((8, 5), 4)
  always = ResidualFSQ((8, 5), 4, stage_dropout=1.0)
  np.testing.assert_array_equal(_call(always, z).z_q, _call(full, z).z_q)
  assert np.max(_stages_left(full, _drop(always, z))) == 3

  def total(z, call):
    return jnp.sum(call(always, z).z_q)

  gradient = jax.jit(jax.grad(total), static_argnums=1)
  np.testing.assert_allclose(
      gradient(z, _drop), gradient(z, _call), rtol=1e-6
  )


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_number_of_devices():
  quantizer = ResidualFSQ((8, 5), 4, stage_dropout=0.5)
  z = _normal((32, 3, 2))
  mesh = jax.make_mesh((8,), ('data',))
  sharded = jax.device_put(z, jax.NamedSharding(mesh, jax.P('data')))
  one, many = _drop(quantizer, z), _drop(quantizer, sharded)
  assert len(many.z_q.sharding.device_set) == 8
  np.testing.assert_array_equal(many.z_q, one.z_q)
  assert _drop(quantizer, z[0, 0]).z_q.shape == (2,)


def test_dropout_asks_for_its_key():
  quantizer = ResidualFSQ((8, 5), 4, stage_dropout=0.5)
  with pytest.raises(ValueError, match=r"stage_dropout draws .*'quantizer'"):
    jax.eval_shape(
        lambda z: quantizer.apply({}, z, train=True), jnp.zeros(2)
    )


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'levels': (8, 1)}, r'levels\[1\] is 1'),
        ({'num_stages': 0}, 'num_stages is 0; .* 1 to 7'),
        ({'num_stages': 8}, 'num_stages is 8; .* 1 to 7'),
        ({'num_stages': 2.0}, 'num_stages is 2.0'),
        ({'stage_dropout': -0.1}, 'stage_dropout is -0.1'),
        ({'stage_dropout': 1.5}, 'stage_dropout is 1.5 with 4'),
        ({'stage_dropout': 0.5, 'num_stages': 1}, '0.5 with 1'),
    ],
)
def test_constructor_refuses_what_cannot_work(fields, match):
  with pytest.raises(ValueError, match=match):
    ResidualFSQ(**{'levels': (8, 5), 'num_stages': 4, **fields})


def test_spec_leaves_training_out():
  assert ResidualFSQ((8, 5), 3, stage_dropout=0.1).spec() == {
      'name': 'residual_fsq',
      'levels': [8, 5],
      'num_stages': 3,
      'clamp': 'c * tanh(z / c), c = L/(L-1)',
      'rounding': 'half up',
      'index_order': 'first dimension fastest',
      'code': 'sum over stages q of L^-q * (2 * digit / (L-1) - 1)',
  }
