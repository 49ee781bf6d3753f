"""Tests of what experiments/accelerators counts, and of what it shows."""

import collections
import json
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.accelerators import compile_steps
from experiments.accelerators import hlo_costs
from fsq_jax import configuration
from fsq_jax.models import layers
from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import blocks as vit_blocks
from fsq_jax.runtime import partitioning

_ROOT = pathlib.Path(__file__).parents[2]
_FOLDER = _ROOT / 'experiments' / 'compile_steps'


def _costs(function, *arguments):
  lowered = jax.jit(function).lower(*arguments)
  return hlo_costs.Program(lowered.as_text(dialect='hlo')).costs()


def _flops(costs):
  return sum(x.flops for x in costs.products)


def test_products_count_as_often_as_a_loop_runs_them():
  x, kernels = jnp.ones((3, 4)), jnp.ones((5, 4, 4), jnp.bfloat16)

  def apply(x, kernels):
    def body(x, kernel):
      return x @ kernel.astype(jnp.float32), x.astype(jnp.bfloat16) @ kernel

    return jax.lax.scan(body, x, kernels)

  costs = _costs(apply, x, kernels)
  assert _flops(costs) == 5 * 2 * (2 * 3 * 4 * 4)
  by_dtype = collections.Counter()
  for product in costs.products:
    by_dtype[product.dtypes] += product.flops
  assert by_dtype == {'f32 x f32': 480, 'bf16 x bf16': 480}


@pytest.mark.parametrize(
    ('stride', 'padding', 'dilation'),
    [(1, 'VALID', 1), (1, 'SAME', 1), (2, 'SAME', 1), (1, '', 2)],
)
def test_products_of_convolutions_leave_out_padding(
    stride, padding, dilation
):
  images, kernel = jnp.ones((2, 6, 5, 3)), jnp.ones((3, 3, 3, 4))

  def apply(images):
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), padding or [(2, 1), (0, 2)],
        lhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  # Of ones, each output is the number of products that it is the sum of.
  expected = 2 * float(jnp.sum(apply(images)))
  assert _flops(_costs(apply, images)) == expected


_NESTED = """HloModule nested

%inner (a: f32[24,8], b: s32[]) -> f32[1,8] {
  %a = f32[24,8]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} SLICE(%a, %b, %zero), dynamic_slice_sizes={1,8}
}

%outer (c: f32[8,24], d: s32[]) -> f32[1,8] {
  %c = f32[8,24]{0,1} parameter(0)
  %d = s32[] parameter(1)
  %cast = f32[24,8]{1,0} bitcast(%c)
  ROOT %called = f32[1,8]{1,0} fusion(%cast, %d), kind=kLoop, calls=%inner
}

ENTRY %main (x: f32[8,24], i: s32[]) -> f32[1,8] {
  %x = f32[8,24]{0,1} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  ROOT %y = f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%outer
}
"""


@pytest.mark.parametrize(
    ('opcode', 'rows'), [('dynamic-slice', 1), ('some-other', 24)]
)
def test_a_fusion_in_a_fusion_reads_the_slice_alone(opcode, rows):
  text = _NESTED.replace('SLICE', opcode)
  costs = hlo_costs.Program(text).costs()
  # Read, and 8 values written.
  assert costs.hbm_bytes == 4 * 8 * (rows + 1)


_KERNEL = """HloModule kernel

ENTRY %main (x: bf16[2,7,64]) -> bf16[2,7,64] {
  %x = bf16[2,7,64]{2,1,0} parameter(0)
  %y = bf16[2,7,64]{2,1,0:S(1)} copy(%x)
  %call = (bf16[2,7,64]{2,1,0}) custom-call(%x, %y), custom_call_target=\
"tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv",\
"cost_estimate":{"flops":"350","transcendentals":"9","bytes_accessed":"4"}}}
  ROOT %z = bf16[2,7,64]{2,1,0:S(1)} get-tuple-element(%call), index=0
}
"""


