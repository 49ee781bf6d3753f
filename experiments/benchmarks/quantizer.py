"""Benchmarks FSQ and the nearest-neighbour search of VQ."""

from typing import Any

import jax
from jax import numpy as jnp

from experiments.benchmarks import blocks
from fsq_jax import quantizers
from fsq_jax.quantizers import lookup

NUM_VECTORS = 2**20
LEVELS = (8, 5, 5, 5)
# Vectors, codebook entries and dimensions of the nearest-neighbour search.
LOOKUP = (4096, 16384, 64)


def fsq_figures(
    rounds: int, peer: blocks.TorchPeer | None
) -> dict[str, Any]:
  """Times the forward pass of FSQ, memory copies and PyTorch's FSQ."""
  z = jax.random.normal(jax.random.key(0), (NUM_VECTORS, len(LEVELS)))
  quantizer = quantizers.FSQ(levels=LEVELS, commitment_weight=0.0)

  def quantize(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    output = quantizer.apply({}, z)
    return output.z_q, output.indices

  # A copy with the memory traffic of FSQ, 36 MiB: z, codes, indices.
  stream = jnp.ones((NUM_VECTORS * (2 * len(LEVELS) + 1) // 2,))
  alternatives = {
      'stream_copy': _jitted_block(lambda x: x + 1, stream),
      'fsq': _jitted_block(quantize, z),
      'tanh': _jitted_block(jnp.tanh, z),
      'copy_of_latents': _jitted_block(lambda x: x + 1, z),
  }
  figures = blocks.alternate(
      alternatives, baseline='stream_copy', calls=4, rounds=rounds
  )
  if peer is not None:
    peer.build('fsq', num_vectors=NUM_VECTORS, levels=LEVELS)
    beside = blocks.alternate(
        {'fsq': alternatives['fsq'], 'pytorch': peer.block('fsq')},
        baseline='fsq', calls=4, rounds=rounds,
    )
    figures['by_pytorch'] = beside['pytorch']
    figures['fsq_beside_pytorch'] = beside['fsq']
  return figures


def lookup_figures(rounds: int) -> dict[str, Any]:
  """Times the nearest-neighbour search of VQ relative to its matmul."""
  num_vectors, codebook_size, code_dim = LOOKUP
  keys = jax.random.split(jax.random.key(0))
  x = jax.random.normal(keys[0], (num_vectors, code_dim))
  codebook = jax.random.normal(keys[1], (codebook_size, code_dim))
  figures = blocks.alternate(
      {
          'matmul': _jitted_block(lambda x, y: x @ y.T, x, codebook),
          'nearest': _jitted_block(lookup.nearest, x, codebook),
      },
      baseline='matmul', calls=1, rounds=rounds,
  )
  operations = 2 * num_vectors * codebook_size * code_dim
  for figure in figures.values():
    figure['gflops'] = operations / figure['ms'] / 1e6
  return figures


def _jitted_block(function: Any, *arguments: jax.Array) -> blocks.Block:
  jitted = jax.jit(function)
  return blocks.block_of(lambda: jax.block_until_ready(jitted(*arguments)))
