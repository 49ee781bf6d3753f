"""Lowers training steps of full-size configs without weights or devices."""

from collections.abc import Mapping
import pathlib
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp
import ml_collections

from experiments.tpu_compile import hlo_costs
from fsq_jax import adversarial
from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.perceptual import classifiers
from fsq_jax.perceptual import distance
from fsq_jax.perceptual import lpips
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step


class Step(NamedTuple):
  """A lowered training step, the same as in training.

  Attributes:
    lowered: the lowered step.
    state_bytes: bytes of the unsharded train state.
    whole: bytes of the arrays that stay replicated because no mesh axis divides
      them, by path.
  """

  lowered: jax.stages.Lowered
  state_bytes: int
  whole: dict[str, int]


def load_config(
    root: pathlib.Path, name: str, fields: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """Loads a config and applies overrides."""
  config = configuration.load_config(root / 'configs' / f'{name}.py')
  config.update_from_flattened_dict(dict(fields))
  return config.copy_and_resolve_references()


def build_step(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Step:
  """Lowers the training step of a config for a mesh.

  The frozen loss networks have the shapes, dtypes and shardings of training,
  but no values.
  """
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  module, networks = _abstract_networks(config)
  min_size = config.partitioning.fsdp_min_size
  shardings = partitioning.state_shardings(
      networks, mesh, (('.*', 'fsdp'),), min_size
  )
  networks = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      networks, shardings,
  )
  batch_sharding = partitioning.batch_sharding(mesh)
  images = jax.ShapeDtypeStruct(
      (config.data.batch_size, *config.data.image_size, 3), jnp.uint8,
      sharding=batch_sharding,
  )
  jitted = jax.jit(
      train_step.build_train_step(model, optimizer, config, module),
      in_shardings=(builder.shardings, batch_sharding, shardings),
      out_shardings=(builder.shardings, partitioning.replicated(mesh)),
      donate_argnums=0,
  )
  return Step(
      jitted.lower(builder.abstract, images, networks),
      sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(builder.abstract)),
      builder.replicated,
  )


def count_model_flops(config: ml_collections.ConfigDict) -> float:
  """Returns the matmul FLOPs of a step without rematerialization."""
  config = config.copy_and_resolve_references()
  config.model.remat = False
  config.discriminator.dino.remat = False
  mesh = partitioning.create_mesh(
      {'data': 1, 'fsdp': 1}, jax.devices('cpu')[:1]
  )
  text = build_step(config, mesh).lowered.as_text(dialect='hlo')
  return float(sum(x.flops for x in hlo_costs.Program(text).costs().products))


def _abstract_networks(
    config: ml_collections.ConfigDict,
) -> tuple[nn.Module | None, dict[str, Any]]:
  """Returns the perceptual module and the abstract frozen variables."""
  images = jax.ShapeDtypeStruct((1, *config.data.image_size, 3), jnp.float32)
  key = jax.random.key(0)
  options, variables = config.losses.perceptual, {}
  module = _PERCEPTUAL[options.name](jnp.dtype(options.dtype))
  if module is not None:
    variables['perceptual'] = jax.eval_shape(module.init, key, images, images)
  if config.discriminator.name == 'dino':
    discriminator = adversarial.build_discriminator(config.discriminator)
    params = jax.eval_shape(discriminator.init, key, images)['params']
    variables['discriminator'] = {'backbone': params['backbone']}
  return module, variables


def _compare_logits(name: str, dtype: jnp.dtype) -> nn.Module:
  classifier = classifiers.CLASSIFIERS[name](precision='default', dtype=dtype)
  return distance.OutputDistance(classifier)


# As in `distance.build_perceptual_loss`, which loads the weights.
_PERCEPTUAL = {
    'none': lambda _: None,
    'lpips_vgg16': lambda dtype: lpips.Lpips('vgg16', 'default', dtype),
    'convnext': lambda dtype: _compare_logits('convnext_small', dtype),
    'resnet50': lambda dtype: _compare_logits('resnet50', dtype),
}
