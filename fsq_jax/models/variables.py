"""Variables of a model: shapes, and the variables that evaluation uses."""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsq_jax.runtime import parameter_paths

# Fields of the train state that `eval_variables` needs.
EVAL_FIELDS = ('frozen_params', 'model_state', 'ema_params')


def eval_variables(
    *, frozen_params: Any, model_state: Any, ema_params: Any
) -> dict[str, Any]:
  """Returns the model's variables from these fields of a train state."""
  params = parameter_paths.merge_frozen(ema_params, frozen_params)
  return {'params': params, **model_state}


def abstract_variables(
    model: nn.Module, image_size: tuple[int, int]
) -> dict[str, Any]:
  """Returns shapes and dtypes of a model's variables, without allocation.

  Args:
    model: an autoencoder.
    image_size: (height, width) in pixels.

  Returns:
    Tree of `jax.ShapeDtypeStruct`.
  """
  return jax.eval_shape(
      lambda key, images: dict(model.init(key, images)),
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, *image_size, model.channels), jnp.float32),
  )


def abstract_eval_fields(
    model: nn.Module, image_size: tuple[int, int], frozen: tuple[str, ...]
) -> dict[str, Any]:
  """Returns `EVAL_FIELDS` of a model's train state as shapes and dtypes.

  Args:
    model: an autoencoder.
    image_size: (height, width) in pixels.
    frozen: regular expressions of the frozen parameters (optim.frozen).

  Returns:
    Tree of `jax.ShapeDtypeStruct` under each field.
  """
  model_state = abstract_variables(model, image_size)
  params, frozen_params = parameter_paths.split_frozen(
      model_state.pop('params'), frozen
  )
  return {
      'frozen_params': frozen_params,
      'model_state': model_state,
      'ema_params': params,
  }
