"""Measures loss networks in bfloat16 against float32, on photographs.

  python -m experiments.accelerators.loss_dtypes \
      --lpips=WEIGHTS/lpips_vgg16.safetensors --encoder=DIR

Prints the relative error of LPIPS's features and distances and of the
discriminator's latents, logits and gradients: the RMS of the difference,
divided by the RMS of the float32 values. --encoder is a ViT-S for the
discriminator's backbone, as in `models.load_encoder`; without it the backbone
is a random DINO ViT-S/8. The heads are random, with one power iteration.
"""

import argparse
from collections.abc import Iterator, Sequence
import functools
import itertools
import sys
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from fsq_jax.adversarial import dino_discriminator
from fsq_jax.data import photos
from fsq_jax.models.pretrained import encoder as pretrained_vit
from fsq_jax.models.pretrained import loading
from fsq_jax.perceptual import lpips

_SIZE = (224, 224)
_LAYERS = ('relu1_2', 'relu2_2', 'relu3_3', 'relu4_3', 'relu5_3')
_KERNEL_SIZE = 9
_DTYPES = (jnp.float32, jnp.bfloat16)


def load_photos(num_images: int) -> jax.Array:
  """Returns [num_images, 224, 224, 3] crops of photographs in [-1, 1]."""
  grid = photos.TrainGrid(size=_SIZE)
  indices = np.linspace(0, len(grid) - 1, num_images).astype(int)
  crops = np.stack([grid.load(int(i)) for i in indices])
  return jnp.asarray(crops, jnp.float32) / 127.5 - 1


def relative_error(values: jax.Array, expected: jax.Array) -> float:
  """Returns RMS(values - expected) / RMS(expected)."""
  values, expected = (np.asarray(x, np.float64) for x in (values, expected))
  return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def measure_lpips(path: str, images: jax.Array) -> Iterator[tuple[str, float]]:
  """Yields errors of LPIPS: of each layer and of distances to noisy images."""
  noise = jax.random.normal(jax.random.key(0), images.shape, jnp.float32)
  noisy = jnp.clip(images + 0.1 * noise, -1, 1)

  def evaluate(dtype: jnp.dtype) -> Any:
    module, variables, _ = lpips.load_lpips(
        path, 'vgg16', precision='default', dtype=dtype
    )

    @jax.jit
    def call(variables):
      features = module.apply(variables, images, method='features')
      return features, module.apply(variables, images, noisy)

    return call(variables)

  (features, distances), (rounded, others) = map(evaluate, _DTYPES)
  for layer, x, y in zip(_LAYERS, rounded, features, strict=True):
    yield f'LPIPS, {layer}', relative_error(x, y)
  yield 'LPIPS, distances', relative_error(others, distances)


def measure_discriminator(
    encoder: str | None, images: jax.Array
) -> Iterator[tuple[str, float]]:
  """Yields errors of latents and logits, for each block with a head."""
  backbone = pretrained_vit.PretrainedVit(
      dino_discriminator.ARCHITECTURE, _SIZE, final_affine=False,
      resize='bilinear',
  )
  method = 'latents_of_blocks'
  if encoder is None:
    init = jax.jit(lambda key: backbone.init(key, images, method=method))
    params = init(jax.random.key(0))['params']
  else:
    loaded = loading.load_encoder(encoder, _SIZE, final_affine=False)
    params = loaded.variables['params']
    backbone = backbone.clone(architecture=loaded.module.architecture)

  def encode(dtype: jnp.dtype) -> jax.Array:
    module = backbone.clone(dtype=dtype)
    latents = jax.jit(
        lambda params: module.apply({'params': params}, images, method=method)
    )(params)
    return latents[jnp.array(dino_discriminator.BLOCKS)]

  @functools.partial(jax.jit, static_argnums=0)
  def classify(
      dtype: jnp.dtype, latents: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    head = dino_discriminator.DinoHead(_KERNEL_SIZE, dtype)

    def call(latents):
      logits, back_propagate = jax.vjp(
          lambda x: head.init_with_output(jax.random.key(1), x, True)[0],
          latents,
      )
      return logits, back_propagate(jnp.ones_like(logits))[0]

    return jax.lax.map(call, latents)

  latents, rounded = map(encode, _DTYPES)
  expected = classify(jnp.float32, latents)
  cases = {'latents': (rounded, latents)}
  for name, result in (
      ('heads in bfloat16', classify(jnp.bfloat16, latents)),
      ('backbone in bfloat16', classify(jnp.float32, rounded)),
      ('both in bfloat16', classify(jnp.bfloat16, rounded)),
  ):
    cases[f'logits, {name}'] = (result[0], expected[0])
    # Of the sum of the logits, as in the generator's hinge loss.
    cases[f'gradient at the latents, {name}'] = (result[1], expected[1])
  for name, pair in cases.items():
    for block, x, y in zip(
        dino_discriminator.BLOCKS, *pair, strict=True
    ):
      yield f'{name}, block {block}', relative_error(x, y)


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints a table of relative errors."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--lpips', help='safetensors file of LPIPS with VGG16')
  parser.add_argument('--encoder', help='weights of the backbone')
  parser.add_argument('--num_images', type=int, default=4)
  options = parser.parse_args(arguments)
  images = load_photos(options.num_images)
  errors = measure_discriminator(options.encoder, images)
  if options.lpips:
    errors = itertools.chain(measure_lpips(options.lpips, images), errors)
  sys.stdout.write('| values | relative error |\n| --- | --- |\n')
  for name, error in errors:
    sys.stdout.write(f'| {name} | {error:.2%} |\n')
    sys.stdout.flush()


if __name__ == '__main__':
  main()
