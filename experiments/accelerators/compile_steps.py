"""Compiles the full-size training steps for TPUs and GPUs, without either.

Each case is a config on a mesh of a topology. Memory, FLOPs, HBM traffic,
collectives and attention kernels of the compiled step are written to
results.json. Finished cases are skipped, unless --again is given, as are those
whose compiler is not installed.

  python experiments/accelerators/compile_steps.py --only=h100

Needs libtpu for TPUs and the CUDA plugin for GPUs, see README.md.
"""

import argparse
import collections
from collections.abc import Mapping
from importlib import metadata
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = pathlib.Path(__file__).with_name('results.json')
sys.path.insert(0, str(ROOT))

from experiments.accelerators import chips  # noqa: E402
from experiments.accelerators import hlo_costs  # noqa: E402
from experiments.accelerators import parts  # noqa: E402
from experiments.accelerators import steps  # noqa: E402
from experiments.accelerators import tables  # noqa: E402
from fsq_jax import workdir as workdirs  # noqa: E402
from fsq_jax.runtime import partitioning  # noqa: E402
from fsq_jax.workdir import provenance  # noqa: E402


class Case(NamedTuple):
  """A training step to compile.

  Attributes:
    config: name of a file in configs.
    topology: name of a topology of `jax.experimental.topologies`.
    batch_size: global batch size.
    mesh: axis sizes of partitioning.mesh; None for the mesh of the config.
    fields: config overrides.
    label: name of the model in the table; default: the config.
  """

  config: str
  topology: str
  batch_size: int
  mesh: Mapping[str, int] | None = None
  fields: Mapping[str, Any] = {}
  label: str = ''

  @property
  def model(self) -> str:
    """Name of the model in the tables."""
    return self.label or self.config

  @property
  def name(self) -> str:
    """Key in results.json."""
    mesh = self.mesh or {}
    sizes = ','.join(f'{axis}={size}' for axis, size in mesh.items())
    shape = sizes or 'shipped'
    return f'{self.model}/{self.topology}/{self.batch_size}/{shape}'


def list_cases() -> list[Case]:
  """Returns all cases, the most important first."""
  stage_1, stage_2 = 'vqrae_fsq_siglip_l', 'vqrae_fsq_siglip_l_stage2'
  data, fsdp = {'data': -1, 'fsdp': 1}, {'data': 1, 'fsdp': -1}
  tensor = {'data': 1, 'fsdp': -1, 'tensor': 4}
  cases = [
      Case(stage_1, 'v5e:4x4', 1024),
      Case(stage_2, 'v5e:4x4', 1024),
      Case(stage_1, 'v5e:4x4', 1024, data),
      Case(stage_1, 'v5e:4x4', 1024, tensor),
  ]
  # The same batch size per chip, on more chips.
  for topology, num_images in (('v5e:8x8', 4096), ('v5e:16x16', 16384)):
    for sizes in ({'fsdp': 16}, {'fsdp': 16, 'tensor': 4}):
      cases.append(Case(stage_1, topology, num_images, {'data': -1, **sizes}))
  cases += [
      Case('imagenet128_fsq_8555', 'v5e:4x4', 256),
      Case('imagenet256_fsq_1024', 'v5e:4x4', 256),
      Case('imagenet256_fsq_1024', 'v5e:4x4', 256, fsdp),
      Case('default', 'v5e:4x4', 1024, fsdp, _vit_h('qkv'), 'vit_h_16'),
      Case('default', 'v5e:4x4', 1024, tensor, _vit_h('blocks'), 'vit_h_16'),
      Case(stage_1, 'v6e:4x4', 1024),
      Case('imagenet256_maskgit_8555', 'v5e:4x4', 256),
  ]
  # Does not fit: checks that the compiler reports it.
  cases.append(Case(stage_1, 'v5e:4x4', 4096))
  in_float32 = {
      'losses.perceptual.dtype': 'float32',
      'discriminator.dino.dtype': 'float32',
  }
  label = f'{stage_1}, its networks in float32'
  cases += [
      Case(stage_1, 'v5e:4x4', 1024, fields=in_float32, label=label),
      Case(
          stage_1, 'v5e:4x4', 1024, fields={'model.remat': 'dots'},
          label=f"{stage_1}, model.remat='dots'",
      ),
  ]
  for num_gpus in (8, 1, 16):
    cases += [
        Case(stage_1, f'h100:{num_gpus}', 64 * num_gpus),
        Case(stage_2, f'h100:{num_gpus}', 64 * num_gpus),
    ]
  cases += [
      Case('default', 'h100:8', 512, fsdp, _vit_h('dots'), 'vit_h_16'),
      Case('imagenet128_fsq_8555', 'h100:8', 256),
      Case('imagenet256_fsq_1024', 'h100:8', 256),
      Case('imagenet256_maskgit_8555', 'h100:8', 256),
  ]
  return cases + list_remaining_cases()


