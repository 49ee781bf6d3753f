"""GroupedFSQ: the groups are FSQ, each for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsq_jax.quantizers import FSQ
from fsq_jax.quantizers import GroupedFSQ


def _call(quantizer, z):
  return jax.jit(lambda z: quantizer.apply({}, z))(z)


def _normal(shape):
  return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    'fields',
    [
        {},
        pytest.param(
            {'bound': 'clip', 'commitment_weight': 0.25},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {'bound': 'ifsq', 'bins': 'equal'}, marks=pytest.mark.slow
        ),
        {'convention': 'paper', 'eps': 0.01},
        {'convention': 'preserve_symmetry'},
    ],
    ids=str,
)
def test_groups_are_fsq_of_neighbouring_channels(fields):
  fsq = FSQ((8, 5), **fields)
  grouped = GroupedFSQ((8, 5), num_groups=3, **fields)
  z = 1.5 * _normal((7, 4, 6))
  out = _call(grouped, z)
  parts = [_call(fsq, z[..., i : i + 2]) for i in (0, 2, 4)]
  np.testing.assert_array_equal(
      out.z_q, jnp.concatenate([part.z_q for part in parts], axis=-1)
  )
  indices = jnp.stack([part.indices for part in parts], axis=-1)
  np.testing.assert_array_equal(out.indices, indices)
  np.testing.assert_allclose(
      out.loss, np.mean([part.loss for part in parts]), rtol=1e-6
  )
  decoded = jax.jit(grouped.indices_to_codes)(indices)
  np.testing.assert_array_equal(decoded, out.z_q)
  again = jax.jit(grouped.codes_to_indices)(out.z_q)
  np.testing.assert_array_equal(again, indices)


def test_sizes_are_those_of_one_index():
  grouped = GroupedFSQ((8, 6, 5), num_groups=4)
  assert grouped.code_dim == 12
  assert grouped.codebook_size == 240
  assert grouped.levels == (8, 6, 5)
  assert grouped.index_shape == (4,)
  assert FSQ((8, 6, 5)).index_shape == ()
  # Level indices belong to one index, so that pooled indices have them too.
  indices = jnp.arange(240)
  np.testing.assert_array_equal(
      grouped.indices_to_digits(indices),
      FSQ((8, 6, 5)).indices_to_digits(indices),
  )


def test_more_codes_than_an_index_can_count():
  grouped = GroupedFSQ((4,) * 15, num_groups=3)
  last = 4**15 - 1
  indices = jnp.asarray([[0, last, 0], [last, last, last], [1, 2, 3]])
  codes = jax.jit(grouped.indices_to_codes)(indices)
  assert codes.shape == (3, 45)
  np.testing.assert_array_equal(codes[1], [1.5] * 45)
  again = jax.jit(grouped.codes_to_indices)(codes)
  np.testing.assert_array_equal(again, indices)


def test_nan_and_indices_out_of_range_stay_in_their_group():
  grouped = GroupedFSQ((8, 5), num_groups=3)
  z = _normal((2, 6))
  call = jax.jit(lambda z: grouped.apply({}, z))
  clean, out = call(z), call(z.at[0, 3].set(jnp.nan))
  expected = np.asarray(clean.indices).copy()
  expected[0, 1] = -1
  np.testing.assert_array_equal(out.indices, expected)
  np.testing.assert_array_equal(np.isnan(out.z_q[0]), np.arange(6) == 3)
  codes = jax.jit(grouped.indices_to_codes)(np.int32([0, 40, 39]))
  np.testing.assert_array_equal(codes[:2], [-3.5, -2])
  np.testing.assert_array_equal(np.isnan(codes[2:4]), [True, True])
  np.testing.assert_array_equal(codes[4:], [3.5, 2])


@pytest.mark.slow
def test_channels_may_stand_on_another_axis():
  last = GroupedFSQ((8, 5), num_groups=3)
  first = GroupedFSQ((8, 5), num_groups=3, channel_axis=1)
  z = _normal((2, 4, 5, 6))
  expected, out = _call(last, z), _call(first, jnp.moveaxis(z, -1, 1))
  assert out.indices.shape == (2, 4, 5, 3)
  np.testing.assert_array_equal(out.indices, expected.indices)
  np.testing.assert_array_equal(out.z_q, jnp.moveaxis(expected.z_q, -1, 1))
  decoded = jax.jit(first.indices_to_codes)(out.indices)
  np.testing.assert_array_equal(decoded, out.z_q)
  again = jax.jit(first.codes_to_indices)(out.z_q)
  np.testing.assert_array_equal(again, out.indices)


@pytest.mark.slow
def test_noise_has_one_amplitude_an_example_for_all_groups():
  grouped = GroupedFSQ(
      (8, 5), num_groups=3, noise=0.5, noise_per='example'
  )
  z = _normal((50, 100, 6))

  def apply(z, key):
    return grouped.apply({}, z, train=True, rngs={'quantizer': key})

  out = jax.jit(apply)(z, jax.random.key(0))
  noise = np.abs(out.z_q - _call(grouped, z).z_q)
  groups = np.max(noise.reshape(50, 100, 3, 2), axis=(1, 3))
  np.testing.assert_allclose(groups, groups[:, :1] * np.ones(3), rtol=0.1)
  assert np.min(groups) < 0.1 < 0.4 < np.max(groups)


def test_missing_and_wrong_index_axes_are_refused():
  grouped = GroupedFSQ((8, 5), num_groups=3)
  for shape in ((4, 2), (4,), ()):
    with pytest.raises(ValueError, match='must hold the 3 indices of a code'):
      grouped.indices_to_codes(jnp.zeros(shape, jnp.int32))
  with pytest.raises(ValueError, match='2 channels'):
    grouped.digits_to_codes(jnp.zeros((4, 3, 3), jnp.int32))


@pytest.mark.parametrize('num_groups', [0, -1, 2.0, True, None])
def test_constructor_refuses_what_cannot_work(num_groups):
  with pytest.raises(ValueError, match=f'num_groups is {num_groups}; .* 1 to'):
    GroupedFSQ((8, 5), num_groups=num_groups)
  with pytest.raises(ValueError, match=r'levels\[1\] is 1'):
    GroupedFSQ((8, 1), num_groups=2)


def test_spec_is_that_of_fsq_with_groups():
  spec = FSQ((8, 5), 'paper').spec()
  grouped = GroupedFSQ((8, 5), 'paper', num_groups=3)
  assert grouped.spec() == spec | {'name': 'grouped_fsq', 'num_groups': 3}
