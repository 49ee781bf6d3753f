"""Loads models from the checkpoints of a run."""

from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
import ml_collections

from fsq_jax.checkpoints import checkpointer as checkpointer_lib
from fsq_jax.configuration import compatibility
from fsq_jax.configuration import loading as configuration
from fsq_jax.configuration import shipped
from fsq_jax.models import autoencoder
from fsq_jax.models import builder as model_builder
from fsq_jax.models import variables
from fsq_jax.quantizers import specs
from fsq_jax.runtime import partitioning
from fsq_jax.workdir import files as workdirs


class Checkpoint(NamedTuple):
  """One saved step of a run.

  Attributes:
    folder: the run's folder.
    step: training steps taken.
    config: the run's config when the step was saved.
    record: JSON values saved with the step.
  """

  folder: pathlib.Path
  step: int
  config: ml_collections.ConfigDict
  record: Mapping[str, Any]

  @property
  def quantizer(self) -> Mapping[str, Any]:
    """Spec of the quantizer."""
    return self.record['quantizer']


def open_run(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    which: str,
    *,
    mode: str,
) -> tuple[Checkpoint, ml_collections.ConfigDict, jax.sharding.Mesh]:
  """Finds the checkpoint that a mode of launch.py works on.

  Args:
    config: config of the run; sections other than the model's may differ.
    workdir: the run's folder.
    which: as in `find_run`.
    mode: the mode, whose rules the config is checked against.

  Returns:
    The checkpoint, the resolved config, and the mesh of its partitioning
    section.

  Raises:
    ValueError: an invalid config, another model than the checkpoint's, or no
      such checkpoint.
  """
  configuration.check_config(config, jax.device_count(), mode=mode)
  mesh = partitioning.create_mesh(config.partitioning.mesh)
  found = find_run(workdir, which)
  config = configuration.resolve(config)
  check_same_kind(found, configuration.is_generator(config))
  check_same_model(found.config, config)
  return found, config, mesh


def check_same_kind(found: Checkpoint, is_generator: bool) -> None:
  """Raises ValueError unless a checkpoint is of a generator, or of none."""
  kinds = 'a tokenizer', 'a generator'
  if configuration.is_generator(found.config) != is_generator:
    raise ValueError(
        f'{found.folder} is a run of {kinds[not is_generator]}; give a run of'
        f' {kinds[is_generator]}.'
    )


def find_run(
    workdir: str | os.PathLike[str], which: str = 'newest'
) -> Checkpoint:
  """Finds a checkpoint of a run and reads its record, but no array.

  Args:
    workdir: the run's folder.
    which: 'newest', 'best' (highest PSNR or fewest bits per token), or the
      number of a step.

  Returns:
    The checkpoint. 'newest' skips checkpoints whose record is corrupted.

  Raises:
    ValueError: there is no such checkpoint, or it is corrupted.
  """
  folder = workdirs.run_folder(workdir)
  try:
    has_checkpoints = workdirs.is_folder(folder / workdirs.CHECKPOINTS)
  except OSError as error:
    raise ValueError(f'{folder} cannot be read: {error.strerror}.') from error
  if not has_checkpoints:
    raise ValueError(
        _explain_missing(folder) + shipped.explain_workdir(workdir)
    )
  reasons = []
  with contextlib.closing(
      checkpointer_lib.Checkpointer(folder, read_only=True)
  ) as checkpointer:
    for step in _candidates(checkpointer, which):
      try:
        record = checkpointer.restore_record(step)
      except checkpointer_lib.CorruptedError as error:
        logging.warning('Skipped. %s', error)
        reasons.append(str(error))
        continue
      return Checkpoint(
          folder=folder,
          step=step,
          config=configuration.resolve_paths(
              configuration.config_from_json(json.dumps(record['config']))
          ),
          record=record,
      )
    steps = checkpointer.steps
  if not steps:
    raise ValueError(_explain_missing(folder))
  if reasons:
    problem = f'has no intact checkpoint {which!r} among the steps {steps}.'
  elif which == 'best':
    problem = (
        f'has no best checkpoint: none of the steps {steps} was saved with an'
        " evaluation. Use 'newest' or one of these steps."
    )
  else:
    problem = (
        f"has no checkpoint {which}; allowed: 'newest', 'best' and the steps"
        f' {steps}.'
    )
  raise ValueError('\n  '.join([f'{folder} {problem}', *reasons]))


