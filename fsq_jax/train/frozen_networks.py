"""Loads the frozen networks of the losses and places them on the mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp
import ml_collections

from fsq_jax.adversarial import builder as adversarial_builder
from fsq_jax.adversarial import dino_backbone
from fsq_jax.configuration import errors
from fsq_jax.models.pretrained import files as weight_files
from fsq_jax.perceptual import distance
from fsq_jax.runtime import partitioning


class Networks(NamedTuple):
  """The frozen networks of a config.

  They are not part of the train state or of checkpoints: each run loads them
  again, and `check_same` compares their weights.

  Attributes:
    perceptual: the network of losses.perceptual; None without one.
    variables: 'perceptual': its variables; 'discriminator': parameters of the
      discriminator's backbone. Networks that the config lacks are left out.
    hashes: section and name of a network, such as
      'losses.perceptual.lpips_vgg16', to the sha256 of its weights.
  """

  perceptual: nn.Module | None
  variables: dict[str, Any]
  hashes: dict[str, str]

  def check_same(self, saved: Mapping[str, str]) -> None:
    """Compares the weights with the weights that a checkpoint used.

    Args:
      saved: `hashes` of the checkpoint.

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
              'The frozen networks have other weights than this run was trained'
              ' with (sha256, saved -> current):',
              *differences,
          ])
          + '\nUse the files that it was trained with.'
      )


def load_networks(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Networks:
  """Loads the frozen networks of the losses of a config.

  Args:
    config: the whole config.
    mesh: from `partitioning.create_mesh`; weights are sharded over 'fsdp'.

  Returns:
    The networks.

  Raises:
    ValueError: missing or corrupted weights.
  """
  perceptual, variables, hashes = None, {}, {}
  options = config.losses.perceptual
  if options.name != 'none':
    with errors.about('losses.perceptual.checkpoint'):
      network = distance.build_perceptual_loss(
          options.name, options.checkpoint, dtype=jnp.dtype(options.dtype)
      )
    perceptual = network.module
    variables['perceptual'] = network.variables
    hashes[f'losses.perceptual.{options.name}'] = network.sha256
  if config.discriminator.name == 'dino':
    path = config.discriminator.dino.checkpoint
    discriminator = adversarial_builder.build_discriminator(
        config.discriminator
    )
    with errors.about('discriminator.dino.checkpoint'):
      backbone = dino_backbone.load_discriminator_backbone(
          path, discriminator
      )
    variables['discriminator'] = {'backbone': backbone}
    hashes['discriminator.dino'] = weight_files.hash_weights(path)
  shardings = partitioning.state_shardings(
      variables, mesh, (('.*', 'fsdp'),), config.partitioning.fsdp_min_size
  )
  return Networks(perceptual, jax.device_put(variables, shardings), hashes)
