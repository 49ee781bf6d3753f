"""Chips to compile for: peak values, and devices without hardware."""

import importlib.util
import pathlib
from typing import Any, NamedTuple

from jax.experimental import topologies

_FOLDER = pathlib.Path(__file__).parent
_GPUS_PER_HOST = 8


class Chip(NamedTuple):
  """Peak values of a chip, from its vendor's documentation.

  Attributes:
    flops: bf16 FLOP/s.
    hbm_bandwidth: bytes per second.
    link_bandwidth: bytes per second in one direction, half of the documented
      bidirectional value.
    package: pip package of the compiler.
  """

  flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  package: str


# cloud.google.com/tpu/docs/<name>; nvidia.com/h100, SXM.
CHIPS = {
    'v5e': Chip(197e12, 819e9, 200e9, 'libtpu'),
    'v5p': Chip(459e12, 2765e9, 600e9, 'libtpu'),
    'v6e': Chip(918e12, 1638e9, 400e9, 'libtpu'),
    'h100': Chip(989e12, 3352e9, 450e9, 'jax-cuda13-plugin'),
}
_REQUIREMENTS = {
    'libtpu': 'libtpu==0.0.42.1',
    'jax-cuda13-plugin': '"jax[cuda13]==0.10.2"',
}
_MODULES = {'libtpu': 'libtpu', 'jax-cuda13-plugin': 'jax_plugins.xla_cuda13'}


def find_chip(topology: str) -> Chip:
  """Returns the chip of a topology, such as 'v5e:4x4' or 'h100:8'.

  Raises:
    ValueError: an unknown chip.
  """
  name = topology.partition(':')[0]
  if name not in CHIPS:
    raise ValueError(
        f'The topology {topology!r} has the chip {name!r}; known:'
        f' {sorted(CHIPS)}.'
    )
  return CHIPS[name]


def missing_plugin(topology: str) -> str:
  """Returns how to install the compiler of a topology; '' if it is there."""
  package = find_chip(topology).package
  try:
    found = importlib.util.find_spec(_MODULES[package])
  except ModuleNotFoundError:  # The parent package.
    found = None
  if found:
    return ''
  return (
      f'Compiling for {topology} needs {package}: pip install'
      f' {_REQUIREMENTS[package]}'
  )


def describe_devices(topology: str) -> list[Any]:
  """Returns the devices of a topology; the machine needs none of them.

  Args:
    topology: of `jax.experimental.topologies` for TPUs, such as 'v5e:4x4';
      the number of GPUs, such as 'h100:8', on hosts with 8 each.
  """
  name, _, size = topology.partition(':')
  if find_chip(topology).package == 'libtpu':
    description = topologies.get_topology_desc(
        platform='tpu', topology_name=topology
    )
  else:
    import jax_plugins.xla_cuda13  # noqa: F401  Registers the platform.

    num_hosts = -(-int(size) // _GPUS_PER_HOST)
    target = _FOLDER / f'{name}.txtpb'
    description = topologies.get_topology_desc(
        platform='cuda',
        topology_name='',
        topology=f'{num_hosts}x{int(size) // num_hosts}x1',
        target_config=target.read_text(encoding='utf-8'),
    )
  return list(description.devices)