def _explain_missing(folder: pathlib.Path) -> str:
  """Returns why a folder has no checkpoint, and what to do."""
  if not workdirs.is_folder(folder):
    return f'{folder} is not a folder; give the workdir of a run.'
  if workdirs.is_file(folder / 'model.safetensors'):
    return (
        f'{folder} holds weights, not a run with checkpoints. A saved tokenizer'
        ' works with the modes tokenize, detokenize, reconstruct and export,'
        ' and with train.init_from, only; give the workdir of a run.'
    )
  if runs := sorted(x.parent for x in folder.glob(f'*/{workdirs.CHECKPOINTS}')):
    return f'{folder} is not a run; give one of {list(map(str, runs))}.'
  return (
      f'{folder} has no checkpoint: nothing was trained there, or training'
      ' stopped before its first save. Train first (stage 1 before stage 2), as'
      f' by: python launch.py --config=CONFIG --workdir={folder}'
  )


def _candidates(
    checkpointer: checkpointer_lib.Checkpointer, which: str
) -> list[int]:
  if which == 'newest':
    return checkpointer.steps[::-1]
  if which == 'best':
    best = checkpointer.best_step
    return [] if best is None else [best]
  if which.isdecimal():
    return [x for x in checkpointer.steps if x == int(which)]
  raise ValueError(
      f"checkpoint is {which!r}; allowed: 'newest', 'best' or a step number."
  )


def restore(
    found: Checkpoint, mesh: jax.sharding.Mesh
) -> tuple[autoencoder.Autoencoder, dict[str, Any]]:
  """Builds the model of a checkpoint and restores its variables.

  Args:
    found: from `find_run`.
    mesh: from `partitioning.create_mesh`; it may differ from the mesh of the
      run.

  Returns:
    The model, and its variables with the EMA of the parameters.

  Raises:
    ValueError: the checkpoint is corrupted, or its quantizer differs from its
      config.
  """
  check_same_kind(found, is_generator=False)
  config = found.config
  model = model_builder.build_autoencoder(
      config.model, config.data.image_size, config.data.channels
  )
  specs.check_same_spec(found.quantizer, model.quantizer.spec())
  fields = variables.abstract_eval_fields(
      model, config.data.image_size, tuple(config.optim.frozen)
  )
  return model, restore_variables(found, fields, mesh)


def restore_variables(
    found: Checkpoint, fields: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Restores the variables that evaluation uses.

  Args:
    found: from `find_run`.
    fields: shapes and dtypes of `variables.EVAL_FIELDS`.
    mesh: as in `restore`.

  Raises:
    ValueError: the checkpoint is corrupted, or of another model.
  """
  partition = found.config.partitioning
  abstract = partitioning.place_abstract(
      fields, mesh, partition.rules, partition.fsdp_min_size
  )
  with contextlib.closing(
      checkpointer_lib.Checkpointer(found.folder, read_only=True)
  ) as checkpointer:
    try:
      fields = checkpointer.restore(found.step, abstract, partial=True)
    except checkpointer_lib.CorruptedError as error:
      raise ValueError(
          f'{found.folder}: {error} --checkpoint=STEP takes another of'
          f' {checkpointer.steps}.'
      ) from error
  return variables.eval_variables(**fields)


def read_evaluation(found: Checkpoint) -> dict[str, Any] | None:
  """Returns the run's evaluation.json if it is of this step, else None.

  Raises:
    ValueError: the file is corrupted.
  """
  path = found.folder / workdirs.EVALUATION
  try:
    content = workdirs.read_json(path)
    if content is not None and 'step' not in content:
      raise ValueError(f"{path} cannot be read: 'step' is missing.")
  except ValueError as error:
    raise ValueError(
        f'{error} Delete it, or write it again with --mode=eval.'
    ) from error
  return content if content and content['step'] == found.step else None


def check_same_model(
    saved: ml_collections.ConfigDict, given: ml_collections.ConfigDict
) -> None:
  """Raises a ValueError that lists how the models of two configs differ.

  Args:
    saved: config of a run.
    given: config of a command that uses the run.
  """
  given = configuration.resolve(given)
  differences = compatibility.diff_models(saved, given)
  # The saved dtype is used; another one would have no effect.
  differences += [
      line
      for line in configuration.diff_configs(saved, given)
      if line.startswith('model.dtype:')
  ]
  if differences:
    raise ValueError(
        'The config has another model than the checkpoint (saved -> given):\n'
        + '\n'.join(differences)
    )
