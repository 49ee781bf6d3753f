"""Builds quantizers from a config by name."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from fsq_jax.quantizers import base
from fsq_jax.quantizers import checks
from fsq_jax.quantizers import fsq
from fsq_jax.quantizers import grouped
from fsq_jax.quantizers import lfq
from fsq_jax.quantizers import none
from fsq_jax.quantizers import residual
from fsq_jax.quantizers import simvq
from fsq_jax.quantizers import vq

QUANTIZERS = {
    'bsq': lfq.BSQ,
    'fsq': fsq.FSQ,
    'grouped_fsq': grouped.GroupedFSQ,
    'lfq': lfq.LFQ,
    'none': none.NoQuantizer,
    'residual_fsq': residual.ResidualFSQ,
    'simvq': simvq.SimVQ,
    'vq': vq.VectorQuantizer,
}


def build_quantizer(config: Mapping[str, Any]) -> base.Quantizer:
  """Builds the quantizer named in a config.

  Args:
    config: ConfigDict or mapping; `name` chooses the quantizer, every other
      key is a field of its class.

  Returns:
    The unbound module.
  """
  options = dict(config)
  name = options.pop('name', None)
  checks.check_name('model.quantizer.name', name, QUANTIZERS)
  quantizer = QUANTIZERS[name]
  # `parent` and `name` are the fields that linen adds.
  fields = {field.name for field in dataclasses.fields(quantizer)}
  fields -= {'parent', 'name'}
  if unknown := sorted(set(options) - fields):
    raise ValueError(
        f'model.quantizer has {unknown}, which are no fields of {name!r}; its '
        f'fields: {sorted(fields)}.'
    )
  # Unbound, also inside a method of another module.
  return quantizer(parent=None, **options)