def list_remaining_cases() -> list[Case]:
  """Returns the other full-size configs, to see that they compile and fit."""
  sizes = {
      512: (
          'vqrae_fsq_siglip_l_88865', 'vqrae_simvq_siglip_l',
          'vqrae_vq_siglip_l', 'vqrae_fsq_siglip2_so400m',
          'vqrae_simvq_siglip2_so400m', 'vqrae_vq_siglip2_so400m',
          'vqrae_fsq_dinov2_b', 'vqrae_simvq_dinov2_b', 'vqrae_vq_dinov2_b',
          'rae_dinov2_b',
      ),
      256: (
          'imagenet128_fsq_888555', 'imagenet128_fsq_88865',
          'imagenet256_fsq_888555', 'imagenet256_vq_1024',
          'imagenet256_maskgit_64000', 'imagenet256_llamagen_b',
          'imagenet256_llamagen_l',
      ),
  }
  return [
      Case(name, 'h100:8', batch_size)
      for batch_size, names in sizes.items()
      for name in names
  ]


def _vit_h(remat: str) -> dict[str, Any]:
  """Returns fields of a plain ViT-H/16 autoencoder, 1.26 billion parameters."""
  return {
      'data.image_size': (256, 256),
      'model.encoder.patch_size': 16,
      'model.encoder.width': 1280,
      'model.encoder.depth': 32,
      'model.encoder.num_heads': 16,
      'model.encoder.mlp_dim': 5120,
      'model.decoder.depth': 32,
      'model.dtype': 'bfloat16',
      'model.remat': remat,
  }


def compile_case(
    case: Case,
    commit: str | None,
    model_tflops: float | None,
    texts: pathlib.Path | None,
) -> dict[str, Any]:
  """Compiles a case and returns its measurements.

  Args:
    case: the step.
    commit: of the code.
    model_tflops: matmul TFLOP of the step without recomputation; None to count.
    texts: folder of compiled text: the text of the case is written there or, if
      it is there, analyzed instead of compiling.
  """
  kept = None
  if texts is not None:
    kept = texts / f'{re.sub(r"[^a-z0-9_]+", "-", case.name.lower())}.json'
  if kept is not None and kept.is_file():
    record = json.loads(kept.read_text(encoding='utf-8'))
    text = record.pop('text')
  else:
    record, text = _compile(case, commit, model_tflops)
    if kept is not None and text:
      kept.write_text(json.dumps({**record, 'text': text}), encoding='utf-8')
  if not text:
    return record
  per_chip = record['model_tflops'] / math.prod(record['mesh'].values())
  costs = hlo_costs.Program(text).costs()
  chip = chips.find_chip(case.topology)
  return {**record, **summarize(costs, chip, per_chip)}


def _compile(
    case: Case, commit: str | None, model_tflops: float | None
) -> tuple[dict[str, Any], str]:
  """Returns a record of the compiled step, and its text; '' if out of memory.

  Args:
    case: the step.
    commit: of the code.
    model_tflops: as in `compile_case`.
  """
  package = chips.find_chip(case.topology).package
  if package == 'libtpu':
    # Takes a quarter of the compile time of the default, 0.
    jax.config.update('jax_exec_time_optimization_effort', -1.0)
  config = steps.load_config(case.config, case.batch_size, case.fields)
  mesh = partitioning.create_mesh(
      dict(case.mesh or config.partitioning.mesh),
      chips.describe_devices(case.topology),
  )
  step = steps.build_step(config, mesh)
  if model_tflops is None:
    model_tflops = steps.count_model_flops(config) / 1e12
  record = {
      'config': case.config,
      'topology': case.topology,
      'batch_size': case.batch_size,
      'mesh': dict(mesh.shape),
      'commit': commit,
      'versions': {
          name: metadata.version(name) for name in ('jax', 'jaxlib', package)
      },
      'state_gib': round(step.state_bytes / 2**30, 2),
      'whole_mib': round(sum(step.whole.values()) / 2**20, 1),
      'model_tflops': round(model_tflops, 2),
  }
  started = time.perf_counter()
  try:
    compiled = step.lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = re.search(r'\(([\d.]+)G\) exceeds available HBM', str(error))
    if not needed:
      raise
    return {**record, 'needs_gib': float(needed.group(1))}, ''
  record['compile_seconds'] = round(time.perf_counter() - started, 1)
  memory = compiled.memory_analysis()
  record['memory_gib'] = {
      name.partition('_')[0]: round(
          getattr(memory, f'{name}_in_bytes') / 2**30, 3
      )
      for name in ('argument_size', 'temp_size', 'alias_size', 'peak_memory')
  }
  return record, compiled.as_text()


