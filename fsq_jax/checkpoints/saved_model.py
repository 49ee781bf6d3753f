"""Models out of the checkpoints of a run, built as its config says."""

from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
import ml_collections

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import workdir as workdirs
from fsq_jax.checkpoints import checkpointer as checkpointer_lib
from fsq_jax.models import variables
from fsq_jax.quantizers import specs
from fsq_jax.runtime import partitioning


class Checkpoint(NamedTuple):
  """One saved step of a run.

  Attributes:
    folder: of the run.
    step: steps taken.
    config: of the run when it was saved.
    quantizer: spec of its quantizer.
  """

  folder: pathlib.Path
  step: int
  config: ml_collections.ConfigDict
  quantizer: Mapping[str, Any]


def find(
    workdir: str | os.PathLike[str], which: str = 'newest'
) -> Checkpoint:
  """Finds a checkpoint of a run and reads no array of it.

  Args:
    workdir: the run's folder.
    which: 'newest', 'best' (of the highest PSNR), or the number of a step.

  Returns:
    The checkpoint. The newest is the newest whose record is undamaged.

  Raises:
    ValueError: no such checkpoint, or it is damaged.
  """
  folder = pathlib.Path(workdir).expanduser().absolute()
  if not (folder / workdirs.CHECKPOINTS).is_dir():
    raise ValueError(_explain_missing(folder))
  with contextlib.closing(
      checkpointer_lib.Checkpointer(folder, read_only=True)
  ) as checkpointer:
    reasons = []
    for step in _candidates(checkpointer, which):
      try:
        record = checkpointer.restore_record(step)
      except checkpointer_lib.DamagedError as error:
        logging.warning('Passed over. %s', error)
        reasons.append(str(error))
        continue
      return Checkpoint(
          folder=folder,
          step=step,
          config=configuration.resolve_paths(
              configuration.config_from_json(json.dumps(record['config']))
          ),
          quantizer=record['quantizer'],
      )
    steps = checkpointer.steps
  if not steps:
    raise ValueError(_explain_missing(folder))
  if reasons:
    raise ValueError(
        '\n  '.join([
            f'{folder} has no undamaged checkpoint {which!r}; there are the'
            f' steps {steps}.',
            *reasons,
        ])
    )
  if which == 'best':
    raise ValueError(
        f'{folder} has no best checkpoint: none of the steps {steps} was saved'
        " with the PSNR of an evaluation. Use 'newest' or one of these steps."
    )
  raise ValueError(
      f"{folder} has no checkpoint {which}; allowed: 'newest', 'best' and the"
      f' steps {steps}.'
  )


def _explain_missing(folder: pathlib.Path) -> str:
  """Says why there is no checkpoint in a folder, and what to do."""
  if not folder.is_dir():
    return f'{folder} is not a folder; give the workdir of a run.'
  if (folder / 'model.safetensors').is_file():
    return (
        f'{folder} holds weights, not a run with checkpoints. A saved tokenizer'
        ' can tokenize, detokenize and be exported, no more; give the workdir'
        ' of a run.'
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
      f"checkpoint is {which!r}; known: 'newest', 'best' and numbers of steps."
  )


def restore(
    found: Checkpoint, mesh: jax.sharding.Mesh
) -> tuple[models.Autoencoder, dict[str, Any]]:
  """Builds the model of a checkpoint and reads its variables.

  Args:
    found: from `find`.
    mesh: from `partitioning.create_mesh`; how the arrays were spread over
      devices when saved does not matter.

  Returns:
    The model, and its variables with the averaged parameters.

  Raises:
    ValueError: a checkpoint that is of another quantizer than its config says.
  """
  config = found.config
  model = models.build_autoencoder(config.model, config.data.image_size)
  specs.check_same_spec(found.quantizer, model.quantizer.spec())
  abstract = partitioning.place_abstract(
      variables.abstract_eval_fields(
          model, config.data.image_size, tuple(config.optim.frozen)
      ),
      mesh,
      config.partitioning.rules,
      config.partitioning.fsdp_min_size,
  )
  with contextlib.closing(
      checkpointer_lib.Checkpointer(found.folder, read_only=True)
  ) as checkpointer:
    try:
      fields = checkpointer.restore_fields(found.step, abstract)
    except checkpointer_lib.DamagedError as error:
      raise ValueError(
          f'{found.folder}: {error} --checkpoint=STEP takes another of'
          f' {checkpointer.steps}.'
      ) from error
  return model, variables.eval_variables(**fields)


def read_evaluation(found: Checkpoint) -> dict[str, Any] | None:
  """Returns the content of the run's evaluation.json if it is of this step.

  Raises:
    ValueError: the file is damaged.
  """
  path = found.folder / workdirs.EVALUATION
  if not path.is_file():
    return None
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
    step = content['step']
  except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
    raise ValueError(
        f'{path} cannot be read: {error}. Delete it, or write it anew with'
        ' --mode=eval.'
    ) from error
  return content if step == found.step else None


def check_same_model(
    saved: ml_collections.ConfigDict, given: ml_collections.ConfigDict
) -> None:
  """Refuses a config that was given for another model than the checkpoint's.

  Args:
    saved: config of the run.
    given: of which only other sections may differ.

  Raises:
    ValueError: the models differ; it lists how.
  """
  # Where weights and statistics once came from; a checkpoint has them.
  files = ['model.decoder.mae.checkpoint', 'model.encoder.checkpoint']
  if bool(saved.model.latent_statistics) == bool(given.model.latent_statistics):
    files.append('model.latent_statistics')
  differences = [
      line
      for line in configuration.diff_configs(saved, given)
      if line.startswith(('model.', 'data.image_size:'))
      and line.partition(':')[0] not in files
  ]
  if differences:
    raise ValueError(
        'The config has another model than the checkpoint (saved -> given):\n'
        + '\n'.join(differences)
    )
