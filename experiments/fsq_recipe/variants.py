"""Variants of FSQ that the study tried and the package does not have.

  python -m experiments.fsq_recipe.variants NAME --config=... --workdir=...

trains as launch.py does, with one part replaced.
"""

import sys
from typing import ClassVar

from absl import app
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from experiments.fsq_recipe import latents as latents_lib
from fsq_jax.models import autoencoder
from fsq_jax.models import projectors
from fsq_jax.quantizers import base
from fsq_jax.quantizers import builder
from fsq_jax.quantizers import fsq


class _Variant(fsq.FSQ):
  """FSQ whose training uses other codes or other gradients."""

  strength: ClassVar[float]

  def __call__(
      self, z: jax.Array, *, train: bool = False
  ) -> base.QuantizerOutput:
    out = super().__call__(z, train=train)
    if not train or self.is_initializing():
      return out
    grid = self._grid
    steps = grid.to_steps(grid.bound(z))
    return out._replace(z_q=self._train(z, steps, out.z_q))

  def _train(self, z, steps, z_q) -> jax.Array:
    """Returns the codes of training.

    Args:
      z: latents [..., d], float32.
      steps: the same, bounded, in steps between codes.
      z_q: straight-through codes.
    """
    raise NotImplementedError


class _Unrounded(_Variant):
  """Quantization dropout: a fraction of the images is not rounded."""

  def _train(self, z, steps, z_q):
    key = self.make_rng('quantizer')
    shape = (len(z), *(1 for _ in z.shape[1:]))
    is_free = jax.random.bernoulli(key, self.strength, shape)
    return jnp.where(is_free, steps / self._grid.scale, z_q)


class _UnroundedDimensions(_Variant):
  """Quantization dropout of single dimensions of an image."""

  def _train(self, z, steps, z_q):
    key = self.make_rng('quantizer')
    shape = (len(z), *(1 for _ in z.shape[1:-1]), z.shape[-1])
    is_free = jax.random.bernoulli(key, self.strength, shape)
    return jnp.where(is_free, steps / self._grid.scale, z_q)


class _Annealed(_Variant):
  """A variant whose `strength` falls to 0 over the first half of the run."""

  num_steps: ClassVar[int] = 1500

  def setup(self):
    self.step = self.variable('batch_stats', 'step', jnp.zeros, ())

  def _annealed_strength(self) -> jax.Array:
    strength = self.strength * (1 - 2 * self.step.value / self.num_steps)
    self.step.value += 1
    return jnp.maximum(strength, 0)


class _UnroundedAnnealed(_Annealed):
  """Quantization dropout of images, annealed."""

  def _train(self, z, steps, z_q):
    key = self.make_rng('quantizer')
    shape = (len(z), *(1 for _ in z.shape[1:]))
    is_free = jax.random.bernoulli(key, self._annealed_strength(), shape)
    return jnp.where(is_free, steps / self._grid.scale, z_q)


class _NoiseAnnealed(_Annealed):
  """Uniform noise of at most `strength` steps on the codes, annealed."""

  def _train(self, z, steps, z_q):
    noise = jax.random.uniform(self.make_rng('quantizer'), z_q.shape, minval=-1)
    return z_q + self._annealed_strength() * noise / self._grid.scale


class _Dithered(_Variant):
  """Stochastic rounding: noise of `strength` steps before rounding."""

  def _train(self, z, steps, z_q):
    grid = self._grid
    noise = jax.random.uniform(
        self.make_rng('quantizer'), steps.shape, minval=-0.5, maxval=0.5
    )
    digits = self._clip(grid.round(steps + self.strength * noise))
    return _straight_through(grid.codes(digits), z_q)


class _PassThrough(_Variant):
  """Part of the gradient, `strength` of the slope at 0, bypasses the bound."""

  def _train(self, z, steps, z_q):
    slope = self._grid.half / self._grid.scale
    mixed = self.strength * slope * z + (1 - self.strength) * z_q
    return _straight_through(z_q, mixed)


class _SoftRounded(_Variant):
  """The gradient of y + strength * sin(2 pi y) / (2 pi), y in steps."""

  def _train(self, z, steps, z_q):
    y = steps + self._grid.origin
    soft = y + self.strength * jnp.sin(2 * jnp.pi * y) / (2 * jnp.pi)
    return _straight_through(z_q, soft / self._grid.scale)


