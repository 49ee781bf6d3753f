"""Faults of numerics in training: NaN, loss spikes, low precision, GANs."""

import logging as python_logging
import pathlib

from absl import logging
import jax
from jax import numpy as jnp
import numpy as np

from experiments.fault_suite import fault
from fsq_jax import checkpoints
from fsq_jax import data
from fsq_jax import train
from fsq_jax import workdir as workdirs
from fsq_jax.models import pixels
from fsq_jax.runtime import partitioning
from fsq_jax.train import loop
from fsq_jax.train import losses
from fsq_jax.train import step as train_step

# Marker pixel values of an image, and the fault that it triggers.
_FAULTY = {3: jnp.nan, 5: jnp.inf, 7: -jnp.inf}
_BAD_GRADIENTS = {9: jnp.nan, 11: jnp.inf}

_VARIANTS = {
    'fsq': {},
    'vq': {
        'model__quantizer__name': 'vq',
        'model__quantizer__vq__decay': 0.5,
        'model__quantizer__vq__restart': 'batch',
    },
    'muon': {'optim__name': 'muon'},
    'accumulation': {
        'optim__accumulation_steps': 2,
        'model__projector_in__name': 'standardized',
    },
    'patch': {
        'discriminator__name': 'patch',
        'discriminator__patch__channels': 32,
        'discriminator__patch__num_stages': 1,
        'discriminator__start_step': 0,
        'losses__adversarial__start_step': 0,
        'losses__adversarial__weighting': 'adaptive',
    },
}


def _inject() -> None:
  """Turns marked images into NaN, infinity or non-finite gradients."""
  to_float = pixels.to_float

  @jax.custom_vjp
  def scale_gradient(x, gradient):
    del gradient
    return x

  scale_gradient.defvjp(
      lambda x, gradient: (x, gradient),
      lambda gradient, cotangent: (cotangent * gradient, None),
  )

  def replaced(images):
    floats = to_float(images)
    axes = tuple(range(1, images.ndim))
    for pixel, value in _FAULTY.items():
      faulty = jnp.all(images == pixel, axis=axes, keepdims=True)
      floats = jnp.where(faulty, value, floats)
    return floats

  pixels.to_float = replaced
  build_loss = losses.build_reconstruction_loss

  def build(name):
    loss = build_loss(name)

    def wrapped(reconstructions, images):
      gradient = jnp.ones(())
      for pixel, value in _BAD_GRADIENTS.items():
        faulty = jnp.any(
            jnp.all(images == pixel / 127.5 - 1, axis=(1, 2, 3))
        )
        gradient = jnp.where(faulty, value, gradient)
      return loss(scale_gradient(reconstructions, gradient), images)

    return wrapped

  losses.build_reconstruction_loss = build


def _step(training: fault.Training):
  """Compiles a step that does not donate its state."""
  return jax.jit(
      train_step.build_train_step(
          training.model, training.optimizer, training.config
      )
  )


def _batches(config, num: int):
  """Yields writable batches of the config's images."""
  dataset = data.build_dataset(config.data, split='train', seed=config.seed)
  for _, batch in zip(range(num), dataset, strict=False):
    yield batch['image'].copy()


