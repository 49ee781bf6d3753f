"""The state of training, created already sharded."""

from typing import Any

from flax import linen as nn
from flax import struct
import jax
from jax import numpy as jnp
import ml_collections
import optax

from fsq_jax import partitioning


class TrainState(struct.PyTreeNode):
  """Everything that training carries from one step to the next.

  Attributes:
    step: int32 scalar, training steps taken, skipped ones included.
    params: parameters, float32.
    model_state: the model's other collections, such as `codebook`.
    ema_params: average of params, which is what gets evaluated.
    opt_state: state of the optimizer.
    bad_steps: int32 scalar, skipped steps since the last good one.
    skipped_steps: int32 scalar, all steps skipped so far.
  """

  step: jax.Array
  params: Any
  model_state: Any
  ema_params: Any
  opt_state: optax.OptState
  bad_steps: jax.Array
  skipped_steps: jax.Array

  @property
  def eval_variables(self) -> dict[str, Any]:
    """The variables that evaluation and tokenizing use."""
    return {'params': self.ema_params, **self.model_state}


class StateBuilder:
  """Creates the train state of a config on the devices that keep it.

  No device or host ever holds a full copy of what is sharded.

  Attributes:
    abstract: the state as shapes, types and shardings.
    shardings: tree of the shardings.
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
    seed = config.seed

    def init() -> TrainState:
      images = jnp.zeros((1, *image_size, 3), jnp.float32)
      model_state = dict(model.init(jax.random.key(seed), images))
      params = model_state.pop('params')
      return TrainState(
          step=jnp.zeros((), jnp.int32),
          params=params,
          model_state=model_state,
          # A copy: the donated state must not hold one buffer twice.
          ema_params=jax.tree.map(jnp.copy, params),
          opt_state=optimizer.init(params),
          bad_steps=jnp.zeros((), jnp.int32),
          skipped_steps=jnp.zeros((), jnp.int32),
      )

    shapes = jax.eval_shape(init)
    self.shardings = partitioning.state_shardings(
        shapes,
        mesh,
        config.partitioning.rules,
        config.partitioning.fsdp_min_size,
    )
    self.abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        self.shardings,
    )
    self._init = jax.jit(init, out_shardings=self.shardings)

  def create(self) -> TrainState:
    """Initialises a new state."""
    return self._init()