class _LatentCodebook(fsq.FSQ):
  """FSQ inside an autoencoder of 8 channels, which stands for VQ's codebook.

  Latents z go through an MLP, FSQ and another MLP. As in VQ the decoder's
  gradient goes straight from the result to z, and both MLPs are trained only
  by the squared error between the two, which is also the commitment loss.
  """

  code_dim: ClassVar[int] = 8

  def setup(self):
    self.fsq = fsq.FSQ(self.levels, commitment_weight=0.0)
    self.into = _Mlp(len(self.levels))
    self.out = _Mlp(self.code_dim)

  def __call__(
      self, z: jax.Array, *, train: bool = False
  ) -> base.QuantizerOutput:
    inner = self.fsq(self.into(jax.lax.stop_gradient(z)), train=train)
    codes = self.out(inner.z_q)
    error = codes - jax.lax.stop_gradient(z)
    commitment = z - jax.lax.stop_gradient(codes)
    return inner._replace(
        z_q=_straight_through(codes, z),
        loss=jnp.mean(jnp.square(error) + 0.25 * jnp.square(commitment)),
    )

  def _codes(self, digits):
    return self.out(self.fsq.digits_to_codes(digits))


class _Mlp(nn.Module):
  """A hidden layer beside a linear map; only the linear map at first."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = nn.gelu(nn.Dense(256, name='hidden')(x))
    residual = nn.Dense(
        self.width, kernel_init=nn.initializers.zeros, name='output'
    )(hidden)
    return nn.Dense(self.width, name='linear')(x) + residual


class _ResidualProjectorIn(nn.Module):
  """LayerNorm and `_Mlp`."""

  code_dim: int

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    del train  # Makes no difference.
    x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name='norm')(latents)
    return _Mlp(self.code_dim, name='mlp')(x)


class _UnroundedAutoencoder(autoencoder.Autoencoder):
  """Trains encoder and decoder by two reconstructions.

  The decoder learns from rounded codes, the encoder from the latents before
  rounding, through the decoder: the gradient is taken where the latent is, and
  not at the nearest code.
  """

  def __call__(self, images, *, train=False, size=None):
    if not train:
      return super().__call__(images, train=train, size=size)
    latents = self.encoder(images)
    z = self.projector_in(latents, train=train)
    out = self.quantizer(z, train=train)
    model, weights = self.unbind()
    decoded = model.apply(
        jax.lax.stop_gradient(weights),
        latents_lib.bound(self.quantizer, z),
        method='decode',
    )
    return autoencoder.AutoencoderOutput(
        reconstructions=self.decode(jax.lax.stop_gradient(out.z_q)),
        quantizer_loss=out.loss + jnp.mean(jnp.square(decoded - images)),
        indices=out.indices,
        latents=latents,
    )


class _TableProjectorOut(nn.Module):
  """A linear map of the codes plus an embedding for each code.

  The embeddings are 0 at first. The encoder's gradient is the linear map's.
  """

  width: int
  quantizer: fsq.FSQ
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, codes: jax.Array) -> jax.Array:
    shape = self.quantizer.codebook_size, self.width
    table = self.param('table', nn.initializers.zeros, shape)
    indices = self.quantizer.codes_to_indices(codes)
    linear = nn.Dense(self.width, name='linear')(codes)
    return linear + jnp.take(table, indices, axis=0)


class _DifferencesProjectorOut(nn.Module):
  """An MLP of the code whose gradient is its finite differences.

  The gradient of a channel is half the difference between the results at the
  next and the previous level, so the encoder learns what a step of the code
  really changes.
  """

  width: int
  quantizer: fsq.FSQ
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, codes: jax.Array) -> jax.Array:
    levels = np.asarray(self.quantizer.levels, np.int32)
    sizes = np.asarray(self.quantizer.code_steps, np.float32)
    table = projectors.MlpProjectorOut(self.width, (levels - 1) / 2 * sizes)(
        self.quantizer.indices_to_codes(
            jnp.arange(self.quantizer.codebook_size)
        )
    )
    digits = self.quantizer.codes_to_digits(codes)
    error = (codes - jax.lax.stop_gradient(codes)) / sizes

    def take(table, digits):
      indices = self.quantizer.digits_to_indices(digits)
      return jnp.take(table, indices, axis=0)

    out, fixed = take(table, digits), jax.lax.stop_gradient(table)
    for i, level in enumerate(levels):
      above = jnp.minimum(digits[..., i] + 1, level - 1)
      below = jnp.maximum(digits[..., i] - 1, 0)
      after, before = (
          take(fixed, digits.at[..., i].set(x)) for x in (above, below)
      )
      slope = (after - before) / (above - below)[..., None]
      out += error[..., i, None] * slope
    return out


class _RenormalizedProjectorIn(nn.Module):
  """Batch renormalization (arXiv 1702.03275) in place of BatchNorm.

  Normalizes by the running statistics, in training too; the gradients are
  BatchNorm's.
  """

  code_dim: int

  @nn.compact
  def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
    z = nn.Dense(
        self.code_dim, use_bias=False, dtype=jnp.float32, name='linear'
    )(latents)
    shape = (self.code_dim,)
    mean = self.variable('batch_stats', 'mean', jnp.zeros, shape)
    variance = self.variable('batch_stats', 'var', jnp.ones, shape)
    scale = jnp.sqrt(variance.value + 1e-5)
    if not train:
      return (z - mean.value) / scale
    axes = tuple(range(z.ndim - 1))
    batch_mean, batch_variance = jnp.mean(z, axes), jnp.var(z, axes)
    batch_scale = jnp.sqrt(batch_variance + 1e-5)
    ratio, shift = jax.lax.stop_gradient(
        (batch_scale / scale, (batch_mean - mean.value) / scale)
    )
    out = (z - batch_mean) / batch_scale * ratio + shift
    keep = 0.0 if self.is_initializing() else 0.99
    for average, value in ((mean, batch_mean), (variance, batch_variance)):
      value = jax.lax.stop_gradient(value)
      average.value = keep * average.value + (1 - keep) * value
    return out


def _straight_through(values, gradients) -> jax.Array:
  """Returns the values with the gradients of another array."""
  values = jax.lax.stop_gradient(values)
  return values + (gradients - jax.lax.stop_gradient(gradients))


# By name: class and strength.
QUANTIZERS = {
    'unrounded_25': (_Unrounded, 0.25),
    'unrounded_50': (_Unrounded, 0.5),
    'unrounded_dimensions_25': (_UnroundedDimensions, 0.25),
    'unrounded_annealed_50': (_UnroundedAnnealed, 0.5),
    'noise_annealed_50': (_NoiseAnnealed, 0.5),
    'dithered_25': (_Dithered, 0.25),
    'dithered_100': (_Dithered, 1.0),
    'pass_through_30': (_PassThrough, 0.3),
    'soft_rounded_50': (_SoftRounded, 0.5),
    'latent_codebook': (_LatentCodebook, None),
}
# By name: the class of `projectors` that is replaced, and the variant.
PROJECTORS = {
    'renormalized': ('StandardizedProjectorIn', _RenormalizedProjectorIn),
    'residual_in': ('LinearProjectorIn', _ResidualProjectorIn),
    'table': ('LevelsProjectorOut', _TableProjectorOut),
    'mlp_differences': ('LevelsProjectorOut', _DifferencesProjectorOut),
}
UNROUNDED = 'unrounded_gradient'
NAMES = (*QUANTIZERS, *PROJECTORS, UNROUNDED)


def install(name: str) -> None:
  """Replaces a part of the package by the variant, in this process.

  Args:
    name: one of `NAMES`.
  """
  if name == UNROUNDED:
    autoencoder.Autoencoder = _UnroundedAutoencoder
    return
  if name in PROJECTORS:
    setattr(projectors, *PROJECTORS[name])
    return
  kind, strength = QUANTIZERS[name]
  builder.QUANTIZERS['fsq'] = type(kind.__name__, (kind,), {
      'strength': strength, '__module__': __name__,
  })  # fmt: skip


def main() -> None:
  """Installs the variant that the first argument names, and trains."""
  import launch

  name = sys.argv.pop(1) if len(sys.argv) > 1 else None
  if name not in NAMES:
    sys.exit(f'The first argument is {name!r}; known: {", ".join(NAMES)}.')
  install(name)
  app.run(launch.main, flags_parser=launch.parse_flags)


if __name__ == '__main__':
  main()
