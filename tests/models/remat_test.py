"""Tests of rematerialization: equal gradients, and the results it saves."""

import chex
from flax import linen as nn
import jax
from jax import numpy as jnp
import pytest

from fsq_jax.models import conv
from fsq_jax.models import layers
from fsq_jax.models import remat
from fsq_jax.runtime import partitioning

_X = jax.ShapeDtypeStruct((4, 7, 32), jnp.float32)


def _transformer(choice, dtype=jnp.float32):
  return layers.Transformer(2, 2, 64, dtype, choice, 1)


def _loss(module):
  return lambda params, x: jnp.mean(
      jnp.sin(module.apply(params, x).astype(jnp.float32))
  )


@pytest.mark.slow
def test_every_choice_has_the_same_gradients():
  x = jax.random.normal(jax.random.key(0), _X.shape)
  plain = _transformer('none')
  params = jax.jit(plain.init)(jax.random.key(1), x)
  gradients = [
      jax.jit(jax.grad(_loss(_transformer(choice))))(params, x)
      for choice in remat.CHOICES
  ]
  for other in gradients[1:]:
    chex.assert_trees_all_close(other, gradients[0], rtol=1e-5, atol=1e-7)


def _num_saved(module, x):
  """Values that are kept for the backward pass."""
  params = jax.eval_shape(module.init, jax.random.key(0), x)
  kept = jax.eval_shape(
      lambda p, x: jax.vjp(lambda p: module.apply(p, x), p)[1], params, x
  )
  return sum(x.size for x in jax.tree.leaves(kept))


def test_dots_are_saved_and_logits_are_not():
  saved = {
      choice: _num_saved(_transformer(choice), _X)
      for choice in remat.CHOICES
  }
  # 2 blocks of 4 x 7 tokens: outputs of qkv, attention's and the MLP's layers.
  dense = 2 * 4 * 7 * (3 * 32 + 32 + 64 + 32)
  more = saved['dots'] - saved['blocks']
  assert 0.7 * dense < more <= dense
  assert saved['none'] > saved['dots']


def test_convolutions_are_saved():
  x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
  blocks, dots, none = (
      _num_saved(
          conv.ConvEncoder(
              filters=32, channel_multipliers=(1,), num_res_blocks=1,
              latent_width=4, grid_size=(8, 8), remat=choice,
          ),
          x,
      )
      for choice in ('blocks', 'dots', 'none')
  )
  assert blocks < dots < none


@pytest.mark.fast_variants('dots-1')
@pytest.mark.parametrize(
    ('choice', 'num_forward'),
    [('none', 1), ('blocks', 2), ('qkv', 2), ('dots', 1)],
)
def test_dots_run_a_fused_kernel_once(
    choice, num_forward, interpreted_kernels
):
  mesh = partitioning.create_mesh({'data': 4, 'fsdp': 1}, jax.devices()[:4])
  x = _X.update(sharding=partitioning.batch_sharding(mesh))
  module = _transformer(choice, jnp.bfloat16)
  params = jax.eval_shape(module.init, jax.random.key(0), x)
  jaxpr = jax.make_jaxpr(jax.grad(_loss(module)))(params, x)
  text = str(jaxpr)
  assert text.count('name=forward_attention') == num_forward
  assert text.count('name=backward_attention') == 1


def test_the_arguments_of_a_fused_kernel_are_saved(interpreted_kernels):
  mesh = partitioning.create_mesh({'data': 4, 'fsdp': 1}, jax.devices()[:4])
  x = _X.update(sharding=partitioning.batch_sharding(mesh))
  blocks, qkv = (
      _num_saved(_transformer(choice, jnp.bfloat16), x)
      for choice in ('blocks', 'qkv')
  )
  # Less the biases of the layer that computes them.
  assert qkv - blocks == 2 * 3 * (_X.size - 32)


def test_unknown_choices_are_named():
  with pytest.raises(ValueError, match=r"remat is True; known: \['none'"):
    remat.apply_remat(nn.Dense, True)
