"""The state of training, created already sharded."""

from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from flax import linen as nn
from flax import struct
from flax import traverse_util
import jax
from jax import numpy as jnp
import ml_collections
import numpy as np
import optax

from fsq_jax.adversarial import adversary as adversaries
from fsq_jax.models import variables
from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim


class TrainState(struct.PyTreeNode):
  """Everything that training carries from one step to the next.

  Attributes:
    step: int32 scalar, training steps taken, skipped ones included.
    params: parameters that train, float32.
    frozen_params: those that do not; no gradient, optimizer state or average
      is made of them.
    teacher_params: where the encoder's latents are held to those of its start
      (losses.distillation_weight), a copy from then of those of params that are
      the encoder's, under the same paths; else {}.
    model_state: the model's other collections, such as `codebook`.
    ema_params: average of params, which is what gets evaluated.
    opt_state: state of the optimizer.
    adversary: `adversary.AdversaryState`, all of the discriminator that is not
      frozen; {} without one.
    bad_steps: int32 scalar, skipped steps since the last good one.
    skipped_steps: int32 scalar, all steps skipped so far.
  """

  step: jax.Array
  params: Any
  frozen_params: Any
  teacher_params: Any
  model_state: Any
  ema_params: Any
  opt_state: optax.OptState
  adversary: Any
  bad_steps: jax.Array
  skipped_steps: jax.Array

  @property
  def eval_variables(self) -> dict[str, Any]:
    """The variables that evaluation and tokenizing use."""
    return variables.eval_variables(
        **{x: getattr(self, x) for x in variables.EVAL_FIELDS}
    )


class StateBuilder:
  """Creates the train state of a config on the devices that keep it.

  No device or host ever holds a full copy of what is sharded.

  Attributes:
    abstract_variables: the model's variables as shapes, types and shardings.
    abstract: the state as shapes, types and shardings.
    shardings: tree of the shardings.
    whole: what of the state no axis of the mesh divides, and stays whole:
      `partitioning.list_replicated` of it.
  """

  def __init__(
      self,
      config: ml_collections.ConfigDict,
      model: nn.Module,
      optimizer: optax.GradientTransformation,
      mesh: jax.sharding.Mesh,
  ):
    """Traces the initialisation.

    Args:
      config: the whole config.
      model: from `models.build_autoencoder` of the same config.
      optimizer: from `optim.build_optimizer` of the same config.
      mesh: from `partitioning.create_mesh`.
    """
    image_size = tuple(config.data.image_size)
    self._batch_shape = (config.data.batch_size, *image_size, 3)
    self._mesh = mesh
    seed = config.seed
    frozen_patterns = tuple(config.optim.frozen)
    adversary = adversaries.build_adversary(
        config, optim.build_discriminator_optimizer(config)
    )

    def init_variables() -> dict[str, Any]:
      images = jnp.zeros((1, *image_size, 3), jnp.float32)
      return dict(model.init(jax.random.key(seed), images))

    def init(loaded: Mapping[str, jax.Array]) -> TrainState:
      variables = traverse_util.flatten_dict(init_variables(), sep='/')
      model_state = traverse_util.unflatten_dict(variables | loaded, sep='/')
      params, frozen = parameter_paths.split_frozen(
          model_state.pop('params'), frozen_patterns
      )
      teacher = {}
      if config.losses.distillation_weight:
        teacher = _copy_encoder(params)
      adversary_state = {}
      if adversary is not None:
        # Another key than the model's, whose parts draw by their names.
        key = jax.random.fold_in(jax.random.key(seed), 1)
        adversary_state = adversary.init(key)
      return TrainState(
          step=jnp.zeros((), jnp.int32),
          params=params,
          frozen_params=frozen,
          teacher_params=teacher,
          model_state=model_state,
          # A copy: the donated state must not hold one buffer twice.
          ema_params=jax.tree.map(jnp.copy, params),
          opt_state=optimizer.init(params),
          adversary=adversary_state,
          bad_steps=jnp.zeros((), jnp.int32),
          skipped_steps=jnp.zeros((), jnp.int32),
      )

    rules = config.partitioning.rules
    min_size = config.partitioning.fsdp_min_size

    def place(tree: Any) -> Any:
      return partitioning.place_abstract(tree, mesh, rules, min_size)

    self.abstract_variables = place(jax.eval_shape(init_variables))
    self.abstract = place(jax.eval_shape(init, {}))
    self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
    self.whole = partitioning.list_replicated(
        self.abstract, mesh, rules, min_size
    )
    if self.whole:
      logging.warning(
          '%d arrays of together %.1f MiB stay whole, since the mesh %s divides'
          ' no axis of theirs: %s.',
          len(self.whole),
          sum(self.whole.values()) / 2**20,
          dict(mesh.shape),
          ', '.join(self.whole),
      )
    self._init = jax.jit(
        init, out_shardings=self.shardings, donate_argnums=0
    )

  def create(self, loaded: Mapping[str, Any] | None = None) -> TrainState:
    """Initialises a new state.

    Args:
      loaded: variables that are not to be initialised, a tree that is a part of
        `abstract_variables`, on the devices that keep them. They are donated.

    Raises:
      ValueError: variables that the model lacks, or of another shape or dtype.
    """
    loaded = traverse_util.flatten_dict(dict(loaded or {}), sep='/')
    known = traverse_util.flatten_dict(self.abstract_variables, sep='/')
    for path, value in loaded.items():
      given, allowed = (
          f'{x.dtype}{list(x.shape)}' if x is not None else 'nothing'
          for x in (value, known.get(path))
      )
      if given != allowed:
        raise ValueError(
            f'The loaded variable {path!r} is {given}; the model of this config'
            f' has {allowed} there.'
        )
    return self._init(loaded)

  def compile_step(
      self, step: Callable[..., Any], network_variables: Any
  ) -> jax.stages.Compiled:
    """Compiles a training step, which takes the state over from its caller.

    Args:
      step: from `step.build_train_step`: of state, images and the
        variables of the networks to the next state and scalars.
      network_variables: those of the networks, on the devices that keep them.

    Returns:
      The step. It takes images [B, H, W, 3] uint8 of the config's size, and its
      scalars are on every device.
    """
    batch_sharding = partitioning.batch_sharding(self._mesh)
    jitted = jax.jit(
        step,
        in_shardings=(
            self.shardings,
            batch_sharding,
            jax.tree.map(lambda x: x.sharding, network_variables),
        ),
        out_shardings=(self.shardings, partitioning.replicated(self._mesh)),
        donate_argnums=0,
    )
    images = jax.ShapeDtypeStruct(
        self._batch_shape, np.uint8, sharding=batch_sharding
    )
    return jitted.lower(self.abstract, images, network_variables).compile()


def _copy_encoder(params: Mapping[str, Any]) -> Any:
  """Returns a copy of those of the encoder's parameters that train."""
  if 'encoder' not in params:
    raise ValueError(
        'losses.distillation_weight is not 0, but optim.frozen keeps the'
        ' encoder from changing at all; leave one of them out.'
    )
  # Under its paths, by which partitioning.rules spread it as the encoder.
  return {'encoder': jax.tree.map(jnp.copy, params['encoder'])}