def test_kernels_count_with_their_cost_estimate():
  costs = hlo_costs.Program(_KERNEL).costs()
  assert [x[:3] for x in costs.products] == [('bf16 x bf16', 1.0, 350.0)]
  # The copy reads x, the kernel reads x and writes its result.
  assert costs.hbm_bytes == 3 * 2 * 2 * 7 * 64


def _compile_blocks(module, width, with_gradients):
  """Compiles blocks on 2 x 1 x 4 devices, kernels as configs have them."""
  mesh = partitioning.create_mesh({'data': 2, 'fsdp': 1, 'tensor': 4})
  rules = configuration.load_config(
      _ROOT / 'configs' / 'default.py'
  ).partitioning.rules
  x = jax.ShapeDtypeStruct((8, 7, width), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  shardings = partitioning.state_shardings(variables, mesh, rules, 0)
  split = [
      sharding.spec
      for sharding in jax.tree.leaves(shardings)
      if 'tensor' in sharding.spec
  ]
  assert split

  def apply(variables, x):
    return jnp.sum(module.apply(variables, x) ** 2)

  function = jax.grad(apply, (0, 1)) if with_gradients else apply
  batch_sharding = partitioning.batch_sharding(mesh)
  outputs = (shardings, batch_sharding) if with_gradients else None
  arguments = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      (variables, x), (shardings, batch_sharding),
  )
  compiled = jax.jit(function, out_shardings=outputs).lower(
      *arguments
  ).compile()
  return hlo_costs.Program(compiled.as_text()).costs()


class _PretrainedBlocks(vit_blocks.nn.Module):
  architecture: architectures.Architecture
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1

  @vit_blocks.nn.compact
  def __call__(self, x):
    return vit_blocks.apply_blocks(self, x)


_BLOCKS = {
    'vit': layers.Transformer(3, 4, 64, jnp.float32, 'none', 1),
    'pretrained': _PretrainedBlocks(
        architectures.build_architecture(
            'mae', patch_size=4, width=32, depth=3, num_heads=4, mlp_dim=64
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', _BLOCKS)
@pytest.mark.parametrize(
    'with_gradients', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_block_sums_activations_twice_a_direction(name, with_gradients):
  costs = _compile_blocks(_BLOCKS[name], 32, with_gradients)
  # Of 4 images on each of 2 x 4 devices, of 7 tokens of 32 channels.
  size = 4 * 7 * 32
  sums = 0
  for x in costs.collectives:
    arrays = [
        array
        for array in x.arrays
        if np.prod(array.shape) == size and len(array.shape) > 1
    ]
    if arrays:
      assert x.kind == 'all-reduce', x
      assert x.group_size == 4
      sums += x.count * len(arrays)
  assert sums == 3 * 2 * (2 if with_gradients else 1)


def _results():
  return json.loads((_FOLDER / 'results.json').read_text(encoding='utf-8'))


def test_readmes_show_the_tables_of_the_results(capsys):
  compile_steps.print_tables(_results())
  tables = capsys.readouterr().out.strip().split('\n\n')
  assert len(tables) == 2
  for table in tables:
    assert table in (_FOLDER / 'README.md').read_text()


def test_every_case_has_a_result():
  names = [case.name for case in compile_steps.list_cases()]
  assert len(set(names)) == len(names)
  assert list(_results()['cases']) == names


@pytest.mark.parametrize('stage', ['', '_stage2'])
def test_the_large_vqrae_fits_16_chips_of_16_gb(stage):
  name = f'vqrae_fsq_siglip_l{stage}/v5e:4x4/1024/shipped'
  figures = _results()['cases'][name]
  assert figures['batch_size'] == 1024
  memory = figures['memory_gib']
  # Of 15.75 GiB; without overlap between temporaries it would fit, too.
  assert memory['peak'] < memory['argument'] + memory['temp'] < 15
  config = configuration.load_config(
      _ROOT / 'configs' / f'vqrae_fsq_siglip_l{stage}.py'
  )
  mesh = dict(config.partitioning.mesh)
  assert mesh == {'data': 1, 'fsdp': -1, 'tensor': 1}
  assert figures['mesh'] == {'data': 1, 'fsdp': 16, 'tensor': 1}
