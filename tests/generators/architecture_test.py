"""Architectures: parameter counts of published models, checks of options."""

import math

import jax
from jax import numpy as jnp
import pytest

from fsq_jax.generators import architecture
from fsq_jax.generators import model as models
from fsq_jax.generators import vocabulary

_LLAMA = {'qk_norm': False, 'positions': 'rope', 'causal': True}
_BERT = {
    'qk_norm': False, 'mlp': 'gelu', 'norm': 'layer', 'use_bias': True,
    'causal': False,
}  # fmt: skip


def _shapes(a, v, *, grid, num_classes, embedding='levels', head=None):
  model = models.TokenModel(
      a, v, grid, num_classes, embedding, head or 'levels_autoregressive'
  )
  inputs = [
      jax.ShapeDtypeStruct((1, math.prod(grid)), jnp.int32),
      jax.ShapeDtypeStruct((1,), jnp.int32),
      jax.ShapeDtypeStruct((1, math.prod(grid)), bool),
  ]
  if a.causal:
    inputs[-1] = None
  return jax.eval_shape(model.init, jax.random.key(0), *inputs)['params']


def _count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


# LlamaGen (ImageNet 256, 16 x 16 tokens), millions of parameters.
@pytest.mark.parametrize(
    ('name', 'codebook_size', 'millions'),
    [
        ('B', 16384, 110.9),
        ('L', 16384, 342.9),
        ('XL', 16384, 774.7),
        ('B', 64000, 184.0),
        ('XL', 64000, 896.6),
    ],
)
def test_parameters_of_llamagen(name, codebook_size, millions):
  shapes = _shapes(
      architecture.preset(name, **_LLAMA),
      vocabulary.Vocabulary(codebook_size=codebook_size),
      grid=(16, 16), num_classes=1000, embedding='table', head='flat',
  )
  assert round(_count(shapes) / 1e6, 1) == millions


# MAGVIT with 1,024 codes, 1,024 tokens and the 101 classes of UCF-101.
@pytest.mark.parametrize(
    ('name', 'millions'), [('S', 22.3), ('B', 87.3), ('L', 305.6)]
)
def test_parameters_of_magvit(name, millions):
  shapes = _shapes(
      architecture.preset(name, **_BERT),
      vocabulary.Vocabulary(codebook_size=1024),
      grid=(32, 32), num_classes=101, embedding='table', head='flat_tied',
  )
  assert round(_count(shapes) / 1e6, 1) == millions


def test_parameters_of_maskgit():
  a = architecture.Architecture(
      depth=24, width=768, num_heads=16, mlp_dim=3072, **_BERT
  )
  shapes = _shapes(
      a, vocabulary.Vocabulary(codebook_size=1024),
      grid=(16, 16), num_classes=1000, embedding='table', head='flat_tied',
  )
  # MaskGIT's output bias covers classes and the mask too, 1,001 rows more.
  assert _count(shapes) + 1001 == 172_457_193


def test_parameters_of_the_parts():
  w, depth = 64, 2
  v = vocabulary.from_levels((8, 5, 5))
  f = architecture.preset('tiny', causal=True).mlp_dim
  shapes = {
      name: _shapes(
          architecture.preset('tiny', **options), v, grid=(2, 2), num_classes=3
      )
      for name, options in (
          ('llama', _LLAMA),
          ('bert', _BERT),
          ('qk_norm', {'causal': True, 'positions': 'rope'}),
          ('adaln', {**_LLAMA, 'conditioning': 'adaln'}),
      )
  }
  blocks = {
      name: _count(x['trunk']['blocks']) / depth for name, x in shapes.items()
  }
  assert blocks['llama'] == 4 * w**2 + 3 * w * f + 2 * w
  assert blocks['bert'] == 12 * w**2 + 13 * w
  assert blocks['qk_norm'] == blocks['llama'] + 2 * w / 2
  # adaLN replaces the gains of both norms.
  assert blocks['adaln'] == blocks['llama'] + 6 * w**2 + 6 * w - 2 * w
  llama = shapes['llama']
  assert _count(llama['token_embedding']) == (9 + 6 + 6) * w
  assert _count(llama['class_embedding']) == (3 + 1) * w
  head = llama['output']
  mlp = head['mlp_in_kernel'], head['mlp_out_kernel']
  assert _count(mlp) == 3 * 2 * w**2
  assert head['kernel'].size == 18 * w


def test_more_than_eight_dimensions_share_an_mlp():
  shapes = _shapes(
      architecture.preset('tiny', causal=True), vocabulary.from_levels([2] * 9),
      grid=(1, 2), num_classes=0,
  )
  assert shapes['output']['mlp_in_kernel'].shape == (1, 64, 64)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'mlp': 'relu'}, "mlp is 'relu'; known"),
        ({'num_heads': 3}, 'does not divide'),
        ({'num_heads': 32, 'positions': 'rope'}, 'multiple of 4'),
        ({'dropout': 1.0}, r'use a rate in \[0, 1\)'),
    ],
)
def test_wrong_options_are_rejected(options, message):
  fields = {'depth': 1, 'width': 64, 'num_heads': 2, 'mlp_dim': 8}
  with pytest.raises(ValueError, match=message):
    architecture.Architecture(causal=True, **(fields | options))


def test_sizes_replace_those_of_a_preset():
  result = architecture.preset('B', causal=True, depth=2, width=96, num_heads=3)
  assert (result.depth, result.width, result.num_heads) == (2, 96, 3)
  # 8 / 3 of the width, which is below 256: a multiple of it.
  assert result.mlp_dim == 3 * 96
  assert architecture.preset('B', causal=True, mlp_dim=40).mlp_dim == 40


def test_unknown_preset_is_rejected():
  with pytest.raises(ValueError, match="'huge'; known"):
    architecture.preset('huge', causal=True)
