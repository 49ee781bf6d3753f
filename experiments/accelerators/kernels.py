"""Kernels in HLO text: FLOPs of custom calls, and which kernels attention got.

TPUs have Pallas kernels, NVIDIA GPUs the libraries cuBLAS and cuDNN.
"""

from collections.abc import Callable, Sequence
import math
import re

from experiments.accelerators import hlo

# Matmuls of cuDNN's attention, the backward pass with the recomputed logits.
_FMHA = {'__cudnn$fmhaSoftmax': 2, '__cudnn$fmhaSoftmaxBackward': 5}
# The einsum of `layers.attend`; directly under jvp, a bracket follows.
_LOGITS = re.compile(r'bhqd,bhkd->bhqk\)*/dot_general')

ConvolutionFlops = Callable[
    [Sequence[int], Sequence[int], Sequence[int], hlo.Instruction], float
]


def custom_call_flops(
    instruction: hlo.Instruction,
    operands: Sequence[hlo.Array],
    convolution_flops: ConvolutionFlops,
) -> float:
  """Returns the matmul FLOPs of one execution of a custom call.

  Args:
    instruction: with the opcode 'custom-call'.
    operands: its operands.
    convolution_flops: see `hlo_costs.convolution_flops`.

  Returns:
    FLOPs, two per multiply-add; of a Pallas kernel, its cost estimate; 0 for a
    kernel without matmuls.
  """
  target = _target(instruction)
  if target == 'tpu_custom_call':
    flops = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.rest)
    return float(flops.group(1)) if flops else 0.0
  if target.startswith('__cublas$'):
    axes = _integers(
        r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', instruction
    )
    contracted = math.prod(operands[0].shape[i] for i in axes)
    return 2.0 * math.prod(instruction.arrays[0].shape) * contracted
  if target.startswith('__cudnn$conv'):
    # dim_labels and window are those of the forward convolution.
    result = instruction.arrays[0].shape
    lhs, rhs = (x.shape for x in operands[:2])
    if 'BackwardInput' in target:
      lhs, result = result, lhs
    elif 'BackwardFilter' in target:
      rhs, result = result, rhs
    return convolution_flops(lhs, rhs, result, instruction)
  if target in _FMHA:
    # [batch, heads, queries, keys] of the logits.
    logits = _integers(r'"dimensions":\s*\[([^\]]*)\]', instruction)
    head_dim = instruction.arrays[0].shape[-1]
    return 2.0 * _FMHA[target] * math.prod(logits) * head_dim
  return 0.0


def find_attention(instruction: hlo.Instruction, op_name: str) -> str:
  """Returns the attention that an instruction computes, '' for none.

  Args:
    instruction: a matmul or a kernel with matmuls.
    op_name: its origin in the model.

  Returns:
    'Pallas' or 'cuDNN' with ' forward' or ' backward'; 'XLA forward' for
    the logits of attention without a kernel.
  """
  target = _target(instruction)
  if target in _FMHA:
    return f'cuDNN {"backward" if "Backward" in target else "forward"}'
  if target == 'tpu_custom_call':
    found = re.search(r'/(forward|backward)_attention', op_name)
    return f'Pallas {found.group(1)}' if found else ''
  # Recomputed logits are within the transposed function.
  is_gradient = 'transpose(' in op_name and 'rematted' not in op_name
  is_logits = _LOGITS.search(op_name) and not is_gradient
  return 'XLA forward' if is_logits else ''


def _integers(pattern: str, instruction: hlo.Instruction) -> list[int]:
  """Returns the integers of the first match of a pattern in the attributes."""
  found = re.search(pattern, instruction.rest)
  return [int(x) for x in re.findall(r'\d+', found.group(1))]


def _target(instruction: hlo.Instruction) -> str:
  found = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
  return found.group(1) if found else ''
