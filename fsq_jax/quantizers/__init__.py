"""Quantizers: latents to codes and indices."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from fsq_jax.quantizers.base import Quantizer
from fsq_jax.quantizers.base import QuantizerOutput
from fsq_jax.quantizers.digits import DigitQuantizer
from fsq_jax.quantizers.fsq import FSQ
from fsq_jax.quantizers.grouped import GroupedFSQ
from fsq_jax.quantizers.level_sets import recommended_levels
from fsq_jax.quantizers.lfq import BSQ
from fsq_jax.quantizers.lfq import LFQ
from fsq_jax.quantizers.residual import ResidualFSQ
from fsq_jax.quantizers.simvq import SimVQ
from fsq_jax.quantizers.vq import VectorQuantizer

__all__ = [
    'BSQ',
    'FSQ',
    'LFQ',
    'DigitQuantizer',
    'GroupedFSQ',
    'Quantizer',
    'QuantizerOutput',
    'ResidualFSQ',
    'SimVQ',
    'VectorQuantizer',
    'build_quantizer',
    'recommended_levels',
]

_QUANTIZERS = {
    'bsq': BSQ,
    'fsq': FSQ,
    'grouped_fsq': GroupedFSQ,
    'lfq': LFQ,
    'residual_fsq': ResidualFSQ,
    'simvq': SimVQ,
    'vq': VectorQuantizer,
}


def build_quantizer(config: Mapping[str, Any]) -> Quantizer:
  """Builds the quantizer that a config names.

  Args:
    config: ConfigDict or mapping; `name` chooses the quantizer, every other
      key is a field of its class.

  Returns:
    The unbound module.
  """
  options = dict(config)
  name = options.pop('name', None)
  if name not in _QUANTIZERS:
    raise ValueError(
        f'model.quantizer.name is {name!r}; known: {sorted(_QUANTIZERS)}.'
    )
  quantizer = _QUANTIZERS[name]
  # `parent` and `name` are the fields that linen adds.
  fields = {field.name for field in dataclasses.fields(quantizer)}
  fields -= {'parent', 'name'}
  if unknown := sorted(set(options) - fields):
    raise ValueError(
        f'model.quantizer has {unknown}, which {name!r} does not know; its '
        f'fields: {sorted(fields)}.'
    )
  return quantizer(**options)