def summarize(
    costs: hlo_costs.Costs, chip: chips.Chip, model_tflops: float
) -> dict[str, Any]:
  """Returns totals and roofline bounds of a compiled step.

  Args:
    costs: of the step, per chip.
    chip: an entry of `chips.CHIPS`.
    model_tflops: matmul TFLOP of the model per chip, without recomputation.
  """
  by_dtype, collectives = collections.Counter(), {}
  for product in costs.products:
    by_dtype[product.dtypes] += float(product.flops)
  flops = sum(by_dtype.values())
  for x in costs.collectives:
    total = collectives.setdefault(
        x.kind, {'count': 0, 'gbytes': 0.0, 'sent_gbytes': 0.0}
    )
    total['count'] += int(x.count)
    total['gbytes'] += x.count * x.num_bytes / 1e9
    total['sent_gbytes'] += x.sent_bytes / 1e9
  sent = sum(x.sent_bytes for x in costs.collectives)
  seconds = {
      'products': flops / chip.flops,
      'hbm': costs.padded_bytes / chip.hbm_bandwidth,
      'links': sent / chip.link_bandwidth,
  }
  step = max(seconds.values())
  return {
      'product_tflops': round(flops / 1e12, 3),
      'products_by_dtype': {
          name: round(x / flops, 4) for name, x in by_dtype.most_common()
      },
      'hbm_gbytes': round(costs.padded_bytes / 1e9, 1),
      'unpadded_gbytes': round(costs.hbm_bytes / 1e9, 1),
      'collectives': {
          kind: {name: round(x, 3) for name, x in total.items()}
          for kind, total in sorted(collectives.items())
      },
      'roofline_ms': {
          name: round(1e3 * x, 1) for name, x in seconds.items()
      },
      'step_ms': round(1e3 * step, 1),
      'mfu': round(model_tflops * 1e12 / step / chip.flops, 3),
      'attention': dict(sorted(costs.attention.items())),
      'parts': parts.by_part(costs, chip),
  }


def _run_case(case: Case, options: list[str]) -> dict[str, Any]:
  """Compiles a case in a subprocess, which frees its memory."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'figures.json'
    environment = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
        # An interrupted process may have left its lock.
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }
    command = [sys.executable, __file__, '--case', case.name, '--to', path]
    subprocess.run([*command, *options], env=environment, check=True)
    return json.loads(path.read_text(encoding='utf-8'))


def _known_tflops(
    case: Case, records: Mapping[str, Any], commit: str | None
) -> list[str]:
  """Returns the option with the model TFLOP of another case of the model."""
  for name, record in records.items():
    is_same = name.partition('/')[0] == case.model
    if is_same and record.get('commit') == commit:
      total = record['model_tflops'] / record['batch_size'] * case.batch_size
      return [f'--model-tflops={total}']
  return []


def main() -> None:
  """Compiles the missing cases and prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
      '--again', action='store_true', help='recompile finished cases'
  )
  parser.add_argument(
      '--only', default='', help='regular expression for the case names'
  )
  parser.add_argument(
      '--texts', type=pathlib.Path,
      help='folder that keeps the compiled text, to analyze it again',
  )
  parser.add_argument('--case', help='compile one case in this process')
  parser.add_argument('--to', type=pathlib.Path, help='output file of --case')
  parser.add_argument('--commit', help='of the code, used by --case')
  parser.add_argument('--model-tflops', type=float, help='used by --case')
  arguments = parser.parse_args()
  cases = {case.name: case for case in list_cases()}
  if not any(re.search(arguments.only, name) for name in cases):
    parser.error(
        f'--only={arguments.only} matches no case; the names are '
        + ', '.join(cases)
    )
  if arguments.case:
    figures = compile_case(
        cases[arguments.case], arguments.commit, arguments.model_tflops,
        arguments.texts,
    )
    arguments.to.write_text(json.dumps(figures), encoding='utf-8')
    return
  results = {'cases': {}}
  if RESULTS.is_file():
    results = json.loads(RESULTS.read_text(encoding='utf-8'))
  records = results['cases']
  commit = provenance.git_revision()  # Before the results change.
  options = [f'--commit={commit}']
  if arguments.texts:
    options.append(f'--texts={arguments.texts}')
  for name, case in cases.items():
    if not re.search(arguments.only, name):
      continue
    if name in records and not arguments.again:
      continue
    missing = chips.missing_plugin(case.topology)
    if missing:
      sys.stderr.write(f'{name} is skipped. {missing}\n')
      continue
    sys.stderr.write(f'{name}\n')
    records[name] = _run_case(
        case, options + _known_tflops(case, records, commit)
    )
    ordered = {x: records[x] for x in cases if x in records}
    workdirs.write_json(RESULTS, {'cases': ordered})
  brief = [case.name for case in list_remaining_cases()]
  tables.print_tables(results, brief)


if __name__ == '__main__':
  main()
