"""Tests of what experiments/accelerators counts, and of what it shows."""

import collections
import json
import pathlib
import re

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.accelerators import chips
from experiments.accelerators import compile_steps
from experiments.accelerators import hlo
from experiments.accelerators import hlo_costs
from experiments.accelerators import parts
from experiments.accelerators import tables
from fsq_jax import configuration
from fsq_jax.models import layers
from fsq_jax.models.pretrained import architectures
from fsq_jax.models.pretrained import blocks as vit_blocks
from fsq_jax.runtime import partitioning

_ROOT = pathlib.Path(__file__).parents[2]
_FOLDER = _ROOT / 'experiments' / 'accelerators'


def _costs(function, *arguments):
  lowered = jax.jit(function).lower(*arguments)
  text = lowered.as_text(dialect='hlo', debug_info=True)
  return hlo_costs.Program(text).costs()


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


@pytest.mark.parametrize(
    ('text', 'num_bytes', 'padded'),
    [
        # Rows to 8, channels to 128.
        ('f32[3,257,72]{2,1,0:T(8,128)}', 4 * 3 * 257 * 72, 4 * 3 * 264 * 128),
        (
            'bf16[3,257,72]{2,1,0:T(8,128)(2,1)}',
            2 * 3 * 257 * 72,
            2 * 3 * 264 * 128,
        ),
        (
            'bf16[3,257,72]{2,1,0:T(16,128)(2,1)S(1)}',
            2 * 3 * 257 * 72,
            2 * 3 * 272 * 128,
        ),
        ('s8[33,130]{1,0:T(32,128)(4,1)}', 33 * 130, 64 * 256),
        # Columns are minor.
        ('f32[257,72]{0,1:T(8,128)}', 4 * 257 * 72, 4 * 384 * 72),
        ('f32[5]{0:T(128)}', 4 * 5, 4 * 128),
        ('bf16[1500]{0:T(1024)(128)(2,1)}', 2 * 1500, 2 * 2048),
        ('f32[]{:T(128)}', 4, 4 * 128),
        # A GPU has no tiles.
        ('bf16[3,257,72]{2,1,0}', 2 * 3 * 257 * 72, 2 * 3 * 257 * 72),
    ],
)
def test_arrays_take_the_bytes_of_whole_tiles(text, num_bytes, padded):
  module = f'ENTRY %main () -> f32[] {{\n  %x = {text} iota()\n}}'
  computations, _ = hlo.parse(module)
  (array,) = computations['main']['x'].arrays
  assert (array.num_bytes, array.padded_bytes) == (num_bytes, padded)


_GPU = """HloModule gpu

ENTRY %main (q: bf16[2,6,8,64]) -> bf16[2,8,6,64] {
  %q = bf16[2,6,8,64]{3,2,1,0} parameter(0)
  %x = bf16[4,3,5]{2,1,0} parameter(1)
  %y = bf16[4,5,7]{2,1,0} parameter(2)
  %image = f32[2,6,6,3]{3,2,1,0} parameter(3)
  %kernel = f32[3,3,3,4]{3,2,1,0} parameter(4)
  %gradient = f32[2,6,6,4]{3,2,1,0} parameter(5)
  %a = (bf16[2,8,6,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="f/decoder/a"}, \
backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": \
{"element_type": "BF16", "dimensions": ["2", "8", "6", "6"]}}}
  %l = f32[2,8,6,6]{3,2,1,0} dot(%q, %q), lhs_batch_dims={0,2}, \
lhs_contracting_dims={3}, metadata={op_name="f/bhqd,bhkd->bhqk/dot_general"}
  %d = f32[2,8,6,6]{3,2,1,0} dot(%q, %q), lhs_batch_dims={0,2}, \
lhs_contracting_dims={3}, \
metadata={op_name="transpose(jvp(f))/bhqd,bhkd->bhqk/dot_general"}
  %m = (bf16[4,3,7]{2,1,0}, s8[64]{0}) custom-call(%x, /*index=1*/%y), \
custom_call_target="__cublas$lt$matmul", backend_config={\
"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  %c = (f32[2,6,6,4]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
custom_call_target="__cudnn$convForward"
  %i = (f32[2,6,6,3]{3,2,1,0}, u8[0]{0}) custom-call(%gradient, %kernel), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
custom_call_target="__cudnn$convBackwardInput"
  %k = (f32[3,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%image, %gradient), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
custom_call_target="__cudnn$convBackwardFilter"
  ROOT %r = bf16[2,8,6,64]{3,1,2,0} get-tuple-element(%a), index=0
}
"""


