"""Trains the generator of a config on token files, evaluates it, reports."""

from collections.abc import Mapping
import os
import time
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np

from fsq_jax.configuration import loading as configuration
from fsq_jax.generators import builder
from fsq_jax.generators import embeddings
from fsq_jax.generators import evaluation
from fsq_jax.generators import model as models
from fsq_jax.generators import step as generator_step
from fsq_jax.generators import token_files
from fsq_jax.quantizers import specs
from fsq_jax.report import report
from fsq_jax.runtime import partitioning
from fsq_jax.runtime import processes
from fsq_jax.tokens import source as sources
from fsq_jax.train import loop
from fsq_jax.train import optim
from fsq_jax.train import resources
from fsq_jax.train import run_record
from fsq_jax.train import state as train_state


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    allow_config_change: bool = False,
) -> train_state.TrainState:
  """Trains until config.train.num_steps, evaluates, and writes the report.

  A workdir with checkpoints is resumed from the newest one, as by
  `train.train_and_evaluate`.

  Args:
    config: see configs/default_generator.py.
    workdir: folder of the run, created if it is missing.
    allow_config_change: resume although the config differs from the config of
      the checkpoint; if the token files differ, the input starts anew.

  Returns:
    The last state.

  Raises:
    ValueError: an invalid config, tokenizer, token files or workdir.
    Interrupted: by a signal while token files are made.
    Preempted: SIGTERM or SIGINT arrived; the last step is saved.
    DivergedError: config.train.max_bad_steps non-finite steps in a row.
    RunError: something cannot be written, as on a full disk, or another process
      failed.
  """
  configuration.check_config(config, num_devices=jax.device_count())
  # Before the folder is created, and token files, which may take long.
  builder.build_architecture(config.model)
  objective = builder.build_objective(config.losses)
  config = configuration.resolve(config)
  token_files.check_folder(config)

  def build(tokens):
    model = builder.build_model(config, tokens)
    return model, builder.build_sampling(
        config.sample, config.model.kind, model.num_tokens
    )

  def open_inputs(mesh, is_new):
    del is_new  # Nothing is initialized from files.
    tokens = token_files.open_files(config, check=build)
    model, sampling = build(tokens.format)
    dataset = sources.build_dataset(
        tokens.train,
        batch_size=config.tokens.batch_size,
        seed=config.seed,
        **partitioning.data_shard(mesh)._asdict(),
    )
    with processes.fail_together():
      evaluator = evaluation.Evaluator(config, model, sampling, tokens, mesh)
    return tokens, model, dataset, evaluator

  with resources.open_run(
      config, workdir, open_inputs, batch_size=config.tokens.batch_size
  ) as run:
    mesh = run.mesh
    tokens, model, dataset, evaluator = run.inputs
    optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
    state_builder = build_state_builder(config, model, optimizer, mesh)
    record = run_record.RunRecord(
        config,
        {
            'quantizer': dict(tokens.format.quantizer),
            'tokens': tokens.format._asdict(),
            'token_files': tokens.describe(),
        },
        lambda saved: _check_parts(saved, tokens),
        dataset,
    )
    restored = record.restore_newest(
        run.checkpointer, state_builder.abstract, allow_config_change
    )
    if restored is not None:
      run.progress.say(f'Continuing {run.folder} from step {restored.step}.')
      state = restored.state
    else:
      state = state_builder.create()
    run.progress.say('Compiling the training step ...')
    started = time.perf_counter()
    step = state_builder.compile_step(
        build_train_step(model, objective, optimizer, config),
        abstract_batch(config.tokens.batch_size, model.num_tokens, mesh),
    )
    writer = resources.start_log(
        run, record, state, time.perf_counter() - started
    )
    state = loop.run(
        state,
        record.iterator,
        train_step=lambda state, batch: step(
            state, partitioning.shard_batch(_to_input(batch, model), mesh)
        ),
        hooks=resources.build_hooks(
            run, record, evaluator, writer, lambda i: tokens.train[i].name
        ),
        num_steps=config.train.num_steps,
    )
    if writer is not None:
      writer.flush()
      run.progress.say(f'Report: {report.write_report(run.folder)}')
    return state


def build_state_builder(
    config: ml_collections.ConfigDict,
    model: models.TokenModel,
    optimizer: Any,
    mesh: jax.sharding.Mesh,
) -> train_state.StateBuilder:
  """Returns the builder of the train state of a generator.

  Args:
    config: the whole config.
    model: from `builder.build_model` of the same config.
    optimizer: from `optim.build_optimizer` of the same config.
    mesh: from `partitioning.create_mesh`.
  """
  key = jax.random.key(config.seed)
  return train_state.StateBuilder(
      lambda: models.init_variables(model, key),
      optimizer,
      mesh,
      config.partitioning,
  )


def build_train_step(
    model: models.TokenModel,
    objective: Any,
    optimizer: Any,
    config: ml_collections.ConfigDict,
) -> Any:
  """Returns `step.TrainStep.take_step` of a config."""
  return generator_step.TrainStep(
      model=model,
      objective=objective,
      update=train_state.build_update(
          optimizer, config.optim, config.train.num_steps
      ),
      seed=config.seed,
      accumulation_steps=config.optim.accumulation_steps,
  ).take_step


def abstract_batch(
    batch_size: int, num_tokens: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes, dtypes and shardings of a training batch."""
  sharding = partitioning.batch_sharding(mesh)
  shapes = {'tokens': (batch_size, num_tokens), 'labels': (batch_size,)}
  return {
      name: jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
      for name, shape in shapes.items()
  }


def _to_input(
    batch: Mapping[str, np.ndarray], model: models.TokenModel
) -> dict[str, np.ndarray]:
  """Returns a checked batch of a token dataset as input of the model."""
  tokens, labels = batch['tokens'], batch['label']
  model.vocabulary.check(tokens)
  if not model.num_classes:
    labels = np.full_like(labels, embeddings.NO_LABEL)
  embeddings.check_labels(labels, model.num_classes)
  return {
      'tokens': tokens.reshape(len(tokens), model.num_tokens),
      'labels': labels.astype(np.int32),
  }


def _check_parts(
    saved: Mapping[str, Any], current: token_files.TokenFiles
) -> None:
  specs.check_same_spec(saved['quantizer'], current.format.quantizer)
  token_files.check_same(saved['tokens'], current.format)
  files = current.describe()
  # The fingerprint of the input has the training files.
  if saved['token_files']['eval']['sha256'] != files['eval']['sha256']:
    logging.warning(
        'The held-out token files have changed since the checkpoint; bits per'
        ' token before and after are of different images, also for the best'
        ' checkpoint.'
    )
