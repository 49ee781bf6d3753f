"""Rematerialization: intermediate results that the backward pass recomputes."""

from typing import Any

from flax import linen as nn
import jax

CHOICES = ('none', 'blocks', 'qkv', 'dots')
# Names of the results of fused attention, which 'dots' saves, and of its
# arguments, which 'qkv' saves.
KERNEL_OUTPUT = 'fused_attention'
KERNEL_ARGUMENTS = 'fused_attention_qkv'


def apply_remat(
    block: type[nn.Module], remat: str, **options: Any
) -> type[nn.Module]:
  """Returns a module class whose backward pass recomputes by a policy.

  Args:
    block: class of a block of a network.
    remat: 'none' saves all intermediate results; 'blocks' saves only the
      block's input; 'qkv' also saves the arguments of fused attention kernels;
      'dots' saves the results of dense layers, convolutions and these kernels,
      and recomputes the rest: norms, activations, and the logits of attention
      without a kernel.
    **options: of `flax.linen.remat`.

  Raises:
    ValueError: another value of remat.
  """
  policies = jax.checkpoint_policies
  match remat:
    case 'none':
      return block
    case 'blocks':
      return nn.remat(block, **options)
    case 'qkv':
      policy = policies.save_only_these_names(KERNEL_ARGUMENTS)
      return nn.remat(block, policy=policy, **options)
    case 'dots':
      policy = policies.save_from_both_policies(
          policies.save_only_these_names(KERNEL_OUTPUT), _is_layer
      )
      return nn.remat(block, policy=policy, **options)
  raise ValueError(f'remat is {remat!r}; known: {list(CHOICES)}.')


def _is_layer(primitive: Any, *_: Any, **params: Any) -> bool:
  """Whether an operation is a dense layer or a convolution.

  Matmuls with a batch dimension, as in attention, have results that are larger
  than the activations.
  """
  if primitive is jax.lax.dot_general_p:
    _, (lhs_batch, _) = params['dimension_numbers']
    return not lhs_batch
  return primitive is jax.lax.conv_general_dilated_p
