"""Checkpoints of a run: state, input position and config in one step."""

from collections.abc import Mapping
import math
import pathlib
from typing import Any

import orbax.checkpoint as ocp

from fsq_jax import workdir


class Checkpointer:
  """Saves and restores the steps under `checkpoints/` of a run's folder.

  A step appears whole or not at all: it is written in the background under
  another name and then renamed. The newest ones and the best one are kept.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int = 1):
    """Opens the folder.

    Args:
      folder: the run's folder.
      keep: newest steps to keep, >= 1, beside the one of the highest PSNR.
    """
    policies = ocp.checkpoint_managers
    keep_newest = policies.LatestN(n=keep)
    keep_best = policies.BestN(
        get_metric_fn=_psnr, n=1, keep_checkpoints_without_metrics=False
    )
    self._manager = ocp.CheckpointManager(
        folder / workdir.CHECKPOINTS,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [keep_newest, keep_best]
            ),
            best_fn=_psnr,  # Orbax writes no metrics without it.
        ),
    )

  @property
  def latest_step(self) -> int | None:
    """The newest step, None without any."""
    return self._manager.latest_step()

  @property
  def best_step(self) -> int | None:
    """The step of the highest evaluated PSNR, None without any."""
    values = {
        step: _psnr(self._manager.metrics(step) or {})
        for step in self._manager.all_steps()
    }
    best = max(values, key=values.get, default=None)
    return None if values.get(best, -math.inf) == -math.inf else best

  def is_evaluated(self, step: int) -> bool:
    """Whether the step was saved with the numbers of an evaluation."""
    return bool(self._manager.metrics(step))

  def save(
      self,
      step: int,
      state: Any,
      record: Mapping[str, Any],
      metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to save one step; the state may be donated afterwards.

    A step that is there already stays as it is.

    Args:
      step: steps taken.
      state: tree of arrays.
      record: JSON values: config, quantizer, position and fingerprint of the
        input.
      metrics: of an evaluation at this step, with the key 'psnr'; one that is
        not finite ranks last.
    """
    self._manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            record=ocp.args.JsonSave(dict(record)),
        ),
        metrics=workdir.finite_or_null(metrics or {}),
    )

  def restore_record(self, step: int) -> dict[str, Any]:
    """Reads the JSON values of one step, without its arrays."""
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    return self._manager.restore(step, args=args)['record']

  def restore(self, step: int, abstract: Any) -> Any:
    """Reads the state of one step.

    Args:
      step: one of the steps that are there.
      abstract: tree of `jax.ShapeDtypeStruct` with the shardings wanted; how
        the arrays were spread over devices when saved does not matter.

    Returns:
      The state.
    """
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    return self._manager.restore(step, args=args)['state']

  def wait(self) -> None:
    """Returns when everything that was saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and closes."""
    self._manager.close()


def _psnr(metrics: Mapping[str, float | None]) -> float:
  """What ranks the steps; those without a finite number come last."""
  value = metrics.get('psnr')
  return -math.inf if value is None else value
