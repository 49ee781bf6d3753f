"""JAX_ENABLE_X64 and JAX_NUMPY_DTYPE_PROMOTION=strict change no result."""

import contextlib
import pathlib

import chex
from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import pytest
import quantizers_test
import safetensors.numpy

from fsq_jax import configuration
from fsq_jax import models
from fsq_jax import networks
from fsq_jax import optim
from fsq_jax import partitioning
from fsq_jax import train_state
from fsq_jax import train_step
from fsq_jax.models import lpips
from fsq_jax.quantizers import base

_ROOT = pathlib.Path(__file__).parents[1]
_TESTDATA = _ROOT / 'tests' / 'testdata'
_BLOCK = 'width=16, depth=2, num_heads=2, mlp_dim=16, patch_size=4'
_TOY = {
    'data.image_size': (12, 12),
    'data.batch_size': 4,
    'model.encoder.width': 8,
    'model.encoder.mlp_dim': 8,
    'optim.warmup_steps': 0,
}
_PATCH = {
    'discriminator.name': 'patch',
    'discriminator.patch.channels': 32,
    'discriminator.patch.num_stages': 1,
    'discriminator.r1_weight': 0.1,
    'discriminator.r1_every_steps': 2,
    'discriminator.lecam_weight': 0.1,
    'discriminator.augment_probability': 0.7,
    'discriminator.augment_cutout': 0.5,
    'discriminator.uint8_fakes': True,
    'losses.adversarial.start_step': 1,
    'losses.adversarial.ramp_steps': 2,
    'losses.adversarial.weighting': 'adaptive',
}
_MLP = {'model.projector_in.mlp.width': 8}
# Overrides of configs/debug.py: together every part that a config can name.
_CONFIGS = {
    'vit': {
        'model.projector_in.name': 'standardized',
        'model.latent_noise': 0.1,
        'model.quantizer.fsq.noise': 0.5,
        'model.quantizer.fsq.noise_per': 'example',
        'model.projector_out.name': 'levels',
        'losses.reconstruction': 'l1',
        'optim.name': 'muon',
        'optim.accumulation_steps': 2,
    },
    'grouped': {
        'model.quantizer.name': 'grouped_fsq',
        'model.quantizer.grouped_fsq.convention': 'paper',
        'model.projector_in.name': 'mlp',
        'model.projector_in.mlp.bound': 'tanh',
        'model.projector_out.name': 'mlp',
        'model.encoder.position': 'sincos',
        **_MLP,
    },
    'residual': {
        'model.quantizer.name': 'residual_fsq',
        'model.quantizer.residual_fsq.stage_dropout': 0.5,
        'model.projector_in.name': 'attention',
        'model.projector_in.attention.width': 8,
        'model.projector_in.attention.depth': 1,
        'model.projector_in.attention.num_heads': 2,
        'model.projector_in.attention.mlp_dim': 8,
    },
    'lfq': {'model.quantizer.name': 'lfq', **_PATCH},
    'bsq': {
        'model.quantizer.name': 'bsq',
        'model.dtype': 'bfloat16',
        'model.remat': True,
    },
    'vq': {
        'model.quantizer.name': 'vq',
        'model.quantizer.vq.codebook_init': 'kmeans',
        'model.quantizer.vq.restart': 'batch',
        'model.projector_out.name': 'fourier',
        'model.projector_out.fourier.num_frequencies': 4,
    },
    'vq_split': {
        'model.quantizer.name': 'vq',
        'model.quantizer.vq.metric': 'cosine',
        'model.quantizer.vq.restart': 'split',
        'model.quantizer.vq.dead_share': 0.999,
        'model.quantizer.vq.entropy_weight': 0.1,
        'discriminator.name': 'stylegan',
        'discriminator.stylegan.filters': 4,
        'discriminator.stylegan.multipliers': (1, 2),
        'discriminator.loss': 'vanilla',
        'losses.adversarial.loss': 'vanilla',
    },
    'vq_gradient': {
        'model.quantizer.name': 'vq',
        'model.quantizer.vq.codebook_update': 'gradient',
        'model.quantizer.vq.gradient': 'rotation',
        'losses.perceptual.name': 'lpips_vgg16',
        'data.image_size': (16, 16),
    },
    'conv': {
        'model.encoder.name': 'conv',
        'model.decoder.name': 'conv',
        'model.encoder.conv.filters': 32,
        'model.encoder.conv.channel_multipliers': (1, 1),
        'model.encoder.conv.num_res_blocks': 1,
        'model.quantizer.name': 'simvq',
        'model.quantizer.simvq.input_projection': 'linear',
    },
    'mae': {
        'model.encoder.name': 'pretrained',
        'model.encoder.architecture': f'dinov3({_BLOCK})',
        'model.decoder.name': 'mae',
        'model.decoder.mae.grid_size': (6, 6),
        'model.decoder.mae.normalization': 'dinov2',
        'model.decoder.patch_size': 2,
        'model.encoder.checkpoint': 'nowhere',  # Not read.
        'losses.distillation_weight': 0.5,
        'discriminator.name': 'dino',
        'discriminator.dino.checkpoint': str(_TESTDATA / 'encoders/dino'),
        'discriminator.dino.architecture': (
            'dino(width=12, depth=2, num_heads=3, mlp_dim=20, patch_size=4)'
        ),
        'discriminator.dino.image_size': (12, 12),
        'discriminator.dino.blocks': (0,),
        'discriminator.dino.kernel_size': 3,
    },
    'none': {
        'model.quantizer.name': 'none',
        'model.encoder.name': 'pretrained',
        'model.encoder.architecture': f'siglip({_BLOCK})',
        'model.encoder.image_size': (12, 12),
        'losses.perceptual.name': 'vit',
        'losses.perceptual.checkpoint': str(_TESTDATA / 'encoders/dinov2'),
    },
}


@contextlib.contextmanager
def _flags():
  """Both at once: what is float64 by accident then meets a float32."""
  with jax.enable_x64(True), jax.numpy_dtype_promotion('strict'):
    yield


def _leaves(tree):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
      for path, x in flat
  }


def _check_same(actual, expected, **tolerances):
  """Dtypes and values of two trees."""
  actual, expected = _leaves(actual), _leaves(expected)
  dtypes = [{k: str(x.dtype) for k, x in y.items()} for y in (actual, expected)]
  assert dtypes[0] == dtypes[1]
  chex.assert_trees_all_close(actual, expected, **tolerances)
