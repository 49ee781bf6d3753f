"""No quantizer: latents pass bit for bit, and no tokens come of them."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import quantizers
from fsq_jax.quantizers import convert
from fsq_jax.quantizers import specs

_DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def _latents(dtype=jnp.float32):
  z = 1e3 * jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
  z = z.at[0, 0, 0, 0].set(jnp.nan).at[0, 0, 0, 1].set(jnp.inf)
  return z.at[0, 0, 0, 2].set(-0.0).astype(dtype)


@pytest.mark.parametrize('dtype', _DTYPES)
@pytest.mark.parametrize(('train', 'channel_axis'), [(False, -1), (True, 1)])
def test_latents_pass_bit_for_bit(dtype, train, channel_axis):
  quantizer = quantizers.NoQuantizer(code_dim=5, channel_axis=channel_axis)
  z = jnp.moveaxis(_latents(dtype), -1, channel_axis)
  out = jax.jit(lambda z: quantizer.apply({}, z, train=train))(z)
  assert out.z_q.dtype == dtype
  assert np.asarray(out.z_q).tobytes() == np.asarray(z).tobytes()
  assert out.loss == 0


@pytest.mark.parametrize('dtype', _DTYPES)
def test_the_gradient_passes_bit_for_bit(dtype):
  quantizer = quantizers.NoQuantizer(code_dim=5)
  z = _latents(dtype)
  cotangent = jax.random.normal(jax.random.key(1), z.shape).astype(dtype)

  @jax.jit
  def pull_back(z, cotangent):
    out, vjp = jax.vjp(lambda z: quantizer.apply({}, z)[:2], z)
    return vjp((cotangent, jnp.ones_like(out[1])))[0]

  gradient = pull_back(z, cotangent)
  assert gradient.dtype == dtype
  np.testing.assert_array_equal(gradient, cotangent)


@pytest.mark.parametrize('method', ['indices_to_codes', 'get_codebook_entry'])
def test_nothing_decodes_indices(method):
  quantizer = quantizers.NoQuantizer(code_dim=5)
  indices = quantizer.apply({}, _latents()).indices
  with pytest.raises(ValueError, match=r"no tokens, .* such as 'fsq'"):
    quantizer.apply({}, indices, method=method)


def test_there_are_no_indices():
  quantizer = quantizers.NoQuantizer(code_dim=5, channel_axis=1)
  z = jnp.moveaxis(_latents(), -1, 1)
  indices = quantizer.codes_to_indices(z)
  assert indices.dtype == jnp.int32
  assert indices.shape == (2, 3, 4, 0)
  assert quantizer.codebook_size == 0


@pytest.mark.parametrize('code_dim', [None, 0, 2.5, True])
def test_wrong_numbers_of_channels_are_refused(code_dim):
  with pytest.raises(ValueError, match=r'code_dim is .*; use an integer, 1'):
    quantizers.NoQuantizer(code_dim=code_dim)


def test_latents_of_another_size_are_another_spec():
  eight, five = (quantizers.NoQuantizer(code_dim=d).spec() for d in (8, 5))
  specs.check_same_spec(eight, eight)
  with pytest.raises(ValueError, match=r'code_dim: 8 -> 5\nDecode them'):
    specs.check_same_spec(eight, five)
  with pytest.raises(ValueError, match="'none' have no level"):
    convert.quantizer_from_spec(eight)
