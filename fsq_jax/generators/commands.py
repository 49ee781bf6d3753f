"""Commands on the run of a generator: --mode=eval and --mode=report."""

from collections.abc import Callable, Iterable
import os
from typing import Any

import jax
import ml_collections

from fsq_jax.checkpoints import saved_model
from fsq_jax.evaluation import saved_run
from fsq_jax.generators import builder
from fsq_jax.generators import evaluation
from fsq_jax.generators import saved_generator
from fsq_jax.generators import token_files
from fsq_jax.report import report as reports


def evaluate_workdir(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    which: str = 'newest',
    output: str | os.PathLike[str] | None = None,
    show: Callable[[Iterable[Any]], None] = lambda lines: None,
) -> evaluation.Evaluation:
  """Evaluates a checkpoint of a generator's run.

  The newest checkpoint rewrites evaluation.json and the report; another one has
  a file with its step in the name.

  Args:
    config: of the run; its sections tokens, eval and sample may differ.
    workdir: the run's folder.
    which: checkpoint: 'newest', 'best' (fewest bits per token), or a step
      number.
    output: folder for the files; by default the run's.
    show: called with lines to print.

  Returns:
    The evaluation, also written to the folder.

  Raises:
    ValueError: an invalid config, other tokens than those of the training, no
      checkpoint, or a folder that cannot be written.
    RuntimeError: the results cannot be written; they have been shown.
  """
  found, config, mesh = saved_model.open_run(
      config, workdir, which, mode='eval'
  )
  folder = saved_run.prepare_output(found.folder, output)
  tokens = token_files.open_files(config)
  token_files.check_same(found.record['tokens'], tokens.format)
  saved = saved_generator.restore(found, mesh)
  evaluator = evaluation.Evaluator(
      config,
      saved.model,
      builder.build_sampling(
          config.sample, config.model.kind, saved.model.num_tokens
      ),
      tokens,
      mesh,
  )
  result = evaluator.run(saved.variables)
  show([*result.lines(), f'Step {found.step}: {result.summary()}'])
  if jax.process_index() == 0:
    label = {'newest': '', 'best': 'best'}.get(which, 'checkpoint')
    with saved_run.writing_to(folder):
      path = result.write(folder, found.step, label)
      if not label:
        reports.write_report(found.folder, folder)
    show([path])
  return result


def report_workdir(
    workdir: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
) -> str:
  """Writes report.html again from the files of a generator's run.

  Args:
    workdir: the run's folder.
    output: folder for the page; by default the run's.

  Returns:
    The path of the page.

  Raises:
    ValueError: no run of a generator, or a folder that cannot be written.
    RuntimeError: the page cannot be written.
  """
  found = saved_model.find_run(workdir)
  saved_model.check_same_kind(found, is_generator=True)
  folder = saved_run.prepare_output(found.folder, output)
  with saved_run.writing_to(folder):
    return reports.write_report(found.folder, folder)
