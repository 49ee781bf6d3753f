"""The train state, created with its shardings."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import types
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

from fsq_jax.adversarial import builder as adversary_builder
from fsq_jax.models import variables
from fsq_jax.runtime import parameter_paths
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim


class TrainState(struct.PyTreeNode):
  """Everything that training carries from one step to the next.

  Attributes:
    step: int32 scalar, training steps taken, skipped ones included.
    params: trainable parameters, float32.
    frozen_params: frozen parameters; they have no gradient, optimizer state or
      EMA.
    teacher_params: copy of the encoder's trainable parameters at the start,
      under the same paths: the teacher of the distillation loss. {} without
      one.
    model_state: the model's other collections, such as `codebook`.
    ema_params: EMA of params, used for evaluation.
    opt_state: state of the optimizer.
    adversary: `adversary.AdversaryState`; {} without a discriminator.
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

  @property
  def num_updates(self) -> jax.Array:
    """Updates of the parameters, as the optimizer counts them."""
    return self.step - self.skipped_steps

  def average(self, params: Any, decay: float) -> Any:
    """Returns the EMA after an update.

    Args:
      params: trainable parameters after the update.
      decay: of the EMA; early updates use (1 + n) / (10 + n) if it is less.
    """
    count = self.num_updates.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + count) / (10 + count))
    return optax.incremental_update(params, self.ema_params, 1 - decay)

  def after_step(self, is_good: jax.Array, **updated: Any) -> 'TrainState':
    """Returns the next state, in which a bad step changes only the counters.

    Args:
      is_good: bool scalar, False to skip the update.
      **updated: fields after the update.
    """
    state = jax.tree.map(
        lambda new, old: jnp.where(is_good, new, old),
        self.replace(**updated),
        self,
    )
    return state.replace(
        step=state.step + 1,
        bad_steps=jnp.where(is_good, 0, state.bad_steps + 1),
        skipped_steps=state.skipped_steps + (~is_good).astype(jnp.int32),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
  """The update of the parameters of a state by their gradients.

  Attributes:
    optimizer: of the parameters.
    schedule: learning rate of the optimizer, for the scalars.
    ema_decay: upper bound of the decay of `ema_params`.
  """

  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  ema_decay: float

  def apply(
      self,
      state: TrainState,
      gradients: Any,
      scalars: Mapping[str, jax.Array],
      *,
      checked: Sequence[str] = ('loss', 'gradient_norm'),
      changed: Mapping[str, Any] = types.MappingProxyType({}),
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the next state, and all scalars of the step.

    Args:
      state: before the step.
      gradients: of the trainable parameters.
      scalars: of the step.
      checked: names of the scalars which have to be finite; otherwise only the
        counters of the state change.
      changed: other fields after the step.
    """
    updates, opt_state = self.optimizer.update(
        gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    scalars = {
        **scalars,
        'gradient_norm': optax.tree.norm(gradients),
        'learning_rate': self.schedule(state.num_updates),
    }
    state = state.after_step(
        jnp.all(jnp.isfinite(jnp.stack([scalars[x] for x in checked]))),
        params=params,
        ema_params=state.average(params, self.ema_decay),
        opt_state=opt_state,
        **changed,
    )
    counters = ('bad_steps', 'skipped_steps')
    return state, scalars | {name: getattr(state, name) for name in counters}


def build_update(
    optimizer: optax.GradientTransformation,
    config: Mapping[str, Any],
    num_steps: int,
) -> Update:
  """Builds the update of the section optim of a config.

  Args:
    optimizer: from `optim.build_optimizer` of the same section.
    config: the section.
    num_steps: steps of the whole run.
  """
  return Update(
      optimizer=optimizer,
      schedule=optim.build_schedule(config, num_steps),
      ema_decay=config['ema_decay'],
  )


class StateBuilder:
  """Creates train states with their shardings.

  No device or host ever holds a full copy of a sharded array.

  Attributes:
    abstract_variables: shapes, dtypes and shardings of the model's variables.
    abstract: shapes, dtypes and shardings of the state.
    shardings: tree of the shardings.
    replicated: arrays of the state that stay replicated because no mesh axis
      divides them, from `partitioning.list_replicated`.
  """

  def __init__(
      self,
      init_variables: Callable[[], dict[str, Any]],
      optimizer: optax.GradientTransformation,
      mesh: jax.sharding.Mesh,
      partitioning_options: ml_collections.ConfigDict,
      *,
      frozen: tuple[str, ...] = (),
      init_others: Callable[[Any], dict[str, Any]] = lambda params: {},
  ):
    """Traces the initialization.

    Args:
      init_variables: initializes the model's variables.
      optimizer: of the trainable parameters.
      mesh: from `partitioning.create_mesh`.
      partitioning_options: the section partitioning of a config.
      frozen: regular expressions of the frozen parameters.
      init_others: from the trainable parameters to the fields teacher_params
        and adversary of the state, {} by default.
    """
    self._init_variables = init_variables
    self._optimizer = optimizer
    self._mesh = mesh
    self._frozen = frozen
    self._init_others = init_others
    rules = partitioning_options.rules, partitioning_options.fsdp_min_size
    self.abstract_variables = partitioning.place_abstract(
        jax.eval_shape(init_variables), mesh, *rules
    )
    self.abstract = partitioning.place_abstract(
        jax.eval_shape(self._init, {}), mesh, *rules
    )
    self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
    self.replicated = partitioning.list_replicated(self.abstract, mesh, *rules)
    if self.replicated:
      logging.warning(
          '%d arrays (%.1f MiB in total) are replicated, since the mesh %s'
          ' divides none of their dimensions: %s.',
          len(self.replicated),
          sum(self.replicated.values()) / 2**20,
          dict(mesh.shape),
          ', '.join(self.replicated),
      )
    self._jitted_init = jax.jit(
        self._init, out_shardings=self.shardings, donate_argnums=0
    )

  def _init(self, loaded: Mapping[str, jax.Array]) -> TrainState:
    variables = traverse_util.flatten_dict(self._init_variables(), sep='/')
    model_state = traverse_util.unflatten_dict(variables | loaded, sep='/')
    params, frozen = parameter_paths.split_frozen(
        model_state.pop('params'), self._frozen
    )
    others = {'teacher_params': {}, 'adversary': {}}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen_params=frozen,
        model_state=model_state,
        # A copy: the donated state must not contain one buffer twice.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=self._optimizer.init(params),
        bad_steps=jnp.zeros((), jnp.int32),
        skipped_steps=jnp.zeros((), jnp.int32),
        **(others | self._init_others(params)),
    )

  def create(self, loaded: Mapping[str, Any] | None = None) -> TrainState:
    """Initializes a new state.

    Args:
      loaded: variables that replace initialized ones: a subtree of
        `abstract_variables`, with the same shardings. They are donated.

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
    return self._jitted_init(loaded)

  def lower_step(
      self, step: Callable[..., Any], *inputs: Any
  ) -> jax.stages.Lowered:
    """Lowers a training step, which donates its state.

    Args:
      step: maps the state and the inputs to the next state and scalars.
      *inputs: trees of arrays, or of shapes and dtypes, with shardings.

    Returns:
      The lowered step; its scalars are replicated.
    """
    jitted = jax.jit(
        step,
        in_shardings=(
            self.shardings, *jax.tree.map(lambda x: x.sharding, inputs)
        ),
        out_shardings=(self.shardings, partitioning.replicated(self._mesh)),
        donate_argnums=0,
    )
    return jitted.lower(self.abstract, *inputs)

  def compile_step(
      self, step: Callable[..., Any], *inputs: Any
  ) -> jax.stages.Compiled:
    """Compiles a training step; arguments as in `lower_step`."""
    return self.lower_step(step, *inputs).compile()


def build_state_builder(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> StateBuilder:
  """Returns the builder of the train state of an autoencoder.

  Args:
    config: the whole config.
    model: from `models.build_autoencoder` of the same config.
    optimizer: from `optim.build_optimizer` of the same config.
    mesh: from `partitioning.create_mesh`.
  """
  adversary = adversary_builder.build_adversary(
      config, optim.build_discriminator_optimizer(config)
  )
  key = jax.random.key(config.seed)

  def init_variables() -> dict[str, Any]:
    shape = (1, *config.data.image_size, config.data.channels)
    return dict(model.init(key, jnp.zeros(shape, jnp.float32)))

  def init_others(params: Any) -> dict[str, Any]:
    others = {}
    if config.losses.distillation_weight:
      others['teacher_params'] = _copy_encoder(params)
    if adversary is not None:
      # Another key than the model's.
      others['adversary'] = adversary.init(jax.random.fold_in(key, 1))
    return others

  return StateBuilder(
      init_variables,
      optimizer,
      mesh,
      config.partitioning,
      frozen=tuple(config.optim.frozen),
      init_others=init_others,
  )


def abstract_images(
    data: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    image_size: tuple[int, int] | None = None,
) -> jax.ShapeDtypeStruct:
  """Returns shape, dtype and sharding of a training batch.

  Args:
    data: the section of a config.
    mesh: from `partitioning.create_mesh`.
    image_size: (height, width) in pixels; None is data.image_size.
  """
  return jax.ShapeDtypeStruct(
      (data.batch_size, *(image_size or data.image_size), data.channels),
      np.uint8,
      sharding=partitioning.batch_sharding(mesh),
  )


def num_parameters(params: Any) -> int:
  """Returns the number of values of a tree of arrays."""
  return sum(x.size for x in jax.tree.leaves(params))


def _copy_encoder(params: Mapping[str, Any]) -> Any:
  """Copies the encoder's trainable parameters."""
  if 'encoder' not in params:
    raise ValueError(
        'losses.distillation_weight is not 0, but optim.frozen freezes the'
        ' whole encoder; set the weight to 0 or unfreeze the encoder.'
    )
  # Under the same paths, so that partitioning.rules shard it as the encoder.
  return {'encoder': jax.tree.map(jnp.copy, params['encoder'])}
