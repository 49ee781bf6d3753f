"""Compiles the full-size training steps for TPUs, without a TPU.

Each case is a config on a mesh of a TPU topology. Memory, FLOPs, HBM traffic
and collectives of the compiled step are written to results.json. Finished cases
are skipped, unless --again is given.

  python experiments/tpu_compile/tpu_compile.py

Needs libtpu, see README.md.
"""

import argparse
import collections
from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = pathlib.Path(__file__).with_name('results.json')
sys.path.insert(0, str(ROOT))


class Chip(NamedTuple):
  """Peak values of a chip, from cloud.google.com/tpu/docs/<name>.

  Attributes:
    flops: bf16 FLOP/s.
    hbm: bytes of HBM.
    hbm_bandwidth: bytes per second.
    ici_bandwidth: bytes per second in one direction, half of the documented
      bidirectional value.
  """

  flops: float
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float


CHIPS = {
    'v5e': Chip(197e12, 16e9, 819e9, 200e9),
    'v5p': Chip(459e12, 95e9, 2765e9, 600e9),
    'v6e': Chip(918e12, 32e9, 1638e9, 400e9),
}
# A plain ViT-H/16 autoencoder, 1.26 billion parameters.
_VIT_H = {
    'data.image_size': (256, 256),
    'model.encoder.patch_size': 16,
    'model.encoder.width': 1280,
    'model.encoder.depth': 32,
    'model.encoder.num_heads': 16,
    'model.encoder.mlp_dim': 5120,
    'model.decoder.depth': 32,
    'model.dtype': 'bfloat16',
    'model.remat': 'blocks',
}


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
  def name(self) -> str:
    """Key in results.json."""
    mesh = self.mesh or {}
    sizes = ','.join(f'{axis}={size}' for axis, size in mesh.items())
    label = self.label or self.config
    return f'{label}/{self.topology}/{self.batch_size}/{sizes or "shipped"}'


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
      Case('default', 'v5e:4x4', 1024, fsdp, _VIT_H, 'vit_h_16'),
      Case('default', 'v5e:4x4', 1024, tensor, _VIT_H, 'vit_h_16'),
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
  cases.append(Case(stage_1, 'v5e:4x4', 1024, fields=in_float32, label=label))
  return cases


def compile_case(case: Case) -> dict[str, Any]:
  """Compiles a case and returns its measurements."""
  # Imported here, so that the tables can be printed without libtpu.
  import jax
  from jax.experimental import topologies

  from experiments.tpu_compile import hlo_costs
  from experiments.tpu_compile import steps
  from fsq_jax.runtime import partitioning

  config = steps.load_config(case.config, case.batch_size, case.fields)
  sizes = dict(case.mesh or config.partitioning.mesh)
  # Takes a quarter of the compile time of the default, 0.
  jax.config.update('jax_exec_time_optimization_effort', -1.0)
  devices = topologies.get_topology_desc(
      platform='tpu', topology_name=case.topology
  ).devices
  mesh = partitioning.create_mesh(sizes, list(devices))
  step = steps.build_step(config, mesh)
  figures = {
      'config': case.config,
      'topology': case.topology,
      'batch_size': case.batch_size,
      'mesh': dict(mesh.shape),
      'state_gib': round(step.state_bytes / 2**30, 2),
      'whole_mib': round(sum(step.whole.values()) / 2**20, 1),
      'model_tflops': round(steps.count_model_flops(config) / 1e12, 2),
  }
  started = time.perf_counter()
  try:
    compiled = step.lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = re.search(r'\(([\d.]+)G\) exceeds available HBM', str(error))
    if not needed:
      raise
    return {**figures, 'needs_gib': float(needed.group(1))}
  figures['compile_seconds'] = round(time.perf_counter() - started, 1)
  text = compiled.as_text()
  if os.environ.get('FSQ_JAX_HLO'):
    pathlib.Path(os.environ['FSQ_JAX_HLO']).write_text(text)
  memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
  sizes = ('argument_size', 'temp_size', 'alias_size', 'peak_memory')
  figures['memory_gib'] = {
      name.partition('_')[0]: round(
          getattr(memory, f'{name}_in_bytes') / 2**30, 3
      )
      for name in sizes
  }
  costs = hlo_costs.Program(text).costs()
  chip = CHIPS[case.topology.partition(':')[0]]
  return {
      **figures,
      'xla_loops_once': {
          'tflops': round(analysis['flops'] / 1e12, 4),
          'gbytes': round(analysis['bytes accessed'] / 1e9, 2),
          'share_of_products': round(
              sum(x.flops / x.count for x in costs.products)
              / analysis['flops'], 4,
          ),
      },
      **summarize(costs, chip, figures['model_tflops'] / len(devices)),
  }


