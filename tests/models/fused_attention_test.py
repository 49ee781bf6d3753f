"""Tests of the choice of fused attention: devices, dtypes, meshes."""

import contextlib
import re

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax.generators import attention as generator_attention
from fsq_jax.models import fused_attention
from fsq_jax.models import layers
from fsq_jax.runtime import partitioning


def _arrays(dtype='bfloat16', shape=(8, 4, 7, 16)):
  return [
      jax.random.normal(key, shape).astype(dtype)
      for key in jax.random.split(jax.random.key(0), 3)
  ]


def _mesh(data=1, fsdp=1, tensor=1):
  return partitioning.create_mesh(
      {'data': data, 'fsdp': fsdp, 'tensor': tensor},
      jax.devices()[: data * fsdp * tensor],
  )


def _place(arrays, mesh):
  return jax.device_put(arrays, partitioning.batch_sharding(mesh))


def _plain(q, k, v):
  """The formula of `layers.attend` on CPUs."""
  logits = jnp.einsum(
      'bhqd,bhkd->bhqk', q * q.shape[-1] ** -0.5, k,
      preferred_element_type=jnp.float32,
  )
  weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  mixed = jnp.einsum(
      'bhqk,bhkd->bhqd', weights.astype(v.dtype), v,
      preferred_element_type=jnp.float32,
  )
  return mixed / jnp.sum(weights, axis=-1, keepdims=True)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_on_cpus_attention_is_the_plain_formula_bit_for_bit(dtype):
  arrays = _place(_arrays(dtype), _mesh(2))
  found, expected = (jax.jit(f)(*arrays) for f in (layers.attend, _plain))
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, expected)
  assert fused_attention.attend(*arrays) is None


def _attention_gradients(function, arrays):
  def loss(*arrays):
    arrays = [partitioning.constrain(x, tensor_axis=1) for x in arrays]
    mixed = function(*arrays)
    return jnp.sum(jnp.sin(mixed.astype(jnp.float32))), mixed

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize(
    ('sizes', 'num_heads'),
    [
        pytest.param((1, 1, 1), 4, marks=pytest.mark.slow),
        ((2, 2, 2), 4),
        pytest.param((1, 2, 4), 4, marks=pytest.mark.slow),
        pytest.param((2, 1, 4), 6, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize('causal', [False, True])
def test_kernels_on_meshes_agree_with_plain_attention(
    sizes, num_heads, causal, interpreted_kernels
):
  arrays = _arrays(shape=(8, num_heads, 7, 16))

  def plain(q, k, v):
    return generator_attention.attend(
        q, k, v, jnp.tril(jnp.ones((7, 7), bool)) if causal else None
    )

  def fused(q, k, v):
    mixed = fused_attention.attend(q, k, v, causal=causal)
    assert mixed.dtype == jnp.bfloat16
    return mixed

  (_, expected), gradients = _attention_gradients(plain, arrays)(
      *(x.astype(jnp.float32) for x in arrays)
  )
  placed = _place(arrays, _mesh(*sizes))
  compiled = _attention_gradients(fused, placed).lower(*placed).compile()
  (_, found), found_gradients = compiled(*placed)
  for x, y in zip(
      (found, *found_gradients), (expected, *gradients), strict=True
  ):
    np.testing.assert_allclose(np.float32(x), y, atol=2**-6, rtol=2**-6)
  # The loss is summed over devices, and nothing else.
  text = compiled.as_text()
  assert 'all-to-all(' not in text
  assert set(re.findall(r'(\S+) all-reduce\(', text)) <= {'f32[]'}
  if num_heads % sizes[2] == 0:
    assert 'all-gather(' not in text


@pytest.mark.parametrize('module', ['vit', 'causal', 'masked'])
def test_models_attend_by_the_kernel(module, interpreted_kernels):
  functions = {
      'vit': layers.attend,
      'causal': lambda *x: generator_attention.attend_within(*x, causal=True),
      'masked': lambda *x: generator_attention.attend_within(*x, causal=False),
  }
  arrays = _place(_arrays(), _mesh(4))
  jaxpr = str(jax.make_jaxpr(functions[module])(*arrays))
  assert jaxpr.count('name=forward_attention') == 1
  found = jax.jit(functions[module])(*arrays)
  with fused_attention.unfused():
    # Another function, since jit does not know of the context.
    expected = jax.jit(lambda *x: functions[module](*x))(*arrays)
  assert found.dtype == expected.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=2**-6, rtol=2**-6)


def test_arrays_without_a_kernel(interpreted_kernels):
  mesh = _mesh(4)
  arrays = _arrays()
  placed = _place(arrays, mesh)

  def is_fused(*arrays, context=contextlib.nullcontext):
    with context():
      # A new function each time: the context is not part of JAX's caches.
      found = jax.eval_shape(lambda *x: fused_attention.attend(*x), *arrays)
      return found is not None

  assert is_fused(*placed)
  assert not is_fused(*placed, context=fused_attention.unfused)
  assert not is_fused(*arrays)
  assert not is_fused(*_place(_arrays('float32'), mesh))
  q, *others = placed
  assert not is_fused(q.astype(jnp.float32), *others)
  assert not is_fused(q[:, :, :1], *others)
  # Devices that do not divide the batch.
  odd = jax.device_put(
      _arrays(shape=(3, 4, 7, 16)), partitioning.replicated(mesh)
  )
  assert not is_fused(*odd)
  # Logits that do not fit into VMEM.
  struct = jax.ShapeDtypeStruct((8, 1, 3000, 64), jnp.bfloat16)
  long = struct.update(sharding=partitioning.batch_sharding(mesh))
  assert not is_fused(long, long, long)


def test_networks_under_no_mesh_have_images_on_all_devices(interpreted_kernels):
  arrays = _arrays(shape=(8, 3, 7, 16))
  mesh = _mesh(2, 2, 2)

  @jax.jit
  def apply(*arrays):
    arrays = [partitioning.shard_over_all_axes(x) for x in arrays]
    with partitioning.no_mesh():
      return layers.attend(*arrays)

  compiled = apply.lower(*_place(arrays, mesh)).compile()
  assert 'all-gather(' not in compiled.as_text()
  result = compiled(*_place(arrays, mesh))
  assert result.sharding.shard_shape(result.shape)[0] == 1
  np.testing.assert_allclose(result, _plain(*arrays), atol=2**-6)


def _abstract(platform, kind, shape, dtype='bfloat16'):
  """Arrays on a mesh of devices that this machine does not have."""
  device = jax.sharding.AbstractDevice(
      device_kind=kind, num_cores=1, platform=platform
  )
  mesh = jax.sharding.AbstractMesh(
      (4, 1, 1), partitioning.AXES,
      axis_types=(jax.sharding.AxisType.Auto,) * 3, abstract_device=device,
  )
  spec = jax.sharding.PartitionSpec('data')
  sharding = jax.sharding.NamedSharding(mesh, spec)
  return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)] * 3


