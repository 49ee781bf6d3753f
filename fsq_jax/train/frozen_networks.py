"""Frozen networks that training looks at images through, loaded and placed."""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp
import ml_collections

from fsq_jax import adversarial
from fsq_jax import models
from fsq_jax.perceptual import distance
from fsq_jax.runtime import partitioning


class Networks(NamedTuple):
  """The frozen networks of a config.

  They are no part of the train state, and no checkpoint holds them: a run reads
  them again, and `check_same` holds it to the same weights.

  Attributes:
    perceptual: the module of losses.perceptual, None without.
    variables: 'perceptual': its variables; 'discriminator': parameters of the
      backbone. Each is there if the config has it.
    hashes: section and name of a network, such as
      'losses.perceptual.lpips_vgg16', to the sha256 of its weights.
  """

  perceptual: nn.Module | None
  variables: dict[str, Any]
  hashes: dict[str, str]

  def check_same(self, saved: Mapping[str, str]) -> None:
    """Refuses to go on with other weights than those of a checkpoint.

    Args:
      saved: `hashes` as they were.

    Raises:
      ValueError: a network has other weights; all of them are listed.
    """
    differences = [
        f'{field}: {saved[field]} -> {self.hashes[field]}'
        for field in sorted(saved.keys() & self.hashes.keys())
        if saved[field] != self.hashes[field]
    ]
    if differences:
      raise ValueError(
          '\n  '.join([
              'The frozen networks have other weights than those that this run'
              ' was trained with (sha256, saved -> current):',
              *differences,
          ])
          + '\nName the files that it was trained with.'
      )


def load_networks(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Networks:
  """Reads the networks that the losses of a config look through.

  Args:
    config: the whole config.
    mesh: from `partitioning.create_mesh`; weights are spread over it as
      parameters are under 'fsdp'.

  Returns:
    The networks.

  Raises:
    ValueError: weights that are missing or damaged.
  """
  network, variables, hashes = None, {}, {}
  options = config.losses.perceptual
  if options.name != 'none':
    field = 'losses.perceptual.checkpoint'
    load = functools.partial(
        distance.build_perceptual_loss, dtype=jnp.dtype(options.dtype)
    )
    network = _load(field, load, options.name, options.checkpoint)
    variables['perceptual'] = network.variables
    hashes[f'losses.perceptual.{options.name}'] = network.sha256
  if config.discriminator.name == 'dino':
    field = 'discriminator.dino.checkpoint'
    path = config.discriminator.dino.checkpoint
    discriminator = adversarial.build_discriminator(config.discriminator)
    backbone = _load(
        field, adversarial.load_discriminator_backbone, path, discriminator
    )
    variables['discriminator'] = {'backbone': backbone}
    hashes['discriminator.dino'] = models.hash_weights(path)
  shardings = partitioning.state_shardings(
      variables, mesh, (('.*', 'fsdp'),), config.partitioning.fsdp_min_size
  )
  module = None if network is None else network.module
  return Networks(module, jax.device_put(variables, shardings), hashes)


def _load(field: str, load, *args):
  """Calls a loader; what is wrong with the file comes with its field."""
  try:
    return load(*args)
  except ValueError as error:
    raise ValueError(f'{field}: {error}') from error
