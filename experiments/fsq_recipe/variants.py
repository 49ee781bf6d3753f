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
  """The gradient of the bound replaced by `strength` times its slope at 0."""

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
    'dithered_25': (_Dithered, 0.25),
    'dithered_100': (_Dithered, 1.0),
    'pass_through_30': (_PassThrough, 0.3),
    'soft_rounded_50': (_SoftRounded, 0.5),
}
RENORMALIZED = 'renormalized'
NAMES = (*QUANTIZERS, RENORMALIZED)


def install(name: str) -> None:
  """Replaces a part of the package by the variant, in this process.

  Args:
    name: one of `NAMES`.
  """
  if name == RENORMALIZED:
    projectors.StandardizedProjectorIn = _RenormalizedProjectorIn
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
