"""JAX_ENABLE_X64 and JAX_NUMPY_DTYPE_PROMOTION=strict change no result."""

import contextlib
import pathlib
import re

import chex
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsq_jax import adversarial
from fsq_jax import configuration
from fsq_jax import models
from fsq_jax.evaluation import evaluator as evaluators
from fsq_jax.perceptual import classifiers
from fsq_jax.perceptual import distance
from fsq_jax.perceptual import inception
from fsq_jax.perceptual import lpips
from fsq_jax.runtime import partitioning
from fsq_jax.tokenizer import Tokenizer
from fsq_jax.train import optim
from fsq_jax.train import state as train_state
from fsq_jax.train import step as train_step

_ROOT = pathlib.Path(__file__).parents[1]
_TESTDATA = _ROOT / 'tests' / 'testdata'
_ENCODER = str(_TESTDATA / 'encoders' / 'dinov2')
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
        'model.remat': 'blocks',
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
        'discriminator.stylegan.downsampling': 'average',
        'discriminator.loss': 'vanilla',
        'losses.adversarial.loss': 'vanilla',
    },
    'vq_gradient': {
        'model.quantizer.name': 'vq',
        'model.quantizer.vq.codebook_update': 'gradient',
        'model.quantizer.vq.gradient': 'rotation',
        'losses.perceptual.name': 'lpips_vgg16',
        'losses.perceptual.checkpoint': 'nowhere',  # Shapes are enough.
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
        'model.encoder.checkpoint': 'nowhere',
        'model.dtype': 'bfloat16',
        'discriminator.dino.dtype': 'bfloat16',
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
        'losses.perceptual.checkpoint': _ENCODER,
        'losses.perceptual.dtype': 'bfloat16',
        'model.dtype': 'bfloat16',
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
      jax.tree_util.keystr(path, simple=True, separator='/'): x
      for path, x in flat
  }


def _dtypes(tree):
  return {name: str(x.dtype) for name, x in _leaves(tree).items()}


def _check_same(actual, expected, **tolerances):
  """Compares dtypes and values of two trees."""
  assert _dtypes(actual) == _dtypes(expected)
  chex.assert_trees_all_close(
      jax.device_get(actual), jax.device_get(expected), **tolerances
  )


def _load_config(overrides):
  config = configuration.load_config(_ROOT / 'configs' / 'debug.py')
  config.update_from_flattened_dict({**_TOY, **overrides})
  configuration.check_config(config)
  return config


def _build(config, network=None):
  """The model, the builder of its state, and the functions of a step."""
  mesh = partitioning.create_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  model = models.build_autoencoder(config.model, config.data.image_size)
  optimizer = optim.build_optimizer(config.optim, config.train.num_steps)
  builder = train_state.build_state_builder(config, model, optimizer, mesh)
  step = train_step.build_train_step(model, optimizer, config, network)
  return builder, step, evaluators.build_eval_step(model)


def _abstract_networks(config):
  """The network of a perceptual loss, and the variables of all networks."""
  images = jax.ShapeDtypeStruct((1, *config.data.image_size, 3), jnp.float32)
  network, variables = None, {}
  if config.losses.perceptual.name == 'lpips_vgg16':
    network = lpips.Lpips('vgg16')
    variables['perceptual'] = jax.eval_shape(
        network.init, jax.random.key(0), images, images
    )
  elif config.losses.perceptual.name == 'vit':
    loaded = distance.build_perceptual_loss(
        'vit', _ENCODER, dtype=jnp.bfloat16
    )
    network, variables['perceptual'] = loaded.module, loaded.variables
  if config.discriminator.name == 'dino':
    discriminator = adversarial.build_discriminator(config.discriminator)
    params = jax.eval_shape(discriminator.init, jax.random.key(0), images)
    backbone = params['params']['backbone']
    variables['discriminator'] = {'backbone': backbone}
  return network, variables


@pytest.mark.slow
@pytest.mark.parametrize('name', _CONFIGS)
def test_steps_of_every_family_keep_their_dtypes(name):
  config = _load_config(_CONFIGS[name])
  images = jax.ShapeDtypeStruct((4, *config.data.image_size, 3), np.uint8)
  with _flags():
    network, variables = _abstract_networks(config)
    builder, step, eval_step = _build(config, network)
    jaxpr, (state, scalars) = jax.make_jaxpr(step, return_shape=True)(
        builder.abstract, images, variables
    )
    output = jax.eval_shape(eval_step, builder.abstract.eval_variables, images)
  assert _dtypes(state) == _dtypes(builder.abstract)
  dtypes = {**_dtypes(state), **_dtypes(scalars), **_dtypes(output)}
  wide = {name: dtype for name, dtype in dtypes.items() if '64' in dtype}
  # What a run without the flags writes and reads.
  assert not wide
  # Scalars may be: they are weak, and become float32 where they are used.
  assert not set(re.findall(r'[fc]64\[\d[^\]]*\]|c128', str(jaxpr)))


@pytest.mark.slow
def test_steps_give_the_same():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 4, 12, 12, 3), np.uint8)

  def run():
    # With a discriminator; quantizers_test does this for each quantizer.
    config = _load_config(_CONFIGS['lfq'])
    builder, step, eval_step = _build(config)
    state, rows = builder.create(), []
    step = jax.jit(step)
    for batch in images:
      state, scalars = step(state, batch)
      rows.append(scalars)
    output = jax.jit(eval_step)(state.eval_variables, images[0])
    return jax.device_get((state, rows, output.metrics))

  expected = run()
  with _flags():
    actual = run()
  # Adam divides by the root of small squares.
  _check_same(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_tokens_are_the_same():
  images = np.random.default_rng(0).integers(0, 256, (3, 20, 17, 3), np.uint8)

  def run():
    tokenizer = Tokenizer.from_workdir(_TESTDATA / 'run', batch_size=4)
    tokens = tokenizer.encode(images, fit='pad')
    return tokens, tokenizer.decode(tokens.astype(np.int64), (20, 17))

  tokens, decoded = run()
  with _flags():
    actual, decoded_again = run()
  assert actual.dtype == tokens.dtype
  # Programs differ in their last bits.
  assert np.mean(actual != tokens) < 1e-2
  difference = np.abs(decoded_again.astype(int) - decoded)
  assert np.mean(difference > 1) < 1e-2


@pytest.mark.parametrize('build', [
    pytest.param(inception.InceptionV3, marks=pytest.mark.slow),
    lambda: lpips.Lpips('alexnet'),
    lambda: classifiers.ConvNext((8, 16, 24, 32), (1, 1, 2, 1), 10, 'highest'),
    pytest.param(
        lambda: classifiers.ResNet((1, 2, 1, 1), 10, 'highest'),
        marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_frozen_networks_keep_their_dtypes(build):
  with _flags():
    module = build()
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    images = (images,) * (2 if isinstance(module, lpips.Lpips) else 1)
    output, variables = jax.eval_shape(
        module.init_with_output, jax.random.key(0), *images
    )
  assert set(_dtypes((output, variables)).values()) == {'float32'}
