"""Measures training steps, FSQ and sampling on the devices at hand.

  python -m experiments.accelerators.measure --torch_python=PYTHON

Made for one GPU. No case starts after four minutes; cases that are skipped are
listed. Weights and images are random. PYTHON is an
interpreter with PyTorch for GPUs; without it that comparison is left out.
--tiny measures small models, which checks the script on a CPU.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import os
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from experiments.accelerators import steps
from experiments.benchmarks import blocks
from experiments.generation import sampling_cost
from fsq_jax import quantizers
from fsq_jax.models import fused_attention
from fsq_jax.runtime import partitioning

# After this many seconds nothing new starts: compiling and timing the largest
# step takes a minute.
_BUDGET = 240
SECONDS_PER_ROW = 3.0
_LEVELS = (8, 5, 5, 5)


class Training(NamedTuple):
  """A training step to measure.

  Attributes:
    label: of the rows.
    config: name of a file in configs.
    fields: config overrides.
    batch_sizes: images per step, the first that fits in memory is measured.
    torch: arguments of `torch_peer.build_vit_step` for the same network.
  """

  label: str
  config: str
  fields: Mapping[str, Any]
  batch_sizes: Sequence[int]
  torch: Mapping[str, Any] | None = None


class Sampling(NamedTuple):
  """A sampler to measure; fields as in `sampling_cost.build_sampler`."""

  variant: str
  preset: str
  batch_size: int
  grid: tuple[int, int]
  options: Mapping[str, Any] = {}


class Row(NamedTuple):
  """A measured speed.

  Attributes:
    label: name of the step, sampler or operation.
    batch_size: images per call; 0 if there are none.
    seconds: of a call, the median; None if it was not measured.
    flops: of the matmuls of a call, without recomputation; 0 if not counted.
    note: whatever else is known.
  """

  label: str
  batch_size: int
  seconds: float | None
  flops: float = 0
  note: str = ''


def _vit(label: str, *, depth: int, batch_sizes: Sequence[int], **sizes):
  """Returns the step of a ViT autoencoder; `depth` blocks in either half."""
  fields = {
      'data.image_size': (sizes['image_side'],) * 2,
      'model.quantizer.fsq.levels': (8, 8, 8),
      'model.dtype': 'bfloat16',
      # PyTorch's step has none of these.
      'model.quantizer.fsq.commitment_weight': 0.0,
      'optim.clip_norm': 0.0,
      'optim.ema_decay': 0.0,
  }
  names = ('patch_size', 'width', 'num_heads', 'mlp_dim')
  for part in ('encoder', 'decoder'):
    fields |= {f'model.{part}.{name}': sizes[name] for name in names}
    fields[f'model.{part}.depth'] = depth
    fields[f'model.{part}.position'] = 'learned'
  return Training(
      label, 'default', fields, batch_sizes, {**sizes, 'num_blocks': 2 * depth}
  )


_BFLOAT16 = {'dtype': jnp.bfloat16}
# The most important first.
FULL = (
    Training('vqrae_fsq_siglip_l', 'vqrae_fsq_siglip_l', {}, (64, 32, 16)),
    _vit(
        'ViT-B/16 autoencoder', depth=12, batch_sizes=(128, 64, 32),
        image_side=256, patch_size=16, width=768, num_heads=12, mlp_dim=3072,
    ),
    Sampling('masked, 12 steps', 'B', 64, (16, 16), _BFLOAT16),
    Training('imagenet256_fsq_1024', 'imagenet256_fsq_1024', {}, (32, 16, 8)),
    _vit(
        'ViT-L/16 autoencoder', depth=24, batch_sizes=(64, 32, 16),
        image_side=256, patch_size=16, width=1024, num_heads=16, mlp_dim=4096,
    ),
    Sampling('autoregressive, cache', 'B', 64, (16, 16), _BFLOAT16),
)
_SMALL = {
    'image_side': 16, 'patch_size': 8, 'width': 32, 'num_heads': 2,
    'mlp_dim': 64,
}
TINY = (
    _vit('ViT autoencoder', depth=1, batch_sizes=(8,), **_SMALL),
    Sampling('masked, 8 steps', 'tiny', 2, (4, 4), {'depth': 1, 'width': 32}),
)


def measure(
    cases: Sequence[Training | Sampling],
    *,
    budget: float = _BUDGET,
    matmul_side: int = 8192,
    num_vectors: int = 2**24,
    peer: blocks.TorchPeer | None = None,
) -> Iterator[Row]:
  """Measures cases until the time is over.

  Args:
    cases: training steps and samplers.
    budget: no case starts after so many seconds.
    matmul_side: of the matrices whose matmul is the peak.
    num_vectors: that FSQ quantizes.
    peer: PyTorch.

  Yields:
    Rows; the first is the matmul in bfloat16.
  """
  started = time.monotonic()
  # Not constant: the clock of a GPU depends on the bits that change.
  shape = matmul_side, matmul_side
  matrix = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
  multiply = jax.jit(jnp.matmul)
  yield Row(
      f'matmul of {matmul_side} x {matmul_side} in bfloat16', 0,
      _time(lambda: multiply(matrix, matrix)), 2.0 * matmul_side**3,
  )
  yield from _measure_fsq(num_vectors)
  for case in cases:
    if time.monotonic() - started > budget:
      yield Row(_label(case), 0, None, note='skipped, out of time')
      continue
    try:
      if isinstance(case, Training):
        yield from _measure_training(case, peer)
      else:
        yield _measure_sampling(case)
    except Exception as error:  # The other rows are worth having.
      reason = str(error).partition('\n')[0]
      note = f'failed: {type(error).__name__}: {reason}'
      yield Row(_label(case), 0, None, note=note)


def _label(case: Training | Sampling) -> str:
  if isinstance(case, Training):
    return case.label
  return f'sampling, {case.preset}: {case.variant}'


def _measure_sampling(case: Sampling) -> Row:
  call, num_bytes = sampling_cost.build_sampler(
      case.variant, case.preset, case.batch_size, case.grid, **case.options
  )
  return Row(
      _label(case), case.batch_size, _time(call),
      note=f'{num_bytes / 2**30:.2f} GiB of temporary arrays',
  )


def _measure_fsq(num_vectors: int) -> Iterator[Row]:
  quantizer = quantizers.FSQ(levels=_LEVELS, commitment_weight=0.0)
  z = jax.random.normal(jax.random.key(0), (num_vectors, len(_LEVELS)))
  # Reads and writes as many bytes as FSQ: latents, codes and indices.
  stream = jnp.ones((num_vectors * (2 * len(_LEVELS) + 1) // 2,))
  copy = jax.jit(lambda x: x + 1)

  @jax.jit
  def quantize(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    output = quantizer.apply({}, z)
    return output.z_q, output.indices

  seconds = _time(lambda: copy(stream))
  bandwidth = 2 * stream.nbytes / seconds / 1e9
  yield Row('copy on the device', 0, seconds, note=f'{bandwidth:.0f} GB/s')
  own = _time(lambda: quantize(z))
  yield Row(
      f'FSQ forward with indices, {num_vectors:,} vectors', 0, own,
      note=f'{own / seconds:.2f} of the copy',
  )


def _measure_training(
    case: Training, peer: blocks.TorchPeer | None
) -> Iterator[Row]:
  """Measures a step with fused attention, by XLA alone, and in PyTorch."""
  batch_size = seconds = None
  for batch_size in case.batch_sizes:
    with contextlib.suppress(_OutOfMemoryError):
      seconds, memory = _time_step(case, batch_size)
      break
  if seconds is None:
    note = f'does not fit with {batch_size} images'
    yield Row(case.label, batch_size, None, note=note)
    return
  config = steps.load_config(case.config, batch_size, case.fields)
  flops = steps.count_model_flops(config)
  yield Row(case.label, batch_size, seconds, flops, memory)
  label = f'{case.label}, attention by XLA'
  try:
    with fused_attention.unfused():
      seconds, memory = _time_step(case, batch_size)
    yield Row(label, batch_size, seconds, flops, memory)
  except _OutOfMemoryError:
    yield Row(label, batch_size, None, note='does not fit')
  if peer is not None and case.torch:
    version = peer.build(
        'vit_step', batch_size=batch_size,
        on_gpu=jax.default_backend() == 'gpu', **case.torch,
    )['torch']
    block = peer.block('vit_step')
    seconds = _repeat(lambda: block(1)[0])
    label = f'{case.label}, PyTorch {version}, compiled'
    yield Row(label, batch_size, seconds, flops)


class _OutOfMemoryError(Exception):
  """The step does not fit on the devices."""


def _time_step(case: Training, batch_size: int) -> tuple[float, str]:
  """Returns the seconds of a step and a note on its memory."""
  config = steps.load_config(case.config, batch_size, case.fields)
  mesh = partitioning.create_mesh({'data': -1, 'fsdp': 1})
  try:
    compiled = steps.build_step(config, mesh).lowered.compile()
    (state, *inputs), _ = jax.tree_util.tree_map_with_path(
        _draw, compiled.args_info, compiled.input_shardings
    )

    def step() -> Any:
      nonlocal state
      state, scalars = compiled(state, *inputs)
      return state, scalars

    seconds = _time(step)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise _OutOfMemoryError from error
  memory = compiled.memory_analysis()
  total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  return seconds, f'{total / 2**30:.1f} GiB'


def _draw(
    path: tuple[Any, ...], array: Any, sharding: jax.sharding.Sharding
) -> jax.Array:
  """Draws an array; the optimizer starts from zero."""

  def draw() -> jax.Array:
    key, shape, dtype = jax.random.key(0), array.shape, array.dtype
    if dtype == jnp.uint8:
      return jax.random.bits(key, shape, dtype)
    in_optimizer = 'opt_state' in jax.tree_util.keystr(path)
    if in_optimizer or not jnp.issubdtype(dtype, jnp.floating):
      return jnp.zeros(shape, dtype)
    return 0.02 * jax.random.normal(key, shape, dtype)

  return jax.jit(draw, out_shardings=sharding)()


def _time(function: Callable[[], Any]) -> float:
  """Returns the median seconds of a call, after two calls to warm up."""

  def call() -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started

  return _repeat(call)


def _repeat(call: Callable[[], float]) -> float:
  times = [call() for _ in range(5)][2:]
  while sum(times) < SECONDS_PER_ROW and len(times) < 100:
    times.append(call())
  return statistics.median(times)


def print_table(rows: Sequence[Row]) -> None:
  """Prints a Markdown table; the first row is the peak of FLOP/s."""
  write = sys.stdout.write
  peak = rows[0].flops / rows[0].seconds
  write('| measured | images | ms | images/s | TFLOP/s | of the matmul | |\n')
  write('|---' * 7 + '|\n')
  for row in rows:
    cells = [row.label, str(row.batch_size or ''), '', '', '', '', row.note]
    if row.seconds is not None:
      cells[2] = f'{row.seconds * 1e3:.3g}'
      if row.batch_size:
        cells[3] = f'{row.batch_size / row.seconds:.4g}'
      if row.flops:
        rate = row.flops / row.seconds
        cells[4:6] = f'{rate / 1e12:.3g}', f'{rate / peak:.0%}'
    write(f'| {" | ".join(cells)} |\n')


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--tiny', action='store_true', help='small models')
  parser.add_argument('--torch_python', default='', help='with PyTorch')
  arguments = parser.parse_args()
  # By default JAX reserves three quarters of the memory; PyTorch needs some.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  path = arguments.torch_python
  peer = blocks.TorchPeer(path) if path else None
  if arguments.tiny:
    rows = measure(TINY, matmul_side=256, num_vectors=2**12, peer=peer)
  else:
    rows = measure(FULL, peer=peer)
  done = []
  for row in rows:
    time_text = '' if row.seconds is None else f'{row.seconds * 1e3:.3g} ms '
    sys.stdout.write(f'{row.label}: {time_text}{row.note}\n')
    sys.stdout.flush()
    done.append(row)
  if peer is not None:
    peer.close()
  device = jax.devices()[0]
  devices = f'{jax.device_count()} x {device.device_kind}'
  sys.stdout.write(f'\n{devices}, JAX {jax.__version__}\n\n')
  print_table(done)


if __name__ == '__main__':
  main()
