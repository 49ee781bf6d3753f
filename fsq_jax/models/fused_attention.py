"""Attention by the fused kernels of TPUs and NVIDIA GPUs, where they fit."""

from collections.abc import Iterator
import contextlib
import contextvars

from einops import rearrange
import jax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fsq_jax.models import remat
from fsq_jax.runtime import partitioning

_GPU_DTYPES = (jnp.bfloat16, jnp.float16)
# cuDNN supports more channels per head on some GPUs.
_GPU_MAX_HEAD_DIM = 128
_is_enabled = contextvars.ContextVar('_is_enabled', default=True)


@contextlib.contextmanager
def unfused() -> Iterator[None]:
  """Context in which `attend` uses no kernel.

  Kernels have a gradient, but no second one and no forward-mode derivative.
  """
  token = _is_enabled.set(False)
  try:
    yield
  finally:
    _is_enabled.reset(token)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False
) -> jax.Array | None:
  """Scaled dot-product attention by a kernel that stores no logits.

  A Pallas kernel on TPUs for bfloat16, and cuDNN on NVIDIA GPUs for bfloat16
  and float16. The devices are those of the mesh that the arrays are on, which
  JAX knows while it traces: a step compiled for TPUs on a machine without TPUs
  has the kernel, and a program for CPUs is the same as without this function.
  Arrays without a mesh, as in `jax.export`, have no known device.

  Args:
    q: [B, heads, N, d] queries.
    k: keys, same shape and dtype.
    v: values, same shape and dtype.
    causal: whether a token attends to itself and earlier tokens only.

  Returns:
    Weighted means of the values, same shape and dtype; None if no kernel fits:
    other devices, dtypes or shapes, no mesh of `partitioning.create_mesh`,
    devices that do not divide the batch, or under `unfused`.
  """
  mesh = partitioning.find_mesh(q)
  if (
      not _is_enabled.get()
      or mesh is None
      or not q.shape == k.shape == v.shape
      or not q.dtype == k.dtype == v.dtype
      or not all(isinstance(size, int) for size in q.shape)
  ):
    return None
  mixed = None
  if vmem_bytes(mesh) and q.dtype == jnp.bfloat16:
    mixed = _attend_tpu(q, k, v, causal, vmem_bytes(mesh))
  elif has_cudnn(mesh) and q.dtype in _GPU_DTYPES:
    mixed = _attend_gpu(q, k, v, causal)
  return None if mixed is None else checkpoint_name(mixed, remat.KERNEL_OUTPUT)


def vmem_bytes(mesh: jax.sharding.AbstractMesh) -> int:
  """Returns the VMEM of a core of the mesh's TPUs; 0 for other devices."""
  device = mesh.abstract_device
  if device is None or device.platform != 'tpu':
    return 0
  # Imported here: it takes a third of a second, which CPUs do without.
  from jax.experimental.pallas import tpu as pltpu

  with jax.sharding.use_abstract_mesh(mesh):
    try:
      return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # A kind that this version of JAX does not know.
      return 0


def has_cudnn(mesh: jax.sharding.AbstractMesh) -> bool:
  """Whether the mesh's devices are GPUs for which cuDNN has attention."""
  device = mesh.abstract_device
  if (
      device is None
      or device.platform.lower() not in ('cuda', 'gpu')
      or 'NVIDIA' not in device.device_kind
  ):
    return False
  try:
    devices = jax.local_devices(backend='cuda')
  except RuntimeError:  # Compiled on a machine without GPUs.
    return True
  return all(float(x.compute_capability) >= 8 for x in devices)


def _attend_tpu(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, vmem: int
) -> jax.Array | None:
  from fsq_jax.models import attention_kernel

  num_heads, length, head_dim = q.shape[1:]
  sharding = partitioning.activation_sharding(q, tensor_axis=1)
  if sharding is None:
    return None
  mesh, (batch_axes, head_axis, *_) = sharding.mesh, sharding.spec
  if head_axis is not None:
    num_heads //= mesh.shape[head_axis]
  needed = attention_kernel.needed_bytes(
      length, num_heads * head_dim, head_dim
  )
  if needed > vmem // 2:  # The compiler needs buffers of its own.
    return None
  spec = jax.sharding.PartitionSpec(batch_axes, None, head_axis)
  options = attention_kernel.Options(
      head_dim, causal, jax.sharding.NamedSharding(mesh, spec)
  )
  q, k, v = (
      checkpoint_name(
          rearrange(x, 'b h n d -> b n (h d)'), remat.KERNEL_ARGUMENTS
      )
      for x in (q, k, v)
  )
  mixed = attention_kernel.attention(q, k, v, options)
  return rearrange(mixed, 'b n (h d) -> b h n d', d=head_dim)


def _attend_gpu(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool
) -> jax.Array | None:
  batch, _, length, head_dim = q.shape
  if head_dim % 8 or head_dim > _GPU_MAX_HEAD_DIM:
    return None
  q, k, v = (rearrange(x, 'b h n d -> b n h d') for x in (q, k, v))
  lengths = None
  if length % 2:
    # cuDNN's kernels for odd lengths are few: a token is added and masked.
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(batch, length, jnp.int32)
  q, k, v = (checkpoint_name(x, remat.KERNEL_ARGUMENTS) for x in (q, k, v))
  mixed = jax.nn.dot_product_attention(
      q, k, v, is_causal=causal, key_value_seq_lengths=lengths,
      implementation='cudnn',
  )
  return rearrange(mixed[:, :length], 'b n h d -> b h n d')
