"""Tests of the Pallas kernel, interpreted, against plain float32 attention."""

from einops import rearrange
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.models import attention_kernel


def _plain(q, k, v, head_dim, causal):
  """Attention of [B, N, heads * d] in float32."""
  q, k, v = (
      rearrange(x.astype(jnp.float32), 'b n (h d) -> b h n d', d=head_dim)
      for x in (q, k, v)
  )
  logits = jnp.einsum('bhqd,bhkd->bhqk', q, k) * head_dim**-0.5
  if causal:
    mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    logits = jnp.where(mask, logits, -jnp.inf)
  mixed = jnp.einsum('bhqk,bhkd->bhqd', jax.nn.softmax(logits, axis=-1), v)
  return rearrange(mixed, 'b h n d -> b n (h d)')


def _results(function, q, k, v, gradient):
  """The mixed values and the gradients of q, k and v, as float32."""

  @jax.jit
  def run(q, k, v, gradient):
    mixed, back_propagate = jax.vjp(function, q, k, v)
    return mixed, *back_propagate(gradient.astype(mixed.dtype))

  return [np.float32(x) for x in run(q, k, v, gradient)]


@pytest.mark.fast_variants('7-8-16-False-bfloat16', '7-3-80-True-float32')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    ('length', 'num_heads', 'head_dim', 'causal'),
    [
        (1, 2, 64, True),
        (7, 8, 16, False),
        (7, 3, 80, True),
        pytest.param(196, 2, 72, True, marks=pytest.mark.slow),
        pytest.param(256, 2, 128, False, marks=pytest.mark.slow),
        pytest.param(257, 4, 64, False, marks=pytest.mark.slow),
        pytest.param(785, 2, 64, True, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_plain_attention(
    length, num_heads, head_dim, causal, dtype, interpreted_kernels
):
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (2, length, num_heads * head_dim)
  arrays = [(0.5 * jax.random.normal(key, shape)).astype(dtype) for key in keys]
  options = attention_kernel.Options(head_dim, causal)
  found = _results(
      lambda *x: attention_kernel.attention(*x, options), *arrays
  )
  expected = _results(lambda *x: _plain(*x, head_dim, causal), *arrays)
  # A rounding step of bfloat16 is 2^-8 of a value.
  tolerance = {'float32': 1e-6, 'bfloat16': 2**-6}[dtype]
  for x, y in zip(found, expected, strict=True):
    scale = max(np.abs(y).max(), 1e-3)
    np.testing.assert_allclose(
        x / scale, y / scale, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize('length', [1, 7, 196, 257, 785, 1024])
@pytest.mark.parametrize('num_heads', [1, 3, 4, 6, 16])
@pytest.mark.parametrize('head_dim', [16, 64, 72, 80, 128])
def test_blocks_have_whole_heads_and_a_width_that_tpus_allow(
    length, num_heads, head_dim
):
  width = num_heads * head_dim
  group = attention_kernel.group_width(length, width, head_dim)
  assert width % group == 0
  assert group % head_dim == 0
  assert group == width or group % 128 == 0


def test_long_sequences_have_blocks_of_few_heads():
  assert attention_kernel.group_width(785, 384, 64) == 128
  assert attention_kernel.group_width(257, 1024, 64) == 128
  assert attention_kernel.group_width(257, 1152, 72) == 1152
  assert attention_kernel.group_width(64, 1024, 64) == 1024
