"""The table of quantizers, and the builder that chooses by name."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from fsq_jax.quantizers import base
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
  """Builds the quantizer that a config names.

  Args:
    config: ConfigDict or mapping; `name` chooses the quantizer, every other
      key is a field of its class.

  Returns:
    The unbound module.
  """
  options = dict(config)
  name = options.pop('name', None)
  if name not in list(QUANTIZERS):
    raise ValueError(
        f'model.quantizer.name is {name!r}; known: {sorted(QUANTIZERS)}.'
    )
  quantizer = QUANTIZERS[name]
  # `parent` and `name` are the fields that linen adds.
  fields = {field.name for field in dataclasses.fields(quantizer)}
  fields -= {'parent', 'name'}
  if unknown := sorted(set(options) - fields):
    raise ValueError(
        f'model.quantizer has {unknown}, which {name!r} does not know; its '
        f'fields: {sorted(fields)}.'
    )
  # Unbound inside a method of another module, too.
  return quantizer(parent=None, **options)
