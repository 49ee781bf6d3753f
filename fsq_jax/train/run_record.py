"""Record of a run: saved with its checkpoints, checked when it resumes."""

from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
from typing import Any

from absl import logging
import jax
import ml_collections

from fsq_jax.checkpoints import checkpointer as checkpointers
from fsq_jax.configuration import compatibility
from fsq_jax.configuration import loading as config_loading
from fsq_jax.data import builder as data_builder
from fsq_jax.train import state as train_state
from fsq_jax.workdir import files as workdirs
from fsq_jax.workdir import provenance


@dataclasses.dataclass
class RunRecord:
  """Config, fixed parts, data set and input of a run.

  Attributes:
    config: the whole config.
    parts: JSON values of what else the result depends on: 'quantizer', the
      spec, and hashes of files.
    check_parts: takes the record of a checkpoint; raises a ValueError if its
      parts are others.
    dataset: the training split: num_examples, fingerprint and iterator().
    iterator: over the data set, the input of the training loop.
    started_from: where the initial variables came from, for run.json.
  """

  config: ml_collections.ConfigDict
  parts: Mapping[str, Any]
  check_parts: Callable[[Mapping[str, Any]], None]
  dataset: Any
  started_from: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.iterator = self.dataset.iterator()

  def current(self) -> dict[str, Any]:
    """Returns the record that a checkpoint holds, JSON-able."""
    return {
        'config': json.loads(config_loading.config_to_json(self.config)),
        **self.parts,
        'fingerprint': dict(self.dataset.fingerprint),
        'iterator': self.iterator.get_state(),
    }

  def restore_newest(
      self,
      checkpointer: checkpointers.Checkpointer,
      abstract: train_state.TrainState,
      allow_config_change: bool,
  ) -> checkpointers.Restored | None:
    """Restores the newest checkpoint and the position of the input.

    Args:
      checkpointer: of the run.
      abstract: shapes, dtypes and shardings of the state.
      allow_config_change: accept another config and another data set; with the
        latter the input starts anew.

    Returns:
      The restored checkpoint; None without one.

    Raises:
      ValueError: a checkpoint of another config, of other parts, or of another
        data set.
    """

    def check(saved: Mapping[str, Any]) -> train_state.TrainState:
      compatibility.check_resumable(
          config_loading.config_from_json(json.dumps(saved['config'])),
          self.config,
          allow_config_change=allow_config_change,
      )
      self.check_parts(saved)
      if not allow_config_change:
        self._check_data(saved)
      return abstract

    restored = checkpointer.restore_newest(check)
    if restored is None:
      return None
    try:
      self._check_data(restored.record)
    except ValueError as error:
      logging.warning('The input starts anew. %s', error)
    else:
      self.iterator.set_state(restored.record['iterator'])
    return restored

  def write(
      self,
      folder: pathlib.Path,
      state: train_state.TrainState,
      mesh: jax.sharding.Mesh,
      compile_seconds: float,
  ) -> None:
    """Writes run.json, config.json and quantizer.json.

    Args:
      folder: of the run.
      state: at the start of this process.
      mesh: from `partitioning.create_mesh`.
      compile_seconds: time that compiling the training step took.
    """
    hashes = dict(self.parts)
    quantizer = hashes.pop('quantizer')
    num_frozen = train_state.num_parameters(state.frozen_params)
    files = {
        workdirs.RUN: {
            **provenance.describe(),
            'mesh': dict(mesh.shape),
            'num_parameters': (
                train_state.num_parameters(state.params) + num_frozen
            ),
            'num_frozen_parameters': num_frozen,
            'num_train_examples': self.dataset.num_examples,
            'first_step': int(state.step),
            'started_from': self.started_from,
            **hashes,
            'compile_seconds': round(compile_seconds, 2),
        },
        workdirs.CONFIG: self.current()['config'],
        workdirs.QUANTIZER: quantizer,
    }
    for name, content in files.items():
      workdirs.write_json(folder / name, content)

  def _check_data(self, saved: Mapping[str, Any]) -> None:
    data_builder.check_fingerprint(
        saved['fingerprint'], self.dataset.fingerprint
    )
