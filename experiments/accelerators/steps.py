"""Lowers training steps of full-size configs without weights or devices."""

from collections.abc import Mapping
import pathlib
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp
import ml_collections

from experiments.accelerators import hlo_costs
from fsq_jax import adversarial
from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.generators import builder as generator_builder
from fsq_jax.generators import training
from fsq_jax.perceptual import classifiers
from fsq_jax.perceptual import distance
from fsq_jax.perceptual import lpips
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Classes of the data sets, by name or source.
_NUM_CLASSES = {'cifar10': 10, 'digits': 10, 'imagenet2012': 1000}


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
    name: str, batch_size: int, fields: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """Loads a config and sets the global batch size and other fields."""
  config = configuration.load_config(ROOT / 'configs' / f'{name}.py')
  inputs = config.tokens if configuration.is_generator(config) else config.data
  inputs.batch_size = batch_size
  config.update_from_flattened_dict(dict(fields))
  return config.copy_and_resolve_references()


def build_step(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Step:
  """Lowers the training step of a config for a mesh.

  The frozen loss networks have the shapes, dtypes and shardings of training,
  but no values.
  """
  if configuration.is_generator(config):
    return _build_generator_step(config, mesh)
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  module, networks = _abstract_networks(config)
  networks = partitioning.place_abstract(
      networks, mesh, (('.*', 'fsdp'),), config.partitioning.fsdp_min_size
  )
  lowered = builder.lower_step(
      train_step.build_train_step(model, optimizer, config, module),
      train_state.abstract_images(config.data, mesh),
      networks,
  )
  return _describe(lowered, builder)


def _build_generator_step(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Step:
  """Lowers the training step of a generator, without token files."""
  model = generator_builder.build_model(config, find_format(config))
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = training.build_state_builder(config, model, optimizer, mesh)
  lowered = builder.lower_step(
      training.build_train_step(
          model, generator_builder.build_objective(config.losses), optimizer,
          config,
      ),
      training.abstract_batch(
          config.tokens.batch_size, model.num_tokens, mesh
      ),
  )
  return _describe(lowered, builder)


def _describe(
    lowered: jax.stages.Lowered, builder: train_state.StateBuilder
) -> Step:
  leaves = jax.tree.leaves(builder.abstract)
  num_bytes = sum(x.size * x.dtype.itemsize for x in leaves)
  return Step(lowered, num_bytes, builder.replicated)


def find_format(
    config: ml_collections.ConfigDict,
) -> generator_builder.TokenFormat:
  """Returns the token format of a generator's config, without token files.

  The folder tokens.tokenizer has the name of the tokenizer's config, whose
  model is built abstractly.
  """
  stem = pathlib.Path(config.tokens.tokenizer).name
  tokenizer = configuration.load_config(ROOT / 'configs' / f'{stem}.py')
  model = models.build_autoencoder(tokenizer.model, tokenizer.data.image_size)
  images = jax.ShapeDtypeStruct(
      (1, *tokenizer.data.image_size, 3), jnp.float32
  )
  indices, _ = jax.eval_shape(
      lambda x: model.init_with_output(
          jax.random.key(0), x, method='encode_to_indices'
      ),
      images,
  )
  num_classes = _NUM_CLASSES[tokenizer.data.name or tokenizer.data.source]
  return generator_builder.TokenFormat(
      quantizer=model.quantizer.spec(),
      codebook_size=model.quantizer.codebook_size,
      grid=indices.shape[1:],
      label_names=tuple(map(str, range(num_classes))),
      model_hash='',
  )


def count_model_flops(config: ml_collections.ConfigDict) -> float:
  """Returns the matmul FLOPs of a step without rematerialization."""
  config = config.copy_and_resolve_references()
  config.model.remat = 'none'
  if not configuration.is_generator(config):
    config.discriminator.dino.remat = 'none'
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
