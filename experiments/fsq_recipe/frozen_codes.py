"""Decoders trained from scratch on the codes of a trained model.

Encoder, projector_in and quantizer are frozen; projector_out and decoder are
trained again.
"""

import itertools
import json
import pathlib
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax

from fsq_jax import data
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import saved_model
from fsq_jax.evaluation import image_metrics
from fsq_jax.models import pixels
from fsq_jax.runtime import partitioning
from fsq_jax.train import optim

NUM_STEPS = 2000


def measure(workdir: pathlib.Path, num_steps: int = NUM_STEPS) -> float:
  """Trains a decoder and returns its PSNR on the evaluation images.

  Stores the result in the folder of the run, and is not repeated.

  Args:
    workdir: of the run with the encoder.
    num_steps: training steps.
  """
  path = workdir / 'frozen_codes.json'
  if path.is_file():
    stored = json.loads(path.read_text('utf-8'))
    if stored['num_steps'] == num_steps:
      return stored['psnr']
  result = {'num_steps': num_steps, 'psnr': _train(workdir, num_steps)}
  workdirs.write_json(path, result)
  return result['psnr']


def _train(workdir: pathlib.Path, num_steps: int) -> float:
  """Trains a decoder and returns its PSNR."""
  found = saved_model.find_run(workdir)
  config = found.config
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  model, variables = saved_model.restore(found, mesh)
  params = _initial_params(model, config)
  optimizer = optim.build_optimizer(config.optim, num_steps)

  def decode(params, images):
    z_q = model.apply(variables, images, method='encode').z_q
    merged = {**variables['params'], **params}
    return model.apply({**variables, 'params': merged}, z_q, method='decode')

  def loss(params, images):
    return jnp.mean(jnp.square(decode(params, images) - images))

  @jax.jit
  def step(params, average, state, images):
    gradients = jax.grad(loss)(params, pixels.to_float(images))
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    average = optax.incremental_update(
        params, average, 1 - config.optim.ema_decay
    )
    return params, average, state

  @jax.jit
  def psnr(params, images):
    decoded = decode(params, pixels.to_float(images))
    return image_metrics.psnr(images, pixels.to_uint8(decoded))

  state, average = optimizer.init(params), params
  train = data.build_dataset(config.data, split='train', seed=config.seed)
  for batch in itertools.islice(train, num_steps):
    params, average, state = step(params, average, state, batch['image'])
  tested = data.build_dataset(config.data, split='eval', seed=0)
  values = [psnr(average, x['image'])[x['mask']] for x in tested]
  return float(np.mean(np.concatenate(values)))


def _initial_params(model, config) -> dict[str, Any]:
  """Returns random parameters of projector_out and decoder."""
  key = jax.random.key(config.seed + 1)
  images = jnp.zeros((1, *config.data.image_size, model.channels))
  params = jax.jit(model.init)(key, images)['params']
  return {name: params[name] for name in ('projector_out', 'decoder')}