def test_kernels_of_gpus_count_with_their_shapes():
  costs = hlo_costs.Program(_GPU).costs()
  attention, *_, matmul, forward, for_input, for_kernel = (
      x.flops for x in costs.products
  )
  assert attention == 2 * (2 * 2 * 8 * 6 * 6 * 64)
  assert matmul == 4 * 2 * 3 * 5 * 7
  # 16 of the 18 taps of a row are inside of the image, for 3 taps and 6 pixels.
  assert forward == for_input == for_kernel == 2 * 2 * 16 * 16 * 3 * 4
  assert costs.attention == {'cuDNN forward': 1, 'XLA forward': 1}
  q = 2 * 2 * 6 * 8 * 64
  totals = parts.by_part(costs, chips.CHIPS['h100']._replace(hbm_bandwidth=1e9))
  assert totals['decoder forward']['hbm_ms'] == round(1e3 * 4 * q / 1e9, 1)


@pytest.mark.parametrize(('remat', 'times'), [('none', 1), ('blocks', 2)])
def test_attention_without_a_kernel_is_counted(remat, times):
  transformer = layers.Transformer(3, 4, 64, jnp.float32, remat, 1)
  x = jnp.ones((2, 7, 32))
  variables = transformer.init(jax.random.key(0), x)
  gradient = jax.grad(lambda params: transformer.apply(params, x).sum())
  text = jax.jit(gradient).lower(variables).compile().as_text()
  counted = hlo_costs.Program(text).costs().attention
  assert counted == {'XLA forward': 3 * times}


def test_attention_outside_of_modules_is_counted():
  q = jnp.ones((1, 2, 7, 8))
  gradient = jax.grad(lambda q: layers.attend(q, q, q).sum())
  assert _costs(gradient, q).attention == {'XLA forward': 1}


def test_a_missing_compiler_is_named_with_its_installation(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, 'find_spec', lambda name: None)
  assert 'pip install libtpu==' in chips.missing_plugin('v5e:4x4')
  assert 'pip install "jax[cuda13]==' in chips.missing_plugin('h100:8')
  with pytest.raises(ValueError, match='h100'):
    chips.find_chip('tpu:8')


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
  brief = [case.name for case in compile_steps.list_remaining_cases()]
  tables.print_tables(_results(), brief)
  printed = capsys.readouterr().out.strip().split('\n\n')
  assert len(printed) == 3
  for table in printed:
    assert table in (_FOLDER / 'README.md').read_text()


def test_results_are_of_cases():
  names = [case.name for case in compile_steps.list_cases()]
  assert len(set(names)) == len(names)
  known = _results()['cases']
  assert list(known) == [name for name in names if name in known]


@pytest.mark.parametrize('stage', ['', '_stage2'])
def test_the_large_vqrae_fits_16_chips_of_16_gb(stage):
  name = f'vqrae_fsq_siglip_l{stage}/v5e:4x4/1024/shipped'
  figures = _results()['cases'][name]
  assert figures['batch_size'] == 1024
  memory = figures['memory_gib']
  # Of 15.75 GiB.
  assert memory['peak'] < 14.5
  config = configuration.load_config(
      _ROOT / 'configs' / f'vqrae_fsq_siglip_l{stage}.py'
  )
  mesh = dict(config.partitioning.mesh)
  assert mesh == {'data': 1, 'fsdp': -1, 'tensor': 1}
  assert figures['mesh'] == {'data': 1, 'fsdp': 16, 'tensor': 1}


def test_every_attention_in_bfloat16_has_a_kernel():
  for name, figures in _results()['cases'].items():
    is_conv = re.match(r'imagenet\d+_(fsq|vq)_', name)
    if is_conv or 'needs_gib' in figures:
      continue
    attention = figures['attention']
    kind = 'cuDNN' if 'h100' in name else 'Pallas'
    expected = {f'{kind} forward', f'{kind} backward'}
    if 'float32' in name:
      expected.add('XLA forward')
    assert set(attention) == expected, name
    if name.startswith('vqrae_fsq_siglip_l/'):
      assert set(attention.values()) == {116, 40}