def summarize(costs, chip: Chip, model_tflops: float) -> dict[str, Any]:
  """Returns totals and roofline bounds of a compiled step.

  Args:
    costs: `hlo_costs.Costs`.
    chip: an entry of `CHIPS`.
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
      'hbm': costs.hbm_bytes / chip.hbm_bandwidth,
      'ici': sent / chip.ici_bandwidth,
  }
  step = max(seconds.values())
  return {
      'product_tflops': round(flops / 1e12, 3),
      'products_by_dtype': {
          name: round(x / flops, 4) for name, x in by_dtype.most_common()
      },
      'hbm_gbytes': round(costs.hbm_bytes / 1e9, 1),
      'collectives': {
          kind: {name: round(x, 3) for name, x in total.items()}
          for kind, total in sorted(collectives.items())
      },
      'roofline_ms': {
          name: round(1e3 * x, 1) for name, x in seconds.items()
      },
      'step_ms': round(1e3 * step, 1),
      'mfu': round(model_tflops * 1e12 / step / chip.flops, 3),
  }


def print_tables(results: Mapping[str, Any]) -> None:
  """Prints two tables: bounds, and the quantities they are computed from."""
  rows = [_describe(name, x) for name, x in results['cases'].items()]
  _print_table(
      ('model', 'chips', 'images', 'mesh (data x fsdp x tensor)',
       'peak HBM (GiB)', 'step time lower bound (ms)', 'MFU upper bound'),
      [(*case, *outcome) for case, outcome, _ in rows],
  )
  sys.stdout.write('\n')
  _print_table(
      ('model', 'chips', 'mesh (data x fsdp x tensor)', 'arguments (GiB)',
       'donated', 'temporaries (GiB)', 'matmul TFLOP', 'bf16 x bf16',
       'HBM traffic (GB)', 'sent (GB): ' + ' / '.join(_KINDS),
       'matmul / HBM / ICI bound (ms)'),
      [(case[0], case[1], case[3], *parts) for case, _, parts in rows if parts],
  )


# In the order of the table.
_KINDS = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
    'collective-permute',
)


def _describe(name: str, figures: Mapping[str, Any]) -> tuple[Any, Any, Any]:
  """Returns the cells of a case: name and mesh, bounds, quantities."""
  case = (
      name.partition('/')[0],
      figures['topology'],
      f'{figures["batch_size"]:,}',
      ' x '.join(str(n) for n in figures['mesh'].values()),
  )
  if 'needs_gib' in figures:
    needed = f'out of memory, temporaries {figures["needs_gib"]}'
    return case, (needed, '-', '-'), ()
  memory = figures['memory_gib']
  sent = (
      figures['collectives'].get(kind, {'sent_gbytes': 0.0})['sent_gbytes']
      for kind in _KINDS
  )
  outcome = (
      f'{memory["peak"]:.1f}', f'{figures["step_ms"]:.0f}',
      f'{figures["mfu"]:.0%}',
  )
  parts = (
      f'{memory["argument"]:.2f}',
      f'{memory["alias"] / memory["argument"]:.0%}',
      f'{memory["temp"]:.2f}',
      f'{figures["product_tflops"]:.1f}',
      f'{figures["products_by_dtype"].get("bf16 x bf16", 0):.1%}',
      f'{figures["hbm_gbytes"]:,.0f}',
      ' / '.join(f'{x:.2f}' for x in sent),
      ' / '.join(f'{x:.0f}' for x in figures['roofline_ms'].values()),
  )
  return case, outcome, parts


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  for row in (header, ['---'] * len(header), *rows):
    sys.stdout.write(f'| {" | ".join(row)} |\n')


def _run_case(case: Case) -> dict[str, Any]:
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
    subprocess.run(command, env=environment, check=True)
    return json.loads(path.read_text(encoding='utf-8'))


def main() -> None:
  """Compiles the missing cases and prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
      '--again', action='store_true', help='recompile finished cases'
  )
  parser.add_argument('--only', default='', help='substring of the case names')
  parser.add_argument('--case', help='compile one case in this process')
  parser.add_argument('--to', type=pathlib.Path, help='output file of --case')
  arguments = parser.parse_args()
  cases = {case.name: case for case in list_cases()}
  if arguments.case:
    figures = compile_case(cases[arguments.case])
    arguments.to.write_text(json.dumps(figures), encoding='utf-8')
    return
  from fsq_jax import workdir as workdirs

  results = {'cases': {}}
  if RESULTS.is_file():
    results = json.loads(RESULTS.read_text(encoding='utf-8'))
  for name, case in cases.items():
    wanted = arguments.only in name
    if wanted and (arguments.again or name not in results['cases']):
      sys.stderr.write(f'{name}\n')
      results['cases'][name] = _run_case(case)
    known = results['cases']
    results['cases'] = {x: known[x] for x in cases if x in known}
    workdirs.write_json(RESULTS, results)
  print_tables(results)


if __name__ == '__main__':
  main()