def _bad_steps(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  _inject()
  faults = [*_FAULTY, *_BAD_GRADIENTS]
  touched, silent, infinite, injected = [], 0, 0, 0
  for variant, fields in _VARIANTS.items():
    if quick and variant not in ('fsq', 'vq'):
      continue
    training = fault.build_training(fault.toy_config(**fields))
    step, state = _step(training), training.builder.create()
    for number, images in enumerate(_batches(training.config, 16)):
      pixel = faults[number // 2 % len(faults)] if number % 2 else None
      if pixel is not None:
        images[number % len(images)] = pixel
      before, (state, scalars) = state, step(state, images)
      infinite += not fault.all_finite(state)
      if pixel is None:
        continue
      injected += 1
      silent += int(state.skipped_steps) != int(before.skipped_steps) + 1
      counters = {'step': 0, 'bad_steps': 0, 'skipped_steps': 0}
      if not fault.same(before.replace(**counters), state.replace(**counters)):
        touched.append(f'{variant} {pixel}')
      silent += bool(
          np.isfinite([scalars['loss'], scalars['gradient_norm']]).all()
      ) and 'patch' not in variant
  return fault.Outcome(
      not touched and not silent and not infinite,
      f'{injected - silent} of {injected} steps with NaN or infinity in an'
      f' image or gradient skipped and counted; {len(touched)} touched'
      ' parameters, averages, codebook or optimizer; states not finite:'
      f' {infinite}',
      {'injected': injected, 'silent': silent, 'touched': touched},
  )


def _diverged(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  results = []
  for limit in (1, 3, 5):
    config = fault.toy_config(
        optim__learning_rate=1e30,
        optim__warmup_steps=0,
        train__num_steps=40,
        train__log_every_steps=10,
        train__eval_every_steps=0,
        train__checkpoint_every_steps=1,
        train__max_bad_steps=limit,
    )
    run = folder / str(limit)
    try:
      train.train_and_evaluate(config, run)
    except train.DivergedError as error:
      message = str(error)
      first = int(message.split('Step ')[1].split(':')[0]) - limit + 1
      checkpointer = checkpoints.Checkpointer(run)
      step = checkpointer.latest_step
      training = fault.build_training(config)
      state = checkpointer.restore(step, training.builder.abstract)
      checkpointer.close()
      rows = workdirs.read_metrics(run)
      results.append(
          fault.all_finite(state)
          and f'{limit} in a row' in message
          and 'loss' in message
          and 'synthetic image' in message
          and f'of step {step};' in message
          and first + limit - 1 - step <= 2
          and max([row['step'] for row in rows], default=0) <= first + limit
      )
    else:
      results.append(False)
  return fault.Outcome(
      all(results),
      f'{sum(results)} of {len(results)} runs stopped after 1, 3 and 5 bad'
      ' steps, named step, losses and images, and kept a finite checkpoint',
      {'stopped': results},
  )


def _explosion(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  warnings = []

  class _Handler(python_logging.Handler):

    def emit(self, record):
      text = record.getMessage()
      if 'times the median' in text:
        warnings.append(int(text.split('Step ')[1].split(':')[0]))

  logging.get_absl_logger().addHandler(_Handler())
  base = {
      'train__eval_every_steps': 0,
      'train__num_steps': 60,
      'train__max_bad_steps': 60,
  }
  train.train_and_evaluate(fault.toy_config(**base), folder / 'calm')
  calm, warnings[:] = len(warnings), []
  at = {30, 31, 32, 45}
  run = loop.run

  def run_and_explode(*args, train_step, **kwargs):
    def explode(state, batch):
      state, scalars = train_step(state, batch)
      factor = 150.0 if int(state.step) in at else 1.0
      return state, {**scalars, 'loss': scalars['loss'] * factor}

    return run(*args, train_step=explode, **kwargs)

  loop.run = run_and_explode
  train.train_and_evaluate(fault.toy_config(**base), folder / 'exploding')
  return fault.Outcome(
      calm == 0 and warnings == [30, 45],
      f'150 times the loss in steps 30 to 32 and 45: warned at {warnings};'
      f' {calm} warnings without',
      {'warned': warnings, 'false': calm},
  )


def _losses(config, num_steps: int, change=lambda x: x) -> list[float]:
  """Trains on the config's images and returns the reconstruction losses.

  Args:
    config: the config.
    num_steps: number of steps.
    change: applied to each parameter after initialization.
  """
  training = fault.build_training(config)
  step = jax.jit(
      train_step.build_train_step(
          training.model, training.optimizer, config
      ),
      donate_argnums=0,
  )
  state, rows = training.builder.create(), []
  state = state.replace(params=jax.tree.map(change, state.params))
  for images in _batches(config, num_steps):
    state, scalars = step(
        state, partitioning.shard_batch(images, training.mesh)
    )
    rows.append(scalars['reconstruction_loss'])
  return [float(x) for x in jax.device_get(rows)]


def _bfloat16(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  def round_once(x):
    return x.astype(jnp.bfloat16).astype(x.dtype)

  apart: dict[str, list[float]] = {}
  for quantizer in ('none', 'fsq'):
    for seed in range(1 if quick else 3):
      last = {}
      for name, dtype, change in (
          ('float32', 'float32', lambda x: x),
          ('bfloat16', 'bfloat16', lambda x: x),
          ('float32, start rounded', 'float32', round_once),
      ):
        config = fault.toy_config(
            model__dtype=dtype,
            model__quantizer__name=quantizer,
            data__batch_size=32,
            train__num_steps=50,
            seed=seed,
        )
        last[name] = np.mean(_losses(config, 50, change)[-5:])
      for name in ('bfloat16', 'float32, start rounded'):
        apart.setdefault(f'{quantizer}, {name}', []).append(
            float(last[name] / last['float32'] - 1)
        )

  def show(name):
    return ', '.join(f'{x:+.1%}' for x in apart[name])

  return fault.Outcome(
      max(map(abs, apart['none, bfloat16'])) <= 0.01,
      f'mean of the last 5 losses, by seed: {show("none, bfloat16")} without'
      f' rounding to codes; FSQ {show("fsq, bfloat16")}, and'
      f' {show("fsq, float32, start rounded")} in float32 from parameters'
      ' rounded once to bfloat16',
      apart,
  )


def _discriminator(folder: pathlib.Path, quick: bool) -> fault.Outcome:
  rises = {}
  start, num_steps = 200, 420
  for weighting in ('adaptive', 'fixed'):
    fields = {
        **_VARIANTS['patch'],
        'discriminator__start_step': start,
        'losses__adversarial__start_step': start,
        'losses__adversarial__ramp_steps': 50,
        'losses__adversarial__weighting': weighting,
        'losses__adversarial__weight': 0.1,
        'discriminator__optim__learning_rate': 1e-3,
        'train__num_steps': num_steps,
    }
    values = _losses(fault.toy_config(**fields), num_steps)
    before = np.mean(values[start - 20 : start])
    means = np.convolve(values[start:], np.ones(20) / 20, mode='valid')
    high = means > 1.2 * before
    rises[weighting] = {
        'rise': float(means.max() / before - 1), 'steps_above': int(high.sum())
    }
  passed = rises['adaptive']['rise'] <= 0.2
  return fault.Outcome(
      passed,
      'largest rise of the mean of 20 steps: ' + ', '.join(
          f'{x["rise"]:+.1%} ({name})' for name, x in rises.items()
      ),
      rises,
  )


FAULTS = {
    'E1': fault.Fault(
        'NaN and infinity in images and gradients',
        'skipped and counted, all else untouched, state always finite',
        _bad_steps,
    ),
    'E2': fault.Fault(
        'bad steps in a row',
        'stop with step, losses and images; a good checkpoint is kept',
        _diverged,
    ),
    'E3': fault.Fault(
        'a loss 100 times its running median', 'one warning an explosion',
        _explosion,
    ),
    'E4': fault.Fault(
        'bfloat16 instead of float32',
        'loss after 50 steps within 1 % without rounding to codes; FSQ is'
        ' shown',
        _bfloat16,
    ),
    'E5': fault.Fault(
        'start of a discriminator',
        'reconstruction loss rises by 20 % at most with the adaptive weight; a'
        ' fixed one is shown',
        _discriminator,
    ),
}