@pytest.mark.parametrize(
    ('dtype', 'num_heads', 'length', 'head_dim', 'kernels'),
    [
        ('bfloat16', 4, 257, 64, 2),
        ('bfloat16', 2, 7, 72, 2),
        ('float32', 4, 257, 64, 0),
    ],
)
def test_kernels_are_lowered_for_tpus_on_any_machine(
    dtype, num_heads, length, head_dim, kernels
):
  arrays = _abstract(
      'tpu', 'TPU v5 lite', (4, num_heads, length, head_dim), dtype
  )

  def gradients(*arrays):
    mixed, back_propagate = jax.vjp(layers.attend, *arrays)
    return back_propagate(mixed)

  lowered = jax.jit(gradients).trace(*arrays).lower(
      lowering_platforms=('tpu',)
  )
  assert lowered.as_text().count('@tpu_custom_call') == kernels


@pytest.mark.parametrize(
    ('kind', 'dtype', 'head_dim', 'is_fused'),
    [
        ('NVIDIA H100 80GB HBM3', 'bfloat16', 64, True),
        ('NVIDIA H100 80GB HBM3', 'float16', 72, True),
        ('NVIDIA H100 80GB HBM3', 'float32', 64, False),
        ('NVIDIA H100 80GB HBM3', 'bfloat16', 12, False),
        ('AMD Instinct MI300X', 'bfloat16', 64, False),
    ],
)
def test_gpus_of_nvidia_have_cudnn(
    kind, dtype, head_dim, is_fused, monkeypatch
):
  calls = []

  def attention(q, k, v, *, implementation, **_):
    calls.append(implementation)
    return q

  monkeypatch.setattr(jax.nn, 'dot_product_attention', attention)
  arrays = _abstract('gpu', kind, (4, 2, 8, head_dim), dtype)
  jax.eval_shape(layers.attend, *arrays)
  assert calls == ['cudnn'] * is_fused


@pytest.mark.parametrize('length', [7, 8])
@pytest.mark.parametrize('causal', [False, True])
def test_odd_lengths_are_padded_for_cudnn(length, causal, monkeypatch):
  attention = jax.nn.dot_product_attention

  def check(q, k, v, *, implementation, **kwargs):
    assert implementation == 'cudnn'
    assert q.shape == k.shape == v.shape == (8, 8, 4, 16)
    assert q.dtype == jnp.bfloat16
    return attention(q, k, v, implementation='xla', **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', check)
  monkeypatch.setattr(fused_attention, 'has_cudnn', lambda mesh: True)
  arrays = _arrays(shape=(8, 4, length, 16))
  found = jax.jit(
      lambda *x: fused_attention.attend(*x, causal=causal)
  )(*_place(arrays, _mesh(2)))
  allowed = jnp.tril(jnp.ones((length, length), bool)) if causal else None
  expected = generator_attention.attend(*arrays, allowed)
  np.testing.assert_allclose(np.float32(found), expected, atol=2**-6)
