"""LFQ and BSQ: orders of bits, the entropy loss against its definition."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsq_jax.quantizers import BSQ
from fsq_jax.quantizers import LFQ

both = pytest.mark.parametrize('cls', [LFQ, BSQ])
# BSQ only in the slow tier: these properties do not depend on the projection.
mostly_lfq = pytest.mark.parametrize(
    'cls', [LFQ, pytest.param(BSQ, marks=pytest.mark.slow)]
)


def _call(quantizer, z):
  return jax.jit(lambda z: quantizer.apply({}, z))(z)


def _normal(shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _latents_and_scale(quantizer, z):
  """Returns float64 latents as the loss sees them, and the size of codes."""
  z = np.asarray(z, np.float64)
  if isinstance(quantizer, BSQ):
    return z / np.linalg.norm(z, axis=-1, keepdims=True), z.shape[-1] ** -0.5
  return z, 1.0


def _softmax_over_codebook(z, scale, temperature):
  """Probabilities [N, 2^d] over all codes, by the definition."""
  signs = list(itertools.product([-1, 1], repeat=z.shape[-1]))
  codebook = scale * np.asarray(signs, np.float64)
  distances = np.sum((z[:, None] - codebook) ** 2, axis=-1)
  logits = -distances / temperature
  logits -= np.max(logits, axis=-1, keepdims=True)
  return np.exp(logits) / np.sum(np.exp(logits), axis=-1, keepdims=True)


def _entropy(p):
  return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def test_bits_in_both_orders():
  z = jnp.asarray([0.3, -0.7, 1.2, -0.1])
  msb, lsb = LFQ(4), LFQ(4, bit_order='lsb_first')
  np.testing.assert_array_equal(_call(msb, z).z_q, [1, -1, 1, -1])
  assert int(_call(msb, z).indices) == 10
  assert int(_call(lsb, z).indices) == 5
  np.testing.assert_array_equal(msb.indices_to_digits(10), [1, 0, 1, 0])
  np.testing.assert_array_equal(lsb.indices_to_digits(5), [1, 0, 1, 0])
  np.testing.assert_array_equal(msb.indices_to_codes(1), [-1, -1, -1, 1])
  np.testing.assert_array_equal(lsb.indices_to_codes(1), [1, -1, -1, -1])
  assert msb.levels == (2, 2, 2, 2)


@both
def test_zero_is_no_positive_number(cls):
  out = _call(cls(3), jnp.asarray([[0.0, -0.0, 1.0], [0.0, 0.0, 0.0]]))
  np.testing.assert_array_equal(out.indices, [1, 0])
  assert np.isfinite(out.loss)


@mostly_lfq
def test_largest_codebook_works_to_its_last_index(cls):
  quantizer = cls(30)
  assert quantizer.codebook_size == 2**30
  indices = jnp.asarray([0, 1, 2**29, 2**30 - 1])
  codes = jax.jit(quantizer.indices_to_codes)(indices)
  np.testing.assert_array_equal(
      jax.jit(quantizer.codes_to_indices)(codes), indices
  )
  assert np.all(np.isnan(jax.jit(quantizer.indices_to_codes)(2**30)))


def test_codes_of_bsq_are_signs_of_unit_length():
  call = jax.jit(lambda z: BSQ(6).apply({}, z))
  z = _normal((50, 6))
  out = call(z)
  np.testing.assert_array_equal(
      out.z_q, np.where(z > 0, 1, -1) * np.float32(6**-0.5)
  )
  # The length of a latent means nothing, however small or large.
  for size in (1e-30, 1e30):
    scaled = call(size * z)
    np.testing.assert_array_equal(scaled.z_q, out.z_q)
    np.testing.assert_array_equal(scaled.indices, out.indices)
    np.testing.assert_allclose(scaled.loss, out.loss, rtol=1e-5)


def test_gradient_of_lfq_is_the_identity_and_of_bsq_tangent():
  z, weights = _normal((20, 5)), _normal((20, 5), seed=1)

  def gradient(quantizer):
    return jax.jit(
        jax.grad(lambda z: jnp.sum(weights * quantizer.apply({}, z).z_q))
    )(z)

  np.testing.assert_array_equal(gradient(LFQ(5)), weights)
  length = np.linalg.norm(z, axis=-1, keepdims=True)
  unit = z / length
  radial = np.sum(unit * weights, axis=-1, keepdims=True) * unit
  np.testing.assert_allclose(
      gradient(BSQ(5)), (weights - radial) / length, rtol=1e-4, atol=1e-6
  )


@both
@pytest.mark.parametrize(('temperature', 'diversity_weight'), [
    (1.0, 2.5),
    pytest.param(0.01, 1.0, marks=pytest.mark.slow),
    pytest.param(0.01, 0.0, marks=pytest.mark.slow),
])  # fmt: skip
def test_loss_is_that_of_the_softmax_over_the_codebook(
    cls, temperature, diversity_weight
):
  quantizer = cls(
      5, temperature=temperature, diversity_weight=diversity_weight
  )
  z = 0.3 * _normal((4, 10, 5))
  x, scale = _latents_and_scale(quantizer, z)
  x = x.reshape(40, 5)
  p = _softmax_over_codebook(x, scale, temperature)
  commitment = np.mean((x - scale * np.where(x > 0, 1, -1)) ** 2)
  entropy = np.mean(_entropy(p))
  entropy -= diversity_weight * _entropy(np.mean(p, axis=0))
  np.testing.assert_allclose(
      _call(quantizer, z).loss, 0.25 * commitment + 0.1 * entropy, rtol=1e-5
  )


@pytest.mark.slow
def test_entropy_of_the_mean_is_summed_over_groups():
  z = 0.3 * _normal((40, 5)) + 0.2 * _normal((40, 1), seed=1)
  p = _softmax_over_codebook(np.float64(z), 1.0, 0.3)
  mean = np.mean(p, axis=0).reshape((2,) * 5)
  marginals = {
      1: [mean.sum(axis=tuple({*range(5)} - {i})) for i in range(5)],
      2: [mean.sum((2, 3, 4)), mean.sum((0, 1, 4)), mean.sum((0, 1, 2, 3))],
      4: [mean.sum((3, 4)), mean.sum((0, 1, 2))],  # as even as can be
      5: [mean],
  }
  sums = {}
  for bits, groups in marginals.items():
    sums[bits] = sum(_entropy(group.ravel()) for group in groups)
    quantizer = LFQ(
        5, commitment_weight=0.0, entropy_weight=1.0, temperature=0.3,
        entropy_group_bits=bits,
    )  # fmt: skip
    np.testing.assert_allclose(
        _call(quantizer, z).loss, np.mean(_entropy(p)) - sums[bits], rtol=1e-5
    )
  # An upper bound, and not a tight one: the latents share a part.
  assert sums[1] > sums[2] > sums[5] + 0.1


@pytest.mark.slow
@both
def test_gradient_of_the_loss_is_that_of_the_definition(cls):
  quantizer = cls(4, temperature=0.5)
  z = 0.3 * _normal((12, 4))

  def definition(z):
    # As above, where autodiff can follow.
    scale = 1.0
    if cls is BSQ:
      z, scale = z / jnp.linalg.norm(z, axis=-1, keepdims=True), 0.5
    signs = np.asarray(list(itertools.product([-1.0, 1.0], repeat=4)))
    logits = -jnp.sum((z[:, None] - scale * signs) ** 2, axis=-1) / 0.5
    p = jax.nn.softmax(logits)
    mean = jnp.mean(p, axis=0)
    codes = scale * jnp.where(z > 0, 1, -1)
    entropy = jnp.sum(mean * jnp.log(mean)) - jnp.mean(
        jnp.sum(p * jax.nn.log_softmax(logits), axis=-1)
    )
    return 0.25 * jnp.mean((z - codes) ** 2) + 0.1 * entropy

  np.testing.assert_allclose(
      jax.jit(jax.grad(lambda z: quantizer.apply({}, z).loss))(z),
      jax.jit(jax.grad(definition))(z),
      rtol=1e-4,
      atol=1e-7,
  )


def test_loss_prefers_codes_in_use_and_sure_ones():
  every = jax.jit(LFQ(4).indices_to_codes)(np.arange(16))
  entropy = LFQ(4, commitment_weight=0.0, entropy_weight=1.0)
  loss = jax.jit(lambda z: entropy.apply({}, z).loss)
  spread = loss(every)
  collapsed = loss(np.broadcast_to(every[:1], (16, 4)))
  unsure = loss(0.0 * every)
  np.testing.assert_allclose(spread, -math.log(16), rtol=1e-6)
  np.testing.assert_allclose(collapsed, 0, atol=1e-6)
  np.testing.assert_allclose(unsure, 0, atol=1e-5)
  without = LFQ(4, commitment_weight=0.0, entropy_weight=0.0)
  assert float(_call(without, every).loss) == 0


@both
@pytest.mark.slow
def test_loss_of_a_single_vector_is_no_special_case(cls):
  quantizer = cls(4)
  z = _normal((4,))
  np.testing.assert_allclose(
      _call(quantizer, z).loss, _call(quantizer, z[None]).loss, rtol=1e-6
  )


@both
@pytest.mark.parametrize('dtype', [
    'float32',
    pytest.param('bfloat16', marks=pytest.mark.slow),
    pytest.param('float16', marks=pytest.mark.slow),
])  # fmt: skip
def test_extreme_latents_give_corners_and_no_nan(cls, dtype):
  largest = float(jnp.finfo(dtype).max)
  sizes = [1e4, largest, np.inf]
  z = jnp.asarray([[s * size] * 3 for s in (-1, 1) for size in sizes], dtype)
  quantizer = cls(3)

  def total(z):
    out = quantizer.apply({}, z)
    return jnp.sum(out.z_q.astype(jnp.float32)) + out.loss, out

  gradient, out = jax.jit(jax.grad(total, has_aux=True))(z)
  np.testing.assert_array_equal(out.indices, [0, 0, 0, 7, 7, 7])
  assert not np.any(np.isnan(out.loss))
  assert not np.any(np.isnan(gradient))


@mostly_lfq
def test_nan_spoils_only_its_vector(cls):
  call = jax.jit(lambda z: cls(3).apply({}, z))
  z = np.array(_normal((4, 3)))
  clean = call(z)
  z[2, 1] = np.nan
  out = call(z)
  assert int(out.indices[2]) == -1
  assert np.isnan(out.z_q[2, 1])
  others = np.asarray([0, 1, 3])
  np.testing.assert_array_equal(out.indices[others], clean.indices[others])
  np.testing.assert_array_equal(out.z_q[others], clean.z_q[others])


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'num_bits': 0}, 'num_bits is 0; .* 1 to 30'),
        ({'num_bits': 31}, 'num_bits is 31'),
        ({'num_bits': 8.0}, 'num_bits is 8.0'),
        ({'bit_order': 'first'}, "'first'; known: .'lsb_first', 'msb_first'"),
        ({'entropy_group_bits': 17}, 'entropy_group_bits is 17; .* 1 to 16'),
        ({'entropy_weight': -0.1}, 'entropy_weight is -0.1'),
        ({'commitment_weight': None}, 'commitment_weight is None'),
        ({'diversity_weight': math.inf}, 'diversity_weight is inf'),
        ({'temperature': 0.0}, 'temperature is 0.0'),
    ],
)
@both
def test_constructor_refuses_what_cannot_work(cls, fields, match):
  with pytest.raises(ValueError, match=match):
    cls(**{'num_bits': 8, **fields})


def test_spec_leaves_training_out():
  assert LFQ(4, temperature=1.0).spec() == {
      'name': 'lfq',
      'num_bits': 4,
      'bit_order': 'msb_first',
      'rounding': 'digit 1 where z > 0',
      'index_order': 'last dimension fastest',
      'code': '2 * digit - 1',
  }
  lsb = LFQ(4, bit_order='lsb_first').spec()
  assert lsb['index_order'] == 'first dimension fastest'
  assert BSQ(4).spec()['name'] == 'bsq'
  assert BSQ(4).spec()['projection'] == 'z / |z|'
