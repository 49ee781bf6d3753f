"""Benchmarks a ViT autoencoder training step: PyTorch, compile time, memory."""

import functools
import resource
import statistics
import time
from typing import Any
from unittest import mock

from flax import linen as nn
import jax
import numpy as np

from experiments import sweep
from experiments.benchmarks import blocks
from fsq_jax import models
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step

CONFIG = 'configs/default.py'
BATCH_SIZE = 64
SIDE = 32
PATCH = 4
WIDTH = 192
NUM_HEADS = 3
MLP_DIM = 768
NUM_BLOCKS = 4
# Input and output channels of the dense layers of a block.
DENSE = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, MLP_DIM), (MLP_DIM, WIDTH))


class Step:
  """A compiled training step and its state.

  Attributes:
    compiled: the compiled step.
    trace_seconds: CPU time of tracing and lowering.
    compile_seconds: CPU time of the compiler.
  """

  def __init__(self, *, num_blocks: int, **fields: Any):
    """Compiles the step.

    Args:
      num_blocks: blocks of encoder and decoder together.
      **fields: further config overrides, dotted.
    """
    config = sweep.make_config(CONFIG, _settings(num_blocks) | fields)
    mesh = partitioning.create_mesh(config.partitioning.mesh)
    model = models.build_autoencoder(config.model, config.data.image_size)
    optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
    self._builder = train_state.build_state_builder(
        config, model, optimizer, mesh
    )
    shape = (BATCH_SIZE, SIDE, SIDE, 3)
    self._images = np.random.default_rng(0).integers(
        256, size=shape, dtype=np.uint8
    )
    step = jax.jit(
        train_step.build_train_step(model, optimizer, config), donate_argnums=0
    )
    started = time.process_time()
    lowered = step.lower(self._builder.abstract, self._images)
    traced = time.process_time()
    self.compiled = lowered.compile()
    self.trace_seconds = traced - started
    self.compile_seconds = time.process_time() - traced
    self._state = None

  def __call__(self) -> None:
    """Runs one step and waits for it."""
    if self._state is None:
      self._state = self._builder.create()
      self._images = jax.device_put(self._images)
    self._state, _ = self.compiled(self._state, self._images)
    jax.block_until_ready(self._state)


class Matmuls:
  """The matmuls of the dense layers of all blocks, and nothing else.

  Three per layer: the output, the input gradient and the kernel gradient.
  """

  def __init__(self):
    """Draws the operands; the matmuls have the layouts of the training step."""
    num_rows = BATCH_SIZE * (SIDE // PATCH) ** 2
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
      return jax.device_put(rng.standard_normal(shape, np.float32))

    self._operands = [
        (draw(num_rows, rows), draw(rows, columns), draw(num_rows, columns))
        for rows, columns in DENSE
    ]
    self._functions = (
        jax.jit(lambda x, kernel, _: x @ kernel),
        jax.jit(lambda _, kernel, grads: grads @ kernel.T),
        jax.jit(lambda x, _, grads: x.T @ grads),
    )

  def __call__(self) -> None:
    """Runs each matmul once."""
    for _ in range(NUM_BLOCKS):
      for operands in self._operands:
        for function in self._functions:
          jax.block_until_ready(function(*operands))


def torch_figures(
    rounds: int, peer: blocks.TorchPeer | None
) -> dict[str, Any]:
  """Times a step with scan, with unrolled blocks, and in PyTorch (eager).

  Also times the matmuls of a step alone, in JAX and PyTorch.
  """
  alternatives = {
      'unrolled': blocks.block_of(
          Step(num_blocks=NUM_BLOCKS, **{'model.scan_unroll': NUM_BLOCKS})
      ),
      'scan': blocks.block_of(Step(num_blocks=NUM_BLOCKS)),
      'matmuls': blocks.block_of(Matmuls()),
  }
  if peer is not None:
    peer.build(
        'vit_step', batch_size=BATCH_SIZE, image_side=SIDE, patch_size=PATCH,
        width=WIDTH, num_heads=NUM_HEADS, mlp_dim=MLP_DIM,
        num_blocks=NUM_BLOCKS,
    )
    alternatives['pytorch'] = peer.block('vit_step')
    peer.build(
        'matmuls', num_rows=BATCH_SIZE * (SIDE // PATCH) ** 2, dense=DENSE,
        num_blocks=NUM_BLOCKS,
    )
    alternatives['pytorch_matmuls'] = peer.block('matmuls')
  return blocks.alternate(
      alternatives, baseline='unrolled', calls=1, rounds=rounds
  )


def compile_figures(rounds: int) -> dict[str, Any]:
  """Measures the CPU time of tracing and compiling by depth, with scan."""
  seconds = {6: [], 24: []}
  for _ in range(rounds):
    for num_blocks, own in seconds.items():
      step = Step(num_blocks=num_blocks)
      own.append((step.trace_seconds, step.compile_seconds))
  figures = {}
  for num_blocks, own in seconds.items():
    trace, compilation = map(statistics.median, zip(*own, strict=True))
    figures[f'blocks_{num_blocks}'] = {
        'trace_seconds': trace, 'compile_seconds': compilation
    }
  ratios = (sum(x) / sum(y) for x, y in zip(*seconds.values(), strict=True))
  return figures | {'ratio': 1 / statistics.median(ratios)}


def memory_figures(rounds: int) -> dict[str, Any]:
  """Measures memory and time of a step with and without remat.

  Includes a JAX policy that the package does not offer: saving the results of
  all matmuls; its remat 'dots' recomputes the logits of attention.
  """
  variants: dict[str, Step] = {
      f'{layout}_{name}': Step(
          num_blocks=NUM_BLOCKS,
          **{'model.scan_unroll': unroll, 'model.remat': remat},
      )
      for layout, unroll in (('unrolled', NUM_BLOCKS), ('scan', 1))
      for name, remat in (('kept', 'none'), ('remat', 'blocks'))
  }
  keep_matmuls = functools.partial(
      nn.remat, policy=jax.checkpoint_policies.dots_saveable
  )
  with mock.patch.object(nn, 'remat', keep_matmuls):
    variants['scan_matmuls'] = Step(
        num_blocks=NUM_BLOCKS, **{'model.remat': 'blocks'}
    )
  figures = blocks.alternate(
      {name: blocks.block_of(step) for name, step in variants.items()},
      baseline='unrolled_kept', calls=1, rounds=rounds,
  )
  for name, step in variants.items():
    memory = step.compiled.memory_analysis()
    figures[name]['temporary_mib'] = memory.temp_size_in_bytes / 2**20
    figures[name]['arguments_mib'] = memory.argument_size_in_bytes / 2**20
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return figures | {'process_peak_mib': peak / 2**10}


def _settings(num_blocks: int) -> sweep.Overrides:
  fields = {
      'data.batch_size': BATCH_SIZE,
      'data.image_size': (SIDE, SIDE),
      'model.quantizer.fsq.levels': (8, 8, 8),
      'model.quantizer.fsq.commitment_weight': 0.0,
      # PyTorch's step has neither.
      'optim.clip_norm': 0.0,
      'optim.ema_decay': 0.0,
  }
  for part in ('encoder', 'decoder'):
    fields |= {
        f'model.{part}.patch_size': PATCH,
        f'model.{part}.width': WIDTH,
        f'model.{part}.depth': num_blocks // 2,
        f'model.{part}.num_heads': NUM_HEADS,
        f'model.{part}.mlp_dim': MLP_DIM,
        f'model.{part}.position': 'learned',
    }
  return fields
